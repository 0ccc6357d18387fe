import itertools
import random
from datetime import timedelta

import pytest

from holdfast.errors import UsageError
from holdfast.longterm.budget import words
from holdfast.longterm.evaluation import teafarm
from holdfast.longterm.language.judgement import RELATIONS
from holdfast.longterm.language.llm import Scripted
from holdfast.longterm.memory import Memory
from holdfast.longterm.policies.theanine import EVENT, TOLD, Theanine
from holdfast.longterm.records import Add, Link
from holdfast.longterm.retrieval import kg
from holdfast.longterm.retrieval.embed import Hash
from holdfast.longterm.timelines import PATHS, Timelines
from tests.longterm.conftest import START, Clock


def made(**options):
    llm = options.pop("llm", None)
    return Memory(
        ":memory:", embedder=Hash(128), policy=Theanine(**options), clock=Clock(), llm=llm
    )


def told(memory, number, *texts):
    when = START + timedelta(days=number)
    memory.add([{"speaker": "Ann", "content": t} for t in texts], session=str(number), when=when)
    memory.summarise(str(number))


def edges(memory):
    with memory.reading() as view:
        return [edge for edge in view.edges() if edge.rel in RELATIONS]


def by_text(memory):
    return {item.text: item for item in memory.get_all(kind=EVENT, limit=1000)}


def moved(memory):
    for number, place in enumerate(("live in Boston", "moved to Denver", "settled in Oslo")):
        told(memory, number, f"I {place}.")


def test_versions_of_a_fact_are_one_dated_line():
    with made() as memory:
        moved(memory)
        context = memory.context("Where does Ann live?", 100)
        rows = context.text.split("\n")
        assert [row.split("] ")[1] for row in rows] == [
            "Ann lives in Boston", "Ann moved to Denver", "Ann settled in Oslo",
        ]  # fmt: skip
        assert "2024-01-01" in rows[0] and "—" not in rows[0]
        for row, day in zip(rows[1:], ("2024-01-02", "2024-01-03"), strict=True):
            assert day in row and "—Changes→]" in row
        assert len(memory.get_all(kind=EVENT)) == 3, "nothing was removed"
        # What was handed out is recognised, arrows and all.
        before = memory.stats()["memories"]
        memory.add(context.text)
        assert memory.stats()["memories"] == before


@pytest.mark.parametrize("seed", range(4))
def test_edges_go_forward_and_one_leads_into_each_component(seed):
    draw, count = random.Random(seed), 0
    things = ["Boston", "Denver", "Oslo", "Lima", "Cairo"]
    with made() as memory:
        order = draw.sample(range(12), 12)  # sessions come in out of order
        for number in order:
            before = {(e.src, e.dst) for e in edges(memory)}
            lines = [
                f"I {draw.choice(['moved to', 'like', 'visited'])} {draw.choice(things)} because"
                f" I {draw.choice(['want', 'hope for'])} a change."
                for _ in range(2)
            ]
            told(memory, number, *lines)
            assert len(memory.get_all(kind=EVENT)) >= count, "the number of memories never falls"
            count = len(memory.get_all(kind=EVENT))
            # Each new event joins any component of what was there at most once.
            graph = kg.graph_of(before)
            for new in {e.dst for e in edges(memory) if (e.src, e.dst) not in before}:
                parts = [
                    frozenset(kg.reach(graph, [e.src], 99)) or e.src
                    for e in edges(memory)
                    if e.dst == new
                ]
                assert len(parts) == len(set(parts))
        when = {item.id: item.valid_from for item in by_text(memory).values()}
        found = edges(memory)
        assert found
        for edge in found:
            if edge.src in when and edge.dst in when:
                assert when[edge.src] <= when[edge.dst]
        with memory.reading() as view:
            graph = Timelines(view)
            for item in memory.get_all(kind=EVENT):
                graph.before(item.id)  # raises on a cycle


def test_cycles_and_other_wrong_edges_are_refused():
    with made() as memory:
        moved(memory)
        boston, _, oslo = by_text(memory).values()

        def relate(*given):
            return memory.transact(lambda view: memory.policy.relate(view, given))

        with pytest.raises(UsageError, match="goes back in time"):
            relate((oslo.id, "Cause", boston.id))
        with pytest.raises(UsageError, match="unknown relation 'Why'"):
            relate((boston.id, "Why", oslo.id))
        with pytest.raises(UsageError, match="no event m0 now"):
            relate((boston.id, "Cause", "m0"))
        relate((boston.id, "Cause", oslo.id))
        assert ("Cause", oslo.id) in {(e.rel, e.dst) for e in edges(memory)}
    with made() as memory:
        told(memory, 1, "I like tea.", "I play chess.", "I drive a Volvo.")
        one, two, three = by_text(memory).values()
        with pytest.raises(UsageError, match="leads to itself: edges must go forward"):
            memory.transact(
                lambda view: memory.policy.relate(
                    view,
                    [(one.id, "Cause", two.id), (two.id, "React", three.id),
                     (three.id, "Want", one.id)],
                )
            )  # fmt: skip
        assert edges(memory) == []


def test_a_cycle_that_came_in_otherwise_is_reported_not_followed(tmp_path):
    with made() as memory:
        told(memory, 1, "I like tea.", "I play chess.")
        one, two = (item.id for item in by_text(memory).values())
        memory.transact(lambda view: [Link(one, "Cause", two), Link(two, "Cause", one)])
        memory.export(tmp_path / "x.jsonl")
    with made() as other:
        other.import_(tmp_path / "x.jsonl")
        with pytest.raises(UsageError, match="leads to itself"):
            other.context("tea", 100)


def test_ways_are_capped():
    with made() as memory:
        told(memory, 1, *(f"I like number {i}." for i in range(24)))
        layers = [list(by_text(memory).values())[i : i + 2] for i in range(0, 24, 2)]
        for first, second in itertools.pairwise(layers):
            memory.transact(
                lambda view, a=first, b=second: memory.policy.relate(
                    view, [(x.id, "Cause", y.id) for x in a for y in b]
                )
            )
        with memory.reading() as view:
            ways = Timelines(view).through(layers[6][0].id)
        assert len(ways) == PATHS and all(len(way) == 12 for way in ways)


def test_the_context_keeps_to_its_budget_and_ends_with_the_best():
    with made() as memory:
        assert memory.context("anything", 100).text == ""
        moved(memory)
        whole = memory.context("Where did Ann settle?", 100)
        for budget in range(whole.used + 1):
            context = memory.context("Where did Ann settle?", budget)
            assert words(context.text) == context.used <= budget
            if context.ids:
                assert "Oslo" in context.text
        assert context.text == whole.text


def test_what_was_not_summarised_is_found_and_nothing_is_told_twice():
    with made() as memory:
        memory.add("Ann has a cat.")
        assert memory.search("cat")[0].text == "Ann has a cat."
        assert "cat" in memory.context("cat", 50).text
        moved(memory)
        length = memory.stats()["events"]
        memory.summarise("1")
        assert memory.stats()["events"] == length


def test_what_a_call_reads_does_not_grow_with_other_timelines(fetched):
    def live(view, numbers):
        """Timelines of four events, as the ends of four sessions leave them."""
        changes = []
        for n in numbers:
            said = f"thing {n} was seen at place {n}"
            told = {"data": {"told": TOLD}, "session": f"of {n}"}
            line = [Add(f"{said}.{i}", EVENT, session=f"of {n}.{i}") for i in range(4)]
            links = [Link(one, "Cause", two) for one, two in itertools.pairwise(line)]
            changes += [Add(said, "turn", searchable=False, **told), *line, *links]
        return changes

    reads = []
    with made() as memory:
        moved(memory)
        for first, end, place in ((0, 50, "Rome"), (50, 500, "Lima")):
            memory.transact(lambda view, a=first, b=end: live(view, range(a, b)))
            when = START + timedelta(days=10 + end)
            memory.add(
                {"speaker": "Ann", "content": f"I moved to {place}."}, session=place, when=when
            )
            reads.append(
                (
                    fetched.of(lambda name=place: memory.summarise(name)),
                    fetched.of(lambda: memory.context("Where does Ann live?", 100)),
                )
            )
            assert f"Ann moved to {place}" in memory.context("Where does Ann live?", 100).text
        memory.summarise()  # looks at all turns, once
        assert fetched.of(memory.summarise) < 150
    # The summaries and questions read one event more: where she moved the first time.
    assert all(after <= before + 12 < 400 for before, after in zip(*reads, strict=True)), reads


def test_the_end_of_all_sessions_tells_what_single_ends_left():
    with made() as memory:
        for name, thing in (("a", "tea"), ("b", "jazz"), ("c", "chess")):
            memory.add({"speaker": "Ann", "content": f"I like {thing}."}, session=name)
        memory.summarise("b")
        assert set(by_text(memory)) == {"Ann likes jazz"}
        memory.add({"speaker": "Ann", "content": "I like maps."}, session="b")
        memory.summarise()
        assert set(by_text(memory)) == {f"Ann likes {t}" for t in ("tea", "jazz", "chess", "maps")}
        memory.add({"speaker": "Ann", "content": "I like soup."}, session="a")
        memory.summarise("a")
        assert "Ann likes soup" in by_text(memory)
        memory.summarise()  # notes that all is told
        length = memory.stats()["events"]
        memory.summarise()
        assert memory.stats()["events"] == length


def test_corrected_and_deleted_turns_take_their_events_along():
    with made() as memory:
        moved(memory)
        (turn,) = memory.get_all(kind="turn", session="1")
        memory.update(turn.id, "I moved to Dublin.")
        assert "Dublin" in memory.context("Where does Ann live?", 100).text
        assert len(edges(memory)) == 2
        memory.delete(turn.id)
        assert set(by_text(memory)) == {"Ann lives in Boston", "Ann settled in Oslo"}


def test_a_model_is_asked_once_for_events_and_once_for_pairs():
    replies = [
        {"events": [{"turn": 0, "sentence": "Ann lives in Boston."}]},
        {"events": [{"turn": 0, "sentence": "Ann lives in Rome."}, {"turn": 9, "sentence": "No"}]},
        {"related": [{"pair": 0, "relation": "Changes"}]},
    ]
    llm = Scripted(replies)
    with made(llm=llm) as memory:
        told(memory, 0, "Boston it is.")
        told(memory, 1, "Rome now!")
        assert llm.usage.calls == 3
        assert [item.text for item in memory.get_all(kind=EVENT)] == [
            "Ann lives in Boston.", "Ann lives in Rome.",
        ]  # fmt: skip
        assert [edge.rel for edge in edges(memory)] == ["Changes"]


def test_teafarm_knows_what_refutes_its_questions():
    world = teafarm.world(3)
    assert world == teafarm.world(3) != teafarm.world(4)
    said = [text for session in world.sessions for text in session]
    for question, versions in world.facts:
        assert [said.count(text) for text in versions] == [1] * 4 and question.endswith("?")
        places = [i for t in versions for i, s in enumerate(world.sessions) if t in s]
        assert places == [0, 1, 2, 3]
    assert {q.refuted_by for q in world.questions} <= set(said)
    assert len(world.questions) == 2 * len(world.facts)


def test_what_it_refuses():
    for options, message in (({"j": 0}, "j=0"), ({"n": 0}, "n=0"), ({"tau": 2}, "tau=2")):
        with pytest.raises(UsageError, match=message):
            Theanine(**options)
