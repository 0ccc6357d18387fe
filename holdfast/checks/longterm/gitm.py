"""GITM with a planner that errs: what remembered plans save, and what feedback is worth."""

import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

from holdfast.checks import Result, check
from holdfast.longterm.evaluation.craft import ACTIONS, RECIPES, Action, CraftWorld
from holdfast.longterm.language.llm import Scripted
from holdfast.longterm.memory import Memory
from holdfast.longterm.policies.gitm import GITM, Goal, Plans, by_recipe, decompose
from holdfast.longterm.retrieval.embed import Hash

_GOAL, _EPISODES, _LAST = "diamond", 30, 10
_NOISE = 0.3
# Who copies a plan errs too, but less often than who thinks of one.
_COPY_NOISE = 0.05


@check("gitm", claim="plans that worked before save a planner that errs most of its calls")
def run(seed: int) -> Result:
    """Thirty worlds, one goal; 30 % of the actions that the planner thinks of are at random."""
    worlds = [seed * _EPISODES + number for number in range(_EPISODES)]
    with _memory() as shared:
        ours = [_episode(world, shared) for world in worlds]
    theirs = []
    for world in worlds:
        with _memory() as alone:
            theirs.append(_episode(world, alone))
    success = sum(done for done, _ in ours) / _EPISODES
    blind = sum(_without_feedback(world) for world in worlds) / _EPISODES
    with_memory, without = (_calls_per_success(runs[-_LAST:]) for runs in (ours, theirs))
    return Result(
        measured={
            "calls_per_success_last_10": with_memory,
            "calls_per_success_first_5": _calls_per_success(ours[:5]),
            "success": success,
        },
        baseline={
            "calls_without_memory": without,
            "success_without_memory": sum(done for done, _ in theirs) / _EPISODES,
            "success_without_feedback": blind,
        },
        threshold="calls <= 0.6 x without memory; success >= 0.9, without feedback <= 0.5",
        passed=with_memory <= 0.6 * without and success >= 0.9 and blind <= 0.5,
    )


def _memory() -> Memory:
    return Memory(":memory:", embedder=Hash(64), policy=Plans())


def _episode(seed: int, memory: Memory) -> tuple[bool, int]:
    agent = GITM(CraftWorld(seed), Scripted(Planner(seed)), memory=memory, calls=100)
    outcome = agent.achieve(_GOAL)
    return outcome.success, outcome.calls


def _calls_per_success(runs: Sequence[tuple[bool, int]]) -> float:
    return sum(calls for _, calls in runs) / max(1, sum(done for done, _ in runs))


def _without_feedback(seed: int) -> bool:
    """One plan for each goal, carried out to its end whatever comes of it."""
    world, planner = CraftWorld(seed), Planner(seed)
    seen = world.reset()
    for goal in decompose(_GOAL):
        for one in planner.think(goal, seen.inventory, seen.nearby):
            seen = world.step(one)
    return _GOAL in seen.inventory


class Planner:
    """Stands for a model: knows the recipes, but some of its actions are at random.

    Given a reference plan it copies that, again where it made a slip; where an action of the
    reference itself has failed, it thinks.
    """

    def __init__(self, seed: int):
        self.pick = random.Random(f"planner {seed}")
        self.things = sorted({r.source for r in RECIPES.values() if r.source} | set(RECIPES))

    def __call__(self, messages: Sequence[Mapping[str, str]], schema: Any) -> dict[str, Any]:
        asked = json.loads(messages[-1]["content"])
        goal = Goal(**asked["goal"])
        known = [
            Action(one["name"], tuple(goal.count if a is None else a for a in one["args"]))
            for one in asked["reference"] or ()
        ]
        failed = asked["feedback"]
        slip = not failed or ("failed" in failed and not failed.startswith(tuple(map(str, known))))
        if known and slip:
            plan = self._err(known, _COPY_NOISE)
        else:
            plan = self.think(goal, asked["inventory"], asked["nearby"])
        return {"actions": [{"name": one.name, "args": list(one.args)} for one in plan]}

    def think(
        self, goal: Goal, inventory: Mapping[str, int], nearby: Sequence[str]
    ) -> list[Action]:
        return self._err(by_recipe(goal, RECIPES, inventory, nearby), _NOISE)

    def _err(self, plan: Sequence[Action], noise: float) -> list[Action]:
        return [self._random() if self.pick.random() < noise else one for one in plan]

    def _random(self) -> Action:
        name = self.pick.choice(sorted(ACTIONS))
        return Action(
            name,
            tuple(
                self.pick.choice(self.things) if kind is str else self.pick.randint(1, 60)
                for _, kind in ACTIONS[name]
            ),
        )
