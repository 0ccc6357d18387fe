"""How the disk index is built: streamed, in memory that does not grow with the vectors' bytes.

Vectors are spooled to a file, put in the order of their heads, and assigned to lists. Slots are
numbered in that order, so that vectors that are near each other share pages. Lists are written in a
few sweeps over one byte per component. Every temporary file is unlinked as soon as it is open.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from holdfast.errors import UsageError
from holdfast.longterm.disk.cluster import PIECE, ranges
from holdfast.longterm.disk.files import FORMAT, Log, Spool, write_arrays, write_at, write_ids
from holdfast.longterm.disk.heads import CANDIDATES, Heads, find_heads
from holdfast.longterm.disk.input import check_vectors
from holdfast.native.spann import (
    NONE,
    PAGE,
    closure,
    entry_type,
    padded,
    record_type,
    seal,
    sums,
)

AMONG = 64  # heads that closure looks at


@dataclass(frozen=True)
class Options:
    """What shapes an index.

    Args:
        ratio: heads per vector.
        ram_budget: bytes of RAM for heads and their tables, instead of `ratio`.
        rng: how far apart the heads of one vector's lists must be.
        replicas: lists that hold one vector, at most.
        limit: longest list, in mean lists: farther replicas are dropped, later it is split.
        seed: of samples and first centroids.
    """

    ratio: float = 0.03
    ram_budget: int | None = None
    rng: float = 2.0
    replicas: int = 8
    limit: float = 4.0
    seed: int = 0

    def heads(self, n: int, d: int) -> int:
        """How many heads n vectors of d components get.

        Raises:
            UsageError: the budget holds none.
        """
        if self.ram_budget is None:
            return max(1, round(self.ratio * n)) if n else 0
        if n and self.ram_budget < ram_of(1, n, d):
            raise UsageError(
                f"ram_budget={self.ram_budget} bytes holds no head of {n} vectors x {d}; "
                f"give at least {ram_of(1, n, d)}"
            )
        low, high = 0, n
        while low < high:
            middle = (low + high + 1) // 2
            fits = ram_of(middle, n, d) <= self.ram_budget
            low, high = (middle, high) if fits else (low, middle - 1)
        return low


def ram_of(heads: int, n: int, d: int) -> int:
    """Bytes in RAM: heads, groups, directory, one bit per slot, the fence of the ids."""
    groups = 2 * heads**0.5 + 1
    tables = n // 8 + 12 * (n // 512 + 1) + 8 * padded(d) + 8
    return int(heads * (padded(d) + 20) + groups * (4 * padded(d) + 8) + tables)


def write_index(
    folder: Path, generation: int, blocks: Iterable[tuple[np.ndarray, np.ndarray]], options: Options
) -> dict[str, Any]:
    """Write the files of a new generation, flushed; returns the manifest that names them."""
    names = {n: f"{n}.{generation}" for n in ("vectors", "lists", "ids", "heads", "log")}
    flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC
    open_fds = [os.open(folder / names[n], flags, 0o644) for n in ("vectors", "lists")]
    temporary: list[Spool] = []
    try:
        return _write(folder, generation, blocks, options, names, open_fds, temporary)
    finally:
        for spool in temporary:
            spool.close()
        for fd in open_fds:
            os.close(fd)


def _write(folder, generation, blocks, options, names, fds, temporary) -> dict[str, Any]:
    def spool(kind: np.dtype) -> Spool:
        temporary.append(Spool(folder, kind))
        return temporary[-1]

    raw, n, dim, low, high = _spool(blocks, spool)
    vectors, grouped = Spool(folder, raw.kind, fds[0]), spool(raw.kind)
    wanted = options.heads(n, dim)
    heads, label, sizes = find_heads(raw, grouped, vectors, n, wanted, options.seed)
    grouped.close()
    step = np.where(high > low, (high - low) / 255, 1).astype(np.float32)
    # Lists are filled around the heads as they are kept.
    head, _ = encode(heads.head, low, step)
    heads = replace(heads, head=decode(head, low, step))
    codes = spool(entry_type(dim))
    pairs = np.dtype([("head", "<u4", (options.replicas,)), ("far", "<f4", (options.replicas,))])
    chosen = spool(pairs)
    ids, count, own, error = _assign(
        vectors, heads, label, sizes, codes, chosen, low, step, options
    )
    limit = max(64, int(options.limit * count.mean())) if n else 64
    count = np.minimum(count, np.maximum(limit, own)).astype(np.uint32)
    page, check, pages = _lists(fds[1], codes, chosen, n, dim, count)
    for fd in fds:
        os.fsync(fd)
    order = np.argsort(ids, kind="stable")
    ordered = ids[order]
    same = np.flatnonzero(ordered[1:] == ordered[:-1])
    if len(same):
        raise UsageError(f"id {ordered[same[0]]} is given twice; ids name one vector each")
    fence, fence_check = write_ids(folder / names["ids"], ordered, order)
    live = np.full(-(-n // 8), 255, np.uint8)
    if n % 8:
        live[-1] = (1 << n % 8) - 1
    arrays = {
        **{"head": head, "group": heads.group, "first": heads.first, "page": page},
        **{"count": count, "room": pages_of(count, dim), "check": check},
        **{"low": low, "step": step, "live": live, "fence": fence, "fence_check": fence_check},
    }
    heads_check = write_arrays(folder / names["heads"], arrays)
    Log.create(folder / names["log"])
    return {
        **{"format": FORMAT, "generation": generation, "dim": dim, "files": names},
        **{"slots": n, "pages": pages, "garbage": 0, "heads_check": heads_check, "error": error},
        **{"limit": limit, "named": n},
        "options": vars(options),
    }


def _spool(blocks, spool) -> tuple[Spool, int, int, np.ndarray, np.ndarray]:
    """All vectors to one file, in the order given; their number, dimension and range."""
    raw, n, dim = None, 0, None
    low = high = np.empty(0, np.float32)
    for ids, X in blocks:
        if raw is None:
            dim = X.shape[1]
            raw = spool(record_type(dim))
            low, high = np.full((2, padded(dim)), np.inf, np.float32) * [[1], [-1]]
        X = check_vectors(X, dim)
        for start, end in ranges(len(X), raw.kind.itemsize):
            rows = np.zeros(end - start, raw.kind)
            rows["x"][:, :dim], rows["id"] = X[start:end], ids[start:end]
            low, high = np.minimum(low, rows["x"].min(0)), np.maximum(high, rows["x"].max(0))
            raw.write(rows, n)
            n += end - start
    if raw is None:
        raise UsageError("no block of vectors was given; give at least one, which may have 0 rows")
    low, high = (np.where(np.isfinite(a), a, 0).astype(np.float32) for a in (low, high))
    return raw, n, dim, low, high


def encode(X: np.ndarray, low: np.ndarray, step: np.ndarray) -> tuple[np.ndarray, float]:
    """One byte per component, and the largest distance between a vector and what bytes say."""
    codes = np.clip(np.rint((X - low) / step), 0, 255).astype(np.uint8)
    apart = decode(codes, low, step) - X
    error = float(np.sqrt(np.einsum("ij,ij->i", apart, apart).max(initial=0)))
    return codes, error


def decode(codes: np.ndarray, low: np.ndarray, step: np.ndarray) -> np.ndarray:
    return low + step * codes.astype(np.float32)


def _assign(vectors, heads: Heads, label, sizes, codes, chosen, low, step, options):
    """Closure of every vector, its codes, and its final record."""
    ids, k = np.empty(len(label), np.int64), len(heads.head)
    count, own, error = np.zeros(k, np.int64), np.zeros(k, np.int64), 0.0
    start = 0
    for g, m in enumerate(sizes.tolist()):
        table = heads.near(g, CANDIDATES)
        for a, b in ((start + a, start + b) for a, b in ranges(m, vectors.kind.itemsize)):
            rows = vectors.read(a, b)
            which = label[a:b] - heads.first[g]
            X = np.ascontiguousarray(rows["x"])
            out = np.empty(b - a, chosen.kind)
            out["head"], out["far"] = closure(
                X, heads.head, table, which, AMONG, options.rng, options.replicas
            )
            chosen.write(out, a)
            count += np.bincount(out["head"][out["head"] != NONE], minlength=k)
            own += np.bincount(out["head"][:, 0], minlength=k)
            entries = np.empty(b - a, codes.kind)
            entries["code"], worst = encode(X, low, step)
            error = max(error, worst)
            entries["slot"] = rows["slot"] = np.arange(a, b)
            codes.write(entries, a)
            seal(rows)
            vectors.write(rows, a)
            ids[a:b] = rows["id"]
        start += m
    return ids, count, own, error * (1 + 1e-5)


def pages_of(count: np.ndarray, dim: int) -> np.ndarray:
    """Pages of 4 KiB that lists of so many entries take."""
    return (-(-count.astype(np.int64) * entry_type(dim).itemsize // PAGE)).astype(np.uint32)


def _lists(fd, codes, chosen, n, dim, count) -> tuple[np.ndarray, np.ndarray, int]:
    """Write all lists; (first page, checksum) of each, and the pages of the file."""
    size = entry_type(dim).itemsize
    room = pages_of(count, dim).astype(np.int64)
    page = np.cumsum(room) - room
    check = np.zeros(len(count), np.uint64)
    budget = max(PIECE, n * 4 * padded(dim) // 12)  # bytes of lists per sweep
    start = 0
    filled = np.cumsum(count.astype(np.int64) * size)
    while start < len(count):
        before = filled[start - 1] if start else 0
        end = max(start + 1, int(np.searchsorted(filled, before + budget, "right")))
        _sweep(fd, codes, chosen, n, count, page, check, start, end)
        start = end
    pages = int(room.sum())
    os.ftruncate(fd, pages * PAGE)
    return page.astype(np.uint32), check, pages


def _sweep(fd, codes, chosen, n, count, page, check, start, end) -> None:
    """Write lists start to end."""
    slots, heads, fars = [], [], []
    for a, b in ranges(n, chosen.kind.itemsize):
        rows = chosen.read(a, b)
        row, rank = np.nonzero((rows["head"] >= start) & (rows["head"] < end))
        slots.append((row + a).astype(np.uint32))
        heads.append(rows["head"][row, rank] - np.uint32(start))
        # A vector's nearest list never drops it.
        fars.append(np.where(rank, rows["far"][row, rank], -1).astype(np.float32))
    slot, head, far = (np.concatenate(parts) for parts in (slots, heads, fars))
    wanted = count[start:end].astype(np.int64)
    have = np.bincount(head, minlength=end - start)
    keep = np.ones(len(slot), bool)
    for h in np.flatnonzero(have > wanted):
        mine = np.flatnonzero(head == h)
        keep[mine[np.argsort(far[mine], kind="stable")[wanted[h] :]]] = False
    slot, head = slot[keep], head[keep]
    order = np.argsort(head, kind="stable")
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    entries = np.empty(len(order), codes.kind)
    for a, b in ranges(n, codes.kind.itemsize):
        low, high = np.searchsorted(slot, (a, b))
        if low < high:
            entries[place[low:high]] = codes.read(a, b)[slot[low:high] - a]
    ends = np.cumsum(wanted)
    for i in np.flatnonzero(wanted):
        part = entries[ends[i] - wanted[i] : ends[i]]
        write_at(fd, part.view(np.uint8), int(page[start + i]) * PAGE)
        check[start + i] = sums(part.view(np.uint8))
