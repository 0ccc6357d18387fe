"""Sweet&Sour (073): an agent reflects on what worked as well as on what failed.

Keeps    of a running episode its steps and reflections (short-term); of ended ones at most `cap`
         reflections of each family of tasks, with the steps that they are about (long-term).
Form     text: a situation, the actions that were taken in it, what they earned, and the actions
         with their arguments generalised; a model may add why. Polarity, family, task, situation
         and actions are in the metadata.
Bytes    at most cap * (text + 4d) for each family, and the text of at most `window` steps each.
Source   Lippmann, Spaan, Yang, "Positive Experience Reflection for Agents in Interactive Text
         Environments", 2024.
Departs  the exact rule of transfer is not established. Here a sour reflection always stays, a sweet
         one if its episode scored at least the mean of the task's earlier ones; the least useful
         leaves first, by uses * gain - age, with age in episodes of the family.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, takewhile
from typing import Any

from holdfast.errors import UsageError, unknown
from holdfast.longterm.budget import Context, pack, words
from holdfast.longterm.memory import Memory, SpaceLike
from holdfast.longterm.policy import Policy, Traits
from holdfast.longterm.records import Add, Change, Hit, Item, Retire, Source, Touch
from holdfast.longterm.store.view import View

SWEET, SOUR = "sweet", "sour"
KIND, _DRAFT, _STEP, _EPISODE, _TASK = "reflection", "draft", "step", "episode", "task"
_BETWEEN = {
    "with",
    "on",
    "in",
    "into",
    "onto",
    "to",
    "from",
    "at",
    "under",
    "behind",
    "of",
    "using",
}
_WHY = {
    "type": "object",
    "properties": {"why": {"type": "string"}},
    "required": ["why"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class _Lesson:
    """A reflection before it is stored, with the steps that it is about."""

    text: str
    polarity: str
    gain: float
    metadata: dict[str, Any]
    steps: tuple[Source | Add, ...]


class SweetSour(Policy):
    """Reflections of both polarities, recalled in the family of tasks that they come from first.

    Args:
        k: reflections of each polarity that are recalled at most.
        cap: reflections of one family of tasks that are kept at most.
        window: steps that a reflection looks back on at most.
        stall: steps without any reward after which it is a failure to go on like this.
    """

    traits = Traits(
        types=("episodic", "procedural"),
        form="notes",
        processes=("encode", "consolidate", "store", "retrieve", "forget"),
        conflict="merges",
    )

    def __init__(self, *, k: int = 3, cap: int = 50, window: int = 6, stall: int = 10):
        for name, value in (("k", k), ("cap", cap), ("window", window), ("stall", stall)):
            if value < 1:
                raise UsageError(f"{name}={value} must be at least 1")
        self.k, self.cap, self.window, self.stall = k, cap, window, stall

    def begin(self, view: View, task: str, family: str, observation: str) -> list[Change]:
        """A new episode of a task; the id of the first change is the episode's."""
        begun = _record(view, task, family)["begun"] + 1
        data = {"task": task, "family": family}
        episode = Add(observation, _EPISODE, data=data, key=f"{task}\x1f{begun}", searchable=False)
        return [episode, _recorded(view, task, family, begun=begun)]

    def experience(
        self, view: View, episode: str, observation: str, action: str, reward: float, done: bool
    ) -> list[Change]:
        """One step of an episode, the reflection that it gives rise to, and at its end, transfer.

        Raises:
            UsageError: an action without text, a reward that is not finite, or an episode that is
                not running.
        """
        if not action.strip():
            raise UsageError("the action is empty; a reflection needs the action that it is about")
        if not math.isfinite(reward):
            raise UsageError(f"reward={reward} of {action!r} is not finite; give 0 for none")
        start = _running(view, episode)
        steps = view.items(kind=_STEP, session=episode)
        data = {"action": action, "reward": float(reward), "observation": observation}
        step = Add(
            f"> {action}\n{observation}", _STEP, session=episode, data=data,
            key=f"{episode}\x1f{steps[-1].position if steps else 0}", searchable=False,
        )  # fmt: skip
        lesson = self._reflect(view, start, steps, step, done)
        if done:
            lessons = [*_drafts(view, episode), *([lesson] if lesson else [])]
            score = sum(one.data["reward"] for one in steps) + reward
            changes = self._transfer(view, start, lessons, score, steps)
            about = any(isinstance(one, Add) and step in one.sources for one in changes)
            return [step, *changes] if about else changes
        if lesson is None:
            return [step]
        told = {"polarity": lesson.polarity, "gain": lesson.gain}
        draft = Add(
            lesson.text, _DRAFT, session=episode, data=told, metadata=lesson.metadata,
            sources=lesson.steps, key=step.key, searchable=False,
        )  # fmt: skip
        return [step, draft]

    def polarity(self, reward: float, done: bool, idle: int) -> str | None:
        """What a step was, after `idle` steps without reward in a row; None for nothing yet."""
        if reward > 0:
            return SWEET
        stalled = idle > 0 and idle % self.stall == 0
        return SOUR if reward < 0 or done or stalled else None

    def _reflect(
        self, view: View, start: Item, steps: Sequence[Item], last: Add, done: bool
    ) -> _Lesson | None:
        idle = list(takewhile(lambda one: not one.data["reward"], reversed(steps)))[::-1]
        reward = last.data["reward"]
        polarity = self.polarity(reward, done, 0 if reward else len(idle) + 1)
        if polarity is None:
            return None
        seen: list[Item | Add] = [*idle, last]
        seen = seen[-self.window :]
        before = len(steps) - len(seen)
        situation = steps[before].data["observation"] if before >= 0 else start.text
        actions = [step.data["action"] for step in seen]
        general = generalised(actions)
        earned = f"earned {reward:+g}" if reward else "earned nothing"
        earned += " and ended it" if done else ""
        text = f"{situation}\n{'; '.join(actions)}: {earned}. In general: {'; '.join(general)}."
        told = view.judgement.ask(
            "Why did the last of these actions earn what it did, and how does that generalise? "
            "One or two sentences.",
            {"situation": situation, "actions": actions, "earned": reward},
            _WHY,
        )
        if told is not None and told["why"].strip():
            text += f" {told['why'].strip()}"
        metadata = {
            "polarity": polarity, "family": start.data["family"], "task": start.data["task"],
            "situation": situation, "actions": actions, "general": general, "earned": reward,
        }  # fmt: skip
        sources = tuple(one if isinstance(one, Add) else Source(one.id) for one in seen)
        return _Lesson(text, polarity, abs(reward) or 1.0, metadata, sources)

    def summarise(self, view: View, session: str | None) -> list[Change]:
        """End an episode, by its id, that was broken off; other sessions leave nothing to do."""
        start = view.get(session) if session is not None else None
        if start is None or start.kind != _EPISODE:
            return []
        steps = view.items(kind=_STEP, session=start.id)
        score = sum(one.data["reward"] for one in steps)
        return self._transfer(view, start, _drafts(view, start.id), score, steps)

    def _transfer(
        self,
        view: View,
        start: Item,
        lessons: Sequence[_Lesson],
        score: float,
        steps: Sequence[Item],
    ) -> list[Change]:
        """From short-term to long-term; whatever no reflection is about any more is retired."""
        task, family = start.data["task"], start.data["family"]
        record = _record(view, task, family)
        ended, mean = record["ended"], record["mean"]
        tasks = view.items(kind=_TASK)
        now = 1 + sum(one.data["ended"] for one in tasks if one.data["family"] == family)
        items = [item for item in view.items(kind=KIND) if item.metadata["family"] == family]
        stored = {(item.metadata["polarity"], item.text): item for item in items}
        fresh: dict[tuple[str, str], _Lesson] = {}
        for one in lessons:
            if one.polarity == SOUR or not ended or score >= mean:
                fresh.setdefault((one.polarity, one.text), one)

        def utility(key: tuple[str, str]) -> tuple[float, int]:
            if key not in stored:
                return 0.0, now
            item = stored[key]
            at = now if key in fresh else item.data["episode"]
            return item.uses * item.data["gain"] - (now - at), at

        ranked = sorted({**stored, **fresh}, key=utility, reverse=True)
        kept, gone = ranked[: self.cap], [stored[k] for k in ranked[self.cap :] if k in stored]
        sources = view.sources([item.id for item in items])
        cited = {one.id for key in kept if key in stored for one in sources[stored[key].id]}
        changes: list[Change] = []
        for key, lesson in ((key, fresh[key]) for key in kept if key in fresh):
            if key in stored:
                # It is about the steps that first gave rise to it, or these would never end.
                again = stored[key]
                changes.append(Touch(again.id, data={**again.data, "episode": now}))
                continue
            cited |= {one.id for one in lesson.steps if isinstance(one, Source)}
            new = Add(
                lesson.text, KIND, metadata=lesson.metadata, sources=lesson.steps,
                data={"gain": lesson.gain, "episode": now, "score": score},
                key=f"{lesson.polarity}\x1f{family}",
            )  # fmt: skip
            changes.append(new)
        changes += [Retire(item.id, "the least useful of its family") for item in gone]
        loose = [one.id for one in steps] + [s.id for item in gone for s in sources[item.id]]
        current = view.get_many(one for one in loose if one not in cited)
        changes += [Retire(one, "no reflection is about it") for one in current]
        over = [*view.items(kind=_DRAFT, session=start.id), start]
        changes += [Retire(one.id, "its episode has ended") for one in over]
        mean += (score - mean) / (ended + 1)
        return [*changes, _recorded(view, task, family, ended=ended + 1, mean=mean)]

    def lessons(self, view: View, episode: str, query: str) -> list[Hit]:
        """At most `k` of each polarity of this episode, the latest first, and as many earlier ones.

        Raises:
            UsageError: the episode is not running.
        """
        start = _running(view, episode)
        drafts = view.items(kind=_DRAFT, session=episode, newest=True)
        hits = self._mixed(view.hits([(item, 0.0, {}) for item in drafts]))
        found = view.search(query, max(1, view.count(KIND)), kinds=(KIND,))
        found.sort(key=lambda hit: hit.metadata["family"] != start.data["family"])
        return hits + self._mixed(found)

    def retrieve(self, view: View, query: str, limit: int) -> list[Hit]:
        """What was found, with at most `k` reflections of each polarity."""
        return self._mixed(view.search(query, limit + view.count(KIND)))[:limit]

    def _mixed(self, hits: Sequence[Hit]) -> list[Hit]:
        taken: list[Hit] = []
        seen = {SWEET: 0, SOUR: 0}
        for hit in hits:
            if hit.kind in (KIND, _DRAFT):
                seen[hit.metadata["polarity"]] += 1
                if seen[hit.metadata["polarity"]] > self.k:
                    continue
            taken.append(hit)
        return taken


class Reflector:
    """What an agent tells of its episodes, and asks before it acts.

    Args:
        memory: its policy may be any; a `SweetSour` says how much is kept and recalled.
        tasks: the tasks that there are, each with the family it belongs to.
        space: whose experience this is; the memory's own by default.
    """

    def __init__(self, memory: Memory, tasks: Mapping[str, str], *, space: SpaceLike = None):
        self.memory, self.tasks, self.space = memory, dict(tasks), space
        own = memory.policy
        self.policy = own if isinstance(own, SweetSour) else SweetSour()
        self.episode: str | None = None

    def start(self, task: str, observation: str) -> str:
        """Begin an episode; returns its id, by which `summarise` ends one that is broken off.

        Raises:
            UsageError: an unknown task, or an episode that is still running.
        """
        if task not in self.tasks:
            raise unknown("task", task, self.tasks)
        if self.episode is not None:
            raise UsageError(
                f"episode {self.episode} is still running; end it by its last step or stop()"
            )
        begin, family = self.policy.begin, self.tasks[task]
        self.episode = self._transact(lambda view: begin(view, task, family, observation))[0]
        return self.episode

    def step(self, observation: str, action: str, reward: float, done: bool) -> None:
        """What was observed and earned after an action; `done` ends the episode.

        Raises:
            UsageError: no episode runs, the action is empty, or the reward is not finite.
        """
        episode, tell = self._episode(), self.policy.experience
        self._transact(lambda view: tell(view, episode, observation, action, reward, done))
        if done:
            self.episode = None

    def stop(self) -> None:
        """End an episode that is broken off; what was learnt in it so far is kept."""
        episode = self._episode()
        self._transact(lambda view: self.policy.summarise(view, episode))
        self.episode = None

    def recall(self, query: str, limit: int = 50) -> list[Hit]:
        """Reflections that bear on an observation, this episode's first."""
        episode = self._episode()
        with self.memory.reading(space=self.space) as view:
            hits = self.policy.lessons(view, episode, query)[:limit]
        self._used(episode, [hit.id for hit in hits])
        return hits

    def context(self, query: str, budget: int, *, count: Callable[[str], int] = words) -> Context:
        """The same as text of at most `budget` tokens."""
        episode = self._episode()
        with self.memory.reading(space=self.space) as view:
            made = pack(self.policy.lessons(view, episode, query), budget, count)
        self._used(episode, made.ids)
        return made

    def _used(self, episode: str, ids: Sequence[str]) -> None:
        def decide(view: View) -> list[Change]:
            begun = _running(view, episode).recorded_at
            items = view.get_many(ids).values()
            # Once an episode, however often it is asked.
            fresh = [i for i in items if i.used_at is None or i.used_at < begun]
            return [Touch(item.id) for item in fresh if item.kind == KIND]

        if ids:
            self._transact(decide)

    def _transact(self, decide: Callable[[View], list[Change]]) -> list[str]:
        return self.memory.transact(decide, space=self.space)

    def _episode(self) -> str:
        if self.episode is None:
            raise UsageError("no episode is running; call start(task, observation) first")
        return self.episode


def generalised(actions: Sequence[str]) -> list[str]:
    """Actions with their arguments replaced by A, B, ..., the same letter for the same argument."""
    letters: dict[str, str] = {}
    made = []
    for action in actions:
        verb, *rest = action.split()
        parts = [verb]
        for between, some in groupby(rest, lambda word: word.lower() in _BETWEEN):
            name = " ".join(some)
            if not between:
                name = re.sub(r"\W+$", "", name).lower()
                name = letters.setdefault(name, _letter(len(letters)))
            parts.append(name)
        made.append(" ".join(parts))
    return made


def _letter(number: int) -> str:
    return chr(ord("A") + number) if number < 26 else f"A{number}"


def _drafts(view: View, episode: str) -> list[_Lesson]:
    items = view.items(kind=_DRAFT, session=episode)
    sources = view.sources([item.id for item in items])
    return [
        _Lesson(i.text, i.data["polarity"], i.data["gain"], i.metadata, sources[i.id])
        for i in items
    ]


def _task(view: View, task: str) -> Item | None:
    return next((item for item in view.items(kind=_TASK) if item.text == task), None)


def _record(view: View, task: str, family: str) -> dict[str, Any]:
    """How many episodes of a task have begun and ended, and the mean of their scores."""
    known = _task(view, task)
    new = {"family": family, "begun": 0, "ended": 0, "mean": 0.0}
    return new if known is None else known.data


def _recorded(view: View, task: str, family: str, **changed: float) -> Change:
    known, data = _task(view, task), {**_record(view, task, family), **changed}
    if known is None:
        return Add(task, _TASK, data=data, searchable=False)
    return Touch(known.id, data=data)


def _running(view: View, episode: str) -> Item:
    start = view.get(episode)
    if start is None or start.kind != _EPISODE:
        raise UsageError(f"episode {episode} is not running; begin one with start()")
    return start
