"""Episodes of the recall model read through bounded caches, many at a time."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from holdfast.checks.recall import Episode
from holdfast.context.cache.bounded import BoundedCache
from holdfast.context.cache.policy import CachePolicy
from holdfast.context.stream import prefill_chunks, read

ROWS = 40
# Documents (B,n) and questions (B,S) through a cache to logits (B,V) of the answers.
Reader = Callable[[PreTrainedModel, Tensor, Tensor, BoundedCache], Tensor]


def in_one_go(
    model: PreTrainedModel, documents: Tensor, questions: Tensor, cache: BoundedCache
) -> Tensor:
    before = prefill_chunks(model, documents, cache)
    return read(model, questions, cache, before=before)


def bytes_of(model: PreTrainedModel, policy: CachePolicy, tokens: int, chunk: int) -> int:
    """What a cache of so many entries takes for each episode, at its peak."""
    cache = BoundedCache.for_model(model, policy, tokens=tokens, batch=ROWS, chunk=chunk)
    return -(-cache.peak_nbytes() // ROWS)


def bounded_recall(
    model: PreTrainedModel,
    policy: CachePolicy,
    episodes: Sequence[Episode],
    *,
    budget: int,
    chunk: int,
    reader: Reader = in_one_go,
) -> float:
    """Fraction of episodes, all of one length, that are answered.

    Args:
        budget: bytes of the cache for each episode, at any time.
        chunk: tokens that are read at a time.
        reader: how a cache gets documents and questions.
    """

    def answer(documents: Tensor, questions: Tensor) -> Tensor:
        rows = len(documents)
        cache = BoundedCache.for_model(model, policy, budget=budget * rows, batch=rows, chunk=chunk)
        return reader(model, documents, questions, cache)

    return _answered(answer, episodes)


def truncated_recall(model: PreTrainedModel, episodes: Sequence[Episode], tokens: int) -> float:
    """With the last `tokens` of each document alone, in an ordinary cache."""

    @torch.no_grad()
    def answer(documents: Tensor, questions: Tensor) -> Tensor:
        ids = torch.cat([documents[:, -tokens:], questions], 1)
        return model(ids, use_cache=False, logits_to_keep=1).logits[:, -1]

    return _answered(answer, episodes)


def _answered(answer: Callable[[Tensor, Tensor], Tensor], episodes: Sequence[Episode]) -> float:
    right = 0
    for start in range(0, len(episodes), ROWS):
        part = episodes[start : start + ROWS]
        documents, questions, answers = (
            torch.stack([getattr(one, name) for one in part])
            for name in ("document", "question", "answer")
        )
        right += int((answer(documents, questions).argmax(-1) == answers[:, 0]).sum())
    return right / len(episodes)
