"""The whole search against trying everything, and the promises that a plan makes."""

import itertools

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, MixtralConfig

from holdfast.budget import Budget
from holdfast.errors import DoesNotFit, HoldfastError, UsageError
from holdfast.ledger import Ledger
from holdfast.meter import Meter
from holdfast.plan.fit import fit
from holdfast.plan.fitter import Candidate, Fitter
from holdfast.plan.models import resolve
from holdfast.plan.search import every
from holdfast.plan.skeletons import Request

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
)


@pytest.fixture(scope="module")
def fitter():
    request = Request(
        CONFIG,
        Budget.parse("1GiB"),
        task="pretrain",
        batch=2,
        sequence=32,
        allow="lossy",
        hardware="cpu-2core",
    )
    return Fitter(request)


@pytest.fixture(scope="module")
def everything(fitter):
    """(order of preference, peak) of every plan: all skeletons times all choices per block."""
    found = []
    for skeleton in fitter.skeletons():
        _, problem = fitter.problem(skeleton)
        for choice in every(problem.blocks, problem.options):
            peak, seconds = problem.peak(choice), problem.seconds(choice)
            quality = skeleton.quality
            found.append(((quality.rank, round(quality.estimate, 6), seconds), peak))
    assert 100 < len(found) <= 10_000
    return found


def _orders(found: Candidate):
    return found.order[:3]


@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.2, 0.4, 0.7, 1.0])
def test_search_equals_brute_force(fitter, everything, fraction):
    peaks = sorted(peak for _, peak in everything)
    room = peaks[0] + int((peaks[-1] - peaks[0]) * fraction)
    best = fitter.search(Budget(device=room + fitter.reserve))
    order = min(order for order, peak in everything if peak <= room)
    assert best is not None and best.peak <= room
    assert best.order[:2] == order[:2] and best.seconds == pytest.approx(order[2], rel=1e-9)


def test_nothing_fits_below_the_smallest(fitter, everything):
    smallest = min(peak for _, peak in everything)
    assert fitter.smallest().peak == pytest.approx(smallest, rel=2e-3)
    assert fitter.search(Budget(device=smallest + fitter.reserve - 1)) is None


def test_more_budget_is_never_slower_and_never_worse(fitter, everything):
    peaks = sorted(peak for _, peak in everything)
    found = [fitter.search(Budget(device=p + fitter.reserve)) for p in peaks[:: len(peaks) // 8]]
    for less, more in itertools.pairwise(found):
        assert more.order[:3] <= less.order[:3]


def test_never_slower_than_recomputing_everything(fitter):
    for skeleton in fitter.skeletons("exact"):
        composer, problem = fitter.problem(skeleton)
        recomputed = composer.uniform("recompute")
        room = problem.peak(recomputed)
        best = fitter.search(Budget(device=room + fitter.reserve))
        assert best.seconds <= problem.seconds(recomputed) * (1 + 1e-9)


def test_fit_gives_a_plan_with_its_prediction():
    plan = fit(CONFIG, "64MiB", task="pretrain", sequence=32, hardware="cpu-2core")
    assert isinstance(plan.predicted, Ledger)
    assert plan.predicted.peak("device") == plan.spec.predicted["peak_bytes"] <= 64 * 2**20
    assert plan.alternatives and plan.binding["category"] in plan.predicted.at_peak("device")
    assert "total" in plan.table()


def test_fit_that_cannot_says_how(fitter):
    with pytest.raises(DoesNotFit, match="Smallest budget that fits: --budget") as error:
        fit(CONFIG, "64KiB", task="pretrain", sequence=32, hardware="cpu-2core")
    assert len(error.value.details["relaxations"]) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "serve"}, "task 'serve' is unknown; use one of finetune, pretrain"),
        ({"allow": "anything"}, "allow 'anything' is unknown"),
        ({"batch": 0}, "batch 0 is not a positive integer"),
        ({"optimizer": "adam4"}, "unknown optimizer method 'adam4'; nearest known: .*adamw4"),
        ({"hardware": "cray-1"}, "unknown hardware 'cray-1'"),
    ],
)
def test_bad_requests(options, message):
    with pytest.raises(UsageError, match=message):
        fit(CONFIG, "64MiB", **{"hardware": "cpu-2core", **options})


def test_experts_are_predicted_to_the_byte():
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
    )
    options = {"sequence": 32, "hardware": "cpu-2core", "optimizer": "adamw", "tune": "full"}
    plan = fit(config, "1GiB", **options)
    source = resolve(config)
    model, optimizer = plan.apply(source.build("cpu"))
    batch = source.example_inputs(1, 32, "cpu")
    for _ in range(2):
        with Meter(model, optimizer, inputs=batch) as meter:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert meter.peak == plan.predicted.peak("device")


class AsksItsData(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 1)

    def forward(self, x):
        return self.linear(x).mean() * float(x.sum())

    def example_inputs(self, batch, sequence, device):
        return {"x": torch.ones(batch, 4, device=device)}


def test_a_model_that_cannot_be_traced_says_why():
    with pytest.raises(HoldfastError, match=r"AsksItsData in float32 cannot be traced \(.*Meter"):
        fit(AsksItsData(), "1GiB", task="pretrain", hardware="cpu-2core")


def test_named_methods_are_used_and_no_others():
    plan = fit(
        CONFIG, "1GiB", sequence=16, methods=("lora", "int4", "adamw4"), hardware="cpu-2core"
    )
    used = plan.spec.methods
    assert [next(iter(c)) for c in (used.weights, used.adapter, used.optimizer)] == [
        "int4",
        "lora",
        "adamw4",
    ]
    assert used.saved == []


@pytest.mark.parametrize(
    ("named", "message"),
    [(("lorra",), "lora"), (("lora", "randlora"), "both write the extent of parameters")],
)
def test_named_methods_that_cannot_be_used_are_refused(named, message):
    with pytest.raises(UsageError, match=message):
        fit(CONFIG, "1GiB", sequence=16, methods=named, hardware="cpu-2core")


@pytest.mark.parametrize("depth", [3, 5, 7])
def test_of_equally_fast_plans_the_plainer_one_is_taken(depth):
    # The same times, summed in another order where updates run in backward.
    config = LlamaConfig(**{**CONFIG.to_dict(), "num_hidden_layers": depth})
    options = {"task": "pretrain", "sequence": 32, "allow": "exact", "dtype": "float32"}
    plan = fit(config, "1GiB", hardware="cpu-2core", **options)
    assert plan.spec.methods.gradients == "step"
    assert set(plan.spec.methods.blocks.values()) == {f"keep*{depth}"}
