"""SPANN beside inverted lists of full vectors, and beside itself without replicas.

60,000 vectors in overlapping clusters. IVF-flat reads lists until it has read as many bytes as
SPANN did. Without replicas, as many lists are read, which is what a disk's time goes into, and then
as many bytes, where replicas gain little. The same for real vectors, where LoCoMo is at hand: its
turns with one head for ten of them, asked its questions.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from holdfast.checks import Result, check
from holdfast.checks.core.locomo import HELD_OUT
from holdfast.longterm.evaluation import locomo
from holdfast.longterm.evaluation.encoded import encode
from holdfast.longterm.retrieval.embed import MiniLM
from holdfast.longterm.spann import SPANN

N, D, CLUSTERS, QUERIES, K = 60_000, 96, 120, 300, 10
PROBE = 8


@dataclass(frozen=True)
class World:
    """Vectors in overlapping Gaussian clusters of log-normal size, and 8 % noise.

    Args:
        spread: deviation of a cluster, where centres have 1.
        widths: sigma of the log-normal by which clusters are wider or narrower than that.
        noise: deviation of the noise.
        falls: component j has variance in proportion to j ** -(2 * falls).
    """

    spread: float
    widths: float
    noise: float
    falls: float

    def vectors(self, n: int, seed: int, clusters: int, d: int = D) -> np.ndarray:
        r = np.random.default_rng(seed)
        centre = r.standard_normal((clusters, d), np.float32)
        size = r.lognormal(0, 1, clusters)
        width = (self.spread * r.lognormal(0, self.widths, clusters)).astype(np.float32)
        spectrum = (np.arange(1, d + 1) ** -self.falls).astype(np.float32)
        X = np.empty((n, d), np.float32)
        for start in range(0, n, 100_000):
            m = min(100_000, n - start)
            mine = r.choice(clusters, m, p=size / size.sum())
            x = centre[mine] + width[mine, None] * r.standard_normal((m, d), np.float32)
            noise = r.random(m) < 0.08
            x[noise] = self.noise * r.standard_normal((int(noise.sum()), d), np.float32)
            X[start : start + m] = x * spectrum
        return X


# Of a million vectors in 2,000 clusters, 1,024 lists of full ones find 0.73, 0.87 and 0.98 of the
# neighbours with 4, 16 and 64 read where widths differ, 0.72, 0.89 and 0.98 where they are equal.
UNEQUAL = World(spread=0.95, widths=0.5, noise=2.0, falls=0.25)
EQUAL = World(spread=0.9, widths=0.0, noise=1.2, falls=0.5)


def exact(X: np.ndarray, Q: np.ndarray, k: int) -> np.ndarray:
    far = (X * X).sum(1) - 2 * Q @ X.T
    return np.argpartition(far, k, 1)[:, :k]


def recall(got: np.ndarray, want: np.ndarray) -> float:
    hits = [len(set(a) & set(b)) / len(b) for a, b in zip(got.tolist(), want.tolist(), strict=True)]
    return float(np.mean(hits))


def searched(index: SPANN, Q: np.ndarray, want: np.ndarray, probe: int) -> tuple[float, float]:
    """Recall, and bytes read per query."""
    before = index.stats().bytes_read
    ids, _ = index.search(Q, K, probe, eps=float("inf"))
    return recall(ids, want), (index.stats().bytes_read - before) / len(Q)


def at_bytes(index: SPANN, Q: np.ndarray, want: np.ndarray, nbytes: float) -> tuple[float, float]:
    """The recall of as many lists as cost at least so many bytes: the other side never has less."""
    low, high = 1, index.stats().heads
    while low < high:
        middle = (low + high) // 2
        enough = searched(index, Q, want, middle)[1] >= nbytes
        low, high = (low, middle) if enough else (middle + 1, high)
    return searched(index, Q, want, low)


def plain_kmeans(X: np.ndarray, sample: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """k centroids, and the list of each vector: 10 rounds on a sample, from its first k rows."""
    C = sample[:k].copy()

    def assign(rows: np.ndarray) -> np.ndarray:
        bias = (C * C).sum(1)
        parts = [rows[i : i + 8192] for i in range(0, len(rows), 8192)]
        return np.concatenate([(bias - 2 * part @ C.T).argmin(1) for part in parts])

    for _ in range(10):
        label = assign(sample)
        order = np.argsort(label, kind="stable")
        count = np.bincount(label, minlength=k)
        filled = np.flatnonzero(count)
        starts = (np.cumsum(count) - count)[filled]
        C[filled] = np.add.reduceat(sample[order], starts) / count[filled, None]
    return C, assign(X)


def ivf_flat(X: np.ndarray, Q: np.ndarray, want: np.ndarray, nbytes: float, seed: int):
    """Inverted lists of full vectors: 4 sqrt(n) centroids."""
    r = np.random.default_rng(seed)
    lists = round(4 * len(X) ** 0.5)
    sample = X[r.choice(len(X), min(len(X), 40 * lists), replace=False)]
    C, label = plain_kmeans(X, sample, lists)
    order = np.argsort(label, kind="stable")
    ends = np.cumsum(np.bincount(label, minlength=lists))
    starts = np.concatenate([[0], ends[:-1]])
    hits, read = [], 0
    for q, truth in zip(Q, want, strict=True):
        near = np.argsort(((C - q) ** 2).sum(1))
        size = (ends - starts)[near] * 4 * X.shape[1]
        # The list that passes the budget is read too.
        near = near[: int(np.searchsorted(np.cumsum(size), nbytes)) + 1]
        rows = np.concatenate([order[starts[i] : ends[i]] for i in near])
        read += len(rows) * 4 * X.shape[1]
        best = rows[((X[rows] - q) ** 2).sum(1).argsort()[:K]]
        hits.append(len(set(best.tolist()) & set(truth.tolist())) / K)
    return float(np.mean(hits)), read / len(Q)


def of_turns(seed: int) -> dict[str, float]:
    """Recall of LoCoMo's turns when 8 lists are read, with replicas and without, and how far the
    lengths of lists deviate, beside those of plain k-means.
    """
    if not locomo.path().exists():
        return {}
    embedder = MiniLM()
    read = [encode(embedder, conversation) for conversation in locomo.load(locomo.path(), HELD_OUT)]
    X = np.concatenate([one.own for one in read])
    Q = np.stack([query.vector for one in read for query in one.queries])
    want, found = exact(X, Q, K), {}
    with tempfile.TemporaryDirectory() as folder:
        for name, replicas in (("turns", 8), ("turns_one_list_each", 1)):
            index = SPANN.build(X, Path(folder) / name, ratio=0.1, replicas=replicas, seed=seed)
            found[f"{name}_recall"] = searched(index, Q, want, PROBE)[0]
            found[f"{name}_deviation"] = index.stats().deviation
        heads = index.stats().heads
    order = np.random.default_rng(seed).permutation(len(X))
    length = np.bincount(plain_kmeans(X, X[order], heads)[1], minlength=heads)
    return found | {"turns_plain_deviation": float(length.std() / length.mean())}


@check(
    "spann",
    claim="reads fewer bytes than inverted lists of full vectors for more of the nearest "
    "neighbours, with heads and tables of at most 6 % of the vectors in memory",
)
def run(seed: int) -> Result:
    every = EQUAL.vectors(N + QUERIES, seed, CLUSTERS)
    X, Q = every[:N], every[N:]
    want = exact(X, Q, K)
    with tempfile.TemporaryDirectory() as folder:
        ours = SPANN.build(X, Path(folder) / "ours", seed=seed)
        alone = SPANN.build(X, Path(folder) / "alone", replicas=1, seed=seed)
        found, nbytes = searched(ours, Q, want, PROBE)
        single, single_bytes = searched(alone, Q, want, PROBE)
        equal, equal_bytes = at_bytes(alone, Q, want, nbytes)
        flat, flat_bytes = ivf_flat(X, Q, want, nbytes, seed)
        stats = ours.stats()
        all_lists = recall(ours.search(Q[:50], K, "all")[0], want[:50])
        measured = {
            "recall": found,
            "bytes_per_query": nbytes,
            "all_lists_recall": all_lists,
            "ram_share": stats.ram / X.nbytes,
            "replicas": stats.replicas,
            "longest_list": stats.longest,
        }
    turns = of_turns(seed)
    measured |= turns
    baseline = {
        "ivf_flat_recall": flat,
        "ivf_flat_bytes_per_query": flat_bytes,
        "one_list_each_recall": single,
        "one_list_each_bytes_per_query": single_bytes,
        "one_list_each_recall_at_equal_bytes": equal,
        "one_list_each_equal_bytes": equal_bytes,
    }
    return Result(
        measured=measured,
        baseline=baseline,
        threshold="recall >= 0.95 and above IVF-flat's in at least as many bytes; RAM <= 6 % of "
        "the vectors; all lists find all; as many lists without replicas recall 0.05 less; of "
        "turns >= 0.9, without replicas 0.1 less, and lists then less uneven than plain k-means's",
        passed=found >= 0.95
        and flat < found
        and nbytes <= flat_bytes
        and measured["ram_share"] <= 0.06
        and all_lists == 1
        and single <= found - 0.05
        and (
            not turns
            or (
                turns["turns_recall"] >= max(0.9, turns["turns_one_list_each_recall"] + 0.1)
                and turns["turns_one_list_each_deviation"] < turns["turns_plain_deviation"]
            )
        ),
    )
