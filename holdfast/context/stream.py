"""Reading text of any length through a bounded cache, chunk by chunk, and going on from there.

Positions given to the model stay small: it rotates by them and the cache takes that back, so that
nothing drifts after millions of tokens. `generate()` works with these caches too, but it keeps ids,
masks and positions of the whole text.
"""

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from holdfast.context.cache.bounded import BoundedCache
from holdfast.errors import UsageError


def surprisal(logits: Tensor, ids: Tensor, before: Tensor | None = None) -> Tensor:
    """-log p of each token in nats: logits (B,n,V), ids (B,n) -> (B,n) fp32.

    Args:
        before: (B,V) logits that predicted the first token; without it its surprisal is NaN.
    """
    first = ids.new_full((ids.shape[0], 1), 0).float().fill_(math.nan)
    if before is not None:
        first = F.cross_entropy(before.float(), ids[:, 0], reduction="none")[:, None]
    if ids.shape[1] == 1:
        return first
    rest = F.cross_entropy(logits[:, :-1].mT.float(), ids[:, 1:], reduction="none")
    return torch.cat([first, rest], 1)


@torch.no_grad()
def prefill_chunks(
    model: PreTrainedModel,
    ids: Tensor,
    cache: BoundedCache,
    chunk: int | None = None,
    *,
    mask: Tensor | None = None,
    suffix: Tensor | None = None,
    before: Tensor | None = None,
    on_chunk: Callable[[int], None] | None = None,
) -> Tensor:
    """Read ids (B,n) into a cache and return the logits (B,V) of what comes next.

    Args:
        chunk: tokens per forward pass, by default and at most `cache.chunk`.
        mask: (B,n), 0 for padding on the left.
        suffix: (S,) or (B,S) ids that choose what stays (`make_room`), by default the policy's
            catalyst.
        before: (B,V) logits that predicted the first token.
        on_chunk: called with the number of tokens of each chunk, after it was read.
    """
    if ids.dim() != 2 or not ids.shape[1]:
        raise UsageError(f"ids of shape {tuple(ids.shape)}: expected (B,n) with at least one token")
    cache.settle(ids.shape[0], cache.shape.dtype)
    start = 0
    while start < ids.shape[1]:
        step = min(chunk or cache.chunk, cache.chunk)
        part = ids[:, start : start + step]
        valid = None if mask is None else mask[:, start : start + step]
        before = read(model, part, cache, mask=valid, before=before, question=suffix)
        start += part.shape[1]
        if on_chunk is not None:
            on_chunk(part.shape[1])
    return before


@torch.no_grad()
def read(
    model: PreTrainedModel, ids: Tensor, cache: BoundedCache, *, mask: Tensor | None = None,
    before: Tensor | None = None, question: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """One forward pass over ids (B,n); returns the logits (B,V) of what comes next.

    Args:
        mask: (B,n), 0 for padding on the left.
        before: (B,V) logits that predicted the first token.
        question: (S,) or (B,S) ids that choose what stays (`make_room`), by default the policy's
            catalyst.
    """
    learns = cache.policy.observes
    logits = _forward(model, ids, cache, mask, question, every=learns)
    if learns:
        cache.observe(surprisal(logits, ids, before))
    return logits[:, -1].clone()


def _forward(
    model: PreTrainedModel, ids: Tensor, cache: BoundedCache, mask: Tensor | None = None,
    question: Tensor | None = None, *, every: bool,
) -> Tensor:  # fmt: skip
    """Logits (B,n,V), or (B,1,V) of the last token unless `every`."""
    question = cache.policy.catalyst if question is None else question
    if question is not None and not cache.asking:
        make_room(model, question, cache, ids.shape)
    n = ids.shape[1]
    first = 0 if cache.policy.rotates else cache.get_seq_length()
    # Where keys are un-rotated any position will do; rows that are padded on the left count from
    # their first real token.
    positions = torch.arange(first, first + n, device=ids.device)[None]
    if mask is not None and not cache.policy.rotates:
        if first:
            raise UsageError("padding in the middle of a text cannot be positioned; pad its start")
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    given = {} if mask is None else {"attention_mask": mask}
    return model(
        ids, past_key_values=cache, position_ids=positions, use_cache=True,
        logits_to_keep=0 if every else 1, **given,
    ).logits  # fmt: skip


@torch.no_grad()
def surprisals(model: PreTrainedModel, ids: Tensor, cache: BoundedCache) -> Tensor:
    """How surprising each token of ids (B,n) is, read through a cache: nats (B,n), first is NaN."""
    cache.settle(ids.shape[0], cache.shape.dtype)
    before, found = None, []
    for part in ids.split(cache.chunk, 1):
        logits = _forward(model, part, cache, every=True)
        found.append(surprisal(logits, part, before))
        if cache.policy.observes:
            cache.observe(found[-1])
        before = logits[:, -1].clone()
    return torch.cat(found, 1)


def make_room(
    model: PreTrainedModel, question: Tensor, cache: BoundedCache, shape: torch.Size
) -> None:
    """If ids of shape (B,n) and then a question (S,) or (B,S) do not fit, ask it and drop entries.

    So the question sees all that may be dropped, and there is always room to ask it.
    """
    cache.settle(shape[0], cache.shape.dtype)
    room = shape[1] + question.shape[-1]
    if room >= cache.capacity:
        raise UsageError(
            f"{shape[1]} tokens and a question of {question.shape[-1]} leave no entry of "
            f"{cache.capacity}; use smaller chunks, a shorter question or a larger budget"
        )
    if max(layer.length for layer in cache.bounded) + room > cache.capacity:
        ask(model, question.to(model.device).expand(shape[0], -1), cache)
        for layer in cache.bounded:
            layer.compress(cache.policy.stay(cache.capacity, room))


def ask(
    model: PreTrainedModel, question: Tensor, cache: BoundedCache, *, mask: Tensor | None = None
) -> Tensor:
    """Let the policy see who answers a question (B,S), then forget it; returns logits (B,V).

    Args:
        mask: (B,S), 0 for padding on the left.

    Raises:
        UsageError: a question that is longer than a chunk, or layers that cannot forget.
    """
    rows, length = question.shape
    if not 0 < length <= cache.chunk:
        raise UsageError(
            f"a question of {length} tokens is not read at once, which 1 to {cache.chunk} are; "
            "give a shorter one or a cache with a larger chunk"
        )
    if len(cache.bounded) < len(cache.layers):
        raise UsageError("sliding layers of this model cannot forget a question; do not ask")
    cache.asking = True
    try:
        logits = read(model, question, cache, mask=mask)
    finally:
        cache.asking = False
    entries = [length] * rows if mask is None else mask.long().sum(1).tolist()
    for layer in cache.bounded:
        layer.drop_last(length, entries)
    return logits


@torch.no_grad()
def stream(
    model: PreTrainedModel,
    cache: BoundedCache,
    logits: Tensor,
    *,
    tokens: int,
    sample: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[Tensor]:
    """Decode: yields ids (B,), one step at a time, and reads each back into the cache.

    Args:
        logits: (B,V) of the first token, as `prefill_chunks` returns them.
        tokens: how many steps.
        sample: logits (B,V) -> ids (B,); greedy by default.
    """
    for _ in range(tokens):
        ids = logits.argmax(-1) if sample is None else sample(logits)
        yield ids
        logits = read(model, ids[:, None], cache, before=logits)
