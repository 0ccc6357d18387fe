import itertools
import random
from datetime import UTC, datetime, timedelta

import pytest

from holdfast.longterm.retrieval.kg import (
    EARLIEST,
    LATEST,
    Span,
    communities,
    fuse,
    graph_of,
    overlap,
    reach,
    settle,
)

DAY = [datetime(2024, 1, 1, tzinfo=UTC) + timedelta(days=i) for i in range(10)]


def test_a_graph_counts_edges_both_ways():
    graph = graph_of([("a", "b"), ("b", "a"), ("b", "c"), ("c", "c")], nodes=["d"])
    assert {n: dict(near) for n, near in graph.items()} == {
        "a": {"b": 2}, "b": {"a": 2, "c": 1}, "c": {"b": 1}, "d": {}
    }  # fmt: skip


def test_communities_of_two_nodes_joined_twice_end():
    assert communities(graph_of([("a", "b"), ("a", "b")])) == {"a": "a", "b": "a"}


@pytest.mark.parametrize("seed", range(5))
def test_communities_of_cliques(seed):
    cliques = [[f"{c}{i}" for i in range(6)] for c in "xyz"]
    edges = [pair for clique in cliques for pair in itertools.combinations(clique, 2)]
    found = communities(graph_of([*edges, ("x0", "y0"), ("y1", "z1")]), seed=seed)
    assert found == {node: clique[0] for clique in cliques for node in clique}


def test_communities_stop_after_their_rounds():
    edges = [(str(i), str((i + 1) % 50)) for i in range(50)]
    assert len(set(communities(graph_of(edges), rounds=1).values())) > 1
    assert communities({}) == {}


def test_reach_counts_edges():
    graph = graph_of([("a", "b"), ("b", "c"), ("c", "d"), ("x", "y")])
    assert reach(graph, ["a", "nowhere"], 2) == {"a": 0, "b": 1, "c": 2}
    assert reach(graph, ["a", "d"], 1) == {"a": 0, "d": 0, "b": 1, "c": 1}


def test_fused_ranks_by_hand():
    assert fuse([["a", "b"], ["b"]], k=1) == pytest.approx({"a": 1 / 2, "b": 1 / 3 + 1 / 2})


def test_settle_equals_a_cut_at_the_next_beginning():
    draw = random.Random(0)
    for _ in range(500):
        first, second = (
            Span(DAY[draw.randrange(9)], draw.choice([None, *DAY]), DAY[said]) for said in (0, 1)
        )
        if any(s.end is not None and s.end <= s.start for s in (first, second)):
            continue
        both = sorted([first, second], key=lambda s: (s.start, s.said))
        end = min(both[0].end or LATEST, both[1].start)
        want = {(both[0].start, end), (both[1].start, both[1].end)}
        for known, new in ((first, second), (second, first)):
            got = {(s.start, s.end) for s in settle(known, new)}
            if overlap(first, second):
                assert got == want
            else:
                assert got == {(first.start, first.end), (second.start, second.end)}


def test_unknown_beginnings_do_not_exclude_one_another():
    used_to = [Span(None, DAY[3], DAY[4]), Span(None, DAY[2], DAY[5])]
    assert settle(*used_to) == tuple(used_to)
    past, present = settle(used_to[0], Span(DAY[1], None, DAY[4]))
    assert (past.end, present.end) == (DAY[1], None)
    assert EARLIEST < DAY[0] < LATEST
