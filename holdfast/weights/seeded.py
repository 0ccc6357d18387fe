"""Random weights that are kept as a seed and made anew whenever they are used.

A counter-based generator hashes (seed, stream, position), so that any part of a weight can be made
alone. All arithmetic is exact in integers up to one rounding, so that CPUs and GPUs make the same
bits, whatever the tiling.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.errors import UsageError

# Words hashed per number: twelve 16-bit parts, whose sum has a variance of 2^32 - 1.
WORDS = 3
CHUNK = 2**15
_GOLDEN = 0x9E3779B97F4A7C15


_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_MASK = 2**64 - 1


def _signed(value: int) -> int:
    """The int64 with the low 64 bits of `value`."""
    value &= _MASK
    return value - 2**64 if value >> 63 else value


def _shifted(x: Tensor, by: int) -> Tensor:
    """Logical shift to the right; torch's own keeps the sign."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def hashed(seed: int, positions: Tensor, stream: int = 0) -> Tensor:
    """64 random bits for each position: int64 -> int64, SplitMix64 started at a place of its own.

    `stream` makes independent bits of one seed.
    """
    start = mixed_ref(seed + _GOLDEN * (2 * stream + 1))
    x = (positions + 1) * _signed(_GOLDEN) + _signed(start)
    for by, factor in _MIX:
        x = (x ^ _shifted(x, by)) * _signed(factor)
    return x ^ _shifted(x, 31)


def mixed_ref(x: int) -> int:
    """SplitMix64's scrambling of one unsigned number."""
    x &= _MASK
    for by, factor in _MIX:
        x = ((x ^ (x >> by)) * factor) & _MASK
    return x ^ (x >> 31)


def normal(
    seed: int, start: int, stop: int, stream: int = 0, device: torch.device | str = "cpu"
) -> Tensor:
    """Numbers `start` to `stop` of an endless row of nearly normal ones, fp32.

    Mean 0 and variance 1; a sum of twelve uniform numbers, which never leaves (-6, 6).
    """
    found = torch.empty(stop - start, device=device)
    # In chunks, because a number takes some 100 bytes of integers while it is made.
    for at in range(start, stop, CHUNK):
        part = found[at - start : at - start + CHUNK]
        positions = torch.arange(at * WORDS, (at + len(part)) * WORDS, device=device)
        words = hashed(seed, positions, stream)
        total = sum((_shifted(words, 16 * i) & 0xFFFF for i in range(4)), torch.zeros_like(words))
        part.copy_(total.view(-1, WORDS).sum(1) - WORDS * 4 * 65535 // 2)
    return found.div_(65536)


class SeededLinear(nn.Module):
    """A linear map without bias whose weight (out, in) is random and never kept.

    Neither the module nor autograd holds the weight: it is made in tiles of rows in the forward and
    again in the backward pass. The module's state is its seed, 8 bytes.

    Args:
        scale: standard deviation of the weights; None is 1/sqrt(in_features).
        tile: rows that exist at once.
        dtype: of the weight; None is torch's default.

    Raises:
        UsageError: a size or a tile below 1.
    """

    seed: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        seed: int,
        *,
        scale: float | None = None,
        tile: int = 256,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if min(in_features, out_features, tile) < 1:
            raise UsageError(
                f"a weight of {out_features} x {in_features} in tiles of {tile} rows is empty; "
                "use 1 or more of each"
            )
        self.in_features, self.out_features, self.tile = in_features, out_features, tile
        self.scale = 1 / math.sqrt(in_features) if scale is None else scale
        self.dtype = dtype or torch.get_default_dtype()
        # Kept on the host: hashing starts from it as a number.
        self.register_buffer("seed", torch.tensor(_signed(seed)))
        self.device = torch.device(device or "cpu")

    def rows(self, start: int, stop: int, device: torch.device) -> Tensor:
        """Rows `start` to `stop` of the weight."""
        n = self.in_features
        numbers = normal(int(self.seed), start * n, stop * n, device=device)
        return numbers.mul_(self.scale).to(self.dtype).view(-1, n)

    def weight(self, device: torch.device | str = "cpu") -> Tensor:
        """All of it, (out, in)."""
        return self.rows(0, self.out_features, torch.device(device))

    def tiles(self, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, self.out_features, self.tile):
            stop = min(start + self.tile, self.out_features)
            yield slice(start, stop), self.rows(start, stop, device)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out), in the dtype of x."""
        return _Product.apply(x, self)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, seed={int(self.seed)}"


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: SeededLinear) -> Tensor:
        ctx.linear = linear
        y = x.new_empty(*x.shape[:-1], linear.out_features)
        for rows, weight in linear.tiles(x.device):
            y[..., rows] = F.linear(x, weight.to(x.dtype))
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        total = grad.new_zeros(*grad.shape[:-1], ctx.linear.in_features)
        for rows, weight in ctx.linear.tiles(grad.device):
            total += grad[..., rows] @ weight.to(grad.dtype)
        return total, None
