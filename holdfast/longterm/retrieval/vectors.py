"""What embedders take and give: texts, questions, and turns among their neighbours."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from holdfast.errors import UsageError

BEFORE, AFTER = 2, 2  # turns that a window reaches back and ahead
LETTERS = 1200  # of a window, about as many as MiniLM's 256 pieces have


@dataclass(frozen=True)
class Query:
    """A question read once: `vector` f32[dim]; `states` f32[m,dim] unit rows, and for each of them
    the word it belongs to, or None from embedders without token states."""

    text: str
    vector: np.ndarray
    states: np.ndarray | None = None
    words: list[str] | None = None


@dataclass(frozen=True)
class InContext:
    """One turn among its neighbours: `window` f32[dim] unit; `tokens` the blob, or None."""

    window: np.ndarray
    tokens: bytes | None = None


class Embedder(Protocol):
    """What turns text into vectors; two embedders of one `id` give the same vectors."""

    id: str

    @property
    def dim(self) -> int: ...

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """f32[len(texts), dim], rows of unit norm."""

    def encode_query(self, text: str) -> Query:
        """A question's vector and, where there are any, its tokens' states, from one pass."""

    def encode_in_context(self, texts: Sequence[str], at: Sequence[int]) -> list[InContext]:
        """What is kept of the turns `texts[i]` for i in `at`; texts follow one another."""


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows of unit norm, f32; a row of zeros stays one."""
    rows = np.ascontiguousarray(rows, np.float32)
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)


def around(texts: Sequence[str], i: int) -> tuple[int, int]:
    """First and one past the last turn of the window of turn i.

    Raises:
        UsageError: there is no turn i.
    """
    if not 0 <= i < len(texts):
        raise UsageError(
            f"position {i} of {len(texts)} turn(s); give positions from 0 to {len(texts) - 1}"
        )
    return max(0, i - BEFORE), min(len(texts), i + AFTER + 1)


def encode_windows(
    embedder: "Embedder", texts: Sequence[str], at: Sequence[int]
) -> list[InContext]:
    """`encode_in_context` of an embedder that shows no token states."""
    return [InContext(vector) for vector in embedder.encode([_window(texts, i) for i in at])]


def _window(texts: Sequence[str], i: int) -> str:
    """Turn i whole, and what `LETTERS` leave room for of the turns around it."""
    first, end = around(texts, i)
    before, after = "\n".join(texts[first:i]), "\n".join(texts[i + 1 : end])
    room = max(0, LETTERS - len(texts[i]))
    before = before[len(before) - min(len(before), room, LETTERS // 2) :]
    after = after[: room - len(before)]
    return "\n".join(part for part in (before, texts[i], after) if part)
