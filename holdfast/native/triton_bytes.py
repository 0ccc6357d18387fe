"""AdamW steps on 8-bit and on expanded FP8 moments as Triton kernels: `adamw8` and `coat` on GPUs.

The rules of `triton_states` hold here too. A program takes whole blocks, so that a block's scale
and its codes are made in one pass.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from holdfast.native import adamw8, coat
from holdfast.native.triton_states import (
    EXACT,
    LARGE,
    bits_of,
    factors,
    moved,
    on_device,
    reciprocal,
)

_TILE = 1024
_SIXTEENTHS = tl.constexpr(coat.SIXTEENTHS)
_L0, _L1, _L2, _L3, _L4 = map(tl.constexpr, coat.LOG2)
_E0, _E1, _E2, _E3 = map(tl.constexpr, coat.EXP2)


@triton.jit
def _dynamic(x, top, table, SIGNED: tl.constexpr):
    """`adamw8.Dynamic8.encode`; the table holds bounds, slopes, starts and lasts of 8 regions."""
    y = tl.abs(x * reciprocal(top)[:, None])
    # NaN takes 1.
    y = tl.where(y < 1, y, 1.0)
    region = tl.zeros(y.shape, tl.int32)
    for k in tl.static_range(7):
        region += (y > tl.load(table + k)).to(tl.int32)
    n = y * tl.load(table + 8 + region) + tl.load(table + 16 + region)
    n = tl.minimum(n, tl.load(table + 24 + region)).to(tl.int32)
    beyond = y > tl.load(table + 7)
    if SIGNED:
        negative = x.to(tl.int32, bitcast=True) < 0
        n += tl.where(negative, 0, beyond.to(tl.int32))
        code = 127 + tl.where(negative, -n, n)
    else:
        code = tl.where(beyond, 255, n - 1)
    return code.to(tl.uint8)


@triton.jit
def _log2(x):
    """`coat.log2`."""
    bits = x.to(tl.int32, bitcast=True)
    e = (bits - 0x3F3504F3) >> 23
    t = (bits - (e << 23)).to(tl.float32, bitcast=True) - 1
    value = (((t * _L0 + _L1) * t + _L2) * t + _L3) * t + _L4
    return value * t + e.to(tl.float32)


@triton.jit
def _expanded(x, top, SIGNED: tl.constexpr):
    """`coat.encode`: codes and, per block, the power."""
    bits = bits_of(x)
    size = bits.to(tl.float32, bitcast=True)
    least = tl.min(tl.where(bits == 0, 0x7F800000, bits), 1)
    least = tl.where(bits_of(top) == 0, 0, least).to(tl.float32, bitcast=True)
    high = _log2(top)
    span = high - _log2(least)
    ratio = tl.div_rn(tl.full(span.shape, _SIXTEENTHS, tl.float32), span)
    power = tl.where(ratio < 256, tl.where(ratio > 1, ratio, 1.0), 256.0).to(tl.int32) - 1
    z = (_log2(size) - high[:, None]) * ((power + 1).to(tl.float32) * 0.0625)[:, None]
    z = tl.where(z > -64, z, -64.0)
    # Adding 1.5 * 2^23 leaves no bit for a fraction: rounds half to even.
    whole = (z + 12582912.0) - 12582912.0
    t = z - whole
    f = (((t * _E0 + _E1) * t + _E2) * t + _E3) * t + 448
    f_bits = f.to(tl.int32, bitcast=True) + (whole.to(tl.int32) << 23)
    small = f_bits < 0x3C800000
    h = f_bits.to(tl.float32, bitcast=True) + tl.where(small, 0.015625, 0.0)
    code = (h.to(tl.int32, bitcast=True) - 1006108672) >> 20
    code = code - 8 * small.to(tl.int32)
    code = tl.where(bits == 0, 0, tl.minimum(tl.maximum(code, 1), 126))
    if SIGNED:
        code += tl.where(x.to(tl.int32, bitcast=True) < 0, 128, 0)
    return code.to(tl.uint8), power.to(tl.uint8)


@triton.jit
def _faded(code, fade, power, levels, SIGNED: tl.constexpr, EXPANDED: tl.constexpr):
    """Decoded codes, times a factor per block."""
    if EXPANDED:
        x = tl.load(levels + power.to(tl.int32)[:, None] * 128 + (code & 127)) * fade[:, None]
        return tl.where(code > 127, -x, x) if SIGNED else x
    # 256 numerators, then 256 denominators.
    bottom = tl.load(levels + 256 + code)
    return tl.load(levels + code) * tl.div_rn(fade[:, None] + tl.zeros_like(bottom), bottom)


@triton.jit
def _bytes_kernel(
    p_ptr, g_ptr, m_code_ptr, m_scale_ptr, m_power_ptr, v_code_ptr, v_scale_ptr, v_power_ptr,
    m_table, v_table, n, b1, b2, c1, c2, size, root, eps, decay,
    EXPANDED: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    block = (program.to(tl.int64) if WIDE else program) * BLOCKS + tl.arange(0, BLOCKS)
    inside = block < tl.cdiv(n, BLOCK)
    at = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = at < n
    g = tl.load(g_ptr + at, mask=mask, other=0).to(tl.float32)
    p = tl.load(p_ptr + at, mask=mask, other=0).to(tl.float32)
    m_code = tl.load(m_code_ptr + at, mask=mask, other=0).to(tl.int32)
    v_code = tl.load(v_code_ptr + at, mask=mask, other=0).to(tl.int32)
    m_fade = tl.load(m_scale_ptr + block, mask=inside, other=0) * b1
    v_fade = tl.load(v_scale_ptr + block, mask=inside, other=0) * b2
    m_power, v_power = block, block
    if EXPANDED:
        m_power = tl.load(m_power_ptr + block, mask=inside, other=0)
        v_power = tl.load(v_power_ptr + block, mask=inside, other=0)
    m = _faded(m_code, m_fade, m_power, m_table, True, EXPANDED) + g * c1
    v = _faded(v_code, v_fade, v_power, v_table, False, EXPANDED) + g * g * c2
    after = moved(p, m, v, size, root, eps, decay)
    tl.store(p_ptr + at, after.to(p_ptr.dtype.element_ty), mask=mask)

    # What pads the last block must not reach its maxima.
    m, v = tl.where(mask, m, 0.0), tl.where(mask, v, 0.0)
    m_top = tl.max(bits_of(m), 1).to(tl.float32, bitcast=True)
    v_top = tl.max(bits_of(v), 1).to(tl.float32, bitcast=True)
    tl.store(m_scale_ptr + block, m_top, mask=inside)
    tl.store(v_scale_ptr + block, v_top, mask=inside)
    if EXPANDED:
        m_code, m_power = _expanded(m, m_top, True)
        v_code, v_power = _expanded(v, v_top, False)
        tl.store(m_power_ptr + block, m_power, mask=inside)
        tl.store(v_power_ptr + block, v_power, mask=inside)
    else:
        m_code = _dynamic(m, m_top, m_table + 512, True)
        v_code = _dynamic(v, v_top, v_table + 512, False)
    tl.store(m_code_ptr + at, m_code, mask=mask)
    tl.store(v_code_ptr + at, v_code, mask=mask)


def adamw8_(
    p: Tensor,
    g: Tensor,
    m_code: Tensor,
    m_scale: Tensor,
    v_code: Tensor,
    v_scale: Tensor,
    step: Tensor,
    lr: float,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """`adamw8.adamw8_ref`, fused."""
    states = (m_code, m_scale, None, v_code, v_scale, None)
    tables = (_dynamic_table(True, p.device), _dynamic_table(False, p.device))
    _launch(p, g, states, tables, adamw8.BLOCK, step, lr, b1, b2, eps, weight_decay)


def coat_(
    p: Tensor,
    g: Tensor,
    m_code: Tensor,
    m_scale: Tensor,
    m_power: Tensor,
    v_code: Tensor,
    v_scale: Tensor,
    v_power: Tensor,
    block: int,
    step: Tensor,
    lr: float,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """`coat.coat_ref`, fused."""
    states = (m_code, m_scale, m_power, v_code, v_scale, v_power)
    levels = _expanded_levels(p.device)
    _launch(p, g, states, (levels, levels), block, step, lr, b1, b2, eps, weight_decay)


def _launch(
    p: Tensor,
    g: Tensor,
    states: tuple[Tensor | None, ...],
    tables: tuple[Tensor, Tensor],
    block: int,
    step: Tensor,
    lr: float,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
) -> None:
    n, blocks = p.numel(), _TILE // block
    with on_device(p):
        _bytes_kernel[(triton.cdiv(n, _TILE),)](
            p, g, *states, *tables, n, b1, b2, 1 - b1, 1 - b2,
            *factors(step, lr, b1, b2, eps, weight_decay),
            states[2] is not None, block, blocks, n > LARGE, **EXACT,
        )  # fmt: skip


@cache
def _dynamic_table(signed: bool, device: torch.device) -> Tensor:
    """Numerators and denominators of 256 codes, then the regions of the encoder."""
    dynamic = adamw8.SIGNED if signed else adamw8.UNSIGNED
    rows = [*dynamic.numerators(), *dynamic.regions()]
    return torch.tensor([x for row in rows for x in row], dtype=torch.float32).to(device)


@cache
def _expanded_levels(device: torch.device) -> Tensor:
    return torch.tensor(coat.levels(), dtype=torch.float32).to(device)
