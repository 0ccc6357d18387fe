import json
import random
from datetime import UTC, datetime

import pytest

from holdfast.errors import UsageError
from holdfast.longterm.ground import NOT_IN_MEMORY
from holdfast.longterm.language.llm import FallbackWarning, LLMError, Scripted
from holdfast.longterm.memory import Memory
from holdfast.longterm.policies.plan_on_graph import PlanOnGraph, TripleGraph
from holdfast.longterm.policies.retllm import TripletMemory
from holdfast.longterm.retrieval.embed import Hash
from tests.longterm.conftest import START

TRIPLES = [
    ("Ann", "works_at", "Acme"),
    ("Ann", "likes", "tea"),
    ("Ben", "works_at", "Acme"),
    ("Ben", "works_at", "Globex"),
    ("Acme", "located_in", "Boston"),
    ("Globex", "located_in", "Denver"),
    ("Boston", "capital_of", "Massachusetts"),
    ("Denver", "capital_of", "Colorado"),
]
GRAPH = TripleGraph(TRIPLES)


def judge(**replies):
    """A model that answers each kind of question by a function of what it is given."""
    kinds = ("relations", "entities", "reached", "paths", "topic")

    def reply(messages, schema):
        given = json.loads(messages[-1]["content"])
        kind = next((k for k in kinds if k in given), "guess")
        default = {
            "relations": {"chosen": [one["number"] for one in given.get("relations", [])]},
            "entities": {"chosen": [one["number"] for one in given.get("entities", [])]},
            "reached": {"chosen": []},
            "paths": {"known": [], "sufficient": False, "answer": []},
            "topic": {"objectives": ["find it"]},
            "guess": {"answer": ["nobody"]},
        }[kind]
        return replies[kind](given) if kind in replies else default

    return Scripted(reply)


def picks(*relations):
    def chosen(given):
        return {"chosen": [r["number"] for r in given["relations"] if r["relation"] in relations]}

    return chosen


def enough(given):
    ends = [path[-1][2] for path in given["paths"] if len(path) == 2]
    return {"known": ends, "sufficient": bool(ends), "answer": ends}


def check_paths(answer, topic, triples=TRIPLES):
    for path in answer.paths:
        at = topic
        for hop in path:
            assert (hop.head, hop.relation, hop.tail) in triples
            assert at == (hop.head if hop.out else hop.tail)
            at = hop.end


def test_rules_follow_the_objectives_in_turn():
    pog = PlanOnGraph(GRAPH)
    for question, topic, text in (
        ("What is the location of the work of Ann?", "Ann", "Boston"),
        ("Ann's work's location's capital?", "Ann", "Massachusetts"),
        ("Which place is the capital of Denver?", "Denver", "Colorado"),
    ):
        answer = pog.answer(question, topic)
        assert (answer.text, answer.sufficient, answer.calls) == (text, True, 0)
        assert answer.paths and answer == pog.answer(question, topic)
        check_paths(answer, topic)
    nothing = pog.answer("What is the location of the work of tea?", "tea")
    assert nothing.text == NOT_IN_MEMORY and not nothing.sufficient


def test_a_wrong_step_is_corrected_by_going_back():
    tries = []

    def first_wrong(given):
        tries.append(given["entity"])
        right = "works_at" if given["entity"] == "Ann" else "located_in"
        return picks("likes" if len(tries) == 1 else right)(given)

    def back_to_the_topic(given):
        assert given["reached"][0] == {"number": 0, "entity": "Ann", "path": []}
        return {"chosen": [0] if len(given["reached"]) == 2 else []}

    replies = {"relations": first_wrong, "paths": enough}
    answer = PlanOnGraph(GRAPH, judge(**replies, reached=back_to_the_topic)).answer("Where?", "Ann")
    assert answer.text == "Boston" and answer.sufficient and tries == ["Ann", "Ann", "Acme"]
    assert [hop.relation for hop in answer.paths[0]] == ["works_at", "located_in"]
    check_paths(answer, "Ann")
    tries.clear()
    lost = PlanOnGraph(GRAPH, judge(**replies), reversals=0).answer("Where?", "Ann")
    assert not lost.sufficient


@pytest.mark.parametrize("seed", range(8))
def test_limits_hold_whatever_the_judge_says(seed):
    draw = random.Random(seed)
    triples = [(f"n{draw.randrange(40)}", f"r{draw.randrange(4)}", f"n{draw.randrange(40)}")
               for _ in range(300)]  # fmt: skip
    graph = TripleGraph(triples)
    longest = []

    def any_of(name):
        return lambda given: {"chosen": [i for i in range(-1, len(given[name]) + 2)
                                         if draw.random() < 0.5]}  # fmt: skip

    def never(given):
        longest.append(max(map(len, given["paths"]), default=0))
        return {"known": [], "sufficient": draw.random() < 0.05, "answer": ["n1", "n2"]}

    llm = judge(
        **{name: any_of(name) for name in ("relations", "entities", "reached")}, paths=never
    )
    topic = triples[0][0]
    answer = PlanOnGraph(graph, llm, depth=3, calls=25).answer("Where to?", topic)
    assert answer.calls == llm.usage.calls <= 25 and max(longest) <= 3
    assert answer.sufficient or answer.text
    check_paths(answer, topic, triples)


def test_at_most_five_reversals_and_a_flagged_guess():
    llm = judge(relations=picks("likes"), reached=lambda given: {"chosen": [0]})
    answer = PlanOnGraph(GRAPH, llm).answer("Where?", "Ann")
    asked = [json.loads(r[-1]["content"]) for r in llm.requests]
    assert sum("reached" in given for given in asked) == 5
    assert not answer.sufficient and answer.paths == ()
    deep = judge()
    guess = PlanOnGraph(GRAPH, deep, depth=1).answer("Where?", "Ann")
    assert (guess.text, guess.paths, guess.sufficient) == ("nobody", (), False)


def test_too_many_entities_are_cut_to_the_nearest():
    names = [f"thing {i}" for i in range(200)] + ["a red kite"]
    triples = [("Ann", "owns", name) for name in names]
    triples += [(name, "is_a", "object") for name in names]
    shown = []

    def see(given):
        shown.extend(one["entity"] for one in given["entities"])
        return {"chosen": []}

    llm = judge(relations=picks("owns"), entities=see, topic=lambda _: {"objectives": ["red kite"]})
    PlanOnGraph(TripleGraph(triples), llm).answer("Which kite?", "Ann")
    assert len(shown) == 70 and "a red kite" in shown


def test_values_and_single_entities_are_not_chosen_among():
    llm = judge(relations=picks("works_at", "owns"), paths=enough)
    PlanOnGraph(TripleGraph([*TRIPLES, ("Ann", "owns", "7"), ("Ann", "owns", "8")]), llm).answer(
        "What?", "Ann"
    )
    first = [json.loads(r[-1]["content"]) for r in llm.requests if "entities" in r[-1]["content"]]
    assert all(given.get("from") != "Ann" for given in first)


def test_what_a_model_sends_is_read_as_json_only(tmp_path):
    flag = tmp_path / "flag"
    evil = f"__import__('pathlib').Path({str(flag)!r}).touch()"
    llm = Scripted(lambda *_: evil)
    with pytest.warns(FallbackWarning, match="no JSON|not used"):
        answer = PlanOnGraph(GRAPH, llm).answer("What is the location of the work of Ann?", "Ann")
    assert not flag.exists() and not answer.sufficient and answer.calls == llm.usage.calls
    lists = [["Acme"], "['works_at']", LLMError("busy")]
    llm = Scripted(lambda *_: lists[len(llm.requests) % 3])
    with pytest.warns(FallbackWarning):
        assert not PlanOnGraph(GRAPH, llm).answer("Where?", "Ann").sufficient


def test_the_facts_of_a_memory_are_a_graph():
    with Memory(":memory:", embedder=Hash(32), clock=lambda: START) as memory:
        triplets = TripletMemory(memory)
        triplets.write("Ann", "works_at", "Acme", datetime(2010, 1, 1, tzinfo=UTC))
        triplets.write("Ann", "works_at", "Globex", datetime(2015, 1, 1, tzinfo=UTC))
        triplets.write("Globex", "located_in", "Denver")
        graph = TripleGraph.from_store(memory)
        assert graph.neighbours("Ann", "works_at", True) == ["Globex"], "what holds now"
        answer = PlanOnGraph(graph).answer("What is the location of the work of Ann?", "Ann")
        assert answer.text == "Denver"
        with memory.reading() as view:
            assert view.count("relation") == 3


def test_schema_noise_is_never_followed():
    graph = TripleGraph([*TRIPLES, ("Ann", "type", "person"), ("Ben", "type", "person")])
    seen = []

    def see(given):
        seen.extend(one["relation"] for one in given["relations"])
        return {"chosen": []}

    PlanOnGraph(graph, judge(relations=see), noise=["type"]).answer("Who?", "Ann")
    assert seen == ["works_at", "likes"]


def test_what_it_refuses():
    pog = PlanOnGraph(GRAPH)
    with pytest.raises(UsageError, match="unknown topic entity 'Anna'; nearest known: Ann"):
        pog.answer("Where?", "Anna")
    with pytest.raises(UsageError, match="the question is empty"):
        pog.answer(" ", "Ann")
    with pytest.raises(UsageError, match="calls=2 at least 3"):
        PlanOnGraph(GRAPH, calls=2)
    with pytest.raises(UsageError, match="depth=0 and width=70 must be at least 1"):
        PlanOnGraph(GRAPH, depth=0)
