"""MemoryBank (136): memories fade as people's do, unless they are recalled.

Keeps    turns with a strength and the time of their last recall; a summary for each day, one of all
         days, and a portrait of whom is spoken to.
Form     text; strength and time are columns of every memory.
Bytes    text + 4d for each vector + 12 for strength and time.
Source   W. Zhong et al., "MemoryBank: Enhancing Large Language Models with Long-Term Memory", 2023;
         authors' code read.
Departs  retention is exp(-days / (tau * strength)): the authors' code divides by a constant and
         then multiplies by the strength, so that strong memories fade faster. What is forgotten is
         retired, not erased, and forgetting by chance is seeded.
"""

import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, time, timedelta

from holdfast.errors import UsageError, unknown
from holdfast.longterm.budget import Context, pack
from holdfast.longterm.policy import Policy, Traits
from holdfast.longterm.records import Add, Change, Hit, Item, Retire, Revise, Source, Touch
from holdfast.longterm.store.view import View

_MODES = ("threshold", "sample")
_MADE = ("overview", "portrait")
# Relations that say what somebody is like rather than what happened once.
_TRAITS = (
    "likes", "dislikes", "prefers", "lives_in", "works_at", "works_as", "studies", "plays",
    "speaks", "from", "married_to", "birthday", "name",
)  # fmt: skip


class MemoryBank(Policy):
    """Recall strengthens, time weakens; `forget` retires what is too weak.

    Args:
        tau: days after which a memory of strength 1 that was never recalled is retained by 1/e.
        theta: retention below which `forget` retires a memory.
        mode: "threshold", or "sample": retire with probability 1 - retention.
        k: memories in a context.
        seed: of mode "sample".
        summary: words of a day's summary, of the overview and of the portrait, each.
    """

    traits = Traits(
        types=("episodic", "semantic"),
        form="turns",
        processes=("encode", "consolidate", "store", "retrieve", "forget"),
        forgets=True,
    )

    def __init__(
        self,
        *,
        tau: float = 1.0,
        theta: float = 0.05,
        mode: str = "threshold",
        k: int = 6,
        seed: int = 0,
        summary: int = 60,
    ):
        if not tau > 0:
            raise UsageError(f"tau={tau} is not positive; it is a number of days, by default 1")
        if not 0 < theta < 1:
            raise UsageError(f"theta={theta} is outside (0, 1); it is a retention, by default 0.05")
        if mode not in _MODES:
            raise unknown("mode of forgetting", mode, _MODES)
        if k < 1 or summary < 1:
            raise UsageError(f"k={k} and summary={summary} must be at least 1")
        self.tau, self.theta, self.mode = tau, theta, mode
        self.k, self.seed, self.summary = k, seed, summary

    def retention(self, strength: float, days: float) -> float:
        """exp(-days / (tau * strength))."""
        return math.exp(-days / (self.tau * strength))

    def forget(self, view: View, at: datetime) -> list[Change]:
        """Retire what has faded by `at`.

        Raises:
            UsageError: `at` lies before a memory's last recall.
        """
        changes: list[Change] = []
        for item in view.items():
            if item.kind in (*_MADE, "day"):
                continue
            retention = self.retention(item.strength, _days(item, at))
            limit = self.theta if self.mode == "threshold" else self._chance(item, at)
            if retention < limit:
                changes.append(Retire(item.id, f"retention {retention:.4f}"))
        return changes

    def _chance(self, item: Item, at: datetime) -> float:
        text = f"{self.seed}\x1f{item.id}\x1f{at.isoformat()}".encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") / 2**64

    def recalled(self, view: View, hits: Sequence[Hit]) -> list[Change]:
        items = view.get_many(hit.id for hit in hits if hit.kind not in _MADE)
        for item in items.values():
            _days(item, view.now)
        return [Touch(item.id, strength=item.strength + 1) for item in items.values()]

    def summarise(self, view: View, session: str | None) -> list[Change]:
        """Summaries of the days that have none yet, then the overview and the portrait."""
        days: dict[datetime, list[Item]] = defaultdict(list)
        for item in view.items(kind="turn"):
            when = item.valid_from or item.recorded_at
            days[datetime.combine(when.date(), time(), UTC)].append(item)
        known = {item.valid_from: item for item in view.items(kind="day")}
        changes: list[Change] = []
        dailies: dict[datetime, str] = {d: i.text for d, i in known.items() if d is not None}
        for day, turns in sorted(days.items()):
            text = view.judgement.summarise([t.document for t in turns], self.summary)
            if not text or dailies.get(day) == text:
                continue
            dailies[day] = text
            sources = [Source(turn.id) for turn in turns]
            if day in known:
                changes.append(
                    Revise(known[day].id, text=text, sources=sources, why="the day went on")
                )
            else:
                end = day + timedelta(days=1)
                changes.append(
                    Add(text, "day", valid_from=day, data={"until": end.isoformat()},
                        sources=sources)
                )  # fmt: skip
        if not changes:
            return []
        texts = [text for _, text in sorted(dailies.items())]
        turns = [turn for _, some in sorted(days.items()) for turn in some]
        sources = [Source(turn.id) for turn in turns]
        overview = view.judgement.summarise(texts, self.summary)
        portrait = self._portrait(view, turns)
        for kind, text in (("overview", overview), ("portrait", portrait)):
            if not text:
                continue
            old = view.items(kind=kind)
            # A new one each time, so that it is made from what it says it is made from.
            changes += [Retire(item.id, "renewed") for item in old if item.text != text]
            if all(item.text != text for item in old):
                changes.append(Add(text, kind, sources=sources, searchable=False))
        return changes

    def _portrait(self, view: View, turns: Sequence[Item]) -> str:
        found: dict[str, None] = {}
        for turn in turns:
            for fact in view.judgement.facts(turn.text, turn.valid_from, turn.speaker):
                if fact.relation in _TRAITS and not fact.negated:
                    found[fact.text] = None
        return view.judgement.summarise(list(found), self.summary) if found else ""

    def compose(self, view: View, query: str, budget: int, count: Callable[[str], int]) -> Context:
        made = [(item, 0.0, {}) for kind in reversed(_MADE) for item in view.items(kind=kind)]
        hits = self.retrieve(view, query, self.k)
        return pack(hits, budget, count, first=view.hits(made), chronological=True)


def _days(item: Item, at: datetime) -> float:
    """Days since a memory was last recalled or, if never, stored."""
    last = item.used_at or item.recorded_at
    days = (at - last) / timedelta(days=1)
    if days < 0:
        raise UsageError(
            f"the clock runs backwards: {item.id} was last recalled at {last}, now it is {at}; "
            "pass a later time"
        )
    return days
