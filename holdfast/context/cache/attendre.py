"""Attendre (120): a bounded memory that drops what nobody attends to, and queries that wait.

Keeps    per layer at most m_kv keys and values per head, those that were attended to most recently
         (lra), most often (lfa), or that are the latest (fifo); in encoders also the last m_q
         queries and the residual rows that go with them.
Form     encoders: all as given; one fp32 number per slot. Decoders: keys un-rotated, in any form,
         at 0, 1, 2, ... of those that stay; one fp32 number per slot and key head, none for fifo.
Bytes    encoders: B*H*m_kv*(2*d*b + 4) + B*Hq*m_q*d*b + B*m_q*E*b + B*m_q once full. Decoders, of m
         entries: 2*L*B*H*m*d*b + 4*L*B*H*m; beside that, in one layer at a time, what `scratch`
         says to find each query's best slots.
Source   Zhu, Kumar, "Attendre: Wait To Attend By Retrieval With Evicted Queries in Memory-Based
         Transformers for Long Context Processing", 2024. No code was read.
Departs  a query sees keys up to exactly m_q after itself, whatever the chunks. A step, which stamps
         count, is a chunk. A decoder attends to all that it keeps, so that it is exact until
         something is dropped; its topk only says what counts as attended.
"""

import math
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from holdfast.context.cache.policy import (
    SELECT_BYTES,
    CachePolicy,
    CacheShape,
    probabilities,
    sinks_and_recent,
    top_slots,
)
from holdfast.context.kernels import Spec, per_key_head, scores_of
from holdfast.context.masks import Block
from holdfast.errors import UsageError, unknown

if TYPE_CHECKING:
    from holdfast.context.cache.layer import BoundedLayer, New

POLICIES = ("lra", "lfa", "fifo")
# Queries that look for their best slots together, which bounds what that holds.
QUERIES = 8


class Attendre(CachePolicy):
    """Keep what queries had among their best: most recently or most often.

    Args:
        policy: "lra" drops what was least recently attended, "lfa" what was least frequently,
            "fifo" the oldest.
        topk: keys that each query of each head counts as attended; where most slots count, lra
            and fifo are the same.
        q_slots: queries that wait; a decoder's cannot, as its next token needs them.
    """

    def __init__(self, *, policy: str = "lra", topk: int = 4, q_slots: int = 0):
        _check(policy, topk)
        if q_slots:
            raise UsageError(
                f"q_slots={q_slots}: queries that wait see tokens after themselves, so nothing can "
                "be generated with them; use q_slots=0, or AttendreLayer in an encoder"
            )
        self.policy, self.topk, self.q_slots = policy, topk, q_slots
        self.per_head = policy != "fifo"
        self.fields = {"worth": True} if self.per_head else {}

    def check(self, capacity: int, chunk: int) -> None:
        _check(self.policy, self.topk, capacity)

    def least(self, chunk: int) -> int:
        return max(chunk + 1, self.topk)

    def attended(
        self, layer: "BoundedLayer", q: Tensor, lse: Tensor, new: "New", scaling: float
    ) -> None:
        if self.policy == "fifo" or not layer.length:
            return
        field = layer.field("worth")
        if self.policy == "lra":
            field -= 1
            layer.put("worth", new, field.new_zeros(len(field), layer.heads, new.count))
        else:
            layer.put("worth", new, self._usual(layer, new).expand(-1, -1, new.count))
        for start in range(0, q.shape[2], QUERIES):
            rows = slice(start, start + QUERIES)
            hits = self._hits(layer, q[:, :, rows], lse[:, :, rows], new.part(rows), scaling)
            _credit_(field, hits.to(field.device), self.policy)

    def _usual(self, layer: "BoundedLayer", new: "New") -> Tensor:
        """The median worth of entries before the new ones: (B,H,1)."""
        worth = layer.field("worth").clone()
        last = torch.tensor(new.last, device=worth.device)[:, None]
        added = torch.full_like(last, new.count)
        if new.start is None:
            added = (new.slots >= 0).sum(1, keepdim=True).to(worth.device)
        slots = torch.arange(worth.shape[2], device=worth.device)
        worth.masked_fill_((slots >= last - added)[:, None], math.nan)
        return worth.nanmedian(2, keepdim=True).values.nan_to_num_(0)

    def _hits(
        self, layer: "BoundedLayer", q: Tensor, lse: Tensor, new: "New", scaling: float
    ) -> Tensor:
        """How many queries have a slot among their best: (B,H,m) fp32."""
        best, index = lse.new_empty(0), torch.empty(0, dtype=torch.int64, device=q.device)
        for at, p in probabilities(layer, q, lse, new, scaling, _width(layer.cache.capacity)):
            have = best.shape[-1] if best.numel() else 0
            p = torch.cat([best, p], -1) if have else p
            best, places = p.topk(min(self.topk, p.shape[-1]))
            found = places - have + at.start
            if have:
                before = index.gather(-1, places.clamp(max=have - 1))
                found = torch.where(places < have, before, found)
            index = found
        rows, heads = len(q), layer.heads
        hits = lse.new_zeros(rows, heads, layer.length)
        # What is hidden, and whatever padding asks for, has probability 0 and counts for nothing.
        seen = (best > 0).to(hits.dtype)
        return hits.scatter_add_(2, index.view(rows, heads, -1), seen.view(rows, heads, -1))

    def select(self, layer: "BoundedLayer", keep: int) -> Tensor:
        if self.policy == "fifo":
            return sinks_and_recent(layer, 0, keep)
        worth = layer.field("worth").to(layer.device)
        return top_slots(worth, keep, layer.filled(), recent=True)

    def scratch(self, shape: CacheShape, capacity: int) -> int:
        entries = shape.batch * capacity
        if self.policy == "fifo":
            return entries * SELECT_BYTES
        width = min(_width(capacity), capacity)
        # Three copies of scores and of keys that are decoded and rotated; numbers of best slots.
        pairs = shape.query_heads * QUERIES * (3 * 4 * (width + self.topk) + 5 * 8 * self.topk)
        keys = 3 * 4 * shape.heads * shape.key_width * width
        per_slot = 3 * 4 * shape.heads * capacity
        find = shape.batch * (pairs + keys + per_slot)
        return max(find, entries * shape.heads * SELECT_BYTES)


@dataclass(frozen=True)
class AttendreState:
    """What an `AttendreLayer` holds between chunks; grows until it is full.

    Attributes:
        keys, values: (B,H,m,d), m at most kv_slots, in reading order.
        worth: (B,H,m) fp32, higher stays longer; -inf where a slot holds padding.
        queries: (B,Hq,w,d), w at most q_slots, that have not attended yet.
        residual: (B,w,E), the rows that they belong to.
        real: (B,w) bool, False where a query is padding.
    """

    keys: Tensor
    values: Tensor
    worth: Tensor
    queries: Tensor
    residual: Tensor
    real: Tensor

    def nbytes(self) -> int:
        return sum(getattr(self, field.name).nbytes for field in fields(self))

    def detach(self) -> "AttendreState":
        """The same without gradients, to train on long texts piece by piece."""
        own = {field.name: getattr(self, field.name).detach() for field in fields(self)}
        return AttendreState(**own)


class AttendreLayer(nn.Module):
    """Attention of an encoder over a bounded memory, `q_slots` tokens late; without parameters.

    Args:
        kv_slots: keys and values per head that stay after a chunk.
        q_slots: queries that wait; 0 is causal. Rows see keys up to so many after themselves, and
            in a stack of layers up to as many times that.
        policy: "lra", "lfa" or "fifo".
        topk: keys per query and head that attention is over.

    Raises:
        UsageError: no slots, a negative number of queries, topk above kv_slots, another policy.
    """

    def __init__(self, kv_slots: int, q_slots: int, policy: str = "lra", topk: int = 32):
        super().__init__()
        if kv_slots < 1 or q_slots < 0:
            raise UsageError(
                f"kv_slots={kv_slots}, q_slots={q_slots}: use 1 or more keys and 0 or more queries"
            )
        _check(policy, topk, kv_slots)
        self.kv_slots, self.q_slots, self.policy, self.topk = kv_slots, q_slots, policy, topk

    @property
    def causal(self) -> bool:
        return self.q_slots == 0

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, residual: Tensor,
        state: AttendreState | None = None, *, valid: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, AttendreState]:  # fmt: skip
        """Read a chunk; rows come out in order, `q_slots` late.

        Args:
            q, k, v: (B,Hq,n,d), (B,H,n,d) and (B,H,n,dv), Hq a multiple of H.
            residual: (B,n,E), what the attention's output will be added to.
            state: of the chunk before; None begins a text.
            valid: (B,n) bool, False for padding, which comes out, too, but is never attended to.

        Returns:
            out (B,Hq,e,dv), residual (B,e,E) and the state; e is n once q_slots queries wait.
        """
        if residual.shape[:2] != (len(q), q.shape[2]) or k.shape[2] != q.shape[2]:
            raise UsageError(
                f"q {tuple(q.shape)}, k {tuple(k.shape)} and residual {tuple(residual.shape)}: "
                "expected (B,Hq,n,d), (B,H,n,d) and (B,n,E) of the same n rows"
            )
        real = q.new_ones(len(q), q.shape[2], dtype=torch.bool) if valid is None else valid
        if state is None:
            state = AttendreState(
                k[:, :, :0], v[:, :, :0], k.new_empty(*k.shape[:2], 0, dtype=torch.float32),
                q[:, :, :0], residual[:, :0], real[:, :0],
            )  # fmt: skip
        waiting, old = state.queries.shape[2], state.keys.shape[2]
        worth = self._with_new(state.worth, real)
        state = AttendreState(
            torch.cat([state.keys, k], 2), torch.cat([state.values, v], 2), worth,
            torch.cat([state.queries, q], 2), torch.cat([state.residual, residual], 1),
            torch.cat([state.real, real], 1),
        )  # fmt: skip
        return self._release(state, self.q_slots, old + self.q_slots - waiting)

    def flush(self, state: AttendreState) -> tuple[Tensor, Tensor, AttendreState]:
        """At the end of a text: the rows that still wait, as `forward` returns them."""
        return self._release(state, 0, state.keys.shape[2])

    def _release(
        self, state: AttendreState, stay: int, shift: int
    ) -> tuple[Tensor, Tensor, AttendreState]:
        """All but the last `stay` queries attend, query i to slots up to i + shift."""
        leaving = max(0, state.queries.shape[2] - stay)
        q, real = state.queries[:, :, :leaving], state.real[:, :leaving]
        outs, worth = [q.new_empty(*q.shape[:3], state.values.shape[3])[:, :, :0]], state.worth
        hidden = worth == -math.inf
        for start in range(0, leaving, QUERIES):
            rows = slice(start, min(start + QUERIES, leaving))
            seen = self._seen(hidden, real[:, rows], shift + start, q.shape[1])
            out, hits = self._attend(q[:, :, rows], state, seen)
            outs.append(out)
            worth = _credit_(worth.clone(), hits, self.policy).masked_fill_(hidden, -math.inf)
        kept = replace(
            state, worth=worth, queries=state.queries[:, :, leaving:], real=state.real[:, leaving:],
            residual=state.residual[:, leaving:],
        )  # fmt: skip
        if worth.shape[2] > self.kv_slots:
            slots = top_slots(worth, self.kv_slots, recent=True)
            wide = slots[..., None]
            kept = replace(
                kept, worth=worth.gather(2, slots),
                keys=kept.keys.gather(2, wide.expand(-1, -1, -1, kept.keys.shape[3])),
                values=kept.values.gather(2, wide.expand(-1, -1, -1, kept.values.shape[3])),
            )  # fmt: skip
        return torch.cat(outs, 2), state.residual[:, :leaving], kept

    def _seen(self, hidden: Tensor, real: Tensor, shift: int, query_heads: int) -> Tensor:
        """(B,Hq,n,m) bool: what queries see that may attend to slot `shift`, `shift` + 1, ..."""
        rows, slots = (
            torch.arange(size, device=hidden.device) for size in (real.shape[1], hidden.shape[2])
        )
        shown = (slots <= rows[:, None] + shift) & real[:, None, :, None]
        return shown & ~hidden.repeat_interleave(query_heads // hidden.shape[1], 1)[:, :, None]

    def _attend(self, q: Tensor, state: AttendreState, seen: Tensor) -> tuple[Tensor, Tensor]:
        """out (B,Hq,n,dv), 0 where a query sees nothing, and hits (B,H,m)."""
        rows, slots = q.shape[2], state.keys.shape[2]
        block = Block(slice(0, rows), slice(0, slots), seen)
        scores = scores_of(q, state.keys, Spec(scale=q.shape[-1] ** -0.5), block)
        best, index = scores.topk(min(self.topk, slots))
        blind = ~seen.any(-1, keepdim=True)
        p = best.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0)
        weights = torch.zeros_like(scores).scatter(-1, index, p)
        out = per_key_head(weights, state.keys) @ state.values.to(weights.dtype)
        found = torch.zeros_like(scores).scatter_(-1, index, (best > -math.inf).to(scores.dtype))
        hits = per_key_head(found, state.keys).sum(2)
        return out.view(*q.shape[:3], -1).to(q.dtype), hits.detach()

    def _with_new(self, worth: Tensor, real: Tensor) -> Tensor:
        """The slots' worth a step later, with that of new ones: (B,H,m) and (B,n) -> (B,H,m+n)."""
        new = worth.new_zeros(*worth.shape[:2], real.shape[1])
        if self.policy == "lra":
            worth = worth - 1
        elif self.policy == "lfa" and worth.shape[2]:
            known = worth.masked_fill(worth == -math.inf, math.nan)
            new = new + known.nanmedian(2, keepdim=True).values.nan_to_num_(0)
        new = new.masked_fill(~real[:, None], -math.inf)
        return torch.cat([worth, new], 2)


def _width(capacity: int) -> int:
    """Slots that queries are compared with at a time."""
    return max(16, min(1024, capacity // 16))


def _credit_(worth: Tensor, hits: Tensor, policy: str) -> Tensor:
    """Count hits in place: a least recently attended slot is worth 0 now, frequent ones add up."""
    if policy == "lra":
        return worth.masked_fill_(hits > 0, 0)
    return worth.add_(hits) if policy == "lfa" else worth


def _check(policy: str, topk: int, slots: int | None = None) -> None:
    if policy not in POLICIES:
        raise unknown("attendre policy", policy, POLICIES)
    if topk < 1 or (slots is not None and topk > slots):
        raise UsageError(
            f"topk={topk} of {'any number of' if slots is None else slots} slots; use 1 or more, "
            "and not more than there are slots"
        )


def attendre_ref(
    q: Tensor, k: Tensor, v: Tensor, chunks: list[int], *, kv_slots: int, q_slots: int,
    policy: str, topk: int,
) -> tuple[list[Tensor], list[int]]:  # fmt: skip
    """One head of one row, query by query: q, k, v (n,d) -> outputs, and positions that stay."""
    scores = (q @ k.T * q.shape[-1] ** -0.5).tolist()
    memory: dict[int, float] = {}
    outs: list[Tensor] = []
    start = 0
    for step, size in enumerate([*chunks, 0]):
        counts = sorted(memory.values())
        usual = counts[(len(counts) - 1) // 2] if policy == "lfa" and counts else 0.0
        for position in range(start, start + size):
            memory[position] = step if policy == "lra" else usual
        start += size
        stop = start - q_slots if size else start
        for query in range(len(outs), stop):
            shown = [j for j in memory if j <= query + q_slots]
            best = sorted(shown, key=lambda j: -scores[query][j])[:topk]
            p = torch.tensor([scores[query][j] for j in best], dtype=v.dtype).softmax(0)
            outs.append(p @ v[best])
            for j in best:
                memory[j] = step if policy == "lra" else memory[j] + 1
        worths = [(0.0 if policy == "fifo" else worth, j) for j, worth in memory.items()]
        memory = {j: memory[j] for j in sorted(j for _, j in sorted(worths)[-kv_slots:])}
    return outs, list(memory)
