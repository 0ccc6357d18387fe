"""Sweet&Sour against reflection on failures only, in a family of text games."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from holdfast.checks import Result, check
from holdfast.longterm.memory import Memory
from holdfast.longterm.policies.sweet_sour import SOUR, SWEET, Reflector, SweetSour, generalised
from holdfast.longterm.records import Hit
from holdfast.longterm.retrieval.embed import Hash
from holdfast.longterm.retrieval.terms import STOP
from holdfast.longterm.retrieval.terms import words as terms

_EPISODES, _WORLDS, _STAGES, _LIMIT = 10, 8, 6, 40
_VERBS = ("push", "pull", "turn", "lift", "knock on", "light")
_THINGS = {
    "lever": "A {} lever sticks out of the damp wall of the cellar.",
    "door": "At the end of a corridor there is a {} door.",
    "lamp": "From the ceiling of a dark hall hangs a {} lamp.",
    "wheel": "Beside the mill pond stands a {} wheel, taller than you.",
    "chest": "Under the stairs somebody has hidden a {} chest.",
    "bell": "High up in the tower you find a {} bell.",
}
_KINDS = ("oak", "iron", "stone")


class FailuresOnly(SweetSour):
    """The same reflections, without those on what worked."""

    def polarity(self, reward: float, done: bool, idle: int) -> str | None:
        found = super().polarity(reward, done, idle)
        return found if found == SOUR else None


@check("sweet_sour", claim="learns from a first success what reflection on failures cannot")
def run(seed: int) -> Result:
    """Mean score of the episodes after the first, whose outcome is set."""
    scores: dict[str, dict[str, float]] = {}
    for outcome in ("success", "failure"):
        scores[outcome] = {
            name: sum(
                _play(Quest(seed * _WORLDS + world), policy, outcome) for world in range(_WORLDS)
            )
            / _WORLDS
            for name, policy in (("both", SweetSour), ("sour", FailuresOnly), ("none", None))
        }
    first, second = scores["success"], scores["failure"]
    return Result(
        measured={f"after_{outcome}": found["both"] for outcome, found in scores.items()},
        baseline={
            f"{what}_after_{outcome}": found[name]
            for outcome, found in scores.items()
            for name, what in (("sour", "failures_only"), ("none", "no_memory"))
        },
        threshold="after a success >= failures only x 1.10, after a failure >= x 0.98; of 6",
        passed=first["both"] >= 1.10 * first["sour"] and second["both"] >= 0.98 * second["sour"],
    )


@dataclass
class Quest:
    """Things in a row: one verb moves each on (+1), one ends the game (-1), the rest do nothing.

    Which verbs these are belongs to the family; what the things are made of to the task.
    """

    seed: int

    def __post_init__(self) -> None:
        pick = random.Random(f"quest {self.seed}")
        self.things = pick.sample(list(_THINGS), _STAGES)
        self.verbs = {thing: pick.sample(_VERBS, 2) for thing in self.things}

    def reset(self, kind: str) -> str:
        self.kind, self.stage = kind, 0
        return self.observation()

    def observation(self) -> str:
        if self.stage == len(self.things):
            return "You are out."
        return _THINGS[self.things[self.stage]].format(self.kind)

    def actions(self) -> list[str]:
        return [f"{verb} {self.kind} {self.things[self.stage]}" for verb in _VERBS]

    def right(self, place: int) -> str:
        return f"{self.verbs[self.things[self.stage]][place]} {self.kind} {self._thing()}"

    def _thing(self) -> str:
        return self.things[self.stage]

    def step(self, action: str) -> tuple[str, float, bool]:
        if action == self.right(1):
            return "A trap snaps shut.", -1.0, True
        if action != self.right(0):
            return self.observation(), 0.0, False
        self.stage += 1
        return self.observation(), 1.0, self.stage == len(self.things)


def _play(quest: Quest, policy: type[SweetSour] | None, outcome: str) -> float:
    pick = random.Random(f"agent {quest.seed}")
    tasks = {kind: "quest" for kind in _KINDS}
    scores = []
    with Memory(":memory:", embedder=Hash(64), policy=(policy or SweetSour)()) as memory:
        reflector = Reflector(memory, tasks)
        for episode in range(_EPISODES):
            task = _KINDS[episode % len(_KINDS)]
            observation, done, score, steps = quest.reset(task), False, 0.0, 0
            reflector.start(task, observation)
            tried: set[str] = set()
            while not done and steps < _LIMIT:
                if episode == 0:
                    action = quest.right(0 if outcome == "success" else 1)
                else:
                    hits = reflector.recall(observation) if policy is not None else []
                    action = _choose(pick, observation, quest.actions(), hits, tried)
                seen, reward, done = quest.step(action)
                steps += 1
                reflector.step(seen, action, reward, done or steps == _LIMIT)
                tried = {*tried, action} if seen == observation else set()
                observation, score = seen, score + reward
            scores.append(score)
    return sum(scores[1:]) / len(scores[1:])


def _choose(
    pick: random.Random,
    observation: str,
    actions: Sequence[str],
    hits: Sequence[Hit],
    tried: set[str],
) -> str:
    """What worked in a situation like this; else anything that is new and did not fail in one."""
    open_ = [action for action in actions if action not in tried]
    bad: set[str] = set()
    for hit in hits:
        if not _alike(observation, hit.metadata["situation"]):
            continue
        last = hit.metadata["general"][-1]
        fitting = [one for one in open_ if _form(one) == last.split()[:-1]]
        if hit.metadata["polarity"] == SWEET and fitting:
            return fitting[0]
        if hit.metadata["earned"] < 0:
            bad |= set(fitting)
    return pick.choice([one for one in open_ if one not in bad] or open_)


def _form(action: str) -> list[str]:
    return generalised([action])[0].split()[:-1]


def _alike(one: str, other: str) -> bool:
    left, right = (set(terms(text)) - STOP for text in (one, other))
    return len(left & right) >= 0.6 * len(left)
