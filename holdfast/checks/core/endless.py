"""Every policy that drops entries: a million tokens in constant bytes, at constant speed."""

import copy
import statistics
import time
from collections.abc import Iterator

import torch

from holdfast.checks import Result, check, tinylm
from holdfast.context.cache.bounded import BoundedCache
from holdfast.context.cache.policies import find, untrained
from holdfast.context.stream import prefill_chunks, read
from holdfast.units import parse_bytes

SHORT, LONG, STEPS, BUDGET = 10_000, 1_000_000, 256, "128KiB"


@check(
    "endless",
    claim="after a million tokens every policy holds its bytes and decodes as fast as after 10,000",
)
def run(seed: int, full: bool = False) -> Result:
    long = LONG if full else 10 * SHORT
    # So small that a million tokens take a minute; what it says does not matter here.
    model = tinylm.model(seed, hidden_size=32, intermediate_size=48, num_key_value_heads=2).eval()
    measured: dict[str, float | int] = {"tokens": long}
    worst, kept = 1.0, True
    for name, cls in untrained().items():
        if not cls.drops:
            continue
        cache = BoundedCache.for_model(model, find(name), budget=BUDGET, batch=1)
        early, held = None, set()
        for done, ids in _text(long, seed):
            prefill_chunks(model, ids, cache)
            held.add(cache.nbytes())
            if done == SHORT:
                early, held = copy.deepcopy(cache), {cache.nbytes()}
        assert early is not None and cache.budget is not None
        ratio = _speed(model, early, cache)
        kept &= len(held) == 1 and cache.peak_nbytes() <= cache.budget
        kept &= max(layer.length for layer in cache.bounded) <= cache.capacity
        worst = min(worst, ratio)
        measured[f"{name}_speed"] = ratio
    return Result(
        measured=measured,
        baseline={"speed after 10,000 tokens": 1.0, "budget_bytes": parse_bytes(BUDGET)},
        threshold="bytes constant and within the budget; speed >= 0.9 x that after 10,000 tokens",
        passed=bool(kept and worst >= 0.9),
    )


def _text(length: int, seed: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Random tokens, (1,SHORT) at a time, and how many have been given."""
    g = torch.Generator().manual_seed(seed)
    for done in range(SHORT, length + 1, SHORT):
        yield done, torch.randint(1, 128, (1, SHORT), generator=g)


def _speed(model: torch.nn.Module, early: BoundedCache, late: BoundedCache) -> float:
    """Steps per second of `late` over those of `early`; they take turns, step by step."""
    ids = torch.ones(1, 1, dtype=torch.long)
    ratios = []
    for _ in range(STEPS):
        seconds = []
        for cache in (early, late):
            start = time.perf_counter()
            with torch.no_grad():
                read(model, ids, cache)
            seconds.append(time.perf_counter() - start)
        ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios)
