"""LM-Infinite (134): a Λ of first and recent tokens, and a ceiling on distance.

Keeps    the first `n_global` tokens and the last `n_local`.
Form     keys un-rotated; no scores.
Bytes    2*L*B*H*(n_global + n_local + c - 1)*d*b for chunks of c tokens.
Source   Han, Wang, Peng, Xiong, Chen, Ji, Wang, "LM-Infinite: Zero-Shot Extreme Length
         Generalization for Large Language Models", NAACL 2024.
Departs  no re-insertion of middle tokens, which would need all keys; no ALiBi, which models with
         replaceable attention do not use. `n_local` defaults to what the budget holds.
"""

import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from holdfast.context.cache.policy import SELECT_BYTES, CachePolicy, CacheShape, sinks_and_recent
from holdfast.context.kernels import merge_lse
from holdfast.context.masks import MaskMod
from holdfast.errors import UsageError

if TYPE_CHECKING:
    from holdfast.context.cache.bounded import BoundedCache
    from holdfast.context.cache.layer import BoundedLayer, New


class LMInfinite(CachePolicy):
    """A token sees those closer than `n_local` where they are, and the first ones no farther away.

    Args:
        n_global: leading tokens that are always seen.
        n_local: window and largest distance, at most the length that the model was trained at; by
            default as large as the cache allows.
    """

    def __init__(self, *, n_global: int = 10, n_local: int | None = None):
        if n_global < 0:
            raise UsageError(f"n_global={n_global} is negative; use 0 for a plain window")
        if n_local is not None and n_local < 1:
            raise UsageError(f"n_local={n_local}: a token sees at least itself; use 1 or more")
        self.n_global, self.n_local = n_global, n_local

    def bind(self, cache: "BoundedCache") -> None:
        trained = getattr(cache.config, "max_position_embeddings", None)
        if self.n_local and trained and self.n_local > trained:
            warnings.warn(
                f"n_local={self.n_local} exceeds the {trained} tokens that the model was trained "
                f"at; distances beyond are new to it, use n_local={trained}",
                stacklevel=2,
            )

    def least(self, chunk: int) -> int:
        return self.n_global + (self.n_local or 1) + chunk - 1

    def ceiling(self, cache: "BoundedCache") -> int:
        """Window and largest distance in a cache."""
        return self.n_local or cache.capacity - self.n_global - cache.chunk + 1

    def stay(self, capacity: int, incoming: int) -> int:
        # The first of the incoming tokens sees n_local - 1 before itself.
        local = capacity - incoming - self.n_global
        return self.n_global + (local if self.n_local is None else min(local, self.n_local - 1))

    def select(self, layer: "BoundedLayer", keep: int) -> Tensor:
        return sinks_and_recent(layer, self.n_global, keep)

    def scratch(self, shape: CacheShape, capacity: int) -> int:
        return shape.batch * capacity * SELECT_BYTES

    def attend(self, layer: "BoundedLayer", q: Tensor, new: "New", scaling: float) -> Tensor:
        far = self.ceiling(layer.cache)
        gone = torch.tensor(
            [read - count for read, count in zip(layer.read, layer.counts, strict=True)],
            device=q.device,
        )
        first = min(self.n_global, layer.length)
        limit = min(far, layer.window or far)
        slots = new.slots

        # A slot is a position but for the first ones, which lie `gone` further away than they seem.
        def near(at: slice) -> Tensor:
            here = torch.arange(at.start, at.stop, device=q.device)
            positions = here - (here < first) * gone[:, None]
            return layer.rotate(layer.stored_keys(at), positions[:, None])

        def distance(b: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return slots[b if len(slots) > 1 else 0, i] - j + (j < first) * gone[b]

        def within(new: "New", at: slice) -> MaskMod:
            return lambda b, h, i, j: (
                (j + at.start <= slots[b if len(slots) > 1 else 0, i])
                & (distance(b, i, j + at.start) < limit)
            )

        def beyond(new: "New", at: slice) -> MaskMod:
            return lambda b, h, i, j: distance(b, i, j + at.start) >= far

        recent = layer.look(layer.at_slots(q, new), new, scaling, keys=near, mask=within)
        # A model with a sliding window sees nothing beyond that either.
        if not first or max(layer.read) <= far or layer.window is not None:
            return recent[0]
        # Keys at 0 and queries at `far`: all as far away as anything ever is.
        there = torch.full((1, 1, 1), far, device=q.device)
        zero = torch.zeros_like(there)
        ceiling = layer.look(
            layer.rotate(q, there), new, scaling, mask=beyond, ranges=[slice(0, first)],
            keys=lambda at: layer.rotate(layer.stored_keys(at), zero),
        )  # fmt: skip
        return merge_lse([recent, ceiling])[0]
