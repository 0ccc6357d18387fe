import warnings
from datetime import UTC, datetime, timedelta

import pytest

from holdfast.errors import UsageError
from holdfast.longterm.language.llm import Scripted
from holdfast.longterm.memory import Memory
from holdfast.longterm.policies.tim import THOUGHT, TiM
from holdfast.longterm.retrieval.embed import Hash
from tests.longterm.conftest import Clock

DAY = datetime(2024, 1, 1, tzinfo=UTC)


def made(path=":memory:", llm=None, embedder=None, **options):
    return Memory(
        path, embedder=embedder or Hash(64), policy=TiM(**options), clock=Clock(), llm=llm
    )


def thoughts(memory):
    return sorted(item.text for item in memory.get_all(kind=THOUGHT, limit=1000))


def test_a_thousand_paraphrases_are_one_thought():
    with made() as memory:
        verbs = ("love", "like", "enjoy", "adore")
        said = [
            {"speaker": "Ann", "content": f"I {verbs[i % 4]} jazz", "id": str(i)}
            for i in range(1000)
        ]
        for start in range(0, 1000, 100):
            memory.add(said[start : start + 100])
        (thought,) = memory.get_all(kind=THOUGHT)
        assert thought.text == "Ann loves jazz"
        with memory.reading() as view:
            assert len(view.sources([thought.id])[thought.id]) == 1000


def test_other_tails_are_merged_and_none_is_lost():
    with made() as memory:
        memory.add("Ann: I love jazz.")
        memory.add("Ann: I love chess.")
        memory.add("Ben: I love jazz.")
        assert thoughts(memory) == ["Ann loves jazz. Ann loves chess.", "Ben loves jazz"]
        assert "chess" in memory.search("what about chess?", limit=1)[0].text


def test_what_contradicts_is_forgotten_but_stays_in_the_history():
    with made() as memory:
        memory.add("Ann: I work at Acme.")
        (before,) = memory.get_all(kind=THOUGHT)
        memory.add("Ann: I love jazz.")
        memory.add("Ann: I work at Globex.")
        assert thoughts(memory) == ["Ann loves jazz", "Ann works at Globex"]
        texts = [
            e.after["text"] for e in memory.history(before.id) if e.after and "text" in e.after
        ]
        assert texts == ["Ann works at Acme", "Ann works at Globex"]
        # An opposite is another relation: only the head leads to it.
        memory.add("Ann: I hate jazz.")
        assert thoughts(memory) == ["Ann hates jazz", "Ann works at Globex"]
        assert "Acme" not in memory.context("Where does Ann work?", 100).text


def test_a_new_turn_is_compared_with_few_however_many_there_are(fetched):
    reads = []
    with made() as memory:
        memory.add("Ann: I work at Acme.")
        for first, end, firm in ((0, 200, "Globex"), (200, 2000, "Initech")):
            for at in range(first, end, 200):
                memory.add([f"Gate {number}, half past nine!" for number in range(at, at + 200)])
            memory.add("Ann: I love chess.")
            reads.append(fetched.of(lambda firm=firm: memory.add(f"Ann: I work at {firm}.")))
            found = [t.text for t in memory.get_all(kind=THOUGHT, limit=5000)]
            assert len(found) == end + 2
            assert {"Ann loves chess", f"Ann works at {firm}"} < set(found)
    # One turn more has told where she works.
    assert reads[0] <= reads[1] <= reads[0] + 1 < 150, reads


def test_what_was_said_earlier_does_not_overturn_what_came_later():
    with made() as memory:
        memory.add("Ann: I work at Globex.", when=DAY + timedelta(days=9))
        memory.add("Ann: I work at Acme.", when=DAY)
        assert thoughts(memory) == ["Ann works at Globex"]


def test_deleting_and_purging_bring_back_what_remains():
    for act in ("delete", "purge"):
        with made() as memory:
            jazz, acme = (memory.add(f"Ann: {t}")[0] for t in ("I love jazz.", "I work at Acme."))
            chess, globex = (
                memory.add(f"Ann: {t}")[0] for t in ("I love chess.", "I work at Globex.")
            )
            getattr(memory, act)(globex)
            assert thoughts(memory) == ["Ann loves jazz. Ann loves chess.", "Ann works at Acme"]
            getattr(memory, act)(chess)
            assert thoughts(memory) == ["Ann loves jazz", "Ann works at Acme"]
            for item in (jazz, acme):
                getattr(memory, act)(item)
            assert thoughts(memory) == []


def test_a_correction_is_thought_over_and_a_given_thought_stays():
    with made() as memory:
        (turn, *_) = memory.add("Ann: I work at Acme.")
        memory.update(turn, "Ann: I work at Globex.")
        assert thoughts(memory) == ["Ann works at Globex"]
        (thought,) = memory.get_all(kind=THOUGHT)
        memory.update(thought.id, "Ann works from home")
        (other, *_) = memory.add("Ann: I love jazz.")
        memory.delete(other)
        assert thoughts(memory) == ["Ann works from home"]
        memory.delete(thought.id)
        memory.update(turn, "Ann: I love chess.")
        assert thoughts(memory) == ["Ann loves chess"]


def test_what_states_no_relation_is_found_as_it_is():
    with made() as memory:
        memory.add([{"speaker": "Ben", "content": "Gate seven, half past nine!"}], session="s")
        (hit,) = memory.search("which gate?")
        assert hit.kind == THOUGHT and "Gate seven, half past nine!" in hit.text
        assert hit.session == "s" and memory.get(hit.provenance[0].id).kind == "turn"


def test_recall_is_limited_to_the_probed_buckets_and_equal_each_time(tmp_path):
    words = ["jazz", "chess", "tea", "rowing", "poetry", "storks", "bridges", "loaves"]
    found = {}
    for name, options in (
        ("paper", {"buckets": 16, "tables": 1, "probes": 1}),
        ("all", {"buckets": 16, "tables": 1, "probes": 16}),
    ):
        path = tmp_path / f"{name}.db"
        with made(path, **options) as memory:
            for i, word in enumerate(words):
                memory.add(f"P{i}: I love {word}.")
            found[name] = [memory.search(f"who loves {word}?", limit=50) for word in words]
        with made(path, **options) as again:
            for word, hits in zip(words, found[name], strict=True):
                assert again.search(f"who loves {word}?", limit=50) == hits
    assert all(len(hits) == len(words) for hits in found["all"])
    assert any(len(hits) < len(words) for hits in found["paper"])
    for few, whole in zip(found["paper"], found["all"], strict=True):
        assert [h for h in whole if h.id in {f.id for f in few}] == few


def test_other_options_or_another_embedder_find_all_until_it_is_hashed_anew(tmp_path):
    path = tmp_path / "m.db"
    with made(path, buckets=16, tables=1, probes=1) as memory:
        for i in range(30):
            memory.add(f"P{i}: I love number {i}.")
    with made(path, buckets=8, tables=2, probes=1) as memory:
        assert len(memory.search("number 7", limit=50)) == 30
        memory.summarise()
        assert 0 < len(memory.search("number 7", limit=50)) < 30


def test_a_model_thinks_once_for_all_turns():
    reply = {
        "thoughts": [
            {
                "turn": 0, "head": "Ann", "relation": "Lives in", "tail": "Boston",
                "thought": "Ann lives in Boston.", "negated": False,
            },
            {
                "turn": 7, "head": "Ann", "relation": "lives in", "tail": "Rome",
                "thought": "Ann lives in Rome.", "negated": False,
            },
        ]
    }  # fmt: skip
    llm = Scripted([reply])
    with made(llm=llm) as memory, warnings.catch_warnings():
        warnings.simplefilter("error")
        memory.add([{"speaker": "Ann", "content": "Boston it is."}, {"content": "Good!"}])
        assert llm.usage.calls == 1
        assert thoughts(memory) == ["Ann lives in Boston.", "Good!"]


def test_what_it_refuses():
    for options, message in (
        ({"buckets": 63}, "buckets=63 is not even.*give 64"),
        ({"tables": 0}, "tables=0"),
        ({"probes": 0}, "probes=0"),
    ):
        with pytest.raises(UsageError, match=message):
            TiM(**options)
