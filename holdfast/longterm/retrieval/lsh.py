"""Cross-polytope hashing: a vector's bucket is the axis, of one rotated at random, nearest to it.

Keeps    unit vectors by id, in each of some tables the ids of every bucket.
Form     fp32 rows as in `Exact`; a projection f32[d, buckets/2] per table, drawn from the seed.
Bytes    4*d + 8 per vector, 2*d*buckets per table, a set entry per vector and table.
"""

from collections.abc import Iterable

import numpy as np

from holdfast.errors import UsageError
from holdfast.longterm.retrieval.index import Exact


class LSH:
    """An `Index` that compares a query only with vectors in the same buckets.

    Args:
        dim: of the vectors.
        buckets: of one table; even, because each axis has two ends.
        seed: of the projections; the same seed gives the same buckets in any process.
        tables: tables that are drawn independently of one another.
        probes: buckets that are searched per table, the best of those that hold anything.

    Raises:
        UsageError: an odd number of buckets, or anything below 1.
    """

    def __init__(self, dim: int, buckets: int, seed: int = 0, *, tables: int = 1, probes: int = 1):
        check_buckets(buckets, tables, probes)
        if dim < 1:
            raise UsageError(f"dim={dim} is not positive; it is the length of the vectors")
        self.buckets, self.tables, self.probes = buckets, tables, probes
        draw = np.random.default_rng(seed)
        self._axes = draw.standard_normal((tables, dim, buckets // 2)).astype(np.float32)
        self._exact = Exact(dim)
        self._codes: dict[int, np.ndarray] = {}
        self._members: list[dict[int, set[int]]] = [{} for _ in range(tables)]

    @property
    def dim(self) -> int:
        return self._exact.dim

    def __len__(self) -> int:
        return len(self._exact)

    def codes(self, X: np.ndarray) -> np.ndarray:
        """The bucket of each row in each table: f32[n,dim] -> int64[n,tables]."""
        return self._sides(X).argmax(2).T

    def order(self, q: np.ndarray) -> np.ndarray:
        """All buckets of each table, the likeliest first: f32[dim] -> int64[tables,buckets]."""
        return np.argsort(-self._sides(q[None])[:, 0], axis=1, kind="stable")

    def _sides(self, X: np.ndarray) -> np.ndarray:
        """How far rows point along each end of each axis, f32[tables,n,buckets]."""
        X = np.asarray(X, np.float32)
        if X.ndim != 2 or X.shape[1] != self.dim:
            raise UsageError(f"vectors of shape {X.shape} were given; expected (n, {self.dim})")
        along = X @ self._axes
        return np.concatenate([along, -along], axis=2)

    def add(self, ids: np.ndarray, X: np.ndarray) -> None:
        codes = self.codes(X)
        self._exact.add(ids, X)
        self._leave(ids)
        for name, code in zip(np.asarray(ids).tolist(), codes, strict=True):
            self._codes[name] = code
            for members, bucket in zip(self._members, code.tolist(), strict=True):
                members.setdefault(bucket, set()).add(name)

    def remove(self, ids: np.ndarray) -> None:
        self._leave(ids)
        self._exact.remove(ids)

    def _leave(self, ids: np.ndarray) -> None:
        for name in np.asarray(ids).tolist():
            code = self._codes.pop(name, ())
            for members, bucket in zip(self._members, code, strict=False):
                members[int(bucket)].discard(name)
                if not members[int(bucket)]:
                    del members[int(bucket)]

    def candidates(self, q: np.ndarray) -> set[int]:
        """The ids that a query is compared with."""
        found: set[int] = set()
        for members, order in zip(self._members, self.order(q), strict=True):
            for bucket in probed(order, members, self.probes):
                found |= members[bucket]
        return found

    def search(
        self, q: np.ndarray, k: int, allow: Iterable[int] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        if np.shape(q) != (self.dim,):
            raise UsageError(
                f"a query of shape {np.shape(q)}; the index holds vectors of shape ({self.dim},)"
            )
        found = self.candidates(np.asarray(q, np.float32))
        return self._exact.search(q, k, found if allow is None else found & set(allow))


def probed(order: np.ndarray, held: Iterable[int], probes: int) -> list[int]:
    """The first `probes` buckets in an order that hold anything."""
    held = set(held)
    return [bucket for bucket in order.tolist() if bucket in held][:probes]


def check_buckets(buckets: int, tables: int, probes: int) -> None:
    """Refuse numbers that make no table."""
    if buckets < 2 or buckets % 2:
        raise UsageError(
            f"buckets={buckets} is not even and positive; an axis has two ends: give "
            f"{max(2, buckets + buckets % 2)}"
        )
    if tables < 1 or probes < 1:
        raise UsageError(f"tables={tables} and probes={probes} must be at least 1")
