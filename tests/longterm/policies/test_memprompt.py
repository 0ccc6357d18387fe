import random

import pytest

from holdfast.errors import UsageError
from holdfast.longterm.language.llm import Scripted
from holdfast.longterm.memory import Memory
from holdfast.longterm.policies.memprompt import (
    FeedbackMemory,
    clarified,
    edits,
    learn_head,
    normalised,
)
from holdfast.longterm.policy import Policy
from holdfast.longterm.retrieval.embed import Hash
from tests.longterm.conftest import Clock

MEANING = "when I say similar I mean a synonym"


@pytest.fixture
def memory():
    with Memory(":memory:", embedder=Hash(64), policy=Policy(), clock=Clock()) as made:
        yield made


def edits_ref(a, b):
    rows = [[i + j if not i * j else 0 for j in range(len(b) + 1)] for i in range(len(a) + 1)]
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            rows[i][j] = min(
                rows[i - 1][j] + 1,
                rows[i][j - 1] + 1,
                rows[i - 1][j - 1] + (a[i - 1] != b[j - 1]),
            )
    return rows[-1][-1]


@pytest.mark.parametrize("seed", range(20))
def test_edits_equal_the_reference(seed):
    pick = random.Random(seed)
    for _ in range(20):
        a, b = ("".join(pick.choices("abc", k=pick.randrange(9))) for _ in range(2))
        want = edits_ref(a, b)
        for limit in range(9):
            assert edits(a, b, limit) == (want if want <= limit else None)
    assert edits("antonym", "synonym", 6) == 3


def test_what_a_question_is_about_is_left_out_of_its_key():
    key = normalised("What has a similar meaning to <good>?")
    assert key == "similar meaning" == normalised('what has the SIMILAR meaning to "bad weather"')
    assert normalised("the same as <a>") != normalised("not the same as <a>")
    assert normalised("What about <good>?") == ""


@pytest.mark.parametrize("match", ["closest", "semantic"])
def test_an_empty_memory_leaves_a_prompt_as_it_is(memory, match):
    sent = [
        {"role": "system", "content": "Answer."},
        {"role": "user", "content": "What is similar to <good>?"},
    ]
    llm = Scripted(["bad", "bad"])
    asked = FeedbackMemory(memory, match=match).wrap(llm)
    assert asked.complete(sent) == "bad" and llm.requests[0] == sent
    assert asked.usage.calls == 1 and memory.stats()["events"] == 0
    FeedbackMemory(memory, match=match).feedback("Who painted <The Scream>?", "name the painter")
    asked.complete(sent)
    assert llm.requests[1] == sent, "what was fed back on another question is not added"


@pytest.mark.parametrize("match", ["closest", "semantic"])
def test_a_stored_question_finds_its_feedback(memory, match):
    feedback = FeedbackMemory(memory, match=match)
    made = feedback.feedback("What is similar to <good>?", MEANING)
    found = feedback.lookup("what is similar to <river>")
    assert (found.id, found.text, found.query) == (made, MEANING, "What is similar to <good>?")
    assert found.distance == pytest.approx(0, abs=1e-6)
    llm = Scripted(["river: stream"])
    shown = [("What is like <a>?", "like means synonym", "the synonym of a is one")]
    feedback.wrap(llm, shown).complete(
        [{"role": "system", "content": "S"}, {"role": "user", "content": "is similar to <river>"}]
    )
    assert [message["content"] for message in llm.requests[0]] == [
        "S",
        "What is like <a>? || clarification: like means synonym",
        "the synonym of a is one",
        clarified("is similar to <river>", MEANING),
    ]


def test_newer_feedback_takes_the_place_of_older(memory):
    feedback = FeedbackMemory(memory)
    first = feedback.feedback("What is similar to <good>?", "a synonym")
    again = feedback.feedback("what IS similar to <bad>", "something that rhymes")
    assert again == first and memory.stats()["memories"] == 1
    assert feedback.lookup("similar to <x>").text == "something that rhymes"
    revised = [event for event in memory.history(first) if event.op == "revise"]
    assert [event.before["metadata"]["feedback"] for event in revised] == ["a synonym"]
    feedback.feedback("What is the opposite of <good>?", "an antonym")
    assert feedback.lookup("similar to <x>").text == "something that rhymes"
    memory.purge(first)
    assert feedback.lookup("similar to <x>") is None


def test_short_questions_need_to_be_closer_than_six_letters(memory):
    feedback = FeedbackMemory(memory)
    feedback.feedback("antonym of <good>?", "an antonym")
    assert feedback.lookup("synonym of <good>?") is None
    assert feedback.lookup("antonyms of <good>?").distance == 1
    feedback.feedback("which word is pronounced exactly like <pair>", "a homophone")
    near, far = "word pronounced exakly like <x>", "word renounced exactness like <x>"
    assert feedback.lookup(near).distance == 2 and feedback.lookup(far) is None


def test_spaces_have_their_own_feedback(memory):
    ann, ben = (FeedbackMemory(memory, space=name) for name in ("ann", "ben"))
    ann.feedback("What is similar to <good>?", MEANING)
    assert ben.lookup("What is similar to <good>?") is None
    assert ann.lookup("What is similar to <good>?").text == MEANING


def test_a_learnt_head_tells_types_apart_that_share_words(memory):
    ways = {
        "color": ["which colour suits a {}", "colour for a {}", "a {} in what colour"],
        "price": ["which price suits a {}", "price for a {}", "a {} at what price"],
    }
    things = ["red brick house", "long wooden table", "small fishing boat", "warm winter coat"]
    texts = {t: [way.format(x) for way in some for x in things] for t, some in ways.items()}
    same = [(a, b) for some in texts.values() for a in some for b in some if a < b]
    different = [(a, b) for a in texts["color"] for b in texts["price"]]
    head = learn_head(memory.embedder, same[::2], different[::2])
    feedback = FeedbackMemory(memory, match="semantic", head=head)
    assert feedback.lookup("anything") is None
    plain = FeedbackMemory(memory, match="semantic")
    for task, (text, *_) in texts.items():
        feedback.feedback(text, task)
    asked = [(t, way.format("old garden shed")) for t, some in ways.items() for way in some]
    hits = [[f.lookup(text) for _, text in asked] for f in (feedback, plain)]
    right = [
        sum(h is not None and h.text == t for h, (t, _) in zip(some, asked, strict=True))
        for some in hits
    ]
    assert right[0] == len(asked) > right[1]


def test_what_it_refuses(memory):
    feedback = FeedbackMemory(memory)
    for query, text, message in (
        (" ", "a synonym", "needs the question"),
        ("similar to <x>", "", "feedback on 'similar to <x>' is empty"),
        ("what about <x>?", "a synonym", "no words but what it is about"),
    ):
        with pytest.raises(UsageError, match=message):
            feedback.feedback(query, text)
    for options, message in (
        ({"match": "fuzzy"}, "unknown match of questions 'fuzzy'"),
        ({"threshold": 0}, "threshold=0 finds no question"),
        ({"match": "semantic", "threshold": 1.5}, r"threshold=1\.5 is no cosine"),
        ({"head": object()}, 'use it with match="semantic"'),
    ):
        with pytest.raises(UsageError, match=message):
            FeedbackMemory(memory, **options)
    with pytest.raises(UsageError, match="0 pairs of one type and 1 of two types"):
        learn_head(memory.embedder, [], [("a", "b")])
