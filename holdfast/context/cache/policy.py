"""What a cache policy decides: which entries stay, and how queries look at them.

A policy holds options and no tensors of a sequence; `BoundedLayer` holds those and applies what
the policy decides. Third parties subclass `CachePolicy` and run `conformance` on the result.
"""

import inspect
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from holdfast.context.cache.slots import vector_nbytes
from holdfast.context.kernels import Spec, scores_of
from holdfast.context.masks import Block
from holdfast.errors import UsageError
from holdfast.forms.base import Form

if TYPE_CHECKING:
    from holdfast.context.cache.bounded import BoundedCache
    from holdfast.context.cache.layer import BoundedLayer, New

# Scores and probabilities are computed for this many pairs of a query and a key at a time.
PAIRS = 1 << 16


@dataclass(frozen=True)
class CacheShape:
    """The layers of a model that a policy bounds; they are alike.

    Args:
        layers, batch, heads, query_heads: numbers; `heads` of keys and values.
        key_width, value_width: elements of one key and of one value.
        dtype: of keys and values as the model makes them.
        form: how they are stored; None is in their dtype.
    """

    layers: int
    batch: int
    heads: int
    query_heads: int
    key_width: int
    value_width: int
    dtype: torch.dtype
    form: Form | None = None

    def kv_bytes(self, entries: int) -> int:
        """Keys and values of so many entries per row and head, in all layers."""
        widths = (self.key_width, self.value_width)
        each = sum(vector_nbytes(width, self.dtype, self.form) for width in widths)
        return self.layers * self.batch * self.heads * entries * each


class CachePolicy:
    """Base of all policies; a subclass overrides `score`, or `select`, or more.

    Options are keyword arguments of `__init__`, kept under their own names.

    Attributes:
        rotates: keys are stored un-rotated and entries get the positions 0, 1, 2, ... of those
            that stay; needs RoPE. Without it keys are stored as the model made them.
        fields: numbers that the policy keeps per entry (fp32), name -> True if heads differ.
        keeps_index: also keep each entry's original position in its row, as field "index" (int64).
        per_head: heads choose differently.
        observes: wants to know how surprising each token was (`observe`).
        drops: ever drops entries; if not, more than fit are an error.
        resizes: a saved cache can go on with another capacity.
        catalyst: ids (S,) that are read whenever entries must be dropped, and then forgotten, so
            that `attended` sees while `cache.asking` what they attend to (`stream.make_room`).
        at_slots: entries are looked at where their slots are (what `attend` does by default), for
            which a table of rotations is kept.
    """

    rotates = True
    fields: Mapping[str, bool] = {}
    keeps_index = False
    per_head = False
    observes = False
    drops = True
    resizes = True
    at_slots = True
    catalyst: Tensor | None = None

    def bind(self, cache: "BoundedCache") -> None:
        """Once per cache, when its capacity is known: refuse or warn about the model."""

    def check(self, capacity: int, chunk: int) -> None:
        """Refuse a capacity (entries) that cannot work with chunks of so many tokens."""

    def least(self, chunk: int) -> int:
        """The smallest capacity that `check` accepts."""
        return chunk + 1

    def stay(self, capacity: int, incoming: int) -> int:
        """How many entries stay when `incoming` more do not fit.

        A few more than needed are dropped, because dropping costs a pass over what is kept.
        """
        return capacity - max(incoming, capacity // 16)

    def score(self, layer: "BoundedLayer") -> Tensor:
        """(B,H|1,m) fp32: entries with the highest stay; ties keep the earlier entry."""
        raise NotImplementedError(f"{type(self).__name__} overrides neither score nor select")

    def select(self, layer: "BoundedLayer", keep: int) -> Tensor:
        """Slots that stay: (B,H|1,keep) int64 ascending, of rows that hold at least `keep`."""
        return top_slots(self.score(layer), keep, layer.filled())

    def absorb(self, layer: "BoundedLayer", over: list[bool], keep: int) -> None:
        """Before `select`ed entries alone stay in rows that are `over`: they may take up others."""

    def attend(self, layer: "BoundedLayer", q: Tensor, new: "New", scaling: float) -> Tensor:
        """q (B,Hq,n,d), un-rotated if `rotates`, of entries just appended -> (B,Hq,n,dv)."""
        q = layer.at_slots(q, new)
        out, lse = layer.look(q, new, scaling)
        self.attended(layer, q, lse, new, scaling)
        return out

    def attended(
        self, layer: "BoundedLayer", q: Tensor, lse: Tensor, new: "New", scaling: float
    ) -> None:
        """After the attention of a chunk, with q as it looked and its log-sum-exp (B,Hq,n)."""

    def observe(self, layer: "BoundedLayer", nats: Tensor, new: "New") -> None:
        """Surprisal (B,n) of the tokens just appended; NaN where nothing predicted a token."""

    def turn(self, cache: "BoundedCache") -> None:
        """Before a new turn of a dialogue."""

    def scratch(self, shape: CacheShape, capacity: int) -> int:
        """Bytes held, in one layer at a time, beside the slots while entries are chosen."""
        heads = shape.heads if self.per_head else 1
        return shape.batch * heads * capacity * SELECT_BYTES

    def options(self) -> dict[str, Any]:
        """The arguments of `__init__`, to make the same policy again."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def identity(self) -> str:
        """Name and plain options: what two caches must have in common to go on from each other."""
        plain = (bool, int, float, str, type(None), CachePolicy)
        given = ", ".join(
            f"{name}={value!r}"
            for name, value in self.options().items()
            if isinstance(value, plain)
        )
        return f"{type(self).__name__}({given})"

    def __repr__(self) -> str:
        return self.identity()


# Of `top_slots` with its scores, per entry: two fp32 copies, an order and its sort, masks.
SELECT_BYTES = 44


def top_slots(
    scores: Tensor, keep: int, filled: Tensor | None = None, *, recent: bool = False
) -> Tensor:
    """Slots of the highest scores, ascending: (B,H|1,m) -> (B,H|1,keep) int64.

    Args:
        filled: (B,1,m) bool, False for slots beyond a row's entries; None if rows are full.
        recent: of equal scores keep the later slot instead of the earlier, on every device.
    """
    if scores.shape[-1] < keep:
        raise UsageError(f"{keep} of {scores.shape[-1]} entries cannot stay")
    if filled is not None:
        scores = scores.masked_fill(~filled, -math.inf)
    order = scores.argsort(dim=-1, descending=not recent, stable=True)
    best = order[..., order.shape[-1] - keep :] if recent else order[..., :keep]
    return best.sort(-1).values


def sinks_and_recent(layer: "BoundedLayer", sinks: int, keep: int) -> Tensor:
    """Slots (B,1,keep) int64 ascending of the first `sinks` entries and of the last others."""
    slots = torch.arange(keep, device=layer.device).expand(len(layer.counts), 1, -1)
    counts = torch.tensor(layer.counts, device=layer.device).view(-1, 1, 1)
    return slots + (slots >= sinks) * (counts - keep).clamp(min=0)


def probabilities(
    layer: "BoundedLayer", q: Tensor, lse: Tensor, new: "New", scaling: float,
    width: int | None = None,
) -> Iterator[tuple[slice, Tensor]]:  # fmt: skip
    """What each query gives to each slot, range by range: (slots, (B,Hq,n,len) fp32).

    Args:
        q, lse: (B,Hq,n,d) as it looked and (B,Hq,n), as `attended` gets them.
        width: slots in a range.
    """
    width = width or max(64, PAIRS // max(1, q.shape[2]))
    blind = lse == -math.inf
    lse = lse.masked_fill(blind, 0)[..., None]
    for at in layer.ranges(width):
        k = layer.rotated_keys(at)
        mask = layer.mask(new, at)
        if mask is not None and not isinstance(mask, Tensor):
            b, h, i, j = (
                torch.arange(size, device=q.device)
                for size in (q.shape[0], 1, q.shape[2], k.shape[2])
            )
            mask = mask(b.view(-1, 1, 1, 1), h.view(-1, 1, 1), i.view(-1, 1), j)
            mask = mask.expand(torch.broadcast_shapes(mask.shape, (1, 1, len(i), len(j))))
        whole = Block(slice(0, q.shape[2]), slice(0, k.shape[2]), mask)
        p = scores_of(q, k, Spec(scale=scaling), whole).sub_(lse).exp_()
        yield at, p


def attention_mass(
    layer: "BoundedLayer", q: Tensor, lse: Tensor, new: "New", scaling: float,
    weights: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """What all queries together give to each entry, per key head: (B,H,m) fp32.

    Args:
        weights: (B|1,n) of the queries; None counts each once.
    """
    batch, heads = q.shape[0], layer.heads
    total = q.new_zeros(batch, heads, layer.length, dtype=torch.float32)
    for start in range(0, q.shape[2], QUERIES):
        rows = slice(start, start + QUERIES)
        block = q[:, :, rows], lse[:, :, rows], new.part(rows)
        for at, p in probabilities(layer, *block, scaling, _width(layer.cache.capacity)):
            if weights is not None:
                p *= weights[:, None, rows, None]
            total[:, :, at] += p.view(batch, heads, -1, p.shape[3]).sum(2)
    return total


# Queries that `attention_mass` looks at together, at a part of the keys.
QUERIES = 16


def _width(capacity: int) -> int:
    return max(16, min(2048, capacity // 16))


def mass_scratch(shape: CacheShape, capacity: int) -> int:
    """Bytes that `attention_mass` holds, its result included."""
    width = min(_width(capacity), capacity)
    # Three copies of scores and of keys that are decoded and rotated.
    pairs = 3 * 4 * shape.query_heads * QUERIES * width
    keys = 3 * 4 * shape.heads * shape.key_width * width
    return shape.batch * (pairs + keys + 4 * shape.heads * capacity)


def unasked_last(mass: Tensor, filled: Tensor | None = None, sinks: int = 4) -> Tensor:
    """What questions gave to entries, (B,H,m) fp32, as scores: entries to drop have low ones.

    An entry of exactly 0 is newer than the last question. It outlasts those which that question
    saw, as the first `sinks` then do, without which attention would collapse. Where nobody asked,
    ties that keep the later slot leave sinks and recent entries.
    """
    new = mass == 0
    if filled is not None:
        new &= filled
    scores = mass.masked_fill(new, torch.finfo(mass.dtype).max)
    scores[..., :sinks].masked_fill_(new.any(-1, keepdim=True), math.inf)
    return scores


def surprise(nats: Tensor, new: "New") -> Tensor:
    """Surprisal (B,n) as `observe` gets it, without NaN.

    What nothing predicted, as the first token of a turn, gets the largest of its row, or 0 where
    nothing else is known.
    """
    # Padding predicts nothing: what lies in slot 0 is the first token of its row.
    unknown = nats.isnan() | (new.slots == 0)
    known = nats.masked_fill(unknown | (new.slots < 0), 0)
    return torch.where(unknown, known.amax(1, keepdim=True), known)
