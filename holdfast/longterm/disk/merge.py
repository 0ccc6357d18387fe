"""Updates of the disk index: new vectors go to the ends of lists, and long lists are split.

Nothing that the present manifest describes is overwritten. An entry is written behind the last one
that it counts; a list without room for it is copied to the end of the file, where dead entries stay
behind. Whatever a kill interrupts is written again from the log.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from holdfast.longterm.disk.build import AMONG, decode, encode
from holdfast.longterm.disk.cluster import kmeans
from holdfast.longterm.disk.files import (
    ID_TYPE,
    Ids,
    Log,
    read_at,
    write_arrays,
    write_at,
    write_ids,
)
from holdfast.native.spann import (
    NONE,
    PAGE,
    Damaged,
    Reader,
    add_sums,
    closure,
    entry_type,
    padded,
    record_type,
    seal,
    sums,
)


class _Lists:
    """The lists of an index while they change."""

    def __init__(self, fd: int, manifest: dict[str, Any], arrays: dict[str, np.ndarray]):
        self.fd, self.kind = fd, entry_type(manifest["dim"])
        self.pages, self.garbage = manifest["pages"], manifest["garbage"]
        self.page, self.count, self.room, self.check = (
            arrays[name].copy() for name in ("page", "count", "room", "check")
        )

    def read(self, h: int) -> np.ndarray:
        size = int(self.count[h]) * self.kind.itemsize
        data = read_at(self.fd, size, int(self.page[h]) * PAGE)
        if len(data) < size or sums(data) != int(self.check[h]):
            raise Damaged("list", h)
        return data.view(self.kind)

    def fits(self, h: int, more: int) -> bool:
        return (int(self.count[h]) + more) * self.kind.itemsize <= int(self.room[h]) * PAGE

    def append(self, h: int, entries: np.ndarray) -> None:
        before = int(self.count[h]) * self.kind.itemsize
        data = entries.view(np.uint8)
        write_at(self.fd, data, int(self.page[h]) * PAGE + before)
        # Checksums of parts add, so that the list need not be read.
        self.check[h] = add_sums(int(self.check[h]), sums(data, before // 4))
        self.count[h] += len(entries)

    def place(self, entries: np.ndarray) -> tuple[int, int, int, int]:
        """Write a list at the end, with room to grow: its page, count, room and checksum."""
        data = entries.view(np.uint8)
        room = -(-len(data) * 5 // 4 // PAGE) or 1
        page, self.pages = self.pages, self.pages + room
        write_at(self.fd, data, page * PAGE)
        return page, len(entries), room, sums(data)

    def put(self, h: int, placed: tuple[int, int, int, int]) -> None:
        self.garbage += int(self.room[h])
        self.page[h], self.count[h], self.room[h], self.check[h] = placed


def merge(
    folder: Path,
    manifest: dict[str, Any],
    arrays: dict[str, np.ndarray],
    reader: Reader,
    table: Ids,
    ids: np.ndarray,
    X: np.ndarray,
) -> dict[str, Any]:
    """Put vectors (m,d) into the lists; returns the manifest of the new generation.

    `arrays` are those in memory, whose `live` says which slots are left.

    Raises:
        Damaged: a list does not match its checksum.
    """
    dim, n, m = manifest["dim"], manifest["slots"], len(ids)
    d = padded(dim)
    rows = np.zeros(m, record_type(dim))
    rows["x"][:, :dim], rows["id"], rows["slot"] = X, ids, np.arange(n, n + m)
    seal(rows)
    live = _longer(arrays["live"], n, m)
    entries = np.empty(m, entry_type(dim))
    entries["code"], error = encode(rows["x"], arrays["low"], arrays["step"])
    entries["slot"] = rows["slot"]
    heads = _lists_of(np.ascontiguousarray(rows["x"]), arrays, reader, manifest["options"])

    fds = [os.open(folder / manifest["files"][name], os.O_RDWR) for name in ("vectors", "lists")]
    try:
        write_at(fds[0], rows.view(np.uint8), n * rows.itemsize)
        os.fsync(fds[0])
        lists = _Lists(fds[1], manifest, arrays)
        split = _extend(lists, heads, entries, live, manifest, arrays)
        os.ftruncate(fds[1], lists.pages * PAGE)
        os.fsync(fds[1])
    finally:
        for fd in fds:
            os.close(fd)

    generation = manifest["generation"] + 1
    names = manifest["files"] | {name: f"{name}.{generation}" for name in ("ids", "heads", "log")}
    every = np.concatenate([*table, rows[["id", "slot"]].astype(ID_TYPE)])
    every = every[(live[every["slot"] >> 3] >> (every["slot"] & 7) & 1).astype(bool)]
    every = every[np.argsort(every["id"], kind="stable")]
    fence, fence_check = write_ids(folder / names["ids"], every["id"], every["slot"])
    fresh = {
        **_with_split(arrays, lists, split, d),
        **{"low": arrays["low"], "step": arrays["step"], "live": live},
        **{"fence": fence, "fence_check": fence_check},
    }
    heads_check = write_arrays(folder / names["heads"], fresh)
    Log.create(folder / names["log"])
    return manifest | {
        **{"generation": generation, "files": names, "slots": n + m, "named": len(every)},
        **{"pages": lists.pages, "garbage": lists.garbage, "heads_check": heads_check},
        "error": max(manifest["error"], error * (1 + 1e-5)),
    }


def _longer(live: np.ndarray, n: int, m: int) -> np.ndarray:
    out = np.zeros(-(-(n + m) // 8), np.uint8)
    out[: len(live)] = live
    fresh = np.arange(n, n + m)
    np.bitwise_or.at(out, fresh >> 3, (1 << (fresh & 7)).astype(np.uint8))
    return out


def _lists_of(X: np.ndarray, arrays, reader: Reader, options: dict[str, Any]) -> np.ndarray:
    groups = len(arrays["group"])
    near = reader.nearest(X, AMONG, min(groups, max(32, groups // 4)))
    which = np.arange(len(X))
    head = decode(arrays["head"], arrays["low"], arrays["step"])
    heads, _ = closure(X, head, near, which, AMONG, options["rng"], options["replicas"])
    return heads


def _extend(lists: _Lists, heads, entries, live, manifest, arrays) -> dict[int, list]:
    """Append entries to their lists; returns, for each list that was split, its further parts."""
    row, rank = np.nonzero(heads != NONE)
    which = heads[row, rank].astype(np.int64)
    order = np.argsort(which, kind="stable")
    row, which = row[order], which[order]
    touched, at = np.unique(which, return_index=True)
    split: dict[int, list] = {}
    for h, mine in zip(touched.tolist(), np.split(row, at[1:]), strict=True):
        fits = lists.fits(h, len(mine))
        if fits and lists.count[h] + len(mine) <= manifest["limit"]:
            lists.append(h, entries[mine])
            continue
        every = np.concatenate([lists.read(h), entries[mine]])
        every = every[(live[every["slot"] >> 3] >> (every["slot"] & 7) & 1).astype(bool)]
        if len(every) <= manifest["limit"]:
            lists.put(h, lists.place(every))
            continue
        first, *others = _split(every, manifest["limit"], arrays["low"], arrays["step"])
        lists.put(h, lists.place(first[1]))
        split[h] = [(first[0], None), *((head, lists.place(part)) for head, part in others)]
    return split


def _split(entries, limit: int, low: np.ndarray, step: np.ndarray) -> list[tuple]:
    """(head, entries) of the parts of a list; one part, if all its vectors are one."""
    X = torch.from_numpy(decode(entries["code"], low, step))
    parts = max(2, round(len(entries) / (0.6 * limit)))
    C, label = kmeans(X, parts, 8, torch.Generator().manual_seed(0))
    out: list[tuple] = []
    for i in range(len(C)):
        part = entries[(label == i).numpy()]
        again = len(C) > 1 and len(part) > limit
        head = encode(C[i].numpy()[None], low, step)[0][0]
        out += _split(part, limit, low, step) if again else [(head, part)]
    return out


def _with_split(arrays, lists: _Lists, split: dict[int, list], d: int) -> dict[str, np.ndarray]:
    """Heads and directory with the further parts of split lists behind their first ones."""
    head = arrays["head"].copy()
    after, fresh = [], []
    for h, parts in sorted(split.items()):
        head[h] = parts[0][0]
        after += [h + 1] * (len(parts) - 1)
        fresh += parts[1:]
    new = np.array([part[0] for part in fresh], np.uint8).reshape(-1, d)
    out = {"head": np.insert(head, after, new, axis=0), "group": arrays["group"]}
    # A group that begins behind a split list moves; one that begins with it does not.
    out["first"] = arrays["first"] + np.searchsorted(np.array(after), arrays["first"], "right")
    for i, name in enumerate(("page", "count", "room", "check")):
        mine = getattr(lists, name)
        out[name] = np.insert(mine, after, np.array([p[1][i] for p in fresh], mine.dtype))
    return out
