"""PPD on a byte-level model of source code: the text of `generate()` in fewer passes, as predicted.

Time is shown, not judged: a model this small spends it in Python, not in reading weights.
"""

import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.checks import Result, bytelm, check, tinylm
from holdfast.context.attention.ppd import PPD, ppd_generate

STEPS, BATCH, LENGTH, CUTS, LR = 500, 4, 64, 16, 0.02
CALIBRATED = 32
TEXTS, START, NEW = 50, 64, 48
TREE = 16
TIMED = 8


def windows(count: int, seed: int, batch: int, length: int) -> Iterator[Tensor]:
    """Of the training text, beginning as texts of the model do."""
    for ids in tinylm.batches(tinylm.corpus()[0], count, seed, batch, length):
        yield F.pad(ids[:, 1:], (1, 0), value=bytelm.BEGIN)


@check(
    "ppd",
    claim="the text of generate() with 1.3 tokens per pass or more, from three trained vectors, as "
    "many as its Markov chain predicts",
)
def run(seed: int) -> Result:
    model: Any = bytelm.trained(seed)
    held_out = next(windows(1, seed + 1, CALIBRATED, START + NEW))
    lessons = [*windows(STEPS, seed, BATCH, LENGTH), held_out]
    prompts = PPD.fit(model, lessons, cuts=CUTS, lr=LR, seed=seed)
    untrained = PPD.fit(model, [held_out], seed=seed)
    texts = bytelm.validation(START, TEXTS).split(1)

    def plain(ids: Tensor) -> Tensor:
        return model.generate(ids, max_new_tokens=NEW, do_sample=False, use_cache=True)

    wanted = [plain(ids) for ids in texts]

    def accepted(of: PPD) -> tuple[float, int]:
        """Tokens per pass, and how many texts are those of `generate()`."""
        found = [ppd_generate(model, of, ids, max_new_tokens=NEW, tree=TREE) for ids in texts]
        counts = [count for one in found for count in one.accepted]
        same = sum(torch.equal(one.ids, want) for one, want in zip(found, wanted, strict=True))
        return statistics.mean(counts), same

    measured, same = accepted(prompts)
    base, base_same = accepted(untrained)
    predicted = prompts.plan(TREE).accepted

    def seconds(ours: bool, ids: Tensor) -> float:
        start = time.perf_counter()
        if ours:
            ppd_generate(model, prompts, ids, max_new_tokens=NEW)
        else:
            plain(ids)
        return time.perf_counter() - start

    prompts.tune(model, START)
    pairs = [seconds(False, ids) / seconds(True, ids) for ids in texts[:TIMED]]
    return Result(
        measured={
            "same_texts": same,
            "tokens_per_pass": measured,
            "predicted_tokens_per_pass": predicted,
            "bytes": prompts.nbytes,
            "inputs_chosen_here": prompts.plan().size,
            "speedup_here": statistics.median(pairs),
        },
        baseline={
            "name": "the same tree size with untrained embeddings; generate() has 1 token per pass",
            "tokens_per_pass": base,
            "same_texts": base_same,
            "texts": TEXTS,
        },
        threshold="all texts those of generate(); tokens per pass >= 1.3, more than untrained, and "
        "within 15 % of what was predicted",
        passed=same == base_same == TEXTS
        and measured >= 1.3
        and measured > base
        and abs(predicted - measured) <= 0.15 * measured,
    )
