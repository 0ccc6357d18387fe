"""RCMHA: convolved and relative, with the signature of `nn.MultiheadAttention`."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from holdfast.context.attention.rcmha import (
    RCMHA,
    RCMHAState,
    relative_scores_ref,
    relative_shift,
    sinusoids,
)
from holdfast.errors import UsageError
from holdfast.meter import Meter

E, H, N = 16, 4, 13


def lively(**options):
    """A module none of whose parts is neutral."""
    module = RCMHA(E, H, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.4)
    return module


def plain(module):
    """`nn.MultiheadAttention` with the same projections."""
    twin = nn.MultiheadAttention(E, H, batch_first=True)
    twin.load_state_dict({name: module.state_dict()[name] for name in twin.state_dict()})
    return twin


@pytest.mark.parametrize(("n", "m"), [(7, 7), (3, 7), (1, 7), (1, 1)])
def test_relative_shift_equals_pair_by_pair(n, m):
    q, k = torch.randn(2, H, n, 5), torch.randn(2, H, m, 5)
    relative, u, v = torch.randn(H, n + m, 5), torch.randn(H, 5), torch.randn(H, 5)
    want = relative_scores_ref(q, k, relative, u, v)
    content = (q + u[:, None]) @ k.mT
    full = content + relative_shift((q + v[:, None]) @ relative.mT, m)
    torch.testing.assert_close(full, want, atol=1e-5, rtol=0)
    # Distances of keys after a query need not exist where these keys are hidden.
    half = content + relative_shift((q + v[:, None]) @ relative[:, : m + 1].mT, m)
    seen = torch.ones(n, m).tril(m - n).bool()
    torch.testing.assert_close(half[..., seen], want[..., seen], atol=1e-5, rtol=0)


def test_relative_shift_copies_nothing():
    scores = torch.randn(2, H, 6, 7)
    assert relative_shift(scores, 6).data_ptr() == scores[..., 5:].data_ptr()


@pytest.mark.parametrize("causal", [True, False])
def test_neutral_parts_leave_multihead_attention(causal):
    module = RCMHA(E, H, causal=causal)
    with torch.no_grad():
        module.relative.weight.zero_()
        module.kernels.zero_()
        module.kernels[:, :, -1 if causal else 1] = 1
        module.in_proj_bias.normal_()
        module.out_proj.bias.normal_()
    x = torch.randn(2, N, E)
    extra = torch.rand(N, N) > 0.8
    extra.fill_diagonal_(False)
    padding = torch.zeros(2, N, dtype=torch.bool)
    padding[1, -3:] = True
    future = torch.ones(N, N).triu(1).bool() if causal else torch.zeros(N, N, dtype=torch.bool)
    for mask in (None, extra, torch.randn(N, N), torch.randn(2 * H, N, N)):
        hidden = future if mask is None else mask
        if mask is not None:
            hidden = mask | future if mask.dtype == torch.bool else mask.masked_fill(
                future, -torch.inf)  # fmt: skip
        for average in (True, False):
            options = {"key_padding_mask": padding, "average_attn_weights": average}
            if hidden.is_floating_point():
                options["key_padding_mask"] = None
            got = module(x, x, x, attn_mask=mask, **options)
            want = plain(module)(x, x, x, attn_mask=hidden, **options)
            real = ~padding if options["key_padding_mask"] is not None else padding | True
            torch.testing.assert_close(got[0][real], want[0][real], atol=1e-5, rtol=0)
            shown = got[1].transpose(1, -2)[real], want[1].transpose(1, -2)[real]
            torch.testing.assert_close(*shown, atol=1e-5, rtol=0)
    assert module(x, x, x, need_weights=False)[1] is None


def test_kernels_by_hand():
    module = RCMHA(2, 1, 3)
    with torch.no_grad():
        module.kernels.copy_(torch.arange(18.0).view(6, 1, 3))
    rows = torch.arange(12.0).view(1, 2, 6)
    # Channel c has kernel (3c, 3c+1, 3c+2), its last element for the row itself.
    want = [[c * (3 * c + 2) for c in range(6)],
            [c * (3 * c + 1) + (6 + c) * (3 * c + 2) for c in range(6)]]  # fmt: skip
    assert module._convolve(rows, None)[0].tolist() == want


def test_nothing_sees_the_future():
    module = lively()
    x = torch.randn(1, N, E)
    before = module(x, x, x)[0]
    for t in (1, 6, N - 1):
        y = x.clone()
        y[:, t:] += 10 * torch.randn(N - t, E)
        after = module(y, y, y)[0]
        torch.testing.assert_close(after[:, :t], before[:, :t], atol=1e-6, rtol=0)
        assert (after[:, t] - before[:, t]).abs().max() > 0.1


def test_without_causal_everything_is_seen_from_both_sides():
    module = lively(causal=False)
    x = torch.randn(1, N, E)
    before = module(x, x, x)[0]
    for t in (0, N - 1):
        y = x.clone()
        y[:, t] += 1
        assert ((module(y, y, y)[0] - before).abs().amax(-1) > 1e-4).all()


@pytest.mark.parametrize("kernel_size", [1, 2, 3, 4])
@pytest.mark.parametrize("cuts", [[1] * N, [5, 1, 7], [12, 1]])
def test_parallel_equals_step_by_step(kernel_size, cuts):
    module = lively(kernel_size=kernel_size)
    x = torch.randn(2, N, E)
    want, weights = module(x, x, x)
    state, outs = RCMHAState(), []
    for part in x.split(cuts, 1):
        out, last = module(part, part, part, state=state)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), want, atol=1e-5, rtol=0)
    torch.testing.assert_close(last[:, -1], weights[:, -1], atol=1e-5, rtol=0)
    assert state.nbytes() == 4 * 2 * (2 * N * E + 3 * (kernel_size - 1) * E)
    held = (state.keys, state.values, state.rows)
    assert sum(x.untyped_storage().nbytes() for x in held) == state.nbytes()


def test_left_padding_is_as_if_it_were_not_there():
    module = lively()
    x = torch.randn(1, N, E)
    want = module(x, x, x)[0]
    y = torch.cat([torch.randn(1, 4, E), x], 1)
    padding = torch.arange(N + 4)[None] < 4
    got, weights = module(y, y, y, key_padding_mask=padding)
    torch.testing.assert_close(got[:, 4:], want, atol=1e-5, rtol=0)
    assert got.isfinite().all() and not weights[:, :, :4].any()
    state = RCMHAState()
    first = module(y[:, :9], y[:, :9], y[:, :9], key_padding_mask=padding[:, :9], state=state)[0]
    rest = module(y[:, 9:], y[:, 9:], y[:, 9:], key_padding_mask=padding, state=state)[0]
    torch.testing.assert_close(torch.cat([first, rest], 1), got, atol=1e-5, rtol=0)


def test_query_key_and_value_may_differ():
    module = lively()
    q, k, v = (torch.randn(2, N, E) for _ in range(3))
    got = module(q, k, v)[0]
    assert not torch.allclose(got, module(q, q, q)[0])
    same = q.clone(), q.clone(), q.clone()
    torch.testing.assert_close(module(*same)[0], module(q, q, q)[0], atol=1e-6, rtol=0)


def test_gradients_reach_everything_and_parameters_are_counted():
    module = RCMHA(E, H)
    x = torch.randn(2, N, E)
    F.mse_loss(module(x, x, x)[0], torch.randn(2, N, E)).backward()
    assert all(p.grad is not None and p.grad.any() for p in module.parameters())
    more = sum(p.numel() for p in module.parameters())
    more -= sum(p.numel() for p in nn.MultiheadAttention(E, H).parameters())
    assert more == 3 * E * 3 + E * E + 2 * E


def test_bytes_are_quadratic_in_length_without_the_width():
    def extra(n, width):
        module = RCMHA(width, 2)
        x = torch.randn(1, n, width, requires_grad=True)
        module(x, x, x, need_weights=False)[0].sum().backward()
        held = [x, *(p.grad for p in module.parameters()), x.grad]
        with Meter(module, inputs=held) as meter:
            module(x, x, x, need_weights=False)[0].sum().backward()
        return meter.peak - meter.base

    def quadratic(width):
        """Bytes per pair and head, by a second difference, which terms in n do not change."""
        a, b, c = (extra(n, width) for n in (64, 128, 192))
        return (a - 2 * b + c) / 64**2 / 2 / 2

    # A few fp32 scores, the same for any width: pairs of vectors would be 4*d each.
    assert quadratic(16) == quadratic(64) < 4 * 5


def test_bf16_follows_the_input():
    module = lively().bfloat16()
    x = torch.randn(2, N, E, dtype=torch.bfloat16)
    got, weights = module(x, x, x)
    assert got.dtype == weights.dtype == torch.bfloat16
    want = module.float()(*(x.float(),) * 3)[0]
    torch.testing.assert_close(got.float(), want, atol=0.2, rtol=0.1)


def test_sinusoids_by_hand():
    got = sinusoids(torch.tensor([0, -1]), 4)
    want = [[0, 0, 1, 1], [-0.841471, -0.01, 0.540302, 0.99995]]
    torch.testing.assert_close(got, torch.tensor(want), atol=1e-5, rtol=0)


def test_bad_input():
    with pytest.raises(UsageError, match="embed_dim=18 must be even and a multiple of num_heads=4"):
        RCMHA(18, 4)
    with pytest.raises(UsageError, match=r"kernel_size=4 has no centre.*must be odd"):
        RCMHA(E, H, 4, causal=False)
    with pytest.raises(UsageError, match="kernel_size=0 reads no row"):
        RCMHA(E, H, 0)
    module, x = RCMHA(E, H), torch.randn(1, N, E)
    with pytest.raises(UsageError, match=r"expected \(B,n,16\)"):
        module(x[0], x[0], x[0])
    with pytest.raises(UsageError, match="distances are between rows of one sequence"):
        module(x, x[:, :3], x[:, :3])
    with pytest.raises(UsageError, match=r"key_padding_mask is \(1, 3\); expected \(1, 13\)"):
        module(x, x, x, key_padding_mask=torch.zeros(1, 3, dtype=torch.bool))
    with pytest.raises(UsageError, match="need RCMHA"):
        RCMHA(E, H, causal=False)(x, x, x, state=RCMHAState())
