"""People who change their jobs, told in any order: who worked where, now and at any past date."""

import random
from datetime import UTC, datetime, timedelta

from holdfast.checks import Result, check
from holdfast.longterm.memory import Memory
from holdfast.longterm.policies.zep import Zep
from holdfast.longterm.retrieval.embed import Hash

START = datetime(2010, 1, 1, tzinfo=UTC)
TOLD = datetime(2024, 1, 1, tzinfo=UTC)
PEOPLE, JOBS = 200, 5


def careers(seed: int) -> list[list[tuple[datetime, str]]]:
    """For each person when each job began, in that order; no employer has one person twice."""
    draw = random.Random(seed)
    found = []
    for _ in range(PEOPLE):
        days = sorted(draw.sample(range(0, 4000, 10), JOBS))
        firms = draw.sample(range(1000), JOBS)
        found.append(
            [
                (START + timedelta(days=day), f"Firm {firm}")
                for day, firm in zip(days, firms, strict=True)
            ]
        )
    return found


@check(
    "zep",
    claim="of 200 people with 5 jobs each, told in shuffled order, it knows every present employer "
    "and every past one on every past date; the latest word alone knows at most 25 % of the past",
)
def run(seed: int) -> Result:
    people = careers(seed)
    told = [(person, at, firm) for person, jobs in enumerate(people) for at, firm in jobs]
    random.Random(seed).shuffle(told)
    times = iter(range(1 << 20))
    policy = Zep()
    memory = Memory(
        ":memory:",
        policy=policy,
        embedder=Hash(64),
        clock=lambda: TOLD + timedelta(seconds=next(times)),
    )
    latest: dict[int, str] = {}
    for person, at, firm in told:
        latest[person] = firm
        memory.transact(
            lambda view, who=f"Person {person}", where=firm, since=at: policy.add_fact(
                view, who, "works_at", where, since
            )
        )
    right = {"present": [0, 0], "past": [0, 0]}
    asked = dict.fromkeys(right, 0)
    dates = [(TOLD, "present"), *((START + timedelta(days=d), "past") for d in range(5, 4000, 400))]
    for date, when in dates:
        with memory.reading() as view:
            held: dict[str, list[str]] = {}
            for item in view.as_of(date, None):
                if item.kind == "relation":
                    held.setdefault(item.data["subject"], []).append(item.data["object"])
        for person, jobs in enumerate(people):
            begun = [firm for at, firm in jobs if at <= date]
            if when == "past" and (not begun or begun[-1] == jobs[-1][1]):
                continue  # nothing to know, or it is the present job still
            asked[when] += 1
            right[when][0] += held.get(f"Person {person}", []) == begun[-1:]
            right[when][1] += latest[person] == begun[-1]
    share = {name: [100 * n / asked[name] for n in counts] for name, counts in right.items()}
    return Result(
        measured={name: ours for name, (ours, _) in share.items()}
        | {"questions": sum(asked.values())},
        baseline={f"{name}, latest word": base for name, (_, base) in share.items()},
        threshold="present = past = 100 percent; latest word <= 25 percent of the past",
        passed=share["present"][0] == share["past"][0] == 100 and share["past"][1] <= 25,
    )
