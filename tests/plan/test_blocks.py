"""Stacks are found in any model, and a shallow copy stands for all of it."""

import pytest
import torch
from torch import nn

from holdfast.plan.blocks import (
    choose_kept,
    find_stacks,
    signature,
    stacks_of,
    truncate_,
    whole,
)
from holdfast.plan.models import loss_of, resolve


def config(kind: str, depth: int = 6, **fields) -> dict:
    small = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
        "num_hidden_layers": depth,
    }  # fmt: skip
    return {"model_type": kind, **small, **fields}


MODELS = {
    "llama": (config("llama", num_key_value_heads=2), {"model.layers": (0, 1, 5)}),
    "gpt2": (
        {"model_type": "gpt2", "vocab_size": 64, "n_embd": 32, "n_head": 4, "n_layer": 6},
        {"transformer.h": (0, 1, 5)},
    ),
    "opt": (
        config("opt", ffn_dim=48, word_embed_proj_dim=32),
        {"model.decoder.layers": (0, 1, 5)},
    ),
    "bert": (config("bert"), {"bert.encoder.layer": (0, 1, 5)}),
    "vit": (config("vit", image_size=16, patch_size=8), {"vit.layers": (0, 1, 5)}),
    "t5": (
        {
            "model_type": "t5", "vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48,
            "num_heads": 4, "num_layers": 5, "num_decoder_layers": 4, "pad_token_id": 0,
            "decoder_start_token_id": 0,
        },
        {"encoder.block": (0, 1, 4), "decoder.block": (0, 1, 3)},
    ),
    "gemma2": (
        config("gemma2", num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8),
        # Sliding and full attention alternate: one of each kind stands between the ends.
        {"model.layers": (0, 1, 2, 5)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_stacks_of_known_architectures(name):
    fields, expected = MODELS[name]
    model = resolve(fields).build()
    found = stacks_of(model)
    assert {stack.path: stack.kept for stack in found} == expected
    for stack in found:
        blocks = model.get_submodule(stack.path)
        assert stack.depth == len(blocks)
        for index, k in enumerate(stack.representative):
            assert signature(blocks[index]) == signature(blocks[stack.kept[k]])
        assert [stack.representative[real] for real in stack.kept] == list(range(len(stack.kept)))


@pytest.mark.parametrize("name", MODELS)
def test_a_shallow_copy_runs(name):
    source = resolve(MODELS[name][0])
    model = source.build("cpu")
    stacks = stacks_of(model)
    survivors = {s.path: [model.get_submodule(s.path)[i] for i in s.kept] for s in stacks}
    assert truncate_(model, stacks) is model
    for path, blocks in survivors.items():
        assert all(a is b for a, b in zip(model.get_submodule(path), blocks, strict=True))
    loss_of(model(**source.example_inputs(1, 8, "cpu"))).backward()


def test_ties_survive():
    model = resolve(config("llama", tie_word_embeddings=True)).build()
    truncate_(model, stacks_of(model))
    assert model.lm_head.weight is model.model.embed_tokens.weight


class Block(nn.Module):
    def __init__(self, width: int, layer_idx: int, rate: float = 0.0):
        super().__init__()
        self.layer_idx, self.rate = layer_idx, rate
        self.linear = nn.Linear(width, width)

    def forward(self, x):
        return x + self.linear(x)


def test_sequential_models():
    model = nn.Sequential(nn.Linear(3, 8), nn.Sequential(*(Block(8, i) for i in range(5))))
    assert find_stacks(model) == ["1"]
    truncate_(model, stacks_of(model))
    assert [block.layer_idx for block in model[1]] == [0, 1, 4]
    assert model(torch.ones(2, 3)).shape == (2, 8)


@pytest.mark.parametrize(
    "model",
    [
        nn.Linear(2, 2),
        nn.Sequential(nn.Linear(2, 2), nn.ReLU()),
        nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]),
        nn.ModuleList([Block(2, 0)]),
        nn.Sequential(nn.ReLU(), nn.ReLU()),
    ],
    ids=["no list", "unlike", "leaves", "one", "no parameters"],
)
def test_models_without_stacks(model):
    assert stacks_of(model) == []
    before = list(model.modules())
    assert list(truncate_(model, []).modules()) == before


def test_a_list_inside_a_block_is_no_stack():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.ModuleList(Block(4, i) for i in range(3))

    model = nn.ModuleDict({"layers": nn.ModuleList(Outer() for _ in range(3))})
    assert find_stacks(model) == ["layers"]


def test_signatures_tell_blocks_apart():
    base = signature(Block(8, 0))
    assert signature(Block(8, 7)) == base, "a number is no difference"
    assert signature(Block(8, 0, rate=0.1)) != base
    assert signature(Block(16, 0)) != base
    frozen = Block(8, 0)
    frozen.linear.weight.requires_grad_(False)
    assert signature(frozen) != base
    assert signature(Block(8, 0).to(torch.bfloat16)) != base
    buffered = Block(8, 0)
    buffered.register_buffer("table", torch.zeros(2))
    assert signature(buffered) != base


@pytest.mark.parametrize(
    ("kinds", "kept", "representative"),
    [
        ("a", (0,), (0,)),
        ("aa", (0, 1), (0, 1)),
        ("aaaaa", (0, 1, 4), (0, 1, 1, 1, 2)),
        ("ababab", (0, 1, 2, 5), (0, 1, 2, 1, 2, 3)),
        ("aabba", (0, 1, 2, 4), (0, 1, 2, 2, 3)),
    ],
)
def test_which_blocks_are_kept(kinds, kept, representative):
    stack = choose_kept([(kind,) for kind in kinds])
    assert stack.kept == kept and stack.representative == representative
    (all_of_it,) = whole([stack])
    assert all_of_it.kept == all_of_it.representative == tuple(range(len(kinds)))
