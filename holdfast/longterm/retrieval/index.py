"""Vector indexes: in RAM and exact, or on disk; caches of what a store holds, never its only copy.

Keeps    unit vectors by id, and on disk the stamp of the store's state that they stand for.
Form     fp32 rows, or the files of `spann`.
Bytes    4*d + 8 per vector in RAM, up to twice that while growing; on disk what `spann` says.
"""

import json
import shutil
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from holdfast import files
from holdfast.errors import UsageError
from holdfast.longterm.spann import SPANN

Vectors = Callable[[], Iterable[tuple[np.ndarray, np.ndarray]]]


class Index(Protocol):
    """Unit vectors found by cosine."""

    @property
    def dim(self) -> int: ...

    def __len__(self) -> int: ...

    def add(self, ids: np.ndarray, X: np.ndarray) -> None:
        """Take in rows f32[n,dim]; an id that is here already gets the new vector."""

    def remove(self, ids: np.ndarray) -> None:
        """Forget ids; unknown ones are ignored."""

    def search(
        self, q: np.ndarray, k: int, allow: Iterable[int] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids int64[<=k] and cosines f32, highest first, of those allowed."""


class Exact:
    """All vectors in RAM, compared one by one."""

    def __init__(self, dim: int):
        self._dim = dim
        self._ids, self._rows = np.empty(0, np.int64), np.empty((0, dim), np.float32)
        self._at: dict[int, int] = {}

    @property
    def dim(self) -> int:
        return self._dim

    def __len__(self) -> int:
        return len(self._at)

    def add(self, ids: np.ndarray, X: np.ndarray) -> None:
        X = np.asarray(X, np.float32)
        _check_rows(ids, X, self.dim)
        self._reserve(len(self) + len(ids))
        for name, row in zip(np.asarray(ids).tolist(), X, strict=True):
            at = self._at.setdefault(name, len(self._at))
            self._ids[at], self._rows[at] = name, row

    def _reserve(self, count: int) -> None:
        if count > len(self._ids):
            size = max(count, 2 * len(self._ids))
            for name in ("_ids", "_rows"):
                old = getattr(self, name)
                grown = np.zeros((size, *old.shape[1:]), old.dtype)
                grown[: len(old)] = old
                setattr(self, name, grown)

    def remove(self, ids: np.ndarray) -> None:
        for name in np.asarray(ids).tolist():
            at = self._at.pop(name, None)
            last = len(self._at)
            if at is not None and at != last:
                # The last row fills the gap.
                self._ids[at], self._rows[at] = self._ids[last], self._rows[last]
                self._at[int(self._ids[at])] = at

    def search(
        self, q: np.ndarray, k: int, allow: Iterable[int] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        _check_query(q, k, self.dim)
        if allow is None:
            at = np.arange(len(self))
            rows = self._rows[: len(self)]
        else:
            at = np.array(sorted({self._at[name] for name in allow if name in self._at}), np.int64)
            rows = self._rows[at]
        cosines = rows @ np.asarray(q, np.float32)
        ids = self._ids[at]
        order = np.lexsort((ids, -cosines))[:k]
        return ids[order], cosines[order]


class Disk:
    """A SPANN index as a cache of a store, rebuilt where its stamp is not the store's.

    The store commits a change before it is made here, and `mark` follows: whatever a crash comes
    between, the stamp is old and the index is built anew.

    Args:
        path: a folder of this index's own.
        dim: of the vectors.
        stamp: what the vectors stand for, e.g. {"embedder": "minilm", "seq": 17}.
        vectors: yields (ids, rows) of all vectors, block by block, when they are needed.
        options: of `SPANN.build`.
    """

    def __init__(self, path: str | Path, dim: int, stamp: dict, vectors: Vectors, **options: Any):
        self.path, self._dim, self._options = Path(path), dim, options
        self._spann: SPANN | None = None
        self._files, self._mark = self.path / "spann", self.path / "stamp.json"
        if self._known() != {"dim": dim, **stamp}:
            # Without a mark first: half a rebuild must not be taken for the index of before.
            self._mark.unlink(missing_ok=True)
            shutil.rmtree(self._files, ignore_errors=True)
            self._build(vectors())
            self.mark(stamp)
        elif self._files.exists():
            self._spann = SPANN.open(self._files)

    def _known(self) -> dict | None:
        try:
            return json.loads(self._mark.read_text())
        except (FileNotFoundError, ValueError):
            return None

    def mark(self, stamp: dict) -> None:
        """Say what the vectors stand for now; atomic."""
        self.path.mkdir(parents=True, exist_ok=True)
        files.write_text(self._mark, json.dumps({"dim": self.dim, **stamp}))

    def _build(self, blocks: Iterable[tuple[np.ndarray, np.ndarray]]) -> None:
        blocks = iter(blocks)
        first = next((block for block in blocks if len(block[0])), None)
        if first is not None:
            self._spann = SPANN.build(chain([first], blocks), self._files, **self._options)

    @property
    def dim(self) -> int:
        return self._dim

    def __len__(self) -> int:
        return 0 if self._spann is None else len(self._spann)

    def add(self, ids: np.ndarray, X: np.ndarray) -> None:
        X = np.asarray(X, np.float32)
        _check_rows(ids, X, self.dim)
        if self._spann is not None:
            self._spann.add(ids, X)
        elif len(ids):
            self._build([(np.asarray(ids, np.int64), X)])

    def remove(self, ids: np.ndarray) -> None:
        if self._spann is not None:
            self._spann.remove(ids)

    def search(
        self, q: np.ndarray, k: int, allow: Iterable[int] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        _check_query(q, k, self.dim)
        if self._spann is None:
            return np.empty(0, np.int64), np.empty(0, np.float32)
        ids, far = self._spann.search(q, k, allow=allow)
        found = ids >= 0
        # Between unit vectors.
        return ids[found], 1 - far[found] / 2

    def close(self) -> None:
        if self._spann is not None:
            self._spann.close()


def _check_rows(ids: np.ndarray, X: np.ndarray, dim: int) -> None:
    if X.shape != (len(ids), dim):
        raise UsageError(
            f"{len(ids)} ids came with vectors of shape {X.shape}; expected ({len(ids)}, {dim})"
        )
    if len(np.unique(ids)) < len(ids):
        raise UsageError("an id comes twice in one add; each vector has an id of its own")


def _check_query(q: np.ndarray, k: int, dim: int) -> None:
    if np.shape(q) != (dim,):
        raise UsageError(
            f"a query of shape {np.shape(q)}; the index holds vectors of shape ({dim},)"
        )
    if k < 1:
        raise UsageError(f"k={k}; ask for at least 1 vector")
