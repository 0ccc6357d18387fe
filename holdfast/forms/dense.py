"""Dense: plain numbers, the form of tensors that stay as they are.

Keeps    every element; bit by bit (-0.0, inf and NaN payloads too) unless `dtype` narrows it.
Form     the tensor itself.
Bytes    numel * itemsize.
Source   none.
Departs  nothing.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.forms.base import Buffers, Form, Layout


@dataclass(frozen=True)
class Dense(Form):
    """Args: dtype: what is stored; None: the tensor's own, lossless."""

    dtype: torch.dtype | None = None

    def layout(self, shape: torch.Size, dtype: torch.dtype) -> Layout:
        return {"values": (tuple(shape), self.dtype or dtype)}

    def grain(self, shape: torch.Size) -> int:
        return 1

    def _check_values(self, flat: Tensor) -> None:
        """Every value is welcome."""

    def _write(
        self,
        flat: Tensor,
        start: int,
        buffers: Buffers,
        shape: torch.Size,
        generator: torch.Generator | None,
    ) -> None:
        buffers["values"].view(-1)[start : start + flat.numel()].copy_(flat)

    def _read(self, buffers: Buffers, start: int, stop: int, shape: torch.Size) -> Tensor:
        return buffers["values"].reshape(-1)[start:stop]

    def _take(self, buffers: Buffers, rows: Tensor, shape: torch.Size) -> Tensor:
        return buffers["values"][rows]
