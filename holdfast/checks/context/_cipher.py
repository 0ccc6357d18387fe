"""cipher: documents that are enciphered each in its own way, and a language model that reads them.

A document is text of tinylm's corpus, case and runs of spaces dropped, with its 32 symbols permuted
at random. What follows what is known from the document alone.

The model is a LLaMA of two layers, taught on texts of at most 512; training takes 110 s on one
core. With seed 0 symbols 16 to 31 of a held-out document cost 3.45 nats, 32 to 63 3.13, 64 to 127
2.95, 128 to 255 2.80 and 256 to 511 2.79.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.checks import tinylm
from holdfast.checks.cached import trained_once

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

# All others are one more.
SYMBOLS = b"abcdefghijklmnopqrstuvwxyz \n_(."
# Steps, symbols of a text, texts in a batch.
LESSONS = ((240, 64, 32), (160, 128, 16), (200, 256, 8), (200, 512, 4))
LR = 4e-3


def folded(text: Tensor) -> Tensor:
    """ASCII bytes as numbers of symbols: int64, 1-D; shorter where spaces followed each other."""
    table = torch.full((128,), len(SYMBOLS))
    for number, symbol in enumerate(SYMBOLS):
        table[[symbol, ord(chr(symbol).upper())]] = number
    ids = table[text]
    space = ids == SYMBOLS.index(b" ")
    return ids[~(space & F.pad(space[:-1], (1, 0)))]


def documents(text: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    """Parts (count, length) of a folded text, each enciphered in its own way."""
    starts = torch.randint(len(text) - length + 1, (count,), generator=generator)
    ciphers = torch.rand(count, len(SYMBOLS) + 1, generator=generator).argsort(1)
    return ciphers.gather(1, text.unfold(0, length, 1)[starts])


def held_out(count: int, length: int, seed: int) -> Tensor:
    """Documents (count, length) of text that the model was not taught on."""
    generator = torch.Generator().manual_seed(seed)
    return documents(folded(tinylm.corpus()[1]), count, length, generator)


def model(seed: int = 0) -> "LlamaForCausalLM":
    """The untrained model."""
    return tinylm.model(
        seed,
        vocab_size=len(SYMBOLS) + 1,
        hidden_size=128,
        intermediate_size=256,
        num_key_value_heads=2,
        head_dim=64,
        rope_parameters={"rope_type": "default", "rope_theta": 400.0},
        max_position_embeddings=LESSONS[-1][1],
    )


def _misdirection(first: Tensor, second: Tensor, ids: Tensor) -> Tensor:
    """Nats by which attention (B,Hq,n,n) misses its targets.

    Half of the first layer's heads should see the symbol before, the second layer's what followed
    earlier symbols like the present one.
    """
    before = first[:, : first.shape[1] // 2].diagonal(-1, 2, 3)
    followed = (ids[:, :, None] == F.pad(ids[:, :-1], (1, 0), value=-1)[:, None]).tril()
    found = (second * followed[:, None]).sum(3).clamp_min(1e-9).log().mean(1)
    return -before.clamp_min(1e-9).log().mean() - found[followed.any(2)].mean()


def train(untrained: "LlamaForCausalLM", seed: int = 0) -> list[float]:
    """Train in place; returns each step's loss in nats per symbol.

    In the first lesson attention itself is supervised: two layers that are useless without each
    other would otherwise take long to find together.
    """
    generator = torch.Generator().manual_seed(seed)
    text = folded(tinylm.corpus()[0])
    optimizer = torch.optim.AdamW(untrained.parameters(), LR, betas=(0.9, 0.98), weight_decay=0.01)
    rate = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LR, total_steps=sum(steps for steps, *_ in LESSONS), pct_start=0.1
    )
    attention = untrained.config._attn_implementation
    untrained.train()
    losses = []
    for number, (steps, length, count) in enumerate(LESSONS):
        supervised = number == 0
        untrained.set_attn_implementation("eager" if supervised else attention)
        for _ in range(steps):
            ids = documents(text, count, length, generator)
            out = untrained(input_ids=ids, labels=ids, output_attentions=supervised)
            loss = out.loss
            if supervised:
                loss = loss + 0.3 * _misdirection(*out.attentions, ids)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(untrained.parameters(), 1.0)
            optimizer.step()
            rate.step()
            losses.append(out.loss.item())
    return losses


def trained(seed: int = 0) -> "LlamaForCausalLM":
    """The model after the standard training, in eval mode; trained once per machine."""
    sources = (Path(file).read_text() for file in (__file__, tinylm.__file__))
    recipe = (*sources, tinylm.corpus_hash())
    return trained_once(model(seed), lambda new: train(new, seed), "cipher", seed, *recipe)
