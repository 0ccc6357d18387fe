"""Fit what was found into a budget of tokens or bytes, without ever exceeding it."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from holdfast.errors import UsageError
from holdfast.longterm.records import Hit

_PIECES = re.compile(r"\w+|[^\w\s]")
_LINE = re.compile(r"^- \[(?P<id>m[0-9a-f]{20})(?: [^\]]*)?\] (?P<text>.*)$", re.DOTALL)


def words(text: str) -> int:
    """Words and punctuation marks: a count that needs no tokenizer."""
    return len(_PIECES.findall(text))


def nbytes(text: str) -> int:
    """Bytes of UTF-8."""
    return len(text.encode())


@dataclass(frozen=True)
class Context:
    """Text for a prompt, what it costs, and the memories it is made of, in the text's order."""

    text: str
    used: int
    budget: int
    ids: tuple[str, ...]
    left_out: int = 0


def line(hit: Hit) -> str:
    """One memory as a line of data: who, when and which it is come first, then its text.

    Further lines of the text are indented, so that no text can look like another memory.
    """
    parts = [hit.id]
    if hit.valid_from is not None:
        parts.append(f"{hit.valid_from:%Y-%m-%d %H:%M}")
    if hit.valid_to is not None:
        parts.append(f"until {hit.valid_to:%Y-%m-%d %H:%M}")
    if hit.speaker:
        parts.append(re.sub(r"[\]\n]", " ", hit.speaker))
    return f"- [{' '.join(parts)}] " + hit.text.replace("\n", "\n    ")


def handed_out(text: str) -> list[tuple[str, str]] | None:
    """The (id, text) of each memory in a text that `line` wrote; None for any other text."""
    found: list[tuple[str, str]] = []
    for row in re.split(r"\n(?! {4})", text.strip("\n")):
        match = _LINE.match(row)
        if match is None:
            return None
        found.append((match["id"], match["text"].replace("\n    ", "\n")))
    return found


def pack(
    hits: Sequence[Hit],
    budget: int,
    count: Callable[[str], int] = words,
    *,
    first: Sequence[Hit] = (),
    chronological: bool = False,
    line: Callable[[Hit], str] = line,
) -> Context:
    """Take hits by rank as long as the whole text stays within the budget.

    A hit that no longer fits is passed over, later shorter ones may still fit.

    Args:
        budget: what `count` may return for the text at most.
        first: what stands before all hits, in this order, and is taken before them.
        chronological: put the hits that were taken into the order of their times, not their ranks.

    Raises:
        UsageError: a negative budget.
    """
    if budget < 0:
        raise UsageError(f"budget={budget} is negative; give the tokens or bytes of the context")
    taken: list[Hit] = []
    lines: list[str] = []
    used = 0
    for hit in [*first, *hits]:
        text = line(hit)
        # A tokenizer may merge across lines, so that the sum is only a first guess.
        if used + count(text) > budget + len(taken):
            continue
        whole = count("\n".join([*lines, text]))
        if whole <= budget:
            taken.append(hit)
            lines.append(text)
            used = whole
    if chronological:
        fixed = sum(any(hit is one for one in first) for hit in taken)
        order = list(range(fixed)) + sorted(
            range(fixed, len(taken)), key=lambda i: (_when(taken[i]), taken[i].position)
        )
        taken, lines = [taken[i] for i in order], [lines[i] for i in order]
        used = count("\n".join(lines)) if lines else 0
        while used > budget:  # another order may tokenize into more pieces
            worst = min(range(len(taken)), key=lambda i: taken[i].score)
            del taken[worst], lines[worst]
            used = count("\n".join(lines)) if lines else 0
    left_out = len(first) + len(hits) - len(taken)
    return Context("\n".join(lines), used, budget, tuple(h.id for h in taken), left_out)


def _when(hit: Hit) -> float:
    when = hit.valid_from or hit.recorded_at
    return when.timestamp() if when is not None else 0.0
