import re

import pytest

from holdfast.errors import UsageError
from holdfast.longterm.language.llm import Scripted
from holdfast.longterm.memory import Memory
from holdfast.longterm.policies.arm_rag import ARM, approach, obfuscate
from holdfast.longterm.policy import Policy
from holdfast.longterm.retrieval.embed import Hash
from tests.longterm.conftest import Clock

APPLES = "Mary buys 3 red apples for 2.50 dollars each. How much does she pay?"
NOVELS = "Tom buys 3 novels for 2.50 dollars each. How much does he pay?"


def reply(answer, rationale="3 * 2.5 = 7.5"):
    return {"rationale": rationale, "answer": answer}


def right(problem, answer):
    return answer == "7.50"


@pytest.fixture
def memory():
    with Memory(":memory:", embedder=Hash(64), policy=Policy(), clock=Clock()) as made:
        yield made


def test_problems_that_differ_by_names_and_things_read_alike():
    text = obfuscate(APPLES)
    assert text == obfuscate(NOVELS) == obfuscate(APPLES)
    assert "2.50 dollars" in text and "Mary" not in text and "apple" not in text
    other = "An old farmer sells 12 hens a day and keeps 5. How many hens are left after 3 days?"
    again = (
        "A young baker sells 12 loaves a day and keeps 5. How many loaves are left after 3 days?"
    )
    assert obfuscate(other) == obfuscate(again) != text


@pytest.mark.parametrize("text", [APPLES, NOVELS, "Ann's 1,200 hens laid 3.5 eggs. Why? Wow! 7."])
def test_obfuscation_keeps_digits_and_sentences(text):
    made = obfuscate(text)
    assert re.findall(r"\d[\d,.]*", made) == re.findall(r"\d[\d,.]*", text)
    assert [made.count(mark) for mark in "?!"] == [text.count(mark) for mark in "?!"]
    assert len(re.findall(r"[.?!](?:\s|$)", made)) == len(re.findall(r"[.?!](?:\s|$)", text))
    bare = obfuscate(text, numbers=True)
    assert not re.search(r"\d", bare) and "N" in bare


def test_only_verified_solutions_are_found(memory):
    llm = Scripted([reply("8", "3 + 5 = 8"), reply("7.50")])
    arm = ARM(memory, llm, right, tries=2, seen=True)
    solution = arm.solve(APPLES)
    assert solution.verified and solution.answer == "7.50" and solution.used == ()
    (kept,), (failed,) = (memory.get_all(kind=kind) for kind in ("rationale", "failure"))
    assert kept.metadata["rationale"] == "3 * 2.5 = 7.5" and kept.text == obfuscate(APPLES)
    assert failed.metadata["answer"] == "8"
    assert [hit.kind for hit in memory.search("apples pay dollars", limit=9)] == ["rationale"]
    assert [item.id for item in arm.examples(NOVELS)] == [kept.id]


def test_the_answer_of_the_same_problem_does_not_leak(memory):
    arm = ARM(memory, Scripted([reply("7.50")] * 4), right)
    arm.solve(APPLES)
    assert arm.examples(APPLES) == arm.examples(NOVELS) == []
    similar = NOVELS.replace("3 novels", "9 kites")
    assert len(arm.examples(similar)) == 1
    solution = arm.solve(similar)
    sent = arm.llm.requests[-1][-1]["content"]
    assert len(solution.used) == 1 and sent.startswith(f"Problem: {APPLES}\nRationale: 3 * 2.5")
    assert sent.endswith(f"\n\nProblem: {similar}")


def test_the_shortest_rationale_of_each_approach_is_kept(memory):
    assert approach("3 * 2 = 6, so 6 + 1 = 7") == "*=+="
    told = [
        "First of all 3 * 2.5 = 7.5 dollars", "3 * 2.5 = 7.5", "Clearly, 3 * 2.5 = 7.5",
        "2.5 + 2.5 + 2.5 = 7.5",
    ]  # fmt: skip
    arm = ARM(memory, Scripted([reply("7.50", one) for one in told]), right)
    for _ in told:
        arm.solve(APPLES)
    kept = {item.metadata["rationale"] for item in memory.get_all(kind="rationale")}
    assert kept == {told[1], told[3]}


def test_replies_vote(memory):
    told = [reply("8", "x"), reply("7.50", "a longer one"), reply("7.50", "short")]
    solution = ARM(memory, Scripted(told), right, votes=3).solve(APPLES)
    assert (solution.answer, solution.rationale) == ("7.50", "short") and solution.verified


def test_examples_stay_within_their_budget(memory):
    llm = Scripted(lambda *_: reply("7.50", "step " * 40))
    arm = ARM(memory, llm, right, k=5, budget=150)
    for number in range(4, 9):
        arm.solve(APPLES.replace("3", str(number)))
    assert len(arm.examples(APPLES)) == 2


def test_what_it_refuses(memory):
    for verify, options, message in (
        (None, {}, "verify=None cannot tell right answers"),
        (right, {"k": 6}, "k=6 must be 1 to 5"),
        (right, {"tries": 0}, "tries=0 and votes=1 at least 1"),
    ):
        with pytest.raises(UsageError, match=message):
            ARM(memory, Scripted([]), verify, **options)
    with pytest.raises(TypeError, match="verify"):
        ARM(memory, Scripted([]))
    with pytest.raises(UsageError, match="problem is empty"):
        ARM(memory, Scripted([]), right).solve(" ")
