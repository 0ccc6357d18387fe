"""The heads of the disk index: means of vectors that are near each other, found in a few passes.

Groups of vectors are found by k-means on a sample, heads by k-means within each group. The borders
of groups cut through clusters, so the heads are then refined over all vectors, and grouped anew.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from holdfast.longterm.disk.cluster import balance, kmeans, nearest, ranges
from holdfast.longterm.disk.files import Spool
from holdfast.native.spann import closure

CANDIDATES, NEAR = 384, 64  # heads near a head: for closure, and for refining
ROUNDS, GROUP_ROUNDS, SWEEPS = 3, 12, 8
SAMPLE = 128  # vectors per group


@dataclass(frozen=True)
class Heads:
    """Heads in the order of their groups: head (H,d), group (G,d) f32, first (G+1) i64."""

    head: np.ndarray
    group: np.ndarray
    first: np.ndarray

    @classmethod
    def of(cls, head: np.ndarray, sizes: np.ndarray) -> "Heads":
        """A group's own vector is the mean of its heads."""
        first = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        parts = [head[a:b].mean(0) for a, b in pairwise(first)]
        group = np.stack(parts) if parts else np.empty((0, head.shape[1]), np.float32)
        return cls(head, group.astype(np.float32), first)

    def near(self, g: int, count: int) -> np.ndarray:
        """The heads nearest to each head of group g, itself first: (heads of g, c) u32."""
        H, group = torch.from_numpy(self.head), torch.from_numpy(self.group)
        order = (group - group[g]).square().sum(1).argsort()
        parts, total = [], 0
        for other in [g, *order[order != g].tolist()]:
            if len(parts) >= 32 and total >= 2 * CANDIDATES:
                break
            parts.append(np.arange(self.first[other], self.first[other + 1]))
            total += len(parts[-1])
        every = torch.from_numpy(np.concatenate(parts))
        mine, others = H[self.first[g] : self.first[g + 1]], H[every]
        bias = others.square().sum(1)
        out = np.empty((len(mine), min(count, len(every))), np.uint32)
        # One group may hold most heads: of clusters of many widths, all wide ones.
        for start, end in ranges(len(mine), 4 * len(every)):
            far = torch.addmm(bias, mine[start:end], others.T, alpha=-2)
            out[start:end] = every[far.topk(out.shape[1], largest=False).indices].numpy()
        return out


def find_heads(
    raw: Spool, grouped: Spool, vectors: Spool, n: int, wanted: int, seed: int
) -> tuple[Heads, np.ndarray, np.ndarray]:
    """Find heads for the n records of `raw`, and write these to `vectors` in the heads' order.

    `grouped` is for records on their way; `raw` is closed once they are there.

    Returns:
        The heads, the head (n) u32 of each record as written, and the records of each group.
    """
    d = raw.kind["x"].shape[0]
    if not n:
        none = np.empty(0, np.uint32)
        return Heads.of(np.empty((0, d), np.float32), none), none, none
    generator = torch.Generator().manual_seed(seed)
    group = _group(raw, n, wanted, generator)
    sizes = np.bincount(group)
    _by_number(raw, grouped, group)
    raw.close()
    heads, label = _split(grouped, sizes[sizes > 0], n, wanted, generator)
    for _ in range(SWEEPS):
        heads = _refine(grouped, heads, label)
    heads, number = _regroup(heads, generator)
    label = number[label]
    _by_number(grouped, vectors, label)
    label = np.sort(label)
    return heads, label, np.diff(np.searchsorted(label, heads.first))


def _rows(spool: Spool, start: int, end: int) -> np.ndarray:
    return np.ascontiguousarray(spool.read(start, end)["x"])


def _group(raw: Spool, n: int, wanted: int, generator: torch.Generator) -> np.ndarray:
    """The group (n) u32 of each record; some may have none."""
    groups = max(1, round(2 * wanted**0.5)) if wanted > 1 else 1
    sample = torch.randperm(n, generator=generator)[: SAMPLE * groups].sort().values.tolist()
    X = torch.from_numpy(np.stack([raw.read(i, i + 1)["x"][0] for i in sample]))
    train, rest = X[::2], X[1::2]
    centre, _ = kmeans(train, groups, GROUP_ROUNDS, generator)
    price = balance(rest if len(rest) else train, centre)
    group = np.empty(n, np.uint32)
    for start, end in ranges(n, raw.kind.itemsize):
        rows = torch.from_numpy(_rows(raw, start, end))
        group[start:end] = nearest(rows, centre, price)[1].numpy()
    return group


def _by_number(source: Spool, target: Spool, number: np.ndarray) -> None:
    """Copy records in ascending order of their numbers; equal ones keep theirs."""
    sizes = np.bincount(number)
    cursor = np.cumsum(sizes) - sizes
    for start, end in ranges(len(number), source.kind.itemsize):
        order = np.argsort(number[start:end], kind="stable")
        rows = source.read(start, end)[order]
        mine, at = np.unique(number[start:end][order], return_index=True)
        for one, part in zip(mine.tolist(), np.split(rows, at[1:]), strict=True):
            target.write(part, int(cursor[one]))
            cursor[one] += len(part)


def _split(grouped: Spool, sizes, n: int, wanted: int, generator) -> tuple[Heads, np.ndarray]:
    """Heads by k-means within each group, and the head (n) u32 of each record."""
    parts, label = [], np.empty(n, np.uint32)
    start = before = 0
    for m in sizes.tolist():
        end = start + m
        # Shares are rounded on the running sum, so that they add up to what was wanted.
        k = max(1, round(wanted * end / n) - before)
        C, own = kmeans(torch.from_numpy(_rows(grouped, start, end)), k, ROUNDS, generator)
        label[start:end] = own.numpy() + before
        parts.append(C.numpy())
        before += len(C)
        start = end
    return Heads.of(np.concatenate(parts), np.array([len(C) for C in parts])), label


def _refine(grouped: Spool, heads: Heads, label: np.ndarray) -> Heads:
    """Each record goes to the nearest head, whose place is then their mean; changes `label`.

    A head that is left without a record stays where it was.
    """
    table = np.concatenate([heads.near(g, NEAR) for g in range(len(heads.group))])
    total = torch.zeros(heads.head.shape)
    count = np.zeros(len(total), np.int64)
    for start, end in ranges(len(label), grouped.kind.itemsize):
        X = _rows(grouped, start, end)
        which = label[start:end].astype(np.int64)
        mine = closure(X, heads.head, table, which, among=1, rng=1.0, replicas=1)[0][:, 0]
        total.index_add_(0, torch.from_numpy(mine.astype(np.int64)), torch.from_numpy(X))
        count += np.bincount(mine, minlength=len(total))
        label[start:end] = mine
    head, filled = heads.head.copy(), count > 0
    head[filled] = total.numpy()[filled] / count[filled, None].astype(np.float32)
    return Heads.of(head, np.diff(heads.first))


def _regroup(heads: Heads, generator: torch.Generator) -> tuple[Heads, np.ndarray]:
    """The heads in groups that fit where they are now, and the new number (H) u32 of each."""
    rows = torch.from_numpy(heads.head)
    _, group = kmeans(rows, len(heads.group), GROUP_ROUNDS, generator)
    order = group.argsort(stable=True).numpy()
    number = np.empty(len(order), np.uint32)
    number[order] = np.arange(len(order))
    return Heads.of(heads.head[order], np.bincount(group.numpy())), number
