"""The fine-tuning job of the benchmarks: a model pretrained here, and text that it has not seen.

Pretraining reads source files of Python's standard library, fine-tuning the reference documentation
in `pydoc_data.topics`; every machine with Python has both.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from holdfast import host
from holdfast.checks import tinylm

VALIDATION_WINDOWS = 64
PRETRAIN_RATE = 1e-3


@dataclass(frozen=True)
class Job:
    """Sizes of model and runs; the plan's budget is `fraction` of plain torch's peak."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    batch: int
    sequence: int
    steps: int
    pretrain_steps: int
    fraction: float

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=256,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            max_position_embeddings=self.sequence,
            use_cache=False,
            bos_token_id=None,
            eos_token_id=None,
        )

    def batches(self, text: Tensor, steps: int, seed: int) -> Iterator[Tensor]:
        for ids in tinylm.batches(text, steps, seed, self.batch, self.sequence):
            yield ids.long()


JOBS = {
    "full": Job(
        hidden=256,
        intermediate=688,
        layers=6,
        heads=4,
        batch=4,
        sequence=128,
        steps=40,
        pretrain_steps=200,
        fraction=0.35,
    ),
    "tiny": Job(
        hidden=64,
        intermediate=176,
        layers=2,
        heads=2,
        batch=1,
        sequence=32,
        steps=5,
        pretrain_steps=2,
        fraction=0.6,
    ),
}


def documentation() -> tuple[Tensor, Tensor]:
    """Training and validation topics: 1-D uint8; every tenth topic is held out."""
    from pydoc_data.topics import topics

    named = sorted(topics.items())
    parts = (
        [text for i, (_, text) in enumerate(named) if i % 10 != 5],
        [text for _, text in named[5::10]],
    )
    train, validation = (
        torch.frombuffer(bytearray("".join(part).encode()), dtype=torch.uint8) for part in parts
    )
    return train, validation


def pretrained(job: Job) -> Path:
    """The directory of the pretrained model; trained on the first call, then cached."""
    config = job.config()
    run = [job.batch, job.sequence, job.pretrain_steps, PRETRAIN_RATE]
    what = [config.to_dict(), run, tinylm.corpus_hash(), torch.__version__]
    name = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]
    folder = host.cache_dir() / f"finetune-{name}"
    if (folder / "model.safetensors").exists():
        return folder
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PRETRAIN_RATE, fused=True)
    for ids in job.batches(tinylm.corpus()[0], job.pretrain_steps, seed=0):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


def load(folder: Path) -> LlamaForCausalLM:
    """The pretrained model in fp32, in memory of torch's allocator rather than a mapped file."""
    from safetensors.torch import load_file

    model = LlamaForCausalLM(LlamaConfig.from_pretrained(folder))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model


@torch.no_grad()
def validation_loss(model: nn.Module, text: Tensor, job: Job) -> float:
    """Mean nats per byte over evenly spaced windows."""
    model.eval()
    starts = torch.linspace(0, len(text) - job.sequence, VALIDATION_WINDOWS).long()
    windows = text.unfold(0, job.sequence, 1)[starts].long()
    losses = [
        model(input_ids=ids, labels=ids).loss.item() * len(ids) for ids in windows.split(job.batch)
    ]
    return sum(losses) / VALIDATION_WINDOWS
