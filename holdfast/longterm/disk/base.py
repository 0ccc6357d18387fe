"""What an open disk index consists of: the files of a generation, and the vectors added since."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from holdfast.longterm.disk.files import Ids, damaged, read_arrays, read_at
from holdfast.native.spann import PAGE, Arrays, Reader, record_type, seal


class Base:
    """The files of one generation, open, and what of them lies in memory."""

    def __init__(self, folder: Path, manifest: dict[str, Any], direct: bool):
        self.folder, self.manifest, names = folder, manifest, manifest["files"]
        self._fds: list[int] = []
        flags = os.O_RDONLY | (os.O_DIRECT if direct else 0)
        for name in ("lists", "vectors"):
            self._fds.append(os.open(folder / names[name], flags))
        a = self.arrays = read_arrays(folder / names["heads"], manifest["heads_check"])
        self.live = a["live"]
        self.slots, self.dim = manifest["slots"], manifest["dim"]
        self.ids = Ids(folder / names["ids"], manifest["named"], a["fence"], a["fence_check"])
        parts = ("head", "group", "first", "page", "count", "check", "low", "step")
        self.reader = Reader(
            Arrays(*(a[name] for name in parts), manifest["error"], *self._fds, direct)
        )
        for fd, name, size in (
            (self._fds[0], "lists", manifest["pages"] * PAGE),
            (self._fds[1], "vectors", self.slots * record_type(self.dim).itemsize),
        ):
            if os.fstat(fd).st_size < size:
                raise damaged(folder / names[name], "the length of the file")

    def __del__(self) -> None:
        for fd in self._fds:
            os.close(fd)

    @property
    def nbytes(self) -> int:
        extra = ("room", "live", "fence", "fence_check")
        return self.reader.nbytes + sum(self.arrays[name].nbytes for name in extra)

    def alive(self) -> int:
        return int(np.bitwise_count(self.live).sum())

    def is_live(self, slots: np.ndarray) -> np.ndarray:
        return (self.live[slots >> 3] >> (slots & 7) & 1).astype(bool)

    def find(self, ids: np.ndarray) -> np.ndarray:
        """Slots of the ids that are there, in no order."""
        slots = self.ids.slots(ids)
        slots = slots[slots >= 0]
        return slots[self.is_live(slots)]

    def kill(self, slots: np.ndarray) -> None:
        np.bitwise_and.at(self.live, slots >> 3, ~(1 << (slots & 7)).astype(np.uint8))

    def read(self, slots: np.ndarray) -> np.ndarray:
        """Records of slots, ascending; neighbours are read together."""
        kind = record_type(self.dim)
        out = np.empty(len(slots), kind)
        cuts = np.flatnonzero(np.diff(slots) != 1) + 1
        fd = os.open(self.folder / self.manifest["files"]["vectors"], os.O_RDONLY)
        try:
            for run in np.split(np.arange(len(slots)), cuts):
                if len(run):
                    size, at = len(run) * kind.itemsize, int(slots[run[0]]) * kind.itemsize
                    out[run] = read_at(fd, size, at).view(kind)
        finally:
            os.close(fd)
        self._check(out, slots)
        return out

    def _check(self, records: np.ndarray, slots: np.ndarray) -> None:
        kept = records["check"].copy()
        seal(records)
        bad = (records["check"] != kept) | (records["slot"] != slots)
        if bad.any():
            where = int(slots[np.flatnonzero(bad)[0]])
            raise damaged(self.folder / self.manifest["files"]["vectors"], f"vector {where}")


@dataclass(frozen=True)
class Tail:
    """Vectors added since the base was written, in memory and in the log."""

    ids: np.ndarray
    X: np.ndarray

    @property
    def nbytes(self) -> int:
        return self.ids.nbytes + self.X.nbytes

    def without(self, ids: np.ndarray) -> "Tail":
        keep = ~np.isin(self.ids, ids)
        return self if keep.all() else Tail(self.ids[keep], self.X[keep])

    def plus(self, ids: np.ndarray, X: np.ndarray) -> "Tail":
        return Tail(np.concatenate([self.ids, ids]), np.concatenate([self.X, X]))


def blocks(base: Base, tail: Tail):
    step = max(1, (4 << 20) // record_type(base.dim).itemsize)
    for start in range(0, base.slots, step):
        slots = np.arange(start, min(base.slots, start + step))
        records = base.read(slots[base.is_live(slots)])
        yield records["id"], records["x"][:, : base.dim]
    yield tail.ids, tail.X


def nearest(Q: np.ndarray, X: np.ndarray, names: np.ndarray, k: int):
    """Exact: Q (n,d), X (m,d), names (m) -> ids (n,k), squared distances (n,k)."""
    ids = np.full((len(Q), k), -1, np.int64)
    far = np.full((len(Q), k), np.inf, np.float32)
    for i, q in enumerate(Q):
        apart = X - q
        mine = np.einsum("ij,ij->i", apart, apart)
        best = np.lexsort((names, mine))[:k]
        ids[i, : len(best)], far[i, : len(best)] = names[best], mine[best]
    return ids, far


def with_tail(ids, far, tail: Tail, rows, k: int, allowed: np.ndarray | None):
    if allowed is not None:
        keep = np.isin(tail.ids, allowed)
        tail = Tail(tail.ids[keep], tail.X[keep])
    near, apart = nearest(rows, tail.X, tail.ids, k)
    ids, far = np.concatenate([ids, near], 1), np.concatenate([far, apart], 1)
    order = np.lexsort((ids, far))[:, :k]
    return np.take_along_axis(ids, order, 1), np.take_along_axis(far, order, 1)
