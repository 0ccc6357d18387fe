from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from holdfast.errors import UsageError
from holdfast.longterm.evaluation import compare
from holdfast.longterm.evaluation.locomo import Conversation, Question, Turn
from holdfast.longterm.policy import Policy
from holdfast.longterm.records import Add, Source
from holdfast.longterm.retrieval.embed import Hash
from holdfast.longterm.retrieval.encodings import Kept

START = datetime(2024, 1, 1, tzinfo=UTC)
TEXTS = ["I adopted a cat named Miso.", "How lovely!", "I sold my boat in May.", "Why, Ann?",
         "My sister lives in Bern.", "Is she well?"]  # fmt: skip


def conversation(name="c"):
    turns = tuple(
        Turn(f"D1:{i}", f"s{i // 3}", "AB"[i % 2], text, START + timedelta(days=i // 3))
        for i, text in enumerate(TEXTS)
    )
    asked = [("What is the name of the cat?", "D1:0"), ("When was the boat sold?", "D1:2"),
             ("Where does the sister live?", "D1:4")]  # fmt: skip
    questions = tuple(Question(t, "", "single-hop", (e,), (f"s{i}",)) for i, (t, e) in
                      enumerate(asked))  # fmt: skip
    return Conversation(name, turns, questions)


class Nothing(Policy):
    def retrieve(self, view, query, limit):
        return []


class Summaries(Policy):
    """Finds what it made: one memory from one turn, one from all of them."""

    def link(self, view, items):
        return [
            Add(f"note: {items[0].text}", "note", sources=[Source(items[0].id)]),
            Add(
                "all of it: " + " ".join(i.text for i in items),
                "note",
                sources=[Source(i.id) for i in items],
            ),
        ]

    def retrieve(self, view, query, limit):
        return view.search(query, limit, kinds=["note"])


def test_what_each_policy_finds():
    rows = compare.run(
        [conversation()],
        {"hybrid": "hybrid", "same": Policy(), "nothing": Nothing(), "notes": Summaries()},
        Hash(64),
        budgets=[20, 500],
    )
    by_name = {row["policy"]: row for row in rows}
    assert by_name["hybrid"]["recall@5"] == by_name["hybrid"]["packed_500"] == 100
    assert 0 < by_name["hybrid"]["packed_20"] <= 100
    assert by_name["same"]["identical_to"] == "hybrid"
    assert by_name["hybrid"]["identical_to"] is None
    assert by_name["nothing"]["recall@50"] == by_name["nothing"]["packed_500"] == 0
    # Of each session's turns only the first is a note of its own: D1:0, and neither D1:2 nor D1:4.
    assert by_name["notes"]["recall@50"] == pytest.approx(100 / 3)
    assert rows == sorted(rows, key=lambda row: -row["recall@10"])
    assert all(row["bytes_per_turn"] > 0 and row["llm_calls"] == 0 for row in rows)


def test_the_clock_follows_the_conversation():
    with compare.remembered(conversation(), "hybrid", Hash(32)) as (memory, turn_of):
        items = memory.get_all()
        assert [turn_of(item.id) for item in items] == [f"D1:{i}" for i in range(6)]
        assert [item.recorded_at.date() for item in items] == [t.when.date() for t in
                                                              conversation().turns]  # fmt: skip
        assert memory.now() == START + timedelta(days=2)


def test_nothing_to_compare():
    with pytest.raises(UsageError, match="no question with evidence"):
        compare.run([], {"hybrid": "hybrid"}, Hash(32))


class Counting(Hash):
    calls = 0

    def encode(self, texts):
        Counting.calls += len(texts)
        return super().encode(texts)


def test_encodings_are_made_once(tmp_path):
    plain, texts = Hash(32), TEXTS
    for attempt in range(2):
        kept = Kept(Counting(32), tmp_path / "kept.db")
        Counting.calls = 0
        np.testing.assert_array_equal(kept.encode(texts), plain.encode(texts))
        ours, theirs = (e.encode_in_context(texts, [0, 3, 5]) for e in (kept, plain))
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(one.window, other.window)
            assert one.tokens == other.tokens
        query, same = kept.encode_query("cat"), plain.encode_query("cat")
        np.testing.assert_array_equal(query.vector, same.vector)
        assert query.states is None and query.words is None
        assert (Counting.calls > 0) == (attempt == 0)
