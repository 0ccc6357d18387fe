"""LAVO: a window of tokens and an orthogonal memory, in parallel and step by step."""

import pytest
import torch
from torch import nn

from holdfast.context.attention.lavo import LavoAttention, LavoState, lavo_ref, memory_rows
from holdfast.errors import UsageError
from holdfast.meter import Meter

E, H, R, W = 32, 2, 8, 6


def lively(**options):
    module = LavoAttention(E, H, **{"memory": R, "window": W, **options})
    with torch.no_grad():
        module.distances.normal_()
        module.qkv.weight.normal_(std=0.3)
        # So loud that a memory that is wrong shows.
        module.context.weight.normal_(std=1.0)
    return module


@pytest.mark.parametrize("n", [1, 5, 6, 7, 12, 41])
def test_parallel_equals_the_reference_with_gradients(n):
    module = lively()
    x = torch.randn(2, n, E, requires_grad=True)
    got, want = module(x)[0], lavo_ref(module, x)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    dout = torch.randn_like(got)
    given = [x, *module.parameters()]
    grads = (torch.autograd.grad(y, given, dout, allow_unused=True) for y in (got, want))
    for mine, theirs in zip(*grads, strict=True):
        # In the first window the memory has no part in the output.
        mine, theirs = (torch.zeros(()) if y is None else y for y in (mine, theirs))
        torch.testing.assert_close(*torch.broadcast_tensors(mine, theirs), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cuts", [[1] * 41, [5, 1, 6, 12, 3, 14], [40, 1], [13, 28], [2, 30, 9]])
def test_step_by_step_equals_parallel(cuts):
    module = lively()
    x = torch.randn(2, 41, E)
    want, end = module(x)
    state, outs = None, []
    for part in x.split(cuts, 1):
        out, state = module(part, state)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), want, atol=1e-5, rtol=0)
    torch.testing.assert_close(state.coefficients, end.coefficients, atol=1e-5, rtol=0)
    torch.testing.assert_close(state.running, end.running, atol=1e-5, rtol=0)
    assert state.seen == end.seen == 41


def test_rows_are_orthogonal_and_the_basis_stays_orthonormal():
    module = lively()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    x = torch.randn(2, 20, E)
    before = module.basis.detach()
    for _ in range(5):
        module(x)[0].square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    basis = module.basis
    assert (basis - before).abs().max() > 0.1
    torch.testing.assert_close(basis @ basis.T, torch.eye(R), atol=1e-6, rtol=0)
    state = module(x)[1]
    assert state.coefficients.abs().min() > 0
    rows = memory_rows(state.coefficients, basis)
    gram = rows @ rows.mT
    off = gram - torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1))
    assert off.abs().max() < 1e-5
    torch.testing.assert_close(
        gram.diagonal(dim1=-2, dim2=-1), state.coefficients**2, atol=1e-5, rtol=1e-5
    )


def test_the_state_has_as_many_bytes_at_any_length():
    module = LavoAttention(E, H, memory=R, window=128).requires_grad_(False)
    text = torch.randn(1, 1000, E).repeat(1, 100, 1)
    _, state = module(text[:, :100])
    held = (state.keys, state.values, state.running, state.coefficients)
    size = E // H
    assert state.nbytes() == 2 * 4 * H * 128 * size + 4 * H * (R + size)
    early = state.nbytes(), sum(y.untyped_storage().nbytes() for y in held)
    while state.seen < 100_000:
        _, state = module(text[:, state.seen : state.seen + 1000], state)
    held = (state.keys, state.values, state.running, state.coefficients)
    assert (state.nbytes(), sum(y.untyped_storage().nbytes() for y in held)) == early
    # The mean of 781 windows is still the mean.
    mean = text[:, : 781 * 128].double().mean(1)
    tokens = (mean @ module.context.weight.double().T).view(1, H, -1)
    want = tokens @ module.basis.double().T
    torch.testing.assert_close(state.coefficients.double(), want, atol=1e-6, rtol=1e-4)


def test_nothing_sees_the_future_and_the_past_beyond_the_window_counts():
    module = lively()
    x = torch.randn(1, 30, E)
    before = module(x)[0]
    for t in (1, 8, 17, 29):
        y = x.clone()
        y[:, t:] += 5 * torch.randn(30 - t, E)
        after = module(y)[0]
        torch.testing.assert_close(after[:, :t], before[:, :t], atol=1e-6, rtol=0)
        assert (after[:, t] - before[:, t]).abs().max() > 0.01
    y = x.clone()
    y[:, 0] += 1
    changed = (module(y)[0] - before).abs().amax(-1)[0] > 1e-6
    assert changed.all()  # in its window directly, later through the memory


def test_the_running_window_is_not_in_the_memory():
    module = lively()
    x = torch.randn(1, 2 * W, E)
    for n in range(W, 2 * W):
        state = module(x[:, :n])[1]
        tokens = module.context(x[:, :W]).view(1, W, H, -1) @ module.basis.mT
        torch.testing.assert_close(state.coefficients, tokens.mean(1), atol=1e-5, rtol=0)


def test_sixteen_bits_keep_means_in_thirty_two():
    module = lively().bfloat16()
    x = torch.randn(1, 3000, E).bfloat16() + 4
    got, state = module(x)
    assert got.dtype == state.keys.dtype == torch.bfloat16 and got.isfinite().all()
    assert state.coefficients.dtype == state.running.dtype == torch.float32
    means = x.float().mean(1) @ module.context.weight.float().T
    want = means.view(1, H, -1) @ module.basis.mT
    torch.testing.assert_close(state.coefficients, want, atol=1e-3, rtol=1e-4)
    half = LavoAttention(E, H, memory=R, window=W).half()
    big = torch.full((1, 6000, E), 30.0, dtype=torch.float16)  # a sum would overflow
    assert half(big)[1].coefficients.isfinite().all()


def test_no_scores_are_held():
    def extra(n):
        module = LavoAttention(E, H, memory=R, window=32)
        x = torch.randn(1, n, E, requires_grad=True)
        module(x)[0].sum().backward()
        with Meter(module, inputs=[x, x.grad, [p.grad for p in module.parameters()]]) as meter:
            module(x)[0].sum().backward()
        return meter.peak - meter.base

    first, second, third = (extra(n) for n in (1024, 2048, 3072))
    assert third - second == second - first  # linear in length


def test_a_static_memory():
    module = lively()
    context, x = torch.randn(2, 50, E), torch.randn(2, 3, E)
    memory = module.compress(context)
    assert memory.shape == (2, H, R, E // H)
    tokens = module.context(context).view(2, 50, H, -1).transpose(1, 2)
    rows = memory_rows((tokens @ module.basis.mT).mean(2), module.basis)
    torch.testing.assert_close(memory, rows, atol=1e-5, rtol=0)
    q = module._qkv(x)[0]
    want = nn.functional.scaled_dot_product_attention(q, rows, rows)
    want = module.out(want.transpose(1, 2).flatten(2))
    torch.testing.assert_close(module.cross(x, memory), want, atol=1e-5, rtol=0)
    # The order of a context and its length do not matter.
    turned = module.compress(context.flip(1).repeat(1, 2, 1))
    torch.testing.assert_close(turned, memory, atol=1e-5, rtol=0)


def test_a_state_dict_brings_everything_back():
    module, twin = lively(), lively()
    twin.load_state_dict(module.state_dict())
    x = torch.randn(1, 20, E)
    torch.testing.assert_close(twin(x)[0], module(x)[0], atol=1e-6, rtol=0)


def test_bad_input():
    with pytest.raises(UsageError, match="memory=17 rows cannot be orthogonal in heads of 16"):
        LavoAttention(E, H, memory=17)
    with pytest.raises(UsageError, match="memory=64 rows cannot be orthogonal"):
        LavoAttention(E, H)
    with pytest.raises(UsageError, match="embed_dim=32 is no multiple of num_heads=5"):
        LavoAttention(E, 5)
    with pytest.raises(UsageError, match="window=0 holds no token"):
        LavoAttention(E, H, memory=R, window=0)
    module = lively()
    with pytest.raises(UsageError, match=r"expected \(B,n,32\)"):
        module(torch.randn(1, 4, E + 1))
    state = module(torch.randn(1, 4, E))[1]
    assert isinstance(state, LavoState)
    with pytest.raises(UsageError, match="x has 2 rows and the state 1"):
        module(torch.randn(2, 4, E), state)
