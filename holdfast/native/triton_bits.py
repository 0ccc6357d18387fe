"""Packed codes as Triton kernels: what `native.bits` does, on GPUs.

The rules of `triton_states` hold here too. Eight codes fill whole bytes, so that a program which
packs owns its bytes; one that reads takes each code from the two bytes that it may lie in.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from holdfast.native.bits import nbytes
from holdfast.native.triton_states import EXACT, LARGE, on_device

_GROUPS, _TILE = 256, 1024


@triton.jit
def _pack_kernel(
    x_ptr, packed_ptr, rows, n, row_bytes, bounds,
    BITS: tl.constexpr, STEPS: tl.constexpr, EVEN: tl.constexpr, GROUPS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Codes, or how many of STEPS bounds lie below x -> the bit streams of rows of n."""
    program = tl.program_id(0)
    group = (program.to(tl.int64) if WIDE else program) * GROUPS + tl.arange(0, GROUPS)
    per_row = tl.cdiv(n, 8)
    row, first = group // per_row, group % per_row
    lane = tl.arange(0, 8)[None, :]
    column = first[:, None] * 8 + lane
    mask = (row < rows)[:, None] & (column < n)
    x = tl.load(x_ptr + row[:, None] * n + column, mask=mask, other=0)
    if STEPS:
        x = tl.abs(x.to(tl.float32)) if EVEN else x.to(tl.float32)
        code = tl.zeros(x.shape, tl.int32)
        for k in tl.static_range(STEPS):
            code += (x > bounds[k]).to(tl.int32)
    else:
        code = x.to(tl.int32)
    # Codes do not overlap, so that their sum is their union.
    word = tl.sum(tl.where(mask, code << (lane * BITS), 0), 1)
    for k in tl.static_range(BITS):
        byte = first * BITS + k
        inside = (row < rows) & (byte < row_bytes)
        value = ((word >> (8 * k)) & 255).to(tl.uint8)
        tl.store(packed_ptr + row * row_bytes + byte, value, mask=inside)


@triton.jit
def _code(packed_ptr, row, column, row_bytes, stride, mask, BITS: tl.constexpr):
    if BITS == 8:
        return tl.load(packed_ptr + row * stride + column, mask=mask, other=0).to(tl.int32)
    bit = column * BITS
    byte = bit >> 3
    low = tl.load(packed_ptr + row * stride + byte, mask=mask, other=0).to(tl.int32)
    after = mask & (byte + 1 < row_bytes)
    high = tl.load(packed_ptr + row * stride + byte + 1, mask=after, other=0).to(tl.int32)
    return ((low | (high << 8)) >> (bit & 7).to(tl.int32)) & ((1 << BITS) - 1)


@triton.jit
def _unpack_kernel(
    packed_ptr, out_ptr, total, n, row_bytes, stride, gy_ptr, levels, scale_ptr, zero_ptr, group,
    BITS: tl.constexpr, LEVELS: tl.constexpr, AFFINE: tl.constexpr, TILE: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Rows of n codes, as they are, as levels times gy, or as affine groups."""
    program = tl.program_id(0)
    at = (program.to(tl.int64) if WIDE else program) * TILE + tl.arange(0, TILE)
    mask = at < total
    row, column = at // n, at % n
    code = _code(packed_ptr, row, column, row_bytes, stride, mask, BITS)
    if LEVELS:
        value = tl.zeros(code.shape, tl.float32)
        for k in tl.static_range(LEVELS):
            value = tl.where(code == k, levels[k], value)
        out = value * tl.load(gy_ptr + at, mask=mask, other=0).to(tl.float32)
    elif AFFINE:
        where = row * (n // group) + column // group
        scale = tl.load(scale_ptr + where, mask=mask, other=0).to(tl.float32)
        if zero_ptr is None:
            zero = tl.full(code.shape, 1 << (BITS - 1), tl.float32)
        else:
            zero = tl.load(zero_ptr + where, mask=mask, other=0).to(tl.float32)
        out = (code.to(tl.float32) - zero) * scale
    else:
        out = code
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=mask)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """`bits.pack_codes_ref`, fused."""
    n = codes.shape[-1]
    out = codes.new_empty(*codes.shape[:-1], nbytes(n, bits))
    return _packed(codes, out, math.prod(codes.shape[:-1]), n, (), bits, False)


def step_codes(x: Tensor, bounds: list[float], bits: int, even: bool) -> Tensor:
    """`bits.step_codes_ref`, fused."""
    out = x.new_empty(nbytes(x.numel(), bits), dtype=torch.uint8)
    return _packed(x, out, 1, x.numel(), _rounded(bounds, x.dtype), bits, even)


def unpack_codes(packed: Tensor, bits: int, numel: int) -> Tensor:
    """`bits.unpack_codes_ref`, fused."""
    packed = packed.contiguous()
    out = packed.new_empty(*packed.shape[:-1], numel)
    return _unpacked(packed, out, numel, packed.shape[-1], bits)


def step_slope(packed: Tensor, gy: Tensor, levels: list[float], bits: int) -> Tensor:
    """`bits.step_slope_ref`, fused."""
    out, levels = gy.new_empty(gy.shape), _rounded(levels, gy.dtype)
    return _unpacked(packed, out, gy.numel(), 0, bits, gy.contiguous(), levels)


def affine_values(
    codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, columns: int
) -> Tensor:
    """`bits.affine_values_ref`, fused."""
    codes = codes if codes.stride(1) == 1 else codes.contiguous()
    out = scale.new_empty(scale.shape[0], columns, dtype=torch.float32)
    zero = None if zero is None else zero.contiguous()
    group = columns // scale.shape[1]
    return _unpacked(
        codes, out, columns, codes.stride(0), bits, affine=(scale.contiguous(), zero, group)
    )


def _packed(
    x: Tensor, out: Tensor, rows: int, n: int, bounds: tuple[float, ...], bits: int, even: bool
) -> Tensor:
    x, groups = x.contiguous(), rows * triton.cdiv(n, 8)
    if groups:
        with on_device(x):
            _pack_kernel[(triton.cdiv(groups, _GROUPS),)](
                x, out, rows, n, nbytes(n, bits), bounds or (0.0,),
                bits, len(bounds), even, _GROUPS, x.numel() > LARGE, **EXACT,
            )  # fmt: skip
    return out


def _unpacked(
    packed: Tensor,
    out: Tensor,
    n: int,
    stride: int,
    bits: int,
    gy: Tensor | None = None,
    levels: tuple[float, ...] = (),
    affine: tuple[Tensor | None, Tensor | None, int] = (None, None, 1),
) -> Tensor:
    total = out.numel()
    if total:
        with on_device(out):
            _unpack_kernel[(triton.cdiv(total, _TILE),)](
                packed, out, total, n, nbytes(n, bits), stride, gy, levels or (0.0,), *affine,
                bits, len(levels), affine[0] is not None, _TILE, total > LARGE, **EXACT,
            )  # fmt: skip
    return out


def _rounded(numbers: list[float], dtype: torch.dtype) -> tuple[float, ...]:
    """As torch rounds them beside a tensor of this dtype."""
    return tuple(torch.tensor(numbers, dtype=dtype, device="cpu").tolist())
