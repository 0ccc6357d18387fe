import json
import random
from collections import Counter

import pytest

from holdfast.errors import UsageError
from holdfast.longterm.evaluation.craft import (
    ACTIONS,
    FUEL,
    RECIPES,
    SMELTS,
    Action,
    CraftWorld,
    Recipe,
)
from holdfast.longterm.language.llm import Scripted
from holdfast.longterm.memory import Memory
from holdfast.longterm.policies.gitm import GITM, Plans, common, decompose
from holdfast.longterm.records import Turn
from holdfast.longterm.retrieval.embed import Hash
from tests.longterm.conftest import Clock


def plans(path=":memory:", **options):
    return Memory(path, embedder=Hash(32), policy=Plans(**options), clock=Clock())


def raw_ref(item, count):
    """What is taken from the world when each thing is got at the moment it is needed."""
    bag, raw, tools, heat = Counter(), Counter(), set(), 0

    def get(name, wanted):
        nonlocal heat
        recipe = RECIPES[name]
        while bag[name] < wanted:
            if recipe.tool and recipe.tool not in tools:
                get(recipe.tool, 1)
                bag[recipe.tool] -= 1
                tools.add(recipe.tool)
            for material, n in recipe.materials.items():
                get(material, n)
                bag[material] -= n
            if recipe.how == "smelt":
                if not heat:
                    get(FUEL, 1)
                    bag[FUEL] -= 1
                    heat = SMELTS
                heat -= 1
            if not recipe.materials:
                raw[name] += recipe.yields
            bag[name] += recipe.yields

    get(item, count)
    return raw


def test_raw_materials_equal_what_is_taken_one_by_one():
    assert len(RECIPES) >= 40
    for item in RECIPES:
        for count in (1, 3, 20):
            goals = decompose(item, count)
            raw = {goal.item: goal.count for goal in goals if not goal.materials}
            assert raw == raw_ref(item, count), (item, count)
            order = [goal.item for goal in goals]
            for place, goal in enumerate(goals):
                assert {*goal.materials, *filter(None, [goal.tool])} <= set(order[:place])


def test_a_diamond_by_hand():
    # planks: 4 table + 3 pickaxe + 2 crafts of sticks (3 x 2 = 6) a 2; cobblestone: 3 + 8
    want = {
        "log": 3, "planks": 11, "stick": 6, "cobblestone": 11, "coal": 1, "raw_iron": 3,
        "iron_ingot": 3, "crafting_table": 1, "furnace": 1, "wooden_pickaxe": 1,
        "stone_pickaxe": 1, "iron_pickaxe": 1, "diamond": 1,
    }  # fmt: skip
    assert {goal.item: goal.count for goal in decompose("diamond")} == want
    rest = decompose("diamond", have={"iron_pickaxe": 1})
    assert [goal.item for goal in rest] == ["diamond"]
    assert [g.item for g in decompose("coal", have={"diamond_pickaxe": 1})] == ["coal"]
    smelted = decompose("iron_ingot", 17)
    assert {g.item: g.count for g in smelted}["coal"] == 3


def test_without_a_model_every_item_is_got_and_plans_replay_from_the_same_seed():
    for seed, item in ((0, "diamond"), (1, "enchanting_table"), (2, "bed"), (3, "clock")):
        with plans() as memory:
            world = CraftWorld(seed)
            outcome = GITM(world, memory=memory).achieve(item)
            assert outcome.success and outcome.inventory[item] >= 1
            stored = memory.get_all(kind="plan")
            seen = world.reset()
            for plan in stored:
                for one in plan.metadata["actions"]:
                    seen = world.step(Action(one["name"], tuple(one["args"])))
                    assert seen.ok
            assert seen.inventory[item] >= 1
            world.reset()
            assert [world.step(one) for one in outcome.actions][-1].inventory == outcome.inventory
    assert all(GITM(CraftWorld(4)).achieve(item).success for item in ("bow", "rail", "book"))


def state(world):
    left = {name: len(places) for name, places in world.things.items()}
    return world.at, dict(world.inventory), world.equipped, world.heat, [*world.placed], left


def test_what_fails_changes_nothing_and_is_said():
    world, pick = CraftWorld(5), random.Random(0)
    things = [*RECIPES, "tree", "stone", "coal_ore", "unicorn"]
    failed = 0
    for number in range(600):
        if number % 60 == 0:
            world.reset()
            world.inventory = {"wooden_pickaxe": 1, "log": 9, "planks": 9, "crafting_table": 1}
        name = pick.choice([*ACTIONS, "craft", "equip", "mine"])
        args = tuple(
            pick.choice(things) if kind is str else pick.randint(-2, 60)
            for _, kind in ACTIONS[name]
        )
        before = state(world)
        step = world.step(Action(name, args))
        assert min([0, *world.inventory.values()]) == 0
        if not step.ok:
            failed += 1
            assert state(world) == before and "failed: " in step.text
    assert 100 < failed < 590
    assert state(CraftWorld(6)) == state(CraftWorld(6)) != state(CraftWorld(7))
    assert world.step(Action("explore", ("unicorn",))).text.startswith("explore(unicorn) failed")


def test_what_plans_share_becomes_the_reference_after_five_successes():
    rows = [list("xabc"), list("axbc"), list("abyc"), list("abcz"), list("abc")]
    acts = [[{"name": "explore", "args": [letter]} for letter in row] for row in rows]
    assert [one["args"][0] for one in common(acts)] == ["a", "b", "c"]
    with plans() as memory:
        for number in range(1, 6):
            told = [{"name": "go_up", "args": []}] * (number % 2)
            told = [*told, {"name": "mine", "args": ["tree", number]}]
            metadata = {"goal": "log", "count": number, "actions": told}
            memory.add(Turn(f"log: {number}", kind="plan", metadata=metadata))
            memory.summarise()
            assert len(memory.get_all(kind="reference")) == (number == 5)
        with memory.reading() as view:
            shared = memory.policy.reference(view, "log")
            (reference,) = view.items(kind="reference")
            assert len(view.sources([reference.id])[reference.id]) == 5
            assert memory.policy.reference(view, "coal") is None
        assert shared == [{"name": "mine", "args": ["tree", None]}]
        memory.add(Turn("log: 6", kind="plan", metadata=metadata))
        memory.summarise()
        found = memory.get_all(kind="plan")
        assert len(found) == 5, "no more are kept than the reference was made of"
        assert reference.id in memory.purge(found[0].id)


def test_the_same_plan_five_times_is_one_memory():
    with plans() as memory:
        agent = GITM(CraftWorld(), memory=memory)
        for number in range(1, 6):
            agent.achieve("planks")
            items = memory.get_all(kind="plan")
            assert [item.uses for item in items] == [number - 1] * 2
        assert {item.metadata["goal"] for item in memory.get_all(kind="reference")} == {
            "log", "planks",
        }  # fmt: skip


def reply(*acts):
    return {"actions": [{"name": name, "args": list(args)} for name, *args in acts]}


def test_a_model_is_told_what_failed_and_failed_actions_are_in_no_plan():
    llm = Scripted(
        [
            reply(("go_up",), ("mine", "tree", 1)),
            reply(("fly", "tree")),
            reply(("explore", "tree"), ("approach", "tree"), ("mine", "tree", 1)),
        ]
    )
    with plans() as memory:
        outcome = GITM(CraftWorld(1), llm, memory=memory).achieve("log")
        asked = [json.loads(messages[-1]["content"]) for messages in llm.requests]
        assert outcome.success and outcome.calls == 3
        assert [one["feedback"] for one in asked[:1]] == [""]
        assert asked[1]["feedback"].startswith("mine(tree, 1) failed: no tree is within 1 blocks")
        assert "unknown action 'fly'" in asked[2]["feedback"]
        assert asked[0]["goal"]["info"] in asked[0]["knowledge"]
        (plan,) = memory.get_all(kind="plan")
        assert plan.text == "log: go_up(); explore(tree); approach(tree); mine(tree, 1)"


def test_what_was_placed_is_not_had_until_it_is_taken_up():
    table = "crafting_table"
    llm = Scripted(
        [
            reply(("explore", "tree"), ("approach", "tree"), ("mine", "tree", 1)),
            reply(("craft", "planks", 4)),
            reply(("craft", table, 1), ("place", table)),
            reply(("mine", table, 1)),
        ]
    )
    outcome = GITM(CraftWorld(), llm).achieve(table)
    assert outcome.success and outcome.inventory == {table: 1} and outcome.calls == 4


def test_the_reference_is_in_the_prompt_and_attempts_end():
    with plans(plans=2) as memory:
        for _ in range(2):
            GITM(CraftWorld(), memory=memory).achieve("log")
        llm = Scripted(lambda messages, schema: reply(("go_up",)))
        outcome = GITM(CraftWorld(), llm, memory=memory, calls=4).achieve("log")
        assert not outcome.success and outcome.calls == 4 == len(llm.requests)
        first, *_, last = [json.loads(messages[-1]["content"]) for messages in llm.requests]
        assert [one["name"] for one in first["reference"]] == [
            "go_up", "explore", "approach", "mine",
        ]  # fmt: skip
        assert last["feedback"] == "log is still missing after that plan"


def test_what_it_refuses():
    circle = {
        "egg": Recipe("egg", "craft", materials={"hen": 1}),
        "hen": Recipe("hen", "craft", materials={"egg": 1}),
    }
    with pytest.raises(UsageError, match="egg needs itself: egg -> hen -> egg"):
        GITM(CraftWorld(recipes=circle)).achieve("egg")
    with pytest.raises(UsageError, match="unknown item 'diamnod'; nearest known: diamond"):
        GITM(CraftWorld()).achieve("diamnod")
    with pytest.raises(UsageError, match="unknown action 'min'; nearest known: mine"):
        Action("min", ("tree", 1))
    with pytest.raises(UsageError, match=r"mine\(tree\) does not fit mine\(object: str, count"):
        Action("mine", ("tree",))
    with pytest.raises(UsageError, match="count=0 of log is nothing to get"):
        decompose("log", 0)
    with pytest.raises(UsageError, match="plans=1 have nothing in common"):
        Plans(plans=1)
    with pytest.raises(UsageError, match="size=3 leaves no room"):
        CraftWorld(size=3)
    with plans() as memory:
        for metadata, message in (
            ({}, "needs metadata with goal and actions"),
            ({"goal": "log", "actions": [{"name": "fly"}]}, "unknown action 'fly'"),
            ({"goal": "log", "actions": ["go_up"]}, "is no action; write"),
        ):
            with pytest.raises(UsageError, match=message):
                memory.add(Turn("a plan", kind="plan", metadata=metadata))
