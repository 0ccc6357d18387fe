"""Policies that everybody knows, beside which the published ones are measured.

`full` keeps everything and refuses what does not fit; `sinks_recent` is StreamingLLM (Xiao, Tian,
Chen, Han, Lewis, "Efficient Streaming Language Models with Attention Sinks", ICLR 2024) with
positions inside the cache; `window` keeps the last tokens; `random` any.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from holdfast.context.cache.policy import SELECT_BYTES, CachePolicy, CacheShape, sinks_and_recent
from holdfast.errors import DoesNotFit, UsageError

if TYPE_CHECKING:
    from holdfast.context.cache.layer import BoundedLayer, New


class Full(CachePolicy):
    """Keep every entry; more than fit are an error, never a silent loss."""

    rotates = False
    drops = False

    def stay(self, capacity: int, incoming: int) -> int:
        raise DoesNotFit(
            f"the cache is full: {capacity} entries, {incoming} more arrived; raise the budget, "
            "or choose a policy that drops entries, such as sinks_recent"
        )

    def scratch(self, shape: CacheShape, capacity: int) -> int:
        return 0


class SinksRecent(CachePolicy):
    """Keep the first `sinks` entries and the most recent others.

    Args:
        sinks: leading entries that always stay.
    """

    def __init__(self, *, sinks: int = 4):
        if sinks < 0:
            raise UsageError(f"sinks={sinks} is negative; use 0 for a plain window")
        self.sinks = sinks

    def least(self, chunk: int) -> int:
        return self.sinks + chunk + 1

    def select(self, layer: "BoundedLayer", keep: int) -> Tensor:
        return sinks_and_recent(layer, self.sinks, keep)

    def scratch(self, shape: CacheShape, capacity: int) -> int:
        return shape.batch * capacity * SELECT_BYTES


class Window(SinksRecent):
    """Keep the most recent entries."""

    def __init__(self) -> None:
        super().__init__(sinks=0)


class Random(CachePolicy):
    """Keep random entries beside the first `sinks`; every entry ever read is as likely to stay.

    Args:
        seed: of the choice, which depends on the position of a token alone.
    """

    fields = {"luck": False}

    def __init__(self, *, sinks: int = 4, seed: int = 0):
        self.sinks, self.seed = sinks, seed

    def least(self, chunk: int) -> int:
        return self.sinks + chunk + 1

    def attended(
        self, layer: "BoundedLayer", q: Tensor, lse: Tensor, new: "New", scaling: float
    ) -> None:
        # The same positions are lucky whatever the chunks, so a number is drawn per position.
        rows = []
        for read in layer.read:
            before = read - new.count
            positions = torch.arange(before, read, device=q.device)
            rows.append(_luck(positions, self.seed))
        layer.put("luck", new, torch.stack(rows))

    def score(self, layer: "BoundedLayer") -> Tensor:
        scores = layer.field("luck").clone()
        scores[:, :, : self.sinks] = torch.inf
        return scores


def _luck(positions: Tensor, seed: int) -> Tensor:
    """A number in [0, 1) per position: a hash, alike on every device."""
    x = positions * 0x9E3779B1 + seed * 0x85EBCA77
    x = ((x ^ (x >> 15)) * 0x2C1B3C6D) & 0xFFFFFFFF
    x = ((x ^ (x >> 12)) * 0x297A2D39) & 0xFFFFFFFF
    return ((x ^ (x >> 15)) & 0xFFFFFF).float() / 2**24
