"""What every form must do: exact bytes, bounded error, products, state."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from holdfast.errors import UsageError
from holdfast.forms import (
    Affine,
    Blockwise,
    Dense,
    Form,
    Fp8,
    Int4,
    Int8,
    Packed,
    Rank1,
    base,
    maps,
)

FORMS: list[Form] = [
    Dense(),
    Dense(torch.bfloat16),
    Int8(),
    Int8(group=6),
    Int4(group=6),
    Affine(bits=4, group=None, symmetric=True),
    Affine(bits=3, group=6),
    Affine(bits=3, group=None, scale_dtype=torch.float32),
    Affine(bits=2, group=6, symmetric=True),
    Affine(bits=8, group=None, rounding="stochastic"),
    *[Blockwise(name, block) for name in maps.NAMES for block in (128, 10)],
    Rank1(),
    Rank1("dynamic8"),
    *[Fp8(kind, scale, 10) for kind in ("e4m3", "e5m2") for scale in ("tensor", "row", "block")],
]
SHAPES = ((), (6,), (258,), (7, 6), (3, 5, 18), (0, 6), (6, 0))
CASES = [(shape, torch.float32) for shape in SHAPES] + [
    ((13, 30), dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)
]


@pytest.fixture(params=FORMS, ids=str)
def form(request) -> Form:
    return request.param


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Many tiles per tensor, the last one ragged."""
    monkeypatch.setattr(base, "tile_numel", lambda device: 100)


def sample(form: Form, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g)
    if isinstance(form, Blockwise | Rank1) and maps.levels(form.map)[0] >= 0:
        x = x.abs()
    return x.to(dtype)


def fits(form: Form, shape: tuple[int, ...]) -> bool:
    group = form.group if isinstance(form, Affine) else None
    return group is None or (shape[-1] if shape else 1) % group == 0


def bound(form: Form, x: torch.Tensor, packed: Packed) -> torch.Tensor:
    """Largest allowed |x - decoded| per element in exact arithmetic, from the form's definition."""
    size = x.double().abs()
    if not x.numel():
        return size
    if isinstance(form, Dense):
        return size * (2**-8 if form.dtype else 0)
    scale = packed.buffers["scale"].double() if "scale" in packed.buffers else None
    if isinstance(form, Affine):
        per_row = x.shape[-1] // scale.shape[1] if x.dim() else 1
        step = scale.repeat_interleave(per_row, 1).view(x.shape)
        return step * (1.0 if form.rounding == "stochastic" else 0.5)
    if isinstance(form, Fp8):
        if form.scale == "tensor":
            top = scale.expand(x.shape) if x.dim() else scale[0]
        else:
            per = form.block if form.scale == "block" else (x.shape[-1] if x.dim() else 1)
            top = scale.repeat_interleave(per)[: x.numel()].view(x.shape)
        info = torch.finfo(torch.float8_e4m3fn if form.kind == "e4m3" else torch.float8_e5m2)
        # Half a unit in the last place; the same absolute error below the normal numbers.
        return torch.maximum(size * info.eps / 2, top * (info.tiny * info.eps / 2 / info.max))
    if scale is not None:
        block = form.block if isinstance(form, Blockwise) else 128
        top = scale.repeat_interleave(block)[: x.numel()].view(x.shape)
    else:
        axes = [packed.buffers[f"axis{k}"].double() for k in range(x.dim())]
        views = [a.view([-1 if i == k else 1 for i in range(x.dim())]) for k, a in enumerate(axes)]
        top = views[0]
        for view in views[1:]:
            top = torch.minimum(top, view)
    levels = torch.tensor(maps.levels(form.map), dtype=torch.float64)
    low = torch.zeros(()) if levels[0] > -0.01 else torch.tensor(-1.0)
    # Half the widest gap, or the distance from an end of the data's range to the map's end.
    widest = torch.stack([levels.diff().amax() / 2, (levels[0] - low).double()]).amax()
    return top * widest


@pytest.mark.parametrize("shape, dtype", CASES, ids=str)
def test_round_trip(form, shape, dtype):
    if not fits(form, shape):
        with pytest.raises(UsageError, match="does not divide"):
            form.encode(sample(form, shape, dtype))
        return
    x = sample(form, shape, dtype)
    packed = form.encode(x)
    assert form.nbytes(shape, dtype) == packed.nbytes_packed
    assert packed.nbytes_packed == sum(b.nbytes for b in packed.to_buffers().values())
    assert (packed.shape, packed.dtype, packed.device) == (x.shape, dtype, x.device)
    y = packed.dequantize()
    assert (y.shape, y.dtype) == (x.shape, dtype)
    # The arithmetic is fp32, and the result is rounded once to the logical dtype.
    rounding = 2**-20 + (torch.finfo(dtype).eps / 2 if dtype != torch.float32 else 0)
    error, limit = (x.double() - y.double()).abs(), bound(form, x, packed)
    if form == Dense():
        assert torch.equal(x, y)
    else:
        assert (error <= limit * (1 + 1e-5) + rounding * (x.double().abs() + limit) + 1e-7).all()
    out = torch.full_like(x, math.nan)
    assert form.decode(packed, out) is out and torch.equal(out, y)

    with FakeTensorMode() as mode:
        fake = form.encode(mode.from_tensor(x))
        assert fake.nbytes_packed == packed.nbytes_packed
        assert fake.dequantize().shape == x.shape
        assert {n: (b.shape, b.dtype) for n, b in fake.buffers.items()} == {
            n: (b.shape, b.dtype) for n, b in packed.buffers.items()
        }
    meta = form.encode(x.to("meta"))
    assert meta.device.type == "meta" and meta.nbytes_packed == packed.nbytes_packed
    assert packed.to("meta").device.type == "meta"

    again = Packed.from_buffers(form, shape, dtype, packed.to_buffers())
    assert torch.equal(again.dequantize(), y)


def test_encoding_twice_changes_nothing(form):
    """Bitwise, except where the form says otherwise."""
    x = sample(form, (13, 30))
    if isinstance(form, Blockwise | Rank1) and "dynamic" in form.map:
        x = x.abs()  # the signed dynamic maps have no -1
    first = form.encode(x).dequantize()
    second = form.encode(first).dequantize()
    if isinstance(form, Affine):
        if form.rounding == "stochastic":
            pytest.skip("stochastic rounding moves by design")
        # The zero point is rounded, so a decoded group may span one step less.
        packed = form.encode(x)
        limit = 1e-6 if form.symmetric else bound(form, x, packed) * (1 + 1e-5)
        assert ((first - second).abs() <= limit).all()
    else:
        assert torch.equal(first, second)


@pytest.mark.parametrize("shape", [(8, 12), (13, 30)], ids=str)
def test_products_and_gradients_equal_dense(form, shape):
    packed = form.encode(sample(form, shape))
    dense = packed.dequantize()
    g = torch.Generator().manual_seed(1)
    bias = torch.randn(shape[0], generator=g)
    for weight, plain, b in ((packed, dense, bias), (packed.t(), dense.t(), None)):
        x = torch.randn(2, 3, plain.shape[1], generator=g)
        gy = torch.randn(2, 3, plain.shape[0], generator=g)
        got, want = [], []
        for results, w in ((got, weight), (want, plain)):
            xi = x.clone().requires_grad_()
            bi = None if b is None else b.clone().requires_grad_()
            y = F.linear(xi, w, bi)
            y.backward(gy)
            results += [y, xi.grad] + ([bi.grad] if bi is not None else [])
        for a, c in zip(got, want, strict=True):
            torch.testing.assert_close(a, c, atol=1e-5, rtol=1e-5)
    x = torch.randn(4, shape[0], generator=g)
    torch.testing.assert_close(x @ packed, x @ dense, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        torch.addmm(torch.ones(shape[1]), x, packed), 1 + x @ dense, atol=1e-5, rtol=1e-5
    )
    ids = torch.tensor([[0, 7], [3, 3]])
    assert torch.equal(F.embedding(ids, packed), dense[ids])


def test_forward_and_backward_save_no_dense_weight(form):
    packed = form.encode(sample(form, (13, 30)))
    saved = []
    x = torch.randn(2, 30, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        F.linear(x, packed).sum()
    assert not saved


def test_inside_modules_and_state_dicts(form):
    linear = torch.nn.Linear(12, 8)
    packed = form.encode(sample(form, (8, 12)))
    linear.weight = torch.nn.Parameter(packed, requires_grad=False)
    assert isinstance(linear.weight, Packed) and isinstance(linear.weight, torch.nn.Parameter)
    x = torch.randn(2, 12)
    want = linear(x)
    other = torch.nn.Linear(12, 8)
    empty = form.encode(torch.zeros(8, 12))
    other.weight = torch.nn.Parameter(empty, requires_grad=False)
    other.load_state_dict(linear.state_dict())
    assert torch.equal(other(x), want)
    assert torch.equal(copy.deepcopy(linear)(x), want)
    half = linear.to(torch.bfloat16)
    assert half.weight.dtype == torch.bfloat16 and isinstance(half.weight, Packed)
    assert half.weight.nbytes_packed == form.nbytes((8, 12), torch.bfloat16)
    assert half(x.bfloat16()).dtype == torch.bfloat16
    assert half.to("meta").weight.device.type == "meta"


def test_half_precision_product_is_as_good_as_dense(form):
    packed = form.encode(sample(form, (64, 60), torch.bfloat16))
    dense = packed.dequantize()
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    want = x.double() @ dense.double()
    # One bf16 rounding of the result and one of each of its partial sums.
    size = x.double().abs() @ dense.double().abs()
    assert ((x @ packed).double() - want).abs().le(size * 2**-8 + 1e-6).all()


def test_trace_of_a_step_under_fake_tensors(form):
    with FakeTensorMode():
        linear = torch.nn.Linear(12, 8)
        packed = form.encode(linear.weight.detach())
        linear.weight = torch.nn.Parameter(packed, requires_grad=False)
        x = torch.randn(2, 12, requires_grad=True)
        linear(x).sum().backward()
        assert x.grad.shape == (2, 12) and linear.bias.grad.shape == (8,)


def test_autocast_and_mixed_dtypes(form):
    packed = form.encode(sample(form, (8, 12)))
    x = torch.randn(2, 12)
    with torch.autocast("cpu", torch.bfloat16):
        assert F.linear(x, packed).dtype == torch.bfloat16
    with pytest.raises(UsageError, match=r"bfloat16.*float32.*autocast"):
        F.linear(x.bfloat16(), packed)


def test_zero_tensors_decode_to_zero(form):
    for x in (torch.zeros(7, 6), torch.zeros(300)):
        y = form.encode(x).dequantize()
        assert torch.equal(y, x)


def test_refuses_what_it_cannot_do(form):
    packed = form.encode(sample(form, (7, 6)))
    with pytest.raises(UsageError, match=r"not supported.*dequantize"):
        packed + 1
    with pytest.raises(UsageError, match="requires_grad=False"):
        torch.nn.Parameter(packed)
    with pytest.raises(UsageError, match="out is"):
        form.decode(packed, torch.empty(6, 7))
    with pytest.raises(UsageError, match="cannot multiply"):
        F.linear(torch.randn(2, 7), packed)
    buffers = packed.to_buffers()
    name = next(iter(buffers))
    with pytest.raises(UsageError, match=f"buffer '{name}'"):
        Packed.from_buffers(form, (7, 6), packed.dtype, buffers | {name: torch.zeros(5)})
    with pytest.raises(UsageError, match="cannot copy"):
        packed.copy_(torch.zeros(7, 6))
    if isinstance(form, Dense):
        return
    for bad in (math.nan, math.inf, -math.inf):
        x = sample(form, (7, 6))
        x[6, 5] = bad
        with pytest.raises(UsageError, match="finite"):
            form.encode(x)
    with pytest.raises(UsageError, match="float64"):
        form.encode(torch.zeros(7, 6, dtype=torch.float64))
