import math
import random
from datetime import UTC, datetime, timedelta

import pytest

from holdfast.errors import UsageError
from holdfast.longterm.memory import Memory
from holdfast.longterm.parts import Part, split
from holdfast.longterm.policies.adaptive import (
    ADAPTERS,
    BOUND,
    EPISODIC,
    NAMES,
    PROCEDURAL,
    SALM,
    SEMANTIC,
    STORES,
    cues,
)
from holdfast.longterm.retrieval.embed import Hash
from tests.longterm.conftest import Clock

WHEN = datetime(2024, 3, 7, 9, tzinfo=UTC)


@pytest.fixture
def clock():
    return Clock(WHEN)


def salm(clock, **options):
    return Memory(":memory:", embedder=Hash(64), policy=SALM(**options), clock=clock)


def weights(memory):
    with memory.reading() as view:
        return memory.policy.weights(view)


def feedback(memory, item, useful):
    memory.transact(lambda view: memory.policy.feedback(view, item, useful))


def kinds(memory):
    return {item.text: item.kind for item in memory.get_all(limit=1000)}


def test_what_is_written_goes_to_the_store_that_its_cues_name(clock):
    with salm(clock) as memory:
        memory.add(
            [
                {"speaker": "Ann", "content": "Yesterday we met at the harbour."},
                {"speaker": "Ann", "content": "I live in Bern."},
                {"speaker": "Ann", "content": "To reset it, first hold the button, then let go."},
                {"speaker": "Ann", "content": "Hm."},
            ],
            session="s",
        )
        memory.add("The door code is 4711.")
        memory.add("open the door", kind="action")
        assert kinds(memory) == {
            "Yesterday we met at the harbour.": "turn",
            "I live in Bern.": "semantic/turn",
            "To reset it, first hold the button, then let go.": "procedural/turn",
            "Hm.": "turn",
            "The door code is 4711.": "semantic/fact",
            "open the door": "action",
            "open sessions": "semantic/open sessions",
        }
        memory.summarise("s")
        assert kinds(memory)["Ann lives in Bern"] == "semantic/fact"


def test_cues_by_hand():
    assert cues("I saw Ann yesterday.", WHEN) == {EPISODIC: 2, SEMANTIC: 0, PROCEDURAL: 0}
    assert cues("I live in Bern.", WHEN, "Ann") == {EPISODIC: 0, SEMANTIC: 1.5, PROCEDURAL: 0}
    # Of five words three are about something else, and would be lost with the turn.
    assert cues("I met Ben yesterday; I live in Bern.", WHEN, "Ann")[SEMANTIC] == 0
    assert cues("How to open it: turn left.") == {EPISODIC: 0, SEMANTIC: 0, PROCEDURAL: 2.5}


def test_a_store_supersedes_as_its_policy_does(clock):
    with salm(clock) as memory:
        for n, city in enumerate(("Bern", "Basel", "Chur")):
            memory.add([{"speaker": "Ann", "content": f"I live in {city}."}], session=f"{n}")
            memory.summarise(f"{n}")
        hits = memory.search("Where does Ann live?")
        facts = [hit.text for hit in hits if hit.kind == "semantic/fact"]
        assert facts == ["Ann lives in Chur"]


def test_feedback_moves_weights_by_a_factor_within_bounds(clock):
    with salm(clock) as memory:
        (item,) = memory.add("Hm.", kind="turn")
        feedback(memory, item, True)
        assert weights(memory)[EPISODIC] == {
            "storage": 1, "retrieval": pytest.approx(math.exp(0.1)), "forgetting": 1,
        }  # fmt: skip
        feedback(memory, item, False)
        assert weights(memory)[EPISODIC]["retrieval"] == pytest.approx(1)
        for useful, bound in ((True, BOUND), (False, 1 / BOUND)):
            for _ in range(40):
                feedback(memory, item, useful)
            assert weights(memory)[EPISODIC]["retrieval"] == bound
        assert weights(memory)[SEMANTIC] == dict.fromkeys(ADAPTERS, 1)


def test_each_adapter_learns_from_what_it_decided(clock):
    with salm(clock, days=10) as memory:
        (open_,) = memory.add({"speaker": "Ann", "content": "I live in Bern since yesterday."})
        with memory.reading() as view:
            assert {n: c for n, c in cues(view.get(open_).text, WHEN, "Ann").items() if c} == {
                EPISODIC: 2, SEMANTIC: 1.5,
            }  # fmt: skip
        feedback(memory, open_, True)
        moved = weights(memory)[EPISODIC]
        assert moved["storage"] > 1 and moved["retrieval"] > 1 and moved["forgetting"] == 1
        clock.time += timedelta(days=11)
        feedback(memory, open_, True)
        assert weights(memory)[EPISODIC]["forgetting"] > 1


def test_weights_decide_where_an_open_case_is_stored(clock):
    said = "I live in {} since yesterday."
    with salm(clock, rate=1) as memory:
        (item,) = memory.add({"speaker": "Ann", "content": said.format("Bern")})
        assert memory.get(item).kind == "turn"
        feedback(memory, item, False)
        (item,) = memory.add({"speaker": "Ann", "content": said.format("Chur")})
        assert memory.get(item).kind == "semantic/turn"


def test_weights_order_the_hits_and_no_store_falls_silent(clock):
    with salm(clock, semantic="hybrid") as memory:
        memory.add([{"content": f"Yesterday the cat saw boat {n}."} for n in range(9)], session="s")
        memory.add("The cat lives in a boat.")
        (one,) = [h for h in memory.search("cat boat", limit=9) if h.kind == "semantic/fact"]
        for _ in range(40):
            feedback(memory, one.id, False)
        hits = memory.search("cat boat", limit=5)
        assert [hit.kind for hit in hits] == ["turn"] * 4 + ["semantic/fact"]
        assert [hit.score for hit in hits] == sorted((h.score for h in hits), reverse=True)
        for _ in range(40):
            feedback(memory, one.id, True)
        assert memory.search("cat boat", limit=5)[0].kind == "semantic/fact"
        assert len(memory.search("cat boat", limit=1)) == 1


@pytest.mark.parametrize("seed", range(3))
def test_weights_stay_in_bounds_and_are_reproducible(seed):
    found = []
    for _ in range(2):
        pick = random.Random(seed)
        clock = Clock(WHEN)
        with salm(clock, rate=0.9, days=3) as memory:
            texts = ("Yesterday we met {}.", "I live in {}.", "First take {}, then go.", "Hm, {}.")
            ids = [memory.add(pick.choice(texts).format(n), kind="turn")[0] for n in range(9)]
            for _ in range(40):
                clock.time += timedelta(days=pick.random())
                feedback(memory, pick.choice(ids), pick.random() < 0.5)
                values = [w for one in weights(memory).values() for w in one.values()]
                assert len(values) == 9 and all(1 / BOUND <= w <= BOUND for w in values)
            found.append(weights(memory))
    assert found[0] == found[1] != dict.fromkeys(STORES, dict.fromkeys(ADAPTERS, 1.0))


def test_it_forgets_what_was_not_used_for_long(clock):
    with salm(clock, days=10) as memory:
        old, used = memory.add([{"content": "Hm, one."}, {"content": "Hm, two."}])
        memory.add("The door code is 4711.")
        feedback(memory, used, True)
        clock.time += timedelta(days=12)
        retired = {change.id for change in memory.forget(dry_run=True)}
        assert old in retired and used not in retired and len(retired) == 2
        memory.forget()
        assert memory.get(old) is None and memory.get(used) is not None
        assert weights(memory)[EPISODIC]["retrieval"] > 1  # its own notes stay


def test_what_three_episodes_say_becomes_a_fact(clock):
    with salm(clock) as memory:
        texts = [f"Yesterday in {c} I told them that I love jazz." for c in ("Bern", "Chur")]
        texts += ["I met Ben today and I love jazz."]
        ids = []
        for n, text in enumerate(texts):
            if n == 2:
                memory.transact(memory.policy.consolidate)
                assert not any(kind == "semantic/fact" for kind in kinds(memory).values())
            ids += memory.add({"speaker": "Ann", "content": f"{text} I love jazz."}, session=f"{n}")
        assert {memory.get(item).kind for item in ids} == {"turn"}
        (made,) = memory.transact(memory.policy.consolidate)
        fact = memory.get(made)
        assert fact.kind == "semantic/fact" and "jazz" in fact.text
        with memory.reading() as view:
            assert {source.id for source in view.sources([made])[made]} == set(ids)
        assert memory.transact(memory.policy.consolidate) == []
        assert set(memory.purge(ids[0])) == {ids[0], made}


def test_what_has_changed_since_is_not_promoted(clock):
    with salm(clock, episodic="hybrid") as memory:
        for n, city in enumerate(("Bern", "Bern", "Bern", "Chur")):
            text = f"I saw Ben yesterday {n}. I went home late. I live in {city}."
            memory.add({"speaker": "Ann", "content": text}, session=f"{n}")
        memory.transact(memory.policy.consolidate)
        assert not any("lives in" in text for text in kinds(memory))


def test_actions_of_three_sessions_become_a_procedure(clock):
    days = [
        ["knock", "open", "enter", "sit"],
        ["knock", "open", "enter"],
        ["look", "knock", "open"],
    ]
    days += [["knock", "open", "enter", "leave"]]
    with salm(clock) as memory:
        for n, steps in enumerate(days):
            for step in steps:
                memory.add(step, kind="action", session=f"{n}")
        (made,) = memory.transact(memory.policy.consolidate)
        item = memory.get(made)
        assert item.kind == "procedural/procedure"
        assert item.text == "1. knock\n2. open\n3. enter"
        with memory.reading() as view:
            assert len(view.sources([made])[made]) == 9
        assert item.text in [hit.text for hit in memory.search("how to enter", limit=3)]


def test_corrections_and_deletions_reach_the_store(clock):
    with salm(clock, semantic="zep") as memory:
        (item,) = memory.add({"speaker": "Ann", "content": "I live in Bern."})
        made = [i for i in memory.get_all() if i.kind == "semantic/relation"]
        assert [one.text for one in made] == ["Ann lives in Bern"]
        memory.update(item, "I live in Chur.")
        made = [i.text for i in memory.get_all() if i.kind == "semantic/relation"]
        assert made == ["Ann lives in Chur"]
        memory.delete(item)
        assert not [i for i in memory.get_all() if i.kind.startswith("semantic/")]


def test_a_part_sees_only_its_own(clock):
    with salm(clock) as memory:
        memory.add([{"content": f"Yesterday {n}, a cat."} for n in range(5)], session="s")
        memory.add(["The cat is called Miso.", "Ann likes tea."])
        with memory.reading() as view:
            main, semantic = Part(view, "", NAMES), Part(view, SEMANTIC, NAMES)
            assert [len(main.items()), len(semantic.items())] == [5, 2]
            assert [main.count(), semantic.count(), semantic.count("fact")] == [5, 2, 2]
            assert main.kinds() == ["turn"] and semantic.kinds() == ["fact"]
            first = semantic.items(limit=1)
            assert [i.kind for i in first] == ["fact"]
            assert len(semantic.items(limit=5, after=first[0].position)) == 1
            assert len(main.items(kind="turn", newest=True, limit=3)) == 3
            assert main.get(first[0].id) is None and semantic.get(first[0].id) == first[0]
            assert {hit.kind for hit in semantic.search("cat", 9)} == {"fact"}
            assert len(main.search("cat", 9)) == 5 == len(main.nearest("cat", 9))
            assert {item.kind for item, _ in semantic.nearest("cat", 9)} == {"fact"}
            assert len(semantic.as_of(None, None)) == 2
    assert split("semantic/a/b", NAMES) == ("semantic", "a/b")
    assert split("notes/a", NAMES) == ("", "notes/a")


def test_errors_say_what_to_do(clock):
    with salm(clock) as memory:
        with pytest.raises(UsageError, match=r"feedback names m0.*pass the id of a hit"):
            feedback(memory, "m0", True)
        (item,) = memory.add("Hm.")
        memory.delete(item)
        with pytest.raises(UsageError, match="no such memory now"):
            feedback(memory, item, True)
    with pytest.raises(UsageError, match=r"rate=2 is outside 0..1"):
        SALM(rate=2)
    with pytest.raises(UsageError, match="days=0"):
        SALM(days=0)
    with pytest.raises(UsageError, match="semantic='adaptive' would hold itself"):
        SALM(semantic="adaptive")
