import pytest
import torch
import torch.nn.functional as F

from holdfast.context.cache.bounded import BoundedCache
from holdfast.context.cache.conformance import measured, model, tokens
from holdfast.context.cache.infinipot import InfiniPot, select_ref
from holdfast.context.cache.layer import BoundedLayer
from holdfast.context.stream import ask, prefill_chunks, stream
from holdfast.errors import UsageError

POT, CHUNK = 32, 8
CATALYST = (7, 8, 9, 10)


def small(net, policy=None, capacity=POT, chunk=CHUNK, rows=1):
    policy = policy or InfiniPot(catalyst=CATALYST)
    return BoundedCache.for_model(net, policy, tokens=capacity, batch=rows, chunk=chunk)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_select_equals_reference(alpha):
    net, rows = model(num_hidden_layers=1), 6
    policy = InfiniPot(alpha=alpha)
    cache = small(net, policy, rows=rows)
    prefill_chunks(net, tokens(rows, POT), cache)
    layer = cache.bounded[0]
    # Few values, so that there are ties.
    g = torch.Generator().manual_seed(0)
    for name in ("novelty", "attention"):
        layer.field(name).copy_(torch.randint(1, 7, (rows, 2, POT), generator=g))
    got = policy.select(layer, 15)
    for row in range(rows):
        for head in range(2):
            novelty, mass = (layer.field(n)[row, head].tolist() for n in ("novelty", "attention"))
            assert got[row, head].tolist() == select_ref(novelty, mass, 15, alpha)


def test_attention_is_that_of_the_catalyst():
    net, ids = model(), tokens(1, 20)
    net.set_attn_implementation("eager")
    with torch.no_grad():
        whole = torch.cat([ids, torch.tensor([CATALYST])], 1)
        attentions = net(whole, output_attentions=True).attentions
    cache = small(net)
    prefill_chunks(net, ids, cache)
    ask(net, torch.tensor([CATALYST]), cache)
    for layer, weights in zip(cache.bounded, attentions, strict=True):
        want = weights[:, :, 20:, :20].sum(2).unflatten(1, (2, 2)).sum(2)
        torch.testing.assert_close(layer.field("attention"), want, atol=1e-5, rtol=1e-4)


def test_novelty_is_measured_when_read_and_stays_with_its_entry():
    net = model(num_hidden_layers=1)
    ids = torch.randperm(255, generator=torch.Generator().manual_seed(0))[None, :120] + 1
    cache = small(net)
    read_then, before = [], None
    for part in ids.split(CHUNK, 1):
        before = prefill_chunks(net, part, cache, before=before)
        read_then.append(cache.bounded[0].field("novelty")[0, 0, -CHUNK:].clone())
    novelty = torch.cat(read_then)
    with torch.no_grad():
        logits = net(ids[:, :CHUNK], use_cache=False).logits
    want = F.cross_entropy(logits[:, :-1].mT, ids[:, 1:CHUNK], reduction="none")[0]
    torch.testing.assert_close(novelty[1:CHUNK], want, atol=1e-5, rtol=0)
    layer = cache.bounded[0]
    with torch.no_grad():
        x = net.model.layers[0].input_layernorm(net.model.embed_tokens(ids))
        keys = net.model.layers[0].self_attn.k_proj(x).view(120, 2, 8)
    for head in range(2):
        stored = layer.stored_keys(slice(0, layer.length))[0, head]
        places = torch.cdist(stored, keys[:, head]).argmin(1)
        assert (places.diff() > 0).all()
        got, want = layer.field("novelty")[0, head], novelty[places]
        assert torch.equal(got, want)


def test_a_pot_of_any_length_of_text_never_overflows(monkeypatch):
    net, held = model(num_hidden_layers=1), []
    append = BoundedLayer.append

    def appended(layer, *args):
        new = append(layer, *args)
        held.append(layer.length)
        return new

    monkeypatch.setattr(BoundedLayer, "append", appended)
    cache = small(net, chunk=12)
    with measured() as log:
        prefill_chunks(net, tokens(1, 4 * POT), cache)
    assert log.peak <= cache.peak_nbytes()
    logits = prefill_chunks(net, tokens(1, 96 * POT, seed=1), cache)
    for _ in stream(net, cache, logits, tokens=2 * POT):
        pass
    assert max(held) == POT
    assert cache.bounded[0].nbytes() == 2 * 2 * POT * 8 * 4 + 8 * 2 * POT


def test_a_full_pot_is_distilled_to_its_part_and_then_refilled(monkeypatch):
    net, asked, kept = model(num_hidden_layers=1), [], []
    attended, compress = InfiniPot.attended, BoundedLayer.compress

    def watched(policy, layer, q, *args):
        if layer.cache.asking:
            asked.append((layer.length, q.shape[2]))
        attended(policy, layer, q, *args)

    def compressed(layer, keep):
        compress(layer, keep)
        kept.append(layer.length)

    monkeypatch.setattr(InfiniPot, "attended", watched)
    monkeypatch.setattr(BoundedLayer, "compress", compressed)
    cache = small(net)
    logits = prefill_chunks(net, tokens(1, 4 * CHUNK), cache)
    # 24 tokens and the catalyst fit into 32, one more chunk does not.
    assert asked == [(24 + 4, 4)]
    assert kept == [16]
    assert cache.bounded[0].length == 24
    for _ in stream(net, cache, logits, tokens=5):
        pass
    assert asked == [(28, 4), (32, 4)]
    assert cache.bounded[0].length == 16 + 1


def test_a_question_takes_the_catalysts_place():
    net, ids = model(), tokens(2, 100)
    question = tokens(2, 3, seed=1)
    got = prefill_chunks(net, ids, small(net, InfiniPot(), rows=2), suffix=question)
    for row in range(2):
        cache = small(net, InfiniPot(catalyst=question[row]))
        alone = prefill_chunks(net, ids[row : row + 1], cache)
        torch.testing.assert_close(got[row : row + 1], alone, atol=1e-5, rtol=0)


def test_generate_beyond_the_pot_keeps_recent_entries():
    net = model(num_hidden_layers=1)
    cache = small(net)
    ids = tokens(1, 3 * POT)
    net.generate(ids, past_key_values=cache, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    layer = cache.bounded[0]
    assert not layer.field("novelty").any()
    got = InfiniPot().select(layer, 12)
    assert got[0, 0].tolist() == [0, 1, 2, 3, *range(layer.length - 8, layer.length)]


def test_errors():
    net = model(num_hidden_layers=1)
    with pytest.raises(UsageError, match=r"keep=1.0 is outside \(0, 1\)"):
        InfiniPot(keep=1.0)
    with pytest.raises(UsageError, match=r"alpha=2 is outside \[0, 1\]"):
        InfiniPot(alpha=2)
    with pytest.raises(UsageError, match=r"catalyst of shape \(0,\); expected \(S,\), S > 0"):
        InfiniPot(catalyst=())
    with pytest.raises(UsageError, match="a catalyst of 9 tokens is longer than a chunk of 8"):
        small(net, InfiniPot(catalyst=range(9)))
    policy = InfiniPot(keep=0.7, catalyst=CATALYST)
    with pytest.raises(
        UsageError, match="the 22 that stay, a catalyst of 4 and chunks of 8; use 37"
    ):
        small(net, policy)


@pytest.mark.parametrize("keep", [0.03, 0.25, 0.5, 0.7, 0.9])
def test_least_is_the_smallest_capacity_accepted(keep):
    policy = InfiniPot(keep=keep, catalyst=CATALYST)
    least = policy.least(CHUNK)
    policy.check(least, CHUNK)
    with pytest.raises(UsageError):
        policy.check(least - 1, CHUNK)
