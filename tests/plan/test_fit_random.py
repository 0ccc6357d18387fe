"""Plans of random models for random budgets keep their promises when they are applied and run."""

import pytest

from holdfast.checks.core import fit as check
from holdfast.errors import UsageError
from holdfast.plan.fit import fit

CASES = list(check.draw(28, len(check.FAMILIES)))
SMALL = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64,
    "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2,
}  # fmt: skip


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.model["model_type"])
def case(request):
    return request.param


def test_two_steps_stay_within_the_budget(case):
    budget = case.budget(case.fraction)
    outcome = check.measure(case.plan(budget, case.search(budget)), case.model)
    assert outcome.logical <= outcome.budget and outcome.allocator <= outcome.budget
    assert outcome.inexact == ()
    assert outcome.error <= 0.1


def test_more_budget_is_never_worse(case):
    assert check.worse_with_more(case) == 0


def test_the_smallest_budget_is_the_smallest(case):
    low, _ = case.ends
    assert case.search(low).peak + case.fitter.reserve <= low
    assert case.fitter.search(case.within(int(low * 0.99))) is None


def test_never_slower_than_recomputing_everything_in_equal_bytes():
    case = check.TIMED["llama"]
    theirs = check.recomputed(case)
    ours = case.search(theirs.peak + case.fitter.reserve)
    assert ours.peak <= theirs.peak and ours.seconds < theirs.seconds


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "llamba"}, "unknown model_type 'llamba'; nearest known: .*llama"),
        ({"hidden_size": -64}, "cannot be built from its config"),
        ({"vocab_size": -1}, "cannot be built from its config"),
        ({"num_hidden_layers": -2}, "num_hidden_layers -2 of llama config is negative"),
    ],
)
def test_bad_architectures(fields, message):
    with pytest.raises(UsageError, match=message):
        fit(SMALL | fields, "1GiB", task="pretrain", sequence=16, hardware=check.HARDWARE)


@pytest.mark.parametrize("budget", [-5, "-1GiB", 0])
def test_bad_budgets(budget):
    with pytest.raises(UsageError, match=f"{budget}"):
        fit(SMALL, budget, sequence=16, hardware=check.HARDWARE)


def test_a_negative_reserve():
    with pytest.raises(UsageError, match="reserve -1 is negative; use 0 bytes or more"):
        fit(SMALL, "1GiB", sequence=16, reserve=-1, hardware=check.HARDWARE)
