"""A needle among 32 anywhere in a stream eight times as long as the pot."""

from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from holdfast.checks import Result, check
from holdfast.checks.context._recall import bounded_recall, bytes_of, truncated_recall
from holdfast.checks.recall import ASK, KEYS, episodes, trained
from holdfast.context.cache.baselines import Random, SinksRecent
from holdfast.context.cache.bounded import BoundedCache
from holdfast.context.cache.infinipot import InfiniPot
from holdfast.context.stream import prefill_chunks, read

# More facts than novelty alone can keep: a key and what follows a fact are as novel as its value.
POT, CHUNK, FACTS = 96, 16, 32
LENGTH = 8 * POT
SEEDS, EPISODES = 3, 80


def asked(
    model: PreTrainedModel, documents: Tensor, questions: Tensor, cache: BoundedCache
) -> Tensor:
    before = prefill_chunks(model, documents, cache, suffix=questions)
    return read(model, questions, cache, before=before)


@check(
    "infinipot",
    claim="at equal bytes, recalls at least twice as many needles as sinks and recent tokens "
    "do, and no fewer than novelty alone",
)
def run(seed: int) -> Result:
    model = trained()
    seeds = range(SEEDS * seed, SEEDS * (seed + 1))
    told = [one for s in seeds for one in episodes(EPISODES, LENGTH, s, FACTS)]
    budget = bytes_of(model, InfiniPot(), POT, CHUNK)
    recall = partial(bounded_recall, model, episodes=told, budget=budget, chunk=CHUNK)
    # Questions of the right form, about any keys.
    form = torch.tensor([[ASK, KEYS[at]] for at in range(0, len(KEYS), 4)]).flatten()
    ours = recall(InfiniPot(), reader=asked)
    base = {
        "sinks_recent_recall": recall(SinksRecent()),
        "random_recall": recall(Random()),
        "novelty_only_recall": recall(InfiniPot(alpha=1.0), reader=asked),
        "catalyst_only_recall": recall(InfiniPot(alpha=0.0), reader=asked),
        "other_questions_recall": recall(InfiniPot(catalyst=form)),
        "full_context_recall": truncated_recall(model, told, LENGTH),
    }
    return Result(
        measured={"recall": ours, "bytes": budget},
        baseline=base | {"bytes": budget},
        threshold="recall >= 2 x sinks + recent, >= novelty only, >= 0.5",
        passed=ours >= max(2 * base["sinks_recent_recall"], base["novelty_only_recall"], 0.5),
    )
