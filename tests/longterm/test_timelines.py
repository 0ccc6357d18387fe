import random

import pytest

from holdfast.longterm.memory import Memory
from holdfast.longterm.records import Add, Link
from holdfast.longterm.retrieval import kg
from holdfast.longterm.retrieval.embed import Hash
from holdfast.longterm.timelines import Timelines
from tests.longterm.conftest import Clock


@pytest.fixture
def memory():
    with Memory(":memory:", embedder=Hash(16), clock=Clock()) as made:
        yield made


def linked(memory, count, edges):
    """Events, with edges between them by number."""
    events = [Add(f"event {number}", searchable=False) for number in range(count)]
    links = [Link(events[a], "Cause", events[b]) for a, b in edges]
    return memory.transact(lambda view: [*events, *links])[:count]


@pytest.mark.parametrize("seed", range(20))
def test_parts_are_what_a_whole_graph_says(memory, seed):
    draw = random.Random(seed)
    pairs = {tuple(sorted(draw.sample(range(30), 2))) for _ in range(draw.randrange(40))}
    names = linked(memory, 30, sorted(pairs))
    graph = kg.graph_of([(names[a], names[b]) for a, b in pairs], names)
    asked = draw.sample(names, 6)
    want = []
    for name in asked:
        whole = kg.reach(graph, [name], 30).keys()
        if not any(name in part for part in want):
            want.append({one for one in asked if one in whole})
    with memory.reading() as view:
        lines = Timelines(view)
        assert lines.parts(asked) == want
        lines.add(asked[0], "React", asked[-1])  # one that is not stored yet
        assert any({asked[0], asked[-1]} <= part for part in lines.parts(asked))


def test_of_two_timelines_the_short_one_is_read(memory, fetched):
    names = linked(memory, 1000, [(i, i + 1) for i in range(999) if i != 10])

    def parts(*numbers):
        with memory.reading() as view:
            return Timelines(view).parts([names[i] for i in numbers])

    assert parts(500, 3) == [{names[500]}, {names[3]}]
    assert fetched.of(lambda: parts(500, 3)) < 100
    assert parts(500, 520) == [{names[500], names[520]}]
    assert fetched.of(lambda: parts(500, 520)) < 150
