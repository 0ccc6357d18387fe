"""Which scores exist: masks, the blocks that they leave, and probabilities that are dropped.

A mask is never held whole unless it was given whole: blocks are listed one by one, with the part of
the mask that lies in them.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
# Odd words with the digits of pi: nothing is special about them.
_PI = (0x243F6A8885A308D3, 0x13198A2E03707345)


@dataclass(frozen=True)
class Causal:
    """Mask: query i sees keys up to i + shift. Unlike other functions it is never evaluated where
    whole blocks are visible or hidden.

    Args:
        shift: position of the first query minus position of the first key.
    """

    shift: int = 0

    def __call__(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return j <= i + self.shift


@dataclass(frozen=True)
class Dropout:
    """Which probabilities are dropped: a hash of seed and place, so that neither chunks nor ranks
    matter and nothing is kept for backward.

    Args:
        rate: share that is dropped; the others are scaled by 1 / (1 - rate).
        seed: of the hash.
        rows, cols: positions of the first query and of the first key.
    """

    rate: float
    seed: int
    rows: int = 0
    cols: int = 0

    def factor(self, shape: Sequence[int], at: tuple[int, int], like: Tensor) -> Tensor:
        """0 or 1 / (1 - rate) for a block (B,Hq,n,m) of the scores that starts at `at`."""
        b, h, n, m = shape
        row, col = (start + own for start, own in zip(at, (self.rows, self.cols), strict=True))
        heads = torch.arange(b * h, device=like.device).view(b, h, 1, 1)
        rows = torch.arange(row, row + n, device=like.device).view(n, 1)
        cols = torch.arange(col, col + m, device=like.device)
        # Both words are well mixed on their own, so that the block costs two 32-bit products.
        x = _mixed(_mixed(heads, self.seed) + rows, self.seed) ^ _mixed(cols, ~self.seed)
        x.mul_(_PI[0] >> 32 | 1)
        x ^= x >> 15
        x.mul_(_PI[1] >> 32 | 1)
        kept = x >= math.floor((self.rate - 0.5) * 2**32)
        return kept.to(like.dtype).mul_(1 / (1 - self.rate))


def _mixed(x: Tensor, seed: int) -> Tensor:
    """Integers -> int32 of which every bit depends on every bit; products wrap."""
    x = x + (seed & 2**62 - 1)
    for _ in range(2):
        for factor in _PI:
            x = (x ^ (x >> 31)) * factor
    return (x >> 32).to(torch.int32)


class Block(NamedTuple):
    """Queries `rows` against keys `cols`; `mask` True where one sees the other, None for all."""

    rows: slice
    cols: slice
    mask: Tensor | None = None
    causal: bool = False

    def covers(self, q: Tensor, k: Tensor) -> bool:
        """Whether it is all there is."""
        return self[:2] == (slice(0, q.shape[2]), slice(0, k.shape[2]))


def blocks(
    mask: Tensor | MaskMod | None, q: Tensor, k: Tensor, chunks: tuple[int, int], *, whole: bool
) -> Iterator[Block]:
    """Blocks that cover all pairs of a query and a key that see each other.

    Args:
        mask: (B|1,Hq|1,n,m) bool, or a function.
        q, k: (B,Hq,n,d) and (B,H,m,d).
        chunks: queries and keys per block.
        whole: blocks of which nothing or just the upper triangle is hidden may have any size.
    """
    n, m = q.shape[2], k.shape[2]
    if not n or not m:
        return
    if whole and mask is None:
        yield Block(slice(0, n), slice(0, m))
        return
    if whole and isinstance(mask, Causal):
        yield from _staircase(mask.shift, n, m)
        return
    for row in range(0, n, chunks[0]):
        for col in range(0, m, chunks[1]):
            rows = slice(row, min(row + chunks[0], n))
            cols = slice(col, min(col + chunks[1], m))
            seen = _seen(mask, rows, cols, q)
            if seen is not False:
                yield Block(rows, cols, seen)


def _staircase(shift: int, n: int, m: int) -> Iterator[Block]:
    """A causal mask as blocks that are full and one that is a square with its diagonal."""
    first, corner = max(0, -shift), min(max(0, shift), m)
    square = min(n - first, m - corner)
    if corner and first < n:
        yield Block(slice(first, n), slice(0, corner))
    if square > 0:
        side = slice(first, first + square), slice(corner, corner + square)
        yield Block(*side, causal=True)
        if first + square < n:
            yield Block(slice(first + square, n), slice(corner, m))


def _seen(
    mask: Tensor | MaskMod | None, rows: slice, cols: slice, q: Tensor
) -> Tensor | Literal[False] | None:
    """The mask of a block; None where everything is seen and False where nothing is."""
    if mask is None:
        return None
    if isinstance(mask, Tensor):
        seen = mask[..., rows, cols]
    else:
        if isinstance(mask, Causal):
            if rows.stop + mask.shift <= cols.start:
                return False
            if rows.start + mask.shift >= cols.stop - 1:
                return None
        b, h = (torch.arange(size, device=q.device) for size in q.shape[:2])
        i, j = (torch.arange(s.start, s.stop, device=q.device) for s in (rows, cols))
        seen = mask(b.view(-1, 1, 1, 1), h.view(-1, 1, 1), i.view(-1, 1), j)
        seen = seen.expand(torch.broadcast_shapes(seen.shape, (1, 1, len(i), len(j))))
        if isinstance(mask, Causal):
            return seen
    if not seen.any():
        return False
    return None if seen.all() else seen


def piece(bias: Tensor, block: Block) -> Tensor:
    """The part of a bias, of size 1 where it broadcasts, that belongs to a block."""
    rows = block.rows if bias.shape[-2] > 1 else slice(None)
    return bias[..., rows, block.cols if bias.shape[-1] > 1 else slice(None)]
