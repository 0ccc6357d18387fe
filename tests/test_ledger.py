"""A ledger's columns sum to its peaks, and peaks are never added across phases."""

import json
import random

import pytest

from holdfast.budget import PLACES
from holdfast.ledger import CATEGORIES, PHASES, Ledger


def random_ledger(seed: int) -> Ledger:
    rng = random.Random(seed)
    ledger = Ledger()
    for _ in range(30):
        key = (rng.randrange(2), rng.choice(PLACES), rng.choice(CATEGORIES), rng.choice(PHASES))
        ledger[key] = rng.randrange(2**40)
    return ledger


def test_peak_by_hand():
    ledger = Ledger()
    ledger.put("device", "forward", {"parameters": 100, "activations": 30})
    ledger.put("device", "backward", {"parameters": 100, "gradients": 50, "temporary": 7})
    ledger.put("device", "step", {"parameters": 100, "gradients": 40})
    ledger.put("host", "forward", {"activations": 9})
    assert ledger.phase_peaks() == {"forward": 130, "backward": 157, "step": 140}
    assert ledger.peak() == 157 and ledger.peak_phase() == "backward"
    assert ledger.at_peak()["gradients"] == 50 and ledger.at_peak()["activations"] == 0
    assert ledger.peak("host") == 9 and ledger.peak("disk") == 0
    assert ledger.peak(rank=1) == 0
    assert repr(ledger) == "Ledger(device 157 B in backward, host 9 B in forward)"


@pytest.mark.parametrize("seed", range(10))
def test_properties(seed):
    ledger, other = random_ledger(seed), random_ledger(seed + 100)
    for rank in (0, 1):
        for place in PLACES:
            peaks = ledger.phase_peaks(place, rank=rank)
            for phase in ledger.phases(rank=rank):
                assert sum(ledger.column(place, phase, rank=rank).values()) == peaks[phase]
            assert ledger.peak(place, rank=rank) == max(peaks.values(), default=0)
            assert sum(ledger.at_peak(place, rank=rank).values()) == ledger.peak(place, rank=rank)
    difference = ledger - other
    for key in {*ledger, *other}:
        assert difference[key] == ledger[key] - other[key]
    assert ledger - ledger == Ledger()
    assert ledger - Ledger() == ledger


@pytest.mark.parametrize("seed", range(3))
def test_json_round_trip(seed):
    ledger = random_ledger(seed)
    rows = json.loads(json.dumps(ledger.to_json()))
    assert Ledger.from_json(rows) == ledger
    shuffled = Ledger(dict(reversed(list(ledger.items()))))
    assert shuffled.to_json() == ledger.to_json(), "order does not depend on insertion"


def test_empty_cells_are_zero_and_are_not_kept():
    key = (0, "device", "cache", "decode")
    ledger = Ledger({key: 5})
    ledger[key] = 0
    assert ledger[key] == 0 and list(ledger) == [] and ledger == Ledger()
    assert ledger.peak() == 0 and ledger.phases() == [] and repr(ledger) == "Ledger(empty)"


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ((0, "gpu", "cache", "decode"), "unknown place 'gpu'; known: device, host, disk"),
        ((0, "device", "weights", "decode"), "unknown category 'weights'; known: parameters"),
        ((0, "device", "cache", "training"), "unknown phase 'training'; known: forward"),
        ((-1, "device", "cache", "decode"), "rank -1 is not a non-negative integer"),
    ],
)
def test_unknown_cells_list_the_known(key, message):
    with pytest.raises(KeyError, match=message):
        Ledger({key: 1})
    with pytest.raises(KeyError, match=message):
        Ledger()[key]


@pytest.mark.parametrize("value", [1.0, True, "1"])
def test_bytes_are_integers(value):
    with pytest.raises(TypeError, match="must be an integer number of bytes"):
        Ledger({(0, "device", "cache", "decode"): value})


def test_never_equal_to_something_else():
    assert Ledger() != {}
