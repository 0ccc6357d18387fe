"""bytelm: a byte-level language model that knows nothing beyond 256 tokens, for long inputs.

A LLaMA of three layers (476,032 parameters, four query heads on two KV heads, ordinary RoPE) on
tinylm's corpus; 640 steps take 110 s on one core. Perplexity per byte of held-out text with seed 0
is 4.85 at 256 tokens and without a remedy 9.5 at 1,024, 13.4 at 2,048 and 19.9 at 8,192. Rows from
160 to 255 have 5.01; 5.04 if they see only the latest 64 tokens and the beginning, 5.47 if they see
only the latest 64, 5.18 with four first tokens and the latest 32, 5.84 with the latest 32 alone.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.checks import tinylm
from holdfast.checks.cached import trained_once
from holdfast.errors import UsageError

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

TRAINED = 256
# NUL, which no source file holds.
BEGIN = 0
STEPS, BATCH, LR = 640, 8, 3e-3


def validation(length: int, count: int) -> Tensor:
    """Held-out text: (count, length) int64, each row `BEGIN` and bytes; the same every time."""
    text = tinylm.corpus()[1]
    if not 0 < length <= len(text):
        raise UsageError(f"length={length}, but the held-out text has 1 to {len(text)} tokens")
    starts = torch.linspace(0, len(text) - length, count).long()
    return _begin(text.unfold(0, length, 1)[starts])


def _begin(windows: Tensor) -> Tensor:
    """The windows with `BEGIN` in place of their first byte."""
    return F.pad(windows[:, 1:], (1, 0), value=BEGIN)


def model(seed: int = 0) -> "LlamaForCausalLM":
    """The untrained model."""
    return tinylm.model(
        seed,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_key_value_heads=2,
        max_position_embeddings=TRAINED,
    )


def train(untrained: "LlamaForCausalLM", seed: int = 0, steps: int = STEPS) -> list[float]:
    """Train in place, the rate in one cycle; returns the loss of each step in nats per byte.

    The last two fifths of the steps also reward attention to `BEGIN`: large models learn such sinks
    by themselves, this one has no time to.
    """
    optimizer = torch.optim.AdamW(untrained.parameters(), lr=LR, betas=(0.9, 0.95))
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps, pct_start=0.05)
    attention = untrained.config._attn_implementation
    untrained.train()
    losses = []
    for step, ids in enumerate(tinylm.batches(tinylm.corpus()[0], steps, seed, BATCH, TRAINED)):
        ids = _begin(ids)
        sinks = step >= 0.6 * steps
        untrained.set_attn_implementation("eager" if sinks else attention)
        out = untrained(input_ids=ids, labels=ids, output_attentions=sinks)
        loss = out.loss
        if sinks:
            seen = torch.stack([weights[..., 0] for weights in out.attentions])
            loss = loss - 0.03 * seen.clamp_min(1e-9).log().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(untrained.parameters(), 1.0)
        optimizer.step()
        rate.step()
        losses.append(out.loss.item())
    untrained.set_attn_implementation(attention)
    return losses


def trained(seed: int = 0) -> "LlamaForCausalLM":
    """The model after the standard training, in eval mode; trained once per machine."""
    sources = (Path(file).read_text() for file in (__file__, tinylm.__file__))
    recipe = (*sources, tinylm.corpus_hash())
    return trained_once(model(seed), lambda new: train(new, seed), "bytelm", seed, *recipe)
