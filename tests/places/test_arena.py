import os
import random

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from holdfast.errors import HoldfastError, UsageError
from holdfast.places import ArenaFull, DiskArena, HostArena

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
    torch.complex64, torch.complex128, torch.int64, torch.int8, torch.uint8, torch.bool,
]  # fmt: skip


@pytest.fixture(params=["host", "disk"])
def make(request, tmp_path):
    """cap -> arena; all are closed at the end."""
    made = []

    def arena(cap):
        kind = request.param == "host"
        made.append(HostArena(cap, pinned=False) if kind else DiskArena(cap, tmp_path))
        return made[-1]

    yield arena
    for each in made:
        each.close()


def noise(dtype, *shape):
    """Every bit pattern, NaN payloads and negative zeros included."""
    if dtype is torch.bool:
        return torch.rand(shape) < 0.5
    nbytes = torch.empty(shape, dtype=dtype).nbytes
    return torch.randint(256, (nbytes,), dtype=torch.uint8).view(dtype).view(shape)


def bits(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8).tolist()


@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip_is_bit_exact(make, dtype):
    arena = make(1 << 16)
    x = noise(dtype, 6, 10)
    views = [x, x.t(), x[1:5, ::3], x[:1].expand(4, 10), x[0, 0], x[:, :0]]
    for key, view in enumerate(views):
        arena.put(key, view)
    for key, view in enumerate(views):
        got = arena.get(key)
        assert got.dtype == dtype and got.shape == view.shape and bits(got) == bits(view)
        strided = torch.zeros([2 * n for n in view.shape], dtype=dtype)
        out = strided[tuple(slice(None, None, 2) for _ in view.shape)]
        assert arena.get(key, out=out) is out and bits(out) == bits(view)


def test_lazy_conjugates_are_materialised(make):
    arena, z = make(1 << 12), torch.randn(4, 4, dtype=torch.complex64)
    arena.put("z", z.conj())
    arena.put("neg", z.conj().imag)
    assert torch.equal(arena.get("z"), z.conj()) and not arena.get("z").is_conj()
    assert torch.equal(arena.get("neg"), z.conj().imag)


def test_counters(make):
    arena = make(100)
    arena.put("a", torch.ones(10))
    arena.prefetch(["a", "absent"])
    arena.get("a")
    arena.get("a", out=torch.empty(10))
    with pytest.raises(KeyError, match="'b' is not in the"):
        arena.get("b")
    assert (arena.hits, arena.misses, arena.bytes_in, arena.bytes_out) == (2, 1, 40, 80)
    assert (arena.resident_bytes, arena.peak_bytes, len(arena)) == (40, 40, 1)
    arena.evict("a")
    arena.evict("a")
    assert (arena.resident_bytes, arena.peak_bytes, len(arena)) == (0, 40, 0)


def test_full_says_bytes_asked_free_and_cap(make):
    arena = make(100)
    arena.put("a", torch.ones(20))
    with pytest.raises(
        ArenaFull, match=r"40 B asked, 20 B free of 100 B; raise the \w+ budget by 20"
    ):
        arena.put("b", torch.ones(10))
    assert arena.resident_bytes == 80 and "b" not in arena
    arena.put("b", torch.ones(5))
    assert arena.resident_bytes == 100


def test_misuse(make):
    arena = make(100)
    arena.put("a", torch.ones(4))
    with pytest.raises(UsageError, match="key is taken; evict it first"):
        arena.put("a", torch.ones(4))
    for out in (torch.empty(5), torch.empty(4, dtype=torch.int32)):
        with pytest.raises(UsageError, match=r"stored as \(4,\) torch.float32"):
            arena.get("a", out=out)
    arena.close()
    arena.close()
    assert arena.resident_bytes == 0 and len(arena) == 0
    with pytest.raises(UsageError, match="closed"):
        arena.put("b", torch.ones(4))
    with pytest.raises(UsageError, match="budget -1"):
        make(-1)


@pytest.mark.parametrize("seed", range(5))
def test_random_use_never_passes_the_cap_and_loses_nothing(make, seed):
    rng, cap = random.Random(seed), 4000
    arena, held = make(cap), {}
    for turn in range(400):
        if held and rng.random() < 0.45:
            key = rng.choice(list(held))
            assert bits(arena.get(key)) == held.pop(key)
            arena.evict(key)
        else:
            x = noise(rng.choice([torch.uint8, torch.float32, torch.bfloat16]), rng.randrange(300))
            try:
                arena.put(turn, x)
            except ArenaFull:
                assert arena.resident_bytes + x.nbytes > cap
            else:
                held[turn] = bits(x)
        assert sum(map(len, held.values())) <= arena.resident_bytes <= cap
        assert len(arena) == len(held)
    for key, want in held.items():
        assert bits(arena.get(key)) == want
        arena.evict(key)
    assert arena.resident_bytes == 0


def test_disk_space_is_reused_first_fit(tmp_path):
    with DiskArena(1000, tmp_path) as arena:
        for key, n in (("a", 100), ("b", 50), ("c", 100)):
            arena.put(key, torch.zeros(n, dtype=torch.uint8))
        arena.evict("a")
        assert arena.resident_bytes == 250  # the hole in front is still held
        arena.put("d", torch.ones(60, dtype=torch.uint8))
        assert arena.resident_bytes == 250
        with pytest.raises(ArenaFull, match=r"790 B free of 1000 B .40 B of it in holes"):
            arena.put("e", torch.zeros(780, dtype=torch.uint8))
        arena.evict("b")
        arena.put("f", torch.ones(90, dtype=torch.uint8))  # 40 + 50, merged
        assert arena.resident_bytes == 250
        arena.evict("c")
        assert arena.resident_bytes == 150 == os.fstat(arena._file.fileno()).st_size
        assert arena.get("d").all() and arena.get("f").all()


def test_disk_leaves_no_file(tmp_path):
    def ours():
        fds = (f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd"))
        return [fd for fd in fds if os.path.lexists(fd) and str(tmp_path) in os.readlink(fd)]

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs /proc to see open files")
    arena = DiskArena(1000, tmp_path)
    arena.put("a", torch.ones(10))
    assert len(ours()) == 1 and os.listdir(tmp_path) == []
    arena.close()
    assert ours() == []
    with pytest.raises(RuntimeError, match="stop"), DiskArena(1000, tmp_path) as arena:
        arena.put("a", torch.ones(10))
        raise RuntimeError("stop")
    assert ours() == [] and os.listdir(tmp_path) == []


def test_full_disk_names_directory_and_bytes(tmp_path):
    import resource
    import signal

    arena = DiskArena(1 << 30, tmp_path)
    arena.put("a", torch.ones(1000))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, before[1]))
        with pytest.raises(HoldfastError, match=rf"3.91 KiB could not be written to {tmp_path}"):
            arena.put("b", torch.ones(1000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert arena.resident_bytes == 4000 and "b" not in arena
    assert torch.equal(arena.get("a"), torch.ones(1000))
    arena.close()


def test_unwritable_directory_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"cannot write to .*absent"):
        DiskArena(10, tmp_path / "absent")


def test_fake_tensors_are_counted_and_not_written(make):
    arena = make(1 << 40)
    with FakeTensorMode():
        x = torch.empty(1 << 20, 1 << 10, dtype=torch.bfloat16)
    arena.put("x", x)
    got = arena.get("x")
    assert type(got) is type(x) and got.shape == x.shape and got.dtype == x.dtype
    assert arena.resident_bytes == arena.bytes_out == 1 << 31
    if arena.place == "disk":
        assert os.fstat(arena._file.fileno()).st_size == 0
    arena.evict("x")
    assert arena.resident_bytes == 0


def test_eviction_during_an_operation_waits_for_its_end(make):
    arena = make(100)
    arena.put("a", torch.ones(10))
    with arena._locked():  # where a garbage collection may run a finalizer
        arena.evict("a")
        assert "a" in arena
    assert "a" not in arena and arena.resident_bytes == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_pinned_needs_cuda():
    with pytest.raises(UsageError, match="pinned=True needs CUDA"):
        HostArena(10, pinned=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory needs CUDA")
def test_pinned_slots_are_reused():
    with HostArena(1 << 20) as arena:
        assert arena.pinned
        x = torch.randn(1000, device="cuda")
        for key in range(10):
            arena.put(key, x)
            assert torch.equal(arena.get(key), x)
            arena.evict(key)
        assert arena.resident_bytes == arena.peak_bytes == 4096  # rounded to a power of two
        arena.put("large", torch.zeros(1 << 20, dtype=torch.uint8))
        assert arena.resident_bytes == 1 << 20  # the spare slot made room
    assert arena.resident_bytes == 0
