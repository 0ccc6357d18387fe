"""Block patterns: which blocks of keys a block of queries sees, in the forms that kernels want.

A pattern is a function of the number of blocks, the heads and the layer alone: it is the same in
every call, in training and evaluation, on every machine.
"""

import functools
import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from holdfast.context.masks import MaskMod
from holdfast.errors import UsageError


class Panel(NamedTuple):
    """Blocks of queries that see equally many blocks of keys: one gathered matrix product.

    Args:
        rows: (R,) int, blocks of queries.
        keys: (Hq|1,R,c) int, blocks of keys of each; None for every block. A block that stands
            twice counts twice in the softmax.
        hidden: (block,c*block) bool, pairs that do not see each other, or None.
    """

    rows: np.ndarray
    keys: np.ndarray | None = None
    hidden: np.ndarray | None = None


@dataclass(frozen=True)
class BlockPattern:
    """A window of neighbouring blocks, global blocks and random blocks.

    Args:
        block: tokens in a block.
        window: blocks of the window; bidirectional: odd, the block itself and as many on either
            side; causal: the block itself and those before it.
        global_: blocks that all blocks see, and that see all: the first half of them, rounded up,
            at the beginning, the others at the end; causal: all at the beginning.
        random: further blocks that a block sees, fixed for each layer and head by the seed.
        causal: hide keys behind their query.
        seed: of the random blocks.

    Raises:
        UsageError: sizes that mean nothing.
    """

    block: int = 64
    window: int = 3
    global_: int = 2
    random: int = 3
    causal: bool = False
    seed: int = 0

    def __post_init__(self):
        for name, least in (("block", 1), ("window", 1), ("global_", 0), ("random", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"{name}={getattr(self, name)} is out of range; use {least} up")
        if self.window % 2 == 0 and not self.causal:
            raise UsageError(
                f"window={self.window} blocks cannot lie evenly around one; use an odd number"
            )

    @property
    def width(self) -> int:
        """Blocks of keys that a block far from the ends sees."""
        return self.window + self.global_ + self.random

    def is_full(self, blocks: int) -> bool:
        """Whether so few blocks are better attended to in full: there, almost all would be chosen.

        It is the bound of the published code, which keeps another `random` blocks in reserve.
        """
        return blocks <= self.width + self.random

    def panels(
        self, blocks: int, heads: int, layer: int = 0, *, random: np.ndarray | None = None
    ) -> list[Panel]:
        """Lists for gathering; blocks of keys stand in ascending order with the own one last.

        Args:
            random: (heads|1, blocks, r) int, blocks to see instead of those drawn; rows of global
                blocks are not read.

        Raises:
            UsageError: fewer blocks than the pattern needs.
        """
        if random is None:
            return list(_panels(self, blocks, heads, layer))
        return _group(self, blocks, random)

    def table(self, blocks: int, heads: int, layer: int = 0) -> np.ndarray:
        """(heads,blocks,blocks) bool: which blocks of keys each block of queries sees."""
        seen = np.zeros((heads, blocks, blocks), bool)
        for rows, keys, _ in self.panels(blocks, heads, layer):
            if keys is None:
                seen[:, rows] = True
            else:
                at = np.broadcast_to(keys, (heads, *keys.shape[1:]))
                seen[np.arange(heads)[:, None, None], rows[:, None], at] = True
        return seen

    def mask_mod(
        self, n: int, heads: int, layer: int = 0, device: torch.device | str = "cpu"
    ) -> MaskMod:
        """The mask as a function of batch, head, query and key, for flex and our own kernels.

        It holds the table of blocks: H*ceil(n/block)^2 bytes.
        """
        seen = torch.tensor(self.table(-(-n // self.block), heads, layer), device=device)

        def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            found = seen[h, i // self.block, j // self.block]
            return found & (j <= i) if self.causal else found

        return mask

    def block_mask(
        self,
        n: int,
        heads: int,
        layer: int = 0,
        *,
        valid: Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> Any:
        """The mask as flex attention's BlockMask; nothing of n x n is built.

        Args:
            valid: (B,n) bool, False for keys that are padding.
        """
        from torch.nn.attention.flex_attention import BlockMask

        blocks = -(-n // self.block)
        seen = torch.tensor(self.table(blocks, heads, layer), device=device)
        own = torch.eye(blocks, dtype=torch.bool, device=device)
        # Blocks in which something may be hidden; of the others flex never asks the function.
        partial = torch.ones_like(own) if valid is not None else own & self.causal
        if n % self.block:
            partial = partial | (torch.arange(blocks, device=device) == blocks - 1)
        (count, order), (full, full_order) = (
            (
                part.sum(-1, dtype=torch.int32)[None],
                part.int().argsort(dim=-1, descending=True, stable=True).int()[None],
            )
            for part in (seen & partial, seen & ~partial)
        )
        visible = self.mask_mod(n, heads, layer, device)

        def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return visible(b, h, i, j) if valid is None else visible(b, h, i, j) & valid[b, j]

        return BlockMask.from_kv_blocks(
            count, order, full, full_order, BLOCK_SIZE=self.block, mask_mod=mask,
            seq_lengths=(n, n),
        )  # fmt: skip

    def dense(self, n: int, heads: int, layer: int = 0) -> Tensor:
        """The mask as (heads,n,n) bool: the reference."""
        h, i, j = (torch.arange(size) for size in (heads, n, n))
        mask = self.mask_mod(n, heads, layer)
        return mask(h, h.view(-1, 1, 1), i.view(-1, 1), j).expand(heads, n, n)


def sliding_panels(blocks: int, block: int, reach: int) -> list[Panel]:
    """Every token sees those at most `reach` <= `block` away, itself among them."""
    if not 0 <= reach <= block:
        raise UsageError(f"reach={reach} tokens lies outside blocks of {block}; use 0 to {block}")
    found = defaultdict(list)
    for row in range(blocks):
        found[tuple(o for o in (-1, 0, 1) if 0 <= row + o < blocks)].append(row)
    at = np.arange(block)
    panels = []
    for offsets, rows in found.items():
        key = np.concatenate([offset * block + at for offset in offsets])
        keys = np.array(rows, np.int32)[None, :, None] + np.array(offsets, np.int32)
        hidden = abs(at[:, None] - key) > reach
        panels.append(Panel(np.array(rows), keys, hidden if hidden.any() else None))
    return panels


@functools.lru_cache(maxsize=256)
def _panels(pattern: BlockPattern, blocks: int, heads: int, layer: int) -> tuple[Panel, ...]:
    """Cached as numbers, not as tensors: a tensor made in a fake mode would stay fake."""
    least = pattern.window + pattern.global_
    if blocks < least and not pattern.causal:
        raise UsageError(
            f"{blocks} blocks of {pattern.block} tokens hold no pattern of {least} blocks without "
            "repeating some; attend to so few tokens in full"
        )
    if not pattern.random:
        return tuple(_group(pattern, blocks, np.zeros((1, blocks, 0), np.int32)))
    drawn = np.full((heads, blocks, pattern.random), -1, np.int32)
    for row in range(blocks):
        fixed = _fixed(pattern, blocks, row)
        if fixed is None:
            continue
        free = (row + 1 if pattern.causal else blocks) - len(fixed)
        for head in range(heads):
            ranks = _draw(f"{pattern.seed}.{layer}.{head}.{row}", free, pattern.random)
            # The rank among blocks that are not fixed, ascending, is moved past each fixed one.
            for taken in fixed:
                ranks = [rank + (rank >= taken) for rank in ranks]
            drawn[head, row, : len(ranks)] = ranks
    return tuple(_group(pattern, blocks, drawn))


def _fixed(pattern: BlockPattern, blocks: int, row: int) -> list[int] | None:
    """Blocks of the window and global ones, ascending; None for a row that sees all."""
    if pattern.causal:
        first = max(0, row + 1 - pattern.window)
        return sorted({*range(min(pattern.global_, row + 1)), *range(first, row + 1)})
    head, tail = pattern.global_ - pattern.global_ // 2, pattern.global_ // 2
    if row < head or row >= blocks - tail:
        return None
    side = pattern.window // 2
    near = range(max(0, row - side), min(blocks, row + side + 1))
    return sorted({*range(head), *near, *range(blocks - tail, blocks)})


def _group(pattern: BlockPattern, blocks: int, random: np.ndarray) -> list[Panel]:
    """Rows with equally many blocks together; -1 in `random` (Hq|1,blocks,r) is none."""
    groups: dict[int, list[tuple[int, np.ndarray]]] = defaultdict(list)
    everything = []
    for row in range(blocks):
        fixed = _fixed(pattern, blocks, row)
        if fixed is None:
            everything.append(row)
            continue
        more = random[:, row]
        more = np.sort(more[:, more[0] >= 0], 1)
        others = np.array([b for b in fixed if b != row], np.int32)
        parts: Sequence[np.ndarray] = (
            np.broadcast_to(others, (len(more), len(others))),
            more,
            np.full((len(more), 1), row),
        )
        keys = np.concatenate(parts, 1).astype(np.int32)
        groups[keys.shape[1]].append((row, keys))
    panels = [Panel(np.array(everything))] if everything else []
    for count, found in groups.items():
        hidden = None
        if pattern.causal:
            hidden = np.zeros((pattern.block, count * pattern.block), bool)
            hidden[:, -pattern.block :] = ~np.tri(pattern.block, dtype=bool)
        rows, keys_of = zip(*found, strict=True)
        panels.append(Panel(np.array(rows), np.stack(keys_of, 1), hidden))
    return panels


def _draw(key: str, free: int, count: int) -> list[int]:
    """Up to `count` different numbers below `free`: a hash of the key, on every machine the same.

    Floyd's way: each number is drawn once, without rejections.
    """
    chosen: list[int] = []
    numbers = _numbers(key)
    for top in range(max(0, free - count), free):
        number = next(numbers) % (top + 1)
        chosen.append(top if number in chosen else number)
    return sorted(chosen)


def _numbers(key: str) -> Iterator[int]:
    counter = 0
    while True:
        digest = hashlib.blake2b(f"{key}.{counter}".encode(), digest_size=64).digest()
        for start in range(0, 64, 8):
            yield int.from_bytes(digest[start : start + 8], "little")
        counter += 1
