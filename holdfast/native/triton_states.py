"""AdamW steps on 4-bit and on fp32 moments as Triton kernels: what `native.adamw4` does, on GPUs.

Imported only where triton is installed and a tensor lies on a GPU. Numbers are rounded as the torch
path rounds them (nothing is contracted, division and square root are exact), so that both give the
same codes. Maxima are taken over the bits of non-negative floats: integer order is float order
there, NaN ranks above inf, and the order of atomic operations cannot matter.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from holdfast.forms import maps
from holdfast.native.adamw4 import BLOCK, axes_of, factor_axes

# Blocks of 128 per program, and elements per tile of the pass that looks for maxima.
_BLOCKS, _TILE = 8, 2048
LARGE = 2**31 - 2**20
# Without contraction `a * b + c` rounds twice, as torch's separate operations do.
EXACT = {"enable_fp_fusion": False, "num_warps": 4}


@triton.jit
def bits_of(x):
    """The bits of |x| as an integer."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def reciprocal(scale):
    one = tl.full(scale.shape, 1.0, tl.float32)
    return tl.where(scale >= 2.0**-122, tl.div_rn(one, scale), 0.0)


@triton.jit
def _dynamic4(x, midpoints):
    """The number of 15 midpoints below x; NaN is above none."""
    code = tl.zeros(x.shape, tl.int32)
    for k in tl.static_range(15):
        code += (x > tl.load(midpoints + k)).to(tl.int32)
    return code


@triton.jit
def _linear4(x):
    """The nearest of (code + 1) / 16, the lower one on a tie; NaN -> 0."""
    code = tl.ceil(x * 16 - 1.5)
    code = tl.where(code > 0, code, 0.0)
    return tl.where(code < 15, code, 15.0).to(tl.int32)


@triton.jit
def _over_axes(scales, sizes, AXES: tl.constexpr, rest, mask, LARGEST: tl.constexpr):
    """The least or the largest of the scales that an element has, one per axis, as bits.

    `rest` counts elements of the first `AXES` axes; `scales` holds axis after axis.
    """
    start = 0
    for a in tl.static_range(AXES):
        start += sizes[a]
    found = tl.full(rest.shape, 0 if LARGEST else 0x7FFFFFFF, tl.int32)
    for k in tl.static_range(AXES):
        size = sizes[AXES - 1 - k]
        start -= size
        one = tl.load(scales + start + rest % size, mask=mask, other=0)
        found = tl.maximum(found, one) if LARGEST else tl.minimum(found, one)
        rest = rest // size
    return found


@triton.jit
def moved(p, m, v, size, root, eps, decay):
    return p * decay + tl.div_rn(m * -size, tl.sqrt_rn(v) * root + eps)


@triton.jit
def _half(
    p_ptr, g_ptr, at, n, m_code, m_scale, v_code, v_scale, v_bits, inverse, sizes, levels,
    b1, b2, c1, c2, size, root, eps, decay, SECOND: tl.constexpr, AXES: tl.constexpr,
):  # fmt: skip
    """Move the elements `at` and give their new moments, and what encodes v under rank-1 scales."""
    mask = at < n
    g = tl.load(g_ptr + at, mask=mask, other=0).to(tl.float32)
    p = tl.load(p_ptr + at, mask=mask, other=0).to(tl.float32)
    m = tl.load(levels + m_code) * b1 * m_scale + g * c1
    encodes = g
    if SECOND == "factor":
        column = tl.load(v_scale + sizes[0] + at % sizes[1], mask=mask, other=0)
        v = tl.load(v_scale + at // sizes[1], mask=mask, other=0) * column
    else:
        if SECOND == "rank1":
            scale = _over_axes(v_bits, sizes, AXES, at, mask, False).to(tl.float32, bitcast=True)
            largest = _over_axes(inverse, sizes, AXES, at, mask, True)
            encodes = largest.to(tl.float32, bitcast=True)
        else:
            scale = v_scale
        v = (v_code + 1).to(tl.float32) * 0.0625 * b2 * scale + g * g * c2
    after = moved(p, m, v, size, root, eps, decay)
    tl.store(p_ptr + at, after.to(p_ptr.dtype.element_ty), mask=mask)
    # What pads the last block must not reach its maxima.
    return tl.where(mask, m, 0.0), tl.where(mask, v, 0.0), encodes


@triton.jit
def _adamw4_kernel(
    p_ptr, g_ptr, m_code_ptr, m_scale_ptr, v_code_ptr, v_scale_ptr, v_bits, inverse, sizes, levels,
    n, b1, b2, c1, c2, size, root, eps, decay,
    SECOND: tl.constexpr, AXES: tl.constexpr, BLOCKS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    block = (program.to(tl.int64) if WIDE else program) * BLOCKS + tl.arange(0, BLOCKS)
    inside = block < tl.cdiv(n, 128)
    byte = block[:, None] * 64 + tl.arange(0, 64)[None, :]
    here = inside[:, None] & (byte >= 0)
    m_code = tl.load(m_code_ptr + byte, mask=here, other=0).to(tl.int32)
    m_scale = tl.load(m_scale_ptr + block, mask=inside, other=0)[:, None]
    v_code, v_scale = m_code, v_scale_ptr
    if SECOND != "factor":
        v_code = tl.load(v_code_ptr + byte, mask=here, other=0).to(tl.int32)
    if SECOND == "block":
        v_scale = tl.load(v_scale_ptr + block, mask=inside, other=0)[:, None]

    at = block[:, None] * 128 + tl.arange(0, 64)[None, :]
    m0, v0, by0 = _half(
        p_ptr, g_ptr, at, n, m_code & 15, m_scale, v_code & 15, v_scale, v_bits, inverse, sizes,
        levels, b1, b2, c1, c2, size, root, eps, decay, SECOND, AXES,
    )  # fmt: skip
    m1, v1, by1 = _half(
        p_ptr, g_ptr, at + 64, n, m_code >> 4, m_scale, v_code >> 4, v_scale, v_bits, inverse,
        sizes, levels, b1, b2, c1, c2, size, root, eps, decay, SECOND, AXES,
    )  # fmt: skip

    top = tl.maximum(tl.max(bits_of(m0), 1), tl.max(bits_of(m1), 1)).to(tl.float32, bitcast=True)
    tl.store(m_scale_ptr + block, top, mask=inside)
    by = reciprocal(top)[:, None]
    low, high = _dynamic4(m0 * by, levels + 16), _dynamic4(m1 * by, levels + 16)
    tl.store(m_code_ptr + byte, (low | (high << 4)).to(tl.uint8), mask=here)
    if SECOND != "factor":
        if SECOND == "block":
            top = tl.maximum(tl.max(bits_of(v0), 1), tl.max(bits_of(v1), 1))
            top = top.to(tl.float32, bitcast=True)
            tl.store(v_scale_ptr + block, top, mask=inside)
            by0 = reciprocal(top)[:, None]
            by1 = by0
        low, high = _linear4(v0 * by0), _linear4(v1 * by1)
        tl.store(v_code_ptr + byte, (low | (high << 4)).to(tl.uint8), mask=here)


@triton.jit
def _maxima_kernel(
    g_ptr, v_code_ptr, v_bits, fresh, sizes, rows, columns, b2, c2,
    AXES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Maxima of the new second moments along every axis, into zeroed `fresh`."""
    program = tl.program_id(0)
    across = tl.cdiv(columns, COLUMNS)
    row = program // across * ROWS + tl.arange(0, ROWS)
    column = program % across * COLUMNS + tl.arange(0, COLUMNS)
    row = row.to(tl.int64) if WIDE else row
    at = row[:, None] * columns + column[None, :]
    row_in, column_in = row < rows, column < columns
    mask = row_in[:, None] & column_in[None, :]

    outer = 0
    for a in tl.static_range(AXES - 1):
        outer += sizes[a]
    byte = tl.load(v_code_ptr + at // 128 * 64 + at % 64, mask=mask, other=0).to(tl.int32)
    code = tl.where(at % 128 < 64, byte & 15, byte >> 4)
    scale = tl.minimum(
        _over_axes(v_bits, sizes, AXES - 1, row, row_in, False)[:, None],
        tl.load(v_bits + outer + column, mask=column_in, other=0)[None, :],
    ).to(tl.float32, bitcast=True)
    g = tl.load(g_ptr + at, mask=mask, other=0).to(tl.float32)
    v = (code + 1).to(tl.float32) * 0.0625 * b2 * scale + g * g * c2
    bits = tl.where(mask, bits_of(v), 0)

    tl.atomic_max(fresh + outer + column, tl.max(bits, 0), mask=column_in, sem="relaxed")
    top = tl.max(bits, 1)
    rest = row
    for k in tl.static_range(AXES - 1):
        size = sizes[AXES - 2 - k]
        outer -= size
        tl.atomic_max(fresh + outer + rest % size, top, mask=row_in, sem="relaxed")
        rest = rest // size


@triton.jit
def _adamw_kernel(
    p_ptr, g_ptr, m_ptr, v_ptr, n, b1, b2, c1, c2, size, root, eps, decay, TILE: tl.constexpr
):
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    mask = at < n
    g = tl.load(g_ptr + at, mask=mask, other=0).to(tl.float32)
    p = tl.load(p_ptr + at, mask=mask, other=0).to(tl.float32)
    m = tl.load(m_ptr + at, mask=mask, other=0) * b1 + g * c1
    v = tl.load(v_ptr + at, mask=mask, other=0) * b2 + g * g * c2
    tl.store(m_ptr + at, m, mask=mask)
    tl.store(v_ptr + at, v, mask=mask)
    after = moved(p, m, v, size, root, eps, decay)
    tl.store(p_ptr + at, after.to(p_ptr.dtype.element_ty), mask=mask)


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
    """`adamw4.adamw4_ref`, fused."""
    # Triton has no empty tuples; block scales have no axes.
    axes = axes_of(p.shape) if second == "rank1" else (1, 1)
    if second == "factor":
        axes = factor_axes(p.shape)
    n, wide = p.numel(), p.numel() > LARGE
    bits = inverse = v_scale
    fresh = None
    with on_device(p):
        if second == "rank1":
            bits, columns = v_scale.view(torch.int32), axes[-1]
            fresh = torch.zeros_like(bits)
            across = min(128, triton.next_power_of_2(columns))
            tall = _TILE // across
            grid = (triton.cdiv(n // columns, tall) * triton.cdiv(columns, across),)
            _maxima_kernel[grid](
                g, v_code, bits, fresh, axes, n // columns, columns, b2, 1 - b2,
                len(axes), tall, across, wide, **EXACT,
            )  # fmt: skip
            maxima = fresh.view(torch.float32)
            inverse = torch.where(maxima >= 2.0**-122, 1 / maxima, 0).view(torch.int32)
        _adamw4_kernel[(triton.cdiv(n, BLOCK * _BLOCKS),)](
            p, g, m_code, m_scale, v_code, v_scale, bits, inverse, axes, _levels(p.device),
            n, b1, b2, 1 - b1, 1 - b2, *factors(step, lr, b1, b2, eps, weight_decay),
            second, len(axes), _BLOCKS, wide, **EXACT,
        )  # fmt: skip
    if fresh is not None:
        bits.copy_(fresh)


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
    """`adamw4.adamw_ref`, fused."""
    with on_device(p):
        _adamw_kernel[(triton.cdiv(p.numel(), 1024),)](
            p, g, m, v, p.numel(), b1, b2, 1 - b1, 1 - b2,
            *factors(step, lr, b1, b2, eps, weight_decay), 1024, **EXACT,
        )  # fmt: skip


def factors(
    step: Tensor, lr: float, b1: float, b2: float, eps: float, weight_decay: float
) -> tuple[float, float, float, float]:
    # The step lies on the host, so that nothing waits for the device.
    count = step.item()
    return lr / (1 - b1**count), (1 - b2**count) ** -0.5, eps, 1 - lr * weight_decay


@cache
def _levels(device: torch.device) -> Tensor:
    """Levels and midpoints of the map for m; made once, because filling it waits for the device."""
    name = "dynamic4"
    return torch.cat([maps.table(name), maps.midpoints(name)]).to(device)


def on_device(p: Tensor) -> AbstractContextManager:
    """Triton launches on the current device."""
    return torch.cuda.device(p.device) if p.is_cuda else nullcontext()
