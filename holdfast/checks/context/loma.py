"""Repeating random text of 64 symbols from a quarter of its entries.

The baseline keeps the mean of every four tokens' keys and values, in every layer, where LoMA keeps
a memory token's. It repeats in the same way and is trained as long, on the same text.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from holdfast import attach
from holdfast.checks import Result, check, tinylm
from holdfast.context.cache.loma import (
    REPEAT,
    LoMA,
    LoMACache,
    loma_batch,
    loma_loss,
    loma_reconstruct,
)

SYMBOLS, MEMORIES, RATIO = 64, 2, 4
STEPS, BATCH, RATE = 1200, 64, 6e-3
TEXTS = 512


def prepared(seed: int) -> LoMA:
    model = tinylm.model(
        seed,
        vocab_size=SYMBOLS,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        # Zones are short: slower rotations would tell positions too little apart.
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LoMA.prepare(model, t=MEMORIES, c=RATIO)


def texts(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(SYMBOLS, (count, MEMORIES * RATIO), generator=generator)


def train(loma: LoMA, seed: int) -> None:
    parameters = list(loma.model.parameters())
    optimizer = torch.optim.AdamW(
        parameters, lr=RATE, betas=(0.9, 0.98), weight_decay=0.0, fused=True
    )
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS, pct_start=0.1)
    loma.model.train()
    for ids in texts(STEPS * BATCH, seed).split(BATCH):
        following, repetition = loma_loss(loma, ids)
        optimizer.zero_grad()
        (following + repetition).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        rate.step()
    loma.model.eval()


def pool(forward: Callable[..., Any], hidden_states: Tensor, **given: Any) -> Any:
    """Attention in which keys and values of memory are means of those of its text.

    Projections are linear, so that the mean may as well be taken before them; the model then
    rotates the mean key to the last token of its slice.
    """
    size = MEMORIES * RATIO
    text, rest = hidden_states[:, :size], hidden_states[:, size + MEMORIES :]
    means = text.unflatten(1, (MEMORIES, RATIO)).mean(2)
    return forward(hidden_states=torch.cat([text, means, rest], 1), **given)


def pool_memory(loma: LoMA) -> attach.Handle:
    """Let memory be means in every layer, until the handle is removed."""
    attached = attach.Handle()
    for layer in loma.model.model.layers:
        attached += attach.wrap(layer.self_attn, pool)
    return attached


@torch.no_grad()
def repeated(loma: LoMA, ids: Tensor) -> float:
    """Share of a zone's tokens that are repeated, in the training form."""
    batch = loma_batch(loma, ids)
    logits = loma.model(
        batch.ids, attention_mask=batch.dense(), position_ids=batch.positions, use_cache=False
    ).logits
    return (logits[:, batch.kind == REPEAT].argmax(-1) == ids).float().mean().item()


@check(
    "loma",
    claim="memory tokens repeat at least 95 % of the random text they replace, at a quarter of "
    "its bytes, with at most a quarter of the mistakes of mean-pooled entries trained alike",
)
def run(seed: int) -> Result:
    ids = texts(TEXTS, seed + 1)
    loma = prepared(seed)
    untrained = loma_reconstruct(loma, ids)
    train(loma, seed)
    cache = LoMACache(loma)
    with torch.no_grad():
        loma.model(ids, past_key_values=cache)
    pooled = prepared(seed)
    with pool_memory(pooled):
        train(pooled, seed)
        pooled_repeated = repeated(pooled, ids)
    with pool_memory(loma):
        unlearned = repeated(loma, ids)
    ours = {
        "repeated": loma_reconstruct(loma, ids),
        "cache_bytes_per_token": cache.nbytes() / ids.numel(),
    }
    config = loma.model.config
    whole = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    base = {
        "pooled_repeated": pooled_repeated,
        "pooled_in_the_same_weights_repeated": unlearned,
        "untrained_repeated": untrained,
        "whole_cache_bytes_per_token": whole,
    }
    return Result(
        measured=ours,
        baseline=base,
        threshold="repeated >= 0.95, mistakes <= 1/4 of mean-pooled; bytes = 1/4 of a whole cache",
        passed=ours["repeated"] >= 0.95
        and 1 - ours["repeated"] <= 0.25 * (1 - pooled_repeated)
        and RATIO * ours["cache_bytes_per_token"] == whole,
    )
