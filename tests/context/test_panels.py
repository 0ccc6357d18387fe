"""Attention over gathered panels against the dense reference: values, gradients, bytes."""

import math

import numpy as np
import pytest
import torch

from holdfast.context.panels import panel_attention
from holdfast.context.patterns import BlockPattern, sliding_panels
from holdfast.errors import UsageError
from holdfast.meter import Meter

B, HQ, D = 2, 4, 6


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def tensors(n, heads=HQ, dv=D, dtype=torch.float32):
    sizes = (HQ, D), (heads, D), (heads, dv)
    return [torch.randn(B, h, n, e, dtype=dtype, requires_grad=True) for h, e in sizes]


def dense(q, k, v, seen):
    """The reference in fp64: seen (B|1,Hq,n,n) int, how often each pair counts."""
    group = q.shape[1] // k.shape[1]
    q, k, v = q.double(), *(x.double().repeat_interleave(group, 1) for x in (k, v))
    scores = q @ k.mT * q.shape[-1] ** -0.5 + seen.double().log()
    blind = ~seen.any(-1)
    lse = scores.masked_fill(blind[..., None], 0).logsumexp(-1)
    p = (scores - lse[..., None]).exp().masked_fill(blind[..., None], 0)
    return p @ v, lse.masked_fill(blind, -math.inf)


def agree(given, found, want, tolerance=1e-5):
    (out, lse), (want, want_lse) = found, want
    blind = want_lse == -math.inf
    assert torch.equal(lse == -math.inf, blind) and not out[blind].any()
    dout, dlse = torch.randn_like(out), torch.randn_like(lse).masked_fill(blind, 0)
    got = torch.autograd.grad([out, lse], given, [dout, dlse])
    total = (want * dout).sum() + (want_lse.masked_fill(blind, 0) * dlse).sum()
    expected = torch.autograd.grad(total, given)
    pairs = [(out, want), (lse.masked_fill(blind, 0), want_lse.masked_fill(blind, 0))]
    for x, y in (*pairs, *zip(got, expected, strict=True)):
        torch.testing.assert_close(x.double(), y.double(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("heads", "dv"), [(HQ, D), (2, 5)])
@pytest.mark.parametrize("n", [160, 157])
def test_equals_dense_attention_under_the_same_mask(n, heads, dv, causal, padded):
    pattern = BlockPattern(8, causal=causal)
    given = tensors(n, heads, dv)
    seen = pattern.dense(n, HQ, layer=1)[None]
    valid = None
    if padded:
        valid = torch.rand(B, n) > 0.3
        valid[0, :40] = False  # a causal query may then see nothing
        seen = seen & valid[:, None, None]
    panels = pattern.panels(20, HQ, layer=1)
    agree(given, panel_attention(*given, panels, 8, valid=valid), dense(*given, seen.int()))


@pytest.mark.parametrize("n", [40, 37, 8, 3])
def test_sliding_windows(n):
    given = tensors(n)
    at = torch.arange(n)
    seen = ((at[:, None] - at).abs() <= 5).int().expand(1, HQ, n, n)
    found = panel_attention(*given, sliding_panels(-(-n // 8), 8, 5), 8)
    agree(given, found, dense(*given, seen))


def test_a_block_that_is_listed_twice_counts_twice():
    pattern, n = BlockPattern(8), 160
    given = tensors(n)
    panels = pattern.panels(20, 1, random=np.zeros((1, 20, 3), np.int32))
    seen = BlockPattern(8, random=0).dense(n, HQ).int()
    seen[:, 8:-8, :8] += 3
    agree(given, panel_attention(*given, panels, 8), dense(*given, seen[None]))


def test_gradcheck_with_and_without_dropout():
    given = [torch.randn(1, 2, 12, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    panels = BlockPattern(2, global_=1, random=1).panels(6, 2)
    for dropout in (0.0, 0.3):
        call = lambda *x, p=dropout: panel_attention(*x, panels, 2, dropout=p, seed=3)  # noqa: E731
        assert torch.autograd.gradcheck(call, given, fast_mode=True)


def test_dropout_drops_its_share_by_seed():
    n = 160
    q, k, _ = (x.detach() for x in tensors(n))
    ones, panels = torch.ones(B, HQ, n, D), BlockPattern(8).panels(20, HQ)

    def kept(seed):
        return panel_attention(q, k, ones, panels, 8, dropout=0.25, seed=seed)[0]

    assert torch.equal(kept(1), kept(1)) and not torch.equal(kept(1), kept(2))
    mean = torch.stack([kept(seed) for seed in range(20)]).mean(0)
    assert abs(mean.mean() - 1) < 0.01
    # Pieces of a panel draw for themselves: rows of one head do not repeat.
    rows = kept(1)[0, 0, :, 0].view(20, 8)[2:-2]
    assert len({tuple(row.tolist()) for row in rows}) == len(rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype):
    given = tensors(160, dtype=dtype)
    pattern = BlockPattern(8)
    out, lse = panel_attention(*given, pattern.panels(20, HQ), 8)
    assert out.dtype == dtype and lse.dtype == torch.float32
    want, want_lse = dense(*given, pattern.dense(160, HQ)[None].int())
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), want, atol=2 * eps, rtol=2 * eps)
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-4, rtol=1e-5)
    grads = torch.autograd.grad(out.sum(), given)
    assert all(grad.dtype == dtype for grad in grads)


def test_torch_operations_alone_give_the_same(monkeypatch):
    """As on devices without a fused kernel."""
    from holdfast.context import kernels

    monkeypatch.setattr(kernels, "choose_path", lambda *_, **__: "torch")
    pattern, given = BlockPattern(8, causal=True), tensors(157, 2)
    found = panel_attention(*given, pattern.panels(20, HQ), 8)
    agree(given, found, dense(*given, pattern.dense(157, HQ)[None].int()))


def test_what_is_saved_and_held_is_linear():
    def measure(n):
        given = [torch.randn(1, 2, n, 16, requires_grad=True) for _ in range(3)]
        panels = BlockPattern(16).panels(n // 16, 2)
        saved: list[torch.Tensor] = []

        def keep(x, saved=saved):
            saved.append(x)
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            out, _ = panel_attention(*given, panels, 16)
        assert sum(x.nbytes for x in saved) == 4 * (4 * 2 * n * 16 + 2 * n)
        dout = torch.randn_like(out)
        del out
        saved.clear()
        with torch.no_grad(), Meter(inputs=given) as forward:
            panel_attention(*given, panels, 16)
        with Meter(inputs=(given, dout)) as both:
            torch.autograd.grad(panel_attention(*given, panels, 16)[0], given, dout)
        return forward.peak - forward.base, both.peak - both.base

    (one, both_one), (eight, both_eight) = measure(1024), measure(8192)
    assert 7 < eight / one < 9 and 7 < both_eight / both_one < 9
    # Forward: the output and its log-sum-exp, panels of k and v, and of q and the output.
    own = 4 * 2 * 8192 * 16
    assert 3 * own < eight < 4 * own


def test_queries_and_keys_of_two_sequences_are_refused():
    q, k, v = tensors(16)
    with pytest.raises(UsageError, match="12 queries and 16 keys: blocks are of one sequence"):
        panel_attention(q[:, :, :12], k, v, sliding_panels(2, 8, 8), 8)
