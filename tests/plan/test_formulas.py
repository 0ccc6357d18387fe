import re

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache

from holdfast.errors import UsageError
from holdfast.forms.dense import Dense
from holdfast.meter import StorageLog, fake_step
from holdfast.plan.formulas import galore, kv, megatron
from holdfast.plan.models import resolve
from holdfast.plan.op_trace import cache_tensors, trace_ops
from holdfast.training.adapters.lora import LoRA
from holdfast.training.optim import qgalore
from holdfast.training.optim.projector import Projector

# Megatron


class Block(nn.Module):
    """A GPT layer as the paper counts it: no fused attention, dropout, masks of one byte."""

    def __init__(self, h: int, a: int, selective: bool = False):
        super().__init__()
        self.a, self.selective = a, selective
        self.norm1, self.norm2 = nn.LayerNorm(h), nn.LayerNorm(h)
        self.qkv, self.out = nn.Linear(h, 3 * h), nn.Linear(h, h)
        self.up, self.down = nn.Linear(h, 4 * h), nn.Linear(4 * h, h)

    def core(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.baddbmm(
            q.new_zeros(1, 1, 1), q, k.mT, beta=0, alpha=q.shape[-1] ** -0.5
        ).softmax(-1)
        return torch.native_dropout(scores, 0.1, True)[0] @ v

    def forward(self, x: Tensor) -> Tensor:
        b, s, h = x.shape
        heads = self.qkv(self.norm1(x)).view(b, s, 3, self.a, h // self.a)
        # Megatron's products read heads as strided views, so nothing is copied there either.
        q, k, v = heads.permute(2, 0, 3, 1, 4).flatten(1, 2).unbind(0)
        if self.selective:
            y = checkpoint(self.core, q, k, v, use_reentrant=False, preserve_rng_state=False)
        else:
            y = self.core(q, k, v)
        y = self.out(y.view(b, self.a, s, -1).transpose(1, 2).reshape(b, s, h))
        x = x + torch.native_dropout(y, 0.1, True)[0]
        y = self.down(nn.functional.gelu(self.up(self.norm2(x))))
        return x + torch.native_dropout(y, 0.1, True)[0]


def saved_bytes(block: nn.Module, s: int, b: int, h: int, full: bool = False) -> int:
    """Bytes alive after the forward pass beside parameters and the output, by our storage log."""
    with fake_step():
        block = block.half()
        x = torch.empty(b, s, h, dtype=torch.float16, requires_grad=True)
        log = StorageLog()
        log.seed("parameters", list(block.parameters()))
        base = log.live_bytes()
        log.seed("inputs", x)
        with log:
            if full:
                y = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)
            else:
                y = block(x)
        return log.live_bytes() - base - y.numel() * y.element_size()


@pytest.mark.parametrize(("s", "b", "h", "a"), [(48, 3, 96, 6), (256, 1, 64, 4)])
def test_megatron_layer_equals_what_a_gpt_block_saves(s, b, h, a):
    statistics = 2 * 2 * s * b * 2  # mean and deviation of two norms, which the paper leaves out
    plain = saved_bytes(Block(h, a), s, b, h)
    assert plain == megatron.layer_activations(s, b, h, a) + statistics
    selective = saved_bytes(Block(h, a, selective=True), s, b, h)
    assert selective == megatron.layer_activations(s, b, h, a, recompute="selective") + statistics
    assert plain - selective == s * b * h * megatron.attention_term(s, h, a)
    full = saved_bytes(Block(h, a), s, b, h, full=True)
    assert full == megatron.layer_activations(s, b, h, a, recompute="full")


def test_megatron_layer_beside_the_trace_of_gpt2():
    s, b, h, a = 64, 2, 128, 4

    def resident(layers: int) -> int:
        source = resolve(
            {"model_type": "gpt2", "n_embd": h, "n_head": a, "n_layer": layers, "vocab_size": 64,
             "n_positions": s, "activation_function": "gelu"}
        )  # fmt: skip
        table = trace_ops(source, "pretrain", b, s, torch.float16, attention="eager")
        return table.resident["activations"]

    layer = resident(4) - resident(3)
    # On a CPU a dropout keeps its mask in fp16 instead of bytes: of the scores and twice of h.
    masks = a * s * s * b + 2 * s * b * h
    statistics = 2 * 2 * s * b * 2
    assert layer == megatron.layer_activations(s, b, h, a) + masks + statistics


def test_megatron_figures():
    s, b, h, a, t = 2048, 1, 12288, 96, 8
    assert megatron.attention_term(s, h, a) == 80
    sbh = s * b * h
    layer = megatron.layer_activations
    assert layer(s, b, h, a) == sbh * (34 + 80)
    assert layer(s, b, h, a, t=t) == sbh * (10 + 24 / t + 80 / t)
    assert layer(s, b, h, a, t=t, sequence_parallel=True) == sbh * (34 + 80) / t
    assert layer(s, b, h, a, t=t, sequence_parallel=True, recompute="selective") == 34 * sbh / t
    assert layer(s, b, h, a, t=t, recompute="full") == 2 * sbh
    assert megatron.interleaving(8, 4) == 1 + 7 / 32
    assert megatron.first_stage_activations(10, 96, 8, 3) == 960 * (1 + 7 / 24)
    assert megatron.first_stage_activations(10, 96, 8) == 960
    assert megatron.bytes_per_parameter() == 18
    assert megatron.bytes_per_parameter(8, distributed_optimizer=True) == 7.5


def test_megatron_refuses_what_does_not_divide():
    with pytest.raises(UsageError, match="h=100 must divide by a=3"):
        megatron.layer_activations(8, 1, 100, 3)
    with pytest.raises(UsageError, match="recompute 'selectiv'; nearest known: selective"):
        megatron.layer_activations(8, 1, 64, 4, recompute="selectiv")
    with pytest.raises(UsageError, match="10 layers do not divide into p=4"):
        megatron.first_stage_activations(1, 10, 4)


# GaLore and LoRA


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (16, 16)])
def test_galore_matrix_equals_the_optimizer_without_quantisation(shape, monkeypatch):
    monkeypatch.setattr(qgalore.QGaLoreAdamW, "basis_form", classmethod(lambda cls, c: Dense()))
    monkeypatch.setattr(qgalore, "MOMENTS", {"m": Dense(), "v": Dense()})
    weight = nn.Parameter(torch.randn(shape))
    optimizer = qgalore.QGaLoreAdamW([weight], rank=8)
    weight.grad = torch.randn(shape)
    optimizer.step()
    kept = optimizer.state[weight]
    states = sum(t.numel() for name, t in kept.items() if name not in ("step", "schedule"))
    want = galore.matrix(*shape, 8, "galore")
    assert (weight.numel(), states) == want
    m, n = sorted(shape)
    assert want.states == 8 * m + 2 * 8 * n
    basis = Projector.fit(weight.grad, 8)
    assert basis.basis.numel() + 2 * basis.down(weight.grad).numel() == want.states


@pytest.mark.parametrize("shape", [(12, 40), (40, 12)])
def test_lora_matrix_equals_the_adapter(shape):
    linear = nn.Linear(shape[1], shape[0], bias=False).requires_grad_(False)
    adapter = LoRA(linear, rank=4)
    trained = [p for p in adapter.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained)
    for p in trained:
        p.grad = torch.ones_like(p)
    optimizer.step()
    states = sum(s[k].numel() for s in optimizer.state.values() for k in ("exp_avg", "exp_avg_sq"))
    weights = sum(p.numel() for p in {id(p): p for p in adapter.parameters()}.values())
    assert (weights, states) == galore.matrix(*shape, 4, "lora")


# hidden, inner, layers, rank of the paper's models; totals of our own counting in GiB.
LLAMAS = {
    "60M": (512, 1376, 8, 128, 0.32, 0.26),
    "130M": (768, 2048, 12, 256, 0.75, 0.57),
    "350M": (1024, 2736, 24, 256, 2.06, 1.29),
    "1B": (2048, 5461, 24, 512, 7.48, 4.44),
}


@pytest.mark.parametrize("name", LLAMAS)
def test_galore_totals_by_our_own_counting(name):
    h, inner, layers, rank, full, low = LLAMAS[name]
    matrices = layers * ([(h, h)] * 4 + [(h, inner)] * 3)
    others = 2 * 32000 * h + (2 * layers + 1) * h
    assert round(galore.model_bytes(matrices, others, rank, "full") / 2**30, 2) == full
    assert round(galore.model_bytes(matrices, others, rank, "galore") / 2**30, 2) == low


def test_galore_refuses_a_rank_above_the_matrix():
    with pytest.raises(UsageError, match="rank 13 of a matrix 12 x 40 is outside 1 to 12"):
        galore.matrix(40, 12, 13, "galore")
    with pytest.raises(UsageError, match="unknown scheme"):
        galore.matrix(40, 12, 4, "dora")


# KV caches

_SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "vocab_size": 128,
    "num_hidden_layers": 3, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
_MLA = {
    "q_lora_rank": 32, "kv_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
    "v_head_dim": 12, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2,
    "topk_group": 1, "moe_intermediate_size": 32, "first_k_dense_replace": 1,
}  # fmt: skip
CACHES = {
    "full": ("llama", {"num_key_value_heads": 4}),
    "gpt2": ("gpt2", {}),
    "grouped": ("llama", {"num_key_value_heads": 2, "head_dim": 24}),
    "multi-query": ("falcon", {"multi_query": True, "new_decoder_architecture": False}),
    "sliding": ("mistral", {"num_key_value_heads": 2, "sliding_window": 7}),
    "sliding and full": (
        "gemma3_text",
        {"num_key_value_heads": 1, "head_dim": 16, "sliding_window": 5, "num_hidden_layers": 6,
         "layer_types": ["sliding_attention", "full_attention"] * 3},
    ),
    "latent": ("deepseek_v3", {"num_key_value_heads": 4} | _MLA),
    "mamba": ("mamba", {"state_size": 8}),
    "mamba2": ("mamba2", {"num_heads": 8, "head_dim": 16, "n_groups": 2, "state_size": 8}),
    "mamba and attention": (
        "jamba",
        {"num_key_value_heads": 2, "attn_layer_period": 2, "attn_layer_offset": 1,
         "expert_layer_period": 9, "mamba_d_state": 8},
    ),
    "mamba2 and attention": (
        "bamba",
        {"num_key_value_heads": 2, "attn_layer_indices": [1], "mamba_n_heads": 8,
         "mamba_d_head": 16, "mamba_d_state": 8},
    ),
    "delta rule and attention": (
        "qwen3_next",
        {"num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 4,
         "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
         "linear_value_head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2,
         "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    ),
    "convolution and attention": (
        "lfm2",
        {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention", "conv"]},
    ),
}  # fmt: skip


def held(cache: DynamicCache) -> int:
    """Bytes of the storages behind a cache, each once: a view keeps all that it is a view of."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in cache_tensors(cache)}
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("name", CACHES)
@torch.no_grad()
def test_kv_bytes_equal_the_cache_of_transformers(name):
    kind, more = CACHES[name]
    dtype = torch.bfloat16  # in which a state of fp32 shows
    config = CONFIG_MAPPING[kind](**(_SMALL | more))
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    argument = "cache_params" if kind in ("mamba", "mamba2") else "past_key_values"
    cache = DynamicCache(config=config)
    ids = torch.ones(2, 10, dtype=torch.long)
    model(input_ids=ids, use_cache=True, **{argument: cache})
    assert held(cache) == kv.kv_bytes(config, 2, 10, dtype, decoding=False)
    for n in (11, 12):
        model(input_ids=ids[:, :1], use_cache=True, **{argument: cache})
        assert held(cache) == kv.kv_bytes(config, 2, n, dtype)


def test_kv_figures():
    llama = resolve("llama-3.1-8b").config
    # 2 x 8 heads x 128 x 2 bytes x 32 layers = 128 KiB a token.
    assert kv.kv_bytes(llama, 1, 131072) == 16 * 2**30
    deepseek = CONFIG_MAPPING["deepseek_v3"]()
    assert kv.kv_bytes(deepseek, 1, 1) == (512 + 64) * 2 * 61
    with pytest.raises(UsageError, match="tokens 0 is not positive"):
        kv.kv_bytes(llama, 1, 0)
    hybrid = CONFIG_MAPPING["falcon_h1"](num_hidden_layers=2)
    with pytest.raises(UsageError, match=re.escape("state of 'falcon_h1' is not known, only that")):
        kv.kv_bytes(hybrid, 1, 4)
