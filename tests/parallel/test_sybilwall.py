"""Aggregators: weights, oracles, numbers worked out by hand, errors."""

import pytest
import torch

from holdfast.errors import UsageError
from holdfast.parallel.sybilwall import (
    FoolsGold,
    Krum,
    Mean,
    Median,
    SybilWall,
    credibility,
    credibility_ref,
)

EVERY = (Mean(), Median(), Krum(), FoolsGold(), SybilWall())


def peers(seed, known=9, size=12):
    """Histories (known, size), of which several resemble each other."""
    random = torch.Generator().manual_seed(seed)
    histories = torch.randn(known, size, generator=random, dtype=torch.float64)
    histories[1] = histories[0] + 0.1 * histories[1]
    histories[-1] = histories[2]
    return histories


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("count", [1, 4, 9])
def test_credibility_equals_the_scalar_reference(seed, count):
    histories = peers(seed)
    want = credibility_ref(histories.tolist(), count)
    torch.testing.assert_close(credibility(histories, count), histories.new_tensor(want))


def test_an_empty_history_resembles_nobody():
    histories = torch.cat([torch.zeros(1, 4), torch.eye(4)[:2]])
    assert credibility(histories, 3).tolist() == credibility_ref(histories.tolist(), 3) == [1, 1, 1]


@pytest.mark.parametrize("count", [1, 5])
def test_weights_sum_to_one_and_only_neighbours_and_self_have_one(count):
    weights = SybilWall().weights(peers(0), count)
    assert weights.shape == (count + 1,)
    assert weights.sum().item() == pytest.approx(1) and weights[-1] == weights.max()


@pytest.mark.parametrize("aggregator", EVERY, ids=lambda a: type(a).__name__)
def test_the_order_of_peers_does_not_matter(aggregator):
    histories, neighbours = peers(1), peers(2, 5)
    near, far = torch.tensor([3, 0, 4, 1, 2]), torch.tensor([7, 5, 8, 6])
    own = peers(3)[0]
    want = aggregator.aggregate(own, neighbours, histories)
    got = aggregator.aggregate(own, neighbours[near], histories[torch.cat([near, far])])
    torch.testing.assert_close(got, want)


def test_two_identical_histories_are_not_believed_where_an_honest_third_differs():
    twin, third = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0))
    histories = torch.stack([twin, 3 * twin, third])
    assert credibility(histories, 3).tolist() == [0, 0, 1]
    own, models = torch.zeros(1000), torch.stack([twin, twin, third])
    got = SybilWall().aggregate(own, models, histories)
    torch.testing.assert_close(got, (own + third) / 2)


def test_a_distant_twin_uncovers_a_neighbour_and_only_to_sybilwall():
    honest, sybil = torch.eye(4)[:2]
    histories = torch.stack([honest, sybil, sybil])
    assert SybilWall().weights(histories, 2).tolist() == [0.5, 0, 0.5]
    third = pytest.approx([1 / 3] * 3)
    assert FoolsGold().weights(histories, 2).tolist() == third


def test_neighbours_that_are_all_one_peer_are_not_believed():
    own, sybil = torch.zeros(500), torch.rand(500, generator=torch.Generator().manual_seed(0))
    got = SybilWall().aggregate(own, sybil.expand(4, -1), sybil.expand(4, -1))
    assert torch.equal(got, own)


def test_credibility_by_hand():
    # cos 0.6 of the first two, 0 with the third; the scale is the third's 1:
    # ln(0.4 / 0.6) + 0.5 = 0.0945.
    histories = torch.tensor([[1.0, 0, 0], [0.6, 0.8, 0], [0, 0, 1]])
    want = torch.tensor([0.0945, 0.0945, 1.0])
    torch.testing.assert_close(credibility(histories, 3), want, atol=1e-4, rtol=0)


def test_pardon_by_hand():
    # The second resembles the third at 0.8 more than the first at 0.6: 0.6 * 0.6 / 0.8 = 0.45 is
    # held against the first, 0.8 against the others; of the scale 0.55 that leaves 0.2 / 0.55.
    histories = torch.tensor([[1.0, 0, 0], [0.6, 0.8, 0], [0, 1.0, 0]])
    logit = torch.tensor(0.2 / 0.55).logit() + 0.5
    want = torch.tensor([1.0, max(logit, 0), max(logit, 0)])
    torch.testing.assert_close(credibility(histories, 3), want, atol=1e-4, rtol=0)


def test_baselines_by_hand():
    own, near = torch.tensor([0.0, 0.0]), torch.tensor([[1.0, 2.0], [1.0, 1.0], [50.0, -9.0]])
    assert Mean().aggregate(own, near, near).tolist() == [13.0, -1.5]
    assert Median().aggregate(own, near, near).tolist() == [1.0, 0.5]
    assert Krum().aggregate(own, near, near).tolist() == [1.0, 2.0]
    assert Krum(faulty=0).aggregate(own, near[:2], near[:2]).tolist() == [1.0, 2.0]


@pytest.mark.parametrize("aggregator", EVERY, ids=lambda a: type(a).__name__)
def test_a_node_without_neighbours_keeps_its_model(aggregator):
    own = torch.randn(6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(aggregator.aggregate(own, torch.empty(0, 6), torch.empty(0, 6)), own)
    assert torch.equal(aggregator.aggregate(own, torch.empty(0, 6), torch.rand(3, 6)), own)


@pytest.mark.parametrize("aggregator", EVERY, ids=lambda a: type(a).__name__)
def test_half_precision_stays(aggregator):
    own, near = torch.ones(6, dtype=torch.bfloat16), torch.randn(3, 6).bfloat16()
    got = aggregator.aggregate(own, near, near)
    assert got.dtype == torch.bfloat16 and got.isfinite().all()


@pytest.mark.parametrize(
    "own, near, known", [((6,), (2, 5), (2, 5)), ((6,), (2, 6), (2, 5)), ((6,), (2, 6), (1, 6)),
                         ((1, 6), (2, 6), (2, 6))]
)  # fmt: skip
def test_shapes_that_do_not_match_are_refused(own, near, known):
    with pytest.raises(UsageError, match=r"do not match; expected \(P,\), \(k, P\)"):
        SybilWall().aggregate(torch.zeros(own), torch.zeros(near), torch.zeros(known))


def test_negative_arguments_are_refused():
    with pytest.raises(UsageError, match="must not be negative"):
        SybilWall(max_records=-1)
