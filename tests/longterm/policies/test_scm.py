import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from holdfast.errors import UsageError
from holdfast.longterm.budget import line, nbytes, words
from holdfast.longterm.language.judgement import Rules
from holdfast.longterm.language.llm import FallbackWarning, Scripted
from holdfast.longterm.memory import Memory
from holdfast.longterm.policies.scm import SCM
from holdfast.longterm.retrieval.embed import Hash
from tests.longterm.conftest import Clock

WORDS = ["cat", "boat", "tea", "bern", "code", "door", "jazz", "snow", "lamp"]


def scm(llm=None, **options):
    return Memory(":memory:", embedder=Hash(32), policy=SCM(**options), clock=Clock(), llm=llm)


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.tuples(st.integers(1, 60), st.sampled_from(WORDS)), min_size=1, max_size=9),
    st.integers(1, 120),
    st.sampled_from([words, nbytes]),
)
def test_within_budget_in_order_and_the_last_turn_once(turns, budget, count):
    with scm(long=20, summary=8, flash=25, top_k=4) as memory:
        texts = [f"{i} " + " ".join([word] * size) + "." for i, (size, word) in enumerate(turns)]
        ids = memory.add([{"role": "user", "content": text} for text in texts], session="s")
        try:
            context = memory.context(f"what about {turns[0][1]}?", budget, count=count)
        except UsageError as error:
            assert "does not hold the last turn" in str(error)
            return
        assert context.used == count(context.text) <= budget
        assert context.ids[-1] == ids[-1] and context.ids.count(ids[-1]) == 1
        places = [ids.index(item) for item in context.ids]
        assert places == sorted(places) and len(places) <= 5


def test_it_ends_where_even_summaries_are_too_long():
    with scm(long=5, summary=40, top_k=6) as memory:
        for i in range(8):
            memory.add({"role": "user", "content": f"tea {i} " + "word " * 80})
        memory.add({"role": "user", "content": "and now?"})
        (last,) = memory.get_all(newest=True, limit=1)
        with memory.reading() as view:
            least = words(line(view.hits([(last, 0.0, {})])[0]))
        calls = []

        def count(text):
            calls.append(text)
            return words(text)

        context = memory.context("tea?", least + 12, count=count)
        assert context.used <= least + 12 and context.ids[-1] == last.id
        # 3 k + 1 steps, the halving of the last cut, and what is counted once besides.
        assert len(calls) <= 3 * 6 + 1 + 10 + 4


def test_summaries_stand_in_for_long_turns():
    story = "Ann adopted a cat named Miso in Bern. " + "It rained all day long. " * 12
    with scm(long=20, summary=9, needed=0.05) as memory:
        memory.add({"role": "user", "content": story})
        memory.add([{"role": "user", "content": f"snow fell on day {i}"} for i in range(3)])
        (item,) = [i for i in memory.get_all() if "Miso" in i.text]
        assert "Miso" in item.data["summary"] and len(item.data["summary"].split()) <= 9
        whole = memory.context("Which cat did Ann adopt?", 2000).text
        assert "It rained all day long." in whole
        short = memory.context("Which cat did Ann adopt?", 80).text
        assert "Miso" in short and "It rained" not in short


def test_the_controller_may_say_that_nothing_is_needed():
    said = [{"role": "user", "content": text} for text in ("Ann likes tea.", "Hello!")]
    for reply, ids in (({"needed": False}, 1), ({"needed": True}, 2)):
        with scm(Scripted([reply])) as memory:
            memory.add(said)
            assert len(memory.context("tea?", 200).ids) == ids
    with scm(Scripted(["perhaps"])) as memory:  # unusable: recalling is the safe side
        memory.add(said)
        with pytest.warns(FallbackWarning):
            assert len(memory.context("tea?", 200).ids) == 2


def test_recency_breaks_ties():
    with scm(recency=0.5) as memory:
        old, new = memory.add([{"role": "user", "content": f"tea {i}"} for i in range(2)])
        hits = memory.search("tea", limit=2)
        assert {hit.id for hit in hits} == {old, new}
        assert all(hit.terms["recency"] > 0 for hit in hits)


def test_documents_are_summarised_in_groups():
    chunks = [f"Chapter {i} says that the lamp {i} is red. It is so." for i in range(40)]
    policy, rules = SCM(summary=12), Rules()
    text = policy.summarise_document(rules, chunks, budget=60)
    assert 0 < len(text.split()) <= 12
    for given_, message in (([], "no chunks"), (["word " * 70], "a chunk has 70 words")):
        with pytest.raises(UsageError, match=message):
            policy.summarise_document(rules, given_, budget=60)


def test_what_it_refuses():
    for options in ({"top_k": 0}, {"budget": 0}, {"needed": 2.0}, {"recency": -1.0}):
        with pytest.raises(UsageError, match="at least"):
            SCM(**options)
