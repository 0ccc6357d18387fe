"""A byte model trained at 256 tokens, fine-tuned at 2,048 with core tokens and with everything.

StreamingLLM gets as many bytes as core tokens and the window take at the end of a text, and the
better of two weights: those fine-tuned with dense attention, and the original ones, which never saw
more than a window of this size. This text hardly needs a farther past: the latter are not beaten.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from holdfast.checks import Result, check, tinylm
from holdfast.checks.bytelm import BEGIN, trained, validation
from holdfast.context.attention.cca import CCAttention
from holdfast.context.cache.baselines import SinksRecent
from holdfast.context.cache.bounded import BoundedCache
from holdfast.context.stream import surprisals

LENGTH, GROUP, WINDOW = 2048, 16, 64
STEPS, RATE = 100, 1e-3
ROWS, CHUNK = 12, 8


def fine_tune(model: PreTrainedModel, seed: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95))
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS, pct_start=0.1)
    model.train()
    for ids in tinylm.batches(tinylm.corpus()[0], STEPS, seed, 1, LENGTH):
        ids = F.pad(ids[:, 1:], (1, 0), value=BEGIN)
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
    model.eval()


@torch.no_grad()
def with_cores(model: PreTrainedModel, cca: CCAttention, ids: Tensor) -> tuple[float, int, int]:
    """Nats per byte, read in parts; bytes of the cache at the end, and by formula."""
    cache = cca.cache()
    logits = torch.cat([model(part, past_key_values=cache).logits for part in ids.split(256, 1)], 1)
    config, n = model.config, ids.shape[1]
    exact = n - GROUP * ((n + 1 - WINDOW) // GROUP)
    pair = 2 * config.num_hidden_layers * len(ids) * config.num_key_value_heads * config.head_dim
    return nats(logits, ids), cache.nbytes(), pair * 4 * (n // GROUP + exact)


@torch.no_grad()
def dense(model: PreTrainedModel, ids: Tensor) -> float:
    logits = [model(row, use_cache=False).logits for row in ids.split(1)]
    return nats(torch.cat(logits), ids)


def streaming(model: PreTrainedModel, ids: Tensor, entries: int) -> float:
    """With sinks and recent tokens in a cache of so many entries."""
    cache = BoundedCache.for_model(model, SinksRecent(), tokens=entries, chunk=CHUNK)
    return surprisals(model, ids, cache)[:, 1:].mean().item()


def nats(logits: Tensor, ids: Tensor) -> float:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()


@check(
    "cca",
    claim="fine-tuned for 100 steps at 2,048 tokens, loss within 3 % of dense attention so tuned, "
    "in an eighth of its bytes, and below StreamingLLM's at equal bytes",
)
def run(seed: int) -> Result:
    ids = validation(LENGTH, ROWS)
    model = trained()
    with CCAttention.apply(model, group=GROUP, window=WINDOW) as cca:
        untuned = with_cores(model, cca, ids)[0]
        fine_tune(model, seed)
        loss, nbytes, formula = with_cores(model, cca, ids)
    plain = trained()
    entry = BoundedCache.for_model(plain, "full", tokens=LENGTH).shape.kv_bytes(1) * ROWS
    entries = nbytes // entry
    base = {"streaming_original_loss": streaming(plain, ids, entries)}
    plain.set_attn_implementation("sdpa")
    base["dense_original_loss"] = dense(plain, ids)
    fine_tune(plain, seed)
    base["dense_loss"] = dense(plain, ids)
    base["streaming_loss"] = streaming(plain, ids, entries)
    return Result(
        measured={
            "loss": loss,
            "original_loss": untuned,
            "cache_bytes": nbytes // ROWS,
            "formula_bytes": formula // ROWS,
            "share_of_dense_bytes": nbytes / (entry * LENGTH),
        },
        baseline={"entries": entries, "dense_cache_bytes": entry * LENGTH // ROWS, **base},
        threshold="loss <= 1.03 x dense, < StreamingLLM with either weights; bytes <= dense / 8",
        passed=loss <= 1.03 * base["dense_loss"]
        and loss < min(base["streaming_loss"], base["streaming_original_loss"])
        and nbytes == formula
        and 8 * nbytes <= entry * LENGTH,
    )
