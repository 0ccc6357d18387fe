"""Rotary positions against the models' own functions."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from holdfast.context.rope import Rope
from holdfast.errors import UsageError

SIZES = {
    "vocab_size": 32, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
KINDS = {
    "llama": {},
    "qwen2": {},
    "mistral": {},
    "cohere": {},
    "glm": {"head_dim": 16, "pad_token_id": 0},
    "gpt_neox": {"rotary_pct": 0.5},
    "phi": {"partial_rotary_factor": 0.5},
    "stablelm": {"partial_rotary_factor": 0.25},
}
SCALED = {
    "yarn": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4},
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32, "rope_theta": 1e4,
    },
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
}  # fmt: skip


def build(kind, **more):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(SIZES | KINDS.get(kind, {}) | more))
    return AutoModelForCausalLM.from_config(config).eval()


def rotated_by_model(model, ids, positions):
    """Keys of the first layer as the model's attention function is given them."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    seen = {}

    def spy(module, q, k, v, mask, **_):
        seen["k"] = k.detach()
        return q.transpose(1, 2), None

    AttentionInterface.register("test_spy", spy)
    AttentionMaskInterface.register("test_spy", sdpa_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation("test_spy")
    with torch.no_grad():
        model(ids, position_ids=positions)
    model.set_attn_implementation(before)
    return seen["k"]


def check(model, length=24):
    ids = torch.randint(32, (2, length))
    here = torch.arange(length)[None]
    zero = torch.zeros_like(here)
    keys, plain = (rotated_by_model(model, ids, p) for p in (here, zero))
    rope = Rope.from_model(model)
    # Rotation at 0 leaves only the scaling.
    torch.testing.assert_close(rope.rotate(rope.unrotate(plain, zero[:, None]), here[:, None]),
                               keys, atol=2e-6, rtol=1e-5)  # fmt: skip
    torch.testing.assert_close(
        rope.unrotate(keys, here[:, None]),
        rope.unrotate(plain, zero[:, None]),
        atol=2e-6,
        rtol=1e-5,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_every_layout_is_the_models_own(kind):
    check(build(kind))


@pytest.mark.parametrize("kind", SCALED)
def test_every_scaling_is_the_models_own(kind):
    check(build("llama", rope_parameters=SCALED[kind]))


def test_dynamic_frequencies_follow_the_length_asked():
    model = build("llama", rope_parameters=SCALED["dynamic"])
    short = Rope.from_model(model)
    long = short.at(256)
    positions = torch.arange(8)
    assert not torch.allclose(long.table(positions), short.table(positions))
    ids = torch.randint(32, (1, 256))
    rotated_by_model(model, ids, torch.arange(256)[None])
    # The model has now read 256 tokens; its module is live.
    assert torch.equal(long.table(positions), short.table(positions))
    assert torch.equal(short.at(8).table(positions), Rope.from_model(model).at(16).table(positions))


def test_sixteen_bits_and_positions_per_head():
    rope = Rope.from_model(build("llama"))
    x = torch.randn(2, 3, 5, 16)
    positions = torch.randint(1000, (2, 3, 5))
    want = torch.stack([
        torch.stack([rope.rotate(x[b : b + 1, h : h + 1], positions[b, h][None, None])[0, 0]
                     for h in range(3)]) for b in range(2)
    ])  # fmt: skip
    torch.testing.assert_close(rope.rotate(x, positions), want)
    half = rope.rotate(x.bfloat16(), positions)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), want, atol=3e-2, rtol=1e-2)


def test_learned_positions_are_refused():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(UsageError, match="GPT2LMHeadModel has no rotary positions"):
        Rope.from_model(model)
