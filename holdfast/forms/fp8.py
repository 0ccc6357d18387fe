"""Fp8: 8-bit floating point under a scale per tensor, row or block.

Keeps    every element, as absmax * (q / largest), where largest is 448 (e4m3) or 57344 (e5m2).
Form     torch's float8 dtypes in the tensor's shape, fp32 absmax; conversions saturate.
Bytes    numel + 4 * (1 | rows | ceil(numel/block)).
Source   Micikevicius et al., FP8 Formats for Deep Learning, 2022.
Departs  stores the absolute maximum instead of the step, so that it is decoded exactly.
"""

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
    tiles,
)
from holdfast.forms.blockwise import block_absmax, spread

_DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@dataclass(frozen=True)
class Fp8(Form):
    """Relative error at most 2^-4 (e4m3) or 2^-3 (e5m2) of an element, down to about absmax *
    2^-15 (e4m3) or absmax * 2^-30 (e5m2), below which numbers thin out to 0.

    Args:
        kind: "e4m3" (more precision) or "e5m2" (more range).
        scale: what shares an absolute maximum: "tensor", "row" (last dimension) or "block".
        block: elements of the flattened tensor per scale, where scale="block".
    """

    kind: Literal["e4m3", "e5m2"] = "e4m3"
    scale: Literal["tensor", "row", "block"] = "tensor"
    block: int = 128

    def __post_init__(self):
        for name, known in (("kind", tuple(_DTYPES)), ("scale", ("tensor", "row", "block"))):
            if getattr(self, name) not in known:
                raise UsageError(f"{name}={getattr(self, name)!r}; expected one of {known}")
        if self.block < 1:
            raise UsageError(f"block={self.block}; expected a positive number of elements")

    @property
    def _largest(self) -> float:
        return torch.finfo(_DTYPES[self.kind]).max

    def layout(self, shape: torch.Size, dtype: torch.dtype) -> Layout:
        require_float(self, dtype)
        count = {
            "tensor": 1,
            "row": rows_of(shape),
            "block": -(-shape.numel() // self.block),
        }[self.scale]
        return {
            "codes": (tuple(shape), _DTYPES[self.kind]),
            "scale": ((count,), torch.float32),
        }

    def grain(self, shape: torch.Size) -> int:
        return {"tensor": 1, "row": max(1, columns_of(shape)), "block": self.block}[self.scale]

    def _prepare(self, tensor: Tensor, buffers: Buffers) -> None:
        if self.scale != "tensor":
            return
        flat = tensor.reshape(-1)
        top = buffers["scale"].zero_()
        for start, stop in tiles(flat, 1):
            torch.maximum(top, flat[start:stop].abs().amax().float(), out=top)

    def _write(
        self,
        flat: Tensor,
        start: int,
        buffers: Buffers,
        shape: torch.Size,
        generator: torch.Generator | None,
    ) -> None:
        x = flat.float()
        if self.scale != "tensor":
            grain = self.grain(shape)
            first, top = start // grain, block_absmax(x, grain)
            buffers["scale"][first : first + top.numel()] = top
        factor = self._spread(reciprocal(buffers["scale"]), start, start + x.numel(), shape)
        # Without the clamp a rounding above the largest number would become NaN.
        x = (x * factor).mul_(self._largest).clamp_(-self._largest, self._largest)
        buffers["codes"].view(-1)[start : start + x.numel()].copy_(x)

    def _read(self, buffers: Buffers, start: int, stop: int, shape: torch.Size) -> Tensor:
        q = buffers["codes"].view(-1)[start:stop].float()
        return q.mul_(1 / self._largest).mul_(self._spread(buffers["scale"], start, stop, shape))

    def _take(self, buffers: Buffers, rows: Tensor, shape: torch.Size) -> Tensor:
        scale = buffers["scale"]
        if self.scale == "row":
            scale = scale[rows][:, None]
        elif self.scale == "block":
            columns = columns_of(shape)
            at = rows[:, None] * columns + torch.arange(columns, device=rows.device)
            scale = scale[at // self.block]
        codes = buffers["codes"].view(torch.uint8)[rows].view(_DTYPES[self.kind])
        return codes.float().mul_(1 / self._largest).mul_(scale)

    def _spread(self, scale: Tensor, start: int, stop: int, shape: torch.Size) -> Tensor:
        if self.scale == "tensor":
            return scale
        grain = self.grain(shape)
        return spread(scale[start // grain : -(-stop // grain)], grain, stop - start)
