import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from holdfast import native
from holdfast.errors import HoldfastError, UsageError
from holdfast.longterm.disk import cluster, files, heads
from holdfast.longterm.spann import SPANN
from holdfast.native.spann import (
    NONE,
    add_sums,
    closure,
    closure_ref,
    entry_type,
    library,
    record_type,
    sums,
)

PATHS = ["native", "reference"]


def clustered(n, seed=0, d=24, clusters=40, noise=0.08):
    r = np.random.default_rng(seed)
    centre = r.normal(size=(clusters, d))
    size = r.lognormal(0, 1, clusters)
    x = centre[r.choice(clusters, n, p=size / size.sum())] + r.normal(size=(n, d))
    far = r.random(n) < noise
    x[far] = 1.4 * r.normal(size=(far.sum(), d))
    return x.astype(np.float32)


def exact(X, Q, k, ids=None):
    far = ((Q[:, None].astype(np.float64) - X) ** 2).sum(2)
    order = np.argsort(far, 1, kind="stable")[:, :k]
    names = np.arange(len(X)) if ids is None else ids
    return names[order], np.take_along_axis(far, order, 1)


def recall(got, want):
    return np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(got, want, strict=True)])


@pytest.fixture(scope="module")
def world():
    X = clustered(6040)
    return X[:6000], X[6000:]


@pytest.fixture(scope="module")
def built(world, tmp_path_factory):
    path = tmp_path_factory.mktemp("spann") / "index"
    SPANN.build(world[0], path)
    return path


@pytest.fixture(params=PATHS)
def path_taken(request):
    if request.param == "native":
        if library() is None:
            pytest.skip("the native library is not built here")
        yield request.param
    else:
        with native.force("off"):
            yield request.param


def lists_of(index):
    base, _ = index._state
    for h in range(len(base.arrays["count"])):
        size = int(base.arrays["count"][h]) * entry_type(base.dim).itemsize
        data = files.read_at(base._fds[0], size, int(base.arrays["page"][h]) * 4096)
        yield data.view(entry_type(base.dim))


def test_all_lists_equal_exact_search(world, built, path_taken):
    X, Q = world
    index = SPANN.open(built)
    assert index.stats().native == (path_taken == "native")
    ids, far = index.search(Q, 10, "all")
    want, distances = exact(X, Q, 10)
    assert (ids == want).all()
    np.testing.assert_allclose(far, distances, rtol=1e-5)


def test_default_search_recalls_and_reads_a_part(world, built):
    X, Q = world
    index = SPANN.open(built)
    ids, _ = index.search(Q, 10, 24)
    stats = index.stats()
    assert recall(ids, exact(X, Q, 10)[0]) >= 0.95
    assert stats.queries == len(Q)
    assert stats.bytes_per_query < 0.5 * stats.disk
    assert 0 < stats.lists_read <= 24 * len(Q)


@pytest.mark.skipif(library() is None, reason="the native library is not built here")
def test_native_equals_reference(world, built):
    _, Q = world
    how = {"k": 7, "probe": 9, "eps": 0.5}
    fast = SPANN.open(built)
    got = fast.search(Q, **how)
    with native.force("off"):
        slow = SPANN.open(built)
        want = slow.search(Q, **how)
    assert (got[0] == want[0]).all()
    np.testing.assert_allclose(got[1], want[1], rtol=1e-5)
    a, b = fast.stats(), slow.stats()
    assert (a.lists_read, a.vectors_read) == (b.lists_read, b.vectors_read)
    assert a.bytes_read == b.bytes_read


@pytest.mark.skipif(library() is None, reason="the native library is not built here")
@pytest.mark.parametrize("d", [16, 48])
def test_variants_are_bitwise_equal(world, tmp_path, d):
    X = clustered(1200, d=d)
    SPANN.build(X[:1000], tmp_path / "index")
    found = []
    for variant in native.usable():
        with native.force(variant):
            found.append(SPANN.open(tmp_path / "index").search(X[1000:], 5))
    for ids, far in found[1:]:
        assert (ids == found[0][0]).all() and (far == found[0][1]).all()


@pytest.mark.skipif(library() is None, reason="the native library is not built here")
def test_closure_equals_reference():
    X, head = clustered(200, d=16), clustered(60, 1, d=16)
    table = np.stack([np.random.default_rng(i).permutation(60)[:30] for i in range(5)])
    table = table.astype(np.uint32)
    table[0, 20:] = NONE
    which = np.arange(200) % 5
    got = closure(X, head, table, which, 16, 2.0, 8)
    want = closure_ref(X, head, table, which, 16, 2.0, 8)
    assert (got[0] == want[0]).all()
    np.testing.assert_allclose(got[1], want[1], rtol=1e-5)


def test_closure_by_hand():
    # On a line: heads at 0, 1 and 4; the vector 2.2 takes 1; 0 is 1 from 1, 4 is 9.
    head = np.zeros((3, 16), np.float32)
    head[:, 0] = [0, 1, 4]
    x = np.zeros((1, 16), np.float32)
    x[0, 0] = 2.2
    table = np.array([[0, 1, 2]], np.uint32)
    heads, far = closure(x, head, table, np.zeros(1, np.int64), 3, 1.0, 8)
    # 9 >= 1.8^2, but 1 < 2.2^2
    assert heads[0].tolist() == [1, 2, *[NONE] * 6]
    np.testing.assert_allclose(far[0, :2], [1.44, 3.24], rtol=1e-5)


def test_sums_of_parts_add():
    data = np.random.default_rng(0).integers(0, 256, 4 * 101, dtype=np.uint8)
    assert add_sums(sums(data[:88]), sums(data[88:], 22)) == sums(data)
    swapped = data.reshape(-1, 4)[::-1].reshape(-1)
    assert sums(np.ascontiguousarray(swapped)) != sums(data)


def test_every_vector_is_in_a_list_and_none_twice_in_one(built):
    index = SPANN.open(built)
    seen = []
    for entries in lists_of(index):
        assert len(np.unique(entries["slot"])) == len(entries)
        seen.append(entries["slot"])
    every = np.concatenate(seen)
    assert set(every.tolist()) == set(range(6000))
    stats = index.stats()
    assert stats.replicas == pytest.approx(len(every) / 6000) and stats.replicas <= 8


def test_bytes_on_disk_and_in_ram_follow_the_formulas(built):
    index = SPANN.open(built)
    stats, d, n = index.stats(), 32, 6000  # 24 components are padded to 32
    assert stats.disk == sum(p.stat().st_size for p in built.iterdir())
    count, groups = stats.heads, len(index._state[0].arrays["group"])
    assert count == round(0.03 * n) and groups <= round(2 * count**0.5)
    lists = (built / index._state[0].manifest["files"]["lists"]).stat().st_size
    content = round(stats.replicas * n) * (d + 4)
    assert content <= lists <= content + 4096 * count
    vectors = (built / index._state[0].manifest["files"]["vectors"]).stat().st_size
    assert vectors == n * (4 * d + 16) == n * record_type(24).itemsize
    tables = count * (d + 20) + groups * (4 * d + 8) + 8 + n // 8 + 2 * 4 * d + 12 * 12
    assert stats.ram == tables
    index.search(np.zeros(24, np.float32))
    assert stats.ram <= index.stats().ram <= tables + (2 << 20)


def test_heads_are_means_of_what_is_nearest(world, tmp_path, monkeypatch):
    """Refining brings heads nearer to the vectors, and so finds more in as many lists."""
    apart, found = [], []
    want, _ = exact(world[0], world[1], 10)
    for sweeps in (0, heads.SWEEPS):
        monkeypatch.setattr(heads, "SWEEPS", sweeps)
        index = SPANN.build(world[0], tmp_path / str(sweeps), replicas=1)
        near = index._state[0].arrays
        H = near["low"] + near["step"] * near["head"].astype(np.float32)
        apart.append(exact(H[:, :24], world[0], 1)[1].mean())
        found.append(recall(index.search(world[1], 10, 8)[0], want))
    assert apart[1] < 0.97 * apart[0] and found[1] > found[0]


def test_vectors_lie_in_the_list_of_the_nearest_head_as_kept(world, tmp_path):
    index = SPANN.build(world[0], tmp_path, replicas=1)
    kept = index._state[0].arrays
    H = kept["low"] + kept["step"] * kept["head"].astype(np.float32)
    records = index._state[0].read(np.arange(6000))
    want = exact(H, records["x"], 2)[1]
    for h, entries in enumerate(lists_of(index)):
        far = ((records["x"][entries["slot"]] - H[h]) ** 2).sum(1)
        assert np.allclose(far, want[entries["slot"], 0], rtol=1e-5)


def test_heads_near_a_head_in_pieces(monkeypatch):
    X = clustered(200)
    found = heads.Heads.of(X, np.array([20, 150, 30]))
    assert found.first.tolist() == [0, 20, 170, 200]
    want, _ = exact(X, X, 7)
    for piece in (4 << 20, 4 * 200 * 13):
        monkeypatch.setattr(cluster, "PIECE", piece)
        near = np.concatenate([found.near(g, 7) for g in range(3)])
        assert (near == want).all()


def test_an_index_of_another_format_is_refused(built, tmp_path):
    folder = shutil.copytree(built, tmp_path / "old")
    manifest = files.read_manifest(folder) | {"format": 1}
    files.write_manifest(folder, manifest)
    with pytest.raises(UsageError, match="has format 1, this version reads 2; rebuild"):
        SPANN.open(folder)
    before = {p.name for p in folder.iterdir()}
    with pytest.raises(UsageError, match="twice"):
        SPANN.build(clustered(2), folder, ids=[1, 1])
    assert before <= {p.name for p in folder.iterdir()}, "a build that fails takes nothing away"
    with SPANN.build(clustered(300), folder) as index:
        assert len(index) == 300


def test_ram_budget_chooses_the_heads(tmp_path):
    X = clustered(3000)
    index = SPANN.build(X, tmp_path / "index", ram_budget=20_000)
    assert 15_000 < index.nbytes <= 20_000
    with pytest.raises(UsageError, match=r"ram_budget=100 bytes holds no head.*give at least \d+"):
        SPANN.build(X, tmp_path / "index", ram_budget=100)


def test_same_seed_same_bytes(tmp_path):
    X = clustered(1500)
    for name in "ab":
        SPANN.build(X, tmp_path / name, seed=3)
    a, b = ([p.read_bytes() for p in sorted((tmp_path / n).iterdir())] for n in "ab")
    assert a == b


def test_blocks_a_map_and_an_array_give_one_index(tmp_path):
    X = clustered(1500)
    np.save(tmp_path / "x.npy", X)
    ids = np.arange(1500)[::-1] * 7
    sources = {
        "array": (X, ids),
        "map": (np.load(tmp_path / "x.npy", mmap_mode="r"), ids),
        "blocks": ((X[i : i + 333] for i in range(0, 1500, 333)), ids),
        "named": (((ids[i : i + 77], X[i : i + 77]) for i in range(0, 1500, 77)), None),
    }
    found = []
    for name, (source, names) in sources.items():
        index = SPANN.build(source, tmp_path / name, names)
        found.append(index.search(X[:50], 3))
    for got in found:
        assert (got[0][:, 0] == ids[:50]).all()
        assert (got[0] == found[0][0]).all()


def test_direct_reads_find_the_same_and_count_whole_pages(world, built, path_taken):
    _, Q = world
    try:
        index = SPANN.open(built, direct=True)
    except OSError as error:
        pytest.skip(f"this file system has no O_DIRECT: {error}")
    ids, _ = index.search(Q, 10, 9)
    stats = index.stats()
    assert (ids == SPANN.open(built).search(Q, 10, 9)[0]).all()
    assert stats.bytes_read == 4096 * stats.pages_read > 0


def test_few_vectors_and_none(tmp_path):
    X = clustered(5)
    index = SPANN.build(X, tmp_path / "five")
    ids, far = index.search(X[0], 10)
    assert ids[0] == 0 and set(ids[:5]) == set(range(5)) and (ids[5:] == -1).all()
    assert far[0] == 0 and np.isinf(far[5:]).all()
    empty = SPANN.build(np.empty((0, 24), np.float32), tmp_path / "none")
    assert (empty.search(X, 2)[0] == -1).all() and len(empty) == 0
    empty.add(np.arange(5), X)
    assert (empty.search(X, 1)[0][:, 0] == np.arange(5)).all()


def test_equal_vectors(tmp_path):
    X = np.tile(clustered(1), (700, 1))
    index = SPANN.build(X, tmp_path / "index", ratio=0.1)
    ids, far = index.search(X[0], 700, eps=float("inf"))
    assert set(ids.tolist()) == set(range(700)) and (far == 0).all()


def test_allow_finds_only_what_is_allowed(world, built):
    X, Q = world
    index = SPANN.open(built)
    for share in (0.002, 0.05, 0.5):
        some = np.flatnonzero(np.random.default_rng(1).random(6000) < share)
        ids, _ = index.search(Q, 5, 24, allow=some)
        assert np.isin(ids, some).all()
        assert recall(ids, exact(X[some], Q, 5, some)[0]) >= 0.95
        everything = index.search(Q, 5, "all", allow=set(some.tolist()))[0]
        assert (everything == exact(X[some], Q, 5, some)[0]).all()
    ids, far = index.search(Q, 5, allow=[])
    assert (ids == -1).all() and np.isinf(far).all()


def test_add_and_remove_keep_recall(tmp_path, path_taken):
    n = 1200 if path_taken == "reference" else 6000
    X = clustered(2 * n + 30)
    X, Q = X[:-30], X[-30:]
    index = SPANN.build(X[:n], tmp_path / "index")
    there = dict(enumerate(X[:n]))
    r = np.random.default_rng(0)
    generations = {index._state[0].manifest["generation"]}
    for start in range(n, 2 * n, n // 8):
        fresh = np.arange(start, start + n // 8)
        index.add(fresh, X[fresh])
        gone = r.choice(sorted(there), n // 40, replace=False)
        index.remove(gone)
        there |= {int(i): X[i] for i in fresh}
        for i in gone.tolist():
            del there[i]
        moved = r.choice(sorted(there), 20, replace=False)
        index.add(moved, X[moved] + 0.5)
        there |= {int(i): X[i] + 0.5 for i in moved}
        generations.add(index._state[0].manifest["generation"])
    names, vectors = np.array(list(there)), np.stack(list(there.values()))
    want = exact(vectors, Q, 10, names)[0]
    assert len(generations) > 1
    for one in (index, SPANN.open(tmp_path / "index")):
        assert len(one) == len(there)
        assert (one.search(Q, 10, "all")[0] == want).all()
        assert recall(one.search(Q, 10, 48)[0], want) >= 0.95


def test_lists_that_grow_are_split(tmp_path):
    X = clustered(10_000)
    index = SPANN.build(X, tmp_path / "index")
    before = index.stats()
    limit = index._state[0].manifest["limit"]
    crowd = (X[0] + 0.3 * np.random.default_rng(0).normal(size=(3000, 24))).astype(np.float32)
    for start in range(0, 3000, 300):
        index.add(np.arange(20_000 + start, 20_300 + start), crowd[start : start + 300])
    after = index.stats()
    assert after.heads > before.heads and after.longest <= limit
    assert index._state[0].manifest["files"]["lists"] == "lists.1"  # extended, not rebuilt
    every, names = np.concatenate([X, crowd]), np.r_[:10_000, 20_000:23_000]
    want = exact(every, crowd[:20], 10, names)[0]
    index.add([50_000], X[:1] + 90)
    assert (index.search(crowd[:20], 10, "all")[0] == want).all()
    assert recall(index.search(crowd[:20], 10, 24)[0], want) >= 0.95


def test_another_process_sees_changes_and_one_writes(tmp_path):
    X = clustered(500)
    ours = SPANN.build(X, tmp_path / "index")
    ours.add([900], X[:1] + 50)
    theirs = SPANN.open(tmp_path / "index")
    assert theirs.search(X[0] + 50, 1)[0][0] == 900
    with pytest.raises(UsageError, match=r"being written by another.*close that one first"):
        theirs.add([901], X[:1])
    with pytest.raises(UsageError, match="being written by another"):
        SPANN.build(X, tmp_path / "index")
    ours.remove([900])
    ours.close()
    theirs.add([902], X[:1] + 70)  # takes over, and sees the removal
    assert theirs.search(X[0] + 50, 1)[0][0] == 902
    assert len(theirs) == 501


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda i: i.search(np.zeros((1, 9))), r"shape \(1, 9\); expected \(n, 24\)"),
        (lambda i: i.search(np.full(24, np.nan)), "vector 0 has a NaN or infinite component"),
        (lambda i: i.search(np.zeros(24), 0), "k=0.*expected at least 1"),
        (lambda i: i.search(np.zeros(24), probe="some"), "probe='some'"),
        (lambda i: i.add([1], np.full((1, 24), np.inf)), "NaN or infinite"),
        (lambda i: i.add([1], np.zeros((1, 23))), r"expected \(n, 24\)"),
        (lambda i: i.add([1, 1], np.zeros((2, 24))), "one id for each, once"),
        (lambda i: i.add([0.5], np.zeros((1, 24))), "give a row of int64"),
        (lambda i: i.search(np.array([["a"] * 24])), "dtype <U1; give float32"),
    ],
)
def test_bad_input_is_refused(built, call, message):
    index = SPANN.open(built)
    with pytest.raises(UsageError, match=message):
        call(index)


def test_bad_builds_are_refused_and_leave_the_old_index(tmp_path):
    X = clustered(300)
    SPANN.build(X, tmp_path / "index")
    bad = X.copy()
    bad[7, 3] = np.nan
    for arguments, message in [
        (([X[:5], bad],), "vector 7 has a NaN"),
        (([X[:5], X[:5, :9]],), r"shape \(5, 9\); expected \(n, 24\)"),
        ((X[0],), "shape .* give rows"),
        ((X[:2], tmp_path / "index", [4, 4]), "id 4 is given twice"),
        ((X[:2], tmp_path / "index", [4]), "1 ids for 2 vectors"),
        (([],), "no block of vectors"),
    ]:
        given = arguments if len(arguments) > 1 else (*arguments, tmp_path / "index")
        with pytest.raises(UsageError, match=message):
            SPANN.build(*given)
        assert SPANN.open(tmp_path / "index").search(X[9], 1)[0][0] == 9
    with pytest.raises(UsageError, match="holds no index"):
        SPANN.open(tmp_path / "nothing")


@pytest.mark.parametrize("name", ["lists", "vectors", "ids", "heads", "log", "manifest"])
def test_damage_is_found(tmp_path, name, path_taken):
    X = clustered(400)
    index = SPANN.build(X, tmp_path / "index")
    index.add([1000], X[:1])
    index.add([1001], X[:1])
    index.close()
    [file] = [p for p in (tmp_path / "index").iterdir() if p.name.startswith(name)]
    data = bytearray(file.read_bytes())
    data[len(data) // 3 if name != "lists" else 3] ^= 4
    file.write_bytes(data)
    with pytest.raises(HoldfastError, match=r"does not match its checksum.*rebuild it with"):
        opened = SPANN.open(tmp_path / "index")
        opened.search(X, 400, "all")
        opened.remove(np.arange(400))
    rebuilt = SPANN.build(X, tmp_path / "index")  # the remedy works
    assert rebuilt.search(X[5], 1)[0][0] == 5


class Killed(BaseException):
    pass


WRITES = ["pwrite", "fsync", "fdatasync", "replace", "ftruncate", "unlink"]


def killed_after(monkeypatch, calls):
    """The process ends at the first call to the system that writes, after so many of them."""
    left = [calls]

    def wrap(real):
        def call(*args, **kwargs):
            if left[0] <= 0:
                raise Killed
            left[0] -= 1
            return real(*args, **kwargs)

        return call

    for name in WRITES:
        monkeypatch.setattr(os, name, wrap(getattr(os, name)))
    return left


def test_a_build_killed_at_each_write_leaves_the_old_index(tmp_path, monkeypatch):
    X = clustered(300)
    old, new = X[:150], X[150:]
    SPANN.build(old, tmp_path / "index")
    with monkeypatch.context() as patch:
        left = killed_after(patch, 10**6)
        SPANN.build(new, tmp_path / "other", ratio=0.1)
        SPANN.build(new, tmp_path / "other", ratio=0.1)
    total = 10**6 - left[0]
    states = set()
    for calls in range(0, total, 2):
        with monkeypatch.context() as patch:
            killed_after(patch, calls)
            try:
                SPANN.build(new, tmp_path / "index", ratio=0.1)
                finished = True
            except Killed:
                finished = False
        index = SPANN.open(tmp_path / "index")
        _, far = index.search(np.concatenate([old[:5], new[:5]]), 1, "all")
        is_old, is_new = (far[:5] == 0).all(), (far[5:] == 0).all()
        assert is_old != is_new and (is_new or not finished)
        states.add(bool(is_new))
        if is_new:
            if finished:
                break
            SPANN.build(old, tmp_path / "index")
    assert states == {False, True}


def test_changes_killed_at_each_write_are_there_or_not(tmp_path, monkeypatch):
    X = clustered(3400)
    r = np.random.default_rng(0)
    index = SPANN.build(X[:2000], tmp_path / "index")
    index.close()
    there, position, failures = set(range(2000)), 2000, 0
    for calls in [0, 1, 2, 3, *r.integers(0, 900, 20).tolist()]:
        index = SPANN.open(tmp_path / "index")
        fresh = np.arange(position, position + 40)
        gone = r.choice(sorted(there), 30, replace=False)
        acknowledged = []
        with monkeypatch.context() as patch:
            killed_after(patch, calls)
            try:
                index.add(fresh, X[fresh % 3400])
                acknowledged.append("add")
                index.remove(gone)
                acknowledged.append("remove")
                index._fold()
            except Killed:
                failures += 1
        # A process that is killed lets its lock go.
        if index._lock is not None:
            index._lock.close()
        index = SPANN.open(tmp_path / "index")
        every = set(index.search(X[0], 4000, "all")[0].tolist()) - {-1}
        added, removed = there | set(fresh.tolist()), set(gone.tolist())
        if "remove" in acknowledged:
            assert every == added - removed
        elif "add" in acknowledged:
            assert every in (added, added - removed)
        else:
            assert every in (there, added)
        there, position = every, position + 40
        assert len(index) == len(there)
        index.add([777_777], X[:1] + 500)  # what a kill left does no harm to the next change
        assert index.search(X[0] + 500, 1)[0][0] == 777_777
        index.remove([777_777])
        index.close()
    assert failures > 5


BUILDER = """
import sys
import numpy as np
from holdfast.longterm.spann import SPANN
X = np.load(sys.argv[1])
print("ready", flush=True)
for i in range(10**6):
    index = SPANN.build(X + 1000 * (i % 2), sys.argv[2])
    index.add([1], X[:1] + 500)
    index.close()
"""


def test_sigkill_at_any_moment_leaves_an_index(tmp_path):
    X = clustered(3000)
    np.save(tmp_path / "x.npy", X)
    SPANN.build(X, tmp_path / "index")
    r = np.random.default_rng(0)
    child = [sys.executable, "-c", BUILDER, str(tmp_path / "x.npy"), str(tmp_path / "index")]
    for _ in range(2):
        with subprocess.Popen(child, stdout=subprocess.PIPE) as running:
            assert running.stdout.readline() == b"ready\n"
            time.sleep(r.uniform(0.05, 0.6))
            running.send_signal(signal.SIGKILL)
        index = SPANN.open(tmp_path / "index")
        ids, _ = index.search(np.concatenate([X[5:9], X[5:9] + 1000]), 1, "all")
        assert len(index) == 3000
        assert 5 in ids.tolist()[0] or 5 in ids.tolist()[4]
