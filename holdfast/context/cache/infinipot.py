"""InfiniPot (033): fill a pot of fixed size, distil it by what is novel and what matters, go on.

Keeps    at most M entries per layer and key head; of a full pot keep*M: a part `alpha` of them the
         most novel, the others those to which a catalyst, such as a request for a summary or the
         user's question, attends most.
Form     keys un-rotated, in any form, at 0, 1, 2, ... of those that stay; per entry and key head
         two fp32 numbers, its novelty and the attention it got.
Bytes    2*L*B*H*M*d*b + 8*L*B*H*M; beside that, in one layer at a time, 64*B*H*M to choose or
         what `attention_mass` takes.
Source   Kim, Shim, Choi, Chang, "InfiniPot: Infinite Context Processing on Memory-Constrained
         LLMs", EMNLP 2024. The share that is kept and the catalyst's length are ours.
Departs  novelty is kept per head: once heads differ they hold different tokens, and each chooses by
         the novelty of its own. A text's first token gets the largest novelty of its chunk. Where
         no catalyst can be read (`generate()`) entries that none has seen outlast the others,
         beside 4 sinks; of tokens whose novelty is unknown the recent ones count as novel.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from holdfast.context.cache.policy import (
    SELECT_BYTES,
    CachePolicy,
    CacheShape,
    attention_mass,
    mass_scratch,
    surprise,
    top_slots,
    unasked_last,
)
from holdfast.errors import UsageError

if TYPE_CHECKING:
    from holdfast.context.cache.layer import BoundedLayer, New


class InfiniPot(CachePolicy):
    """Distil a full pot by novelty and by what a catalyst attends to.

    Args:
        keep: part of the pot that stays when it is distilled.
        alpha: part of that which is chosen by novelty.
        catalyst: ids (S,) that are read when the pot is full, and forgotten again; `prefill_chunks`
            takes another one as its suffix.
    """

    fields = {"novelty": True, "attention": True}
    per_head = True
    observes = True

    def __init__(
        self,
        *,
        keep: float = 0.5,
        alpha: float = 0.5,
        catalyst: Sequence[int] | Tensor | None = None,
    ):
        if not 0 < keep < 1:
            raise UsageError(f"keep={keep} is outside (0, 1)")
        if not 0 <= alpha <= 1:
            raise UsageError(f"alpha={alpha} is outside [0, 1]")
        self.keep, self.alpha = keep, alpha
        self.catalyst = None if catalyst is None else torch.as_tensor(catalyst)
        if self.catalyst is not None and (self.catalyst.dim() != 1 or not len(self.catalyst)):
            raise UsageError(
                f"catalyst of shape {tuple(self.catalyst.shape)}; expected (S,), S > 0"
            )

    def check(self, capacity: int, chunk: int) -> None:
        kept = int(self.keep * capacity)
        asked = 0 if self.catalyst is None else len(self.catalyst)
        if asked > chunk:
            raise UsageError(
                f"a catalyst of {asked} tokens is longer than a chunk of {chunk}; give a shorter "
                "one, a larger chunk or a larger budget"
            )
        if kept < 1 or kept + asked + chunk > capacity:
            raise UsageError(
                f"a pot of {capacity} entries does not hold the {kept} that stay, a catalyst of "
                f"{asked} and chunks of {chunk}; use {self.least(chunk)} or more, a smaller chunk, "
                "or lower keep"
            )

    def least(self, chunk: int) -> int:
        asked = 0 if self.catalyst is None else len(self.catalyst)
        # The smallest M of which at most M - asked - chunk stay, and at least one.
        least = math.floor((asked + chunk - 1) / (1 - self.keep)) + 1
        return max(least, math.ceil(1 / self.keep))

    def stay(self, capacity: int, incoming: int) -> int:
        return min(int(self.keep * capacity), capacity - incoming)

    def observe(self, layer: "BoundedLayer", nats: Tensor, new: "New") -> None:
        layer.put("novelty", new, surprise(nats, new))

    def attended(
        self, layer: "BoundedLayer", q: Tensor, lse: Tensor, new: "New", scaling: float
    ) -> None:
        if layer.cache.asking:
            mass = attention_mass(layer, q, lse, new, scaling)
            # 0 says that no catalyst was read.
            layer.field("attention").copy_(mass.clamp_(min=torch.finfo(mass.dtype).tiny))

    def select(self, layer: "BoundedLayer", keep: int) -> Tensor:
        filled = layer.filled()
        novelty = layer.field("novelty").to(layer.device)
        novel = top_slots(novelty, round(self.alpha * keep), filled, recent=True)
        scores = unasked_last(layer.field("attention").to(layer.device), filled)
        scores.scatter_(2, novel, torch.inf)
        return top_slots(scores, keep, filled, recent=True)

    def scratch(self, shape: CacheShape, capacity: int) -> int:
        choose = shape.batch * shape.heads * capacity * (SELECT_BYTES + 20)
        return max(choose, mass_scratch(shape, capacity))


def select_ref(novelty: list[float], attention: list[float], keep: int, alpha: float) -> list[int]:
    """`select` for one head, after a catalyst was read, slow and obvious."""
    by_novelty = sorted(range(len(novelty)), key=lambda i: (-novelty[i], -i))
    novel = by_novelty[: round(alpha * keep)]
    rest = sorted(set(range(len(novelty))) - set(novel), key=lambda i: (-attention[i], -i))
    return sorted(novel + rest[: keep - len(novel)])
