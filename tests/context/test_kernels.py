"""Attention with its log-sum-exp against a dense reference in fp64."""

import math

import pytest
import torch
import torch.nn.functional as F

from holdfast.context import kernels
from holdfast.context.kernels import Spec, attention_with_lse, merge_lse
from holdfast.context.masks import Causal, Dropout, blocks
from holdfast.errors import UsageError
from holdfast.meter import Meter

B, HQ, D = 2, 4, 8


def dense(q, k, v, mask=None, bias=None, scale=None, factor=1.0):
    """The reference: all scores at once, in fp64."""
    q, k, v = q.double(), k.double(), v.double()
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores if bias is None else scores + bias.double()
    scores = scores if mask is None else scores.masked_fill(~mask, -math.inf)
    lse = scores.logsumexp(-1)
    p = (scores - lse.masked_fill(lse == -math.inf, 0)[..., None]).exp()
    return (p * factor) @ v, lse


def tensors(n=33, m=40, heads=2, dv=D, dtype=torch.float32):
    shapes = (B, HQ, n, D), (B, heads, m, D), (B, heads, m, dv)
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def agree(given, found, reference, tolerance=1e-5):
    """Outputs, log-sum-exps and all gradients; the gradient of the log-sum-exp included."""
    (out, lse), (want, want_lse) = found, reference
    blind = want_lse == -math.inf
    assert torch.equal(lse == -math.inf, blind)
    assert not out[blind].any()
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    got = torch.autograd.grad([out, lse], given, [dout, dlse])
    dlse = dlse.masked_fill(blind, 0)
    total = (want * dout).sum() + (want_lse.masked_fill(blind, 0) * dlse).sum()
    expected = torch.autograd.grad(total, given)
    for x, y in zip((out, lse.masked_fill(blind, 0), *got),
                    (want, want_lse.masked_fill(blind, 0), *expected), strict=True):  # fmt: skip
        torch.testing.assert_close(x.double(), y.double(), atol=tolerance, rtol=tolerance)


def scattered(n, m):
    mask = torch.rand(B, 1, n, m) > 0.4
    mask[:, :, n // 2] = False
    mask[0, :, :3] = False
    return mask


MASKS = {
    "none": lambda n, m: None,
    "causal": lambda n, m: Causal(),
    "last queries": lambda n, m: Causal(m - n),
    "first queries see nothing": lambda n, m: Causal(-5),
    "keys beyond": lambda n, m: Causal(3),
    "tensor with blind rows": scattered,
    "one for all": lambda n, m: torch.rand(n, m) > 0.4,
    "by head": lambda n, m: lambda b, h, i, j: (j <= i + 2) & ((h + j + b) % 3 > 0),
}


@pytest.fixture(params=["fused", "torch"])
def path(request, monkeypatch):
    """The same cases on torch operations alone, as on devices without a fused kernel."""
    if request.param == "torch":
        monkeypatch.setattr(kernels, "choose_path", lambda *_, **__: "torch")
    return request.param


@pytest.mark.parametrize("n", [33, 1])
@pytest.mark.parametrize("chunks", [(8, 16), (512, 512)])
@pytest.mark.parametrize("kind", MASKS)
def test_masks_equal_the_dense_reference(path, kind, chunks, n):
    given = tensors(n)
    mask = MASKS[kind](n, 40)
    seen = mask
    if callable(mask):
        b, h, i = (
            torch.arange(B).view(-1, 1, 1, 1),
            torch.arange(HQ).view(-1, 1, 1),
            torch.arange(n),
        )
        seen = mask(b, h, i.view(-1, 1), torch.arange(40)).expand(B, HQ, n, 40)
    found = attention_with_lse(*given, mask=mask, q_chunk=chunks[0], k_chunk=chunks[1])
    agree(given, found, dense(*given, seen))


@pytest.mark.parametrize("shape", [(B, HQ, 33, 40), (HQ, 1, 40), (1, 1, 33, 1), (40,)])
def test_biases_and_their_gradients(path, shape):
    given = tensors(dv=5)
    bias = torch.randn(shape, requires_grad=True)
    mask = scattered(33, 40)
    found = attention_with_lse(*given, mask=mask, bias=bias, q_chunk=8, k_chunk=16)
    agree([*given, bias], found, dense(*given, mask, bias))
    found = attention_with_lse(*given, mask=Causal(), bias=bias.detach(), scale=0.7)
    agree(given, found, dense(*given, torch.ones(33, 40).tril().bool(), bias.detach(), 0.7))


@pytest.mark.parametrize("heads", [1, 4])
def test_heads_values_of_another_width_and_strides(path, heads):
    q, k, v = tensors(heads=heads, dv=11)
    found = attention_with_lse(q, k, v, mask=Causal(7))
    agree((q, k, v), found, dense(q, k, v, torch.ones(33, 40).tril(7).bool()))
    # Models give views of (B,n,H,d); last dimensions may be strided, too.
    found = attention_with_lse(q, k, v, mask=Causal(7))
    want = [*found, *torch.autograd.grad(found, (q, k, v), [torch.ones_like(x) for x in found])]
    for relay in (
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: x.mT.contiguous().mT,
    ):
        laid = [relay(x.detach()).requires_grad_() for x in (q, k, v)]
        out, lse = attention_with_lse(*laid, mask=Causal(7))
        ones = [relay(torch.ones_like(out)), torch.ones_like(lse)]
        for x, y in zip(
            (out, lse, *torch.autograd.grad((out, lse), laid, ones)), want, strict=True
        ):
            torch.testing.assert_close(x, y)


def test_gradcheck(path):
    shapes = (1, 2, 5, 3), (1, 1, 6, 3), (1, 1, 6, 2), (2, 1, 6)
    *given, bias = (torch.randn(x, dtype=torch.float64, requires_grad=True) for x in shapes)
    mask = torch.rand(1, 1, 5, 6) > 0.3
    mask[:, :, 0] = True

    def call(q, k, v, bias):
        return attention_with_lse(q, k, v, mask=mask, bias=bias, q_chunk=2, k_chunk=4)

    assert torch.autograd.gradcheck(call, (*given, bias))
    q, k, v = given
    assert attention_with_lse(q, k, v)[1].dtype == torch.float64


def test_chunks_do_not_matter_and_large_logits_stay_finite(path):
    given = tensors()
    mask = scattered(33, 40)
    whole = attention_with_lse(*given, mask=mask)
    dout = torch.randn_like(whole[0])
    grads = torch.autograd.grad(whole[0], given, dout, retain_graph=True)
    for chunks in ((1, 40), (33, 1), (7, 9)):
        parts = attention_with_lse(*given, mask=mask, q_chunk=chunks[0], k_chunk=chunks[1])
        torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-6)
        found = torch.autograd.grad(parts[0], given, dout)
        torch.testing.assert_close(found, grads, atol=1e-6, rtol=1e-5)
    for shift in (1e4, -1e4):
        bias = torch.full((1, 1, 1, 40), shift)
        out, lse = attention_with_lse(*given, mask=mask, bias=bias, q_chunk=8, k_chunk=16)
        torch.testing.assert_close(out, whole[0], atol=2e-3, rtol=0)  # 1e4 + x has few digits left
        torch.testing.assert_close(lse, whole[1] + shift, atol=2e-3, rtol=0)
        grads = torch.autograd.grad(out.sum(), given)
        assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_summed_in_thirty_two(path, dtype):
    given = [x.detach().to(dtype).requires_grad_() for x in tensors(64, 512)]
    out, lse = attention_with_lse(*given, mask=Causal(448), q_chunk=16, k_chunk=16)
    want, want_lse = dense(*given, torch.ones(64, 512).tril(448).bool())
    assert out.dtype == dtype and lse.dtype == torch.float32
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(out.double(), want, atol=eps, rtol=eps)
    dout = torch.randn_like(out)
    got = torch.autograd.grad(out, given, dout)
    expected = torch.autograd.grad(want, given, dout.double())
    for x, y in zip(got, expected, strict=True):
        assert x.dtype == dtype
        torch.testing.assert_close(x.double(), y.double(), atol=4 * eps, rtol=2 * eps)


def test_a_wide_bias_is_not_rounded_to_sixteen_bits():
    q, k, v = (x.detach().bfloat16() for x in tensors())
    bias = torch.arange(40.0) + 1000  # bfloat16 would round these to multiples of 4
    _, lse = attention_with_lse(q, k, v, bias=bias)
    torch.testing.assert_close(lse.double(), dense(q, k, v, bias=bias)[1], atol=1e-3, rtol=0)


def test_merge_equals_attention_over_all_keys(path):
    given = tensors()
    q, k, v = given
    mask = scattered(33, 40)
    parts = [
        attention_with_lse(q, k[:, :, a:b], v[:, :, a:b], mask=mask[..., a:b])
        for a, b in ((0, 1), (1, 30), (30, 40))
    ]
    agree(given, merge_lse(parts), dense(*given, mask))
    half = merge_lse([(out.bfloat16(), lse) for out, lse in parts])
    assert half[0].dtype == torch.bfloat16
    with pytest.raises(UsageError, match="merge_lse got no part"):
        merge_lse([])


def test_dropout_is_a_function_of_seed_and_place():
    given = tensors()
    factor = Dropout(0.3, 5).factor((B, HQ, 33, 40), (0, 0), given[0])
    mask = scattered(33, 40)
    for chunks in ((512, 512), (8, 16)):
        found = attention_with_lse(
            *given, mask=mask, dropout=0.3, seed=5, q_chunk=chunks[0], k_chunk=chunks[1]
        )
        agree(given, found, dense(*given, mask, factor=factor))
    shifted = Dropout(0.3, 5, rows=4, cols=2).factor((B, HQ, 9, 8), (1, 3), given[0])
    assert torch.equal(shifted, factor[:, :, 5:14, 5:13])
    assert not torch.equal(factor, Dropout(0.3, 6).factor(factor.shape, (0, 0), given[0]))


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_drops_its_share_and_no_pattern_shows(rate):
    kept = Dropout(rate, -3).factor((2, 4, 256, 256), (0, 0), torch.zeros(())) > 0
    x = kept.double() - (1 - rate)
    unit = math.sqrt(rate * (1 - rate))
    deviation = unit / math.sqrt(x.numel())
    assert abs(x.mean()) < 4 * deviation
    # Any two heads, neighbouring rows or columns, and both at once, are as good as independent.
    pairs = [(x[0, 0], x[1, 3]), (x[0, 1], x[0, 2]), (x[:, :, 1:], x[:, :, :-1]),
             (x[..., 1:], x[..., :-1]), (x[..., 1:, 1:], x[..., :-1, :-1])]  # fmt: skip
    for a, b in pairs:
        assert abs((a * b).mean()) < 5 * unit**2 / math.sqrt(a.numel())
    # Squares of rows and columns: x[i,j] x[i',j] x[i,j'] x[i',j'] finds a mask that factorises.
    square = x[..., ::2, ::2] * x[..., 1::2, ::2] * x[..., ::2, 1::2] * x[..., 1::2, 1::2]
    assert abs(square.mean()) < 5 * unit**4 / math.sqrt(square.numel())
    assert x.mean(-1).abs().max() < 6 * unit / 16 and x.mean(-2).abs().max() < 6 * unit / 16


def test_causal_is_never_evaluated_where_all_or_nothing_is_seen():
    q = k = torch.zeros(1, 1, 64, D)
    for shift in (-70, -20, -3, 0, 5, 64, 90):
        seen = torch.ones(64, 64).tril(shift).bool()
        for whole in (False, True):
            found = torch.zeros(64, 64, dtype=torch.int)
            masks = 0
            for block in blocks(Causal(shift), q, k, (16, 16), whole=whole):
                part = torch.ones_like(found[block.rows, block.cols])
                part = part.tril() if block.causal else part
                if block.mask is not None:
                    part, masks = part * block.mask[0, 0], masks + 1
                found[block.rows, block.cols] += part
            assert torch.equal(found, seen.int())
            assert masks <= 2 * 4 * (not whole)  # the diagonal touches two blocks of a row


def test_nothing_of_quadratic_size_is_held():
    def extra(n, mask):
        given = [torch.randn(1, 2, n, 16, requires_grad=True) for _ in range(3)]
        saved: list[torch.Tensor] = []

        def keep(x, saved=saved):
            saved.append(x)
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            out, lse = attention_with_lse(*given, mask=mask, q_chunk=32, k_chunk=32)
        assert sum(x.nbytes for x in saved) == 4 * (4 * 2 * n * 16 + 2 * n)
        dout = torch.randn_like(out)
        del out, lse
        saved.clear()
        with Meter(inputs=(given, dout)) as meter:
            torch.autograd.grad(attention_with_lse(*given, mask=mask, q_chunk=32, k_chunk=32)[0],
                                given, dout)  # fmt: skip
        return meter.peak - meter.base

    assert extra(512, Causal()) == 2 * extra(256, Causal())
    near = lambda b, h, i, j: (i - j).abs() < 9  # noqa: E731
    # What does not double is one chunk: distances as int64 twice, floats, and a byte for the mask.
    assert 0 <= 2 * extra(256, near) - extra(512, near) <= 32 * 32 * (8 + 8 + 2 * 4 + 4 + 4)


def test_torch_operations_hold_one_chunk_of_scores_forward(monkeypatch):
    monkeypatch.setattr(kernels, "choose_path", lambda *_, **__: "torch")
    q, k, v = (torch.randn(1, 2, 512, 16) for _ in range(3))
    attention_with_lse(q, k, v)
    with Meter(inputs=(q, k, v)) as meter:
        attention_with_lse(q, k, v, q_chunk=128, k_chunk=256)
    chunk, running = 4 * 2 * 128 * 256, 4 * 2 * 512 * (16 + 1)
    # Beside these, chunks of q, of the output and of the row sums.
    assert chunk + running < meter.peak - meter.base < chunk + running + 4 * 2 * 128 * 4 * 18


def test_no_key_and_no_query():
    q, k, v = tensors(3, 0)
    out, lse = attention_with_lse(q, k, v)
    assert not out.any() and (lse == -math.inf).all()
    assert not any(g.any() for g in torch.autograd.grad(out.sum(), (q, k, v)))
    assert attention_with_lse(*tensors(0, 3))[0].shape == (B, HQ, 0, D)


def test_the_fused_path_is_chosen_where_it_is_exact():
    q = torch.zeros(1, 1, 1, D)
    assert kernels.choose_path(q, Spec()) == "cpu"
    assert kernels.choose_path(q, Spec(bias=q.double())) == "torch"
    assert kernels.choose_path(q, Spec(dropout=Dropout(0.1, 0))) == "torch"
    assert kernels.choose_path(q, Spec(bias=q), bias_gradient=True) == "torch"


def test_calls_of_the_kernel_for_cuda_fit_its_signature():
    """Shapes alone: on the meta device nothing is computed."""
    q, k, v = (torch.empty(B, h, 16, 20, dtype=torch.float16, device="meta") for h in (4, 2, 2))
    block = next(blocks(Causal(), q, k, (8, 8), whole=True))
    out, lse = kernels._attend("cuda", q, k, v, Spec(), block)
    assert out.shape == q.shape and lse.shape == q.shape[:3] and lse.dtype == torch.float32
    grads = kernels._gradients("cuda", out, q, k, v, out, lse, Spec(), block, None)
    assert [g.shape for g in grads] == [q.shape, k.shape, v.shape]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", MASKS)
def test_cuda_equals_the_dense_reference(kind):
    given = [x.detach().cuda().bfloat16().requires_grad_() for x in tensors(heads=2)]
    mask = MASKS[kind](33, 40)
    mask = mask.cuda() if isinstance(mask, torch.Tensor) else mask
    seen = mask
    if callable(mask):
        b, h, i = (
            torch.arange(B).view(-1, 1, 1, 1),
            torch.arange(HQ).view(-1, 1, 1),
            torch.arange(33),
        )
        seen = mask(b, h, i.view(-1, 1), torch.arange(40)).expand(B, HQ, 33, 40).cuda()
    assert kernels.choose_path(given[0], Spec()) == "cuda"
    agree(given, attention_with_lse(*given, mask=mask, q_chunk=8, k_chunk=16),
          dense(*given, seen), tolerance=0.05)  # fmt: skip


def test_equals_sdpa():
    q, k, v = given = tensors(40, 40, heads=HQ)
    out, _ = attention_with_lse(q, k, v, mask=Causal())
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.equal(out, want)
    dout = torch.randn_like(out)
    got, expected = (torch.autograd.grad(x, given, dout) for x in (out, want))
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


def test_bad_input():
    q, k, v = (x.detach() for x in tensors())
    for q_chunk, k_chunk in ((0, 1), (1, -1)):
        with pytest.raises(UsageError, match="a chunk holds 1 or more"):
            attention_with_lse(q, k, v, q_chunk=q_chunk, k_chunk=k_chunk)
    with pytest.raises(UsageError, match="3 query heads cannot share 2 key heads"):
        attention_with_lse(q[:, :3], k, v)
    with pytest.raises(UsageError, match=r"k \(2, 2, 40, 7\).*do not go together"):
        attention_with_lse(q, k[..., :7], v)
    with pytest.raises(UsageError, match=r"expected \(B,Hq,n,d\)"):
        attention_with_lse(q[0], k[0], v[0])
    with pytest.raises(UsageError, match="expected one floating dtype"):
        attention_with_lse(q, k.half(), v)
    with pytest.raises(UsageError, match=r"mask is torch\.float32; expected bool"):
        attention_with_lse(q, k, v, mask=torch.zeros(33, 40))
    with pytest.raises(UsageError, match=r"mask of shape \(33, 41\) does not broadcast"):
        attention_with_lse(q, k, v, mask=torch.ones(33, 41, dtype=torch.bool))
    with pytest.raises(UsageError, match=r"bias is torch\.int64; expected floating"):
        attention_with_lse(q, k, v, bias=torch.zeros(33, 40).long())
    with pytest.raises(UsageError, match=r"dropout=1.0 is outside \[0, 1\)"):
        attention_with_lse(q, k, v, dropout=1.0)
