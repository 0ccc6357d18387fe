"""SPANN (144): nearest neighbours from disk, with only the heads of the lists in memory.

Keeps    every vector once, and one byte per component of it in the lists of up to 8 heads.
Form     a head is the mean of about 1 / ratio vectors, one byte per component; its list has codes
         and slots of vectors near it; a search reads the lists of the nearest heads, then the best
         vectors in full.
Bytes    RAM H*(d+20) + 2*sqrt(H)*(4*d+8) + n/8, and buffers; disk n*(4*d+28) + r*n*(d+4) in pages
         of 4 KiB per list, for n vectors of d components (a multiple of 16), H heads, r lists each.
Source   Chen, Zhao, Wang, Li, Liu, Li, Yang, Wang, NeurIPS 2021, arXiv:2111.08566; code read.
         Updates by splitting after Xu et al., SOSP 2023, arXiv:2305.07222 (recalled).
Departs  heads are means, 3 per 100 vectors, not real vectors, 16 per 100, and replicas are chosen
         with rng 2: measured better in bytes. Heads are found through groups, not in a graph. Lists
         hold one byte per component; what they find is ranked again by full vectors. A split moves
         no vectors of neighbouring lists; many changes rebuild the index.
"""

import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from holdfast.errors import HoldfastError, UsageError
from holdfast.longterm.disk.base import Base, Tail, blocks, nearest, with_tail
from holdfast.longterm.disk.build import Options, write_index
from holdfast.longterm.disk.files import (
    ADD,
    REMOVE,
    Lock,
    Log,
    damaged,
    read_manifest,
    read_manifest_or_none,
    remove_strays,
    write_manifest,
)
from holdfast.longterm.disk.input import blocks_of, check_ids, check_vectors
from holdfast.longterm.disk.merge import merge
from holdfast.native.spann import (
    Cost,
    Damaged,
    Probe,
    entry_type,
    padded,
    record_type,
)

PROBE, EPS = 64, 1.0
EVERY = 2**62


@dataclass(frozen=True)
class Stats:
    """Bytes of an index, and what its searches read so far.

    `ram` is heads, tables, added vectors and buffers; `disk` the sizes of its files; `deviation`
    the standard deviation of the lengths of lists by their mean.
    """

    vectors: int
    heads: int
    replicas: float
    longest: int
    deviation: float
    ram: int
    disk: int
    queries: int
    bytes_read: int
    pages_read: int
    lists_read: int
    vectors_read: int
    native: bool

    @property
    def bytes_per_query(self) -> float:
        return self.bytes_read / max(1, self.queries)

    @property
    def pages_per_query(self) -> float:
        return self.pages_read / max(1, self.queries)


class SPANN:
    """An index on disk; made by `build` or `open`.

    Distances are squared L2; for cosine give unit rows. Any number of processes may read a folder,
    one may write. Changes are on disk when `add` and `remove` return. Searches may run in several
    threads, also beside a change.
    """

    def __init__(self, path: str | os.PathLike[str], direct: bool = False):
        self.path, self._direct = Path(path), direct
        self._mutex = threading.Lock()
        self._lock: Lock | None = None
        self._log: Log | None = None
        self._killed = 0
        self._spent, self._queries = Cost(), 0
        self._load()

    @classmethod
    def build(
        cls,
        X: np.ndarray | Iterable[Any],
        path: str | os.PathLike[str],
        ids: Any = None,
        *,
        ratio: float = 0.03,
        ram_budget: int | None = None,
        rng: float = 2.0,
        replicas: int = 8,
        seed: int = 0,
        direct: bool = False,
    ) -> Self:
        """Build the index in the folder `path`, in place of the one that may be there.

        Args:
            X: (n,d) array, memory map or tensor, or an iterable of such blocks or of (ids, block).
            ids: (n) int64, one for each vector; 0..n-1 if not given.
            ratio: heads per vector.
            ram_budget: bytes of RAM for heads and tables, instead of `ratio`.
            rng: vectors lie in lists whose heads are that far apart; `replicas` lists at most.
            direct: read past the page cache (O_DIRECT).

        Raises:
            UsageError: NaN, unequal dimensions, repeated ids, a budget too small.
        """
        if not 0 < ratio <= 1:
            raise UsageError(f"ratio={ratio} is outside (0, 1]; 0.03 is usual")
        if replicas < 1 or rng < 0:
            raise UsageError(f"replicas={replicas}, rng={rng}: expected at least 1, and 0 or more")
        folder, options = Path(path), Options(ratio, ram_budget, rng, replicas, seed=seed)
        lock = Lock(folder)
        try:
            known = read_manifest_or_none(folder)
            _replace(folder, known, blocks_of(X, ids), options)
        finally:
            lock.close()
        return cls(folder, direct)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, direct: bool = False) -> Self:
        """Open what `build` made, with the changes since.

        Raises:
            UsageError: there is no index.
            HoldfastError: a checksum does not match.
        """
        return cls(path, direct)

    def close(self) -> None:
        """Give up the right to write; searches go on."""
        with self._mutex:
            if self._lock is not None:
                self._lock.close()
                self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        base, tail = self._state
        return base.alive() + len(tail.ids)

    @property
    def dim(self) -> int:
        return self._state[0].dim

    @property
    def nbytes(self) -> int:
        """Bytes in RAM."""
        base, tail = self._state
        return base.nbytes + tail.nbytes

    def stats(self) -> Stats:
        base, _ = self._state
        count, spent = base.arrays["count"], self._spent
        disk = sum((self.path / n).stat().st_size for n in base.manifest["files"].values())
        return Stats(
            vectors=len(self),
            heads=len(count),
            replicas=float(count.sum(dtype=np.int64) / max(1, base.slots)),
            longest=int(count.max(initial=0)),
            deviation=float(count.std() / count.mean()) if count.any() else 0.0,
            ram=self.nbytes,
            disk=disk + (self.path / "manifest.json").stat().st_size,
            queries=self._queries,
            bytes_read=spent.bytes,
            pages_read=spent.pages,
            lists_read=spent.lists,
            vectors_read=spent.vectors,
            native=base.reader.native,
        )

    def search(
        self,
        Q: Any,
        k: int = 10,
        probe: int | str = PROBE,
        eps: float = EPS,
        allow: Iterable[int] | None = None,
        *,
        rerank: int | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest vectors of each query.

        Args:
            Q: (n,d), or one query (d).
            probe: lists to read, or "all", which is exact.
            eps: lists whose head's squared distance is above (1 + eps) times the nearest are
                skipped.
            allow: ids that may be found. Fewer of them take more lists; few are read directly.
            rerank: full vectors read per query; 2k and at least 20 if not given.

        Returns:
            ids (n,k) int64 and squared distances (n,k) float32, ascending; -1 and inf where there
            are fewer. For one query (k).

        Raises:
            UsageError: wrong dimension, NaN, k < 1.
            HoldfastError: a checksum does not match.
        """
        base, tail = self._state
        Q = np.asarray(Q.detach().cpu() if isinstance(Q, torch.Tensor) else Q)
        single = Q.ndim == 1
        rows = check_vectors(Q[None] if single else Q, base.dim)
        if (
            k < 1
            or (probe != "all" and (not isinstance(probe, int | np.integer) or probe < 1))
            or eps < 0
        ):
            raise UsageError(
                f"k={k}, probe={probe!r}, eps={eps}: expected at least 1, 1 or 'all', and 0"
            )
        allowed = None
        if allow is not None:
            allowed = allow if isinstance(allow, np.ndarray) else np.fromiter(allow, np.int64)
            allowed = np.unique(check_ids(allowed))
        try:
            ids, far = self._search_base(base, rows, k, probe, eps, allowed, rerank)
        except Damaged as error:
            where = base.manifest["files"]["vectors" if error.what == "vector" else "lists"]
            raise damaged(self.path / where, str(error)) from None
        if len(tail.ids):
            ids, far = with_tail(ids, far, tail, rows, k, allowed)
        return (ids[0], far[0]) if single else (ids, far)

    def _search_base(self, base, rows, k, probe, eps, allowed, rerank):
        Q = np.zeros((len(rows), padded(base.dim)), np.float32)
        Q[:, : base.dim] = rows
        heads, groups = len(base.arrays["head"]), len(base.arrays["group"])
        visible = base.live
        if allowed is not None:
            slots = np.sort(base.find(allowed))
            mean = base.arrays["count"].mean() if heads else 0
            cheap = probe != "all" and len(slots) * record_type(base.dim).itemsize <= (
                probe * mean * entry_type(base.dim).itemsize
            )
            if cheap or not len(slots):
                return self._exactly(base, Q, k, slots)
            visible = np.zeros_like(base.live)
            np.bitwise_or.at(visible, slots >> 3, (1 << (slots & 7)).astype(np.uint8))
            if probe != "all":
                probe = -(-probe * base.alive() // len(slots))
        if probe == "all" or probe >= heads:
            how = Probe(k, max(1, heads), max(1, groups), EVERY, max(1, base.slots), 0.0)
        else:
            scan = max(32, groups // 4, -(-4 * probe * groups // heads))
            rerank = max(20, 2 * k) if rerank is None else max(k, rerank)
            enough = 16 * k if eps < float("inf") else EVERY
            how = Probe(k, probe, min(groups, scan), enough, rerank, min(eps, 1e30))
        ids, far, cost = base.reader.search(Q, how, visible)
        self._count(len(Q), cost)
        return ids, far

    def _exactly(self, base: Base, Q: np.ndarray, k: int, slots: np.ndarray):
        records = base.read(slots)
        nbytes = records.nbytes
        self._count(len(Q), Cost(nbytes, -(-nbytes // 4096), 0, len(slots), 0))
        return nearest(Q, records["x"], records["id"], k)

    def _count(self, queries: int, cost: Cost) -> None:
        with self._mutex:
            self._queries += queries
            for name, _ in Cost._fields_:
                setattr(self._spent, name, getattr(self._spent, name) + getattr(cost, name))

    def add(self, ids: Any, X: Any) -> None:
        """Add vectors, on disk when this returns; an id that is there gets the new vector.

        Raises:
            UsageError: wrong dimension, NaN, an id twice, another process writes.
        """
        ids = check_ids(ids)
        X = check_vectors(X, self.dim)
        if len(ids) != len(X) or len(np.unique(ids)) != len(ids):
            raise UsageError(f"{len(ids)} ids for {len(X)} vectors; give one id for each, once")
        if len(ids):
            self._change(ADD, ids, X)

    def remove(self, ids: Any) -> None:
        """Forget vectors, on disk when this returns; ids that are not there are ignored."""
        ids = check_ids(ids)
        if len(ids):
            self._change(REMOVE, ids, None)

    def _change(self, kind: int, ids: np.ndarray, X: np.ndarray | None) -> None:
        with self._mutex:
            self._begin()
            assert self._log is not None
            self._log.append(kind, ids, X)
            self._apply(kind, ids, X)
            base, tail = self._state
            if len(tail.ids) + self._killed > max(1024, base.slots // 256):
                self._fold()

    def _begin(self) -> None:
        """Take the right to write, and see what another process wrote before."""
        if self._lock is not None:
            return
        lock = Lock(self.path)
        try:
            manifest = read_manifest(self.path)
            if manifest != self._state[0].manifest:
                self._load()
            base = self._state[0]
            log = Log(self.path / base.manifest["files"]["log"], writable=True)
            log.end = self._log.end
            self._log.close()
            self._log = log
            self._replay()
            remove_strays(self.path, set(base.manifest["files"].values()))
        except BaseException:
            lock.close()
            raise
        self._lock = lock

    def _load(self) -> None:
        for attempt in range(10):
            manifest = read_manifest(self.path)
            if manifest is None:
                raise UsageError(f"{self.path} holds no index; make one with SPANN.build")
            try:
                base = Base(self.path, manifest, self._direct)
                log = Log(self.path / manifest["files"]["log"], writable=self._lock is not None)
                break
            except FileNotFoundError:
                # Another process replaced the index between the two steps.
                if attempt == 9 or read_manifest(self.path) == manifest:
                    raise HoldfastError(
                        f"{self.path} misses one of {sorted(manifest['files'].values())}; the "
                        "index is a copy of vectors kept elsewhere: rebuild it with SPANN.build"
                    ) from None
        if self._log is not None:
            self._log.close()
        self._log, self._killed = log, 0
        empty = Tail(np.empty(0, np.int64), np.empty((0, base.dim), np.float32))
        self._state: tuple[Base, Tail] = (base, empty)
        self._replay()

    def _replay(self) -> None:
        for kind, ids, X in self._log.read(self.dim):
            self._apply(kind, ids, X)

    def _apply(self, kind: int, ids: np.ndarray, X: np.ndarray | None) -> None:
        base, tail = self._state
        slots = base.find(ids)
        base.kill(slots)
        self._killed += len(slots)
        tail = tail.without(ids)
        self._state = (base, tail.plus(ids, X) if kind == ADD else tail)

    def _fold(self) -> None:
        """Move what the log holds into the lists: a new generation."""
        base, tail = self._state
        manifest, dead = base.manifest, base.slots - base.alive()
        if (
            base.slots < 8 * len(tail.ids)
            or 4 * dead > base.slots
            or 2 * manifest["garbage"] > manifest["pages"]
        ):
            options = Options(**manifest["options"])
            _replace(self.path, manifest, blocks(base, tail), options)
        else:
            new = merge(self.path, manifest, base.arrays, base.reader, base.ids, tail.ids, tail.X)
            write_manifest(self.path, new)
        self._load()
        remove_strays(self.path, set(self._state[0].manifest["files"].values()))


def _replace(folder, known: dict[str, Any] | None, blocks, options: Options) -> None:
    numbers = [int(p.suffix[1:]) for p in folder.iterdir() if p.suffix[1:].isdigit()]
    keep = set(known["files"].values()) if known else set()
    remove_strays(folder, keep)
    manifest = write_index(folder, max(numbers, default=0) + 1, blocks, options)
    write_manifest(folder, manifest)
    remove_strays(folder, set(manifest["files"].values()))
