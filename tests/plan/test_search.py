"""The search equals trying everything, and what it answers is true of the real model."""

import itertools
import random

import pytest
import torch

from holdfast.budget import Budget
from holdfast.meter import Meter
from holdfast.places import DiskArena
from holdfast.plan import apply
from holdfast.plan.compose import Composer, Family, Life
from holdfast.plan.family import UpdateCosts, trace_family
from holdfast.plan.file import Methods, format_runs
from holdfast.plan.models import loss_of, resolve
from holdfast.plan.search import Problem, every, fastest_ref, smallest_ref

ROOM = 2**40
DEPTH, BATCH, SEQUENCE = 5, 2, 64
LLAMA = {
    "model_type": "llama", "vocab_size": 128, "hidden_size": 64, "intermediate_size": 176,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": DEPTH,
}  # fmt: skip
T5 = {
    "model_type": "t5", "vocab_size": 128, "d_model": 64, "d_kv": 16, "d_ff": 176, "num_heads": 4,
    "num_layers": 3, "num_decoder_layers": 3, "dropout_rate": 0.0, "pad_token_id": 0,
    "decoder_start_token_id": 0,
}  # fmt: skip
COPY_SECONDS = 1e-8  # per byte


def seconds(flops: int, moved: int, dtype: torch.dtype) -> float:
    return flops / 1e10 + moved / 1e9


def trace(fields: dict, options: list[str]) -> Family:
    source = resolve(fields)

    def option(name):
        def to_block(block):
            arena = DiskArena(ROOM) if name == "disk" else None
            apply.set_option(block, name, arena)
            return arena

        return to_block

    family = trace_family(
        source.build,
        lambda: source.example_inputs(BATCH, SEQUENCE, "cpu"),
        lambda model: model,
        lambda model, batch: loss_of(model(**batch)),
        {name: option(name) for name in options},
        seconds,
    )
    for place, moved in family.moved.items():
        family.extra_seconds[place] = {b: 2 * n * COPY_SECONDS for b, n in moved.items()}
    return family


def problem_of(family: Family, life: Life, methods: Methods | None = None) -> Problem:
    methods = methods or Methods()

    def make(parameters):
        named = [(str(i), p) for i, p in enumerate(parameters)]
        return apply.make_optimizer(named, methods, 1e-3, 0.0)

    composer = Composer(family, life, UpdateCosts(make, seconds))
    return Problem(composer, list(family.options))


@pytest.fixture(scope="module")
def llama():
    return trace(LLAMA, ["keep", "recompute", "disk"])


@pytest.fixture(scope="module")
def t5():
    return trace(T5, ["keep", "recompute"])


LIVES = {"step": Life(False, 1), "accumulate": Life(False, 3), "backward": Life(True, 1)}


@pytest.fixture(scope="module", params=["llama-step", "llama-accumulate", "t5-backward"])
def problem(request):
    model, _, life = request.param.partition("-")
    return problem_of(request.getfixturevalue(model), LIVES[life])


def budgets(problem: Problem) -> list[Budget]:
    """From one byte less than nothing fits to all that keeping needs, and little disk."""
    disk = sum(int(sizes.max(1).sum()) for sizes in problem.moved.values())
    low = smallest_ref(problem, Budget(device=1, disk=disk))
    least = problem.peak(low.choice)
    most = problem.peak(problem.composer.uniform("keep"))
    sizes = [least - 1, least, *(least + (most - least) * i // 5 for i in range(1, 6))]
    return [Budget(device=size, disk=d) for size in sizes for d in (disk, disk // 3, 0)]


def test_rows_are_the_composed_ledger(problem):
    rng = random.Random(0)
    choices = list(every(problem.blocks, problem.options))
    for choice in rng.sample(choices, 20):
        ledger = problem.composer.ledger(choice)
        assert problem.peak(choice) == ledger.peak()
        assert problem.seconds(choice) == pytest.approx(problem.composer.seconds(choice))
        for place in problem.moved:
            assert problem.moved_bytes(choice, place) == ledger.peak(place)


def test_fastest_equals_trying_everything(problem):
    for budget in budgets(problem):
        want, got = fastest_ref(problem, budget), problem.fastest(budget)
        assert (got is None) == (want is None), budget
        if got is not None:
            assert problem.fits(got.choice, budget)
            assert got.seconds == pytest.approx(want.seconds, rel=2e-3)
            assert got.seconds == pytest.approx(problem.seconds(got.choice))
            assert got.seconds >= problem.least_seconds() - 1e-12


def test_smallest_equals_trying_everything(problem):
    for disk in (0, 50_000, 10**9):
        budget = Budget(device=1, disk=disk)
        want, got = smallest_ref(problem, budget), problem.smallest(budget)
        assert problem.fits(got.choice, Budget(device=ROOM, disk=disk))
        assert problem.peak(got.choice) == pytest.approx(problem.peak(want.choice), rel=2e-3)
        # What is answered can be asked for.
        assert problem.fastest(Budget(device=problem.peak(got.choice), disk=disk)) is not None


def test_more_budget_is_never_slower(problem):
    disk = 10**9
    least = problem.peak(problem.smallest(Budget(device=1, disk=disk)).choice)
    most = problem.peak(problem.composer.uniform("keep"))
    times = [
        problem.fastest(Budget(device=least + (most - least) * i // 12, disk=disk)).seconds
        for i in range(13)
    ]
    for slower, faster in itertools.pairwise(times):
        assert faster <= slower * (1 + 1e-5)
    assert times[-1] == problem.seconds(problem.composer.uniform("keep")) < times[0]


def test_never_slower_than_recomputing_everything(problem):
    recompute = problem.composer.uniform("recompute")
    found = problem.fastest(Budget(device=problem.peak(recompute)))
    assert found.seconds <= problem.seconds(recompute) * (1 + 1e-5)


def test_what_does_not_fit_is_none(problem):
    assert problem.fastest(Budget(device=1)) is None
    assert fastest_ref(problem, Budget(device=1)) is None


def test_a_model_without_stacks():
    source = resolve(torch.nn.Linear(4, 4))
    family = trace_family(
        source.build,
        lambda: {"input": torch.ones(3, 4)},
        lambda model: model,
        lambda model, batch: model(**batch).sum(),
        {"keep": lambda block: None},
        seconds,
    )
    problem = problem_of(family, LIVES["step"])
    peak = problem.smallest(Budget(device=1)).choice
    assert peak == {} and problem.blocks == []
    need = problem.composer.ledger({}).peak()
    assert problem.fastest(Budget(device=need)).choice == {}
    assert problem.fastest(Budget(device=need - 1)) is None


@pytest.mark.parametrize("seed", range(4))
def test_the_measured_peak_is_within_the_budget(seed, llama, t5):
    rng = random.Random(seed)
    fields, family = rng.choice([(LLAMA, llama), (T5, t5)])
    methods = Methods(gradients=rng.choice(["step", "backward"]))
    problem = problem_of(family, Life(methods.gradients == "backward", 1))
    least = problem.peak(problem.smallest(Budget(device=1, disk=10**9)).choice)
    most = problem.peak(problem.composer.uniform("keep"))
    budget = Budget(device=rng.randint(least, most), disk=10**9)
    choice = problem.fastest(budget).choice

    source = resolve(fields)
    model, disk = source.build("cpu"), DiskArena(budget.disk)
    stacks = dict.fromkeys(path for path, _ in problem.blocks)
    runs = {s: format_runs([o for (p, _), o in choice.items() if p == s]) for s in stacks}
    apply.set_blocks(model, runs, {"disk": disk})
    optimizer = apply.make_optimizer(list(model.named_parameters()), methods, 1e-3, 0.0)
    batch = source.example_inputs(BATCH, SEQUENCE, "cpu")

    def step():
        loss_of(model(**batch)).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    with Meter(model, optimizer, inputs=batch) as meter:
        step()
    assert meter.peak <= budget.device
    assert problem.peak(choice) == pytest.approx(meter.peak, rel=0.01)
    assert disk.peak_bytes == sum(problem.moved_bytes(choice, place) for place in problem.moved)
