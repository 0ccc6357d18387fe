"""Packed codes as torch operators: native on CPUs, torch elsewhere, bitwise the same.

`pack_codes` and `unpack_codes` squeeze codes into a little-endian bit stream and back. The others
read or write such a stream without an array of codes in between: `step_codes` (forward) and
`step_slope` (backward) of an activation whose derivative is a step function, and `affine_values`
of integers with scales and zero points. On fake and meta tensors they allocate their result only.
"""

import ctypes
import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast import native
from holdfast.native.triton_path import pick

_NATIVE_DTYPES = {torch.float32: 0, torch.bfloat16: 1}

_lib = torch.library.Library("holdfast", "FRAGMENT")
for _schema in (
    "pack_codes(Tensor codes, int bits) -> Tensor",
    "unpack_codes(Tensor packed, int bits, SymInt numel) -> Tensor",
    "step_codes(Tensor x, float[] bounds, int bits, bool even) -> Tensor",
    "step_slope(Tensor packed, Tensor gy, float[] levels, int bits) -> Tensor",
    "affine_values(Tensor codes, Tensor scale, Tensor? zero, int bits, SymInt columns) -> Tensor",
):
    _lib.define(_schema)
ops = torch.ops.holdfast


def nbytes(numel: int, bits: int) -> int:
    """Bytes of a stream of `numel` codes."""
    return -(-numel * bits // 8)


@torch.library.impl(_lib, "pack_codes", "Meta")
def _packed_like(codes: Tensor, bits: int) -> Tensor:
    return codes.new_empty(*codes.shape[:-1], nbytes(codes.shape[-1], bits))


@torch.library.impl(_lib, "unpack_codes", "Meta")
def _unpacked_like(packed: Tensor, bits: int, numel: int) -> Tensor:
    return packed.new_empty(*packed.shape[:-1], numel)


@torch.library.impl(_lib, "step_codes", "Meta")
def _codes_like(x: Tensor, bounds: list[float], bits: int, even: bool) -> Tensor:
    return x.new_empty(nbytes(x.numel(), bits), dtype=torch.uint8)


@torch.library.impl(_lib, "step_slope", "Meta")
def _gradient_like(packed: Tensor, gy: Tensor, levels: list[float], bits: int) -> Tensor:
    return gy.new_empty(gy.shape)


@torch.library.impl(_lib, "affine_values", "Meta")
def _values_like(
    codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, columns: int
) -> Tensor:
    return scale.new_empty(scale.shape[0], columns, dtype=torch.float32)


@torch.library.impl(_lib, "pack_codes", "CompositeExplicitAutograd")
def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """codes (..., n) uint8 below 2^bits, bits 1 to 4 -> (..., ceil(n*bits/8)) uint8."""
    library = _library(codes)
    if library is None:
        return pick("triton_bits", "pack_codes", pack_codes_ref, codes)(codes, bits)
    return _rewritten(library, 0, codes, bits, codes.shape[-1], _packed_like(codes, bits))


@torch.library.impl(_lib, "unpack_codes", "CompositeExplicitAutograd")
def unpack_codes(packed: Tensor, bits: int, numel: int) -> Tensor:
    """packed (..., ceil(numel*bits/8)) uint8 -> (..., numel) uint8; the inverse of `pack_codes`."""
    library = _library(packed)
    if library is None:
        return pick("triton_bits", "unpack_codes", unpack_codes_ref, packed)(packed, bits, numel)
    return _rewritten(library, 1, packed, bits, numel, _unpacked_like(packed, bits, numel))


@torch.library.impl(_lib, "step_codes", "CompositeExplicitAutograd")
def step_codes(x: Tensor, bounds: list[float], bits: int, even: bool) -> Tensor:
    """How many of the 2^bits - 1 rising `bounds` lie below x, packed: (ceil(numel*bits/8),) uint8.

    Args:
        x: any shape, read in the order of its elements.
        even: compare |x|.
    """
    library = _library(x, _NATIVE_DTYPES)
    if library is None:
        return pick("triton_bits", "step_codes", step_codes_ref, x)(x, bounds, bits, even)
    out = _codes_like(x, bounds, bits, even)
    _steps(library, 0, bits, even, x, out, _table(tuple(bounds), x.dtype, math.inf), None)
    return out


@torch.library.impl(_lib, "step_slope", "CompositeExplicitAutograd")
def step_slope(packed: Tensor, gy: Tensor, levels: list[float], bits: int) -> Tensor:
    """levels[codes] * gy, in gy's shape and dtype, contiguous."""
    library = _library(gy, _NATIVE_DTYPES)
    if library is None:
        return pick("triton_bits", "step_slope", step_slope_ref, gy)(packed, gy, levels, bits)
    out = _gradient_like(packed, gy, levels, bits)
    _steps(library, 1, bits, False, gy, packed, _table(tuple(levels), gy.dtype, 0.0), out)
    return out


@torch.library.impl(_lib, "affine_values", "CompositeExplicitAutograd")
def affine_values(
    codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, columns: int
) -> Tensor:
    """(code - zero) * scale -> (rows, columns) fp32.

    Args:
        codes: (rows, ceil(columns*bits/8)) uint8, of 2, 3, 4 or 8 bits; rows may lie apart.
        scale: (rows, groups) fp16 or fp32.
        zero: (rows, groups) uint8, or None: 2^(bits-1).
    """
    library = _library(codes)
    if library is None:
        return pick("triton_bits", "affine_values", affine_values_ref, codes)(
            codes, scale, zero, bits, columns
        )
    out = _values_like(codes, scale, zero, bits, columns)
    rows, groups = scale.shape
    if codes.stride(1) != 1:
        codes = codes.contiguous()
    scale = scale.float().contiguous()
    zero = None if zero is None else zero.contiguous()
    kernels, variant = library
    kernels.hf_affine(
        variant,
        native.threads(),
        bits,
        rows,
        groups,
        columns // groups,
        codes.data_ptr(),
        codes.stride(0),
        scale.data_ptr(),
        None if zero is None else zero.data_ptr(),
        out.data_ptr(),
    )
    return out


def pack_codes_ref(codes: Tensor, bits: int) -> Tensor:
    """`pack_codes` in torch, on any device."""
    if bits == 3:
        # Eight codes are 24 bits, so three bytes repeat the pattern.
        eight = _rows_of(codes, 8)
        word = eight[..., 0].int()
        for i in range(1, 8):
            word |= eight[..., i].int() << (3 * i)
        packed = torch.stack([(word >> shift) & 255 for shift in (0, 8, 16)], -1).to(torch.uint8)
        return packed.flatten(-2)[..., : nbytes(codes.shape[-1], 3)].contiguous()
    per_byte = 8 // bits
    parts = _rows_of(codes, per_byte)
    packed = parts[..., 0].clone()
    for i in range(1, per_byte):
        packed |= parts[..., i] << (bits * i)
    return packed


def unpack_codes_ref(packed: Tensor, bits: int, numel: int) -> Tensor:
    """`unpack_codes` in torch, on any device."""
    mask = (1 << bits) - 1
    if bits == 3:
        three = _rows_of(packed, 3)
        word = three[..., 0].int() | three[..., 1].int() << 8 | three[..., 2].int() << 16
        parts = [((word >> (3 * i)) & mask).to(torch.uint8) for i in range(8)]
    else:
        parts = [(packed >> shift) & mask for shift in range(0, 8, bits)]
    return torch.stack(parts, -1).flatten(-2)[..., :numel].contiguous()


def step_codes_ref(x: Tensor, bounds: list[float], bits: int, even: bool) -> Tensor:
    """`step_codes` in torch, on any device."""
    x = x.abs() if even else x
    # `bucketize` searches element by element: five to ten times the time on a CPU.
    first, *rest = bounds
    codes = (x > first).view(torch.uint8)
    for bound in rest:
        codes += x > bound
    return pack_codes_ref(codes.flatten(), bits)


def step_slope_ref(packed: Tensor, gy: Tensor, levels: list[float], bits: int) -> Tensor:
    """`step_slope` in torch, on any device."""
    codes = unpack_codes_ref(packed, bits, gy.numel())
    slopes = gy.new_tensor(levels).index_select(0, codes.int())
    return slopes.view(gy.shape).mul_(gy)


def affine_values_ref(
    codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, columns: int
) -> Tensor:
    """`affine_values` in torch, on any device."""
    q = (codes if bits == 8 else unpack_codes_ref(codes, bits, columns)).float()
    q = q.view(*scale.shape, columns // scale.shape[1])
    middle = 2.0 ** (bits - 1) if zero is None else zero.float().unsqueeze(-1)
    return q.sub_(middle).mul_(scale.float().unsqueeze(-1)).view(scale.shape[0], columns)


def _rows_of(x: Tensor, unit: int) -> Tensor:
    """(..., n) padded with zeros -> (..., ceil(n/unit), unit)."""
    if x.shape[-1] % unit:
        x = F.pad(x, (0, -x.shape[-1] % unit))
    return x.unflatten(-1, (x.shape[-1] // unit, unit))


def _library(x: Tensor, dtypes: dict | None = None) -> tuple[ctypes.CDLL, int] | None:
    fits = x.device.type == "cpu" and (dtypes is None or x.dtype in dtypes)
    return native.library() if fits else None


def _rewritten(
    library: tuple[ctypes.CDLL, int], unpacking: int, x: Tensor, bits: int, numel: int, out: Tensor
) -> Tensor:
    x, (kernels, variant) = x.contiguous(), library
    rows = math.prod(x.shape[:-1])
    kernels.hf_pack(
        variant, native.threads(), unpacking, bits, rows, numel, x.data_ptr(), out.data_ptr()
    )
    return out


def _steps(
    library: tuple[ctypes.CDLL, int],
    backward: int,
    bits: int,
    even: bool,
    x: Tensor,
    packed: Tensor,
    table: ctypes.Array,
    out: Tensor | None,
) -> None:
    x, (kernels, variant) = x.contiguous(), library
    kernels.hf_steps(
        variant,
        native.threads(),
        backward,
        bits,
        even,
        x.numel(),
        x.data_ptr(),
        _NATIVE_DTYPES[x.dtype],
        packed.data_ptr(),
        table,
        None if out is None else out.data_ptr(),
    )


@cache
def _table(values: tuple[float, ...], dtype: torch.dtype, rest: float) -> ctypes.Array:
    """Numbers as torch rounds them for a tensor of this dtype, filled up with `rest` to 16."""
    numbers = torch.tensor(values, dtype=dtype, device="cpu").tolist()
    return (ctypes.c_float * 16)(*numbers, *[rest] * (16 - len(numbers)))
