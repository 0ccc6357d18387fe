"""Questions about documents sixteen times as long as what is kept, and than the trained window."""

from functools import partial

from holdfast.checks import Result, check
from holdfast.checks.context._recall import bounded_recall, bytes_of, truncated_recall
from holdfast.checks.recall import TRAINED, episodes, trained
from holdfast.context.cache.baselines import Random, SinksRecent
from holdfast.context.cache.finch import Finch, finch_prefill

KEEP, CHUNK, QUESTION = 64, 32, 2
LENGTH, FACTS = 16 * KEEP, 8
SEEDS, EPISODES = 3, 80


@check(
    "finch",
    claim="keeps 1/16 of a document that is longer than the trained window, and recalls at least "
    "0.8 times what the full context does and twice what recent tokens do in as many bytes",
)
def run(seed: int) -> Result:
    model = trained()
    seeds = range(SEEDS * seed, SEEDS * (seed + 1))
    told = [one for s in seeds for one in episodes(EPISODES, LENGTH, s, FACTS)]
    short = [one for s in seeds for one in episodes(EPISODES, TRAINED - QUESTION, s, FACTS)]
    budget = bytes_of(model, Finch(), KEEP + CHUNK + QUESTION, CHUNK)
    recall = partial(bounded_recall, model, episodes=told, budget=budget, chunk=CHUNK)
    ours = recall(Finch(), reader=finch_prefill)
    base = {
        "full_context_recall": truncated_recall(model, told, LENGTH),
        "full_context_recall_within_window": truncated_recall(model, short, LENGTH),
        "truncated_recall": truncated_recall(model, told, KEEP),
        "sinks_recent_recall": recall(SinksRecent()),
        "random_recall": recall(Random()),
        "without_question_recall": recall(Finch()),
    }
    full = max(base["full_context_recall"], base["full_context_recall_within_window"])
    return Result(
        measured={"recall": ours, "of_full_context": ours / full, "bytes": budget},
        baseline=base | {"bytes": budget},
        threshold="recall >= 0.8 x full context, in and beyond the window, and >= 2 x truncation "
        "and sinks + recent",
        passed=ours
        >= max(0.8 * full, 2 * base["truncated_recall"], 2 * base["sinks_recent_recall"]),
    )
