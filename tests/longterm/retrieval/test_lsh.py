import subprocess
import sys

import numpy as np
import pytest

from holdfast.errors import UsageError
from holdfast.longterm.retrieval.index import Exact
from holdfast.longterm.retrieval.lsh import LSH, probed

DIM = 24


def rows(count, seed=0, dim=DIM):
    X = np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)
    return X / np.linalg.norm(X, axis=1, keepdims=True)


def code_ref(x, axes):
    """One table, one vector: the axis end with the largest inner product."""
    ends = [*(float(x @ a) for a in axes.T), *(float(-(x @ a)) for a in axes.T)]
    return max(range(len(ends)), key=lambda i: ends[i])


def ranks(values):
    return np.argsort(np.argsort(values))


def test_buckets_are_the_nearest_ends_of_the_axes():
    lsh = LSH(DIM, 16, seed=3, tables=2)
    X = rows(50)
    want = [[code_ref(x, axes) for axes in lsh._axes] for x in X]
    assert lsh.codes(X).tolist() == want
    assert lsh.codes(7.5 * X).tolist() == want, "a positive factor changes no bucket"
    assert [order[0] for order in lsh.order(X[0])] == want[0]
    assert (lsh.codes(-X) == (lsh.codes(X) + 8) % 16).all(), "the opposite end of the same axis"


def test_closer_vectors_collide_more_often():
    first, draw = rows(4000, seed=1), np.random.default_rng(2)
    other = draw.standard_normal(first.shape).astype(np.float32)
    other -= (other * first).sum(1, keepdims=True) * first
    other /= np.linalg.norm(other, axis=1, keepdims=True)
    lsh = LSH(DIM, 16, seed=0, tables=8)
    cosines = np.linspace(-0.9, 0.95, 10)
    share = []
    for cosine in cosines:
        second = cosine * first + np.sqrt(1 - cosine**2) * other
        share.append((lsh.codes(first) == lsh.codes(second.astype(np.float32))).mean())
    spearman = np.corrcoef(ranks(cosines), ranks(np.array(share)))[0, 1]
    assert spearman >= 0.95 and share[-1] > 0.4 > 0.05 > share[0]


def test_every_vector_is_in_one_bucket_of_each_table():
    lsh = LSH(DIM, 16, tables=3)
    X, held = rows(200), {}
    for step in range(4):
        ids = np.random.default_rng(step).choice(200, 80, replace=False)
        lsh.add(ids, X[(ids + step) % 200])  # some change their vector
        held.update(zip(ids.tolist(), X[(ids + step) % 200], strict=True))
        gone = ids[:20]
        lsh.remove(gone)
        held = {name: x for name, x in held.items() if name not in gone}
        assert len(lsh) == len(held)
        for table, members in enumerate(lsh._members):
            assert sorted(n for bucket in members.values() for n in bucket) == sorted(held)
            for bucket, names in members.items():
                assert all(lsh.codes(held[n][None])[0, table] == bucket for n in names)


@pytest.mark.parametrize("tables", [1, 3])
def test_all_buckets_together_are_an_exact_search(tables):
    X, exact = rows(150), Exact(DIM)
    lsh = LSH(DIM, 16, tables=tables, probes=16)
    for index in (exact, lsh):
        index.add(np.arange(150), X)
        index.remove(np.arange(0, 150, 9))
    for q in rows(10, seed=5):
        for allow in (None, range(0, 150, 4)):
            for got, want in zip(lsh.search(q, 7, allow), exact.search(q, 7, allow), strict=True):
                assert got.tolist() == want.tolist()


def test_more_tables_find_all_in_the_end():
    X, queries = rows(300), rows(20, seed=7)
    exact = Exact(DIM)
    exact.add(np.arange(300), X)
    found = []
    for tables in (1, 8, 128):
        lsh = LSH(DIM, 16, tables=tables)
        lsh.add(np.arange(300), X)
        same = [len({*exact.search(q, 5)[0]} & {*lsh.search(q, 5)[0]}) for q in queries]
        found.append(sum(same))
    assert found == sorted(found) and found[-1] == 100


def test_another_process_finds_the_same_buckets():
    program = (
        "import numpy as np; from holdfast.longterm.retrieval.lsh import LSH; "
        "x = np.arange(48, dtype=np.float32).reshape(2, 24) % 7 - 3; "
        "print(LSH(24, 16, seed=5, tables=4).codes(x).tolist())"
    )
    told = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    x = np.arange(48, dtype=np.float32).reshape(2, 24) % 7 - 3
    assert told.stdout.strip() == str(LSH(24, 16, seed=5, tables=4).codes(x).tolist())


def test_empty_buckets_are_not_probed():
    assert probed(np.array([3, 1, 0, 2]), {0, 1}, 1) == [1]
    assert probed(np.array([3, 1, 0, 2]), {0, 1}, 9) == [1, 0]
    assert LSH(DIM, 16).search(rows(1)[0], 3)[0].shape == (0,)


def test_what_it_refuses():
    for options, message in (
        ({"buckets": 15}, "buckets=15 is not even.*give 16"),
        ({"buckets": 0}, "buckets=0 is not even and positive.*give 2"),
        ({"buckets": 16, "tables": 0}, "tables=0"),
        ({"buckets": 16, "probes": 0}, "probes=0"),
    ):
        with pytest.raises(UsageError, match=message):
            LSH(DIM, **options)
    with pytest.raises(UsageError, match="dim=0"):
        LSH(0, 16)
    lsh = LSH(DIM, 16)
    with pytest.raises(UsageError, match=r"shape \(2, 8\).*expected \(n, 24\)"):
        lsh.add(np.arange(2), rows(2, dim=8))
    with pytest.raises(UsageError, match=r"a query of shape \(8,\).*\(24,\)"):
        lsh.search(np.zeros(8), 1)
    with pytest.raises(UsageError, match="twice in one add"):
        lsh.add(np.zeros(2, np.int64), rows(2))
    assert len(lsh) == 0 and lsh.candidates(rows(1)[0]) == set()
