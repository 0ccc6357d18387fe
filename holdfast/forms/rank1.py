"""Rank1: codes scaled by the smaller of their row's and their column's largest magnitude.

Keeps    every element, as min over axes k of max_k[i_k] * map[code].
Form     one stream of codes over the flattened tensor (4 bits: element 2j in the low half of byte
         j, 2j + 1 in the high half), one fp32 maximum per index of every axis. One dimension or
         none: blocks of 128, written as `Blockwise` does.
Bytes    ceil(numel*bits/8) + 4 * sum(dimensions); 1-D: ceil(numel*bits/8) + 4 * ceil(numel/128).
Source   Li, Chen, Zhu, Memory Efficient Optimizers with 4-bit States, NeurIPS 2023.
Departs  nothing.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.forms import maps
from holdfast.forms.base import Buffers, Form, Layout, columns_of, reciprocal, require_float, tiles
from holdfast.forms.bits import pack, packed_nbytes, unpack
from holdfast.forms.blockwise import Blockwise, check_sign, look_up, nearest


@dataclass(frozen=True)
class Rank1(Form):
    """Suits matrices with outlying rows or columns, such as second moments.

    The largest magnitude of every row and column is kept exactly if the map has its sign of 1.

    Args:
        map: one of `maps.NAMES`; unsigned maps refuse negative entries.
    """

    map: str = "linear4"

    def __post_init__(self):
        maps.levels(self.map)

    @property
    def _flat(self) -> Blockwise:
        return Blockwise(self.map, 128)

    def layout(self, shape: torch.Size, dtype: torch.dtype) -> Layout:
        require_float(self, dtype)
        if len(shape) < 2:
            return self._flat.layout(shape, dtype)
        codes = packed_nbytes(shape.numel(), maps.bits(self.map))
        axes: Layout = {f"axis{k}": ((n,), torch.float32) for k, n in enumerate(shape)}
        return {"codes": ((codes,), torch.uint8)} | axes

    def grain(self, shape: torch.Size) -> int:
        if len(shape) < 2:
            return self._flat.grain(shape)
        # Whole rows, whose codes end on a byte.
        return max(1, shape[-1] * (1 + shape[-1] % 2))

    def _check(self, low: float, high: float) -> None:
        super()._check(low, high)
        check_sign(self.map, low)

    def _prepare(self, tensor: Tensor, buffers: Buffers) -> None:
        shape = tensor.shape
        if len(shape) < 2:
            return
        axes = [buffers[f"axis{k}"].zero_() for k in range(len(shape))]
        columns = shape[-1]
        flat = tensor.reshape(-1)
        for start, stop in tiles(flat, columns):
            x = flat[start:stop].float().abs().view(-1, columns)
            torch.maximum(axes[-1], x.amax(0), out=axes[-1])
            row_max = x.amax(1)
            rows = torch.arange(start // columns, stop // columns, device=x.device)
            for axis, at in zip(axes, _unravel(rows, shape[:-1]), strict=False):
                axis.scatter_reduce_(0, at, row_max, "amax")

    def _write(
        self,
        flat: Tensor,
        start: int,
        buffers: Buffers,
        shape: torch.Size,
        generator: torch.Generator | None,
    ) -> None:
        if len(shape) < 2:
            return self._flat._write(flat, start, buffers, shape, generator)
        columns, bits = shape[-1], maps.bits(self.map)
        rows = torch.arange(start // columns, (start + flat.numel()) // columns, device=flat.device)
        x = reciprocal(_scale(buffers, rows, shape)).mul_(flat.float().view(-1, columns))
        packed = pack(nearest(x, self.map).view(-1), bits)
        at = start * bits // 8
        buffers["codes"][at : at + packed.numel()] = packed

    def _read(self, buffers: Buffers, start: int, stop: int, shape: torch.Size) -> Tensor:
        if len(shape) < 2:
            return self._flat._read(buffers, start, stop, shape)
        columns, bits = shape[-1], maps.bits(self.map)
        part = buffers["codes"][start * bits // 8 : -(-stop * bits // 8)]
        values = look_up(unpack(part, bits, stop - start), self.map)
        rows = torch.arange(start // columns, stop // columns, device=part.device)
        return values.mul_(_scale(buffers, rows, shape).view(-1))

    def _take(self, buffers: Buffers, rows: Tensor, shape: torch.Size) -> Tensor:
        columns, bits = columns_of(shape), maps.bits(self.map)
        at = rows[:, None] * columns + torch.arange(columns, device=rows.device)
        code = buffers["codes"][at * bits // 8]
        if bits == 4:
            code = torch.where(at % 2 == 1, code >> 4, code & 15)
        values = look_up(code.view(-1), self.map).view(code.shape)
        return values.mul_(_scale(buffers, rows, shape))


def _unravel(rows: Tensor, leading: torch.Size) -> list[Tensor]:
    """Row numbers of the flattened leading dimensions -> one index per leading dimension."""
    out = []
    for size in reversed(leading):
        out.append(rows % size)
        rows = rows // size
    return out[::-1]


def _scale(buffers: Buffers, rows: Tensor, shape: torch.Size) -> Tensor:
    """rows (k,) -> (k, columns): the smallest of the maxima of all axes."""
    leading = [buffers[f"axis{k}"][at] for k, at in enumerate(_unravel(rows, shape[:-1]))]
    low = leading[0]
    for other in leading[1:]:
        low = torch.minimum(low, other)
    return torch.minimum(low[:, None], buffers[f"axis{len(shape) - 1}"])
