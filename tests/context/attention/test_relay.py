"""A shared prefix that is stored and read once gives what concatenated prompts give."""

import pytest
import torch
from transformers import DynamicCache

from holdfast.context.attention.relay import PrefixRegistry, SharedPrefix, relay_nbytes
from holdfast.context.cache.conformance import model, tokens
from holdfast.context.cache.layer import New
from holdfast.context.kernels import attention_with_lse
from holdfast.context.stream import prefill_chunks, read
from holdfast.errors import DoesNotFit, UsageError
from holdfast.forms.affine import Int8
from holdfast.meter import Meter

PREFIX, OWN = 30, 12
KINDS = {
    "llama": {},
    "mistral": {"sliding_window": 64},
    "gpt_neox": {},
    "gpt2": {"num_key_value_heads": 4},
}


def ragged(rows=3):
    """Prefix (s,), ids (B,s+n) with it, their mask with padding behind it, positions."""
    prefix = tokens(1, PREFIX)[0]
    ids = torch.cat([prefix.expand(rows, -1), tokens(rows, OWN, seed=1)], 1)
    mask = torch.ones_like(ids)
    mask[1, PREFIX : PREFIX + 5] = 0
    mask[2, PREFIX : PREFIX + 9] = 0
    return prefix, ids, mask, mask.cumsum(1) - 1


@torch.no_grad()
def both(net, form=None):
    """Logits of the requests' real tokens: with our cache, in two parts, and with DynamicCache."""
    prefix, ids, mask, positions = ragged()
    plain = DynamicCache(config=net.config)
    want = net(ids, attention_mask=mask, position_ids=positions, past_key_values=plain).logits
    cache = SharedPrefix(net, prefix, form=form).cache(3, tokens=2 * OWN)
    got = []
    # In the first part, the third row has nothing of its own yet.
    for start, stop in ((PREFIX, PREFIX + 8), (PREFIX + 8, PREFIX + OWN)):
        got.append(net(
            ids[:, start:stop], attention_mask=mask[:, :stop],
            position_ids=positions[:, start:stop], past_key_values=cache,
        ).logits)  # fmt: skip
    real = mask[:, PREFIX:].bool()
    return torch.cat(got, 1)[real], want[:, PREFIX:][real]


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_those_of_concatenated_prompts(kind):
    got, want = both(model(kind, **KINDS[kind]))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def test_sixteen_bits_and_stored_forms_are_near():
    got, want = both(model().bfloat16())
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, atol=2e-2, rtol=0)
    got, want = both(model(), Int8())
    assert 0 < (got - want).abs().max() < 0.1 * want.std()


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}])
def test_generate_gives_the_same_tokens(options):
    net = model()
    prefix, ids, mask, _ = ragged()
    shared = SharedPrefix(net, prefix)
    plain, ours = DynamicCache(config=net.config), shared.cache(3, tokens=32)
    want, got = (
        net.generate(ids, attention_mask=mask, past_key_values=cache, do_sample=False,
                     max_new_tokens=10, min_new_tokens=10, **options)
        for cache in (plain, ours)
    )  # fmt: skip
    assert torch.equal(got, want)
    ours.reset()
    assert ours.get_seq_length() == PREFIX


def test_a_row_without_tokens_of_its_own_sees_the_prefix_alone():
    net = model()
    prefix, _, _, _ = ragged()
    shared = SharedPrefix(net, prefix)
    cache = shared.cache(2, tokens=8)
    layer, k = cache.bounded[1], shared.store.bounded[1].stored_keys(slice(0, PREFIX))
    v = shared.store.bounded[1].stored_values(slice(0, PREFIX))
    q, new = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 1, 8)
    layer._allocate(q, new, new)
    out, lse = layer.look(q, New(1, 0, [0, 0], q.device), 0.3)
    want, want_lse = attention_with_lse(q, *(x.expand(2, -1, -1, -1) for x in (k, v)), scale=0.3)
    torch.testing.assert_close((out, lse), (want, want_lse))
    # One row has an entry and the other has none: its own part is hidden, not averaged in.
    entry = layer.append(new, new, torch.tensor([[True], [False]]))
    out, lse = layer.look(q, entry, 0.3)
    torch.testing.assert_close((out[1], lse[1]), (want[1], want_lse[1]))
    assert not torch.allclose(out[0], want[0], atol=1e-3)


def test_bytes_are_the_formula_and_no_key_is_copied_per_row():
    net = model()
    shared = SharedPrefix(net, tokens(1, 2000)[0])
    cache = shared.cache(8, tokens=16)
    prefill_chunks(net, tokens(8, 3), cache)
    want = 2 * 2 * 2 * 8 * 4 * (2000 + 8 * 16)
    assert shared.nbytes() + cache.nbytes() == relay_nbytes(cache.shape, 2000, 16) == want
    q = torch.randn(8, 4, 1, 8)
    shared.look(0, q, 0.3)
    with Meter(inputs=(q, shared.store.layers[0].slots.tensors)) as meter:
        shared.look(0, q, 0.3)
    # Folded queries, an output and its log-sum-exp; one row's keys would be 128,000.
    assert meter.peak - meter.base <= 4 * q.nbytes


@torch.no_grad()
def test_requests_drop_tokens_of_their_own_and_never_the_prefix():
    net = model(num_hidden_layers=1)
    prefix, own = tokens(1, PREFIX)[0], tokens(1, 60, seed=1)
    cache = SharedPrefix(net, prefix).cache(1, tokens=24, policy="sinks_recent", chunk=4)
    prefill_chunks(net, own[:, :-1], cache)
    got = read(net, own[:, -1:], cache)
    # With one layer an entry depends on its token alone.
    recent = cache.bounded[0].length - 4
    kept = torch.cat([prefix[None], own[:, :4], own[:, -recent:]], 1)
    torch.testing.assert_close(got, net(kept).logits[:, -1], atol=1e-5, rtol=0)
    full = SharedPrefix(net, prefix).cache(1, tokens=24)
    with pytest.raises(DoesNotFit, match="the cache is full: 24 entries"):
        prefill_chunks(net, own, full)


def test_the_registry_finds_the_longest_and_drops_the_oldest():
    net = model()
    text = tokens(1, 64)[0]
    one = SharedPrefix(net, text[:16]).nbytes()
    budget = 4 * one + 2048  # the rest is room to write the last one
    registry = PrefixRegistry(net, budget)
    short, long = registry.add(text[:16]), registry.add(text[:32])
    assert registry.find(text) is long and registry.find(text[:31]) is short
    assert registry.find(text[1:]) is None and registry.add(text[:16].tolist()) is short
    registry.hold(long)
    other = registry.add(tokens(1, 24, seed=1))
    assert registry.find(text) is long and registry.find(text[:31]) is None
    assert registry.nbytes() == long.nbytes() + other.nbytes() <= budget
    with pytest.raises(DoesNotFit, match="a prefix of 64 tokens needs") as caught:
        registry.add(text)
    assert caught.value.details["needs_bytes"] > budget - long.nbytes()
    registry.release(long)
    wide = PrefixRegistry(net, caught.value.details["needs_bytes"])
    assert wide.add(text).length == 64
    assert registry.add(text[:20]).length == 20 and len(registry) == 2
    assert registry.find(text) is long and registry.find(tokens(1, 24, seed=1)) is None


def test_what_would_be_wrong_is_refused(tmp_path):
    net = model()
    shared = SharedPrefix(net, tokens(1, PREFIX))
    shared.store.save(tmp_path / "context")
    with pytest.raises(UsageError, match="was saved with model"):
        shared.cache(1, tokens=2 * PREFIX).load(tmp_path / "context")
    other = SharedPrefix(model(), tokens(1, PREFIX)).model
    with pytest.raises(UsageError, match="read by another LlamaForCausalLM"):
        prefill_chunks(other, tokens(1, 4), shared.cache(1, tokens=8))
    cache = shared.cache(1, tokens=8)
    net.bfloat16()
    with pytest.raises(UsageError, match=r"read in torch.float32 and .* torch.bfloat16"):
        prefill_chunks(net, tokens(1, 4), cache)
    with pytest.raises(UsageError, match="a prefix of 3 ids, of a model with 256"):
        SharedPrefix(model(), [1, 2, 256])
    with pytest.raises(UsageError, match=r"ids of shape .2, 3.; expected those of one text"):
        SharedPrefix(model(), tokens(2, 3))


def test_sliding_windows_must_hold_prefix_and_request():
    net = model("mistral", sliding_window=40)
    with pytest.raises(UsageError, match="50 tokens are more than the model's sliding window"):
        SharedPrefix(net, tokens(1, 50))
    cache = SharedPrefix(net, tokens(1, PREFIX)).cache(1, tokens=32)
    prefill_chunks(net, tokens(1, 8), cache)
    with pytest.raises(UsageError, match="41 tokens are more than the model's sliding window"):
        read(net, tokens(1, 3), cache)


def test_requests_must_continue_the_prefix():
    net = model(bos_token_id=1)
    shared = SharedPrefix(net, [1, 7, 8])
    assert shared.rest([1, 7, 8, 9]).tolist() == [9]
    with pytest.raises(UsageError, match="does not begin with the prefix of 3"):
        shared.rest([1, 7, 9, 9])
    with pytest.raises(UsageError, match=r"token 1, which begins a sequence.*again after it"):
        shared.rest([1, 7, 8, 1, 9])
