"""Compare policies on the same conversations: what each finds, in how many tokens, bytes, seconds.

A hit counts as a turn if it is one, or if it was made from exactly one: a summary of a whole day
would otherwise find everything.
"""

import contextlib
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from holdfast.errors import UsageError
from holdfast.longterm.evaluation.locomo import Conversation, Question, Report, Score, evaluate
from holdfast.longterm.language.llm import LLM
from holdfast.longterm.memory import Memory
from holdfast.longterm.policy import Policy, find
from holdfast.longterm.retrieval.vectors import Embedder

KS, BUDGETS, DEEP = (5, 10, 20, 50), (500, 1000, 2000), 50
_MARKS = re.compile(r"\w+|[^\w\s]")


def run(
    data: Sequence[Conversation],
    policies: Mapping[str, str | Policy],
    embedder: Embedder,
    *,
    budgets: Sequence[int] = BUDGETS,
    llm: Callable[[], LLM] | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> list[dict[str, Any]]:
    """One row for each policy, by recall@10; `identical_to` names a row whose order is the same.

    Args:
        budgets: tokens of contexts, as the embedder counts them where it can.
        llm: makes a language model for each policy.
        progress: told of every conversation that is done.
    """
    if not data or not any(question.evidence for one in data for question in one.questions):
        raise UsageError("the conversations hold no question with evidence; nothing to compare")
    rows, orders = [], {}
    for name, policy in policies.items():
        row, order = _row(data, policy, embedder, budgets, llm, progress)
        same = next((other for other, known in orders.items() if known == order), None)
        rows.append({"policy": name, "identical_to": same, **row})
        orders[name] = order
    return sorted(rows, key=lambda row: -row["recall@10"])


def _row(
    data: Sequence[Conversation],
    policy: str | Policy,
    embedder: Embedder,
    budgets: Sequence[int],
    llm: Callable[[], LLM] | None,
    progress: Callable[[int], None],
) -> tuple[dict[str, Any], list[list[str]]]:
    count = getattr(embedder, "count", None) or (lambda text: len(_MARKS.findall(text)))
    took: dict[str, list[float]] = {"add": [], "search": []}
    scores: list[Score] = []
    order: list[list[str]] = []
    packed: dict[int, list[float]] = {budget: [] for budget in budgets}
    bytes_, turns, calls = 0, 0, 0
    for conversation in data:
        with remembered(conversation, policy, embedder, llm, took["add"]) as (memory, dia_of):

            def search(_: str, question: Question) -> list[str]:
                start = time.perf_counter()
                hits = memory.search(question.text, limit=DEEP)
                took["search"].append(time.perf_counter() - start)
                return list(dict.fromkeys(i for hit in hits if (i := dia_of(hit.id)) is not None))

            report = evaluate(search, [conversation], KS, count=count)
            scores += report.scores
            for question in conversation.questions:
                if question.evidence:
                    for budget in budgets:
                        ids = memory.context(question.text, budget, count=count).ids
                        got = {dia_of(item) for item in ids}
                        wanted = set(question.evidence)
                        packed[budget].append(len(wanted & got) / len(wanted))
            order += [search("", question) for question in conversation.questions]
            memory.store.shred()  # its log is as long as it happens to be
            bytes_ += memory.store.nbytes()
            turns += len(conversation.turns)
            calls += memory.llm.usage.calls if memory.llm is not None else 0
        progress(1)
    whole = Report(scores)
    row = {f"recall@{k}": whole.recall(k) for k in KS}
    row |= {f"{kind}@10": whole.recall(10, kind) for kind in whole.categories()}
    row |= {f"packed_{budget}": 100 * float(np.mean(packed[budget])) for budget in budgets}
    row |= {
        "bytes_per_turn": bytes_ / turns,
        "add_ms": 1e3 * float(np.sum(took["add"])) / turns,
        "search_ms": 1e3 * float(np.median(took["search"])),
        "llm_calls": calls,
    }
    return row, order


@contextlib.contextmanager
def remembered(
    conversation: Conversation,
    policy: str | Policy,
    embedder: Embedder,
    llm: Callable[[], LLM] | None = None,
    took: list[float] | None = None,
):
    """A memory that lived through a conversation, and which turn each of its ids stands for.

    Sessions come in at their own time, one after another, and each is summarised at its end. The
    clock stands a day after the last one.
    """
    now: list[datetime] = [conversation.turns[0].when]
    with (
        tempfile.TemporaryDirectory() as folder,
        Memory(
            Path(folder) / "memory.db", policy=find(policy), embedder=embedder,
            llm=llm() if llm is not None else None, clock=lambda: now[0], durability="process",
        ) as memory,
    ):  # fmt: skip
        for session in dict.fromkeys(turn.session for turn in conversation.turns):
            turns = [turn for turn in conversation.turns if turn.session == session]
            now[0] = max(now[0], turns[0].when)
            start = time.perf_counter()
            memory.add(
                [
                    {"speaker": turn.speaker, "content": turn.text, "id": turn.id,
                     "when": turn.when, "metadata": {"turn": turn.id}}
                    for turn in turns
                ],
                session=session,
            )  # fmt: skip
            memory.summarise(session)
            if took is not None:
                took.append(time.perf_counter() - start)
        now[0] += timedelta(days=1)
        yield memory, _turn_of(memory)


def _turn_of(memory: Memory) -> Callable[[str], str | None]:
    known: dict[str, str | None] = {}

    def turn_of(item: str) -> str | None:
        if item not in known:
            known[item] = None  # what is made from itself stands for nothing
            with memory.reading() as view:
                versions = view.versions(item)
                if versions and "turn" in versions[-1].metadata:
                    known[item] = versions[-1].metadata["turn"]
                else:
                    origins = {source.id for source in view.sources([item])[item]}
                    if len(origins) == 1:
                        known[item] = turn_of(origins.pop())
        return known[item]

    return turn_of


def draw(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """A picture of evidence found, by rank and by tokens of context."""
    from holdfast.plan.figures import plots, save_figure

    figure = plots().Figure(figsize=(11, 4.2), layout="constrained")
    ranks, tokens = figure.subplots(1, 2)
    for row in rows:
        for axis, prefix in ((ranks, "recall@"), (tokens, "packed_")):
            points = [(int(k.removeprefix(prefix)), row[k]) for k in row if k.startswith(prefix)]
            axis.plot(*zip(*points, strict=True), marker="o", label=row["policy"])
    for axis, label in ((ranks, "turns"), (tokens, "tokens of context")):
        axis.set(xlabel=label, ylabel="evidence found, %", xscale="log", ylim=(0, 100))
        axis.grid(alpha=0.3)
    ranks.legend(fontsize="small")
    save_figure(figure, file)
