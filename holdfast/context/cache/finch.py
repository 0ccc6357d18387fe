"""Finch (131): read a document chunk by chunk and keep what the question looks at.

Keeps    after chunk i of N the r*i/N entries per layer and key head that the question attends to
         most, in reading order.
Form     keys un-rotated, in any form, so that entries are at 0 ... r-1 wherever they were read; one
         fp32 score per entry and key head.
Bytes    2*L*B*H*m*d*b + 4*L*B*H*m for the capacity m = r + chunk + |q|, of which r + |q| are in use
         at the end; beside that, in one layer at a time, 48*B*H*m to choose or what
         `attention_mass` takes.
Source   Corallo, Papotti, "FINCH: Prompt-guided Key-Value Cache Compression", TACL 2024.
Departs  chunks are even, so that a document of at most r tokens is kept whole. The question is read
         once more at the end, over what stayed. Entries are dropped by question in
         `finch_prefill`, and in `prefill_chunks` where that gets a question as its suffix, as late
         as they fit. What no question saw (decoding, `generate()`) outlasts what one saw, beside 4
         sinks: without any question that is sinks and recent entries.
"""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

from holdfast.context.cache.bounded import BoundedCache
from holdfast.context.cache.policy import (
    SELECT_BYTES,
    CachePolicy,
    CacheShape,
    attention_mass,
    mass_scratch,
    top_slots,
    unasked_last,
)
from holdfast.context.stream import ask, read
from holdfast.errors import DoesNotFit, UsageError

if TYPE_CHECKING:
    from holdfast.context.cache.layer import BoundedLayer, New


class Finch(CachePolicy):
    """Keep the entries that a question attends to, chosen by every key head on its own.

    Args:
        normalize: count every token of the question alike. Without it later ones count less: their
            attention is spread over more entries.
    """

    fields = {"attention": True}
    per_head = True

    def __init__(self, *, normalize: bool = True):
        self.normalize = normalize

    def attended(
        self, layer: "BoundedLayer", q: Tensor, lse: Tensor, new: "New", scaling: float
    ) -> None:
        if layer.cache.asking:
            # The token in slot t sees t + 1 entries, padding none.
            seen = (new.slots + 1).float() if self.normalize else None
            mass = attention_mass(layer, q, lse, new, scaling, seen)
            # 0 says that no question was asked.
            layer.field("attention").copy_(mass.clamp_(min=torch.finfo(mass.dtype).tiny))

    def select(self, layer: "BoundedLayer", keep: int) -> Tensor:
        filled = layer.filled()
        scores = unasked_last(layer.field("attention").to(layer.device), filled)
        return top_slots(scores, keep, filled, recent=True)

    def scratch(self, shape: CacheShape, capacity: int) -> int:
        choose = shape.batch * shape.heads * capacity * (SELECT_BYTES + 4)
        return max(choose, mass_scratch(shape, capacity))


@torch.no_grad()
def finch_prefill(
    model: PreTrainedModel,
    doc_ids: Tensor,
    question_ids: Tensor,
    cache: BoundedCache,
    *,
    doc_mask: Tensor | None = None,
    question_mask: Tensor | None = None,
) -> Tensor:
    """Read a document for a question and then the question; returns logits (B,V) of the answer.

    Of the cache's capacity a chunk and the question are set apart; the rest is what is kept of the
    document. The cache can be saved and answers that question again.

    Args:
        doc_ids, question_ids: (B,n) and (B,S).
        cache: an empty one with `Finch`.
        doc_mask, question_mask: like the ids, 0 for padding on the left.

    Raises:
        UsageError: an empty document or question, a cache of another policy or with entries, or one
            that is larger than the window that the model was trained with.
        DoesNotFit: chunk and question fill the cache.
    """
    (rows, length), (_, asked) = doc_ids.shape, question_ids.shape
    if not length or not asked or question_ids.shape[0] != rows:
        raise UsageError(
            f"doc_ids are {tuple(doc_ids.shape)}, question_ids {tuple(question_ids.shape)}; "
            "expected as many rows and at least one token in each"
        )
    if not isinstance(cache.policy, Finch):
        raise UsageError(f"the cache has the policy {cache.policy!r}; make it with Finch()")
    cache.settle(rows, cache.shape.dtype)
    if any(layer.length for layer in cache.bounded):
        raise UsageError("the cache holds entries already; call cache.reset() or make a new one")
    window = cache.config.max_position_embeddings
    if cache.capacity > window:
        raise UsageError(
            f"a cache of {cache.capacity} entries is larger than the {window} positions that the "
            "model was trained with; use a smaller budget"
        )
    keep = cache.capacity - cache.chunk - asked
    if keep < 1:
        raise DoesNotFit(
            f"chunks of {cache.chunk} and a question of {asked} leave {keep} of {cache.capacity} "
            f"entries for the document; use {cache.chunk + asked + 1} or more, or smaller chunks"
        )
    count = math.ceil(length / cache.chunk)
    ends = [math.ceil(length * i / count) for i in range(count + 1)]
    for i in range(count):
        at = slice(ends[i], ends[i + 1])
        read(model, doc_ids[:, at], cache, mask=None if doc_mask is None else doc_mask[:, at])
        ask(model, question_ids, cache, mask=question_mask)
        for layer in cache.bounded:
            layer.compress(math.ceil(keep * (i + 1) / count))
    return read(model, question_ids, cache, mask=question_mask)
