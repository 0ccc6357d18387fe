"""AdamW steps on 4-bit and on fp32 moments as torch operators: native on CPUs, torch elsewhere.

`torch.ops.holdfast.adamw4_` and `adamw_` change the parameter and its states in place. Under
FakeTensorMode and on meta tensors they do nothing and allocate nothing. The torch path decodes a
bounded number of elements at a time and gives bitwise the native results on a CPU.

Layout   codes (blocks, 64) uint8: byte j of a block of 128 is code j | code (j+64) << 4; the last
         block is padded. Rank-1 maxima: those of axis 0, then of axis 1, and so on, in one vector.
"""

import ctypes
import math
from collections.abc import Iterator
from functools import cache, reduce

import torch
from torch import Tensor

from holdfast import native
from holdfast.forms import maps
from holdfast.native.triton_path import pick

BLOCK = 128
SECOND = ("block", "rank1", "factor")
# Elements that the torch path decodes at a time, rounded up to rows: 256 KiB per fp32 temporary.
CHUNK = 512 * BLOCK
_TINY = torch.finfo(torch.float32).tiny
NATIVE_DTYPES = {torch.float32: 0, torch.bfloat16: 1}

_lib = torch.library.Library("holdfast", "FRAGMENT")
_HYPER = "Tensor step, float lr, float b1, float b2, float eps, float weight_decay"
_lib.define(
    "adamw4_(Tensor(a!) p, Tensor g, Tensor(b!) m_code, Tensor(c!) m_scale, Tensor(d!)? v_code, "
    f"Tensor(e!) v_scale, str second, {_HYPER}) -> ()"
)
_lib.define(f"adamw_(Tensor(a!) p, Tensor g, Tensor(b!) m, Tensor(c!) v, {_HYPER}) -> ()")


@torch.library.impl(_lib, "adamw4_", "Meta")
@torch.library.impl(_lib, "adamw_", "Meta")
def _nothing(*args) -> None:
    """A step gives no new tensor."""


@torch.library.impl(_lib, "adamw4_", "CompositeExplicitAutograd")
def adamw4_(
    p: Tensor,
    g: Tensor,
    m_code: Tensor,
    m_scale: Tensor,
    v_code: Tensor | None,
    v_scale: Tensor,
    second: str,
    step: Tensor,
    lr: float,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """One AdamW step in place.

    Args:
        p, g: contiguous, any shape; fp32 or bf16 for the native path.
        m_code, v_code: (blocks, 64) uint8; v_code is None for "factor".
        m_scale: (blocks,) fp32.
        v_scale: fp32: (blocks,), or maxima of the axes, or means of the rows, then of the columns.
        second: "block", "rank1" or "factor".
        step: one element, already counting this step.
    """
    axes = axes_of(p.shape)
    scale = v_scale
    if second == "factor":
        axes = factor_axes(p.shape)
        scale = _factor(g, v_scale, axes, b2)
    library = library_for(p, g)
    if library is None:
        step_ = pick("triton_states", "adamw4_", adamw4_ref, p, g)
        step_(p, g, m_code, m_scale, v_code, scale, second, step, lr, b1, b2, eps, weight_decay)
        return
    kernels, variant = library
    hyper = native.Hyper(lr, b1, b2, eps, weight_decay, step.item())
    failed = kernels.hf_adamw4(
        variant,
        native.threads(),
        SECOND.index(second),
        p.numel(),
        len(axes),
        (ctypes.c_int64 * len(axes))(*axes),
        p.data_ptr(),
        NATIVE_DTYPES[p.dtype],
        g.data_ptr(),
        NATIVE_DTYPES[g.dtype],
        m_code.data_ptr(),
        m_scale.data_ptr(),
        None if v_code is None else v_code.data_ptr(),
        scale.data_ptr(),
        _tables(),
        ctypes.addressof(hyper),
    )
    if failed:
        raise MemoryError(f"no scratch memory for the column maxima of a {tuple(p.shape)} tensor")


@torch.library.impl(_lib, "adamw_", "CompositeExplicitAutograd")
def adamw_(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    step: Tensor,
    lr: float,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """One AdamW step in place on fp32 moments; p and g contiguous, in fp32 or bf16."""
    library = library_for(p, g)
    if library is None:
        step_ = pick("triton_states", "adamw_", adamw_ref, p, g)
        step_(p, g, m, v, step, lr, b1, b2, eps, weight_decay)
        return
    hyper = native.Hyper(lr, b1, b2, eps, weight_decay, step.item())
    library[0].hf_adamw(
        p.numel(),
        p.data_ptr(),
        NATIVE_DTYPES[p.dtype],
        g.data_ptr(),
        NATIVE_DTYPES[g.dtype],
        m.data_ptr(),
        v.data_ptr(),
        ctypes.addressof(hyper),
    )


def adamw_ref(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    step: Tensor,
    lr: float,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """`adamw_` in torch, on any device."""
    m.copy_(m * b1 + g.float() * (1 - b1))
    v.copy_(v * b2 + g.float().square() * (1 - b2))
    p.copy_(moved(p.float(), m, v, step, lr, b1, b2, eps, weight_decay))


def adamw4_ref(
    p: Tensor,
    g: Tensor,
    m_code: Tensor,
    m_scale: Tensor,
    v_code: Tensor | None,
    v_scale: Tensor,
    second: str,
    step: Tensor,
    lr: float,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """`adamw4_` in torch, on any device.

    For "factor", v_scale holds this step's row and column factors.
    """
    line, axes = p.view(-1), axes_of(p.shape)
    if second == "factor":
        axes = factor_axes(p.shape)

    def second_moment(start: int, stop: int, x: Tensor) -> Tensor:
        scale = scale_of(v_scale, axes, second, start, stop)
        if second == "factor":
            return scale
        code = _slice(v_code, start, stop)
        v = decode(code, "linear4").flatten()[: stop - start] * b2 * scale
        return v + x.square() * (1 - b2)

    fresh = v_scale
    if second == "rank1":
        # Old maxima decode until the last element is encoded under the new ones.
        fresh = torch.zeros_like(v_scale)
        for start, stop in _chunks(p):
            v = second_moment(start, stop, g.view(-1)[start:stop].float())
            _raise_maxima(fresh, axes, start, v)
    fresh_inverse = reciprocal(fresh)
    for start, stop in _chunks(p):
        blocks = slice(start // BLOCK, -(-stop // BLOCK))
        x = g.view(-1)[start:stop].float()
        code, scale = m_code[blocks], m_scale[blocks, None]
        m = (decode(code, "dynamic4") * b1 * scale).flatten()[: stop - start] + x * (1 - b1)
        v = second_moment(start, stop, x)
        fresh_p = moved(line[start:stop].float(), m, v, step, lr, b1, b2, eps, weight_decay)
        line[start:stop].copy_(fresh_p)
        m = _padded(m)
        m_scale[blocks] = m.abs().amax(1)
        code.copy_(encode(m * reciprocal(m_scale[blocks, None]), "dynamic4"))
        if second == "factor":
            continue
        if second == "block":
            v = _padded(v)
            v_scale[blocks] = v.amax(1)
            inverse = reciprocal(v_scale[blocks, None])
        else:
            inverse = scale_of(fresh_inverse, axes, second, start, stop, torch.maximum)
            v, inverse = _padded(v), _padded(inverse)
        _slice(v_code, start, stop).copy_(encode(v * inverse, "linear4"))
    if second == "rank1":
        v_scale.copy_(fresh)


def axes_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Lengths of the axes that count."""
    return tuple(s for s in shape if s != 1)


def factor_axes(shape: tuple[int, ...]) -> tuple[int, int]:
    """The (rows, columns) that "factor" sees: the first axis that counts, and the rest."""
    rows = axes_of(shape)[0]
    return rows, math.prod(shape) // rows


def scale_of(
    scales: Tensor, axes: tuple[int, ...], second: str, start: int, stop: int, join=torch.fmin
) -> Tensor:
    """What scales v in elements [start, stop): fp32; for "factor" it is v itself."""
    if second == "block":
        return _slice(scales, start, stop).repeat_interleave(BLOCK)[: stop - start]
    *outer, column = scales.split(axes)
    before, index = _rows(axes, start, stop, scales.device)
    row = reduce(join, [part[i] for part, i in zip(outer, index, strict=True)])[:, None]
    grid = row * column if second == "factor" else join(row, column)
    return grid.flatten()[before : before + stop - start]


def _raise_maxima(scales: Tensor, axes: tuple[int, ...], start: int, v: Tensor) -> None:
    """Take elements [start, start + len(v)) into the maxima of every axis."""
    *outer, column = scales.split(axes)
    before, index = _rows(axes, start, start + len(v), v.device)
    grid = v.new_zeros(len(index[0]), axes[-1])
    grid.view(-1)[before : before + len(v)] = v
    column.copy_(torch.maximum(column, grid.amax(0)))
    for part, i in zip(outer, index, strict=True):
        part.scatter_reduce_(0, i, grid.amax(1), "amax")


def _rows(
    axes: tuple[int, ...], start: int, stop: int, device: torch.device
) -> tuple[int, tuple[Tensor, ...]]:
    """Elements between the beginning of `start`'s row and `start`; indices of the rows touched."""
    first, last = start // axes[-1], -(-stop // axes[-1])
    rows = torch.arange(first, last, device=device)
    return start - first * axes[-1], torch.unravel_index(rows, axes[:-1])


def decode(code: Tensor, name: str) -> Tensor:
    """Packed codes (blocks, 64) -> values of the map `name` (blocks, 128), fp32."""
    both = torch.cat([code & 15, code >> 4], 1)
    return maps.table(name, code.device)[both.int()]


def encode(x: Tensor, name: str) -> Tensor:
    """Scaled values (blocks, 128) -> packed codes (blocks, 64) of the nearest; NaN -> code 0."""
    code = torch.bucketize(
        x.nan_to_num(-math.inf, math.inf, -math.inf), maps.midpoints(name, x.device)
    )
    low, high = code.to(torch.uint8).chunk(2, 1)
    return low | (high << 4)


def reciprocal(scale: Tensor) -> Tensor:
    """1/scale; 0 where the scale is below 2^-122, infinite or NaN."""
    return torch.where(scale >= 2.0**-122, 1 / scale, 0)


def moved(p, m, v, step, lr, b1, b2, eps, weight_decay) -> Tensor:
    count = step.item()
    size, root = lr / (1 - b1**count), 1 / math.sqrt(1 - b2**count)
    # torch's fp32 square root on CPUs is one unit off for every fifth number; double's is not.
    denominator = v.double().sqrt().float() * root + eps
    return p * (1 - lr * weight_decay) + (m * -size) / denominator


def _factor(g: Tensor, means: Tensor, axes: tuple[int, int], b2: float) -> Tensor:
    """Update row and column means of g^2 in place; returns factors whose products are v."""
    g = g.view(axes)
    columns = torch.zeros(axes[1], device=g.device)
    rows = torch.empty(axes[0], device=g.device)
    height = max(1, _chunk(g) // axes[1])
    for start in range(0, axes[0], height):
        squares = g[start : start + height].float().square()
        rows[start : start + height] = squares.mean(1)
        columns += squares.sum(0)
    fresh = torch.cat([rows, columns / axes[0]])
    means.mul_(b2).add_(fresh, alpha=1 - b2)
    row, column = means.split(axes)
    return torch.cat([row, column / row.mean().clamp_min(_TINY)])


def library_for(p: Tensor, g: Tensor) -> tuple[ctypes.CDLL, int] | None:
    fits = p.device.type == "cpu" and p.dtype in NATIVE_DTYPES and g.dtype in NATIVE_DTYPES
    return native.library() if fits else None


@cache
def _tables() -> ctypes.Array:
    """Levels and midpoints of the map for m, then the levels for v, as the kernels want them."""
    numbers = [*maps.table("dynamic4"), *maps.midpoints("dynamic4"), *maps.table("linear4")]
    return (ctypes.c_float * 47)(*map(float, numbers))


def _chunks(p: Tensor) -> Iterator[tuple[int, int]]:
    chunk = _chunk(p)
    for start in range(0, p.numel(), chunk):
        yield start, min(start + chunk, p.numel())


def _chunk(x: Tensor) -> int:
    # A GPU wants longer kernels: 16 MiB per temporary.
    return CHUNK if x.device.type == "cpu" else 64 * CHUNK


def _slice(per_block: Tensor | None, start: int, stop: int) -> Tensor:
    assert per_block is not None
    return per_block[start // BLOCK : -(-stop // BLOCK)]


def _padded(x: Tensor) -> Tensor:
    return torch.nn.functional.pad(x, (0, -len(x) % BLOCK)).view(-1, BLOCK)
