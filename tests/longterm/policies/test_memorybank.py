import math
from datetime import UTC, datetime, timedelta

import pytest

from holdfast.errors import UsageError
from holdfast.longterm.budget import words
from holdfast.longterm.memory import Memory
from holdfast.longterm.policies.memorybank import MemoryBank
from holdfast.longterm.records import Add
from holdfast.longterm.retrieval.embed import Hash
from tests.longterm.conftest import START, Clock
from tests.longterm.world import DAYS, messages


class Still:
    """A clock that tests set."""

    time = START

    def __call__(self):
        return self.time


@pytest.fixture
def clock():
    return Still()


def bank(clock, **options):
    return Memory(":memory:", embedder=Hash(32), policy=MemoryBank(**options), clock=clock)


def test_retention_by_hand():
    policy = MemoryBank(tau=2.0)
    assert policy.retention(1, 2) == pytest.approx(math.exp(-1))
    values = [policy.retention(strength, 3) for strength in (1, 2, 3)]
    assert values == sorted(values) and len(set(values)) == 3, "stronger memories fade slower"
    values = [policy.retention(2, days) for days in (0, 1, 5)]
    assert values == sorted(values, reverse=True) and values[0] == 1


def test_a_memory_is_forgotten_at_the_second(clock):
    theta, tau = 0.05, 1.0
    seconds = -tau * math.log(theta) * 86_400
    with bank(clock, theta=theta, tau=tau) as memory:
        memory.add("Ann likes tea.")
        early, late = (START + timedelta(seconds=seconds + d) for d in (-1, 1))
        assert memory.forget(early) == []
        assert len(memory.forget(late, dry_run=True)) == 1 and memory.get_all()
        (change,) = memory.forget(late)
        assert memory.get_all() == [] and memory.search("tea") == []
        ops = [event.op for event in memory.history(change.id)]
        assert ops == ["add", "retire"]


def test_recall_strengthens_what_was_returned_and_nothing_else(clock):
    with bank(clock, k=1) as memory:
        tea, _ = memory.add(["Ann likes tea.", "Ben has a boat."])
        clock.time += timedelta(days=2)
        assert [hit.id for hit in memory.search("tea", limit=1)] == [tea]
        items = {item.text: (item.strength, item.used_at) for item in memory.get_all()}
        assert items == {"Ann likes tea.": (2.0, clock.time), "Ben has a boat.": (1.0, None)}
        # -ln .05 = 3.0 days for strength 1, 6.0 from the recall for strength 2
        assert len(memory.forget(START + timedelta(days=3.1))) == 1
        assert memory.forget(START + timedelta(days=7.9)) == []
        assert len(memory.forget(START + timedelta(days=8.1))) == 1


def test_forgetting_by_chance_keeps_its_share_and_its_seed(clock):
    count = 10_000
    at = START + timedelta(days=0.7)
    kept = {}
    with bank(clock, mode="sample", seed=1) as memory:
        memory.transact(lambda view: [Add(f"fact {i}", searchable=False) for i in range(count)])
        for seed in (1, 1, 2):
            memory.policy.seed = seed
            gone = {change.id for change in memory.forget(at, dry_run=True)}
            kept.setdefault(seed, set()).add(frozenset(gone))
    assert len(kept[1]) == 1 and kept[1] != kept[2]
    share = math.exp(-0.7)
    sigma = math.sqrt(count * share * (1 - share))
    for (gone,) in kept.values():
        assert abs(count - len(gone) - count * share) <= 3 * sigma


def test_days_are_summed_up_and_portrayed():
    with Memory(
        ":memory:", embedder=Hash(32), policy=MemoryBank(summary=12), clock=Clock()
    ) as memory:
        for session in ("monday", "friday"):
            memory.add(messages(session), session=session, when=DAYS[session])
            memory.summarise(session)
        days = memory.get_all(kind="day")
        assert [item.valid_from.date() for item in days] == [d.date() for d in DAYS.values()]
        (overview,), (portrait,) = (memory.get_all(kind=k) for k in ("overview", "portrait"))
        for item in (*days, overview, portrait):
            assert len(item.text.split()) <= 12
        with memory.reading() as view:
            sources = view.sources([portrait.id])[portrait.id]
            turns = {item.id for item in view.items(kind="turn")}
        assert sources and {source.id for source in sources} == turns
        again = memory.stats()["events"]
        memory.summarise()
        assert memory.stats()["events"] == again, "nothing new happened"
        context = memory.context("What about Miso?", 200)
        assert context.ids[:2] == (portrait.id, overview.id) and words(context.text) <= 200
        dates = [row.split(" ")[2] for row in context.text.split("\n")[2:]]
        assert dates == sorted(dates) and len(context.ids) <= 2 + 6


def test_what_it_refuses(clock):
    for options, message in (
        ({"theta": 1.0}, r"theta=1\.0 is outside \(0, 1\)"),
        ({"theta": 0.0}, r"theta=0\.0 is outside"),
        ({"tau": 0}, "tau=0 is not positive"),
        ({"mode": "dice"}, "unknown mode of forgetting 'dice'"),
        ({"k": 0}, "k=0"),
    ):
        with pytest.raises(UsageError, match=message):
            MemoryBank(**options)
    with bank(clock) as memory:
        memory.add("Ann likes tea.")
        with pytest.raises(UsageError, match="clock runs backwards"):
            memory.forget(datetime(2023, 1, 1, tzinfo=UTC))
