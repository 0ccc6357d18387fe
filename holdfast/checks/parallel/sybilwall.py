"""Twenty peers learn digits, each from few classes; an adversary takes several names to attack."""

from statistics import mean

import torch
from torch import Tensor

from holdfast.checks import Result, check
from holdfast.parallel.decentral import (
    Attack,
    Backdoor,
    Data,
    LabelFlip,
    Outcome,
    dirichlet_shards,
    random_graph,
    simulate,
)
from holdfast.parallel.sybilwall import FoolsGold, Krum, Mean, Median, SybilWall

PEERS, DEGREE, ALPHA = 20, 5, 0.1
SYBILS = (1, 3, 9)
ROUNDS, STEPS, SEEDS = 30, 20, 4
TEST = 450


def world(seed: int) -> tuple[Tensor, Data]:
    """A random graph, and digits dealt out to its peers and an adversary."""
    from sklearn.datasets import load_digits

    x, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
    x = x.float() / 16
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    test, train = order[:TEST], order[TEST:]
    shards = dirichlet_shards(y[train], PEERS + 1, ALPHA, seed)
    data = Data(x[train], y[train], x[test], y[test], shards)
    return random_graph(PEERS, DEGREE, seed), data


@check(
    "sybilwall",
    claim="an adversary free to choose its number of Sybils flips labels half as often or less",
)
def run(seed: int) -> Result:
    worlds = [(s, *world(s)) for s in range(seed * SEEDS, (seed + 1) * SEEDS)]

    def runs(aggregator, attack: Attack | None = None) -> list[Outcome]:
        return [
            simulate(graph, data, aggregator, attack, rounds=ROUNDS, steps=STEPS, seed=s)
            for s, graph, data in worlds
        ]

    def accuracy(outcomes: list[Outcome]) -> float:
        return mean(outcome.accuracy for outcome in outcomes)

    def success(outcomes: list[Outcome]) -> float:
        return mean(outcome.success for outcome in outcomes)

    wall = SybilWall()
    peaceful = runs(wall)
    ours = {n: runs(wall, LabelFlip(n)) for n in SYBILS}
    measured = {
        "accuracy without attack": accuracy(peaceful),
        "worst success": max(success(found) for found in ours.values()),
        **{f"success of {n}": success(found) for n, found in ours.items()},
        **{f"accuracy under {n}": accuracy(found) for n, found in ours.items()},
        "worst success, 5 records": max(
            success(runs(SybilWall(max_records=5), LabelFlip(n))) for n in SYBILS
        ),
        "backdoor success of 9": success(runs(wall, Backdoor(9))),
        "bytes of a peer": max(o.ledger.peak(rank=i) for o in peaceful for i in range(PEERS)),
    }
    plain = {n: runs(Mean(), LabelFlip(n)) for n in SYBILS}
    unharmed = accuracy(runs(Mean()))
    baseline = {
        "accuracy without attack": unharmed,
        "worst success": max(success(found) for found in plain.values()),
        **{f"success of {n}": success(found) for n, found in plain.items()},
        "backdoor success of 9": success(runs(Mean(), Backdoor(9))),
    }
    for name, other in (("median", Median()), ("krum", Krum()), ("foolsgold", FoolsGold())):
        baseline[f"worst success, {name}"] = max(success(runs(other, LabelFlip(n))) for n in SYBILS)
        baseline[f"accuracy without attack, {name}"] = accuracy(runs(other))
    passed = (
        baseline["worst success"] >= 0.5
        and measured["worst success"] <= 0.5 * baseline["worst success"]
        and measured["success of 9"] <= measured["success of 1"]
        and all(measured[f"success of {n}"] <= 0.5 * baseline[f"success of {n}"] for n in (3, 9))
        and measured["accuracy without attack"] >= unharmed - 0.05
        and measured["accuracy under 9"] >= unharmed - 0.05
    )
    return Result(
        measured,
        baseline,
        "success at the adversary's best number of Sybils, and of 3 and 9, <= 0.5 x plain "
        "averaging, which is >= 0.5 at its worst; 9 Sybils no better than 1; accuracy without an "
        "attack and under 9 within 0.05 of averaging without an attack",
        passed,
    )
