"""Blockwise: codes of a fixed map, scaled by the largest magnitude of their block.

Keeps    every element, as scale * map[code].
Form     blocks of the flattened tensor. With 4 bits, byte j of a block of t elements holds code j
         in its low half and code j + ceil(t/2) in its high half; only the last block may be short.
Bytes    ceil(numel*bits/8) codes + 4 * ceil(numel/block) scales.
Source   Dettmers et al., 8-bit Optimizers via Block-wise Quantization, ICLR 2022; Li, Chen, Zhu,
         Memory Efficient Optimizers with 4-bit States, NeurIPS 2023.
Departs  nothing. The signed dynamic maps have no -1: a block whose largest magnitude is negative
         keeps 0.8875 (4 bits) or 0.993 (8 bits) of it, and shrinks again when it is encoded again.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.errors import UsageError
from holdfast.forms import maps
from holdfast.forms.base import Buffers, Form, Layout, columns_of, reciprocal, require_float


@dataclass(frozen=True)
class Blockwise(Form):
    """Each element takes the nearest value of the map, the smaller one on a tie.

    A block of zeros has scale 0 and decodes to exact zeros, also where the map has no zero.

    Args:
        map: one of `maps.NAMES`; unsigned maps refuse negative entries.
        block: elements per scale, even.
    """

    map: str = "dynamic4"
    block: int = 128

    def __post_init__(self):
        maps.levels(self.map)
        if self.block < 2 or self.block % 2:
            raise UsageError(f"block={self.block}; expected a positive even number of elements")

    def layout(self, shape: torch.Size, dtype: torch.dtype) -> Layout:
        require_float(self, dtype)
        return {
            "codes": ((-(-shape.numel() * maps.bits(self.map) // 8),), torch.uint8),
            "scale": ((-(-shape.numel() // self.block),), torch.float32),
        }

    def grain(self, shape: torch.Size) -> int:
        return self.block

    def _check(self, low: float, high: float) -> None:
        super()._check(low, high)
        check_sign(self.map, low)

    def _write(
        self,
        flat: Tensor,
        start: int,
        buffers: Buffers,
        shape: torch.Size,
        generator: torch.Generator | None,
    ) -> None:
        x = flat.float()
        scale = block_absmax(x, self.block)
        first = start // self.block
        buffers["scale"][first : first + scale.numel()] = scale
        codes = nearest(spread(reciprocal(scale), self.block, x.numel()).mul_(x), self.map)
        if maps.bits(self.map) == 8:
            buffers["codes"][start : start + x.numel()] = codes
            return
        full = x.numel() // self.block * self.block
        at = start // 2
        buffers["codes"][at : at + full // 2] = _fold(codes[:full].view(-1, self.block)).view(-1)
        if full < x.numel():
            buffers["codes"][at + full // 2 :] = _fold(codes[full:].view(1, -1)).view(-1)

    def _read(self, buffers: Buffers, start: int, stop: int, shape: torch.Size) -> Tensor:
        count = stop - start
        if maps.bits(self.map) == 8:
            codes = buffers["codes"][start:stop]
        else:
            full = count // self.block * self.block
            at = start // 2
            folded = buffers["codes"][at : at + full // 2].view(-1, self.block // 2)
            codes = _unfold(folded, self.block).view(-1)
            if full < count:
                tail = buffers["codes"][at + full // 2 :].view(1, -1)
                codes = torch.cat([codes, _unfold(tail, count - full).view(-1)])
        scale = buffers["scale"][start // self.block : -(-stop // self.block)]
        return look_up(codes, self.map).mul_(spread(scale, self.block, count))

    def _take(self, buffers: Buffers, rows: Tensor, shape: torch.Size) -> Tensor:
        columns = columns_of(shape)
        at = rows[:, None] * columns + torch.arange(columns, device=rows.device)
        block = at // self.block
        codes = buffers["codes"]
        if maps.bits(self.map) == 8:
            code = codes[at]
        else:
            inside = at - block * self.block
            half = ((shape.numel() - block * self.block).clamp_(max=self.block) + 1) // 2
            high = inside >= half
            byte = codes[block * (self.block // 2) + inside - half * high]
            code = torch.where(high, byte >> 4, byte & 15)
        values = look_up(code.view(-1), self.map).view(code.shape)
        return values.mul_(buffers["scale"][block])


def block_absmax(x: Tensor, block: int) -> Tensor:
    """x (n,) -> (ceil(n/block),) largest magnitudes; the last block may be short."""
    if x.numel() % block:
        x = F.pad(x, (0, -x.numel() % block))
    return x.view(-1, block).abs().amax(1)


def spread(scale: Tensor, block: int, numel: int) -> Tensor:
    """scale (ceil(numel/block),) -> a new (numel,), each repeated over its block."""
    return scale.repeat_interleave(block, output_size=scale.numel() * block)[:numel]


def nearest(x: Tensor, map: str) -> Tensor:
    """x fp32 in [-1, 1] -> uint8 codes of the nearest values, the smaller one on a tie."""
    return torch.bucketize(x, maps.midpoints(map, x.device), out_int32=True).to(torch.uint8)


def look_up(codes: Tensor, map: str) -> Tensor:
    """codes (n,) uint8 -> (n,) fp32 values."""
    # index_select with int32 took 1/30 of the time of indexing with uint8 or int64 on a CPU.
    return maps.table(map, codes.device).index_select(0, codes.int())


def check_sign(map: str, low: float) -> None:
    if low < 0 and maps.levels(map)[0] >= 0:
        raise UsageError(
            f"map {map!r} has no negative values, the tensor's smallest entry is {low:g}; "
            "use a signed map: dynamic4, nf4 or dynamic8"
        )


def _fold(codes: Tensor) -> Tensor:
    """codes (b, t) -> (b, ceil(t/2)): first half low, second half high."""
    half = -(-codes.shape[1] // 2)
    folded = codes[:, :half].clone()
    folded[:, : codes.shape[1] - half] |= codes[:, half:] << 4
    return folded


def _unfold(folded: Tensor, size: int) -> Tensor:
    """The inverse of `_fold`: (b, ceil(size/2)) -> (b, size)."""
    return torch.cat([folded & 15, folded >> 4], 1)[:, :size]


def blockwise_ref(values: list[float], map: str, block: int) -> list[float]:
    """Encode and decode a list, slow and obvious; the first of equally near values is smaller."""
    table, out = maps.levels(map), []
    for start in range(0, len(values), block):
        part = values[start : start + block]
        scale = max(abs(v) for v in part)
        for v in part:
            near = min(table, key=lambda level: abs(level - v / scale)) if scale else 0.0
            out.append(near * scale)
    return out
