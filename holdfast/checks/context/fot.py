"""Words looked up in a dictionary that lies in memory among 64 windows of other dictionaries.

A definition is one token, the sum of the embeddings of a word and of its meaning; a question is a
word. Documents are two windows: definitions, then questions about all of them. Accuracy among 64
others is 0.93 against 0.62 with seed 0, and 0.96 against 0.81 with seed 1, where the baseline loses
a little less than 0.2; with seed 0 and 500 further steps instead of 250 it is 0.99 against 0.92.
"""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from holdfast.checks import Result, check, tinylm
from holdfast.context.attention.fot import FoT

WORDS, MEANINGS, WINDOW, DOCUMENTS = 512, 32, 16, 32
ASK = WORDS + MEANINGS
MEMORY_LAYER, DISTRACTORS, EPISODES = 1, 64, 24
FIRST, MORE, LR = 400, 250, 3e-3


def definitions(words: Tensor, generator: torch.Generator) -> Tensor:
    """Meanings for words of any shape."""
    return WORDS + torch.randint(MEANINGS, words.shape, generator=generator)


def embedded(model: PreTrainedModel, words: Tensor, others: Tensor | int) -> Tensor:
    embed = model.get_input_embeddings()
    return embed(words) + embed(torch.as_tensor(others).expand_as(words))


def train(model: PreTrainedModel, ranges: Sequence[int], steps: int, seed: int) -> None:
    """Each range for as many steps; no word is in two dictionaries of a batch."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), LR, betas=(0.9, 0.98), weight_decay=0.0)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 20, 2.5 * (1.01 - step / steps))
    )
    model.train()
    with FoT(model, [MEMORY_LAYER]).across(ranges[0]) as across:
        for step in range(steps):
            across.range = ranges[step * len(ranges) // steps]
            words = torch.randperm(WORDS, generator=generator).view(DOCUMENTS, WINDOW)
            meanings = definitions(words, generator)
            order = torch.rand(words.shape, generator=generator).argsort(1)
            asked, wanted = words.gather(1, order), meanings.gather(1, order)
            windows = embedded(model, words, meanings), embedded(model, asked, ASK)
            rows = torch.stack(windows, 1).flatten(0, 1)
            logits = model(inputs_embeds=rows, use_cache=False).logits[1::2]
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(logits.flatten(0, 1), wanted.flatten()).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            rate.step()
    model.eval()


@torch.no_grad()
def accuracy(fot: FoT, distractors: int, seed: int) -> float:
    """Of answers when so many windows of other words lie in memory beside the right one."""
    generator = torch.Generator().manual_seed(seed)
    cache = fot.cache(window=WINDOW, memory=(1 + distractors) * WINDOW)
    words = torch.rand(EPISODES, WORDS, generator=generator).argsort(1)
    own, others = words[:, :WINDOW], words[:, WINDOW:]
    meanings = definitions(own, generator)
    fot.model(inputs_embeds=embedded(fot.model, own, meanings), past_key_values=cache)
    for _ in range(distractors):
        some = torch.rand(others.shape, generator=generator).argsort(1)[:, :WINDOW]
        other = others.gather(1, some)
        read = embedded(fot.model, other, definitions(other, generator))
        fot.model(inputs_embeds=read, past_key_values=cache)
    order = torch.rand(own.shape, generator=generator).argsort(1)
    asked, wanted = own.gather(1, order), meanings.gather(1, order)
    questions = embedded(fot.model, asked, ASK)
    logits = fot.model(inputs_embeds=questions, past_key_values=cache).logits
    return (logits.argmax(-1) == wanted).float().mean().item()


@check(
    "fot",
    claim="trained across a batch, finds a definition among 64 windows of others; the same model, "
    "trained as long without them, loses at least 0.2 of accuracy",
)
def run(seed: int) -> Result:
    start = tinylm.model(
        seed,
        vocab_size=ASK + 1,
        intermediate_size=128,
        num_attention_heads=2,
        head_dim=64,
        max_position_embeddings=WINDOW,
    )
    train(start, [1], FIRST, seed)
    focused, alone = start, copy.deepcopy(start)
    train(focused, [2, 4, 8], MORE, seed + 1)
    train(alone, [1], MORE, seed + 1)
    ours, base = (FoT(model, [MEMORY_LAYER]) for model in (focused, alone))
    best = FoT(focused, [MEMORY_LAYER], backend="topk", topk=WINDOW)
    measured = {
        f"accuracy_{count}_distractors": accuracy(ours, count, seed + 2) for count in (0, 8, 64)
    }
    measured["topk_accuracy_64_distractors"] = accuracy(best, DISTRACTORS, seed + 2)
    baseline: dict[str, float | str] = {"name": "trained with range 1, as many steps"}
    baseline |= {
        f"accuracy_{count}_distractors": accuracy(base, count, seed + 2) for count in (0, 8, 64)
    }
    lost = accuracy(base, 0, seed + 2) - accuracy(base, DISTRACTORS, seed + 2)
    baseline["lost"] = lost
    return Result(
        measured=measured,
        baseline=baseline | {"guess": 1 / MEANINGS},
        threshold="accuracy with 64 distractors >= 0.8, baseline loses >= 0.2",
        passed=measured["accuracy_64_distractors"] >= 0.8 and lost >= 0.2,
    )
