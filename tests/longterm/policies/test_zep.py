import itertools
import random
from datetime import UTC, datetime, timedelta

import pytest

from holdfast.errors import UsageError
from holdfast.longterm.language.llm import FallbackWarning, Scripted
from holdfast.longterm.memory import Memory
from holdfast.longterm.policies.zep import COMMUNITY, Zep
from holdfast.longterm.retrieval.embed import Hash
from holdfast.longterm.retrieval.kg import ENTITY, FACT, MENTIONS

START = datetime(2024, 6, 1, tzinfo=UTC)
DAY = [datetime(2024, 1, 1, tzinfo=UTC) + timedelta(days=i) for i in range(400)]


def memory_of(policy=None, path=":memory:", llm=None):
    times = iter(range(1 << 20))
    return Memory(
        path,
        policy=policy or Zep(),
        embedder=Hash(64),
        llm=llm,
        durability="process",
        clock=lambda: START + timedelta(seconds=next(times)),
    )


def state(memory, *fact, **times):
    memory.transact(lambda view: memory.policy.add_fact(view, *fact, **times))


def holds(memory, subject, relation=None, **at):
    with memory.reading() as view:
        return [i.data["object"] for i in memory.policy.facts(view, subject, relation, **at)]


def intervals(memory):
    facts = memory.get_all(kind=FACT, limit=100)
    return {f.data["object"]: (f.valid_from, f.valid_to) for f in facts}


ALLEN = {
    (a, b, c, d)
    for a, b, c, d in itertools.product(range(6), repeat=4)
    if a < b and c < d and {a, b, c, d} == set(range(len({a, b, c, d})))
}


def test_all_thirteen_interval_relations_in_both_orders():
    assert len(ALLEN) == 13
    for a, b, c, d in ALLEN:
        told = [("Acme", a, b, DAY[100]), ("Globex", c, d, DAY[101])]
        results = []
        for order in (told, told[::-1]):
            memory = memory_of()
            for firm, start, end, said in order:
                state(memory, "Ann", "works_at", firm, DAY[start], DAY[end], said=said)
            results.append(intervals(memory))
        assert results[0] == results[1]
        first, second = sorted([("Acme", a, b), ("Globex", c, d)], key=lambda f: (f[1], f[0]))
        end = min(first[2], second[1]) if second[1] < first[2] else first[2]
        assert results[0] == {
            first[0]: (DAY[first[1]], DAY[end]),
            second[0]: (DAY[second[1]], DAY[second[2]]),
        }


def test_as_of_equals_brute_force_on_2000_random_facts():
    draw = random.Random(0)
    memory = memory_of(Zep(single_valued={"sits_in"}))
    told = {person: [] for person in range(200)}
    marks = []
    for batch in range(80):
        people = draw.sample(range(200), 25)
        facts = [(p, draw.randrange(20), f"room {draw.randrange(12)}") for p in people]

        def decide(view, facts=facts):
            return [
                change
                for person, day, room in facts
                for change in memory.policy.add_fact(view, f"P{person}", "sits_in", room, DAY[day])
            ]

        memory.transact(decide)
        for person, day, room in facts:
            told[person].append((day, batch, room))
        marks.append(memory.get_all(kind=FACT, newest=True, limit=1)[0].recorded_at)
    assert sum(map(len, told.values())) == 2000
    for batch, day in [(draw.randrange(80), draw.randrange(22)) for _ in range(20)] + [(79, 21)]:
        held = {}
        for item in memory.as_of(DAY[day], marks[batch]):
            if item.kind == FACT:
                held.setdefault(item.data["subject"], []).append(item.data["object"])
        for person, facts in told.items():
            # The last word on the last beginning that lies before the day.
            known = [fact for fact in facts if fact[0] <= day and fact[1] <= batch]
            assert held.get(f"P{person}", []) == ([max(known)[2]] if known else [])


def test_what_was_believed_before_a_late_arrival():
    memory = memory_of()
    state(memory, "Ann", "works_at", "Acme", DAY[0])
    state(memory, "Ann", "works_at", "Initech", DAY[20])
    before = memory.get_all(kind=FACT)[-1].recorded_at
    state(memory, "Ann", "works_at", "Globex", DAY[10])
    assert [holds(memory, "Ann", valid=DAY[d]) for d in (5, 15, 25)] == [
        ["Acme"], ["Globex"], ["Initech"]
    ]  # fmt: skip
    assert holds(memory, "ann", "works_at", valid=DAY[15], recorded=before) == ["Acme"]
    assert holds(memory, "Ann") == ["Initech"]


def test_several_valued_relations_keep_both_and_a_repetition_is_one_fact():
    memory = memory_of()
    state(memory, "Ann", "likes", "jazz", DAY[5])
    state(memory, "Ann", "likes", "chess", DAY[6])
    state(memory, "Ann", "likes", "Jazz", DAY[2])
    assert intervals(memory) == {"jazz": (DAY[2], None), "chess": (DAY[6], None)}
    state(memory, "Ann", "dislikes", "jazz", DAY[9])
    assert holds(memory, "Ann", "likes", valid=DAY[8]) == ["jazz", "chess"]
    assert holds(memory, "Ann", "likes", valid=DAY[9]) == ["chess"]


def test_episodes_become_entities_facts_and_provenance():
    memory = memory_of()
    (one,) = memory.add(
        {"speaker": "Ann", "content": "Hi! I live in Boston."}, session="1", when=DAY[0]
    )
    (two,) = memory.add(
        {"speaker": "Ann", "content": "I moved to Denver."}, session="2", when=DAY[9]
    )
    assert {e.text for e in memory.get_all(kind=ENTITY)} == {"Ann", "Boston", "Denver"}
    boston, denver = memory.get_all(kind=FACT)
    assert (boston.valid_from, boston.valid_to, denver.valid_to) == (DAY[0], DAY[9], None)
    with memory.reading() as view:
        (source,) = view.sources([boston.id])[boston.id]
        assert {e.src for e in view.edges(dst=denver.id, rel=MENTIONS)} == {two}
    assert source.id == one
    assert b"Hi! I live in Boston."[source.start : source.end] == b"I live in Boston"
    text = memory.context("Where does Ann live?", 200).text
    assert "2024-01-01 00:00 until 2024-01-10 00:00] Ann lives in Boston" in text


def test_a_denial_ends_what_it_denies():
    memory = memory_of()
    memory.add({"speaker": "Ann", "content": "I have a headache."}, session="1", when=DAY[0])
    memory.add(
        {"speaker": "Ann", "content": "I no longer have a headache."}, session="1", when=DAY[3]
    )
    assert holds(memory, "Ann", valid=DAY[1]) == ["headache"]
    assert holds(memory, "Ann", valid=DAY[4]) == []


def test_relative_dates_count_from_the_episode():
    memory = memory_of()
    memory.add({"speaker": "Ann", "content": "I started working at Acme yesterday."}, when=DAY[9])
    assert [start for start, _ in intervals(memory).values()] == [DAY[8]]


def test_communities_are_found_once_and_follow_their_facts():
    memory = memory_of()
    for a, b in itertools.combinations(["Ann", "Bob", "Cem"], 2):
        state(memory, a, "knows", b)
        state(memory, a, "meets", b)  # two edges between the same two
    for a, b in itertools.combinations(["Dia", "Eva", "Fay"], 2):
        state(memory, a, "knows", b)
    memory.summarise()
    found = [set(c.text.replace(".", "").split()) & {"Ann", "Bob", "Cem", "Dia", "Eva", "Fay"}
             for c in memory.get_all(kind=COMMUNITY)]  # fmt: skip
    assert sorted(map(sorted, found)) == [["Ann", "Bob", "Cem"], ["Dia", "Eva", "Fay"]]
    assert memory.summarise() == []
    state(memory, "Eva", "knows", "Gus")
    memory.summarise()
    assert len(memory.get_all(kind=COMMUNITY)) == 2
    assert {hit.kind for hit in memory.search("Eva")} == {FACT}


@pytest.mark.parametrize("rank", ["rrf", "mentions", "distance"])
def test_every_rank_reaches_over_the_graph(rank):
    memory = memory_of(Zep(rank=rank))
    state(memory, "Ronja", "leads", "Sternwarte")
    for i in range(20):
        state(memory, f"Person {i}", "eats", f"meal {i}")
    state(memory, "Sternwarte", "owns", "forty telescopes")
    found = [hit.text for hit in memory.search("Ronja", limit=4)]
    assert len(found) == 4
    assert {"Ronja leads Sternwarte", "Sternwarte owns forty telescopes"} <= set(found)


def test_ranks_differ_as_they_say():
    memory = memory_of()
    for text in ("I like jazz music", "I like jazz music a lot", "I like music boxes"):
        memory.add({"speaker": "Ann", "content": text + "."}, session=text)
    memory.add({"speaker": "Ann", "content": "I like music boxes."}, session="again")

    def texts(rank):
        with memory.reading() as view:
            return [h.text for h in Zep(rank=rank).retrieve(view, "jazz music", 3)]

    assert len(set(texts("rrf")) & {"I like jazz music.", "Ann likes jazz music"}) == 2
    assert texts("mmr") != texts("rrf")
    assert texts("mentions")[0] == "Ann likes music boxes"


def test_purge_takes_entities_that_nothing_else_speaks_of(tmp_path):
    memory = memory_of(path=tmp_path / "m.db")
    memory.add({"speaker": "Ann", "content": "I live in Boston."}, session="1", when=DAY[0])
    (gone,) = memory.add({"speaker": "Ann", "content": "I work at Quetzalcorp."}, session="1")
    memory.purge(gone)
    for file in tmp_path.iterdir():
        assert b"uetzalcorp" not in file.read_bytes()
    assert {e.text for e in memory.get_all(kind=ENTITY)} == {"Ann", "Boston"}


def test_deleting_and_correcting_an_episode_reach_its_facts():
    memory = memory_of()
    (turn,) = memory.add(
        {"speaker": "Ann", "content": "I live in Boston."}, session="1", when=DAY[0]
    )
    memory.update(turn, "I live in Austin.")
    assert holds(memory, "Ann") == ["Austin"]
    memory.delete(turn)
    assert holds(memory, "Ann") == []
    assert memory.get_all(kind=ENTITY) == []


def fact(**changed):
    whole = {
        "episode": 0, "subject": "Ann", "relation": "moved to", "object": "Denver",
        "statement": "Ann moved to Denver", "valid_from": "2024-01-05", "valid_to": None,
        "negated": False, "contradicts": [],
    }  # fmt: skip
    return {**whole, **changed}


def test_a_model_is_asked_once_and_indices_out_of_range_are_left_out():
    replies = [
        {"facts": [fact(relation="resides in", object="Boston", valid_from="2024-01-01")]},
        {"facts": [fact(contradicts=[0, 5, -1]), fact(episode=7), fact(episode=-1)]},
    ]
    llm = Scripted(replies)
    memory = memory_of(llm=llm)
    memory.add({"speaker": "Ann", "content": "Boston it is"}, session="1", when=DAY[0])
    with pytest.warns(FallbackWarning, match="4 parts of a model's answer name no episode or fact"):
        memory.add({"speaker": "Ann", "content": "Denver it is"}, session="1", when=DAY[8])
    assert llm.usage.calls == 2
    assert "Boston it is" in llm.requests[1][1]["content"]
    assert intervals(memory) == {"Boston": (DAY[0], DAY[4]), "Denver": (DAY[4], None)}


def test_errors():
    memory = memory_of()
    with pytest.raises(UsageError, match="valid_from=2024-01-01 00:00 has no time zone"):
        state(memory, "Ann", "works_at", "Acme", datetime(2024, 1, 1))
    with pytest.raises(UsageError, match="the object of a fact is empty"):
        state(memory, "Ann", "works_at", " ")
    with pytest.raises(UsageError, match="distanc"):
        Zep(rank="distanc")
