"""Plan-on-Graph (067): explore a knowledge graph, and turn back where a path was the wrong one.

Keeps    for one question: its objectives and what is known of each, every path walked so far.
Form     a path is a chain of triples of the graph that begins at the topic; the graph is the facts
         of a memory, or any triples.
Bytes    24 for each triple of each path; the graph's own are not counted.
Source   L. Chen et al., "Plan-on-Graph: Self-Correcting Adaptive Planning of Large Language Model
         on Knowledge Graphs", 2024; authors' code read.
Departs  replies are JSON by schema; what is known of each objective and whether that suffices is
         one call, not two; depth bounds the length of a path, and a turn back does not use it up;
         of too many entities those nearest by embedding stay, none by chance.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from holdfast.errors import UsageError, unknown
from holdfast.longterm.ground import NOT_IN_MEMORY
from holdfast.longterm.language.llm import LLM, Prompted
from holdfast.longterm.language.shapes import listing, record
from holdfast.longterm.language.wording import content
from holdfast.longterm.retrieval import kg as facts
from holdfast.longterm.retrieval.embed import Embedder, Hash

if TYPE_CHECKING:
    from holdfast.longterm.memory import Memory, SpaceLike

DEPTH, WIDTH, REVERSALS, CALLS = 4, 70, 5, 100
NEAR = 0.8  # of the best cosine, from which rules follow a relation

_STRING, _NUMBERS = {"type": "string"}, listing({"type": "integer"})
_OBJECTIVES = record(objectives=listing(_STRING))
_CHOSEN = record(chosen=_NUMBERS)
_ANSWER = record(answer=listing(_STRING))
_REASONED = record(known=listing(_STRING), sufficient={"type": "boolean"}, answer=listing(_STRING))
_SPLIT = (
    "Split the question into the few objectives that have to be met in turn, from the topic on."
)
_RELATIONS = (
    "Choose the numbers of the relations that lead from the entity towards the objectives; as many "
    "as are relevant, none if none is. `out` tells whether the entity is the head of the triple."
)
_ENTITIES = "Choose the numbers of the entities that may meet the objectives."
_REASON = (
    "From the paths alone: what is known of each objective (one text each), whether that suffices "
    "to answer the question, and the answer as a list of entities."
)
_REFLECT = (
    "The paths do not suffice. Is it necessary to go on from entities that were reached before? "
    "Choose the numbers of these, none if going on from the latest is right."
)
_GUESS = "No path answers the question. Answer it from what you know, as a list of entities."
_BETWEEN = re.compile(r"\b(?:of|by|from|in|at|for|to|that|which)\b|['’]s\b|,", re.I)


class KG(Protocol):
    """A graph that can be walked; `out` is whether the entity is the head of the triple."""

    def relations(self, entity: str, out: bool) -> Sequence[str]: ...

    def neighbours(self, entity: str, relation: str, out: bool) -> Sequence[str]: ...

    def entities(self) -> Collection[str]: ...


class TripleGraph:
    """A `KG` of triples in RAM."""

    def __init__(self, triples: Iterable[tuple[str, str, str]]):
        near: dict[tuple[str, bool], dict[str, dict[str, None]]] = defaultdict(dict)
        self._entities: dict[str, None] = {}
        for head, relation, tail in triples:
            near[head, True].setdefault(relation, {})[tail] = None
            near[tail, False].setdefault(relation, {})[head] = None
            self._entities[head] = self._entities[tail] = None
        self._near = dict(near)

    @classmethod
    def from_store(cls, memory: "Memory", space: "SpaceLike" = None) -> "TripleGraph":
        """The facts of a memory that hold now."""
        with memory.reading(space=memory.space if space is None else space) as view:
            return cls(
                (item.data["subject"], item.data["relation"], item.data["object"])
                for item in view.items(kind=facts.FACT)
                if not item.data["negated"]
                and (item.valid_from is None or item.valid_from <= view.now)
                and (item.valid_to is None or view.now < item.valid_to)
            )

    def relations(self, entity: str, out: bool) -> list[str]:
        return list(self._near.get((entity, out), ()))

    def neighbours(self, entity: str, relation: str, out: bool) -> list[str]:
        return list(self._near.get((entity, out), {}).get(relation, ()))

    def entities(self) -> Collection[str]:
        return self._entities.keys()


@dataclass(frozen=True)
class Hop:
    """A triple of the graph; `out` if it was walked from head to tail."""

    head: str
    relation: str
    tail: str
    out: bool

    @property
    def end(self) -> str:
        return self.tail if self.out else self.head


Path = tuple[Hop, ...]


@dataclass(frozen=True)
class Answer:
    """What was found: entities, joined by commas, and the paths that lead to them.

    Attributes:
        calls: of the model.
        sufficient: the paths were judged to answer the question; else `text` is a guess.
    """

    text: str
    paths: tuple[Path, ...]
    calls: int
    sufficient: bool


class PlanOnGraph:
    """Answers questions by walking a graph from a topic; by rules without a model.

    Args:
        embedder: compares relations and entities with objectives; default: hashes of words.
        depth: triples in a path.
        width: entities of one relation that a model is shown.
        reversals: how often earlier entities may be taken up again; 0 never turns back.
        calls: of the model for one question, at most.
        noise: relations that are never followed.

    Raises:
        UsageError: a limit that allows nothing.
    """

    def __init__(
        self,
        kg: KG,
        llm: LLM | None = None,
        *,
        embedder: Embedder | None = None,
        depth: int = DEPTH,
        width: int = WIDTH,
        reversals: int = REVERSALS,
        calls: int = CALLS,
        noise: Collection[str] = (),
    ):
        if depth < 1 or width < 1 or reversals < 0 or calls < 3:
            raise UsageError(
                f"depth={depth} and width={width} must be at least 1, reversals={reversals} at "
                f"least 0, calls={calls} at least 3: to plan, to judge and to answer"
            )
        self.kg, self.llm, self.embedder = kg, llm, embedder or Hash()
        self.depth, self.width, self.reversals, self.calls = depth, width, reversals, calls
        self.noise = frozenset(noise)

    def answer(self, question: str, topic: str) -> Answer:
        """Explore from a topic until what was found suffices.

        Raises:
            UsageError: the graph has no such topic, or the question is empty.
        """
        if not question.strip():
            raise UsageError("the question is empty; ask for something")
        if topic not in self.kg.entities():
            raise unknown("topic entity", topic, self.kg.entities())
        judge = _Rules(self.embedder) if self.llm is None else _Asked(self.llm, self.embedder)
        walk = _Walk(question, topic, judge.objectives(question, topic))
        frontier: list[Path] = [()]
        turned = 0
        while frontier:
            new = self._explored(walk, frontier, judge)
            walk.paths.update(dict.fromkeys(new))
            sufficient, answer = judge.reasoned(walk)
            if sufficient:
                return Answer(", ".join(answer), walk.to(answer), judge.calls, True)
            if judge.calls >= self.calls - 1:
                break
            back = judge.earlier(walk) if turned < self.reversals else []
            turned += bool(back)
            if not new and not back:
                text = ", ".join(answer) or NOT_IN_MEMORY
                return Answer(text, walk.to(answer), judge.calls, False)
            if judge.calls >= self.calls - 1:
                break
            frontier = [path for path in dict.fromkeys([*new, *back]) if len(path) < self.depth]
        return Answer(", ".join(judge.guess(question)) or NOT_IN_MEMORY, (), judge.calls, False)

    def _explored(self, walk: "_Walk", frontier: Sequence[Path], judge: "_Rules") -> list[Path]:
        """Paths that are one triple longer, as far as they are new."""
        found: dict[Path, None] = {}
        for path in frontier:
            if self._spent(judge):
                break
            options = [
                (relation, out)
                for out in (True, False)
                for relation in self.kg.relations(walk.end(path), out)
                if relation not in self.noise and self._onward(walk, path, relation, out)
            ]
            for relation, out in judge.relations(walk, path, options):
                for other in self._chosen(walk, path, relation, out, judge):
                    head, tail = (walk.end(path), other) if out else (other, walk.end(path))
                    longer = (*path, Hop(head, relation, tail, out))
                    if longer not in walk.paths:
                        found[longer] = None
        return list(found)

    def _spent(self, judge: "_Rules") -> bool:
        """Whether what is left is needed to judge what was found, and to guess."""
        return judge.calls >= self.calls - 2

    def _onward(self, walk: "_Walk", path: Path, relation: str, out: bool) -> list[str]:
        """Neighbours, without the one that the path has come from."""
        near = list(self.kg.neighbours(walk.end(path), relation, out))
        if path and (relation, out) == (path[-1].relation, not path[-1].out):
            before = walk.end(path[:-1])
            near = [other for other in near if other != before]
        return near

    def _chosen(
        self, walk: "_Walk", path: Path, relation: str, out: bool, judge: "_Rules"
    ) -> Sequence[str]:
        near = self._onward(walk, path, relation, out)
        if len(near) > self.width:
            near = judge.nearest(walk.open(path), near, self.width)
        # What has no relations of its own is a value: nothing goes on from it.
        values = not any(self.kg.relations(other, True) for other in near)
        if len(near) <= 1 or values or self._spent(judge):
            return near
        return judge.entities(walk, path, relation, near)


@dataclass
class _Walk:
    """The memory of one question: its objectives, what is known of them, and all paths."""

    question: str
    topic: str
    objectives: list[str]
    known: list[str] = field(default_factory=list)
    paths: dict[Path, None] = field(default_factory=dict)

    def end(self, path: Path) -> str:
        return path[-1].end if path else self.topic

    def open(self, path: Path) -> str:
        """The objective that a path has to meet next."""
        return self.objectives[min(len(path), len(self.objectives) - 1)]

    def to(self, ends: Collection[str]) -> tuple[Path, ...]:
        return tuple(path for path in self.paths if self.end(path) in ends)


class _Rules:
    """Decides by likeness: each objective in turn, by the relations that are named most like it."""

    def __init__(self, embedder: Embedder):
        self.calls, self._embedder = 0, embedder

    def objectives(self, question: str, topic: str) -> list[str]:
        """The phrases of a question, those next to the topic first."""
        at = question.lower().find(topic.lower())
        parts = [" ".join(content(part)) for part in _BETWEEN.split(question.replace(topic, " "))]
        parts = [part for part in parts if part]
        first = at >= 0 and at < len(question) / 2
        return (parts if first else parts[::-1]) or [question]

    def relations(
        self, walk: _Walk, path: Path, options: Sequence[tuple[str, bool]]
    ) -> list[tuple[str, bool]]:
        if not options or len(path) >= len(walk.objectives):
            return []
        cosines = self._cosines(walk.open(path), [relation for relation, _ in options])
        best = max(cosines)
        return [o for o, c in zip(options, cosines, strict=True) if c >= NEAR * best and c > 0]

    def entities(
        self, walk: _Walk, path: Path, relation: str, near: Sequence[str]
    ) -> Sequence[str]:
        return near

    def nearest(self, objective: str, near: Sequence[str], width: int) -> list[str]:
        """Those most like the objective, in their own order."""
        cosines = self._cosines(objective, near)
        best = sorted(range(len(near)), key=lambda i: (-cosines[i], i))[:width]
        return [near[i] for i in sorted(best)]

    def _cosines(self, objective: str, names: Sequence[str]) -> list[float]:
        texts = [" ".join(content(name.replace("_", " "))) or name for name in names]
        vectors = self._embedder.encode([objective, *texts])
        return [float(cosine) for cosine in vectors[1:] @ vectors[0]]

    def reasoned(self, walk: _Walk) -> tuple[bool, list[str]]:
        whole = [path for path in walk.paths if len(path) == len(walk.objectives)]
        return bool(whole), list(dict.fromkeys(walk.end(path) for path in whole))

    def earlier(self, walk: _Walk) -> list[Path]:
        return []

    def guess(self, question: str) -> list[str]:
        return []


class _Asked(_Rules):
    """Decides by a model; by the rules where its reply cannot be used, with a warning."""

    def __init__(self, llm: LLM, embedder: Embedder):
        super().__init__(embedder)
        self._judgement = Prompted(llm)

    def _ask(self, task: str, given: Mapping[str, Any], schema: Mapping[str, Any]) -> Any:
        self.calls += 1
        return self._judgement.ask(task, given, schema)

    def _choose(self, task: str, given: Mapping[str, Any], options: Sequence[Any]) -> Any:
        """The options that a model names, in its order; None without a usable reply."""
        reply = self._ask(task, given, _CHOSEN)
        if reply is None:
            return None
        return [options[n] for n in dict.fromkeys(reply["chosen"]) if 0 <= n < len(options)]

    def objectives(self, question: str, topic: str) -> list[str]:
        reply = self._ask(_SPLIT, {"question": question, "topic": topic}, _OBJECTIVES)
        split = [one for one in reply["objectives"] if one.strip()] if reply else []
        return split or super().objectives(question, topic)

    def relations(
        self, walk: _Walk, path: Path, options: Sequence[tuple[str, bool]]
    ) -> list[tuple[str, bool]]:
        if not options:
            return []
        shown = [
            {"number": i, "relation": relation, "out": out}
            for i, (relation, out) in enumerate(options)
        ]
        given = _given(walk) | {
            "entity": walk.end(path), "path": _shown(path), "relations": shown,
        }  # fmt: skip
        chosen = self._choose(_RELATIONS, given, options)
        return super().relations(walk, path, options) if chosen is None else chosen

    def entities(
        self, walk: _Walk, path: Path, relation: str, near: Sequence[str]
    ) -> Sequence[str]:
        shown = [{"number": i, "entity": name} for i, name in enumerate(near)]
        given = _given(walk) | {
            "from": walk.end(path), "path": _shown(path), "relation": relation, "entities": shown,
        }  # fmt: skip
        chosen = self._choose(_ENTITIES, given, near)
        return near if chosen is None else chosen

    def reasoned(self, walk: _Walk) -> tuple[bool, list[str]]:
        given = _given(walk) | {"paths": [_shown(path) for path in walk.paths]}
        reply = self._ask(_REASON, given, _REASONED)
        if reply is None:
            return False, super().reasoned(walk)[1]
        walk.known = reply["known"]
        return reply["sufficient"], reply["answer"]

    def earlier(self, walk: _Walk) -> list[Path]:
        reached: list[Path] = [(), *walk.paths]
        shown = [
            {"number": i, "entity": walk.end(path), "path": _shown(path)}
            for i, path in enumerate(reached)
        ]
        return self._choose(_REFLECT, _given(walk) | {"reached": shown}, reached) or []

    def guess(self, question: str) -> list[str]:
        reply = self._ask(_GUESS, {"question": question}, _ANSWER)
        return reply["answer"] if reply else []


def _given(walk: _Walk) -> dict[str, Any]:
    return {
        "question": walk.question, "topic": walk.topic, "objectives": walk.objectives,
        "known": walk.known,
    }  # fmt: skip


def _shown(path: Path) -> list[list[str]]:
    return [[hop.head, hop.relation, hop.tail] for hop in path]
