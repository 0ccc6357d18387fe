"""Turns are encoded together where that changes nothing of what each of them sees."""

import random

import pytest

from holdfast.longterm.retrieval.embed import AFTER, BEFORE
from holdfast.longterm.work import _by_run


def turns_of(texts):
    """What each turn of a session sees: (texts around it, its place among them)."""
    return [
        (tuple(texts[max(0, i - BEFORE) : i + AFTER + 1]), min(i, BEFORE))
        for i in range(len(texts))
    ]


def test_a_session_is_one_run():
    texts = [f"turn {i}" for i in range(9)]
    ((found, places),) = _by_run(turns_of(texts))
    assert found == texts and [place for place, _ in places] == list(range(9))


def test_facts_without_a_session_see_nothing_of_each_other():
    facts = [((f"fact {i}",), 0) for i in range(4)]
    assert [texts for texts, _ in _by_run(facts)] == [[f"fact {i}"] for i in range(4)]


@pytest.mark.parametrize("seed", range(50))
def test_within_its_run_a_turn_has_the_neighbours_it_was_given(seed):
    rng = random.Random(seed)
    turns = []
    for _ in range(6):
        # Few different texts, so that one session ends as another begins.
        session = turns_of([rng.choice("ab") for _ in range(rng.randint(1, 6))])
        turns += session[rng.randint(0, 2) :]
    seen = []
    for texts, places in _by_run(turns):
        for place, turn in places:
            seen.append(turn)
            first = max(0, place - BEFORE)
            assert (tuple(texts[first : place + AFTER + 1]), place - first) == turn
    assert seen == turns
