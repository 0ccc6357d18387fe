import importlib
import os
import time
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from holdfast import native
from holdfast.forms import Affine, Int4, affine
from holdfast.meter import Meter
from holdfast.native import bits
from holdfast.native.bits import ops
from holdfast.training.optim.projector import Projector
from holdfast.training.saved import fewbit

built = pytest.mark.skipif(not native.usable(), reason=f"native kernels: {native._open()[1]}")
PATHS = ["off", *native.usable()]
WIDTHS = (1, 2, 3, 4)
FLOATS = [torch.float32, torch.bfloat16]


def _seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("width", WIDTHS)
def test_codes_equal_torch(width, path):
    shapes = [(0,), (1,), (7,), (8,), (9,), (3, 17), (5, 64), (2, 3, 33), (4, 0), (0, 5)]
    # Around a tile, several tiles, and enough for two threads.
    shapes += [(2047,), (2048,), (2049,), (3, 5000), (100_001,)]
    for shape in shapes:
        codes = torch.randint(2**width, shape, generator=_seeded(), dtype=torch.uint8)
        with native.force(path):
            packed = ops.pack_codes(codes, width)
            assert torch.equal(packed, bits.pack_codes_ref(codes, width)), shape
            assert torch.equal(ops.unpack_codes(packed, width, shape[-1]), codes), shape


def _step(width: int) -> tuple[list[float], list[float]]:
    g = _seeded(width)
    bounds = torch.randn(2**width - 1, generator=g).sort().values
    return bounds.tolist(), torch.randn(2**width, generator=g).tolist()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_step_functions_equal_torch(width, dtype, path):
    bounds, levels = _step(width)
    for n in (0, 1, 5, 16, 33, 2048, 4100, 70_001):
        g = _seeded(n)
        x, gy = torch.randn(n, generator=g).to(dtype), torch.randn(n, generator=g).to(dtype)
        # On a bound, and where no order exists.
        special = torch.tensor([*bounds, torch.nan, torch.inf, -torch.inf, 0.0, -0.0]).to(dtype)
        x[: len(special)] = special[:n]
        for even in (False, True):
            with native.force(path):
                packed = ops.step_codes(x, bounds, width, even)
                got = ops.step_slope(packed, gy, levels, width)
            assert torch.equal(packed, bits.step_codes_ref(x, bounds, width, even)), (n, even)
            want = bits.step_slope_ref(packed, gy, levels, width)
            assert torch.equal(got, want) and got.dtype == dtype, (n, even)


@built
def test_strided_inputs_are_read_in_the_order_of_their_elements():
    bounds, levels = _step(3)
    x = torch.randn(6, 10, 7, generator=_seeded()).mT
    packed = ops.step_codes(x, bounds, 3, False)
    assert torch.equal(packed, bits.step_codes_ref(x, bounds, 3, False))
    for gy in (x, torch.tensor(2.0).expand(x.shape)):
        got = ops.step_slope(packed, gy, levels, 3)
        assert got.is_contiguous()
        assert torch.equal(got, bits.step_slope_ref(packed, gy.contiguous(), levels, 3))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("width", (2, 3, 4, 8))
def test_affine_groups_equal_torch(width, symmetric, path):
    for rows, groups, group in [(1, 1, 5), (3, 4, 32), (7, 1, 4099), (5, 20, 250), (2, 2, 3)]:
        g, columns = _seeded(group), groups * group
        size = bits.nbytes(columns, width)
        codes = torch.randint(256, (rows, size + 3), generator=g, dtype=torch.uint8)[:, :size]
        zero = torch.randint(2**width, (rows, groups), generator=g, dtype=torch.uint8)
        for dtype in (torch.float16, torch.float32):
            scale = torch.rand(rows, groups, generator=g).to(dtype)
            arguments = (codes, scale, None if symmetric else zero, width, columns)
            with native.force(path):
                got = ops.affine_values(*arguments)
            assert torch.equal(got, bits.affine_values_ref(*arguments)), (rows, groups, dtype)


@built
def test_threads_change_nothing():
    bounds, levels = _step(3)
    x = torch.randn(200_003, generator=_seeded())
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            packed = ops.step_codes(x, bounds, 3, False)
            found.append((packed, ops.step_slope(packed, x, levels, 3)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_operators_are_well_formed():
    codes, x = torch.randint(8, (3, 20), dtype=torch.uint8), torch.randn(40)
    bounds, levels = _step(3)
    scale, zero = torch.ones(3, 2), torch.zeros(3, 2, dtype=torch.uint8)
    packed, steps = ops.pack_codes(codes, 3), ops.step_codes(x, bounds, 3, False)
    for op, arguments in (
        (ops.pack_codes, (codes, 3)),
        (ops.unpack_codes, (packed, 3, 20)),
        (ops.step_codes, (x, bounds, 3, False)),
        (ops.step_slope, (steps, x, levels, 3)),
        (ops.affine_values, (packed, scale, zero, 3, 20)),
    ):
        tests = ("test_schema", "test_faketensor")
        torch.library.opcheck(op.default, arguments, test_utils=tests)


def test_fake_tensors_have_the_shapes_of_real_ones():
    real = torch.randn(5, 33, requires_grad=True)
    act = fewbit.GELU(3)
    with FakeTensorMode():
        fake = torch.empty(5, 33, requires_grad=True)
        y = act(fake)
        (packed,) = y.grad_fn.saved_tensors
        y.sum().backward()
        rows = Int4(11).encode(fake.detach()).dequantize()
    assert packed.shape == act(real).grad_fn.saved_tensors[0].shape
    assert fake.grad.shape == rows.shape == real.shape


@built
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_packs():
    x = torch.randn(200_000, generator=_seeded())
    bounds, _ = _step(3)
    want = ops.step_codes(x, bounds, 3, False).numpy().tobytes()  # starts the parent's threads
    child = os.fork()
    if child == 0:
        same = ops.step_codes(x, bounds, 3, False).numpy().tobytes() == want
        os._exit(0 if same else 1)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            assert os.waitstatus_to_exitcode(status) == 0
            return
        time.sleep(0.02)
    os.kill(child, 9)
    os.waitpid(child, 0)
    pytest.fail("the child hangs")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("group", [None, 20, 32, 96])
@pytest.mark.parametrize("width", (2, 3, 4, 8))
def test_column_tiles_are_the_tensor(width, group, path, monkeypatch):
    monkeypatch.setattr(affine, "tile_numel", lambda device: 300)
    columns = 480
    form = Affine(bits=width, group=group)
    packed = form.encode(torch.randn(7, columns, generator=_seeded()))
    with native.force(path):
        parts = list(form.column_tiles(packed))
        want = packed.dequantize()
    assert len(parts) > 1 and parts[-1][0].stop == columns
    assert torch.equal(torch.cat([tile for _, tile in parts], 1), want)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(90, 64), (64, 90), (70, 50)], ids=str)
def test_a_projection_reads_codes_in_tiles(shape, dtype, monkeypatch):
    monkeypatch.setattr(affine, "tile_numel", lambda device: 100)
    grad = torch.randn(shape, generator=_seeded()).to(dtype)
    fitted = Projector.fit(grad, 6)
    form = Affine(bits=4, group=32 if min(shape) == 64 else None)
    packed = form.encode(fitted.basis)
    assert len(list(form.column_tiles(packed))) > 1
    ours, dense = (Projector(b, fitted.right) for b in (packed, packed.dequantize()))
    low = ours.down(grad)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, dense.down(grad), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.up(low), dense.up(low), atol=1e-5, rtol=1e-5)


def test_the_scratch_of_a_projection_is_a_tile_and_not_the_gradient(monkeypatch):
    monkeypatch.setattr(affine, "tile_numel", lambda device: 4096)
    rank, n = 64, 1024
    grad = torch.nn.Parameter(torch.randn(n, n, generator=_seeded()).bfloat16())
    basis = Affine(bits=4, group=64).encode(torch.randn(rank, n, generator=_seeded()))
    projector = Projector(basis, True)
    with torch.no_grad(), Meter(torch.nn.ParameterList([grad])) as meter:
        low = projector.down(grad)
    # 64 columns at a time: of the basis, and of the gradient in fp32.
    tile, part = 4 * 4096, 4 * n * 64
    assert meter.peak - meter.base <= low.nbytes + tile + 2 * part < grad.nbytes


def test_the_benchmark_runs_on_small_shapes(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    benchmark = importlib.import_module("bits")
    monkeypatch.setattr(benchmark, "ACTIVATION", (2, 3, 8))
    monkeypatch.setattr(benchmark, "PROJECTIONS", [(300, 256, 8)])
    monkeypatch.setattr("sys.argv", ["bits.py", "--rounds", "1"])
    benchmark.main()
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split("|") for line in lines if line.startswith("| ") and "---" not in line]
    assert {"torch.nn.GELU", "3-bit, torch path", "multiply by codes"} <= {
        r[1].strip() for r in rows
    }
    assert sum(line.startswith("| ---") for line in lines) == 6
