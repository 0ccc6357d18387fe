import math

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache

from holdfast.context.cache.bounded import BoundedCache
from holdfast.context.cache.conformance import CAPACITY, CHUNK, model, tokens
from holdfast.context.cache.layer import New
from holdfast.context.cache.policy import surprise
from holdfast.context.cache.sirllm import SirLLM, select_ref
from holdfast.context.stream import prefill_chunks
from holdfast.errors import DoesNotFit, UsageError


def small(net, policy, rows=1, capacity=CAPACITY, chunk=CHUNK):
    return BoundedCache.for_model(net, policy, tokens=capacity, batch=rows, chunk=chunk)


def with_scores(policy, scores):
    """The layer of a cache that holds so many entries with scores (B,m)."""
    net = model(num_hidden_layers=1)
    rows, length = scores.shape
    cache = small(net, policy, rows, length)
    prefill_chunks(net, tokens(rows, length), cache)
    layer = cache.bounded[0]
    layer.field("surprise").copy_(scores[:, None])
    return layer


@pytest.mark.parametrize("recent", [0, 5])
def test_select_equals_reference(recent):
    scores = torch.randint(5, (20, 40), generator=torch.Generator().manual_seed(0)).float()
    policy = SirLLM(sinks=4, recent=recent)
    got = policy.select(with_scores(policy, scores), 16)
    want = [select_ref(row, 16, 4, recent) for row in scores.tolist()]
    assert got[:, 0].tolist() == want


def test_rows_of_different_length_choose_among_their_own():
    scores = torch.arange(40.0).flip(0).expand(2, -1)
    policy = SirLLM(sinks=2, recent=3)
    layer = with_scores(policy, scores)
    layer.counts = [40, 30]
    got = policy.select(layer, 10)
    assert got[0, 0].tolist() == [*range(7), 37, 38, 39]
    assert got[1, 0].tolist() == [*range(7), 27, 28, 29]


def test_scores_are_the_cross_entropy_of_the_same_forward():
    net, ids = model(), tokens(2, 30)
    cache = small(net, SirLLM(), rows=2, capacity=64)
    prefill_chunks(net, ids, cache)
    with torch.no_grad():
        logits = net(ids, past_key_values=DynamicCache()).logits
    want = F.cross_entropy(logits[:, :-1].mT, ids[:, 1:], reduction="none")
    for layer in cache.bounded:
        got = layer.field("surprise")[:, 0]
        torch.testing.assert_close(got[:, 1:], want, atol=1e-5, rtol=0)
        # Nothing predicted the first token: it gets the largest of its chunk.
        assert torch.equal(got[:, 0], got[:, 1:CHUNK].amax(1))


def test_padding_predicts_nothing():
    nan = math.nan
    slots = torch.tensor([[0, 1, 2], [-1, 0, 1], [-1, -1, 0], [7, 8, 9]])
    nats = torch.tensor([[nan, 1.0, 2.0], [9.0, 8.0, 3.0], [9.0, 8.0, 7.0], [nan, 0.5, 0.0]])
    got = surprise(nats, New(3, None, [3, 2, 1, 10], nats.device, slots))
    assert got[0].tolist() == [2, 1, 2]
    assert got[1, 1:].tolist() == [3, 3]
    assert got[2, 2].item() == 0
    assert got[3].tolist() == [0.5, 0.5, 0]


def read_in_turns(policy, turns):
    """What stays, as text positions, after turns of `CHUNK` tokens, with the scores of all."""
    net = model()
    cache = small(net, policy)
    before, scores, kept = None, [], torch.zeros(0, dtype=torch.long)
    for number, turn in enumerate(turns.split(CHUNK, 1)):
        cache.turn()
        length = cache.bounded[0].length
        old = cache.bounded[0].field("surprise")[0, 0].clone() if length else torch.zeros(0)
        if length + CHUNK > CAPACITY:
            stays = select_ref(old.tolist(), CAPACITY - CHUNK, policy.sinks, policy.recent)
            kept, old = kept[stays], old[stays]
        before = prefill_chunks(net, turn, cache, before=before)
        kept = torch.cat([kept, torch.arange(number * CHUNK, (number + 1) * CHUNK)])
        got = cache.bounded[0].field("surprise")[0, 0]
        # Stored scores moved with their entries, and the new turn's are not faded.
        assert torch.equal(got[: len(old)], old)
        scores.append(got[len(old) :].clone())
    return kept, torch.cat(scores)


def test_without_decay_the_most_surprising_tokens_of_all_turns_stay():
    kept, scores = read_in_turns(SirLLM(decay=1.0), tokens(1, 12 * CHUNK))
    earlier = len(scores) - CHUNK
    best = 4 + scores[4:earlier].topk(CAPACITY - CHUNK - 4).indices
    assert sorted([*range(4), *best.tolist(), *range(earlier, len(scores))]) == kept.tolist()


def test_with_strong_decay_only_the_latest_turns_stay():
    kept, _ = read_in_turns(SirLLM(decay=1e-3), tokens(1, 12 * CHUNK))
    assert kept[:4].tolist() == [0, 1, 2, 3]
    # Of 32 entries 4 are sinks; the last turn and the two before it are there in full.
    assert kept[-3 * CHUNK :].tolist() == list(range(9 * CHUNK, 12 * CHUNK))


def test_a_turn_fades_what_is_stored():
    net = model()
    cache = small(net, SirLLM(decay=0.5))
    cache.turn()
    prefill_chunks(net, tokens(1, 20), cache)
    before = [layer.field("surprise").clone() for layer in cache.bounded]
    cache.turn()
    for layer, old in zip(cache.bounded, before, strict=True):
        assert torch.equal(layer.field("surprise"), old * 0.5)


def test_unscored_tokens_leave_sinks_and_recent():
    policy = SirLLM(sinks=3)
    got = policy.select(with_scores(policy, torch.zeros(1, 20)), 10)
    assert got[0, 0].tolist() == [0, 1, 2, *range(13, 20)]


def test_bytes_are_those_of_the_formula():
    net = model()
    cache = small(net, SirLLM(), rows=3)
    prefill_chunks(net, tokens(3, 100), cache)
    layers, batch, heads, width = 2, 3, 2, 8
    entries = 2 * layers * batch * heads * CAPACITY * width * 4 + 4 * layers * batch * CAPACITY
    assert sum(layer.nbytes() for layer in cache.bounded) == entries


def test_errors():
    with pytest.raises(UsageError, match=r"decay=0 is outside \(0, 1\]; use 1.0 to never forget"):
        SirLLM(decay=0)
    with pytest.raises(UsageError, match="sinks=-1, recent=0: neither can be negative"):
        SirLLM(sinks=-1)
    with pytest.raises(DoesNotFit, match=r"32 tokens do not hold chunks of 30.*use 35 or more"):
        small(model(), SirLLM(), chunk=30)
