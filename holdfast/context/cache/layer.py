"""Slots of one layer, and a policy that decides what stays in them."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.masking_utils import causal_mask_function

from holdfast.context import kernels
from holdfast.context.cache.deferred import DeferredLayer
from holdfast.context.cache.slots import Slots
from holdfast.context.interface import Visible
from holdfast.context.kernels import Spec
from holdfast.context.masks import Causal, MaskMod
from holdfast.context.rope import Rope
from holdfast.errors import UsageError

if TYPE_CHECKING:
    from holdfast.context.cache.bounded import BoundedCache

# Keys that are rotated and decoded at a time, and chunks of attention.
KEYS = 2048
CHUNK = 512


@dataclass(frozen=True)
class New:
    """Entries that were just appended.

    Attributes:
        count: tokens, padding included.
        start: slot of the first, if all rows have as many entries and no padding; else None.
        last: entries per row, after them.
    """

    count: int
    start: int | None
    last: list[int]
    device: torch.device
    uneven: Tensor | None = None

    @property
    def slots(self) -> Tensor:
        """(B|1,n) int64 where each went; -1 for padding."""
        if self.start is None:
            assert self.uneven is not None
            return self.uneven
        return torch.arange(self.start, self.start + self.count, device=self.device)[None]

    def part(self, at: slice) -> "New":
        """A range of them."""
        start, stop, _ = at.indices(self.count)
        return New(
            stop - start,
            None if self.start is None else self.start + start,
            self.last,
            self.device,
            None if self.uneven is None else self.uneven[:, at],
        )


class BoundedLayer(DeferredLayer):
    """Slots of one layer, and a policy that decides what stays in them.

    Attributes:
        counts: entries per row; `length` is the largest.
        read: tokens per row that were ever appended, padding not counted.
    """

    def __init__(self, cache: "BoundedCache", rope: Rope | None):
        super().__init__()
        self.cache, self.policy, self._rope = cache, cache.policy, rope
        self.slots: Slots | None = None
        self.counts: list[int] = []
        self.read: list[int] = []
        self.window: int | None = None
        self._last: New | None = None

    @property
    def length(self) -> int:
        return max(self.counts, default=0)

    @property
    def heads(self) -> int:
        return self.cache.shape.heads

    @property
    def device(self) -> torch.device:
        """Where numbers are needed, whatever the place of the slots."""
        assert self.slots is not None
        return self.slots.device

    def attend(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, visible: Visible, *,
        positions: Tensor, scaling: float, window: int | None,
    ) -> Tensor:  # fmt: skip
        if visible.given is not None:
            raise UsageError(
                "a 4-D attention mask names slots that this cache may have dropped; "
                "pass a mask (B,m) of real tokens, or use DynamicCache"
            )
        self._allocate(q, k, v)
        self.window = None if visible.sees is causal_mask_function else window
        q, k, v = q.detach(), k.detach(), v.detach()
        if self._rope is not None:
            back = self.cache.back(self._rope, positions)
            q, k = self._rope.turn(q, back), self._rope.turn(k, back)
        out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])
        for start in range(0, q.shape[2], self.cache.chunk):
            at = slice(start, start + self.cache.chunk)
            valid = None if visible.valid is None else visible.valid[:, at]
            new = self.append(k[:, :, at], v[:, :, at], valid)
            out[:, at] = self.policy.attend(self, q[:, :, at], new, scaling).transpose(1, 2)
            self._last = new if self.policy.observes else None
        self.seen += q.shape[2]
        return out

    def append(self, k: Tensor, v: Tensor, valid: Tensor | None = None) -> New:
        """Make room for k, v (B,H,n,d) and put them behind what is kept; valid (B,n) bool."""
        assert self.slots is not None
        rows, n = k.shape[0], k.shape[2]
        if valid is not None and bool(valid.all()):
            valid = None
        more = [n] * rows if valid is None else valid.sum(1).tolist()
        self._make_room(more)
        first = self.counts
        self.counts = [a + b for a, b in zip(first, more, strict=True)]
        start = first[0] if valid is None and len(set(first)) == 1 else None
        device = k.device
        slots = None
        if start is not None:
            self.slots.write("keys", start, k)
            self.slots.write("values", start, v)
        else:
            real = torch.ones(rows, n, dtype=torch.bool, device=device) if valid is None else valid
            slots = real.cumsum(1) - 1 + torch.tensor(first, device=device)[:, None]
            slots = slots.masked_fill(~real, -1)
            row, col = real.nonzero(as_tuple=True)
            for name, x in (("keys", k), ("values", v)):
                self.slots.write_at(name, row, col, slots[row, col], x)
        new = New(n, start, list(self.counts), device, slots)
        if self.policy.keeps_index:
            shift = [a - b for a, b in zip(self.read, first, strict=True)]
            self.put("index", new, new.slots + torch.tensor(shift, device=device)[:, None])
        self.read = [a + b for a, b in zip(self.read, more, strict=True)]
        for name in self.policy.fields:
            self.put(name, new, k.new_zeros(rows, n, dtype=torch.float32))
        return new

    def put(self, name: str, new: New, x: Tensor) -> None:
        """Set a field of entries just appended: x (B,n), or (B,H,n) where heads differ."""
        assert self.slots is not None
        x = x[:, None] if x.dim() == 2 else x
        x = x.expand(self.slots.batch, self.slots.tensors[name].shape[1], -1)[..., None]
        if new.start is not None:
            self.slots.write(name, new.start, x)
            return
        row, col = (new.slots >= 0).nonzero(as_tuple=True)
        self.slots.write_at(name, row, col, new.slots[row, col], x)

    def field(self, name: str) -> Tensor:
        """A field of all entries, as a view (B,H|1,m)."""
        assert self.slots is not None
        return self.slots.tensors[name][:, :, : self.length, 0]

    def filled(self) -> Tensor | None:
        """(B,1,m) bool, True where a row has an entry; None if all rows are as long."""
        if len(set(self.counts)) <= 1:
            return None
        device = self.slots.device if self.slots else None
        counts = torch.tensor(self.counts, device=device)
        return (torch.arange(self.length, device=device) < counts[:, None])[:, None]

    def ranges(self, width: int = KEYS) -> Iterator[slice]:
        """All slots in use, so many at a time."""
        for start in range(0, self.length, width):
            yield slice(start, min(start + width, self.length))

    def stored_keys(self, at: slice) -> Tensor:
        """(B,H,n,d) as stored: un-rotated if the policy rotates."""
        assert self.slots is not None
        return self.slots.read("keys", at)

    def rotated_keys(self, at: slice) -> Tensor:
        """(B,H,n,d) as queries look at them: rotated to their slots if the policy rotates."""
        k = self.stored_keys(at)
        return k if self._rope is None else self.turn(k, self.cache.table(self._rope)[:, at])

    def just_stored(self, new: New) -> tuple[Tensor, Tensor]:
        """Keys and values (B,H,n,d) of entries just appended, as stored; of padding any."""
        if new.start is not None:
            at = slice(new.start, new.start + new.count)
            return self.stored_keys(at), self.stored_values(at)
        assert self.slots is not None
        index = new.slots.clamp(min=0)[:, None].expand(-1, self.heads, -1)
        return self.slots.take("keys", index), self.slots.take("values", index)

    def stored_values(self, at: slice) -> Tensor:
        assert self.slots is not None
        return self.slots.read("values", at)

    def at_slots(self, q: Tensor, new: New) -> Tensor:
        """q (B,Hq,n,d) rotated to the slots of its own entries, if the policy rotates."""
        if self._rope is None:
            return q
        table = self.cache.table(self._rope)
        if new.start is not None:
            return self.turn(q, table[:, new.start : new.start + q.shape[2]])
        return self.turn(q, table[:, new.slots.clamp(min=0)][:, :, None])

    def turn(self, x: Tensor, table: Tensor) -> Tensor:
        assert self._rope is not None
        return self._rope.turn(x, table)

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """x (B,H,n,d), un-rotated, at any positions (B|1,H|1,n)."""
        assert self._rope is not None
        return self._rope.rotate(x, positions)

    def mask(self, new: New, at: slice) -> MaskMod | None:
        """Which of a range of slots the new entries see."""
        window, first = self.window, at.start
        if new.start is not None:
            start = new.start
            if window is None:
                return None if at.stop <= start + 1 else Causal(start - first)
            return lambda b, h, i, j: (j + first <= i + start) & (j + first > i + start - window)
        slots = new.slots
        if window is None:
            return lambda b, h, i, j: j + first <= slots[b, i]
        return lambda b, h, i, j: (j + first <= slots[b, i]) & (j + first > slots[b, i] - window)

    def look(
        self,
        q: Tensor,
        new: New,
        scaling: float,
        *,
        keys: Callable[[slice], Tensor] | None = None,
        mask: Callable[[New, slice], MaskMod | Tensor | None] | None = None,
        ranges: Iterable[slice] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Exact attention of q over the slots: (B,Hq,n,dv) in q's dtype and lse (B,Hq,n) fp32.

        Args:
            q: (B,Hq,n,d) as it looks.
            keys: range of slots -> (B,H,n,d) as looked at; by default rotated to their slots.
            mask: what new entries see of a range of slots, by default all up to themselves.
            ranges: of slots, disjoint, where anything is seen; by default all.
        """
        keys, mask = keys or self.rotated_keys, mask or self.mask
        todo = list(self.ranges() if ranges is None else ranges)
        sums = None
        for at in todo:
            spec = Spec(mask=mask(new, at), scale=scaling, q_chunk=CHUNK, k_chunk=CHUNK)
            out, lse = kernels.forward(q, keys(at), self.stored_values(at), spec)
            if len(todo) == 1:
                return out, lse
            if sums is None:
                sums = kernels.empty_sums(q, out)
            kernels.merge_(*sums, out, lse)
        if sums is None:
            sums = kernels.empty_sums(q, self.stored_values(slice(0, 0)))
        return sums[0].to(q.dtype), sums[1]

    def keep(self, source: Tensor, counts: list[int]) -> None:
        """Slot t becomes slot source[..., t], (B,H|1,K) ascending; rows then have `counts`."""
        assert self.slots is not None
        self.slots.move(source)
        self.counts = list(counts)

    def drop_last(self, tokens: int, entries: list[int]) -> None:
        """Forget the last tokens, for example a question that was only asked.

        Args:
            tokens: how many, padding included.
            entries: how many each row has of them.
        """
        self.counts = [have - last for have, last in zip(self.counts, entries, strict=True)]
        self.read = [have - last for have, last in zip(self.read, entries, strict=True)]
        self.seen -= tokens

    def observe(self, nats: Tensor) -> None:
        if self._last is not None and nats.shape[1]:
            self.policy.observe(self, nats[:, -self._last.count :], self._last)

    def compress(self, keep: int) -> None:
        """Keep the best `keep` entries of every row that has more."""
        if self.length > keep:
            self._evict([count > keep for count in self.counts], keep)

    def _make_room(self, more: list[int]) -> None:
        capacity = self.cache.capacity
        over = [have + add > capacity for have, add in zip(self.counts, more, strict=True)]
        if any(over):
            keep = self.policy.stay(capacity, max(more))
            if not 0 <= keep <= capacity - max(more):
                raise UsageError(
                    f"{self.policy!r} keeps {keep} of {capacity} entries where {max(more)} more "
                    f"arrive; it may keep 0 to {capacity - max(more)}"
                )
            self._evict(over, keep)

    def _evict(self, over: list[bool], keep: int) -> None:
        """Rows that are `over` keep their best `keep` entries, the others all."""
        assert self.slots is not None
        source = self.policy.select(self, keep)
        self.policy.absorb(self, over, keep)
        counts = [
            min(count, keep) if full else count
            for count, full in zip(self.counts, over, strict=True)
        ]
        if not all(over) and max(counts):
            # Rows that have room stay as they are, whatever the policy chose for them.
            same = torch.arange(max(counts), device=source.device).expand(*source.shape[:2], -1)
            grown = same.clone()
            grown[:, :, :keep] = source[:, :, : grown.shape[2]]
            full = torch.tensor(over, device=source.device)[:, None, None]
            source = torch.where(full, grown, same)
        self.keep(source, counts)

    def _allocate(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        if self.slots is not None:
            if self.slots.batch != k.shape[0]:
                raise UsageError(
                    f"this cache holds {self.slots.batch} rows and got {k.shape[0]}; "
                    "make a new cache for another batch"
                )
            return
        shape = self.cache.settle(k.shape[0], k.dtype)
        found = (k.shape[1], q.shape[1], k.shape[3], v.shape[3])
        if found != (shape.heads, shape.query_heads, shape.key_width, shape.value_width):
            raise UsageError(
                f"layers of this model have {found[0]} key heads of {found[2]} and {found[3]}, its "
                f"config says {shape.heads} of {shape.key_width}; its cache cannot be bounded"
            )
        self.slots = Slots(k.shape[0], self.cache.capacity, k.device, self.cache.place)
        self.slots.add("keys", shape.heads, shape.key_width, k.dtype, shape.form)
        self.slots.add("values", shape.heads, shape.value_width, k.dtype, shape.form)
        if self.policy.keeps_index:
            heads = shape.heads if self.policy.per_head else 1
            self.slots.add("index", heads, 1, torch.int64)
        for name, per_head in self.policy.fields.items():
            heads = shape.heads if per_head or self.policy.per_head else 1
            self.slots.add(name, heads, 1, torch.float32)
        self.counts, self.read = [0] * k.shape[0], [0] * k.shape[0]
        self.is_initialized = True

    def nbytes(self) -> int:
        return 0 if self.slots is None else self.slots.nbytes

    def reset(self) -> None:
        self.counts, self.read = [0] * len(self.counts), [0] * len(self.read)
        self.seen, self._last, self._waiting = 0, None, None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.slots is not None:
            self.slots.reorder(beam_idx)
            self._rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.slots is not None:
            self.slots.select(torch.arange(self.slots.batch)[indices.cpu()])
            self._rows(torch.arange(len(self.counts))[indices.cpu()])

    def _rows(self, rows: Tensor) -> None:
        chosen = rows.tolist()
        self.counts = [self.counts[i] for i in chosen]
        self.read = [self.read[i] for i in chosen]
        self._last = None

    def offload(self) -> None:
        if self.slots is not None:
            self.slots.tensors = {n: t.to("cpu") for n, t in self.slots.tensors.items()}

    def prefetch(self) -> None:
        if self.slots is not None and self.slots.place == "device":
            to = self.slots.device
            self.slots.tensors = {n: t.to(to) for n, t in self.slots.tensors.items()}
