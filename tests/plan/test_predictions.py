"""Predicted against measured bytes: one case per architecture and method, real step against trace.

A prediction traces at most the first, a middle and the last block of each stack; the model that is
measured runs at full depth under the same methods, applied by the same functions.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from holdfast.ledger import Ledger
from holdfast.meter import Meter
from holdfast.places import DiskArena
from holdfast.plan import apply
from holdfast.plan.blocks import stacks_of
from holdfast.plan.compose import Composer, Family, Life
from holdfast.plan.family import UpdateCosts, trace_family
from holdfast.plan.file import Methods, parse_runs
from holdfast.plan.models import ModelSource, loss_of, resolve

ROOM = 2**40
# The allocator also sees workspaces of attention kernels and copies of the generator's state.
WITHIN = 0.01


class Residual(nn.Module):
    """A block in nobody's library."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 3 * width)
        self.down = nn.Linear(3 * width, width)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Regressor(nn.Module):
    """A plain module: no config, its own inputs, its own loss."""

    def __init__(self, width: int = 64, depth: int = 9):
        super().__init__()
        self.width = width
        self.enter = nn.Linear(width, width)
        self.body = nn.ModuleList(Residual(width) for _ in range(depth))
        self.leave = nn.Linear(width, 1)

    def forward(self, x, y):
        x = self.enter(x)
        for block in self.body:
            x = block(x)
        return {"loss": nn.functional.mse_loss(self.leave(x), y)}

    def example_inputs(self, batch, sequence, device):
        return {
            "x": torch.ones(batch, sequence, self.width, device=device),
            "y": torch.zeros(batch, sequence, 1, device=device),
        }


def _decoder(kind: str, depth: int, **fields: Any) -> dict[str, Any]:
    common = {"hidden_size": 128, "intermediate_size": 352, "num_attention_heads": 4}
    return {"model_type": kind, "vocab_size": 512, "num_hidden_layers": depth, **common, **fields}


def _gpt2(depth: int, dropout: float = 0.0) -> dict[str, Any]:
    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    return {
        "model_type": "gpt2", "vocab_size": 512, "n_embd": 128, "n_head": 4, "n_layer": depth,
        "n_positions": 256, **drops,
    }  # fmt: skip


def _encoder(kind: str, depth: int, **fields: Any) -> dict[str, Any]:
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return _decoder(kind, depth, **quiet, **fields)


LLAMA = _decoder("llama", 8, num_key_value_heads=2)
OPT = _decoder(
    "opt", 8, ffn_dim=352, word_embed_proj_dim=128, max_position_embeddings=256, dropout=0.0
)
BERT = _encoder("bert", 8)
VIT = _encoder("vit", 8, image_size=64, patch_size=8)
T5 = {
    "model_type": "t5", "vocab_size": 512, "d_model": 128, "d_kv": 32, "d_ff": 352, "num_heads": 4,
    "num_layers": 6, "num_decoder_layers": 5, "dropout_rate": 0.0, "decoder_start_token_id": 0,
    "pad_token_id": 0,
}  # fmt: skip
GEMMA = _decoder(
    "gemma2", 8, num_key_value_heads=2, head_dim=32, sliding_window=64, query_pre_attn_scalar=32
)
QWEN = _decoder("qwen3", 9, num_key_value_heads=2, head_dim=32, tie_word_embeddings=True)
NEOX = _decoder("gpt_neox", 8)
FALCON = _decoder("falcon", 8, new_decoder_architecture=False, alibi=False)
MAMBA = {
    "model_type": "mamba", "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 8,
    "state_size": 8, "time_step_rank": 4,
}  # fmt: skip
STABLE = _decoder("stablelm", 8, num_key_value_heads=4)


@dataclass(frozen=True)
class Case:
    """`blocks` as in a plan file: path of a stack -> runs; blocks that are not named keep."""

    model: dict[str, Any] | Callable[[], nn.Module]
    methods: dict[str, Any] = field(default_factory=dict)
    blocks: dict[str, str] = field(default_factory=dict)
    batch: int = 2
    sequence: int = 128
    accumulation: int = 1

    @property
    def source(self) -> ModelSource:
        return resolve(self.model() if callable(self.model) else self.model)

    @property
    def planned(self) -> Methods:
        return Methods(**self.methods, blocks=self.blocks)


LAYERS, BODY = "model.layers", "transformer.h"
BACKWARD = {"gradients": "backward"}
LORA = {"adapter": {"lora": {"rank": 4}}}

CASES = {
    "gpt2-adamw": Case(_gpt2(8)),
    "gpt2-dropout-recompute": Case(_gpt2(8, 0.1), blocks={BODY: "recompute*8"}),
    "llama-backward": Case(LLAMA, BACKWARD),
    "llama-mixed-chunked": Case(
        LLAMA, {"loss_chunk": 64}, {LAYERS: "recompute*3 keep*2 recompute*2 keep"}
    ),
    "llama-lora-int4": Case(LLAMA, {**LORA, "weights": {"int4": {}}}),
    "llama-adamw4-backward": Case(LLAMA, {**BACKWARD, "optimizer": {"adamw4": {}}}),
    "llama-disk": Case(LLAMA, blocks={LAYERS: "disk*3 keep*4 recompute"}),
    "opt-lora-recompute": Case(OPT, LORA, {"model.decoder.layers": "recompute*8"}),
    "bert-for-loop": Case(BERT, {"optimizer": {"adamw": {"fused": False}}}),
    "bert-memsave-lora": Case(BERT, {**LORA, "saved": [{"memsave": {}}]}),
    "vit-recompute": Case(VIT, blocks={"vit.layers": "recompute*8"}, batch=4),
    "t5-mixed": Case(
        T5, {}, {"encoder.block": "recompute*4 keep*2", "decoder.block": "recompute*2 keep*3"}
    ),
    "gemma2-mixed-accumulate": Case(
        GEMMA, {"loss_chunk": 64}, {LAYERS: "recompute*3 keep*5"}, accumulation=2
    ),
    "qwen3-bf16": Case(QWEN, {"dtype": "bfloat16"}),
    "neox-recompute-backward": Case(NEOX, BACKWARD, {"gpt_neox.layers": "keep*4 recompute*4"}),
    "falcon-sgd": Case(FALCON, {"optimizer": {"sgd": {"momentum": 0.9}}}),
    "mamba-adamw": Case(MAMBA, sequence=16),
    "stablelm-fewbit": Case(STABLE, {"saved": [{"fewbit": {}}]}),
    "module-recompute": Case(Regressor, blocks={"body": "recompute*4 keep*5"}),
}


def no_time(flops: int, moved: int, dtype: torch.dtype) -> float:
    return 0.0


def predict(case: Case) -> tuple[Family, Ledger]:
    """The ledger of the case's step, from a trace of each option that its blocks use."""
    source, planned = case.source, case.planned
    dtype = getattr(torch, planned.dtype)
    used = {o for runs in planned.blocks.values() for o in parse_runs(runs)}

    def option(name: str, block: nn.Module):
        arena = DiskArena(ROOM) if name == "disk" else None
        apply.set_option(block, name, arena)
        return arena

    family = trace_family(
        lambda: source.build("meta", dtype),
        lambda: source.example_inputs(case.batch, case.sequence, "cpu", dtype),
        lambda model: apply.prepare(model, planned),
        lambda model, batch: loss_of(model(**batch)),
        {name: partial(option, name) for name in ["keep", *sorted(used - {"keep"})]},
        no_time,
    )
    kept = planned.model_copy(update={"gradients": "step"})

    def make(parameters):
        named = [(str(i), p) for i, p in enumerate(parameters)]
        return apply.make_optimizer(named, kept, 1e-3, 0.0)

    life = Life(planned.gradients == "backward", case.accumulation)
    composer = Composer(family, life, UpdateCosts(make, no_time))
    choice = composer.uniform("keep")
    for path, runs in planned.blocks.items():
        choice |= {(path, i): option for i, option in enumerate(parse_runs(runs))}
    return family, composer.ledger(choice)


def measure(case: Case) -> tuple[Meter, Meter, DiskArena]:
    """One step at full depth, by both backends, after a step that warms up."""
    source, planned = case.source, case.planned
    dtype = getattr(torch, planned.dtype)
    model = apply.prepare(source.build("cpu", dtype), planned)
    disk = DiskArena(ROOM)
    apply.set_blocks(model, planned.blocks, {"disk": disk})
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    optimizer = apply.make_optimizer(named, planned, 1e-3, 0.0)
    batches = [
        source.example_inputs(case.batch, case.sequence, "cpu", dtype)
        for _ in range(case.accumulation)
    ]

    def step():
        for batch in batches:
            loss_of(model(**batch)).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    with Meter(model, optimizer, inputs=batches) as logical:
        step()
    with Meter(model, optimizer, inputs=batches, backend="allocator") as allocator:
        step()
    return logical, allocator, disk


@pytest.mark.parametrize("name", CASES)
def test_prediction_equals_measurement(name):
    case = CASES[name]
    _, predicted = predict(case)
    logical, allocator, disk = measure(case)
    phase = logical.ledger.peak_phase()
    assert predicted.peak_phase() == phase
    for category in ("parameters", "gradients", "optimizer"):
        cell = (0, "device", category, phase)
        assert predicted[cell] == logical.ledger[cell], category
    for measured in (logical.peak, allocator.peak):
        assert predicted.peak() == pytest.approx(measured, rel=WITHIN)
    assert predicted.peak("disk") == disk.peak_bytes


def test_most_cases_extend_at_most_three_blocks_to_eight_or_more():
    deep = 0
    for case in CASES.values():
        stacks = stacks_of(case.source.build())
        few = all(len(stack.kept) <= 3 for stack in stacks)
        deep += few and sum(stack.depth for stack in stacks) >= 8
    assert deep >= 0.5 * len(CASES)
