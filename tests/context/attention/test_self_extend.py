"""Self-Extend against a dense matrix of distances."""

import pytest
import torch

from holdfast.context.attention.self_extend import SelfExtend
from holdfast.context.cache.baselines import SinksRecent
from holdfast.context.cache.bounded import BoundedCache
from holdfast.context.cache.conformance import INVARIANTS, model, tokens
from holdfast.context.stream import prefill_chunks, read
from holdfast.errors import UsageError

GROUP, WINDOW = 4, 18


def grouped_distances(n, group=GROUP, window=WINDOW):
    """The definition, pair by pair."""
    matrix = torch.full((n, n), -1)
    for i in range(n):
        for j in range(i + 1):
            far = i // group + window - window // group - j // group
            matrix[i, j] = i - j if i - j < window else far
    return matrix


def cache(net, chunk=8, capacity=200, **options):
    policy = SelfExtend(**({"group": GROUP, "window": WINDOW} | options))
    return BoundedCache.for_model(net, policy, tokens=capacity, chunk=chunk)


@pytest.mark.parametrize("chunk", [1, 7, 32, 90])
def test_every_chunk_size_equals_the_distance_matrix(by_distance, chunk):
    net, ids = model(), tokens(2, 90)
    want = by_distance(net, ids, grouped_distances(90))
    with torch.no_grad():
        got = net(ids, past_key_values=cache(net, chunk)).logits
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def test_decoding_equals_prefill(by_distance):
    net, ids = model(), tokens(1, 70)
    want = by_distance(net, ids, grouped_distances(70))
    full = cache(net)
    prefill_chunks(net, ids[:, :50], full)
    for at in range(50, 70):
        got = read(net, ids[:, at : at + 1], full)
        torch.testing.assert_close(got, want[:, at], atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", [{"group": 1}, {"window": 64}])
def test_no_groups_or_short_texts_are_plain_attention(options):
    net, ids = model(), tokens(2, 64)
    with torch.no_grad():
        got = net(ids, past_key_values=cache(net, **options)).logits
        torch.testing.assert_close(got, net(ids).logits, atol=1e-5, rtol=0)


def test_what_another_policy_keeps_has_its_original_distance(by_distance):
    net, ids = model(num_hidden_layers=1), tokens(1, 96)
    small = cache(net, capacity=32, evict=SinksRecent(sinks=2))
    prefill_chunks(net, ids[:, :-1], small)
    got = read(net, ids[:, -1:], small)
    kept = small.bounded[0].field("index")[0, 0]
    assert kept[:2].tolist() == [0, 1] and len(kept) <= 32 and kept[2] > 50
    matrix = grouped_distances(96)
    hidden = torch.ones(96, dtype=torch.bool)
    hidden[kept] = False
    matrix[-1, hidden] = -1
    torch.testing.assert_close(got, by_distance(net, ids, matrix)[:, -1], atol=1e-5, rtol=0)


def test_no_relative_position_is_new_up_to_the_longest_text():
    policy = SelfExtend(group=GROUP, window=WINDOW)
    trained = 30
    n = policy.longest(trained, WINDOW)
    assert n == (30 - 18 + 4) * 4
    assert grouped_distances(n).max() < trained
    assert grouped_distances(n + 1).max() >= trained


def test_plan_follows_the_authors_rule():
    for trained, target in ((256, 1024), (4096, 32768), (512, 300)):
        policy = SelfExtend.plan(trained, target)
        far = (target - policy.window) / policy.group
        assert policy.window + max(0, far) <= trained / 2
        assert (
            policy.group == 1
            or policy.window + (target - policy.window) / (policy.group - 1) > trained / 2
        )


def test_refusals_and_warnings():
    net = model()
    with pytest.raises(UsageError, match="group=0: a group has 1 position"):
        SelfExtend(group=0)
    with pytest.raises(UsageError, match=r"window=512 leaves no positions.*use 128"):
        BoundedCache.for_model(net, SelfExtend(window=512), tokens=64, batch=1)
    with pytest.raises(UsageError, match="looks at entries in its own way"):
        SelfExtend(evict=SelfExtend())
    short = model(max_position_embeddings=24)
    policy = SelfExtend(group=2, window=8)
    with pytest.warns(UserWarning, match=r"more than 40 tokens.*for example 4"):
        prefill_chunks(short, tokens(1, 48), BoundedCache.for_model(short, policy, tokens=64))


@pytest.mark.parametrize("invariant", INVARIANTS)
@pytest.mark.filterwarnings("ignore:more than")
def test_with_a_policy_that_drops(invariant):
    INVARIANTS[invariant](lambda: SelfExtend(evict=SinksRecent()))
