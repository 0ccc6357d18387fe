"""SALM (158): events, lasting facts and know-how in stores of their own, weighed by feedback.

Keeps    what each of three policies keeps: episodes, semantic memories, procedures; nine weights.
Form     the memories of the three, told apart by their kind; the weights are one item, not found.
Bytes    those of the three policies + about 200 for the weights of a space.
Source   Z. He et al., "Human-inspired Perspectives: A Survey on AI Long-term Memory", 2024.
Departs  the survey draws a framework, the algorithm is ours: rules route what is written; each
         weight moves by a factor when feedback concerns a decision that it took part in; every
         store's best memory stays among the hits, so that none falls silent and learns no more.
"""

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from holdfast.errors import UsageError
from holdfast.longterm.language import dates
from holdfast.longterm.language.extract import Fact
from holdfast.longterm.language.llm import Rules
from holdfast.longterm.language.wording import content
from holdfast.longterm.parts import Part, split
from holdfast.longterm.policy import TYPES, Policy, Traits, find
from holdfast.longterm.records import (
    Add,
    Change,
    Hit,
    Item,
    Retire,
    Source,
    Touch,
    Turn,
    text_hash,
)

if TYPE_CHECKING:
    from holdfast.longterm.store.view import View

STORES = EPISODIC, SEMANTIC, PROCEDURAL = TYPES
ADAPTERS = ("storage", "retrieval", "forgetting")
BOUND = 4.0  # weights stay within 1/BOUND and BOUND
# A route is contested where the second store's cues are at least 1/CONTESTED of the first's.
CONTESTED = 2.0
STATE = "adaptive/weights"
PARTS = {EPISODIC: "", SEMANTIC: SEMANTIC, PROCEDURAL: PROCEDURAL}
NAMES = (SEMANTIC, PROCEDURAL, "adaptive")
ACTION, PROCEDURE = "action", "procedure"
SUPPORTS = 3  # episodes that say the same, or hold the same actions, before it is promoted
MOST = 0.5  # of a turn's words in stable facts; of one that says more, the rest would be lost
LONGEST = 8  # actions of a procedure
# Relations that say what somebody is like rather than what happened once.
STABLE = {
    "likes", "loves", "dislikes", "prefers", "lives_in", "works_at", "works_as", "studies", "plays",
    "speaks", "from", "married_to", "birthday", "name", "has", "is", "owns",
}  # fmt: skip
_HOW = re.compile(
    r"\bhow to\b|\bin order to\b|\bstep \d|\bmake sure\b|\bfirst\b.+\bthen\b|^\s*1[.)] |"
    r"\b(?:always|never) (?:run|use|press|check|turn|open|close|put|add|call|start)\b",
    re.I | re.M | re.S,
)
_EVENT = re.compile(
    r"\b(?:went|met|visited|happened|yesterday|today|tonight|this morning|ago|came|saw|bought|sold|"
    r"broke|won|lost|attended|celebrated|arrived)\b",
    re.I,
)

Weights = dict[str, dict[str, float]]


def cues(text: str, when: datetime | None = None, speaker: str | None = None) -> dict[str, float]:
    """How much speaks for each store: times and events, stable attributes, instructions."""
    read = Rules().facts(text, when, speaker)
    stable = [fact.text for fact in read if fact.single or fact.relation in STABLE]
    said = set(content(text))
    share = len(said & set(content(" ".join(stable)))) / max(1, len(said))
    return {
        EPISODIC: float(bool(dates.find(text, when))) + bool(_EVENT.search(text)),
        SEMANTIC: 1.5 * share if share >= MOST else 0.0,
        PROCEDURAL: 2.5 * bool(_HOW.search(text)),
    }


class SALM(Policy):
    """Route what is written to one of three policies, and weigh what they recall by feedback.

    Args:
        episodic, semantic, procedural: the three, by name or made.
        rate: a weight moves by exp(rate), or its inverse, with each feedback.
        days: after which `forget` retires what was never used, at weight 1; each use adds as many.
    """

    traits = Traits(
        types=TYPES,
        form="turns",
        processes=("encode", "consolidate", "store", "retrieve", "forget"),
        forgets=True,
        conflict="supersedes",
    )

    def __init__(
        self,
        *,
        episodic: str | Policy = "hybrid",
        semantic: str | Policy = "keep_updated",
        procedural: str | Policy = "hybrid",
        rate: float = 0.1,
        days: float = 365.0,
    ):
        if not 0 <= rate <= 1:
            raise UsageError(f"rate={rate} is outside 0..1; a weight moves by exp(rate), e.g. 0.1")
        if not days > 0:
            raise UsageError(f"days={days} is not positive; give the days that memories last")
        for name, given in zip(STORES, (episodic, semantic, procedural), strict=True):
            if given == "adaptive" or isinstance(given, SALM):
                raise UsageError(f"{name}='adaptive' would hold itself; name another policy")
        self.stores = {
            name: find(given)
            for name, given in zip(STORES, (episodic, semantic, procedural), strict=True)
        }
        self.rate, self.days = rate, days

    def weights(self, view: "View") -> Weights:
        """Store -> adapter -> weight, 1 each before any feedback."""
        for state in view.items(kind=STATE):
            return state.data["weights"]
        return {store: dict.fromkeys(ADAPTERS, 1.0) for store in STORES}

    def route(self, view: "View", turn: Turn) -> str:
        """The store that a turn belongs to."""
        if turn.kind in (ACTION, PROCEDURE):
            return EPISODIC if turn.kind == ACTION else PROCEDURAL
        weights = self.weights(view)
        scores = {
            store: cue * weights[store]["storage"]
            for store, cue in cues(turn.text, turn.when, turn.speaker).items()
        }
        best = max(STORES, key=lambda store: scores[store])
        if not scores[best]:
            return SEMANTIC if turn.kind == "fact" else EPISODIC
        return best

    def write(self, view: "View", turns: Sequence[Turn]) -> list[Change]:
        changes: list[Change] = []
        routed = [(self.route(view, turn), turn) for turn in turns]
        for store in STORES:
            own = [turn for name, turn in routed if name == store]
            if own:
                part = _part(view, store)
                changes += part.changes(self.stores[store].write(part, own))
        return changes

    def link(self, view: "View", items: Sequence[Item]) -> list[Change]:
        changes: list[Change] = []
        for store, policy in self.stores.items():
            part = _part(view, store)
            own = [part.bare(item) for item in items if _store(item.kind) == store]
            if own:
                changes += part.changes(policy.link(part, own))
        return changes

    def update(self, view: "View", item: Item, text: str) -> list[Change]:
        store = _store(item.kind)
        if store is None:
            raise UsageError(f"{item.id} holds the weights of the stores; `feedback` moves them")
        part = _part(view, store)
        return part.changes(self.stores[store].update(part, part.bare(item), text))

    def removed(self, view: "View", gone: Sequence[str], *, purged: bool) -> list[Change]:
        changes: list[Change] = []
        for store, policy in self.stores.items():
            part = _part(view, store)
            changes += part.changes(policy.removed(part, gone, purged=purged))
        return changes

    def summarise(self, view: "View", session: str | None) -> list[Change]:
        changes: list[Change] = []
        for store, policy in self.stores.items():
            part = _part(view, store)
            changes += part.changes(policy.summarise(part, session))
        return changes

    def forget(self, view: "View", at: datetime) -> list[Change]:
        """What the three forget, and what has not been used for as long as its store keeps it."""
        weights = self.weights(view)
        found: dict[str, Change] = {}
        for store, policy in self.stores.items():
            part = _part(view, store)
            for change in part.changes(policy.forget(part, at)):
                found[change.id if isinstance(change, Retire) else str(len(found))] = change
            days = self.days * weights[store]["forgetting"]
            for item in part.items():
                unused = _days(item, at)
                # What is not searched is a policy's own note, not a memory.
                if unused > days * (1 + item.uses) and view.vector(item.id) is not None:
                    found.setdefault(item.id, Retire(item.id, f"not used for {unused:.0f} days"))
        return list(found.values())

    def retrieve(self, view: "View", query: str, limit: int) -> list[Hit]:
        """Hits of the three by score within their store, its weight and its best cosine."""
        weights = self.weights(view)
        hits: list[Hit] = []
        first: list[Hit] = []
        for store, policy in self.stores.items():
            part, weight = _part(view, store), weights[store]["retrieval"]
            found = policy.retrieve(part, query, limit)
            top = max((hit.score for hit in found), default=0.0)
            # Scores say which of a store's memories is best, not whether it has anything to say.
            near = max((cosine for _, cosine in part.nearest(query, 1)), default=0.0)
            shares = [
                max(near, 0.0) * (hit.score / top if top > 0 else 1 / n)
                for n, hit in enumerate(found, 1)
            ]
            own = [
                replace(hit, kind=part.kind(hit.kind), score=weight * share,
                        terms={**hit.terms, f"{store} weight": weight})
                for hit, share in zip(found, shares, strict=True)
            ]  # fmt: skip
            hits += own
            first += own[:1]
        hits.sort(key=lambda hit: (-hit.score, hit.position))
        chosen, rest = hits[:limit], hits[limit:]
        if limit < len(STORES):
            return chosen
        for hit in first:
            if any(hit is one for one in rest):
                last = max(i for i, one in enumerate(chosen) if all(one is not f for f in first))
                del chosen[last]
                chosen.append(hit)
        return sorted(chosen, key=lambda hit: (-hit.score, hit.position))

    def recalled(self, view: "View", hits: Sequence[Hit]) -> list[Change]:
        changes: list[Change] = []
        for store, policy in self.stores.items():
            part = _part(view, store)
            mine = [hit for hit in hits if _store(hit.kind) == store]
            own = [replace(hit, kind=split(hit.kind, NAMES)[1]) for hit in mine]
            changes += part.changes(policy.recalled(part, own))
        return changes

    def feedback(self, view: "View", memory_id: str, useful: bool) -> list[Change]:
        """Weigh a hit's store by whether the hit was of use.

        Retrieval moves always; storage where the cues left the store open; forgetting where the
        memory was past half of its time.

        Raises:
            UsageError: there is no such memory.
        """
        item = view.get(memory_id)
        store = _store(item.kind) if item is not None else None
        if item is None or store is None:
            raise UsageError(
                f"feedback names {memory_id}, and there is no such memory now in space "
                f"{view.space}; pass the id of a hit"
            )
        weights = {name: dict(one) for name, one in self.weights(view).items()}
        moved = ["retrieval"]
        first, second, *_ = sorted(cues(item.text, item.valid_from, item.speaker).values())[::-1]
        if 0 < first <= CONTESTED * second:
            moved.append("storage")
        lasts = self.days * weights[store]["forgetting"] * (1 + item.uses)
        if _days(item, view.now) > lasts / 2:
            moved.append("forgetting")
        for adapter in moved:
            weight = weights[store][adapter] * math.exp(self.rate if useful else -self.rate)
            weights[store][adapter] = min(BOUND, max(1 / BOUND, weight))
        data = {"weights": weights}
        changes: list[Change] = [Touch(state.id, data=data) for state in view.items(kind=STATE)]
        changes = changes or [Add("weights", STATE, data=data, searchable=False)]
        return [*changes, Touch(memory_id)] if useful else changes

    def consolidate(self, view: "View") -> list[Change]:
        """Promote what three episodes say to a fact, actions of three sessions to a procedure."""
        episodes = _part(view, EPISODIC)
        said = [item for item in episodes.items() if item.kind != ACTION]
        found = [
            (SEMANTIC, Turn(text, kind="fact", when=when), ids)
            for text, when, ids in repeated(said)
        ]
        found += [
            (PROCEDURAL, Turn("\n".join(f"{n}. {step}" for n, step in enumerate(steps, 1)),
                              kind=PROCEDURE, when=view.now), ids)
            for steps, ids in routines(episodes.items(kind=ACTION))
        ]  # fmt: skip
        changes: list[Change] = []
        for store, turn, ids in found:
            part = _part(view, store)
            if not part.with_text(text_hash(turn.text)):
                made = self.stores[store].write(part, [turn])
                changes += part.changes(made, [Source(item) for item in ids])
        return changes


def _part(view: "View", store: str) -> Part:
    return Part(view, PARTS[store], NAMES)


def _store(kind: str) -> str | None:
    """The store that a kind is in; None for the weights."""
    name = split(kind, NAMES)[0] or EPISODIC
    return name if name in STORES else None


def repeated(items: Sequence[Item]) -> list[tuple[str, datetime | None, list[str]]]:
    """(text, since when, ids) of facts that at least `SUPPORTS` items state.

    Of what has one value at a time only the value that was stated last.
    """
    facts: dict[tuple, dict[str, Fact]] = defaultdict(dict)
    last: dict[tuple, tuple] = {}
    for item in items:
        for fact in Rules().facts(item.text, item.valid_from, item.speaker):
            slot = fact.subject.lower(), fact.relation
            key = (*slot, frozenset(content(fact.object)), fact.negated)
            facts[key].setdefault(item.id, fact)
            if fact.single:
                last[slot] = key
    return [
        (first.text, first.valid_from, list(by_item))
        for key, by_item in facts.items()
        for first in [next(iter(by_item.values()))]
        if len(by_item) >= SUPPORTS and not first.negated and last.get(key[:2], key) == key
    ]


def routines(actions: Sequence[Item]) -> list[tuple[tuple[str, ...], list[str]]]:
    """(steps, ids) of sequences of two or more actions that at least `SUPPORTS` sessions have.

    A sequence within a longer one counts only as that.
    """
    sessions: dict[str | None, list[Item]] = defaultdict(list)
    for action in actions:
        sessions[action.session].append(action)
    held: dict[tuple[str, ...], dict[str | None, list[str]]] = defaultdict(dict)
    for session, steps in sessions.items():
        for size in range(2, LONGEST + 1):
            for at in range(len(steps) - size + 1):
                some = steps[at : at + size]
                held[tuple(s.text for s in some)].setdefault(session, [s.id for s in some])
    found = [steps for steps, by in held.items() if len(by) >= SUPPORTS]
    return [
        (steps, [item for ids in held[steps].values() for item in ids])
        for steps in found
        if not any(len(other) > len(steps) and _within(steps, other) for other in found)
    ]


def _within(steps: tuple[str, ...], other: tuple[str, ...]) -> bool:
    size = len(steps)
    return any(other[i : i + size] == steps for i in range(len(other) - size + 1))


def _days(item: Item, at: datetime) -> float:
    return (at - (item.used_at or item.recorded_at)) / timedelta(days=1)
