"""A byte model that reads 2,048 tokens, fine-tuned with core tokens and, as long, without them.

The model is bytelm after 350 steps of dense attention at 2,048. StreamingLLM gets as many entries
as core tokens and exact ones ever are together, and three weights: the original ones, as it was
published, and those fine-tuned for as many steps with dense attention or behind the window itself.
Losses are compared text by text.

Departs  from "below a window of equal bytes": that holds for the first two weights alone. A window
         with sinks that the model was tuned behind does better, by 0.8 and 0.9 % of perplexity
         with seeds 0 and 1, and a little better than dense attention: models of this size make
         nothing of what lies farther back.
"""

import copy
import inspect
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from holdfast.checks import Result, bytelm, check, tinylm
from holdfast.checks.cached import trained_once
from holdfast.context.attention.cca import CCAttention, Groups
from holdfast.context.cache.baselines import SinksRecent
from holdfast.context.cache.bounded import BoundedCache
from holdfast.context.stream import surprisals

LENGTH, GROUP, WINDOW, SINKS = 2048, 16, 64, 4
# Steps and rate of the first training and of the second.
FIRST, SECOND = (350, 1e-3), (100, 3e-4)
ROWS, CHUNK = 24, 8


def fine_tune(
    model: PreTrainedModel, seed: int, steps: int, lr: float, entries: int | None = None
) -> PreTrainedModel:
    """In place; with `entries` behind the mask of sinks and recent tokens, so many together."""
    options = {}
    if entries is not None:
        age = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
        recent = (age < entries - SINKS) | (torch.arange(LENGTH) < SINKS)
        options["attention_mask"] = ((age >= 0) & recent)[None, None]
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95))
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    model.train()
    for ids in tinylm.batches(tinylm.corpus()[0], steps, seed, 1, LENGTH):
        ids = F.pad(ids[:, 1:], (1, 0), value=bytelm.BEGIN)
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False, **options).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
    return model.eval()


def long_reader() -> PreTrainedModel:
    """bytelm, which knows 256 tokens, after dense training at 2,048; trained once per machine."""
    sources = (Path(module.__file__).read_text() for module in (bytelm, tinylm))
    recipe = (*sources, inspect.getsource(fine_tune), str((LENGTH, FIRST)))
    return trained_once(
        bytelm.trained(),
        lambda model: fine_tune(model, 1, *FIRST),
        "longbytelm",
        0,
        *recipe,
        tinylm.corpus_hash(),
    )


def most_entries(groups: Groups) -> int:
    """Core tokens and exact ones that a text of LENGTH ever needs together."""
    return max(
        n // groups.group + n - groups.group * groups.seen(n + 1) for n in range(1, LENGTH + 1)
    )


@torch.no_grad()
def with_cores(model: PreTrainedModel, cca: CCAttention, ids: Tensor) -> tuple[Tensor, int]:
    """Nats per byte of each text, read in parts; bytes of the cache at the end."""
    cache = cca.cache()
    logits = torch.cat([model(part, past_key_values=cache).logits for part in ids.split(256, 1)], 1)
    return nats(logits, ids), cache.nbytes()


@torch.no_grad()
def dense(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return torch.cat([nats(model(row, use_cache=False).logits, row) for row in ids.split(1)])


def streaming(model: PreTrainedModel, ids: Tensor, entries: int) -> Tensor:
    """With sinks and recent tokens in a cache of so many entries."""
    cache = BoundedCache.for_model(model, SinksRecent(sinks=SINKS), tokens=entries, chunk=CHUNK)
    return surprisals(model, ids, cache)[:, 1:].mean(1)


def nats(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].mT, ids[:, 1:], reduction="none").mean(1)


@check(
    "cca",
    claim="fine-tuned for 100 steps at 2,048 tokens, loss within 3 % of dense attention so tuned, "
    "in a ninth of its bytes, and below StreamingLLM's at equal bytes, as published and with the "
    "weights of dense attention so tuned; not below that of a window tuned for as many steps, "
    "which does better",
)
def run(seed: int) -> Result:
    ids = bytelm.validation(LENGTH, ROWS)
    original = long_reader()
    groups = Groups(GROUP, WINDOW)
    entries = most_entries(groups)
    entry = BoundedCache.for_model(original, "full", tokens=LENGTH).shape.kv_bytes(1)

    ours = copy.deepcopy(original)
    with CCAttention.apply(ours, group=GROUP, window=WINDOW) as cca:
        untuned, _ = with_cores(ours, cca, ids)
        fine_tune(ours, seed, *SECOND)
        loss, nbytes = with_cores(ours, cca, ids)
    formula = ROWS * entry * (LENGTH // GROUP + LENGTH - GROUP * groups.seen(LENGTH + 1))

    tuned = fine_tune(copy.deepcopy(original), seed, *SECOND)
    dense_losses = {"dense_original": dense(original, ids), "dense": dense(tuned, ids)}
    behind = fine_tune(copy.deepcopy(original), seed, *SECOND, entries=entries)
    windows = {
        f"streaming_{name}": streaming(model, ids, entries)
        for name, model in (
            ("original", original),
            ("dense_tuned", tuned),
            ("tuned_behind_its_window", behind),
        )
    }
    lower = {name: (rival - loss).mean().item() for name, rival in windows.items()}
    error = {name: ((rival - loss).std() / ROWS**0.5).item() for name, rival in windows.items()}
    rivals = ("streaming_original", "streaming_dense_tuned")
    return Result(
        measured={
            "loss": loss.mean(),
            "original_loss": untuned.mean(),
            "of_dense_loss": (loss.mean() / dense_losses["dense"].mean()).item(),
            "cache_bytes": nbytes // ROWS,
            "most_bytes": entry * entries,
            "share_of_dense_bytes": entries / LENGTH,
        }
        | {f"lower_than_{name}": value for name, value in lower.items()}
        | {f"standard_error_{name}": value for name, value in error.items()},
        baseline={f"{name}_loss": x.mean() for name, x in (dense_losses | windows).items()}
        | {"entries": entries, "dense_cache_bytes": entry * LENGTH, "texts": ROWS},
        threshold="loss <= 1.03 x dense; below StreamingLLM, original and dense-tuned, by 2 "
        "standard errors; bytes = formula, most <= dense / 9",
        passed=loss.mean() <= 1.03 * dense_losses["dense"].mean()
        and all(lower[name] > 2 * error[name] for name in rivals)
        and nbytes == formula
        and 9 * entries <= LENGTH,
    )
