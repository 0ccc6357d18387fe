"""LM-Infinite far beyond the trained length, at a fixed number of entries."""

import torch

from holdfast.checks import Result, bytelm, check
from holdfast.context.attention.lm_infinite import LMInfinite
from holdfast.context.cache.bounded import BoundedCache
from holdfast.context.cache.policy import CachePolicy
from holdfast.context.stream import surprisals

LENGTH, CHUNK = 8192, 64
GLOBAL, LOCAL = 10, 192


@check(
    "lm_infinite",
    claim="a model trained at 256 tokens reads 8,192 as well, in a fixed number of bytes",
)
def run(seed: int) -> Result:
    model = bytelm.trained(seed)

    def perplexity(policy: CachePolicy | str, ids: torch.Tensor, entries: int) -> float:
        cache = BoundedCache.for_model(model, policy, tokens=entries, chunk=CHUNK)
        return surprisals(model, ids, cache)[:, 1:].mean().exp().item()

    short = bytelm.validation(bytelm.TRAINED, 64)
    long = bytelm.validation(LENGTH, 2)
    entries = GLOBAL + LOCAL + CHUNK
    trained = perplexity("full", short, bytelm.TRAINED)
    ours = perplexity(LMInfinite(n_global=GLOBAL, n_local=LOCAL), long, entries)
    headless = perplexity(LMInfinite(n_global=0, n_local=LOCAL), long, entries)
    vanilla = perplexity("full", long, LENGTH)
    return Result(
        measured={
            "perplexity": ours,
            "of trained length": ours / trained,
            "entries": entries,
        },
        baseline={
            "trained length": trained,
            "vanilla": vanilla,
            "vanilla of trained length": vanilla / trained,
            "no first tokens": headless,
        },
        threshold="perplexity <= 1.1 x that at 256 tokens, vanilla >= 1.5 x, and worse without "
        "the first tokens",
        passed=ours <= 1.1 * trained and vanilla >= 1.5 * trained and headless > ours,
    )
