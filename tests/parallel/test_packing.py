"""Packs of layers and the search over four-tuples, on profiles made up by hand."""

import random
from itertools import combinations, pairwise, product

import pytest
import torch

from holdfast.errors import DoesNotFit, UsageError
from holdfast.parallel import pack_planner
from holdfast.parallel.layer_profile import Cost, Layer, Profile
from holdfast.parallel.pack_planner import Configuration, Planner
from holdfast.parallel.packing import balanced, divisors, greedy_memory
from holdfast.plan.simulate import simulate

ROWS = 4


def made_up(depth, seed=0, *, noisy=False):
    """Layers of random sizes and times; larger micro-batches take less time for each row."""
    draw = random.Random(seed)
    layers = []
    for i in range(depth):
        size, speed = draw.randint(1, 9) * 1000, draw.randint(1, 9) * 100
        costs = {}
        for u in divisors(ROWS):
            forward = speed * (u + 2)
            costs[u] = Cost(forward, 3 * forward, 20 * u, 30 * u, 100 * u)
        layers.append(
            Layer(f"layer {i}", size, size, size // 4, size // 5, size // 3, noisy, costs)
        )
    return Profile(tuple(layers), (((2,), torch.float32),) * (depth + 1), 64)


def cuts(stop):
    """Every packing of layers 0..stop, said another way."""
    for count in range(1, stop + 1):
        for inner in combinations(range(1, stop), count - 1):
            yield tuple(pairwise((0, *inner, stop)))


def finish(planner, c):
    """When a step on one device ends, by hand: load, run, store, update, one pack after another."""
    profile, steps = planner.profile, planner.steps(c)
    loader = computer = updater = 0
    ends = []
    for k, step in enumerate(steps):
        layers = [profile.layers[i] for i in step.layers]
        ahead = k > 0 and (
            planner.bytes(steps[k - 1], c) + sum(x.parameter_bytes for x in layers)
            <= planner.budget
        )
        free = ends[k - 2] if ahead and k > 1 else 0 if ahead or not k else ends[k - 1]
        loader = max(loader, free) + sum(x.load_ns for x in layers)
        micro = c.micro_forward if step.kind == "F" else c.micro_backward
        took = sum(
            x.costs[micro].forward_ns if step.kind == "F" else x.costs[micro].backward_ns
            for x in layers
        )
        edges = (step.start > 0) + (step.stop < planner.depth)
        crossing = edges * micro * 8 * (1 if step.kind == "F" else 1.5)
        took += int(crossing / profile.bandwidth)
        computer = max(computer, loader) + took * (ROWS // micro)
        if step.kind == "B":
            computer += sum(x.store_ns for x in layers)
            updater = max(updater, computer) + sum(x.update_ns for x in layers)
        ends.append(computer)
    return max(computer, updater)


def everything(planner):
    """Every configuration that fits."""
    for u_forward, u_backward in product(divisors(ROWS), repeat=2):
        for backward in cuts(planner.depth):
            stop = backward[-1][0]
            for forward in cuts(stop) if stop else [()]:
                c = Configuration(u_forward, forward, u_backward, backward)
                try:
                    planner.check(c)
                except DoesNotFit:
                    continue
                yield c


@pytest.mark.parametrize("depth, seed", [(1, 0), (2, 1), (3, 2), (4, 3), (4, 4), (5, 5), (6, 6)])
def test_search_finds_the_optimum(depth, seed):
    planner = Planner(made_up(depth, seed), ROWS, 34_000)
    best = min(finish(planner, c) for c in everything(planner))
    found = planner.search()
    assert finish(planner, found) == simulate(planner.tasks(found)).end == best


def test_simulation_is_the_recurrence():
    planner = Planner(made_up(5, 7), ROWS, 30_000)
    for c in list(everything(planner))[::17]:
        assert simulate(planner.tasks(c)).end == planner.trace(c).end == finish(planner, c)


def test_proposals_for_deep_models_are_near_the_optimum(monkeypatch):
    worst = 1.0
    for seed in range(3):
        planner = Planner(made_up(6, seed), ROWS, 34_000)
        best = simulate(planner.tasks(planner.search())).end
        with monkeypatch.context() as patch:
            patch.setattr(pack_planner, "EXHAUSTIVE", 0)
            proposed = simulate(planner.tasks(planner.search())).end
        worst = max(worst, proposed / best)
    assert worst <= 1.1


def test_greedy_by_hand():
    sizes = [3, 3, 5, 1, 1, 8]

    def size(a, b):
        return sum(sizes[a:b]) if sum(sizes[a:b]) <= 8 else None

    assert greedy_memory(size, 6) == ((0, 2), (2, 5), (5, 6))
    assert greedy_memory(lambda a, b: None, 6) is None
    assert greedy_memory(size, 0) == ()


@pytest.mark.parametrize("count", [3, 4, 5])
def test_balanced_equals_brute_force(count):
    sizes, seconds = [3, 3, 5, 1, 1, 8], [1, 9, 1, 1, 9, 1]

    def size(a, b):
        return sum(sizes[a:b]) if sum(sizes[a:b]) <= 9 else None

    for cost in (size, lambda a, b: sum(seconds[a:b])):
        found = balanced(cost, size, 6, count)
        assert found[0][0] == 0 and found[-1][1] == 6 and len(found) == count
        allowed = [p for p in cuts(6) if len(p) == count and all(size(*x) for x in p)]
        assert max(cost(*p) for p in found) == min(max(cost(*x) for x in p) for p in allowed)


def test_balanced_refuses_what_does_not_fit():
    sizes = [3, 3, 5, 1, 1, 8]
    assert balanced(lambda a, b: b - a, lambda a, b: None if b - a > 2 else 1, 6, 2) is None
    assert balanced(lambda a, b: sum(sizes[a:b]), lambda a, b: 1, 6, 1) == ((0, 6),)


def test_packs_go_round_the_ranks():
    planner = Planner(made_up(4), ROWS, 100_000, "pp", 3)
    c = Configuration(2, ((0, 1), (1, 2)), 1, ((0, 1), (1, 2), (2, 4)))
    assert [(s.kind, s.start, s.rank) for s in planner.steps(c)] == [
        ("F", 0, 0), ("F", 1, 1), ("B", 2, 2), ("B", 1, 0), ("B", 0, 1),
    ]  # fmt: skip
    alone = Planner(made_up(4), ROWS, 100_000, "dp", 3)
    assert {s.rank for s in alone.steps(c)} == {0}


def test_pipeline_overlaps_packs():
    profile = made_up(4)
    c = Configuration(1, ((0, 1), (1, 2), (2, 3)), 1, ((0, 1), (1, 2), (2, 3), (3, 4)))
    one, two = (Planner(profile, ROWS, 100_000, "pp", n).trace(c) for n in (1, 2))
    assert two.end < one.end
    # The second pack's first micro starts once the first pack's is done, not all of them.
    first, second = two.by_name["run", 0, 0], two.by_name["run", 1, 0]
    assert first.end <= second.start < two.by_name["run", 0, 3].start


def test_predicted_bytes_are_the_packs():
    planner = Planner(made_up(4), ROWS, 100_000)
    c = Configuration(2, ((0, 2),), 2, ((0, 2), (2, 4)))
    trace, sizes = planner.trace(c), [layer.parameter_bytes for layer in planner.profile.layers]
    # The last pack's backward, beside the parameters of the pack that follows it.
    by_hand = 2 * sum(sizes[2:]) + sum(sizes[:2]) + (2 * 30 + 200) + 2 * 8
    assert trace.peak(0, "device") + 64 == by_hand + 64
    assert trace.bytes(0, "device")[-1][1] == 0
    assert planner.weight_traffic(c) == 2 * sum(sizes) + sum(sizes[:2])
    assert Planner(made_up(4), ROWS, 100_000, "dp", 3).weight_traffic(c) == 3 * (
        2 * sum(sizes) + sum(sizes[:2])
    )


def test_random_layers_keep_one_micro_size():
    planner = Planner(made_up(3, noisy=True), ROWS, 100_000)
    c = Configuration(1, ((0, 2),), 2, ((0, 2), (2, 3)))
    with pytest.raises(UsageError, match=r"layer 0 draws random numbers.*1 forward and 2 backward"):
        planner.check(c)
    assert all(p.micro_forward == p.micro_backward for p in planner.candidates(divisors(ROWS)))


@pytest.mark.parametrize(
    "forward, backward, sizes, message",
    [
        (((0, 2),), ((0, 1), (1, 3)), (1, 1), r"forward packs .* do not cover layers 0 to 1"),
        ((), ((0, 2),), (1, 1), r"backward packs .* do not cover layers 0 to 3"),
        ((), ((0, 0), (0, 3)), (1, 1), "backward packs"),
        ((), ((0, 3),), (1, 3), r"micro size 3 does not divide the 4 rows.*\[1, 2, 4\]"),
        ((), ((0, 3),), (0, 1), "micro size 0"),
    ],
)
def test_malformed_configurations(forward, backward, sizes, message):
    planner = Planner(made_up(3), ROWS, 100_000)
    with pytest.raises(UsageError, match=message):
        planner.check(Configuration(sizes[0], forward, sizes[1], backward))


def test_a_layer_above_the_budget_is_named():
    profile = made_up(3, seed=2)
    largest = max(range(3), key=lambda i: profile.layers[i].parameter_bytes)
    layer = profile.layers[largest]
    # Buffers, parameters and gradients, the layer's own, its input, its output and that one's.
    needed = 64 + 2 * layer.parameter_bytes + 100 + 8 + (16 if largest < 2 else 0)
    with pytest.raises(DoesNotFit, match=f"{layer.name} alone needs .*raise it to {needed}") as no:
        Planner(profile, ROWS, needed - 1).search()
    assert no.value.details["layer"] == layer.name
    Planner(profile, ROWS, needed).search()
    with pytest.raises(DoesNotFit, match="layer 0 to layer 2 alone"):
        Planner(profile, ROWS, needed).check(Configuration(1, (), 1, ((0, 3),)))
