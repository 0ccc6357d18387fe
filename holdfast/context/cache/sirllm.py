"""SirLLM (098): in a fixed cache, keep the tokens that surprised the model.

Keeps    the first `sinks` entries, the last `recent` and the most surprising others, in reading
         order.
Form     keys un-rotated, in any form; one fp32 score per entry and layer, shared by heads.
Bytes    2*L*B*H*m*d*b + 4*L*B*m for m = sinks + recent + surprising entries; beside that, in one
         layer at a time, 44*B*m while entries are chosen.
Source   Yao, Li, Zhao, "SirLLM: Streaming Infinite Retentive LLM", ACL 2024.
Departs  scores are kept once per layer: layers own their slots. Entries are dropped when the next
         chunk does not fit, so a turn may be longer than the cache; with one chunk per turn that
         is the paper's order, because fading all scores alike changes no choice between them. A
         turn's first token gets the maximum of what was read with it, and its own surprisal where
         the logits before it are passed on. Ties, and tokens that nobody scored as in
         `generate()`, which count as expected, leave the most recent.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from holdfast.context.cache.policy import CachePolicy, surprise, top_slots
from holdfast.errors import UsageError

if TYPE_CHECKING:
    from holdfast.context.cache.bounded import BoundedCache
    from holdfast.context.cache.layer import BoundedLayer, New


class SirLLM(CachePolicy):
    """Keep sinks and the entries whose tokens were the least expected.

    `cache.turn()` before every turn of a dialogue lets memory fade.

    Args:
        sinks: leading entries that always stay.
        recent: last entries that always stay.
        decay: factor on stored scores, once per turn; 1.0 never forgets.
    """

    fields = {"surprise": False}
    observes = True

    def __init__(self, *, sinks: int = 4, recent: int = 0, decay: float = 0.7):
        if sinks < 0 or recent < 0:
            raise UsageError(f"sinks={sinks}, recent={recent}: neither can be negative")
        if not 0 < decay <= 1:
            raise UsageError(f"decay={decay} is outside (0, 1]; use 1.0 to never forget")
        self.sinks, self.recent, self.decay = sinks, recent, decay

    def least(self, chunk: int) -> int:
        return self.sinks + self.recent + chunk + 1

    def observe(self, layer: "BoundedLayer", nats: Tensor, new: "New") -> None:
        layer.put("surprise", new, surprise(nats, new))

    def turn(self, cache: "BoundedCache") -> None:
        for layer in cache.bounded:
            if layer.slots is not None:
                layer.field("surprise").mul_(self.decay)

    def select(self, layer: "BoundedLayer", keep: int) -> Tensor:
        scores = layer.field("surprise").to(layer.device, copy=True)
        scores[..., : self.sinks] = torch.inf
        if self.recent:
            slots = torch.arange(layer.length, device=layer.device)
            counts = torch.tensor(layer.counts, device=layer.device).view(-1, 1, 1)
            scores.masked_fill_(slots >= counts - self.recent, torch.inf)
        return top_slots(scores, keep, layer.filled(), recent=True)


def select_ref(scores: list[float], keep: int, sinks: int, recent: int) -> list[int]:
    """`select` for one row, slow and obvious."""
    late = range(len(scores) - recent, len(scores))
    rest = sorted(range(sinks, len(scores) - recent), key=lambda i: (-scores[i], -i))
    return sorted([*range(sinks), *rest[: keep - sinks - recent], *late])
