"""Triton kernels against the torch path, on a GPU where there is one, else interpreted."""

import importlib.util
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from holdfast import native
from holdfast.native import adamw4, adamw8, bits, coat, triton_path
from holdfast.training.optim.adamw4 import layout as layout4

installed = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: pip install triton"
)
# The interpreter divides in both branches of `where`.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = DEVICE == "cpu"
HYPER = (1e-2, 0.9, 0.999, 1e-8, 0.01)
FLOATS = [torch.float32, torch.bfloat16]


@pytest.fixture
def kernels(monkeypatch):
    """(states, bytes, bits); without a GPU they must be imported under the interpreter."""
    if INTERPRETED:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    from holdfast.native import triton_bits, triton_bytes, triton_states

    return SimpleNamespace(states=triton_states, bytes=triton_bytes, bits=triton_bits)


def _gradients(shape, dtype) -> list[torch.Tensor]:
    """Gradients over six decades; the second has a stretch of zeros, the third is all zero."""
    g = torch.Generator().manual_seed(1)
    made = [
        (torch.randn(shape, generator=g) * 10 ** (6 * torch.rand(shape, generator=g) - 5)).to(dtype)
        for _ in range(3)
    ]
    made[1].view(-1)[:200] = 0
    made[2].zero_()
    return [x.to(DEVICE) for x in made]


def _compare(shape, dtype, layout, steps, extra=()) -> None:
    """`steps`: reference and kernel, each called with p, g, states, extra, step and HYPER."""
    start = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    runs = []
    for step in steps:
        p = start.clone()
        states = [
            s and torch.zeros(s[0], dtype=s[1], device=DEVICE)
            for s in (layout if isinstance(layout, list) else list(layout.values()))
        ]
        for count, g in enumerate(_gradients(shape, dtype), start=1):
            step(p, g, *states, *extra, torch.tensor(float(count)), *HYPER)
        runs.append((p, states))
    (want_p, want), (p, states) = runs
    for i, (a, b) in enumerate(zip(states, want, strict=True)):
        assert a is None or torch.equal(a, b), f"state {i}"
    assert not torch.equal(p, start)
    if INTERPRETED and dtype == torch.bfloat16:
        # The interpreter cuts fp32 off where hardware rounds it.
        torch.testing.assert_close(p, want_p, atol=3 * 2**-6, rtol=3 * 2**-8)
    else:
        assert torch.equal(p, want_p)


@installed
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    ("second", "shape"),
    [
        ("block", (1,)), ("block", (300,)), ("block", (9, 257)),
        ("rank1", (5, 7)), ("rank1", (9, 257)), ("rank1", (6, 1, 5, 33)), ("rank1", (300, 3)),
        ("factor", (9, 257)), ("factor", (4, 3, 35)),
    ],
    ids=str,
)  # fmt: skip
def test_adamw4_equals_torch(kernels, second, shape, dtype):
    if second == "factor":
        means = torch.rand(sum(adamw4.factor_axes(shape)), device=DEVICE)
        blocks = -(-math.prod(shape) // 128)
        kept = [((blocks, 64), torch.uint8), ((blocks,), torch.float32)]

        def factored(f):
            return lambda p, g, code, scale, *rest: f(p, g, code, scale, None, means, *rest)

        steps = [factored(f) for f in (adamw4.adamw4_ref, kernels.states.adamw4_)]
        _compare(shape, dtype, kept, steps, (second,))
        return
    steps = (adamw4.adamw4_ref, kernels.states.adamw4_)
    kept = layout4(shape, second, 1)
    if second == "rank1":
        kept["v_scale"] = ((sum(adamw4.axes_of(shape)),), torch.float32)
    _compare(shape, dtype, kept, steps, (second,))


@installed
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_adamw_equals_torch(kernels, dtype):
    kept = [((1500,), torch.float32)] * 2
    _compare((1500,), dtype, kept, (adamw4.adamw_ref, kernels.states.adamw_))


def _kept8(n: int, block: int, powers: bool) -> list:
    blocks = -(-n // block)
    one = [((n,), torch.uint8), ((blocks,), torch.float32)]
    return 2 * (one + [((blocks,), torch.uint8)] if powers else one)


@installed
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(1,), (9, 257)], ids=str)
def test_adamw8_equals_torch(kernels, shape, dtype):
    kept = _kept8(math.prod(shape), adamw8.BLOCK, False)
    _compare(shape, dtype, kept, (adamw8.adamw8_ref, kernels.bytes.adamw8_))


@installed
@pytest.mark.parametrize("block", [32, 256])
@pytest.mark.parametrize("shape", [(1,), (9, 257)], ids=str)
def test_coat_equals_torch(kernels, shape, block):
    kept = _kept8(math.prod(shape), block, True)
    steps = (coat.coat_ref, kernels.bytes.coat_)
    _compare(shape, torch.float32, kept, steps, (block,))


@installed
def test_large_tensors_are_indexed_with_64_bits(kernels, monkeypatch):
    for module in vars(kernels).values():
        monkeypatch.setattr(module, "LARGE", 0)
    shape = (9, 257)
    steps = (adamw4.adamw4_ref, kernels.states.adamw4_)
    kept = layout4(shape, "block", 1)
    _compare(shape, torch.float32, kept, steps, ("block",))
    kept["v_scale"] = ((sum(shape),), torch.float32)
    _compare(shape, torch.float32, kept, steps, ("rank1",))
    kept = _kept8(math.prod(shape), 256, False)
    _compare(shape, torch.float32, kept, (adamw8.adamw8_ref, kernels.bytes.adamw8_))
    codes = torch.randint(8, (3, 100), dtype=torch.uint8, device=DEVICE)
    packed = kernels.bits.pack_codes(codes, 3)
    assert torch.equal(packed, bits.pack_codes_ref(codes, 3))
    assert torch.equal(kernels.bits.unpack_codes(packed, 3, 100), codes)


@installed
@pytest.mark.parametrize("second", ["block", "rank1"])
def test_nan_stays_in_its_block(kernels, second):
    shape = (4, 128)
    states = [
        torch.zeros(s, dtype=d, device=DEVICE)
        for s, d in [
            ((4, 64), torch.uint8), ((4,), torch.float32), ((4, 64), torch.uint8),
            ((4 if second == "block" else 132,), torch.float32),
        ]
    ]  # fmt: skip
    p, g = torch.ones(shape, device=DEVICE), torch.ones(shape, device=DEVICE)
    g[2, 7] = torch.nan
    for count in (1, 2):
        kernels.states.adamw4_(p, g, *states, second, torch.tensor(float(count)), *HYPER)
        g[2, 7] = 1.0
    assert p.isnan().any(1).tolist() == [False, False, True, False]
    assert p[2].isnan().all()


@installed
@pytest.mark.parametrize("width", (1, 2, 3, 4))
def test_codes_equal_torch(kernels, width):
    g = torch.Generator().manual_seed(0)
    for shape in [(0,), (1,), (3, 17), (2, 0), (2, 3, 33), (2500,)]:
        codes = torch.randint(2**width, shape, generator=g, dtype=torch.uint8).to(DEVICE)
        packed = kernels.bits.pack_codes(codes, width)
        assert torch.equal(packed, bits.pack_codes_ref(codes, width))
        assert torch.equal(kernels.bits.unpack_codes(packed, width, shape[-1]), codes)
    bounds = torch.randn(2**width - 1, generator=g).sort().values.tolist()
    levels = torch.randn(2**width, generator=g).tolist()
    for dtype in (torch.float32, torch.float16):
        x, gy = torch.randn(2, 1500, generator=g).to(DEVICE, dtype)
        x[:3] = torch.tensor([bounds[0], math.nan, math.inf])
        for even in (False, True):
            packed = kernels.bits.step_codes(x, bounds, width, even)
            assert torch.equal(packed, bits.step_codes_ref(x, bounds, width, even))
        want = bits.step_slope_ref(packed, gy, levels, width)
        assert torch.equal(kernels.bits.step_slope(packed, gy, levels, width), want)


@installed
@pytest.mark.parametrize("width", (2, 3, 4, 8))
@pytest.mark.parametrize("symmetric", [False, True])
def test_affine_groups_equal_torch(kernels, width, symmetric):
    rows, groups, columns = 3, 4, 128
    g = torch.Generator().manual_seed(0)
    size = bits.nbytes(columns, width)
    codes = torch.randint(256, (rows, size + 3), generator=g, dtype=torch.uint8).to(DEVICE)[
        :, :size
    ]
    zero = torch.randint(2**width, (rows, groups), generator=g, dtype=torch.uint8).to(DEVICE)
    for dtype in (torch.float16, torch.float32):
        scale = torch.rand(rows, groups, generator=g).to(DEVICE, dtype)
        arguments = (codes, scale, None if symmetric else zero, width, columns)
        want = bits.affine_values_ref(*arguments)
        assert torch.equal(kernels.bits.affine_values(*arguments), want)


def _on(device: str, dtype=torch.float32) -> SimpleNamespace:
    return SimpleNamespace(device=torch.device(device), dtype=dtype)


def test_torch_works_where_triton_cannot(monkeypatch):
    def chosen(*tensors):
        return triton_path.pick("triton_states", "adamw_", adamw4.adamw_ref, *tensors)

    monkeypatch.setattr(triton_path, "_runs_on", lambda device: True)
    assert chosen(_on("cpu"), _on("cpu")) is adamw4.adamw_ref
    assert chosen(_on("cuda"), _on("cuda", torch.float64)) is adamw4.adamw_ref
    with native.force("off"):
        assert chosen(_on("cuda")) is adamw4.adamw_ref
    monkeypatch.setattr(triton_path, "_runs_on", lambda device: False)
    assert chosen(_on("cuda")) is adamw4.adamw_ref


@installed
def test_a_gpu_gets_the_kernel(kernels, monkeypatch):
    monkeypatch.setattr(triton_path, "_runs_on", lambda device: True)
    picked = triton_path.pick("triton_states", "adamw_", adamw4.adamw_ref, _on("cuda"))
    assert picked is kernels.states.adamw_


# Every launch of `CALLS` is compiled down to machine code as it would be on a GPU, without one.
COMPILE = """
import re, torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction
from holdfast.native import triton_bits, triton_bytes, triton_states

class Driver:
    def get_current_target(self): return GPUTarget("cuda", 80, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0

def warm(self, *args, grid, warmup, **options):
    kernel = run(self, *args, grid=grid, warmup=True, **options)
    contracted = len(re.findall(r"fma\\.rn|\\.approx|div\\.full", kernel.asm["ptx"]))
    print(self.__name__, len(kernel.asm["cubin"]) > 0, contracted)
    return kernel

triton.runtime.driver.set_active(Driver())
run, JITFunction.run = JITFunction.run, warm

def zeros(*shape, dtype=torch.uint8):
    return torch.zeros(shape, dtype=dtype)

f, hyper = torch.float32, (torch.tensor(1.0), 1e-2, 0.9, 0.999, 1e-8, 0.01)
n, blocks = 96 * 130, 98
p = zeros(96, 130, dtype=torch.bfloat16)
code, scale, wide = zeros(blocks, 64), zeros(blocks, dtype=f), zeros(226, dtype=f)
triton_states.adamw4_(p, p, code, scale, code, scale, "block", *hyper)
triton_states.adamw4_(p, p, code, scale, code, wide, "rank1", *hyper)
triton_states.adamw4_(p, p, code, scale, None, wide, "factor", *hyper)
triton_states.adamw_(p, p, zeros(n, dtype=f), zeros(n, dtype=f), *hyper)
triton_bytes.adamw8_(p, p, zeros(n), scale, zeros(n), scale, *hyper)
power = zeros(blocks)
triton_bytes.coat_(p, p, zeros(n), scale, power, zeros(n), scale, power, 128, *hyper)
triton_bits.pack_codes(zeros(3, 100), 3)
triton_bits.unpack_codes(zeros(3, 38), 3, 100)
packed = triton_bits.step_codes(p, [0.0] * 7, 3, True)
triton_bits.step_slope(packed, p, [0.0] * 8, 3)
triton_bits.affine_values(zeros(4, 64), zeros(4, 2, dtype=torch.half), zeros(4, 2), 4, 128)
triton_bits.affine_values(zeros(4, 128), zeros(4, 2, dtype=f), None, 8, 128)
"""


@installed
def test_every_kernel_compiles_for_a_gpu_and_contracts_nothing(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env=env | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 13
    assert all(line.endswith(" True 0") for line in lines), done.stdout
