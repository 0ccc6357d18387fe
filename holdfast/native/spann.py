"""Kernels of the disk index: nearest heads, assignment to lists, and search that reads files.

Each has a reference in numpy with the same arguments, which runs where the library was not built
or `HOLDFAST_NATIVE=off` says so. Rows are padded with zeros to `padded(d)` columns.
"""

import ctypes
import os
import threading
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from holdfast import native

PAGE = 4096
NONE = 0xFFFFFFFF  # no head
BAD_LIST, BAD_VECTOR, SHORT = 1, 2, 3
SALT = 0x9E3779B9
_PATH = Path(__file__).with_name("_spann.so")
_pointer, _int, _long, _double = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_double


class _Arrays(ctypes.Structure):
    _fields_ = [
        *((name, _long) for name in ("d", "heads", "groups")),
        *((name, _pointer) for name in ("head", "group", "first", "page", "count", "check")),
        *((name, _pointer) for name in ("low", "step")),
        ("error", _double),
        *((name, _long) for name in ("lists_fd", "vectors_fd", "direct", "variant")),
    ]


class _Query(ctypes.Structure):
    _fields_ = [
        *((name, _long) for name in ("k", "probe", "scan", "enough", "rerank")),
        ("eps", _double),
    ]


class Cost(ctypes.Structure):
    """What a search read: `bytes`, `pages` of 4 KiB, `lists`, full `vectors`; `bad` is where."""

    _fields_ = [(name, _long) for name in ("bytes", "pages", "lists", "vectors", "bad")]


_SIGNATURES = {
    "hf_spann_open": (_pointer, [_pointer]),
    "hf_spann_close": (None, [_pointer]),
    "hf_spann_buffers": (_long, [_pointer]),
    "hf_spann_search": (_int, [_pointer, _long] + [_pointer] * 6 + [_int]),
    "hf_spann_nearest": (_int, [_pointer, _long, _pointer, _long, _long, _pointer, _int]),
    "hf_spann_closure": (
        _int,
        [_int, _long, _long, _pointer, _pointer, _pointer, _long, _pointer, _long, _double, _long]
        + [_pointer, _pointer, _int],
    ),
}


@cache
def _open() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(str(_PATH))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError):
        return None
    return library


def library() -> tuple[ctypes.CDLL, int] | None:
    """The library and the variant to run, or None where numpy does the work."""
    opened, kernels = _open(), native.library()
    return None if opened is None or kernels is None else (opened, kernels[1])


def padded(d: int) -> int:
    return -(-d // 16) * 16


def sums(data: np.ndarray, start: int = 0) -> int:
    """Checksum of bytes, a multiple of 4: sum w and sum (i+1) w of 32-bit words, mod 2^32.

    `start` is the number of words before them: checksums of parts add, half by half.
    """
    words = np.ascontiguousarray(data).reshape(-1).view(np.uint32)
    at = np.arange(start + 1, start + 1 + len(words), dtype=np.uint32)
    low = int(words.sum(dtype=np.uint32))
    return int((words * at).sum(dtype=np.uint32)) << 32 | low


def add_sums(a: int, b: int) -> int:
    return ((a >> 32) + (b >> 32) & 0xFFFFFFFF) << 32 | (a + b & 0xFFFFFFFF)


def record_type(d: int) -> np.dtype:
    """A full vector on disk: padded components, id, checksum, slot."""
    return np.dtype(
        [("x", np.float32, (padded(d),)), ("id", np.int64), ("check", np.uint32), ("slot", "<u4")]
    )


def seal(records: np.ndarray) -> None:
    """Write the checksum of each record into it."""
    records["check"] = 0
    words = records.view(np.uint32).reshape(len(records), records.itemsize // 4)
    at = np.arange(1, words.shape[1] + 1, dtype=np.uint32)
    first = words.sum(1, dtype=np.uint32)
    records["check"] = first ^ (words * at).sum(1, dtype=np.uint32) ^ np.uint32(SALT)


def entry_type(d: int) -> np.dtype:
    """A list's entry: one byte per padded component, then the slot."""
    return np.dtype([("code", np.uint8, (padded(d),)), ("slot", "<u4")])


@dataclass(frozen=True)
class Arrays:
    """What an index keeps in memory, and the files that it reads; d is padded, arrays are C order.

    head (H,d) u8 in the order of their groups, group (G,d) f32, first (G+1) i64; page, count (H)
    u32 and check (H) u64 of each list; low, step (d) f32: a head is low + step * code, and so is
    a list's vector, at most `error` away.
    """

    head: np.ndarray
    group: np.ndarray
    first: np.ndarray
    page: np.ndarray
    count: np.ndarray
    check: np.ndarray
    low: np.ndarray
    step: np.ndarray
    error: float
    lists_fd: int
    vectors_fd: int
    direct: bool

    @property
    def d(self) -> int:
        return self.head.shape[1]

    @property
    def nbytes(self) -> int:
        names = ("head", "group", "first", "page", "count", "check", "low", "step")
        return sum(getattr(self, name).nbytes for name in names)


@dataclass(frozen=True)
class Probe:
    """How to search: lists read, groups of heads looked into, and what is re-ranked.

    Lists further than (1 + eps) times the nearest are skipped once `enough` entries were read.
    """

    k: int
    probe: int
    scan: int
    enough: int
    rerank: int
    eps: float


class Damaged(Exception):
    """A checksum does not match; `what` is "list" or "vector", `where` its number."""

    def __init__(self, what: str, where: int):
        super().__init__(f"{what} {where}")
        self.what, self.where = what, where


class Reader:
    """Searches over `Arrays`, from any thread."""

    def __init__(self, arrays: Arrays):
        self.arrays = arrays
        self._handle: int | None = None
        self._last = threading.Lock()
        found = library()
        if found is not None:
            self._library, variant = found
            a = arrays
            pointers = [getattr(a, n).ctypes.data for n in _pointers()]
            self._handle = self._library.hf_spann_open(
                ctypes.byref(
                    _Arrays(
                        *(a.d, len(a.head), len(a.group), *pointers),
                        *(a.error, a.lists_fd, a.vectors_fd, a.direct, variant),
                    )
                )
            )

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._library.hf_spann_close(self._handle)

    @property
    def native(self) -> bool:
        return self._handle is not None

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays, and of the buffers kept for the next queries."""
        kept = self._library.hf_spann_buffers(self._handle) if self._handle else 0
        return self.arrays.nbytes + kept

    def search(
        self, Q: np.ndarray, how: Probe, visible: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, Cost]:
        """Q (n,d) f32, visible: one bit per slot -> ids (n,k) i64, distances (n,k) f32, cost.

        Missing results have id -1 and distance inf.

        Raises:
            Damaged: a checksum does not match.
            OSError: a file cannot be read.
        """
        if self._handle is None:
            return search_ref(self.arrays, Q, how, visible)
        ids = np.empty((len(Q), how.k), np.int64)
        distances = np.empty((len(Q), how.k), np.float32)
        cost = Cost()
        query = _Query(how.k, how.probe, how.scan, how.enough, how.rerank, how.eps)
        fault = self._library.hf_spann_search(
            *(self._handle, len(Q), Q.ctypes.data, ctypes.byref(query), visible.ctypes.data),
            *(ids.ctypes.data, distances.ctypes.data, ctypes.byref(cost)),
            min(native.threads(), max(1, len(Q))),
        )
        _raise(fault, cost.bad)
        return ids, distances, cost

    def nearest(self, Q: np.ndarray, probe: int, scan: int) -> np.ndarray:
        """Q (n,d) f32 -> the nearest heads (n,probe) u32, ascending; NONE where there are fewer."""
        if self._handle is None:
            return nearest_ref(self.arrays, Q, probe, scan)
        heads = np.empty((len(Q), probe), np.uint32)
        fault = self._library.hf_spann_nearest(
            *(self._handle, len(Q), Q.ctypes.data, probe, scan, heads.ctypes.data),
            min(native.threads(), max(1, len(Q))),
        )
        _raise(fault, 0)
        return heads


def _pointers() -> tuple[str, ...]:
    return ("head", "group", "first", "page", "count", "check", "low", "step")


def _raise(fault: int, bad: int) -> None:
    if fault in (BAD_LIST, BAD_VECTOR):
        raise Damaged("list" if fault == BAD_LIST else "vector", bad)
    if fault == SHORT:
        raise Damaged("file, which ends early,", bad)
    if fault < 0:
        raise OSError(-fault, os.strerror(-fault))


def closure(
    X: np.ndarray,
    head: np.ndarray,
    table: np.ndarray,
    which: np.ndarray,
    among: int,
    rng: float,
    replicas: int,
) -> tuple[np.ndarray, np.ndarray]:
    """The lists that hold each vector: the nearest head, and others that are apart from it.

    Among the `among` nearest of its candidates, in ascending order, a vector takes head h if
    rng * |h - a|^2 >= |x - h|^2 for all heads a taken before.

    Args:
        X: (n,d) f32.
        head: (H,d) f32.
        table: (t,c) u32, candidates; NONE after the last.
        which: (n) i64, the row of `table` for each vector.

    Returns:
        Heads (n,replicas) u32, NONE after the last, and squared distances f32, inf there.
    """
    found = library()
    if found is None:
        return closure_ref(X, head, table, which, among, rng, replicas)
    heads = np.empty((len(X), replicas), np.uint32)
    distances = np.empty((len(X), replicas), np.float32)
    opened, variant = found
    fault = opened.hf_spann_closure(
        *(variant, len(X), X.shape[1], X.ctypes.data, head.ctypes.data, table.ctypes.data),
        *(table.shape[1], which.ctypes.data, among, rng, replicas),
        *(heads.ctypes.data, distances.ctypes.data, native.threads()),
    )
    _raise(fault, 0)
    return heads, distances


def _squared(q: np.ndarray, X: np.ndarray) -> np.ndarray:
    apart = X - q
    return np.einsum("ij,ij->i", apart, apart)


def closure_ref(
    X: np.ndarray,
    head: np.ndarray,
    table: np.ndarray,
    which: np.ndarray,
    among: int,
    rng: float,
    replicas: int,
) -> tuple[np.ndarray, np.ndarray]:
    heads = np.full((len(X), replicas), NONE, np.uint32)
    distances = np.full((len(X), replicas), np.inf, np.float32)
    for i, x in enumerate(X):
        candidates = table[which[i]]
        candidates = candidates[candidates != NONE]
        near = _squared(x, head[candidates])
        taken: list[int] = []
        for j in np.lexsort((candidates, near))[:among]:
            h = candidates[j]
            if taken and rng * _squared(head[h], head[taken]).min() < near[j]:
                continue
            heads[i, len(taken)], distances[i, len(taken)] = h, near[j]
            taken.append(h)
            if len(taken) == replicas:
                break
    return heads, distances


def nearest_ref(a: Arrays, Q: np.ndarray, probe: int, scan: int) -> np.ndarray:
    out = np.full((len(Q), probe), NONE, np.uint32)
    for i, q in enumerate(Q):
        heads = _nearest(a, q, probe, scan)[0]
        out[i, : len(heads)] = heads
    return out


def _nearest(a: Arrays, q: np.ndarray, probe: int, scan: int) -> tuple[np.ndarray, np.ndarray]:
    groups = np.argsort(_squared(q, a.group), kind="stable")[:scan]
    parts = [np.arange(a.first[g], a.first[g + 1]) for g in groups]
    heads = np.concatenate(parts) if parts else np.empty(0, np.int64)
    distances = _to_codes(a, q, a.head[heads])
    order = np.lexsort((heads, distances))[:probe]
    return heads[order], distances[order]


def _to_codes(a: Arrays, q: np.ndarray, codes: np.ndarray) -> np.ndarray:
    apart = (q - a.low) / a.step - codes
    return (apart * apart * (a.step * a.step)).sum(1, dtype=np.float32)


def search_ref(
    a: Arrays, Q: np.ndarray, how: Probe, visible: np.ndarray
) -> tuple[np.ndarray, np.ndarray, Cost]:
    ids = np.full((len(Q), how.k), -1, np.int64)
    distances = np.full((len(Q), how.k), np.inf, np.float32)
    cost = Cost()
    for i, q in enumerate(Q):
        near, exact = _search_one(a, q, how, visible, cost)
        ids[i, : len(near)], distances[i, : len(near)] = near, exact
    return ids, distances, cost


def _search_one(
    a: Arrays, q: np.ndarray, how: Probe, visible: np.ndarray, cost: Cost
) -> tuple[np.ndarray, np.ndarray]:
    heads, far = _nearest(a, q, how.probe, how.scan)
    before = np.cumsum(a.count[heads]) - a.count[heads]
    heads = heads[(far <= (1 + how.eps) * far[:1]) | (before < how.enough)]
    entries = entry_type(a.d)
    slots, rough = [np.empty(0, np.uint32)], [np.empty(0, np.float32)]
    for h in heads[a.count[heads] > 0]:
        nbytes = int(a.count[h]) * entries.itemsize
        data = _read(a.lists_fd, nbytes, int(a.page[h]) * PAGE, a.direct, cost)
        cost.lists += 1
        if sums(data) != int(a.check[h]):
            raise Damaged("list", int(h))
        found = data.view(entries)
        slots.append(found["slot"])
        rough.append(_to_codes(a, q, found["code"]))
    every, first = np.unique(np.concatenate(slots), return_index=True)
    near = np.concatenate(rough)[first]
    seen = (visible[every >> 3] >> (every & 7) & 1).astype(bool)
    every, near = every[seen], near[seen]
    order = np.lexsort((every, near))
    if len(order) >= how.k:
        reach = np.sqrt(float(near[order[how.k - 1]])) + 2 * a.error
        order = order[near[order] <= reach * reach * (1 + 1e-5)]
    chosen = np.sort(every[order[: how.rerank]])
    records = record_type(a.d)
    exact = np.empty(len(chosen), np.float32)
    names = np.empty(len(chosen), np.int64)
    for i, slot in enumerate(chosen.tolist()):
        offset = slot * records.itemsize
        one = _read(a.vectors_fd, records.itemsize, offset, a.direct, cost).view(records)
        check = int(one["check"][0])
        seal(one)
        if one["slot"][0] != slot or one["check"][0] != check:
            raise Damaged("vector", slot)
        exact[i], names[i] = _squared(q, one["x"])[0], one["id"][0]
    cost.vectors += len(chosen)
    best = np.lexsort((names, exact))[: how.k]
    return names[best], exact[best]


def _read(fd: int, nbytes: int, offset: int, direct: bool, cost: Cost) -> np.ndarray:
    first, last = offset // PAGE, -(-(offset + nbytes) // PAGE)
    cost.pages += last - first
    if direct:
        cost.bytes += (last - first) * PAGE
        room = np.empty((last - first + 1) * PAGE, np.uint8)
        room = room[-room.ctypes.data % PAGE :][: (last - first) * PAGE]
        got = os.preadv(fd, [room], first * PAGE)
        data = room[offset - first * PAGE :][:nbytes].copy()
        got -= offset - first * PAGE
    else:
        cost.bytes += nbytes
        data = np.empty(nbytes, np.uint8)
        got = os.preadv(fd, [data], offset)
    if got < nbytes:
        raise Damaged("file, which ends early,", offset)
    return data
