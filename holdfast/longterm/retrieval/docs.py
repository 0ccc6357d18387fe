"""What goes into a corpus, and what comes out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

Allow = Callable[[np.ndarray], np.ndarray] | np.ndarray
Fetch = Callable[[Sequence[int]], Mapping[int, "Stored"]]


@dataclass(frozen=True)
class Doc:
    """One memory as it enters a corpus.

    Args:
        key: the store's row.
        position: its place in `session`; without a session it has no neighbours.
        kind: neighbours are of one kind.
        speaker: who said it, or None.
        text: what is read: speaker and caption included.
        own, window: unit vectors f32[d].
        stems: `terms.stems(text)`, where a store has kept it; default: cut here.
        when: it was said or holds from, in microseconds since 1970, or None.
    """

    key: int
    position: int
    session: int | str | None
    kind: str
    speaker: str | None
    text: str
    own: np.ndarray
    window: np.ndarray
    stems: Sequence[str] | None = None
    when: int | None = None


@dataclass(frozen=True)
class Stored:
    """What a store holds of a memory: exact vectors, and the blob of its tokens' signs."""

    own: np.ndarray | None = None
    window: np.ndarray | None = None
    tokens: bytes | None = None


@dataclass(frozen=True)
class Scored:
    """A memory found; `terms` are the shares of `score` by signal and add up to it."""

    key: int
    score: float
    terms: dict[str, float] = field(default_factory=dict)
