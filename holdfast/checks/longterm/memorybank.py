"""MemoryBank against first-in-first-out, at an equal number of memories kept."""

import random
from datetime import UTC, datetime, timedelta

from holdfast.checks import Result, check
from holdfast.longterm.memory import Memory
from holdfast.longterm.policies.memorybank import MemoryBank
from holdfast.longterm.retrieval.embed import Hash

_START = datetime(2024, 1, 1, tzinfo=UTC)
_DAYS, _A_DAY, _RECURRING = 20, 50, 0.1


@check("memorybank", claim="what recurs is still recalled when the rest has faded")
def run(seed: int) -> Result:
    """1,000 memories over 20 days; a tenth of them come up again every other day or so."""
    pick, now = random.Random(seed), [_START]
    texts: list[str] = []
    recurring: list[int] = []
    with Memory(
        ":memory:", embedder=Hash(128), policy=MemoryBank(), clock=lambda: now[0]
    ) as memory:
        ids: list[str] = []
        for day in range(_DAYS):
            now[0] = _START + timedelta(days=day)
            fresh = [_text(pick, len(texts) + i) for i in range(_A_DAY)]
            ids += memory.add(fresh)
            texts += fresh
            first = len(texts) - _A_DAY
            recurring += pick.sample(range(first, len(texts)), int(_A_DAY * _RECURRING))
            now[0] += timedelta(hours=12)
            for item in recurring:
                if pick.random() < 0.5:
                    memory.search(_question(texts[item]), limit=2)
            memory.forget()
        kept = memory.stats()["memories"]
        ours = _recall(memory, [ids[i] for i in recurring], [texts[i] for i in recurring])
    with Memory(":memory:", embedder=Hash(128), clock=lambda: now[0]) as plain:
        newest = range(len(texts) - kept, len(texts))
        made = dict(zip(newest, plain.add([texts[i] for i in newest]), strict=True))
        theirs = _recall(plain, [made.get(i, "") for i in recurring], [texts[i] for i in recurring])
    return Result(
        measured={"recall_at_5": ours, "kept": kept, "of": len(texts)},
        baseline={"first_in_first_out": theirs},
        threshold="recall@5 of what recurs >= that of as many newest + 0.2; at most half kept",
        passed=ours >= theirs + 0.2 and kept <= len(texts) / 2,
    )


_SYLLABLES = ("ba", "ke", "li", "mo", "nu", "pe", "ra", "si", "to", "vu")
_WORDS = [first + second for first in _SYLLABLES for second in _SYLLABLES if first != second]


def _text(pick: random.Random, number: int) -> str:
    return f"{' '.join(pick.sample(_WORDS, 4))} happened in room {number}"


def _question(text: str) -> str:
    return f"what about {' '.join(text.split()[:4])}?"


def _recall(memory: Memory, ids: list[str], texts: list[str]) -> float:
    with memory.reading() as view:
        found = [
            wanted in {hit.id for hit in view.search(_question(text), 5)}
            for wanted, text in zip(ids, texts, strict=True)
        ]
    return sum(found) / len(found)
