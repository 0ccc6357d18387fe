"""Records and their gossip, attacks, graphs, and the whole simulation on synthetic data."""

import collections
import itertools
import math

import pytest
import torch

from holdfast.errors import UsageError
from holdfast.parallel.decentral import (
    Backdoor,
    Data,
    LabelFlip,
    Linear,
    Records,
    dirichlet_shards,
    random_graph,
    simulate,
)
from holdfast.parallel.sybilwall import FoolsGold, Krum, Mean, Median, SybilWall

SIZE = 7


def records(neighbours=(1, 2), **options):
    return Records(0, neighbours, torch.zeros(SIZE), **{"lam": 0.8, **options})


def news(peer, round, distance=1, value=1.0):
    """A passed-on record as its sender has it: one step nearer than to whoever receives it."""
    return torch.full((SIZE,), value), torch.tensor([peer, round, distance, peer])


def table(found):
    return {
        peer: (round, distance, source) for peer, round, distance, source in found.numbers.tolist()
    }


def test_bytes_are_the_formula():
    found = records()
    for peer in (5, 6, 7):
        found.receive(*news(peer, 0), 1)
    near, far = 2, 3
    assert found.nbytes == (near + far) * (4 * SIZE + 32)
    assert Records(0, (1,), torch.zeros(SIZE).bfloat16()).nbytes == 2 * SIZE + 32


def test_the_sum_of_a_neighbours_updates_is_its_last_model():
    found = records()
    models = torch.randn(6, 2, SIZE, generator=torch.Generator().manual_seed(0))
    summed = models[0].clone()
    for i, seen in enumerate(models):
        found.receive_models(seen, i)
        if i:
            summed += seen - models[i - 1]
    torch.testing.assert_close(found.histories[:2], summed)


def test_a_record_is_replaced_by_a_newer_round_unless_it_was_seen_directly():
    found = records()
    found.receive_models(torch.zeros(2, SIZE), 3)
    found.receive(*news(1, 9), 2)
    found.receive(*news(5, 3, value=3.0), 1)
    found.receive(*news(5, 3, value=4.0), 2)
    found.receive(*news(0, 9), 2)
    assert table(found) == {1: (3, 1, 1), 2: (3, 1, 2), 5: (3, 2, 1)}
    assert found.histories[2, 0] == 3
    found.receive(*news(5, 4, distance=2, value=5.0), 2)
    assert table(found)[5] == (4, 3, 2) and found.histories[2, 0] == 5


def test_a_full_table_evicts_the_farthest_then_the_oldest():
    found = records(max_records=2)
    found.receive(*news(5, 8, distance=2), 1)
    found.receive(*news(6, 4), 1)
    found.receive(*news(7, 2), 1)  # 5 is the farthest
    assert set(table(found)) == {1, 2, 6, 7}
    found.receive(*news(8, 3), 1)  # 7 is the oldest
    assert set(table(found)) == {1, 2, 6, 8}
    found.receive(*news(9, 99, distance=3), 1)  # too far to get in
    assert set(table(found)) == {1, 2, 6, 8}
    assert found.nbytes == 4 * (4 * SIZE + 32)
    none = records(max_records=0)
    none.receive(*news(5, 8), 1)
    assert len(none.numbers) == 2


def test_what_is_passed_on_follows_the_distance_and_never_returns():
    found = records(neighbours=(1, 2, 3))
    random = torch.Generator().manual_seed(0)
    assert found.sample(1, random) is None  # nothing was seen yet
    found.receive_models(torch.ones(3, SIZE), 0)
    found.receive(*news(5, 0, distance=1), 2)
    found.receive(*news(6, 0, distance=2), 1)
    drawn = collections.Counter()
    for _ in range(4000):
        history, numbers = found.sample(1, random)
        drawn[int(numbers[0])] += 1
        assert torch.equal(history, found.histories[0])
    # 1 is the receiver, 6 came from it; 5 is two hops away, so exp(-0.8) as likely as 2 and 3.
    assert set(drawn) == {2, 3, 5}
    share = math.exp(-0.8) / (2 + math.exp(-0.8))
    assert drawn[5] / 4000 == pytest.approx(share, abs=0.025)
    assert records(lam=None).sample(1, random) is None


def test_a_message_does_not_change_with_its_senders_record():
    found = records(neighbours=(1,))
    found.receive_models(torch.ones(1, SIZE), 0)
    history, _ = found.sample(2, torch.Generator().manual_seed(0))
    found.receive_models(torch.zeros(1, SIZE), 1)
    assert history.eq(1).all()


@pytest.mark.parametrize("nodes, degree", [(20, 5), (6, 2), (7, 4), (4, 3), (5, 0)])
def test_random_graphs_are_regular_and_differ_by_seed(nodes, degree):
    graphs = [random_graph(nodes, degree, seed) for seed in range(3)]
    for graph in graphs:
        assert torch.equal(graph, graph.T) and not graph.diag().any()
        assert graph.sum(1).tolist() == [degree] * nodes
    if nodes == 20:
        assert not any(torch.equal(a, b) for a, b in itertools.combinations(graphs, 2))
    assert torch.equal(graphs[0], random_graph(nodes, degree, 0))


def test_impossible_graphs_are_refused():
    for nodes, degree in ((5, 3), (4, 4)):
        with pytest.raises(UsageError, match=f"no graph of {nodes} nodes has degree {degree}"):
            random_graph(nodes, degree)


def test_shards_are_a_partition_and_skewed_by_a_small_alpha():
    y = torch.arange(10).repeat_interleave(60)

    def classes(alpha):
        shards = dirichlet_shards(y, 6, alpha, seed=1)
        assert torch.equal(torch.cat(shards).sort().values, torch.arange(600))
        # How many classes it would take to be as even.
        shares = torch.stack([y[s].bincount(minlength=10) / len(s) for s in shards])
        return (1 / shares.square().sum(1)).mean()

    assert classes(0.1) < 4 < 8 < classes(100)
    assert all(len(s) for s in dirichlet_shards(y[:60], 40, 0.01))


def test_training_is_sgd_on_cross_entropy():
    random = torch.Generator().manual_seed(0)
    x, y = torch.randn(3, 8, 4, generator=random), torch.randint(5, (3, 8), generator=random)
    weights = torch.randn(3, 25, generator=random)
    model = Linear(weights.clone(), 5)
    model.train_(x, y, lr=0.1)
    leaf = weights.requires_grad_()
    maps = leaf.view(3, 5, 5)
    logits = x @ maps[:, :, :4].mT + maps[:, None, :, 4]
    torch.nn.functional.cross_entropy(logits.mT, y, reduction="none").mean(1).sum().backward()
    torch.testing.assert_close(model.weights, (leaf - 0.1 * leaf.grad).detach())


@pytest.fixture(scope="module")
def world():
    """Four Gaussian classes in eight dimensions, skewed over eight peers and an adversary."""
    random = torch.Generator().manual_seed(0)
    y = torch.randint(4, (700,), generator=random)
    x = 1.5 * torch.eye(8)[y] + 0.5 * torch.randn(700, 8, generator=random)
    shards = dirichlet_shards(y[:500], 9, 0.3)
    return random_graph(8, 3), Data(x[:500], y[:500], x[500:], y[500:], shards)


@pytest.mark.parametrize("attack", [None, LabelFlip(2, edges=3), Backdoor(2, edges=3)])
@pytest.mark.parametrize("aggregator", [Mean(), Median(), Krum(), FoolsGold(), SybilWall()])
def test_every_aggregator_runs_and_is_counted(world, aggregator, attack):
    graph, data = world
    found = simulate(graph, data, aggregator, attack, rounds=4, steps=5)
    assert found.models.shape == (8, 4 * 9) and found.models.isfinite().all()
    again = simulate(graph, data, aggregator, attack, rounds=4, steps=5)
    assert torch.equal(found.models, again.models)
    sybils = 6 if attack else 0
    assert sum(r.neighbours for r in found.records) == 8 * 3 + sybils
    for i, record in enumerate(found.records):
        known = len(record.numbers)
        assert known > record.neighbours or aggregator.lam is None
        assert found.ledger[i, "device", "knowledge", "step"] == known * (4 * 36 + 32)
        assert found.ledger[i, "device", "parameters", "step"] == 4 * 36
    assert math.isnan(found.success) if attack is None else 0 <= found.success <= 1


def test_max_records_bounds_every_peer(world):
    graph, data = world
    found = simulate(graph, data, SybilWall(max_records=2), rounds=6, steps=2)
    assert {len(r.numbers) - r.neighbours for r in found.records} == {2}


def test_attacks_poison_what_they_say(world):
    _, data = world
    x, y = LabelFlip(1, source=0, target=2).poison(data)
    clean = torch.cat([data.y[data.shards[-1]], data.y[(data.y == 0) | (data.y == 2)]])
    assert torch.equal(y, torch.tensor([2, 1, 0, 3])[clean]) and len(x) == len(y)
    x, y = Backdoor(1, target=3, pixels=2, value=9.0).poison(data)
    marked = (x[:, -2:] == 9).all(1)
    assert marked.sum() == 500 and y[marked].eq(3).all()
    assert torch.equal(x[marked][:, :-2], data.x[:, :-2])


def test_sybils_of_one_adversary_fool_averaging_and_not_sybilwall(world):
    graph, data = world
    attack = LabelFlip(6, edges=4)
    mean, wall = (
        simulate(graph, data, a, attack, rounds=15, steps=20) for a in (Mean(), SybilWall())
    )
    assert mean.success > 0.5 and wall.success < 0.1
    assert wall.accuracy > mean.accuracy + 0.15


def test_a_node_without_neighbours_learns_alone(world):
    graph, data = world
    alone = graph.clone()
    alone[0] = alone[:, 0] = False
    models = [simulate(alone, data, a, rounds=2, steps=2).models[0] for a in (Mean(), SybilWall())]
    assert torch.equal(*models)


def test_bad_worlds_are_refused(world):
    graph, data = world
    with pytest.raises(UsageError, match=r"9 shards for 4 honest peers.*split the data into 5"):
        simulate(random_graph(4, 2), data, Mean())
    with pytest.raises(UsageError, match="symmetric"):
        simulate(graph.triu(), data, Mean())
    with pytest.raises(UsageError, match="has 9 edges, there are 8"):
        simulate(graph, data, Mean(), LabelFlip(1, edges=9))
    with pytest.raises(UsageError, match="attack nobody"):
        LabelFlip(0)
