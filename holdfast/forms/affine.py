"""Affine: integers of 2, 3, 4 or 8 bits with a scale and a zero point per group.

Keeps    every element, as s * (q - z).
Form     groups run along the last dimension; each row of codes is padded to a byte.
Bytes    rows * ceil(columns*bits/8) codes, plus per group the scale (2 or 4) and, unless
         symmetric, one byte of zero point.
Source   Jacob et al., Quantization and Training of Neural Networks for Efficient
         Integer-Arithmetic-Only Inference, CVPR 2018; stochastic rounding: Gupta et al., Deep
         Learning with Limited Numerical Precision, ICML 2015.
Departs  fp16 scales are rounded up, so that no entry of a group is clipped by the rounding.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from holdfast.errors import UsageError
from holdfast.forms.base import (
    Buffers,
    Form,
    Layout,
    columns_of,
    reciprocal,
    require_float,
    rows_of,
    tile_numel,
)
from holdfast.forms.bits import pack, packed_nbytes
from holdfast.forms.packed import Packed
from holdfast.native.bits import ops


@dataclass(frozen=True)
class Affine(Form):
    """Nearest rounding moves an element by at most half a scale, stochastic by less than one.

    Args:
        bits: 2, 3, 4 or 8.
        group: elements that share a scale, a divisor of the last dimension; None: the whole row.
        symmetric: codes are centred on 0 and span ±(2^(bits-1) - 1); else a zero point per group
            covers exactly the group's range, extended to contain 0, so that 0 stays exactly 0.
        scale_dtype: float16 or float32.
        rounding: "nearest" (half to even) or "stochastic" (up with probability of the fraction).
    """

    bits: int = 4
    group: int | None = 64
    symmetric: bool = False
    scale_dtype: torch.dtype = torch.float16
    rounding: Literal["nearest", "stochastic"] = "nearest"

    def __post_init__(self):
        for name, known in (
            ("bits", (2, 3, 4, 8)),
            ("scale_dtype", (torch.float16, torch.float32)),
            ("rounding", ("nearest", "stochastic")),
        ):
            if getattr(self, name) not in known:
                raise UsageError(f"{name}={getattr(self, name)!r}; expected one of {known}")
        if self.group is not None and self.group < 1:
            raise UsageError(f"group={self.group}; expected a positive size, or None for rows")

    def layout(self, shape: torch.Size, dtype: torch.dtype) -> Layout:
        require_float(self, dtype)
        rows, columns = rows_of(shape), columns_of(shape)
        if self.group is not None and columns % self.group:
            raise UsageError(
                f"group={self.group} does not divide the last dimension of {tuple(shape)}; "
                f"choose a divisor of {columns}, or group=None for one group per row"
            )
        groups = columns // self.group if self.group else 1
        buffers: Layout = {
            "codes": ((rows, packed_nbytes(columns, self.bits)), torch.uint8),
            "scale": ((rows, groups), self.scale_dtype),
        }
        if not self.symmetric:
            buffers["zero"] = ((rows, groups), torch.uint8)
        return buffers

    def grain(self, shape: torch.Size) -> int:
        return max(1, columns_of(shape))

    @property
    def _steps(self) -> int:
        """Scales between the ends of a group (asymmetric) or from 0 to an end (symmetric)."""
        return 2 ** (self.bits - 1) - 1 if self.symmetric else 2**self.bits - 1

    def _check(self, low: float, high: float) -> None:
        super()._check(low, high)
        span = max(-low, high) if self.symmetric else max(high, 0.0) - min(low, 0.0)
        if span > torch.finfo(torch.float32).max or (
            span / self._steps > torch.finfo(self.scale_dtype).max
        ):
            raise UsageError(
                f"entries from {low:g} to {high:g} are too large for {self}; "
                "use scale_dtype=torch.float32, or scale them down"
            )

    def _write(
        self,
        flat: Tensor,
        start: int,
        buffers: Buffers,
        shape: torch.Size,
        generator: torch.Generator | None,
    ) -> None:
        columns = columns_of(shape)
        groups = buffers["scale"].shape[1]
        at = slice(start // columns, (start + flat.numel()) // columns)
        x = flat.float().view(-1, groups, columns // groups)
        if self.symmetric:
            span = x.abs().amax(-1)
        else:
            low, high = x.amin(-1).clamp_(max=0), x.amax(-1).clamp_(min=0)
            span = high - low
        scale = _round_up(span / self._steps, self.scale_dtype)
        buffers["scale"][at] = scale
        step = scale.float()
        inverse = reciprocal(step)
        if self.symmetric:
            zero, least = torch.full_like(step, 2.0 ** (self.bits - 1)), 1
        else:
            zero, least = (-low * inverse).round_().clamp_(max=self._steps), 0
            buffers["zero"][at] = zero.to(torch.uint8)
        q = x * inverse.unsqueeze(-1)
        if self.rounding == "stochastic":
            q += torch.rand(q.shape, generator=generator, device=q.device)
            q.floor_()
        else:
            q.round_()
        q.add_(zero.unsqueeze(-1)).clamp_(least, 2**self.bits - 1)
        buffers["codes"][at] = pack(q.to(torch.uint8).view(-1, columns), self.bits)

    def _read(self, buffers: Buffers, start: int, stop: int, shape: torch.Size) -> Tensor:
        columns = self.grain(shape)
        rows = slice(start // columns, stop // columns)
        return self._values({n: b[rows] for n, b in buffers.items()}, columns).view(-1)

    def _take(self, buffers: Buffers, rows: Tensor, shape: torch.Size) -> Tensor:
        return self._values({n: b[rows] for n, b in buffers.items()}, columns_of(shape))

    def column_tiles(self, packed: Packed) -> Iterator[tuple[slice, Tensor]]:
        """Ranges of columns of a 2-D tensor as encoded, with their values (rows, range) in fp32.

        A tile has about `tile_numel` elements and ends with a group and a byte.
        """
        rows, columns = packed.stored_shape
        unit = math.lcm(8, self.group or 1)
        step = max(1, tile_numel(packed.device) // max(1, rows) // unit) * unit
        for first in range(0, columns, step):
            last = min(first + step, columns)
            groups = slice(first // self.group, last // self.group) if self.group else slice(None)
            part = {name: b[:, groups] for name, b in packed.buffers.items() if name != "codes"}
            first_byte = first * self.bits // 8
            stop_byte = first_byte + packed_nbytes(last - first, self.bits)
            part["codes"] = packed.buffers["codes"][:, first_byte:stop_byte]
            yield slice(first, last), self._values(part, last - first)

    def _values(self, buffers: Buffers, columns: int) -> Tensor:
        zero = None if self.symmetric else buffers["zero"]
        return ops.affine_values(buffers["codes"], buffers["scale"], zero, self.bits, columns)


def Int8(group: int | None = None) -> Affine:
    """8 bits, symmetric, fp32 scale per row or group."""
    return Affine(bits=8, group=group, symmetric=True, scale_dtype=torch.float32)


def Int4(group: int | None = 64) -> Affine:
    """4 bits with zero points and fp16 scales per group of 64."""
    return Affine(bits=4, group=group)


def _round_up(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x >= 0 fp32 -> the smallest number of `dtype` that is not below it."""
    if dtype == torch.float32:
        return x
    near = x.half()
    above = (near.view(torch.int16) + 1).view(torch.float16)
    return torch.where(near.float() < x, above, near)


def affine_ref(values: list[float], bits: int, symmetric: bool) -> list[float]:
    """One group with an exact scale, slow and obvious."""
    if symmetric:
        top = 2 ** (bits - 1) - 1
        scale = max(map(abs, values)) / top
        return [scale * round(v / scale) if scale else 0.0 for v in values]
    top = 2**bits - 1
    low, high = min(0.0, *values), max(0.0, *values)
    scale = (high - low) / top
    if not scale:
        return [0.0 for _ in values]
    zero = round(-low / scale)
    return [scale * (max(0, min(top, round(v / scale) + zero)) - zero) for v in values]
