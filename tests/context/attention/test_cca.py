"""Core tokens against hidden states pooled literally, coverage, decoding, bytes, refusals."""

import pytest
import torch
import transformers as hf

from holdfast.context.attention import cca as module
from holdfast.context.attention.cca import CCAttention, Groups, cca_attention, cca_ref, core_pairs
from holdfast.context.cache.conformance import model, tokens
from holdfast.context.interface import use
from holdfast.context.rope import Rope
from holdfast.errors import UsageError
from holdfast.meter import Meter

B, HQ, H, D = 2, 4, 2, 8
SHAPES = [(1, 1), (4, 1), (4, 6), (7, 13), (5, 60), (60, 3), (3, 3)]


def tensors(n, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    return [
        torch.randn(B, heads, n, D, dtype=dtype, generator=g).requires_grad_()
        for heads in (HQ, H, H)
    ]


def logits(net, ids, cache=None, cuts=None):
    with torch.no_grad():
        if cache is None:
            return net(ids, use_cache=False).logits
        return torch.cat([net(x, past_key_values=cache).logits for x in ids.split(cuts, 1)], 1)


def test_every_past_token_is_covered_once():
    for group in range(1, 7):
        for window in range(1, 12):
            for i in range(1, 50):
                j = Groups(group, window).seen(i)
                pooled = [
                    t for end in range(1, j + 1) for t in range((end - 1) * group, end * group)
                ]
                assert [*pooled, *range(group * j, i)] == list(range(i))
                assert i - group * j >= min(i, window)
                assert i - group * j <= window + group - 1


@pytest.mark.parametrize("queries", [5, 512])
def test_attention_covers_every_past_token_once(queries, monkeypatch):
    # Queries of zero weigh all that they see alike, and a core token its tokens.
    monkeypatch.setattr(module, "QUERIES", queries)
    n = 47
    k = torch.randn(1, 1, n, n)
    v = torch.eye(n)[None, None]
    for group, window in SHAPES:
        groups = Groups(group, window)
        out = cca_attention(torch.zeros_like(k), k, v, groups)[0, 0]
        for i in range(1, n + 1):
            j = groups.seen(i)
            entries = j + i - group * j
            want = torch.zeros(n)
            want[: group * j] = 1 / group / entries
            want[group * j : i] = 1 / entries
            torch.testing.assert_close(out[i - 1], want)


@pytest.mark.parametrize("queries", [1, 8, 512])
@pytest.mark.parametrize(("group", "window"), SHAPES)
def test_output_and_gradients_equal_the_reference(group, window, queries, monkeypatch):
    monkeypatch.setattr(module, "QUERIES", queries)
    given, groups = tensors(50), Groups(group, window)
    got, want = cca_attention(*given, groups), cca_ref(*given, groups)
    torch.testing.assert_close(got, want, atol=1e-10, rtol=0)
    dout = torch.randn_like(want)
    for mine, right in zip(
        torch.autograd.grad(got, given, dout), torch.autograd.grad(want, given, dout), strict=True
    ):
        torch.testing.assert_close(mine, right, atol=1e-10, rtol=0)


@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
def test_rotated_output_and_gradients(kind):
    groups = Groups(4, 6, Rope.from_model(model(kind)))
    given = [x.detach().float().requires_grad_() for x in tensors(30)]
    with torch.no_grad():
        got, want = cca_attention(*given, groups), cca_ref(*given, groups)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)

    g = torch.Generator().manual_seed(1)

    def total():
        return cca_attention(*given, groups).double().square().sum()

    for x, grad in zip(given, torch.autograd.grad(total(), given), strict=True):
        with torch.no_grad():
            step, sums = 1e-2 * torch.randn(x.shape, generator=g), []
            for sign in (1, -2):
                x.add_(sign * step)
                sums.append(total().item())
            x.add_(step)
        change = (grad * step).sum().item()
        assert (sums[0] - sums[1]) / 2 == pytest.approx(change, rel=1e-2, abs=1e-4)


@pytest.mark.parametrize("rope", [{}, {"rope_type": "yarn", "factor": 4.0}])
def test_core_token_is_the_projection_of_pooled_hidden_states(rope):
    more = {"rope_parameters": {"rope_theta": 1e4, **rope}} if rope else {}
    net, group = model("qwen2", **more), 5
    layer = net.model.layers[1].self_attn
    seen = {}
    hook = layer.register_forward_pre_hook(
        lambda m, args, kwargs: seen.update(x=kwargs["hidden_states"]), with_kwargs=True
    )
    inner = module.core_pairs
    with CCAttention.apply(net, group=group, window=3), pytest.MonkeyPatch.context() as patch:

        def spy(*args):
            seen["cores"] = inner(*args)
            return seen["cores"]

        patch.setattr(module, "core_pairs", spy)
        with torch.no_grad():
            net(tokens(1, 23), use_cache=False)
    hook.remove()
    turn = Rope.from_model(net)
    x = seen["x"]
    with torch.no_grad():
        q, k = (
            turn.rotate(p(x).unflatten(-1, (-1, 8)).transpose(1, 2), torch.arange(23)[None, None])
            for p in (layer.q_proj, layer.k_proj)
        )
        for number in range(23 // group):
            inside, end = slice(number * group, (number + 1) * group), (number + 1) * group - 1
            keys = k[:, :, inside].repeat_interleave(2, 1)
            weights = (q[:, :, end : end + 1] @ keys.mT * layer.scaling).softmax(-1).mean(1)
            c = weights @ x[:, inside]
            key, value = (
                p(c).unflatten(-1, (-1, 8)).transpose(1, 2) for p in (layer.k_proj, layer.v_proj)
            )
            key = turn.rotate(key, torch.tensor([[[end]]]))
            torch.testing.assert_close(
                seen["cores"][0][:, :, number], key[:, :, 0], atol=1e-5, rtol=0
            )
            torch.testing.assert_close(
                seen["cores"][1][:, :, number], value[:, :, 0], atol=1e-5, rtol=0
            )


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt_neox", "gpt2"])
def test_dense_where_nothing_is_pooled(kind):
    net = model(kind)
    ids = tokens(2, 40)
    want = logits(net, ids)
    for group, window in ((1, 1), (1, 7), (4, 40), (64, 1)):
        with CCAttention.apply(net, group=group, window=window) as cca:
            torch.testing.assert_close(logits(net, ids), want, atol=1e-5, rtol=0)
            got = logits(net, ids, cca.cache(), 9)
            torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    with CCAttention.apply(net, group=4, window=3):
        assert (logits(net, ids) - want).abs().max() > 1e-3
    assert torch.equal(logits(net, ids), want)


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "gpt2"])
@pytest.mark.parametrize("cuts", [[70], 1, [3, 1, 25, 1, 40], [7, 63]])
def test_step_by_step_equals_parallel(kind, cuts):
    net, ids = model(kind), tokens(2, 70)
    for group, window in ((4, 6), (7, 13), (9, 2)):
        with CCAttention.apply(net, group=group, window=window) as cca:
            got = logits(net, ids, cca.cache(), cuts)
            torch.testing.assert_close(got, logits(net, ids), atol=1e-5, rtol=0)


def test_bytes():
    net, group, window = model(), 4, 6
    with CCAttention.apply(net, group=group, window=window) as cca:
        cache = cca.cache()
        assert cache.nbytes() == 0
        for n in range(1, 60):
            logits(net, tokens(3, 1, seed=n), cache, 1)
            exact = n - group * max(0, (n + 1 - window) // group)
            pair = 2 * 2 * 3 * 2 * 8 * 4
            assert cache.nbytes() == pair * (n // group + exact)
            assert exact <= max(n * (n < window), window + group - 2)
            held = (
                x
                for layer in cache.layers
                for x in (layer.core_keys, layer.core_values, layer.keys, layer.values)
            )
            assert sum(x.untyped_storage().nbytes() for x in held) == cache.nbytes()
        cache.reset()
        assert cache.nbytes() == cache.get_seq_length() == 0


def test_peak_is_far_below_dense_attention():
    def extra(attend, n=2048):
        given = [torch.randn(1, 1, n, 16).requires_grad_() for _ in range(3)]
        with Meter(inputs=given) as meter:
            torch.autograd.grad(attend(*given).sum(), given)
        return meter.peak - meter.base

    def plain(q, k, v):
        hidden = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
        return (q @ k.mT).masked_fill(hidden, -torch.inf).softmax(-1) @ v

    groups = Groups(16, 128)
    assert extra(lambda *qkv: cca_attention(*qkv, groups)) <= 0.1 * extra(plain)


def test_a_group_is_not_seen_before_it_is_complete():
    q, k, v = (x.detach() for x in tensors(30))
    groups = Groups(8, 1)
    before = cca_attention(q, k, v, groups)
    for x in (q, k, v):
        x[:, :, 20:] = torch.randn_like(x[:, :, 20:])
    assert torch.equal(cca_attention(q, k, v, groups)[:, :, :20], before[:, :, :20])


def test_weights_are_the_mean_over_heads():
    q, k, v = (x.detach() for x in tensors(4))
    q[:, 0] = 0
    _, values = core_pairs(q[:, :, 3:], k, v, Groups(4, 1), D**-0.5)
    scores = q[:, :, 3:] @ k.repeat_interleave(2, 1).mT * D**-0.5
    weights = scores.softmax(-1).mean(1, keepdim=True)
    torch.testing.assert_close(values, weights @ v)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}])
def test_generate_equals_reading_everything_again(options):
    net, ids = model(), tokens(2, 11)
    settings = {"max_new_tokens": 14, "do_sample": False, "pad_token_id": 0, **options}
    with CCAttention.apply(net, group=3, window=4) as cca:
        want = net.generate(ids, use_cache=False, **settings)
        assert torch.equal(net.generate(ids, past_key_values=cca.cache(), **settings), want)


def test_padding_on_the_right_and_training():
    net, ids = model(), tokens(2, 30)
    mask = torch.ones_like(ids)
    mask[1, 21:] = 0
    with CCAttention.apply(net, group=4, window=5) as cca:
        net.train()
        got = net(ids, attention_mask=mask, use_cache=False).logits
        want = net(ids[1:, :21], use_cache=False).logits
        torch.testing.assert_close(got[1:, :21], want, atol=1e-5, rtol=0)
        got.sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
        for padded, cache in ((mask, cca.cache()), (mask.flip(1), None)):
            with pytest.raises(UsageError, match="this batch has padding"):
                net(ids, attention_mask=padded, past_key_values=cache, use_cache=False)


def test_gradient_checkpointing_changes_nothing():
    net, ids = model(), tokens(1, 30)
    net.train()
    grads = []
    with CCAttention.apply(net, group=4, window=5):
        for again in (False, True):
            if again:
                net.gradient_checkpointing_enable()
            net.zero_grad()
            net(ids, labels=ids, use_cache=False).loss.backward()
            grads.append([p.grad.clone() for p in net.parameters()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, atol=1e-7, rtol=0)


def test_refusals():
    for group, window in ((0, 8), (4, 0)):
        with pytest.raises(UsageError, match=f"group={group}, window={window}: a group holds"):
            CCAttention.apply(model(), group=group, window=window)
    with pytest.raises(UsageError, match="layers without causal attention to all tokens"):
        CCAttention.apply(model("mistral"))
    with pytest.raises(UsageError, match="normalises keys after their projection"):
        CCAttention.apply(model("qwen3"))
    net, ids = model(), tokens(1, 12)
    with use(net, "cca"), pytest.raises(UsageError, match=r"needs groups; set it by CCAttention"):
        net(ids)
    with CCAttention.apply(net, group=3, window=4):
        with pytest.raises(UsageError, match=r"pass past_key_values=cca.cache\(\)"):
            net.generate(ids, max_new_tokens=2, pad_token_id=0)
        with pytest.raises(UsageError, match="pass no 4-D mask"):
            net(ids, attention_mask=torch.ones(1, 1, 12, 12).tril().bool(), use_cache=False)
    cache = CCAttention.apply(net, group=3, window=4).cache()
    net.set_attn_implementation("sdpa")
    net(ids, past_key_values=cache)
    with pytest.raises(UsageError, match="does not use the attention 'cca'"):
        net(ids, past_key_values=cache)


def test_removed_without_trace():
    net = model()
    before = hf.AutoModelForCausalLM.from_config(net.config).config._attn_implementation
    cca = CCAttention.apply(net)
    cca.remove()
    cca.remove()
    assert net.config._attn_implementation == before
    assert all("forward" not in m.__dict__ for m in net.modules())
