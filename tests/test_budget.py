"""A budget is a cap for each place; what is not named is 0."""

import dataclasses

import pytest

from holdfast.budget import Budget
from holdfast.errors import UsageError


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("24GiB", Budget(device=24 * 2**30)),
        (1024, Budget(device=1024)),
        ("device=1KiB", Budget(device=1024)),
        ("disk=2KB, device=1KB,host=3KB", Budget(device=1000, host=3000, disk=2000)),
        (Budget(device=5, host=6), Budget(device=5, host=6)),
    ],
)
def test_parse(text, budget):
    assert Budget.parse(text) == budget


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gpu=24GiB", "unknown place 'gpu'; expected for example device=24GiB,host=64GiB"),
        ("device=1GiB,device=2GiB", "repeated place 'device'"),
        ("device=1GiB,", "unknown place ''"),
        ("device=lots", "size 'lots' is malformed"),
        ("host=1GiB", "budget 'host=1GiB' leaves no device bytes; name for example 24GiB"),
        ("0", "leaves no device bytes"),
        (0, "leaves no device bytes"),
        (-5, "size -5 is negative"),
    ],
)
def test_bad_budgets_name_the_remedy(text, message):
    with pytest.raises(UsageError, match=message):
        Budget.parse(text)


@pytest.mark.parametrize("value", [-1, 1.5, True, "24GiB"])
def test_caps_are_integers(value):
    with pytest.raises(UsageError, match=r"budget host=.* use Budget.parse\('host=24GiB'\)"):
        Budget(device=1, host=value)


def test_prints_only_what_is_there():
    assert str(Budget(device=2**30, disk=2**20)) == "device 1.00 GiB, disk 1.00 MiB"


def test_is_a_value():
    budget = Budget(device=1)
    assert budget == Budget(device=1) and hash(budget) == hash(Budget(device=1))
    with pytest.raises(dataclasses.FrozenInstanceError):
        budget.device = 2
