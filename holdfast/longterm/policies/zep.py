"""Zep / Graphiti (034): a knowledge graph whose facts know when they hold and when it was known.

Keeps    episodes as they were said; entities; facts between them, past ones with their end.
Form     an entity is an item with its name; a fact is an item with its sentence, valid from and to,
         and edges `entity -relation-> fact -object-> entity`; a changed end is a new version, so
         that world time and recorded time are apart; `entity -member-> community`.
Bytes    text + 4*d + row for each episode, fact, entity and community; a row for each edge.
Source   P. Rasmussen et al., "Zep: A Temporal Knowledge Graph Architecture for Agent Memory", 2025.
Departs  one question to a model per `add`, not several; names match exactly, or as the model spells
         them; which of two facts ends follows from when they began and were said, not from which
         came in first; communities are found anew by `summarise`, not extended one entity at a
         time; episodes are found beside facts; no cross-encoder.
"""

import warnings
from collections.abc import Collection, Sequence
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING

import numpy as np

from holdfast.errors import UsageError, unknown
from holdfast.longterm.language import dates, slots
from holdfast.longterm.language.extract import Fact
from holdfast.longterm.language.llm import FallbackWarning, Rules
from holdfast.longterm.language.shapes import listing, record
from holdfast.longterm.policy import Policy, Traits
from holdfast.longterm.records import (
    Add,
    Change,
    Hit,
    Item,
    Link,
    Purge,
    Retire,
    Revise,
    Source,
)
from holdfast.longterm.retrieval import kg

if TYPE_CHECKING:
    from holdfast.longterm.store.view import View

COMMUNITY, MEMBER = "community", "member"
SILENT = (kg.ENTITY, COMMUNITY)  # kinds that lead to hits and are none
RANKS = ("rrf", "mmr", "mentions", "distance")
CONTEXT, KNOWN = 4, 20  # turns and facts that a model is shown beside new episodes
STARTS, DEPTH, BREADTH = 5, 3, 32  # hits that the graph is searched from, edges, nodes at each
LAMBDA = 0.5

_STRING, _NUMBER = {"type": "string"}, {"type": "integer"}
_DATE = {"type": ["string", "null"]}
_ANSWER = record(
    facts=listing(
        record(
            episode=_NUMBER, subject=_STRING, relation=_STRING, object=_STRING, statement=_STRING,
            valid_from=_DATE, valid_to=_DATE, negated={"type": "boolean"},
            contradicts=listing(_NUMBER),
        )
    )
)  # fmt: skip
_TASK = (
    "List the facts that the numbered episodes state about people and named things: `relation` "
    "snake_case, `statement` a sentence in the third person, names as in `known` where they mean "
    "the same, dates ISO 8601 or null, relative ones resolved against `said_at`; `contradicts`: "
    "the numbers of known facts that cannot hold together with it. `context` is only to be read."
)


class Zep(Policy):
    """Extract facts from each episode and keep straight when each of them holds.

    Args:
        single_valued: relations, besides the usual ones, that have one object at a time.
        rank: how found facts are put in order: "rrf" fuses words, vectors and the graph, "mmr"
            also avoids repetition, "mentions" prefers what episodes speak of most, "distance" what
            is near the best hit in the graph.

    Raises:
        UsageError: an unknown way to rank.
    """

    traits = Traits(
        types=("episodic", "semantic"),
        form="graph",
        processes=("encode", "consolidate", "store", "retrieve"),
        conflict="supersedes",
    )

    def __init__(self, *, single_valued: Collection[str] = (), rank: str = "rrf"):
        if rank not in RANKS:
            raise unknown("rank", rank, RANKS)
        self.single_valued, self.rank = frozenset(single_valued), rank

    def link(self, view: "View", items: Sequence[Item]) -> list[Change]:
        episodes = [item for item in items if item.kind not in (kg.FACT, kg.ENTITY, COMMUNITY)]
        if not episodes:
            return []
        graph = kg.FactGraph(view, self.single_valued)
        for episode in episodes:
            if episode.speaker:
                graph.mention(episode.id, graph.entity(episode.speaker))
        for episode, fact, contradicted in self._read(view, episodes):
            source = Source(episode.id, fact.start, fact.end)
            graph.add(fact, episode.valid_from or view.now, source, contradicted)
        return graph.changes

    def _read(
        self, view: "View", episodes: Sequence[Item]
    ) -> list[tuple[Item, Fact, Sequence[str]]]:
        """(episode, fact, ids of facts that a model holds to contradict it)."""
        asked = self._asked(view, episodes)
        if asked is not None:
            return asked
        rules = Rules()
        return [
            (episode, fact, ())
            for episode in episodes
            for fact in rules.facts(episode.text, episode.valid_from, episode.speaker)
        ]

    def _asked(
        self, view: "View", episodes: Sequence[Item]
    ) -> list[tuple[Item, Fact, Sequence[str]]] | None:
        first = episodes[0]
        before = view.items(session=first.session, newest=True, limit=CONTEXT, after=first.position)
        vectors = view.embed([episode.document for episode in episodes])
        near = [item for v in vectors for item, _ in view.nearest(v, KNOWN, kinds=(kg.FACT,))]
        known = list({item.id: item for item in near}.values())
        given = {
            "episodes": [
                {
                    "number": i,
                    "text": episode.document,
                    "said_at": (episode.valid_from or view.now).isoformat(),
                }
                for i, episode in enumerate(episodes)
            ],
            "context": [item.document for item in reversed(before) if item.kind == first.kind],
            "known": [{"number": i, "fact": item.text} for i, item in enumerate(known)],
        }
        answer = view.judgement.ask(_TASK, given, _ANSWER)
        if answer is None:
            return None
        found, wrong = [], 0
        for one in answer["facts"]:
            names = [one[name].strip() for name in ("subject", "relation", "object")]
            if not (0 <= one["episode"] < len(episodes) and all(names)):
                wrong += 1
                continue
            episode = episodes[one["episode"]]
            said = episode.valid_from or view.now
            relation = "_".join(names[1].lower().split())
            span = [
                period.lo if (period := dates.parse(one[name] or "", said)) else None
                for name in ("valid_from", "valid_to")
            ]
            fact = Fact(
                one["statement"].strip() or " ".join(names), names[0], relation, names[2],
                0, len(episode.text.encode()), span[0] or (None if span[1] else said), span[1],
                one["negated"], slots.single(relation),
            )  # fmt: skip
            valid = [known[n].id for n in one["contradicts"] if 0 <= n < len(known)]
            wrong += len(one["contradicts"]) - len(valid)
            found.append((episode, fact, valid))
        if wrong:
            warnings.warn(
                f"{wrong} parts of a model's answer name no episode or fact; they are left out",
                FallbackWarning,
                stacklevel=2,
            )
        return found

    def add_fact(
        self,
        view: "View",
        subject: str,
        relation: str,
        object: str,
        valid_from: datetime | None = None,
        valid_to: datetime | None = None,
        *,
        said: datetime | None = None,
        sentence: str | None = None,
    ) -> list[Change]:
        """The changes that state a fact; no model is asked.

        Args:
            valid_from: when it began to hold; when it was said, by default.
            said: when it was said, now by default; decides between facts that begin together.
            sentence: its text; made of the three parts by default.

        Raises:
            UsageError: an empty part, or a time without zone.
        """
        for name, text in (("subject", subject), ("relation", relation), ("object", object)):
            if not text.strip():
                raise UsageError(f"the {name} of a fact is empty; give subject, relation, object")
        for name, time in (("valid_from", valid_from), ("valid_to", valid_to), ("said", said)):
            dates.aware(time, name)
        said = said or view.now
        text = sentence or f"{subject} {relation.replace('_', ' ')} {object}"
        graph = kg.FactGraph(view, self.single_valued)
        fact = Fact(
            text, subject, relation, object, 0, 0, valid_from or said, valid_to,
            single=slots.single(relation),
        )  # fmt: skip
        graph.add(fact, said, None)
        return graph.changes

    def facts(
        self,
        view: "View",
        subject: str,
        relation: str | None = None,
        *,
        valid: datetime | None = None,
        recorded: datetime | None = None,
    ) -> list[Item]:
        """What holds of an entity at `valid`, as it was known at `recorded`; None is now."""
        name = subject.casefold()
        return [
            item
            for item in view.as_of(valid, recorded)
            if item.kind == kg.FACT
            and item.data["subject"].casefold() == name
            and relation in (None, item.data["relation"])
            and not item.data["negated"]
        ]

    def update(self, view: "View", item: Item, text: str) -> list[Change]:
        """A corrected episode loses its facts and is read anew."""
        corrected = replace(item, text=text)
        changes: list[Change] = [Revise(item.id, text=text, why="updated")]
        if item.kind in (kg.FACT, kg.ENTITY, COMMUNITY):
            return changes
        made = view.get_many(view.derived([item.id])[item.id])
        changes += [Retire(fact, f"{item.id} was corrected") for fact in made]
        graph = kg.FactGraph(view, self.single_valued, without=made)
        for episode, fact, contradicted in self._read(view, [corrected]):
            source = Source(episode.id, fact.start, fact.end)
            graph.add(fact, episode.valid_from or view.now, source, contradicted)
        return [*changes, *graph.changes]

    def removed(self, view: "View", gone: Sequence[str], *, purged: bool) -> list[Change]:
        """Facts go with their episode, entities with the last that speaks of them."""
        made = view.get_many(i for some in view.derived(gone).values() for i in some)
        changes: list[Change] = [Retire(item, "its episode was deleted") for item in made]
        for entity in view.items(kind=kg.ENTITY):
            edges = [*view.edges(src=entity.id), *view.edges(dst=entity.id)]
            if all(e.src in made or e.dst in made or e.rel == MEMBER for e in edges):
                why = "nothing speaks of it any more"
                changes.append(Purge(entity.id, why) if purged else Retire(entity.id, why))
        return changes

    def summarise(self, view: "View", session: str | None) -> list[Change]:
        """Find communities anew, each with a summary of the facts within it."""
        facts = [f for f in view.items(kind=kg.FACT) if f.valid_to is None or f.valid_to > view.now]
        ends = {f.id: _ends(view, f.id) for f in facts}
        pairs = [tuple(e) for e in ends.values() if len(e) == 2]
        groups: dict[str, list[str]] = {}
        for entity, label in kg.communities(kg.graph_of(pairs)).items():
            groups.setdefault(label, []).append(entity)
        old = {c.data["label"]: c for c in view.items(kind=COMMUNITY)}
        changes: list[Change] = []
        fresh: dict[str, tuple[list[str], list[Item]]] = {}
        for label, members in groups.items():
            inside = [f for f in facts if ends[f.id] and set(ends[f.id]) <= set(members)]
            if inside:
                fresh[label] = members, inside
        for label, community in old.items():
            now = [f.id for f in fresh.get(label, ([], []))[1]]
            if community.data["facts"] == now:
                del fresh[label]
            else:
                changes.append(Retire(community.id, "its members have changed"))
        for label, (members, inside) in fresh.items():
            made = Add(
                Rules().summarise([f.text for f in inside], 60) or inside[0].text,
                kind=COMMUNITY,
                data={"label": label, "facts": [f.id for f in inside]},
                sources=[Source(f.id) for f in inside],
            )
            changes += [made, *(Link(member, MEMBER, made) for member in members)]
        return changes

    def retrieve(self, view: "View", query: str, limit: int) -> list[Hit]:
        """Facts and episodes; past facts too, with the end of their time."""
        found = [h for h in view.search(query, 2 * limit) if h.kind not in SILENT]
        if not found:
            return []
        worded = [hit.id for hit in found if hit.terms.get("bm25")]
        starts = [hit.id for hit in found[:STARTS] if 2 * hit.score >= found[0].score]
        near = self._around(view, starts)
        beside = [i for i in view.get_many(near).values() if i.kind not in SILENT]
        alike = [i for i, _ in view.nearest(query, 2 * limit) if i.kind not in SILENT]
        hits = {hit.id: hit for hit in view.hits([(i, 0.0, {}) for i in (*beside, *alike)])}
        hits |= {hit.id: hit for hit in found}
        fused = kg.fuse([worded, [i.id for i in alike], [i.id for i in beside]])
        ranked = [
            replace(hits[i], score=fused[i])
            for i in sorted(fused, key=lambda i: (-fused[i], hits[i].position))
        ]
        if self.rank == "mmr":
            ranked = _varied(view, ranked, limit)
        elif self.rank == "mentions":
            spoken = {h.id: len(view.edges(dst=h.id, rel=kg.MENTIONS)) for h in ranked[: 2 * limit]}
            ranked.sort(key=lambda h: -spoken.get(h.id, 0))
        elif self.rank == "distance":
            ranked.sort(key=lambda h: near.get(h.id, DEPTH + 1))
        return ranked[:limit]

    def _around(self, view: "View", starts: Sequence[str]) -> dict[str, int]:
        """Distance in the graph of what lies at most `DEPTH` edges away."""
        pairs: list[tuple[str, str]] = []
        edge, seen = list(starts), set(starts)
        for _ in range(DEPTH):
            here = [
                (e.src, e.dst)
                for node in edge
                for e in (*view.edges(src=node), *view.edges(dst=node))[:BREADTH]
            ]
            pairs += here
            edge = [n for n in dict.fromkeys(end for pair in here for end in pair) if n not in seen]
            edge = edge[:BREADTH]
            seen.update(edge)
        return kg.reach(kg.graph_of(pairs, starts), starts, DEPTH)


def _ends(view: "View", fact: str) -> list[str]:
    """The entities that a fact joins."""
    subjects = [e.src for e in view.edges(dst=fact) if e.rel != kg.MENTIONS]
    return [*subjects, *(e.dst for e in view.edges(src=fact, rel=kg.OBJECT))]


def _varied(view: "View", hits: Sequence[Hit], limit: int) -> list[Hit]:
    """Maximal marginal relevance: half the score, half the distance from what was taken."""
    best = max(hit.score for hit in hits)
    vectors = {hit.id: view.vector(hit.id) for hit in hits}
    taken: list[Hit] = []
    rest = list(hits)
    while rest and len(taken) < limit:

        def gain(hit: Hit) -> float:
            near = [float(np.dot(vectors[hit.id], vectors[t.id])) for t in taken]  # type: ignore
            return LAMBDA * hit.score / best - (1 - LAMBDA) * max(near, default=0.0)

        taken.append(max(rest, key=gain))
        rest.remove(taken[-1])
    return taken
