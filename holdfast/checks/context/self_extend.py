"""Self-Extend at four times the trained length, without training."""

import torch

from holdfast.checks import Result, bytelm, check, recall
from holdfast.context.attention.self_extend import SelfExtend
from holdfast.context.cache.bounded import BoundedCache
from holdfast.context.cache.policy import CachePolicy
from holdfast.context.stream import prefill_chunks, surprisals

TIMES, CHUNK, EPISODES = 4, 64, 200


@check("self_extend", claim="reads and recalls at four times the trained length, untrained")
def run(seed: int) -> Result:
    reader, finder = bytelm.trained(seed), recall.trained(seed)
    length = TIMES * bytelm.TRAINED

    def perplexity(policy: CachePolicy | str, ids: torch.Tensor) -> float:
        cache = BoundedCache.for_model(reader, policy, tokens=length, chunk=CHUNK)
        return surprisals(reader, ids, cache)[:, 1:].mean().exp().item()

    def recalled(policy: CachePolicy | str, length: int) -> float:
        found = recall.episodes(EPISODES, length, seed)
        right = 0
        for batch in range(0, EPISODES, 50):
            some = found[batch : batch + 50]
            ids = torch.stack([torch.cat([one.document, one.question]) for one in some])
            cache = BoundedCache.for_model(finder, policy, tokens=length + 8, chunk=CHUNK)
            answers = prefill_chunks(finder, ids, cache).argmax(-1, keepdim=True)
            right += int((answers == torch.stack([one.answer for one in some])).sum())
        return right / EPISODES

    policy = SelfExtend.plan(bytelm.TRAINED, length)
    trained = perplexity("full", bytelm.validation(bytelm.TRAINED, 32))
    long = bytelm.validation(length, 8)
    ours, plain = perplexity(policy, long), perplexity("full", long)
    right, lost = recalled(policy, length), recalled("full", length)
    return Result(
        measured={"perplexity": ours, "of trained length": ours / trained, "recall": right},
        baseline={
            "trained length": trained,
            "plain": plain,
            "plain of trained length": plain / trained,
            "plain recall": lost,
            "chance": recall.value_chance,
        },
        threshold="perplexity <= 1.15 x that at 256 tokens, plain >= 1.5 x; recall >= 0.7",
        passed=ours <= 1.15 * trained and plain >= 1.5 * trained and right >= 0.7,
    )
