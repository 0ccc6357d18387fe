"""Public model shapes that need no network: the fields of each published config.json.

`hub` names the repository whose config.json is restated here. Fields equal to the architecture's
default in transformers are left out. `parameters` is the published total with tied weights
counted once; the tests count it again on the meta device.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Shape:
    """One published model: its config.json fields and its number of parameters."""

    name: str
    hub: str
    parameters: int
    config: dict[str, Any]
    aliases: tuple[str, ...] = field(default=())


def _llama3(hidden: int, inner: int, layers: int, heads: int, head: int, **more: Any) -> dict:
    """Llama 3.1 and 3.2 share vocabulary, RoPE base and its stretching, but not the factor."""
    factor = more.pop("rope_factor")
    return {
        "model_type": "llama",
        "dtype": "bfloat16",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 128256,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": head,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        **more,
    }


def _qwen25(hidden: int, inner: int, layers: int, heads: int, kv: int, **more: Any) -> dict:
    return {
        "model_type": "qwen2",
        "dtype": "bfloat16",
        "architectures": ["Qwen2ForCausalLM"],
        "vocab_size": 152064,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "max_position_embeddings": 131072,
        "max_window_layers": layers,
        "use_sliding_window": False,
        "sliding_window": 131072,
        "rms_norm_eps": 1e-6,
        "bos_token_id": 151643,
        "eos_token_id": 151643,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        **more,
    }


def _opt(hidden: int, inner: int, layers: int, heads: int) -> dict:
    return {
        "model_type": "opt",
        "architectures": ["OPTForCausalLM"],
        "vocab_size": 50272,
        "hidden_size": hidden,
        "word_embed_proj_dim": hidden,
        "ffn_dim": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 2048,
        "dropout": 0.1,
        "attention_dropout": 0.0,
        "layerdrop": 0.0,
        "do_layer_norm_before": True,
        "bos_token_id": 2,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }


def _bert(hidden: int, inner: int, layers: int, heads: int) -> dict:
    return {
        "model_type": "bert",
        "architectures": ["BertForMaskedLM"],
        "vocab_size": 30522,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "pad_token_id": 0,
    }


SHAPES = (
    Shape(
        "gpt2",
        "openai-community/gpt2",
        124_439_808,
        {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "vocab_size": 50257,
            "n_positions": 1024,
            "n_embd": 768,
            "n_layer": 12,
            "n_head": 12,
            "resid_pdrop": 0.1,
            "embd_pdrop": 0.1,
            "attn_pdrop": 0.1,
        },
        ("gpt2-124m", "gpt2-small", "gpt-2", "gpt-2-124m"),
    ),
    Shape(
        "tinyllama-1.1b",
        "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
        1_100_048_384,
        {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": 32000,
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 22,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
        },
        ("tinyllama", "tiny-llama-1.1b"),
    ),
    Shape(
        "llama-3.2-1b",
        "meta-llama/Llama-3.2-1B",
        1_235_814_400,
        _llama3(2048, 8192, 16, 32, 64, rope_factor=32.0, tie_word_embeddings=True),
        ("llama3.2-1b",),
    ),
    Shape(
        "llama-3.2-3b",
        "meta-llama/Llama-3.2-3B",
        3_212_749_824,
        _llama3(3072, 8192, 28, 24, 128, rope_factor=32.0, tie_word_embeddings=True),
        ("llama3.2-3b",),
    ),
    Shape(
        "llama-3.1-8b",
        "meta-llama/Llama-3.1-8B",
        8_030_261_248,
        _llama3(4096, 14336, 32, 32, 128, rope_factor=8.0),
        ("llama3.1-8b", "meta-llama/Meta-Llama-3.1-8B"),
    ),
    Shape(
        "llama-3.1-70b",
        "meta-llama/Llama-3.1-70B",
        70_553_706_496,
        _llama3(8192, 28672, 80, 64, 128, rope_factor=8.0),
        ("llama3.1-70b", "meta-llama/Meta-Llama-3.1-70B"),
    ),
    Shape(
        "qwen2.5-0.5b",
        "Qwen/Qwen2.5-0.5B",
        494_032_768,
        _qwen25(
            896,
            4864,
            24,
            14,
            2,
            vocab_size=151936,
            max_position_embeddings=32768,
            sliding_window=32768,
            tie_word_embeddings=True,
        ),
        ("qwen-2.5-0.5b",),
    ),
    Shape(
        "qwen2.5-7b",
        "Qwen/Qwen2.5-7B",
        7_615_616_512,
        _qwen25(3584, 18944, 28, 28, 4),
        ("qwen-2.5-7b",),
    ),
    Shape(
        "qwen2.5-32b",
        "Qwen/Qwen2.5-32B",
        32_763_876_352,
        _qwen25(5120, 27648, 64, 40, 8, rms_norm_eps=1e-5),
        ("qwen-2.5-32b",),
    ),
    Shape(
        "mistral-7b",
        "mistralai/Mistral-7B-v0.1",
        7_241_732_096,
        {
            "model_type": "mistral",
            "dtype": "bfloat16",
            "architectures": ["MistralForCausalLM"],
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 32768,
            "sliding_window": 4096,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        ("mistral-7b-v0.1",),
    ),
    Shape(
        "gemma-2-2b",
        "google/gemma-2-2b",
        2_614_341_888,
        {
            "model_type": "gemma2",
            "architectures": ["Gemma2ForCausalLM"],
            "vocab_size": 256000,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "max_position_embeddings": 8192,
            "sliding_window": 4096,
            "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "tie_word_embeddings": True,
        },
        ("gemma2-2b",),
    ),
    Shape(
        "phi-3-mini",
        "microsoft/Phi-3-mini-4k-instruct",
        3_821_079_552,
        {
            "model_type": "phi3",
            "dtype": "bfloat16",
            "architectures": ["Phi3ForCausalLM"],
            "vocab_size": 32064,
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "sliding_window": 2047,
            "rms_norm_eps": 1e-5,
            "eos_token_id": 32000,
            "pad_token_id": 32000,
        },
        ("phi3-mini", "phi-3-mini-4k", "phi-3-mini-4k-instruct"),
    ),
    Shape("opt-125m", "facebook/opt-125m", 125_239_296, _opt(768, 3072, 12, 12)),
    Shape("opt-1.3b", "facebook/opt-1.3b", 1_315_758_080, _opt(2048, 8192, 24, 32)),
    Shape(
        "bert-base",
        "google-bert/bert-base-uncased",
        109_514_298,
        _bert(768, 3072, 12, 12),
        ("bert-base-uncased",),
    ),
    Shape(
        "bert-large",
        "google-bert/bert-large-uncased",
        335_174_458,
        _bert(1024, 4096, 24, 16),
        ("bert-large-uncased",),
    ),
    Shape(
        "vit-b-16",
        "google/vit-base-patch16-224",
        86_567_656,
        {
            "model_type": "vit",
            "architectures": ["ViTForImageClassification"],
            "image_size": 224,
            "patch_size": 16,
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "num_labels": 1000,
        },
        ("vit-b/16", "vit-base", "vit-base-patch16-224"),
    ),
    Shape(
        "t5-small",
        "google-t5/t5-small",
        60_506_624,
        {
            "model_type": "t5",
            "architectures": ["T5ForConditionalGeneration"],
            "vocab_size": 32128,
            "d_model": 512,
            "d_kv": 64,
            "d_ff": 2048,
            "num_layers": 6,
            "num_heads": 8,
            "dropout_rate": 0.1,
            "decoder_start_token_id": 0,
            "is_encoder_decoder": True,
        },
    ),
)


def find_shape(name: str) -> Shape | None:
    """The shape called `name`, by name, alias or hub id in any case; None if there is none."""
    wanted = name.lower()
    for shape in SHAPES:
        if wanted in (alias.lower() for alias in (shape.name, shape.hub, *shape.aliases)):
            return shape
    return None
