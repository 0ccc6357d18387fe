"""CAMELoT (174): tokens that leave the window are averaged into slots of like keys.

Keeps    per row and key head M slots, each the mean of like tokens, and the latest tokens, which
         fill the rest of the capacity C, exactly.
Form     keys un-rotated, in any form. Per entry and key head three fp32 numbers: how many tokens a
         slot holds, how many were written since its last, and which slot a recent token recalls.
Bytes    2*L*B*H*C*d*b + 12*L*B*H*C; beside that, in one layer at a time, what `scratch` says to
         write 64 tokens.
Source   He, Karlinsky, Kim, McAuley, Krotov, Feris, "CAMELoT: Towards Large Language Models with
         Training-Free Consolidated Associative Memory", 2024. No code was found.
Departs  the window slides, and a token is written when it leaves it, so that it never recalls
         itself and attention never meets it twice; below the capacity nothing is. Tokens that leave
         together are written in blocks of at most M/2 and 64, whose tokens all look for like slots
         before any is written, and whose new ones replace none that the block recalled; with two
         slots that is one by one. Recalled slots get the position before the window. The paper's
         choice between several recalls of a slot is not described: it counts once.
"""

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.context.cache.policy import SELECT_BYTES, CachePolicy, CacheShape, sinks_and_recent
from holdfast.context.masks import MaskMod
from holdfast.errors import UsageError

if TYPE_CHECKING:
    from holdfast.context.cache.layer import BoundedLayer, New

# Tokens that are written together, at most, and slots that they are compared with at a time.
BLOCK, WIDTH = 64, 256
# Later than any slot.
NEVER = 1 << 40


class Camelot(CachePolicy):
    """Consolidate what leaves the window, and let every token recall the slot most like its key.

    Args:
        slots: of the memory, per row and key head; by default just below half of the
            capacity.
        threshold: cosine above which keys are alike; `math.inf` recalls nothing and keeps the last
            tokens, one per slot.
    """

    fields = {"count": True, "age": True, "recalled": True}
    per_head = True
    resizes = False

    def __init__(self, *, slots: int | None = None, threshold: float = 0.9):
        if slots is not None and slots < 0:
            raise UsageError(f"slots={slots} is negative; use 0 for a plain window")
        if not -1 <= threshold <= 1 and threshold != math.inf:
            raise UsageError(
                f"threshold={threshold} is no cosine; give one in [-1, 1], or inf to recall nothing"
            )
        self.slots, self.threshold = slots, threshold

    def memory(self, capacity: int) -> int:
        """Slots of the memory."""
        return (capacity - 1) // 2 if self.slots is None else self.slots

    def check(self, capacity: int, chunk: int) -> None:
        window = self.stay(capacity, chunk) - self.memory(capacity)
        if window < 1:
            raise UsageError(
                f"{self.memory(capacity)} slots and chunks of {chunk} leave no window in "
                f"{capacity} entries; use fewer slots, a smaller chunk, or {self.least(chunk)}"
            )

    def least(self, chunk: int) -> int:
        capacity = chunk + 1
        while self.stay(capacity, chunk) <= self.memory(capacity):
            capacity += 1
        return capacity

    def select(self, layer: "BoundedLayer", keep: int) -> Tensor:
        kept = sinks_and_recent(layer, self.memory(layer.cache.capacity), keep)
        return kept.expand(-1, layer.heads, -1)

    def absorb(self, layer: "BoundedLayer", over: list[bool], keep: int) -> None:
        memory = self.memory(layer.cache.capacity)
        if not memory:
            return
        spans = [
            (memory if written else 0, count - (keep - memory))
            for written, count in zip(_written(layer), layer.counts, strict=True)
        ]
        if all(over) and len(set(spans)) == 1:
            self._write(layer, slice(None), *spans[0])
            return
        for row, (full, span) in enumerate(zip(over, spans, strict=True)):
            if full:
                self._write(layer, slice(row, row + 1), *span)

    def _write(self, layer: "BoundedLayer", rows: slice, start: int, stop: int) -> None:
        """Entries `start` to `stop`, in reading order, into the memory."""
        slots, memory = layer.slots, self.memory(layer.cache.capacity)
        assert slots is not None
        fields = [slots.tensors[name][rows, :, :memory, 0] for name in ("count", "age")]
        count, age = (x.to(layer.device) for x in fields)
        replaced = torch.zeros_like(count[..., :1], dtype=torch.bool).repeat(1, 1, memory + 1)
        step = max(1, min(BLOCK, memory // 2))
        for first in range(start, stop, step):
            n = min(step, stop - first)
            # Copies: the first tokens of all lie where the memory will be.
            tokens = {
                name: slots.read(name, slice(first, first + n))[rows].clone()
                for name in ("keys", "values")
            }
            cosine, slot = self._nearest(layer, tokens["keys"], count, rows)
            hit = cosine > self.threshold
            same = (slot[..., None] == slot[..., None, :]) & hit[..., None] & hit[..., None, :]
            # A token's place is that of the last that went into its slot.
            order = torch.arange(n, device=layer.device)
            last = torch.where(hit, (same * order).amax(3), order)
            held = torch.where(hit, count.gather(2, slot), 0)
            # New tokens replace what is empty, first slot first, or else the oldest.
            rank = torch.where(count == 0, NEVER - _arange(count), age.long())
            rank.scatter_reduce_(2, slot, torch.where(hit, -1, NEVER), "amin")
            oldest = rank.topk(n).indices
            place = oldest.gather(2, ((~hit).cumsum(2) - 1).clamp(min=0))
            to = torch.where(hit, slot, place)
            # Alone where it is new, with its likes and what the slot holds otherwise.
            group = same.float() + torch.diag_embed((~hit).float())
            total = held + group.sum(3)
            for name, x in tokens.items():
                mean = slots.take(name, to, rows).float().mul_(held[..., None])
                mean.add_(group @ x.float()).div_(total[..., None])
                slots.give(name, to, mean.to(x.dtype), rows)
            age += n
            age.scatter_(2, to, (n - 1 - last).float())
            count.scatter_(2, to, total)
            replaced.scatter_(2, (to + 1).masked_fill(hit, 0), True)
        for field, x in zip(fields, (count, age), strict=True):
            field.copy_(x)
        # What is no longer there is not recalled.
        replaced[..., 0] = False
        recalled = slots.tensors["recalled"][rows, :, memory : layer.length, 0]
        recalled.masked_fill_(replaced.to(recalled.device).gather(2, recalled.long()), 0)

    def _nearest(
        self, layer: "BoundedLayer", k: Tensor, count: Tensor, rows: slice
    ) -> tuple[Tensor, Tensor]:
        """The largest cosine of k (R,H,n,d) with slots that hold anything, and whose it is."""
        k = F.normalize(k.float(), dim=3)
        best, found = k.new_full(k.shape[:3], -math.inf), k.new_zeros(k.shape[:3]).long()
        for start in range(0, count.shape[2], WIDTH):
            at = slice(start, min(start + WIDTH, count.shape[2]))
            means = F.normalize(layer.stored_keys(at)[rows].float(), dim=3)
            cosine = (k @ means.mT).masked_fill_((count[..., None, at] == 0), -math.inf)
            cosine, slot = cosine.max(3)
            found = torch.where(cosine > best, slot + start, found)
            best = torch.maximum(best, cosine)
        return best, found

    def attend(self, layer: "BoundedLayer", q: Tensor, new: "New", scaling: float) -> Tensor:
        memory, written = self.memory(layer.cache.capacity), _written(layer)
        if not memory or not any(written):
            return super().attend(layer, q, new, scaling)
        keys, _ = layer.just_stored(new)
        remembers = torch.tensor(written, device=q.device).view(-1, 1, 1)
        count = layer.field("count")[..., :memory].to(q.device)
        cosine, slot = self._nearest(layer, keys, count, slice(None))
        hit = (cosine > self.threshold) & remembers
        layer.put("recalled", new, torch.where(hit, slot + 1, 0).float())
        # A slot is seen from the first token of the window on that recalls it.
        recalled = layer.field("recalled")[..., memory:].to(q.device).long()
        since = recalled.new_full((*count.shape[:2], memory + 1), NEVER)
        since.scatter_reduce_(2, recalled, memory + _arange(recalled), "amin")
        # Rows that have written nothing have a text's first tokens in these slots.
        since = torch.where(remembers, since[..., 1:], _arange(count))

        def rotated(at: slice) -> Tensor:
            as_token = layer.rotated_keys(at)
            if at.start >= memory:
                return as_token
            assert layer._rope is not None
            table = layer.cache.table(layer._rope)[:, memory - 1 : memory]
            as_slot = layer.turn(layer.stored_keys(at), table)
            return torch.where(remembers[..., None], as_slot, as_token)

        group = q.shape[1] // layer.heads
        slots = new.slots.expand(q.shape[0], -1)

        def mask(new: "New", at: slice) -> MaskMod | None:
            if at.start >= memory:
                return layer.mask(new, at)
            return lambda b, h, i, j: since[b, h // group, j + at.start] <= slots[b, i]

        ranges = [
            slice(start, min(start + WIDTH, stop))
            for begin, stop in ((0, memory), (memory, layer.length))
            for start in range(begin, stop, WIDTH)
        ]
        q = layer.at_slots(q, new)
        return layer.look(q, new, scaling, keys=rotated, mask=mask, ranges=ranges)[0]

    def scratch(self, shape: CacheShape, capacity: int) -> int:
        memory, width = self.memory(capacity), shape.key_width + shape.value_width
        block = max(1, min(BLOCK, memory // 2))
        written = block * (20 * width + 26 * block + 120)
        compared = min(WIDTH, memory) * (8 * shape.key_width + 12 * block)
        heads = written + compared + 48 * memory + 24 * capacity
        return shape.batch * (shape.heads * heads * (memory > 0) + capacity * SELECT_BYTES)


def _written(layer: "BoundedLayer") -> list[bool]:
    """Rows that have a memory: those that have dropped anything."""
    return [read > count for read, count in zip(layer.read, layer.counts, strict=True)]


def _arange(x: Tensor) -> Tensor:
    """0, 1, 2, ... along the last dimension, int64 shaped like x."""
    return torch.arange(x.shape[-1], device=x.device).expand_as(x)


def remember_ref(
    slots: list[dict], tokens: list[tuple[list[float], list[float]]], threshold: float
) -> None:
    """`_write` for one head, slow and obvious: tokens (key, value) into slots, in place.

    A slot is {"k": key, "v": value, "count": tokens in it, "age": tokens since}.
    """
    step = max(1, min(BLOCK, len(slots) // 2))
    for first in range(0, len(tokens), step):
        block = tokens[first : first + step]
        nearest = []
        for key, _ in block:
            cosines = [_cosine(key, s["k"]) if s["count"] else -math.inf for s in slots]
            best = max(range(len(slots)), key=cosines.__getitem__)
            nearest.append(best if cosines[best] > threshold else None)
        for (key, value), at in zip(block, nearest, strict=True):
            if at is None:
                free = [i for i in range(len(slots)) if i not in nearest]
                empty = [i for i in free if not slots[i]["count"]]
                at = empty[0] if empty else max(free, key=lambda i: slots[i]["age"])
                slots[at] = {"k": key, "v": value, "count": 0}
            slot = slots[at]
            count = slot["count"]
            for name, x in (("k", key), ("v", value)):
                pairs = zip(slot[name], x, strict=True)
                slot[name] = [(count * mean + new) / (count + 1) for mean, new in pairs]
            slot["count"] = count + 1
            for other in slots:
                if other["count"]:
                    other["age"] = 0 if other is slot else other["age"] + 1


def _cosine(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))
