"""What every policy must do: the invariants of the room, once for each policy there is."""

import itertools
import shutil
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from holdfast.checks.core._faults import PowerCut, failing
from holdfast.longterm.budget import nbytes, words
from holdfast.longterm.memory import Memory
from holdfast.longterm.policy import Policy, policies
from holdfast.longterm.records import Space, micros
from holdfast.longterm.retrieval.embed import Hash
from tests.longterm.conftest import Clock
from tests.longterm.world import DAYS, DEEDS, SPACES, live, messages, replay, stay_apart

NAMES = sorted(policies())
# On a server the SQL is what differs, so a few policies do: the plainest, one that revises what is
# there, and one with a graph.
FEW = ["hybrid", "keep_updated", "zep"]
every_policy = pytest.mark.parametrize(
    ("place", "name"),
    [("sqlite", name) for name in NAMES] + [("postgresql", name) for name in FEW],
    indirect=["place"],
)


def make(path, name, **options):
    return Memory(path, embedder=Hash(64), policy=name, clock=Clock(), **options)


def states(memory, space=None):
    """Current items as the log writes them."""
    found = {}
    for item in memory.get_all(limit=10_000, space=space):
        found[item.id] = (
            item.kind, item.text, item.speaker, item.session, item.position, item.data,
            item.metadata, micros(item.valid_from, ""), micros(item.valid_to, ""), item.strength,
            item.uses, micros(item.used_at, ""),
        )  # fmt: skip
    return found


def logged(state):
    return tuple(
        state[name]
        for name in (
            "kind", "text", "speaker", "session", "position", "data", "metadata", "valid_from",
            "valid_to", "strength", "uses", "used_at",
        )
    )  # fmt: skip


def log(memory, space=None):
    with memory.reading(space=space) as view:
        return view.events()


@pytest.fixture
def fault():
    with failing() as armed:
        yield armed


@pytest.mark.parametrize("name", NAMES)
def test_i1_a_failure_at_any_statement_leaves_before_or_after(tmp_path, name, fault):
    start = tmp_path / "start.db"
    with make(start, name) as memory:
        memory.add(messages("monday"), session="monday", when=DAYS["monday"])
        memory.summarise("monday")
        before = states(memory), len(log(memory))
    with make(tmp_path / "whole.db", name) as memory:
        pass
    shutil.copy(start, tmp_path / "whole.db")
    with make(tmp_path / "whole.db", name) as memory:
        memory.add(messages("friday"), session="friday", when=DAYS["friday"])
        after = states(memory), len(log(memory))
    assert before != after
    step = 1 if name == "hybrid" else 7
    outcomes = set()
    for number, fault.after in itertools.product(range(0, 10_000, step), (False, True)):
        path = tmp_path / "failed.db"
        for suffix in ("", "-wal", "-shm"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)
        shutil.copy(start, path)
        memory = make(path, name)
        fault.left = number
        try:
            memory.add(messages("friday"), session="friday", when=DAYS["friday"])
            finished = True
        except PowerCut:
            finished = False
        fault.left = None
        memory.close()
        with make(path, name) as again:
            state = states(again), len(log(again))
            assert not again.store.damage()
            if state == before:
                assert not finished, "an acknowledged write was lost"
                # Nothing stands in the way of doing it once more.
                again.add(messages("friday"), session="friday", when=DAYS["friday"])
                texts = [state[1] for state in states(again).values()]
                assert texts == [state[1] for state in after[0].values()]
            else:
                assert state == after
            outcomes.add((state == before, finished))
        if finished:
            break
    assert (True, False) in outcomes and any(finished for _, finished in outcomes)


@every_policy
def test_i1_the_index_is_only_a_cache(place, name):
    path = place("m")
    questions = ["where does Ann work?", "what about the bicycle?", "Miso"]
    with make(path, name) as memory:
        for question in questions:
            memory.add("An earlier life.")
            memory.search(question)  # an image exists, and follows what comes
        live(memory)
        with memory.reading() as view:
            kept = [[(h.id, h.score) for h in view.search(q, 20)] for q in questions]
    with make(path, name) as again, again.reading() as view:
        fresh = [[(h.id, h.score) for h in view.search(q, 20)] for q in questions]
    for one, other in zip(kept, fresh, strict=True):
        assert [i for i, _ in one] == [i for i, _ in other]
        assert [s for _, s in one] == pytest.approx([s for _, s in other], abs=2e-3)


@every_policy
def test_i2_history_replays_to_what_is_current(place, name):
    with make(place("m"), name) as memory:
        live(memory)
        current = states(memory)
        assert {i: logged(s) for i, s in replay(log(memory)).items()} == current
        for item in current:
            assert logged(replay(memory.history(item))[item]) == current[item]
        with memory.reading() as view:
            gone = {e.id for e in view.events() if e.op == "retire"}
            assert gone and all(view.versions(item) for item in gone), "retired, not erased"


@every_policy
def test_i2_purge_takes_all_that_was_made_from_it(place, name):
    path = place("m")
    with make(path, name) as memory:
        live(memory)
        secret = "Zanzibar xylophone quarterly"
        (made, *_) = memory.add(secret, session="monday", metadata={"note": "Zanzibarish"})
        memory.update(made, secret + " amended")
        memory.summarise("monday")
        origins = {made}
        with memory.reading() as view:
            everything = [i.id for i in view.items()] + [made]
            sources = view.sources(everything)
        for _ in range(5):
            origins |= {i for i, found in sources.items() if any(s.id in origins for s in found)}
        gone = memory.purge(made)
        assert set(gone) == origins
        assert all(memory.get(item) is None for item in gone)
        tombstones = [e for e in memory.history(made) if e.op == "purge"]
        assert len(tombstones) == 1
        assert all(e.before is None for e in memory.history(made))
        for file in place.files():
            content = file.read_bytes()
            for word in (b"Zanzibar", b"xylophone quarterly", b"zanzibar"):
                assert word not in content, f"{word!r} is still in {file.name}"


@every_policy
def test_i3_as_of_equals_a_replay_of_the_log(place, name):
    with make(place("m"), name) as memory:
        live(memory)
        events = log(memory)
        times = sorted({event.time for event in events})
        for recorded in times:
            known = replay([e for e in events if e.time <= recorded])
            for valid in (recorded, DAYS["monday"], DAYS["friday"] + timedelta(days=1)):
                at = micros(valid, "valid")
                want = {
                    (item, state["text"])
                    for item, state in known.items()
                    if (state["valid_from"] is None or state["valid_from"] <= at)
                    and (state["valid_to"] is None or state["valid_to"] > at)
                }
                got = memory.as_of(valid, recorded)
                assert {(item.id, item.text) for item in got} == want


@every_policy
@pytest.mark.parametrize("count", [words, nbytes], ids=["words", "bytes"])
def test_i4_the_context_stays_within_its_budget(place, name, count):
    with make(place("m"), name) as memory:
        live(memory)
        used = set()
        for budget in (0, 1, 7, 40, 150, 1000, 5000):
            try:
                context = memory.context("What about Miso and the bicycle?", budget, count=count)
            except ValueError as error:
                # A policy may need a least budget; then it says how much.
                assert any(char.isdigit() for char in str(error)) and budget < 1000
                continue
            assert count(context.text) <= budget
            assert context.used == count(context.text)
            used.add(context.used)
        assert max(used) > 0


@every_policy
def test_i5_the_same_input_twice_is_one_memory_and_a_touch(place, name):
    with make(place("m"), name) as memory:
        first = memory.add("The door code is 4711.")
        count, length = memory.stats()["memories"], len(log(memory))
        again = memory.add("The door  code is 4711.")
        assert memory.stats()["memories"] == count
        assert set(again) <= set(first)
        more = log(memory)[length:]
        assert more and {event.op for event in more} == {"touch"}


@every_policy
def test_i5_what_was_handed_out_is_not_stored_again(place, name):
    with make(place("m"), name) as memory:
        memory.add(messages("monday"), session="monday", when=DAYS["monday"])
        with memory.reading() as view:
            text = "\n".join(
                Policy().compose(view, "Where does Ann work?", 500, words).text.split("\n")
            )
        assert text
        before = {i: s[1] for i, s in states(memory).items()}
        memory.add(text)
        memory.add({"role": "assistant", "content": text}, session="monday")
        assert {i: s[1] for i, s in states(memory).items()} == before


@every_policy
def test_i6_same_inputs_and_clock_give_the_same_export(place, tmp_path, name):
    digests = set()
    for number in range(2):
        with make(place(str(number)), name) as memory:
            live(memory)
            digests.add(memory.export(tmp_path / f"{number}.jsonl")["digest"])
    assert len(digests) == 1


@every_policy
def test_i6_an_export_comes_back_whole(place, tmp_path, name):
    with make(place("a"), name) as memory:
        live(memory)
        counts = memory.export(tmp_path / "a.jsonl")
        kept, events = states(memory), log(memory)
    with make(place("b"), name) as other:
        other.import_(tmp_path / "a.jsonl")
        assert other.export(tmp_path / "b.jsonl") == counts
        assert states(other) == kept and log(other) == events
        other.import_(tmp_path / "a.jsonl")
        assert other.export(tmp_path / "c.jsonl") == counts


@every_policy
def test_i7_no_space_sees_another(place, name):
    ann, bob = Space(user="ann"), Space(tenant="t", user="ann")
    with make(place("m"), name) as memory:
        live(memory, ann)
        assert not memory.get_all(space=bob) and not memory.search("Miso", space=bob)
        assert memory.context("Miso", 1000, space=bob).ids == ()
        live(memory, bob)
        theirs = {item.id for item in memory.get_all(space=bob, limit=1000)}
        mine = {item.id for item in memory.get_all(space=ann, limit=1000)}
        assert mine and theirs and not mine & theirs
        for space, own, other in ((ann, mine, theirs), (bob, theirs, mine)):
            assert {h.id for h in memory.search("Ann Acme Miso", space=space, limit=50)} <= own
            assert set(memory.context("Ann Acme Miso", 500, space=space).ids) <= own
            assert {i.id for i in memory.as_of(space=space)} <= own
            for item in other:
                assert memory.get(item, space=space) is None
                assert memory.history(item, space=space) == []
                for act in (memory.delete, memory.purge):
                    with pytest.raises(ValueError, match="cannot"):
                        act(item, space=space)
                with pytest.raises(ValueError, match="cannot update"):
                    memory.update(item, "mine now", space=space)


@every_policy
def test_i8_reads_write_only_touches_and_only_if_the_policy_says_so(place, name):
    with make(place("m"), name) as memory:
        live(memory)
        before = log(memory)
        memory.search("Where does Ann work?")
        memory.context("What about the bicycle?", 200)
        memory.get_all()
        memory.as_of()
        more = log(memory)[len(before) :]
        if type(memory.policy).recalled is Policy.recalled:
            assert not more
        else:
            assert {event.op for event in more} <= {"touch"}


@every_policy
def test_traits_say_what_the_policy_does(place, name):
    with make(place("m"), name) as memory:
        memory.add(messages("monday"), session="monday", when=DAYS["monday"])
        memory.summarise("monday")
        retired = [e for e in log(memory) if e.op == "retire"]
        memory.forget(datetime(2034, 1, 1, tzinfo=UTC))
        forgotten = [e for e in log(memory) if e.op == "retire"][len(retired) :]
        if not memory.policy.traits.forgets:
            assert not forgotten
        assert not memory.policy.traits.needs_llm, "made by name, it has to work without"


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(
        st.tuples(st.sampled_from(SPACES), st.sampled_from(DEEDS), st.integers(0, 5)), max_size=25
    )
)
def test_i7_whatever_is_done_spaces_stay_apart(steps):
    with Memory(":memory:", embedder=Hash(16), clock=Clock()) as memory:
        stay_apart(memory, steps)
