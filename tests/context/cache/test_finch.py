import math

import pytest
import torch
from transformers import DynamicCache

from holdfast.context.cache.baselines import SinksRecent
from holdfast.context.cache.bounded import BoundedCache
from holdfast.context.cache.conformance import measured, model, tokens
from holdfast.context.cache.finch import Finch, finch_prefill
from holdfast.context.cache.layer import BoundedLayer
from holdfast.context.stream import ask, prefill_chunks, read
from holdfast.errors import DoesNotFit, UsageError
from holdfast.forms.affine import Int8


def small(net, capacity, chunk=8, rows=1, policy=None, **options):
    policy = policy or Finch()
    return BoundedCache.for_model(net, policy, tokens=capacity, batch=rows, chunk=chunk, **options)


def plain_logits(net, *ids):
    with torch.no_grad():
        return net(torch.cat(ids, 1), past_key_values=DynamicCache()).logits[:, -1]


@pytest.mark.parametrize("normalize", [True, False])
def test_scores_are_the_questions_attention(normalize):
    net, doc, question = model(), tokens(2, 20), tokens(2, 18, seed=1)
    net.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = net(torch.cat([doc, question], 1), output_attentions=True).attentions
    cache = small(net, 64, chunk=20, rows=2, policy=Finch(normalize=normalize))
    read(net, doc, cache)
    ask(net, question, cache)
    seen = torch.arange(21, 39.0) if normalize else torch.ones(18)
    for layer, weights in zip(cache.bounded, attentions, strict=True):
        rows = weights[:, :, 20:, :20] * seen[:, None]
        want = rows.sum(2).unflatten(1, (2, 2)).sum(2)
        assert layer.length == 20
        torch.testing.assert_close(layer.field("attention"), want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("length", "chunk"), [(24, 24), (23, 10), (31, 7)])
def test_what_fits_is_read_as_by_the_plain_model(length, chunk):
    net, doc, question = model(), tokens(2, length), tokens(2, 5, seed=1)
    cache = small(net, length + chunk + 5, chunk, rows=2)
    got = finch_prefill(net, doc, question, cache)
    torch.testing.assert_close(got, plain_logits(net, doc, question), atol=1e-5, rtol=0)


def test_memory_grows_by_chunks_and_never_beyond_its_room(monkeypatch):
    net, keep, chunk, asked = model(), 12, 8, 3
    cache = small(net, keep + chunk + asked, chunk)
    kept, held = [], []
    compress, append = BoundedLayer.compress, BoundedLayer.append

    def compressed(layer, target):
        compress(layer, target)
        kept.append(layer.length)

    def appended(layer, *args):
        new = append(layer, *args)
        held.append(layer.length)
        return new

    monkeypatch.setattr(BoundedLayer, "compress", compressed)
    monkeypatch.setattr(BoundedLayer, "append", appended)
    finch_prefill(net, tokens(1, 5 * chunk), tokens(1, asked, seed=1), cache)
    assert kept[::2] == kept[1::2] == [3, 5, 8, 10, 12]  # 12 * i / 5, rounded up
    assert max(held) == 10 + chunk + asked
    assert [layer.length for layer in cache.bounded] == [keep + asked] * 2


@pytest.mark.parametrize(("capacity", "rows", "form"), [(40, 1, None), (300, 2, Int8())])
def test_bytes_stay_below_the_formula(capacity, rows, form):
    net = model()
    cache = small(net, capacity, 32 if rows == 2 else 8, rows, form=form)
    doc, question = tokens(rows, 3 * capacity), tokens(rows, 8, seed=1)
    with measured() as log:
        finch_prefill(net, doc, question, cache)
    assert log.peak <= cache.peak_nbytes()
    assert cache.nbytes() == cache.predict_held(capacity) == log.live
    if form is None:
        entries = 2 * 2 * 1 * 2 * capacity * 8 * 4 + 4 * 2 * 1 * 2 * capacity
        assert sum(layer.nbytes() for layer in cache.bounded) == entries


def test_a_question_leaves_no_trace():
    net, doc = model(), tokens(2, 20)
    asked, other = (small(net, 40, rows=2) for _ in range(2))
    for cache in (asked, other):
        prefill_chunks(net, doc, cache)
    mask = torch.ones(2, 6)
    mask[1, :4] = 0
    ask(net, tokens(2, 6, seed=1), asked, mask=mask)
    assert [layer.counts for layer in asked.bounded] == [[20, 20]] * 2
    assert [layer.read for layer in asked.bounded] == [[20, 20]] * 2
    assert asked.get_seq_length() == 20
    more = tokens(2, 9, seed=2)
    assert torch.equal(prefill_chunks(net, more, asked), prefill_chunks(net, more, other))


def test_a_shorter_question_in_a_batch_chooses_as_it_does_alone():
    net, doc = model(), tokens(2, 40)
    question = tokens(2, 6, seed=1)
    mask = torch.ones(2, 6)
    mask[1, :4] = 0
    both = finch_prefill(net, doc, question, small(net, 26, rows=2), question_mask=mask)
    alone = finch_prefill(net, doc[1:], question[1:, 4:], small(net, 22))
    torch.testing.assert_close(both[1:], alone, atol=1e-5, rtol=0)


def test_padding_of_a_document_changes_nothing():
    net, doc, question = model(), tokens(2, 40), tokens(2, 3, seed=1)
    mask = torch.ones(2, 40)
    mask[1, :11] = 0
    both = finch_prefill(net, doc, question, small(net, 51, rows=2), doc_mask=mask)
    want = plain_logits(net, doc[1:, 11:], question[1:])
    torch.testing.assert_close(both[1:], want, atol=1e-5, rtol=0)


def test_prefill_with_a_suffix_drops_only_what_the_question_saw(monkeypatch):
    net, cache, seen = model(), None, []
    select = Finch.select

    def judged(policy, layer, keep):
        seen.append(bool((layer.field("attention") > 0).all()))
        return select(policy, layer, keep)

    monkeypatch.setattr(Finch, "select", judged)
    cache = small(net, 32)
    prefill_chunks(net, tokens(1, 200), cache, suffix=tokens(1, 5, seed=1)[0])
    assert len(seen) > 10
    assert all(seen)
    assert all(layer.length <= 32 - 5 for layer in cache.bounded)


def test_what_no_question_saw_outlasts_what_one_saw():
    net = model(num_hidden_layers=1)
    cache = small(net, 20)
    prefill_chunks(net, tokens(1, 12), cache)
    layer = cache.bounded[0]
    assert Finch().select(layer, 9)[0].tolist() == [[0, 1, 2, 3, 7, 8, 9, 10, 11]] * 2
    layer.field("attention")[:, :, :9] = torch.tensor([9, 1, 1, 1, 5, 7, 3, 4, 6.0])
    assert Finch().select(layer, 9)[0].tolist() == [[0, 1, 2, 3, 5, 8, 9, 10, 11]] * 2
    # All seen: nothing is kept but by attention, later entries first among equals.
    layer.field("attention")[:, :, 9:] = 1
    assert Finch().select(layer, 7)[0].tolist() == [[0, 4, 5, 6, 7, 8, 11]] * 2


def test_documents_may_be_longer_than_the_window():
    net = model(max_position_embeddings=48)
    cache = small(net, 32)
    logits = finch_prefill(net, tokens(1, 480), tokens(1, 4, seed=1), cache)
    assert math.isfinite(logits.sum())


def test_errors():
    net = model(max_position_embeddings=48)
    doc, question = tokens(1, 20), tokens(1, 4)
    with pytest.raises(UsageError, match=r"question_ids \(1, 0\); expected as many rows and"):
        finch_prefill(net, doc, question[:, :0], small(net, 32))
    with pytest.raises(DoesNotFit, match=r"leave 0 of 12 entries for the document; use 13 or more"):
        finch_prefill(net, doc, question, small(net, 12))
    with pytest.raises(UsageError, match="a cache of 49 entries is larger than the 48 positions"):
        finch_prefill(net, doc, question, small(net, 49))
    with pytest.raises(
        UsageError, match="a question of 9 tokens is not read at once, which 1 to 8"
    ):
        finch_prefill(net, doc, tokens(1, 9), small(net, 32))
    with pytest.raises(UsageError, match=r"has the policy SinksRecent.*make it with Finch\(\)"):
        finch_prefill(net, doc, question, small(net, 32, policy=SinksRecent()))
    kinds = ["full_attention", "sliding_attention"]
    hybrid = model("qwen2", layer_types=kinds, use_sliding_window=True, sliding_window=8)
    with pytest.raises(UsageError, match="sliding layers of this model cannot forget a question"):
        finch_prefill(hybrid, doc, question, small(hybrid, 32))
    cache = small(net, 32)
    finch_prefill(net, doc, question, cache)
    with pytest.raises(UsageError, match=r"holds entries already; call cache.reset\(\)"):
        finch_prefill(net, doc, question, cache)
    with pytest.raises(UsageError, match="8 tokens and a question of 8 leave no entry of 16"):
        prefill_chunks(net, doc, small(net, 16), suffix=tokens(1, 8))
