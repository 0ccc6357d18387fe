import itertools
from datetime import UTC, datetime, timedelta

import pytest

from holdfast.errors import UsageError
from holdfast.longterm.language.llm import APPEND, DELETE, PASS, REPLACE, FallbackWarning, Scripted
from holdfast.longterm.memory import Memory
from holdfast.longterm.policies.keep_updated import SENTENCE, KeepUpdated, merge
from holdfast.longterm.retrieval.embed import Hash

START = datetime(2024, 5, 8, 13, 56, tzinfo=UTC)


def memory_of(policy=None, path=":memory:", llm=None):
    times = iter(range(1 << 20))
    return Memory(
        path,
        policy=policy or KeepUpdated(),
        embedder=Hash(),
        llm=llm,
        clock=lambda: START + timedelta(seconds=next(times)),
    )


def told(memory, session, *texts):
    memory.add([{"speaker": "Ann", "content": text} for text in texts], session=session)


def kept(memory):
    return [item.text for item in memory.get_all(kind=SENTENCE)]


@pytest.mark.parametrize(
    ("operator", "old", "new"),
    [(PASS, "m", ""), (REPLACE, "", "s"), (APPEND, "m", "s"), (DELETE, "", "")],
)
def test_truth_table(operator, old, new):
    assert merge("m", "s", {("m", "s"): operator}) == (list(old), list(new))


def test_every_two_by_two_table_is_the_formula_in_any_order():
    pairs = list(itertools.product("ab", "xy"))
    for operators in itertools.product((PASS, REPLACE, APPEND, DELETE), repeat=4):
        table = list(zip(pairs, operators, strict=True))
        old = [m for m in "ab" if not {op for (a, _), op in table if a == m} & {REPLACE, DELETE}]
        new = [s for s in "xy" if not {op for (_, b), op in table if b == s} & {PASS, DELETE}]
        for order in itertools.permutations(table):
            assert merge("ab", "xy", dict(order)) == (old, new)


def test_conflicting_operators_by_hand():
    # One sentence replaces it, another adds nothing to it: it goes, the second one with it.
    assert merge("m", "st", {("m", "s"): REPLACE, ("m", "t"): PASS}) == ([], ["s"])


def test_unknown_operator():
    with pytest.raises(UsageError, match="MERGE"):
        merge("m", "s", {("m", "s"): "MERGE"})
    memory = memory_of(KeepUpdated(op=lambda m, s: "MERGE"))
    memory.add("Ann lives in Paris")
    with pytest.raises(UsageError, match=r"MERGE.*PASS"):
        memory.add("Ann lives in Rome")


def test_sessions_change_end_and_repeat():
    memory = memory_of()
    told(memory, "1", "I live in Paris.", "I have a headache.", "I like jazz.")
    assert {hit.text for hit in memory.search("Paris headache")} >= {"I live in Paris."}
    memory.summarise("1")
    assert kept(memory) == ["Ann lives in Paris", "Ann has a headache", "Ann likes jazz"]
    assert {hit.kind for hit in memory.search("Paris headache")} == {SENTENCE}
    told(memory, "2", "I moved to Rome.", "I no longer have a headache.", "I still like jazz.")
    with memory.reading() as view:
        preview = {(d.old.text, d.operator) for d in memory.policy.decisions(view, "2")}
    assert {
        ("Ann lives in Paris", REPLACE), ("Ann has a headache", DELETE), ("Ann likes jazz", PASS)
    } <= preview  # fmt: skip
    assert kept(memory) == ["Ann lives in Paris", "Ann has a headache", "Ann likes jazz"]
    memory.summarise()
    assert kept(memory) == ["Ann likes jazz", "Ann moved to Rome"]


def test_a_session_may_contradict_itself():
    memory = memory_of()
    told(memory, "1", "I live in Paris.", "I have a fever.")
    memory.summarise()
    told(
        memory, "2", "I live in Rome now.", "I live in Paris again.", "I still have a fever.",
        "I no longer have a fever.", "I have a cough.", "I no longer have a cough.",
    )  # fmt: skip
    memory.summarise()
    assert kept(memory) == ["Ann lives in Paris"]


def test_the_next_session_ends_the_one_before():
    memory = memory_of()
    told(memory, "1", "I live in Paris.")
    told(memory, "1", "I like jazz.")
    assert kept(memory) == []
    told(memory, "2", "I am 40 years old.")
    assert kept(memory) == ["Ann lives in Paris", "Ann likes jazz"]
    assert memory.summarise("3") == []


def test_history_restores_any_past_memory():
    memory, times = memory_of(), []
    for number, city in enumerate(["Paris", "Rome", "Oslo"]):
        told(memory, str(number), f"I live in {city}.")
        memory.summarise()
        times.append(memory.get_all(kind=SENTENCE)[-1].recorded_at)
    for at, city in zip(times, ["Paris", "Rome", "Oslo"], strict=True):
        then = [
            i
            for i in memory.as_of(recorded=at, valid=START + timedelta(days=1))
            if i.kind == SENTENCE
        ]
        assert [item.text for item in then] == [f"Ann lives in {city}"]


def test_sentences_name_the_bytes_that_say_so():
    memory = memory_of()
    told(memory, "1", "Grüße! I live in Paris.")
    memory.summarise()
    (hit,) = memory.search("Paris")
    (source,) = hit.provenance
    said = memory.get(source.id).text.encode()
    assert said[source.start : source.end] == b"I live in Paris"


def test_given_facts_are_digested_at_once():
    memory = memory_of()
    (first,) = memory.add("Ann lives in Paris")
    (second,) = memory.add("Ann lives in Rome")
    (third,) = memory.add("Ann still lives in Rome")
    assert kept(memory) == ["Ann lives in Rome"]
    assert memory.history(first)[-1].why == f"REPLACE by {second}"
    assert memory.get(third) is None
    assert memory.add("Ann lives in Rome") == [second]


def test_a_deleted_turn_takes_its_sentences_along():
    memory = memory_of()
    told(memory, "1", "I live in Paris.")
    memory.summarise()
    (turn,) = memory.get_all(kind="turn")
    memory.delete(turn.id)
    assert kept(memory) == []


def test_above_the_limit_only_the_nearest_meet_and_a_warning_says_so():
    calls = []

    def op(m, s):
        calls.append((m, s))
        return APPEND

    memory = memory_of(KeepUpdated(op=op, limit=5))
    for number in range(5):
        memory.add(f"blue car number {number}")
    calls.clear()
    with pytest.warns(UserWarning, match=r"1 of 1 new .* 5 nearest of 6.*limit=5; raise it"):
        memory.add("blue car number 5")
        memory.add("blue car number 6")
    assert len(set(calls)) == 10
    calls.clear()
    memory.add("Completely unrelated zebra")
    assert calls == [], "far pairs are APPEND without a call"


def test_a_model_is_asked_once_for_a_session():
    def answer(messages, schema):
        assert "I left Paris for Rome" in messages[1]["content"]
        return {
            "sentences": [
                {"text": "Ann lives in Rome", "turn": 0,
                 "operations": [{"number": 0, "operation": REPLACE},
                                {"number": 9, "operation": DELETE}]},
                {"text": "Nobody said so", "turn": 4, "operations": []},
            ]
        }  # fmt: skip

    llm = Scripted(answer)
    memory = memory_of()
    told(memory, "1", "I live in Paris.")
    memory.summarise()
    memory.llm = llm
    told(memory, "2", "I left Paris for Rome.", "Nothing else.")
    assert llm.usage.calls == 0
    with pytest.warns(FallbackWarning, match="2 parts of a model's answer name no turn or memory"):
        memory.summarise()
    assert llm.usage.calls == 1
    assert kept(memory) == ["Ann lives in Rome"]


def test_bad_limit():
    with pytest.raises(UsageError, match="limit=0 compares nothing; give at least 1"):
        KeepUpdated(limit=0)
