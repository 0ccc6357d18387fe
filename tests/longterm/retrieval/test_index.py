import numpy as np
import pytest

from holdfast.errors import UsageError
from holdfast.longterm.retrieval.index import Disk, Exact
from holdfast.longterm.retrieval.vectors import unit

DIM = 24


def rows(count: int, seed: int = 0) -> np.ndarray:
    return unit(np.random.default_rng(seed).normal(size=(count, DIM)))


def brute(held: dict[int, np.ndarray], q: np.ndarray, k: int, allow=None) -> list[int]:
    allowed = [name for name in held if allow is None or name in allow]
    return sorted(allowed, key=lambda name: (-float(held[name] @ q), name))[:k]


@pytest.fixture(params=["exact", "disk"])
def index(request, tmp_path):
    if request.param == "exact":
        yield Exact(DIM)
    else:
        with_disk = Disk(tmp_path / "index", DIM, {"seq": 0}, lambda: [], ratio=0.2)
        yield with_disk
        with_disk.close()


def test_search_equals_brute_force_after_any_history(index):
    rng, held = np.random.default_rng(1), {}
    for step in range(5):
        ids = rng.choice(200, 30, replace=False)  # some are here already and change
        X = rows(30, seed=step)
        index.add(ids, X)
        held.update(zip(ids.tolist(), X, strict=True))
        gone = rng.choice(200, 10, replace=False)
        index.remove(gone)
        held = {name: x for name, x in held.items() if name not in gone}
        assert len(index) == len(held)
    allow = set(range(0, 200, 7))
    for q in rows(8, seed=99):
        for allowed in (None, allow):
            ids, cosines = index.search(q, 5, allowed)
            want = brute(held, q, 5, allowed)
            assert ids.tolist() == want
            np.testing.assert_allclose(cosines, [held[name] @ q for name in want], atol=1e-5)


def test_nothing_is_found_in_nothing(index):
    ids, cosines = index.search(rows(1)[0], 3)
    assert ids.shape == cosines.shape == (0,)
    index.add(np.arange(2), rows(2))
    assert len(index.search(rows(1)[0], 3)[0]) == 2
    assert len(index.search(rows(1)[0], 3, allow=[])[0]) == 0


def test_bad_input_is_refused(index):
    with pytest.raises(UsageError, match=r"2 ids came with vectors of shape \(1, 24\)"):
        index.add(np.arange(2), rows(1))
    with pytest.raises(UsageError, match="twice in one add"):
        index.add(np.zeros(2, np.int64), rows(2))
    with pytest.raises(UsageError, match=r"a query of shape \(3,\).*\(24,\)"):
        index.search(np.zeros(3), 1)
    with pytest.raises(UsageError, match="k=0"):
        index.search(rows(1)[0], 0)


def test_an_index_on_disk_is_rebuilt_only_where_its_stamp_is_old(tmp_path):
    X, reads = rows(50), []

    def vectors():
        reads.append(1)
        yield np.arange(50), X

    def opened(seq: int) -> Disk:
        return Disk(tmp_path, DIM, {"embedder": "test", "seq": seq}, vectors)

    opened(1).close()
    assert len(reads) == 1
    again = opened(1)
    assert len(reads) == 1 and again.search(X[7], 1)[0].tolist() == [7]
    again.add(np.array([50]), rows(1, seed=5))
    again.mark({"embedder": "test", "seq": 2})
    again.close()
    again = opened(2)
    assert len(reads) == 1 and len(again) == 51
    again.add(np.array([51]), rows(1, seed=6))  # the crash comes before the mark
    again.close()
    again = opened(3)
    assert len(reads) == 2 and len(again) == 50
    again.close()


def test_an_empty_index_on_disk_opens_again(tmp_path):
    for _ in range(2):
        index = Disk(tmp_path, DIM, {"seq": 0}, lambda: [])
        assert len(index) == 0
