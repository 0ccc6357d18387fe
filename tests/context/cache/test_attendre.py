import pytest
import torch
from torch import nn

from holdfast.context.cache.attendre import POLICIES, Attendre, AttendreLayer, attendre_ref
from holdfast.context.cache.bounded import BoundedCache
from holdfast.context.cache.conformance import model, tokens
from holdfast.context.kernels import attention_with_lse
from holdfast.context.masks import Causal
from holdfast.context.stream import prefill_chunks
from holdfast.errors import DoesNotFit, UsageError

B, HQ, H, D, E = 2, 4, 2, 8, 6


def given(n, seed=0, rows=B):
    g = torch.Generator().manual_seed(seed)
    shapes = (rows, HQ, n, D), (rows, H, n, D), (rows, H, n, D), (rows, n, E)
    return [torch.randn(shape, generator=g) for shape in shapes]


def read(layer, q, k, v, residual, chunks, valid=None, sizes=None):
    """All rows through a layer: outputs, residuals and the last state."""
    outs, rest, state, start = [], [], None, 0
    for size in chunks:
        at = slice(start, start + size)
        real = None if valid is None else valid[:, at]
        out, x, state = layer(
            q[:, :, at], k[:, :, at], v[:, :, at], residual[:, at], state, valid=real
        )
        outs.append(out)
        rest.append(x)
        start += size
        if sizes is not None:
            sizes.append(state.nbytes())
    out, x, state = layer.flush(state)
    return torch.cat([*outs, out], 2), torch.cat([*rest, x], 1), state


@pytest.mark.parametrize("chunks", [[20], [7, 1, 12], [1] * 20])
@pytest.mark.parametrize("policy", POLICIES)
def test_without_limits_it_is_exact_attention(policy, chunks):
    q, k, v, residual = given(20)
    for wait, mask in ((0, Causal()), (5, Causal(5)), (20, None)):
        layer = AttendreLayer(20, wait, policy, topk=20)
        out, rest, _ = read(layer, q, k, v, residual, chunks)
        want = attention_with_lse(q, k, v, mask=mask)[0]
        torch.testing.assert_close(out, want, atol=1e-5, rtol=0)
        assert torch.equal(rest, residual)  # in input order, none lost
        assert layer.causal == (wait == 0)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("policy", POLICIES)
def test_policies_equal_reference(policy, seed):
    q, k, v, residual = (x.double() for x in given(30, seed))
    chunks = [[6, 6, 6, 6, 6], [1] * 30, [11, 3, 16], [30]][seed]
    limits = {"kv_slots": 9, "q_slots": (0, 4, 7, 3)[seed], "policy": policy, "topk": 3}
    # The position of each slot goes along as a value.
    v[..., 0] = torch.arange(30)
    out, _, state = read(AttendreLayer(**limits), q, k, v, residual, chunks)
    # The reference has one query head per key head.
    single, _, kept = read(AttendreLayer(**limits), q[:, ::2], k, v, residual, chunks)
    assert out.shape == (B, HQ, 30, D)
    for row in range(B):
        for head in range(H):
            want, stay = attendre_ref(
                q[row, 2 * head], k[row, head], v[row, head], chunks, **limits
            )
            assert kept.values[row, head, :, 0].tolist() == stay
            torch.testing.assert_close(single[row, head], torch.stack(want), atol=1e-9, rtol=0)
    assert state.keys.shape[2] == 9 and state.queries.shape[2] == 0


def test_hits_by_hand():
    # Slots are axes; a query names the one that it wants.
    axes = 10 * torch.eye(4)[None, None]
    residual = torch.zeros(1, 4, 1)
    zero = torch.zeros_like(axes)

    def keep(layer, asked):
        state = None
        for i, one in enumerate(asked):
            at = slice(i, i + 1)
            q = axes[:, :, one : one + 1]
            _, _, state = layer(q, axes[:, :, at], zero[:, :, at], residual[:, at], state)
        return state.keys[0, 0].argmax(-1).tolist(), state.worth[0, 0].tolist()

    assert keep(AttendreLayer(3, 0, "fifo", topk=1), [0, 0, 0, 3]) == ([1, 2, 3], [0, 0, 0])
    # Nobody asked for 1 since it came at step 1; 0 and 2 are as recent, and 3 is from this step.
    assert keep(AttendreLayer(3, 0, "lra", topk=1), [0, 0, 0, 3]) == ([0, 2, 3], [-1, -1, 0])
    # Others begin at the median of what is there, and of equals the older goes.
    assert keep(AttendreLayer(2, 0, "lfa", topk=1), [0, 0, 0, 0]) == ([0, 3], [4, 1])


def test_bytes_are_constant_and_as_stated():
    q, k, v, residual = given(64)
    sizes = []
    read(AttendreLayer(12, 10, "lfa", topk=4), q, k, v, residual, [8] * 8, sizes=sizes)
    full = B * H * 12 * (2 * D * 4 + 4) + B * HQ * 10 * D * 4 + B * 10 * E * 4 + B * 10
    assert sizes[2:] == [full] * 6 and sizes[0] < full


@pytest.mark.parametrize("policy", POLICIES)
def test_padding_is_neither_attended_nor_counted(policy):
    q, k, v, residual = given(24)
    valid = torch.ones(B, 24, dtype=torch.bool)
    valid[1, :8] = False
    poison = k.clone()
    poison[1, :, :8] = 1e3
    layer = AttendreLayer(6, 4, policy, topk=3)
    out, _, state = read(layer, q, poison, v, residual, [8, 8, 8], valid)
    alone, _, last = read(layer, q[1:, :, 8:], k[1:, :, 8:], v[1:, :, 8:], residual[1:, 8:], [8, 8])
    torch.testing.assert_close(out[1:, :, 8:], alone, atol=1e-6, rtol=0)
    torch.testing.assert_close(state.worth[1:], last.worth)
    assert torch.equal(state.keys[1:], last.keys)
    assert not out[1, :, :4].any()  # nothing real was there yet: nothing, and no NaN


def test_residuals_wait_with_their_queries_through_a_stack():
    torch.manual_seed(0)
    project = nn.ModuleList(nn.Linear(E, 3 * H * D) for _ in range(2))
    back = nn.ModuleList(nn.Linear(H * D, E) for _ in range(2))
    layers = [AttendreLayer(40, 6, topk=40) for _ in range(2)]
    x = torch.randn(B, 40, E)

    def heads(i, x):
        return project[i](x).unflatten(-1, (3, H, D)).permute(2, 0, 3, 1, 4)

    def block(i, x, state):
        out, rest, state = layers[i](*heads(i, x), x, state)
        return rest + back[i](out.transpose(1, 2).flatten(2)), state

    def flush(i, state):
        out, rest, _ = layers[i].flush(state)
        return rest + back[i](out.transpose(1, 2).flatten(2))

    want = x
    for i in range(2):
        out = attention_with_lse(*heads(i, want), mask=Causal(6))[0]
        want = want + back[i](out.transpose(1, 2).flatten(2))
    first = second = None
    got = []
    for part in x.split(7, 1):
        y, first = block(0, part, first)
        y, second = block(1, y, second)
        got.append(y)
    y, second = block(1, flush(0, first), second)
    got += [y, flush(1, second)]
    torch.testing.assert_close(torch.cat(got, 1), want, atol=1e-5, rtol=0)
    torch.cat(got, 1).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in project.parameters())


def test_a_decoder_counts_what_attention_says():
    net, ids = model(), tokens(1, 30)
    net.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = net(ids, output_attentions=True).attentions
    for policy in ("lra", "lfa"):
        cache = BoundedCache.for_model(net, Attendre(policy=policy, topk=3), tokens=40, chunk=10)
        prefill_chunks(net, ids, cache)
        for layer, p in zip(cache.bounded, attentions, strict=True):
            best, index = p.topk(3)
            hits = torch.zeros_like(p).scatter_(-1, index, (best > 0).float())[0]
            hits = hits.view(2, -1, 30, 30).sum(1)  # per key head, by query
            worth = torch.zeros(2, 30)
            for start in range(0, 30, 10):
                step = hits[:, start : start + 10].sum(1)
                if policy == "lra":
                    worth[:, :start] -= 1
                    worth[step > 0] = 0
                else:
                    if start:
                        worth[:, start : start + 10] = worth[:, :start].median(1, True).values
                    worth += step
            torch.testing.assert_close(layer.field("worth")[0], worth)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_decoder_reads_padding_before_anything_else(policy):
    net, ids = model(), tokens(2, 40)
    mask = torch.ones_like(ids)
    mask[:, :8] = 0
    caches = [
        BoundedCache.for_model(net, Attendre(policy=policy), tokens=16, chunk=4) for _ in range(2)
    ]
    got = prefill_chunks(net, ids, caches[0], mask=mask)
    torch.testing.assert_close(got, prefill_chunks(net, ids[:, 8:], caches[1]), atol=1e-5, rtol=0)


def test_errors():
    with pytest.raises(UsageError, match="topk=5 of 4 slots"):
        AttendreLayer(4, 0, topk=5)
    with pytest.raises(UsageError, match="q_slots=-1"):
        AttendreLayer(4, -1, topk=2)
    with pytest.raises(UsageError, match="lru"):
        AttendreLayer(4, 0, "lru", topk=2)
    with pytest.raises(UsageError, match="same n rows"):
        AttendreLayer(4, 0, topk=2)(*given(3)[:3], torch.zeros(B, 4, E))
    with pytest.raises(UsageError, match=r"q_slots=8.*AttendreLayer"):
        Attendre(q_slots=8)
    with pytest.raises(UsageError, match="topk=64 of 32 slots"):
        BoundedCache.for_model(model(), Attendre(topk=64), tokens=32)
    with pytest.raises(DoesNotFit, match="for 64 entries"):
        BoundedCache.for_model(model(), Attendre(topk=64), budget="16KiB", batch=1)
