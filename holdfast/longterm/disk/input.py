"""What enters the disk index: vectors and ids, checked, in blocks."""

import mmap
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor

from holdfast.errors import UsageError
from holdfast.longterm.disk.cluster import PIECE


def blocks_of(X: Any, ids: Any) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(ids, X) of an array, or of an iterable of X or (ids, X); without ids they count up."""
    if isinstance(X, Tensor):
        X = X.detach().cpu().numpy()
    named = None if ids is None else check_ids(ids)
    done = 0
    for block in _slices(X) if isinstance(X, np.ndarray) else X:
        mine, rows = block if isinstance(block, tuple) else (None, block)
        rows = check_vectors(rows)
        if mine is None:
            end = done + len(rows)
            mine = np.arange(done, end) if named is None else named[done:end]
        mine = check_ids(mine)
        if len(mine) != len(rows):
            raise UsageError(f"{len(mine)} ids for {len(rows)} vectors; give one id for each")
        done += len(rows)
        yield mine, rows
    if named is not None and len(named) != done:
        raise UsageError(f"{len(named)} ids for {done} vectors; give one id for each")


def _slices(X: np.ndarray) -> Iterator[np.ndarray]:
    if X.ndim != 2:
        raise UsageError(f"vectors have shape {X.shape}; give rows, shape (n, d)")
    step = max(1, PIECE // max(1, 4 * X.shape[1]))
    for start in range(0, max(1, len(X)), step):
        yield X[start : start + step]
        mapped = getattr(X, "_mmap", None)
        if mapped is not None and hasattr(mapped, "madvise"):
            # Pages that were read would otherwise count as ours until memory is short.
            mapped.madvise(mmap.MADV_DONTNEED)


def check_ids(ids: Any) -> np.ndarray:
    found = np.asarray(ids)
    if found.ndim != 1 or (found.dtype.kind not in "iu" and found.size):
        raise UsageError(f"ids have shape {found.shape}, dtype {found.dtype}; give a row of int64")
    return found.astype(np.int64, copy=False)


def check_vectors(X: Any, d: int | None = None) -> np.ndarray:
    """X as (n,d) float32.

    Raises:
        UsageError: it is not, or a component is NaN or infinite.
    """
    X = np.asarray(X.detach().cpu() if isinstance(X, Tensor) else X)
    if X.ndim != 2 or not X.shape[1] or (d is not None and X.shape[1] != d):
        raise UsageError(f"vectors have shape {X.shape}; expected (n, {d or 'd'})")
    if X.dtype.kind not in "fiu":
        raise UsageError(f"vectors have dtype {X.dtype}; give float32")
    X = X.astype(np.float32, copy=False)
    # A sum is finite only if all are, save for overflow; then look closer.
    if not np.isfinite(X.sum()) and not np.isfinite(X).all():
        row = int(np.flatnonzero(~np.isfinite(X).all(1))[0])
        raise UsageError(f"vector {row} has a NaN or infinite component; distances need numbers")
    return X
