"""A conversation's last sessions in few tokens, and values that change from session to session."""

import json
import random
from datetime import UTC, datetime, timedelta

from holdfast.checks import Result, check
from holdfast.longterm.budget import words
from holdfast.longterm.evaluation import locomo
from holdfast.longterm.language.judgement import content
from holdfast.longterm.memory import Memory
from holdfast.longterm.policies.recursive_summary import RecursiveSummary
from holdfast.longterm.retrieval.embed import Hash

START = datetime(2024, 1, 1, tzinfo=UTC)
CONVERSATIONS, BUDGET, LAST = ("conv-41", "conv-42", "conv-43"), 400, 3
COVERED = 0.6  # share of a fact's words that a text has to hold
USERS, SESSIONS, CHANGES = 5, 10, 8
SLOTS = [
    *("I live in {}.", "I work at {}."),
    *(f"My favorite {thing} is {{}}." for thing in ("color", "book", "dish", "band", "city")),
    *(f"My {whose}'s name is {{}}." for whose in ("dog", "cat", "boss", "dentist", "landlord")),
]


def remembered(told: list[list[dict]], whens: list[datetime], budget: int = BUDGET) -> str:
    """The summary after all sessions."""
    times = iter(range(1 << 20))
    policy = RecursiveSummary(budget=budget)
    memory = Memory(
        ":memory:",
        policy=policy,
        embedder=Hash(16),
        clock=lambda: START + timedelta(seconds=next(times)),
    )
    for number, (turns, when) in enumerate(zip(told, whens, strict=True)):
        memory.add(turns, when=when, session=str(number))
        memory.summarise(str(number))
    with memory.reading() as view:
        return policy.summary(view)


def covered(facts: list[str], text: str) -> float:
    """Percent of facts of whose words a text holds most."""
    held, terms = set(content(text)), [set(content(fact)) for fact in facts]
    return 100 * sum(len(one & held) >= COVERED * len(one) for one in terms) / len(terms)


def conversations() -> tuple[float, float]:
    """Coverage of the observations of the last sessions: by the summary, by the dialogue's tail."""
    raw = {item["sample_id"]: item for item in json.loads(locomo.path().read_text("utf-8"))}
    shares = []
    for conversation in locomo.load(locomo.path(), CONVERSATIONS):
        sessions = list(dict.fromkeys(turn.session for turn in conversation.turns))
        by_session = {s: [t for t in conversation.turns if t.session == s] for s in sessions}
        observed = raw[conversation.id]["observation"]
        facts = [
            fact
            for session in sessions[-LAST:]
            for said in observed.get(f"session_{session}_observation", {}).values()
            for fact, *_ in said
        ]
        summary = remembered(
            [[{"speaker": t.speaker, "content": t.text} for t in by_session[s]] for s in sessions],
            [by_session[s][0].when for s in sessions],
        )
        assert words(summary) <= BUDGET
        tail: list[str] = []
        for turn in reversed(conversation.turns):
            if words("\n".join([turn.line, *tail])) > BUDGET:
                break
            tail.insert(0, turn.line)
        shares.append((covered(facts, summary), covered(facts, "\n".join(tail))))
    ours, base = (sum(share) / len(share) for share in zip(*shares, strict=True))
    return ours, base


def changes(seed: int) -> tuple[float, float]:
    """Percent of the newest values that the summary holds, and of the stale ones."""
    draw = random.Random(seed)
    newest = stale = held = left = 0
    for _ in range(USERS):
        values: dict[str, list[str]] = {}
        told = []
        for number in range(SESSIONS):
            some = draw.sample(SLOTS, CHANGES) if number else SLOTS
            for slot in some:
                values.setdefault(slot, []).append(f"Word{draw.randrange(10**6)}")
            told.append([{"speaker": "Ann", "content": s.format(values[s][-1])} for s in some])
        summary = remembered(told, [START + timedelta(days=i) for i in range(SESSIONS)])
        for *old, new in values.values():
            newest, held = newest + 1, held + (new in summary)
            stale, left = stale + len(old), left + sum(value in summary for value in old)
    return 100 * held / newest, 100 * left / stale


@check(
    "recursive_summary",
    claim="in 400 tokens, covers at least as many observed facts of a conversation's last three "
    "sessions as the last 400 tokens of the dialogue do; of changed values it holds at least 95 % "
    "of the newest and at most 5 % of the stale ones",
)
def run(seed: int) -> Result:
    ours, base = conversations()
    newest, stale = changes(seed)
    return Result(
        measured={"covered": ours, "newest": newest, "stale": stale},
        baseline={"covered by the tail": base},
        threshold="covered >= covered by the tail; newest >= 95 and stale <= 5 percent",
        passed=ours >= base and newest >= 95 and stale <= 5,
    )
