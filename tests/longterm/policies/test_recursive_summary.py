from datetime import UTC, datetime, timedelta

import pytest

from holdfast.errors import UsageError
from holdfast.longterm.budget import nbytes, words
from holdfast.longterm.language.llm import FallbackWarning, Scripted
from holdfast.longterm.memory import Memory
from holdfast.longterm.policies.recursive_summary import SUMMARY, RecursiveSummary
from holdfast.longterm.retrieval.embed import Hash

START = datetime(2024, 5, 8, 13, 56, tzinfo=UTC)
THINGS = ("color", "movie", "song", "book", "dish", "sport", "season", "city", "band", "tree")


def memory_of(path=":memory:", llm=None, **options):
    times = iter(range(1 << 20))
    return Memory(
        path,
        policy=RecursiveSummary(**options),
        embedder=Hash(64),
        llm=llm,
        clock=lambda: START + timedelta(seconds=next(times)),
    )


def told(memory, session, *texts):
    memory.add([{"speaker": "Ann", "content": text} for text in texts], session=session)


def summary(memory):
    with memory.reading() as view:
        return memory.policy.summary(view)


def history(memory):
    with memory.reading() as view:
        return memory.policy.history(view)


def favourites(number):
    return [f"My favorite {thing} is {thing}{number} in the whole wide world." for thing in THINGS]


def test_two_sessions_by_hand():
    memory = memory_of()
    told(memory, "1", "I live in Paris.", "I have a headache.", "How are you?", "I like jazz.")
    assert summary(memory) == ""
    memory.summarise("1")
    assert summary(memory) == "Ann lives in Paris. Ann has a headache. Ann likes jazz."
    told(memory, "2", "I moved to Rome.", "I no longer have a headache.", "I still like jazz.")
    memory.summarise("2")
    assert summary(memory) == "Ann likes jazz. Ann moved to Rome."
    assert history(memory) == [
        "Ann lives in Paris. Ann has a headache. Ann likes jazz.",
        "Ann likes jazz. Ann moved to Rome.",
    ]


@pytest.mark.parametrize("count", [words, nbytes])
@pytest.mark.parametrize("budget", [8, 30, 90])
def test_no_version_is_over_budget_and_the_newest_stay(budget, count):
    memory = memory_of(budget=budget, count=count)
    for number in range(6):
        told(memory, str(number), *favourites(number)[number : number + 5])
    memory.summarise()
    versions = history(memory)
    assert all(count(version) <= budget for version in versions)
    if budget == 90 and count is words:
        assert len(versions) == 6
        assert "tree5" in versions[-1] and "color0" not in versions[-1]


@pytest.mark.parametrize("window", [1, 25, 10_000])
def test_pieces_of_any_size_say_the_same(window):
    memory = memory_of(window=window)
    told(memory, "1", *favourites(0)[:5])
    told(memory, "2", *favourites(1)[:5], "I live in Rome.")
    memory.summarise()
    want = [text.replace("My", "Ann's") for text in favourites(1)[:5]]
    assert summary(memory) == " ".join([*want, "Ann lives in Rome."])


def test_every_sentence_names_its_turns():
    memory = memory_of()
    told(memory, "1", "I live in Paris.", "I like jazz.")
    memory.summarise()
    told(memory, "2", "I still like jazz.")
    memory.summarise()
    first, second, third = (turn.id for turn in memory.get_all(kind="turn"))
    (item,) = memory.get_all(kind=SUMMARY)
    assert [s["turns"] for s in item.data["sentences"]] == [[first], [second, third]]
    assert [s["count"] for s in item.data["sentences"]] == [1, 2]


def test_the_next_session_folds_the_one_before():
    memory = memory_of()
    told(memory, "1", "I live in Paris.")
    told(memory, "2", "I like jazz.")
    assert summary(memory) == "Ann lives in Paris."
    assert {hit.text for hit in memory.search("jazz Paris")} == {
        "Ann lives in Paris.", "I like jazz."
    }  # fmt: skip


def test_an_empty_session_changes_nothing_and_asks_nobody():
    llm = Scripted([])
    memory = memory_of(llm=llm)
    assert memory.summarise("never") == []
    assert memory.summarise() == []
    assert llm.usage.calls == 0
    assert memory.get_all() == []


def test_a_model_is_asked_once_and_its_sentences_traced():
    llm = Scripted([{"sentences": ["Ann lives in Paris.", "She plays the violin."]}])
    memory = memory_of(llm=llm)
    told(memory, "1", "Paris is my home", "My violin is in tune", "Nothing to say")
    assert llm.usage.calls == 0
    memory.summarise()
    assert llm.usage.calls == 1
    assert '"memory": []' in llm.requests[0][1]["content"]
    (item,) = memory.get_all(kind=SUMMARY)
    first, second, _ = (turn.id for turn in memory.get_all(kind="turn"))
    assert item.text == "Ann lives in Paris. She plays the violin."
    assert item.data["sentences"][0]["turns"][0] == first
    assert item.data["sentences"][1]["turns"] == [second]


def test_a_model_that_overshoots_is_asked_again_then_cut_at_a_sentence():
    long = [f"Ann owns the painting number {i} of the old series." for i in range(9)]
    llm = Scripted([{"sentences": long}, {"sentences": long[:5]}])
    memory = memory_of(llm=llm, budget=40)
    told(memory, "1", "I own some paintings")
    memory.summarise()
    assert llm.usage.calls == 2
    assert "too_long" in llm.requests[1][1]["content"]
    assert words(summary(memory)) <= 40
    assert set(summary(memory).replace(". ", ".\n").split("\n")) <= set(long)
    assert summary(memory).count("painting") == 3


def test_a_failing_model_leaves_it_to_the_rules():
    memory = memory_of(llm=Scripted([]))
    told(memory, "1", "I live in Paris.")
    with pytest.warns(FallbackWarning, match="the script holds 0 replies"):
        memory.summarise()
    assert summary(memory) == "Ann lives in Paris."


def test_the_context_holds_whole_sentences():
    memory = memory_of()
    told(memory, "1", "I live in Paris.", "I have a blue bicycle.", "I like jazz.")
    memory.summarise()
    texts = {b: memory.context("anything", b).text for b in (5, 10, 15, 100)}
    assert texts[5] == ""
    assert texts[100].endswith("Ann lives in Paris. Ann has a blue bicycle. Ann likes jazz.")
    assert texts[10].endswith("] Ann lives in Paris.")
    assert texts[15].endswith("] Ann lives in Paris. Ann has a blue bicycle.")


def test_purge_takes_the_turn_out_of_every_version(tmp_path):
    memory = memory_of(path=tmp_path / "m.db")
    told(memory, "1", "I live in Paris.", "I work at Quetzalcorp.")
    memory.summarise()
    told(memory, "2", "I work at Globex.")
    memory.summarise()
    gone = memory.get_all(kind="turn")[1]
    memory.purge(gone.id)
    for file in tmp_path.iterdir():
        assert b"uetzalcorp" not in file.read_bytes()
    assert history(memory) == ["Ann lives in Paris. Ann works at Globex."]


def test_bad_options():
    with pytest.raises(UsageError, match="budget=7 holds no sentence; give at least 8 tokens"):
        RecursiveSummary(budget=7)
    with pytest.raises(UsageError, match="window=0 folds nothing in; give at least 1"):
        RecursiveSummary(window=0)
