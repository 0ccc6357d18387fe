"""LM-Infinite against a dense matrix of distances."""

import pytest
import torch

from holdfast.context.attention.lm_infinite import LMInfinite
from holdfast.context.cache.bounded import BoundedCache
from holdfast.context.cache.conformance import model, tokens
from holdfast.context.stream import prefill_chunks, read
from holdfast.errors import DoesNotFit, UsageError

GLOBAL, LOCAL = 3, 20


def lambda_distances(n, n_global=GLOBAL, n_local=LOCAL):
    """The definition, pair by pair."""
    matrix = torch.full((n, n), -1)
    for i in range(n):
        for j in range(i + 1):
            if i - j < n_local or j < n_global:
                matrix[i, j] = min(i - j, n_local)
    return matrix


def cache(net, chunk=8, tokens=GLOBAL + LOCAL + 7, **options):
    policy = LMInfinite(n_global=GLOBAL, n_local=LOCAL, **options)
    return BoundedCache.for_model(net, policy, tokens=tokens, chunk=chunk)


@pytest.mark.parametrize("chunk, capacity", [(1, 23), (5, 27), (8, 30), (8, 64), (16, 100)])
def test_every_chunk_and_capacity_equals_the_distance_matrix(by_distance, chunk, capacity):
    net, ids = model(), tokens(2, 90)
    want = by_distance(net, ids, lambda_distances(90))
    with torch.no_grad():
        got = net(ids, past_key_values=cache(net, chunk, capacity)).logits
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def test_decoding_equals_prefill(by_distance):
    net, ids = model(), tokens(1, 80)
    want = by_distance(net, ids, lambda_distances(80))
    small = cache(net)
    prefill_chunks(net, ids[:, :60], small)
    for at in range(60, 80):
        got = read(net, ids[:, at : at + 1], small)
        torch.testing.assert_close(got, want[:, at], atol=1e-5, rtol=0)
    assert small.bounded[0].length <= GLOBAL + LOCAL + 7


def test_short_texts_are_plain_attention():
    net, ids = model(), tokens(2, LOCAL)
    with torch.no_grad():
        torch.testing.assert_close(
            net(ids, past_key_values=cache(net)).logits, net(ids).logits, atol=1e-5, rtol=0
        )


def test_no_distance_exceeds_the_ceiling(monkeypatch):
    net = model(num_hidden_layers=1)
    small = cache(net)
    prefill_chunks(net, tokens(1, 200), small)
    layer, asked = small.bounded[0], []
    original = type(layer).rotate

    def spy(self, x, positions):
        asked.append(positions)
        return original(self, x, positions)

    monkeypatch.setattr(type(layer), "rotate", spy)
    read(net, tokens(1, 1), small)
    query, key = asked[-2:]
    assert int(query.max() - key.min()) == LOCAL


def test_the_first_tokens_count_however_far_they_are():
    net, ids = model(), tokens(1, 150)
    other = ids.clone()
    other[0, 1] = (ids[0, 1] % 200) + 1
    a, b = (prefill_chunks(net, x, cache(net)) for x in (ids, other))
    assert not torch.allclose(a, b)
    middle = ids.clone()
    # Two layers carry a token's influence two windows far, not further.
    middle[0, 100 - 2 * LOCAL] = (middle[0, 100 - 2 * LOCAL] % 200) + 1
    c = prefill_chunks(net, middle, cache(net))
    assert torch.equal(a, c)


def test_bad_options_and_small_caches_are_refused():
    net = model()
    with pytest.raises(UsageError, match="n_local=0: a token sees at least itself"):
        LMInfinite(n_local=0)
    with pytest.raises(UsageError, match="n_global=-1 is negative"):
        LMInfinite(n_global=-1)
    with pytest.raises(DoesNotFit, match="use 30 or more"):
        cache(net, tokens=29)
    with pytest.warns(UserWarning, match="n_local=600 exceeds the 512 tokens"):
        BoundedCache.for_model(net, LMInfinite(n_local=600), tokens=900, batch=1)
