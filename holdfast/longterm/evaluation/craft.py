"""A small seeded world of mining and crafting, for agents that remember plans.

Recipes are named after those of a well-known game; nothing that happens here is a result in it.
There is no hunger, no night and no wear of tools, creatures stand still, and one coal smelts eight.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from holdfast.errors import UsageError, unknown

SURFACE, DEEPEST = 64, 5
SIGHT, REACH, NEAR = 5, 1, 2
SMELTS = 8  # items for one piece of fuel
FUEL = "coal"
PICKAXES = ("wooden_pickaxe", "stone_pickaxe", "iron_pickaxe", "diamond_pickaxe")
ACTIONS: dict[str, tuple[tuple[str, type], ...]] = {
    "equip": (("item", str),),
    "explore": (("object", str),),
    "approach": (("object", str),),
    "mine": (("object", str), ("count", int)),
    "attack": (("object", str), ("count", int)),
    "apply": (("tool", str), ("object", str), ("count", int)),
    "dig_down": (("level", int),),
    "go_up": (),
    "craft": (("item", str), ("count", int)),
    "smelt": (("item", str), ("count", int)),
    "place": (("item", str),),
}


@dataclass(frozen=True)
class Recipe:
    """How an item is got: by `mine`, `attack` or `apply` from a source, or `craft` or `smelt`.

    `tool` is held for a source, and stands nearby for the others; it is not used up, `materials`
    are. `level` is where a source lies that is not on the surface.
    """

    item: str
    how: str
    source: str = ""
    materials: Mapping[str, int] = field(default_factory=dict)
    tool: str = ""
    yields: int = 1
    level: int | None = None

    @property
    def info(self) -> str:
        """The recipe in words."""
        parts = [f"{self.item}: {self.how}"]
        if self.source:
            place = "on the surface" if self.level is None else f"near level {self.level}"
            parts.append(f"{self.source}, found {place}")
        if self.materials:
            parts.append("from " + ", ".join(f"{n} {m}" for m, n in self.materials.items()))
        if self.tool:
            parts.append(f"with {self.tool}")
        return " ".join(parts) + f"; gives {self.yields}."


def _recipes() -> dict[str, Recipe]:
    wood, stone, iron, _ = PICKAXES
    table, furnace = "crafting_table", "furnace"
    made = [
        Recipe("log", "mine", "tree"),
        Recipe("sand", "mine", "sand"),
        Recipe("flint", "mine", "gravel"),
        Recipe("clay_ball", "mine", "clay"),
        Recipe("sugar_cane", "mine", "sugar_cane"),
        Recipe("poppy", "mine", "poppy"),
        Recipe("beef", "attack", "cow"),
        Recipe("leather", "attack", "cow"),
        Recipe("porkchop", "attack", "pig"),
        Recipe("feather", "attack", "chicken"),
        Recipe("wool", "apply", "sheep", tool="shears"),
        Recipe("water_bucket", "apply", "water", {"bucket": 1}),
        Recipe("milk_bucket", "apply", "cow", {"bucket": 1}),
        Recipe("cobblestone", "mine", "stone", tool=wood, level=60),
        Recipe("coal", "mine", "coal_ore", tool=wood, level=45),
        Recipe("raw_iron", "mine", "iron_ore", tool=stone, level=35),
        Recipe("string", "attack", "spider", tool=wood, level=30),
        Recipe("bone", "attack", "skeleton", tool=wood, level=30),
        Recipe("lapis", "mine", "lapis_ore", tool=stone, level=20),
        Recipe("raw_gold", "mine", "gold_ore", tool=iron, level=25),
        Recipe("redstone", "mine", "redstone_ore", tool=iron, level=12),
        Recipe("diamond", "mine", "diamond_ore", tool=iron, level=10),
        Recipe("obsidian", "mine", "obsidian", tool="diamond_pickaxe", level=9),
    ]
    for item, source in (
        ("iron_ingot", "raw_iron"), ("gold_ingot", "raw_gold"), ("glass", "sand"),
        ("stone", "cobblestone"), ("brick", "clay_ball"), ("cooked_beef", "beef"),
        ("cooked_porkchop", "porkchop"),
    ):  # fmt: skip
        made.append(Recipe(item, "smelt", materials={source: 1}, tool=furnace))
    by_hand = {
        "planks": (4, {"log": 1}), "stick": (4, {"planks": 2}), table: (1, {"planks": 4}),
        "torch": (4, {"coal": 1, "stick": 1}), "red_dye": (1, {"poppy": 1}),
        "bone_meal": (3, {"bone": 1}),
    }  # fmt: skip
    at_table = {
        furnace: (1, {"cobblestone": 8}), "chest": (1, {"planks": 8}),
        "boat": (1, {"planks": 5}), "ladder": (3, {"stick": 7}),
        "bucket": (1, {"iron_ingot": 3}), "shears": (1, {"iron_ingot": 2}),
        "bow": (1, {"stick": 3, "string": 3}),
        "arrow": (4, {"flint": 1, "stick": 1, "feather": 1}),
        "paper": (3, {"sugar_cane": 3}), "book": (1, {"paper": 3, "leather": 1}),
        "bed": (1, {"wool": 3, "planks": 3}), "compass": (1, {"iron_ingot": 4, "redstone": 1}),
        "clock": (1, {"gold_ingot": 4, "redstone": 1}),
        "rail": (16, {"iron_ingot": 6, "stick": 1}), "glass_bottle": (3, {"glass": 3}),
        "iron_helmet": (1, {"iron_ingot": 5}), "bookshelf": (1, {"planks": 6, "book": 3}),
        "enchanting_table": (1, {"obsidian": 4, "diamond": 2, "book": 1}),
    }  # fmt: skip
    for name, material in zip(
        PICKAXES, ("planks", "cobblestone", "iron_ingot", "diamond"), strict=True
    ):
        at_table[name] = 1, {material: 3, "stick": 2}
        at_table[name.replace("pickaxe", "sword")] = 1, {material: 2, "stick": 1}
    for tool, some in (("", by_hand), (table, at_table)):
        made += [Recipe(i, "craft", materials=m, tool=tool, yields=n) for i, (n, m) in some.items()]
    return {recipe.item: recipe for recipe in made}


RECIPES = _recipes()


@dataclass(frozen=True)
class Action:
    """What an agent does: a name of `ACTIONS` and its arguments."""

    name: str
    args: tuple[str | int, ...] = ()

    def __post_init__(self) -> None:
        if self.name not in ACTIONS:
            raise unknown("action", self.name, ACTIONS)
        wanted = ACTIONS[self.name]
        fits = len(self.args) == len(wanted) and all(
            isinstance(arg, kind) and not isinstance(arg, bool)
            for arg, (_, kind) in zip(self.args, wanted, strict=True)
        )
        if not fits:
            named = ", ".join(f"{name}: {kind.__name__}" for name, kind in wanted)
            raise UsageError(f"{self} does not fit {self.name}({named})")

    def __str__(self) -> str:
        return f"{self.name}({', '.join(map(str, self.args))})"


class Step(NamedTuple):
    """What an action came to: a failed one has changed nothing.

    `nearby` is what was placed and is close enough to be used.
    """

    text: str
    ok: bool
    inventory: dict[str, int]
    nearby: tuple[str, ...] = ()


class Failed(Exception):
    """Why an action cannot be done."""


def holds(tool: str, inventory: Mapping[str, int]) -> str | None:
    """What there is of a tool, or of a better pickaxe; the least that will do."""
    enough = PICKAXES[PICKAXES.index(tool) :] if tool in PICKAXES else (tool,)
    return next((one for one in enough if inventory.get(one)), None)


class CraftWorld:
    """A square of land with what lies below it.

    Args:
        size: blocks of a side.
    """

    def __init__(self, seed: int = 0, *, recipes: Mapping[str, Recipe] = RECIPES, size: int = 48):
        if size < 16:
            raise UsageError(f"size={size} leaves no room to explore; give at least 16")
        self.seed, self.recipes, self.size = seed, recipes, size
        self.reset()

    def reset(self) -> Step:
        """The beginning, the same each time."""
        pick = random.Random(f"world {self.seed}")
        self.at = (self.size // 2, SURFACE, self.size // 2)
        self.inventory: dict[str, int] = {}
        self.equipped, self.heat = "", 0
        self.placed: list[tuple[str, tuple[int, int, int]]] = []
        self.things: dict[str, set[tuple[int, int, int]]] = {}
        sources = {r.source: r.level for r in self.recipes.values() if r.source}
        for source, level in sorted(sources.items()):
            found = self.things[source] = set()
            for _ in range(16):
                x, z = (pick.randrange(2, self.size - 2) for _ in range(2))
                y = SURFACE if level is None else max(DEEPEST, level + pick.randint(-4, 4))
                for _ in range(pick.randint(2, 5)):
                    found.add((x + pick.randint(-2, 2), y, z + pick.randint(-2, 2)))
        return self._done("You stand in a green land.", True)

    def step(self, action: Action) -> Step:
        """Do one action; what cannot be done is said in the text and changes nothing."""
        try:
            return self._done(getattr(self, f"_{action.name}")(*action.args), True)
        except Failed as why:
            return self._done(f"{action} failed: {why}.", False)

    def _done(self, text: str, ok: bool) -> Step:
        held = {item: count for item, count in self.inventory.items() if count}
        return Step(f"{text} You are at level {self.at[1]}.", ok, held, self._nearby())

    def _nearby(self) -> tuple[str, ...]:
        return tuple(name for name, at in self.placed if self._far(at) <= NEAR)

    def _equip(self, item: str) -> str:
        self._need({item: 1})
        self.equipped = item
        return f"You hold {item}."

    def _explore(self, thing: str) -> str:
        if thing == "stone" and self.at[1] < SURFACE:
            return "There is stone all around."
        below = self.at[1] < SURFACE
        if below and self.equipped not in PICKAXES:
            raise Failed("a tunnel needs a pickaxe in the hand")
        found = [one for one in self.things.get(thing, ()) if abs(one[1] - self.at[1]) <= SIGHT]
        if not found:
            raise Failed(f"there is no {thing} at this level")
        x, _, z = min(found, key=lambda one: (self._far(one), one))
        here = [self.at[0], self.at[1], self.at[2]]
        for axis, goal in ((0, x), (2, z)):
            gap = goal - here[axis]
            here[axis] += max(0, abs(gap) - SIGHT) * (1 if gap > 0 else -1)
        self.at = (here[0], here[1], here[2])
        return f"You see {thing}."

    def _approach(self, thing: str) -> str:
        if not (thing == "stone" and self.at[1] < SURFACE):
            self.at = self._nearest(thing, SIGHT, "explore to find one")
        return f"You stand beside {thing}."

    def _mine(self, thing: str, count: int) -> str:
        for one in self.placed:
            if one[0] == thing and self._far(one[1]) <= NEAR:
                self.placed.remove(one)
                return self._get({thing: 1})
        return self._take("mine", thing, count)

    def _attack(self, thing: str, count: int) -> str:
        return self._take("attack", thing, count)

    def _take(self, how: str, thing: str, count: int) -> str:
        gives = [r for r in self.recipes.values() if r.how == how and r.source == thing]
        if not gives or count < 1:
            raise Failed(f"one cannot {how} {count} {thing}")
        tool = gives[0].tool
        if how == "mine" and tool and holds(tool, {self.equipped: 1}) is None:
            raise Failed(f"{thing} needs {tool} in the hand")
        taken = 0
        if thing == "stone" and self.at[1] < SURFACE:
            taken = count
        else:
            self._nearest(thing, REACH, "approach one first")
        while taken < count:
            try:
                self.at = self._nearest(thing, SIGHT, "")
            except Failed:
                break
            self.things[thing].remove(self.at)
            taken += 1
        short = "" if taken == count else f" No more {thing} is in sight."
        return self._get({recipe.item: taken * recipe.yields for recipe in gives}) + short

    def _apply(self, tool: str, thing: str, count: int) -> str:
        for recipe in self.recipes.values():
            if recipe.how != "apply" or recipe.source != thing:
                continue
            if tool == recipe.tool or tool in recipe.materials:
                self._nearest(thing, REACH, "approach one first")
                self._need({tool: 1})
                self._use(recipe, count)
                return self._get({recipe.item: count * recipe.yields})
        raise Failed(f"{tool} does nothing to {thing}")

    def _dig_down(self, level: int) -> str:
        if not DEEPEST <= level <= SURFACE:
            raise Failed(f"levels are {DEEPEST} to {SURFACE}")
        if level > self.at[1]:
            raise Failed("that is above you; go_up first")
        if level < self.at[1] and self.equipped not in PICKAXES:
            raise Failed("digging needs a pickaxe in the hand")
        self.at = (self.at[0], level, self.at[2])
        return "You dig down."

    def _go_up(self) -> str:
        self.at = (self.at[0], SURFACE, self.at[2])
        return "You are on the surface."

    def _craft(self, item: str, count: int) -> str:
        return self._make("craft", item, count)

    def _smelt(self, item: str, count: int) -> str:
        return self._make("smelt", item, count)

    def _make(self, how: str, item: str, count: int) -> str:
        recipe = self.recipes.get(item)
        if recipe is None or recipe.how != how:
            raise Failed(f"one cannot {how} {item}")
        if recipe.tool and recipe.tool not in self._nearby():
            raise Failed(f"{item} needs {recipe.tool} placed nearby")
        times = -(-count // recipe.yields)
        fuel = max(0, -(-(times - self.heat) // SMELTS)) if how == "smelt" else 0
        self._use(recipe, times, {FUEL: fuel} if fuel else {})
        if how == "smelt":
            self.heat += fuel * SMELTS - times
        return self._get({item: times * recipe.yields})

    def _place(self, item: str) -> str:
        if item not in {recipe.tool for recipe in self.recipes.values() if not recipe.source}:
            raise Failed(f"{item} has no use when it is placed")
        self._need({item: 1})
        self.inventory[item] -= 1
        self.placed.append((item, self.at))
        return f"You place {item}."

    def _use(self, recipe: Recipe, times: int, more: Mapping[str, int] | None = None) -> None:
        if times < 1:
            raise Failed(f"{times} is no number to make")
        wanted = {item: n * times for item, n in recipe.materials.items()}
        for item, n in (more or {}).items():
            wanted[item] = wanted.get(item, 0) + n
        self._need(wanted)
        for item, n in wanted.items():
            self.inventory[item] -= n
        if not self.inventory.get(self.equipped):
            self.equipped = ""

    def _need(self, wanted: Mapping[str, int]) -> None:
        lacks = {i: n - self.inventory.get(i, 0) for i, n in wanted.items()}
        short = ", ".join(f"{n} {item}" for item, n in lacks.items() if n > 0)
        if short:
            raise Failed(f"you lack {short}")

    def _get(self, items: Mapping[str, int]) -> str:
        for item, n in items.items():
            self.inventory[item] = self.inventory.get(item, 0) + n
        return f"You get {', '.join(f'{n} {item}' for item, n in items.items())}."

    def _nearest(self, thing: str, within: int, remedy: str) -> tuple[int, int, int]:
        found = [one for one in self.things.get(thing, ()) if self._far(one) <= within]
        if not found:
            raise Failed(f"no {thing} is within {within} blocks; {remedy}")
        return min(found, key=lambda one: (self._far(one), one))

    def _far(self, other: tuple[int, int, int]) -> int:
        return max(abs(a - b) for a, b in zip(self.at, other, strict=True))


def action(given: Any) -> Action:
    """An action from JSON: `{"name": ..., "args": [...]}`.

    Raises:
        UsageError: an unknown action, or arguments that do not fit it.
    """
    if not isinstance(given, Mapping) or not isinstance(given.get("args", []), list):
        raise UsageError(f'{given!r} is no action; write {{"name": "go_up", "args": []}}')
    return Action(str(given.get("name")), tuple(given.get("args", [])))
