"""Memory tokens: who sees whom, the same numbers packed and zone by zone, bytes, refusals."""

import pytest
import torch
import transformers as hf

from holdfast.context.cache import loma as module
from holdfast.context.cache.conformance import model, tokens
from holdfast.context.cache.loma import (
    MEMORY,
    NONE,
    REPEAT,
    TEXT,
    LoMA,
    LoMACache,
    loma_batch,
    loma_loss,
    loma_reconstruct,
)
from holdfast.errors import UsageError

T, C = 2, 3
ZONE = T * C
V = 256


def prepared(kind="llama", t=T, c=C, **more):
    torch.manual_seed(0)
    return LoMA.prepare(model(kind, **more), t=t, c=c)


def packed_logits(loma, ids):
    """(B,N,V+2) of the training form."""
    batch = loma_batch(loma, ids)
    with torch.no_grad():
        out = loma.model(
            batch.ids,
            attention_mask=batch.dense(),
            position_ids=batch.positions,
            use_cache=False,
        )
    return out.logits, batch


def read(loma, ids, cache, cuts=None):
    """(B,n,V) of the inference form, read in parts."""
    with torch.no_grad():
        parts = ids.split(cuts or ids.shape[1], 1)
        return torch.cat([loma.model(x, past_key_values=cache).logits for x in parts], 1)[..., :V]


def test_packing_by_hand():
    loma = prepared(t=2, c=2)
    ids = torch.arange(10, 19)[None]
    batch = loma_batch(loma, ids)
    m, r, no = loma.memory, loma.repeat, NONE
    assert (m, r) == (256, 257)
    assert batch.ids[0].tolist() == [
        10, 11, 12, 13, m, m, r, r, r, r, 14, 15, 16, 17, m, m, r, r, r, r, 18
    ]  # fmt: skip
    assert batch.positions[0].tolist() == [
        0, 1, 2, 3, 1, 3, 0, 1, 2, 3, 4, 5, 6, 7, 5, 7, 4, 5, 6, 7, 8
    ]  # fmt: skip
    assert batch.labels[0].tolist() == [
        11, 12, 13, 14, no, no, 10, 11, 12, 13, 15, 16, 17, 18, no, no, 14, 15, 16, 17, no
    ]  # fmt: skip


def test_who_sees_whom():
    batch = loma_batch(prepared(), tokens(1, 3 * ZONE + 4))
    mask = batch.dense()[0, 0]
    for i, (kind, zone) in enumerate(zip(batch.kind.tolist(), batch.zone.tolist(), strict=True)):
        seen = set()
        for j, (other, where) in enumerate(
            zip(batch.kind.tolist(), batch.zone.tolist(), strict=True)
        ):
            if kind == REPEAT:
                sees = (other == MEMORY and where == zone) or i == j
            elif other == MEMORY:
                sees = where < zone or (where == zone and kind == MEMORY and j <= i)
            else:
                sees = other == TEXT and where == zone and j <= i
            if sees:
                seen.add(j)
        assert set(mask[i].nonzero()[:, 0].tolist()) == seen
        assert seen


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt_neox", "gpt2"])
@pytest.mark.parametrize("n", [ZONE, 3 * ZONE, 3 * ZONE + 4])
def test_packed_equals_zone_by_zone(kind, n):
    loma = prepared(kind)
    ids = tokens(2, n)
    logits, batch = packed_logits(loma, ids)
    want = logits[:, batch.kind == TEXT][..., :V]
    for cuts in (None, 1, 5):
        cache = LoMACache(loma)
        got = read(loma, ids, cache, cuts)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
        assert cache.get_seq_length() == n and len(cache.zones) == n // ZONE
    said = logits[:, batch.kind == REPEAT][..., :V].argmax(-1)
    again = torch.cat([loma.repeated(cache, zone) for zone in range(n // ZONE)], 1)
    assert torch.equal(again, said)
    share = (said == ids[:, : said.shape[1]]).float().mean().item()
    assert loma_reconstruct(loma, ids) == share


def test_bytes_and_the_rest_of_the_text():
    loma = prepared()
    ids = tokens(3, 5 * ZONE)
    cache = LoMACache(loma)
    for n in range(1, ids.shape[1] + 1):
        read(loma, ids[:, n - 1 : n], cache)
        entries = T * (n // ZONE) + n % ZONE
        assert cache.running == n % ZONE
        assert cache.nbytes() == 2 * 2 * 3 * 2 * entries * 8 * 4
        held = (x for layer in cache.layers for x in (layer.keys, layer.values))
        assert sum(x.untyped_storage().nbytes() for x in held) == cache.nbytes()
    cache.reset()
    assert cache.nbytes() == cache.get_seq_length() == len(cache.zones) == 0


def test_a_replaced_token_acts_through_memory_alone():
    loma = prepared()
    first, other = tokens(1, ZONE), tokens(1, ZONE)
    other[0, 2] += 1
    caches = [LoMACache(loma) for _ in range(2)]
    for ids, cache in zip((first, other), caches, strict=True):
        read(loma, ids, cache)
    following = tokens(1, ZONE + 3, seed=1)
    for layer, twin in zip(caches[0].layers, caches[1].layers, strict=True):
        assert not torch.equal(layer.keys, twin.keys) or layer is caches[0].layers[0]
        twin.keys, twin.values = layer.keys.clone(), layer.values.clone()
    got = [read(loma, following, cache) for cache in caches]
    assert torch.equal(*got)


def test_what_repeats_sees_no_text():
    loma = prepared()
    ids = tokens(1, 2 * ZONE)
    batch = loma_batch(loma, ids)
    embedded = loma.model.get_input_embeddings()(batch.ids).detach().requires_grad_()
    # Without what memory tokens read, nothing of the text reaches the repetition.
    mask = batch.dense().clone()
    cut = (batch.kind == MEMORY)[:, None] & (batch.kind == TEXT)
    logits = loma.model(
        inputs_embeds=embedded,
        attention_mask=mask & ~cut,
        position_ids=batch.positions,
        use_cache=False,
    ).logits
    logits[:, batch.kind == REPEAT].square().sum().backward()
    assert not embedded.grad[:, batch.kind == TEXT].any()
    assert embedded.grad[:, batch.kind == MEMORY].any()


def test_training_learns_to_repeat():
    torch.manual_seed(0)
    net = model(
        vocab_size=8, hidden_size=48, rope_parameters={"rope_type": "default", "rope_theta": 100.0}
    )
    loma = LoMA.prepare(net, t=2, c=2)
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    g = torch.Generator().manual_seed(0)
    before = loma_reconstruct(loma, torch.randint(8, (64, 4), generator=g))
    for _ in range(100):
        following, repetition = loma_loss(loma, torch.randint(8, (32, 4), generator=g))
        optimizer.zero_grad()
        (following + repetition).backward()
        optimizer.step()
    after = loma_reconstruct(loma, torch.randint(8, (64, 4), generator=g))
    # An eighth is chance.
    assert before < 0.25 < 0.35 < after


def test_lossless_keeps_what_it_cannot_repeat(monkeypatch):
    loma = prepared()
    ids = tokens(2, 2 * ZONE + 1)
    cache = LoMACache(loma, lossless=True)
    got = read(loma, ids, cache, cuts=4)
    assert [zone.folded for zone in cache.zones] == [False, False]
    with torch.no_grad():
        want = loma.model(ids, use_cache=False).logits[..., :V]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    entry = 2 * 2 * 2 * 2 * 8 * 4
    assert cache.nbytes() == (2 * ZONE + 1) * entry + 8 * 2 * 1

    answers = {0: ids[:, :ZONE], 1: ids[:, ZONE : 2 * ZONE].clone()}
    answers[1][1, 3] += 1  # one wrong token in one row
    monkeypatch.setattr(
        module.LoMA, "repeated", lambda self, cache, zone: answers[len(cache.zones) - 1]
    )
    cache = LoMACache(loma, lossless=True)
    read(loma, ids, cache)
    assert [zone.folded for zone in cache.zones] == [True, False]
    assert cache.zones[1].slots == slice(T, T + ZONE)
    assert cache.nbytes() == (T + ZONE + 1) * entry + 8 * 2 * 1


def test_generate_is_the_greedy_text_of_the_packed_form():
    loma = prepared()
    ids = tokens(2, ZONE + 2)
    cache = LoMACache(loma)
    got = loma.model.generate(
        ids, past_key_values=cache, max_new_tokens=2 * ZONE, do_sample=False, pad_token_id=0
    )
    for _ in range(2 * ZONE):
        logits, batch = packed_logits(loma, ids)
        after = logits[:, batch.kind == TEXT][:, -1, :V]
        ids = torch.cat([ids, after.argmax(-1, keepdim=True)], 1)
    assert torch.equal(got, ids)
    assert int(got.max()) < V
    assert cache.nbytes() == 2 * 2 * 2 * 2 * (T * 3 + 1) * 8 * 4


@pytest.mark.parametrize("lossless", [False, True])
def test_beams(lossless):
    loma = prepared()
    cache = LoMACache(loma, lossless=lossless)
    ids = tokens(2, ZONE + 2)
    read(loma, ids, cache)
    cache.reorder_cache(torch.tensor([1, 1]))
    following = tokens(1, ZONE).expand(2, -1)
    got = read(loma, following, cache)
    alone = LoMACache(loma, lossless=lossless)
    read(loma, ids[1:], alone)
    want = read(loma, following[1:], alone)
    torch.testing.assert_close(got, want.expand(2, -1, -1), atol=1e-6, rtol=0)
    options = {"max_new_tokens": 9, "num_beams": 2, "do_sample": False, "pad_token_id": 0}
    loma.model.generate(ids, past_key_values=LoMACache(loma, lossless=lossless), **options)


def test_saved_and_prepared_again(tmp_path):
    loma = prepared()
    ids = tokens(1, 2 * ZONE)
    want = read(loma, ids, LoMACache(loma))
    loma.model.save_pretrained(tmp_path)
    net = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(UsageError, match="prepared with t=2, c=3, not t=4, c=3"):
        LoMA.prepare(net, t=4, c=3)
    again = LoMA.prepare(net, t=T, c=C)
    assert (again.memory, again.repeat) == (loma.memory, loma.repeat)
    assert net.get_input_embeddings().weight.shape[0] == V + 2
    torch.testing.assert_close(read(again, ids, LoMACache(again)), want, atol=1e-6, rtol=0)
    again.remove()
    assert "forward" not in net.__dict__
    assert net.config._attn_implementation != "holdfast"


def test_refusals():
    for t, c in ((4, 1), (0, 4)):
        with pytest.raises(UsageError, match=f"t={t}, c={c}: a zone has"):
            LoMA.prepare(model(), t=t, c=c)
    loma = prepared()
    with pytest.raises(UsageError, match="at least one zone of 6"):
        loma_batch(loma, tokens(1, ZONE - 1))
    with pytest.raises(UsageError, match="5 tokens are less than a zone of 6"):
        loma_reconstruct(loma, tokens(1, ZONE - 1))
    mask = torch.ones(2, 9).long()
    mask[1, :2] = 0
    with pytest.raises(UsageError, match="without padding"):
        loma.model(tokens(2, 9), attention_mask=mask, past_key_values=LoMACache(loma))
    with pytest.raises(UsageError, match="reads input_ids"):
        embedded = torch.zeros(1, 3, 32)
        loma.model(inputs_embeds=embedded, past_key_values=LoMACache(loma))
    with pytest.raises(UsageError, match="do not attend to everything"):
        LoMACache(prepared("mistral"))
