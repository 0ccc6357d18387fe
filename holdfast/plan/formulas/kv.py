"""Bytes of key-value caches and recurrent states, from a transformers config.

Per layer, B sequences of n tokens, H key-value heads of d elements, e bytes each:

    full        2*B*H*n*d*e
    sliding     2*B*H*min(n, w)*d*e for a window of w: a decoding step joins the w - 1 tokens that
                it keeps with the new one, and what it keeps is a view of that. Right after a
                prompt of n tokens all n are still held, for the same reason.
    latent      B*n*(rank + rope)*e: one shared latent and one rotary key (multi-head latent
                attention)
    recurrent   constant in n: a convolution's last inputs, and a state that is always fp32

Layers that share another's cache hold nothing. These are the bytes of transformers'
`DynamicCache`; a paged cache rounds n up to its pages.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from holdfast.errors import UsageError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def kv_bytes(
    config: "PretrainedConfig",
    batch: int,
    tokens: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    decoding: bool = True,
) -> int:
    """Bytes that the caches of all layers hold after `tokens` tokens.

    Args:
        dtype: of keys, values and what convolutions keep.
        decoding: at least one token was decoded since the prompt; else a sliding layer still holds
            the whole prompt.

    Raises:
        UsageError: sizes below 1, or recurrent layers of an architecture that is not known here.
    """
    return sum(kv_layers(config, batch, tokens, dtype, decoding=decoding))


def kv_layers(
    config: "PretrainedConfig",
    batch: int,
    tokens: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    decoding: bool = True,
) -> list[int]:
    """`kv_bytes` of each layer."""
    from transformers import DynamicCache

    for what, value in (("batch", batch), ("tokens", tokens)):
        if value < 1:
            raise UsageError(f"{what} {value} is not positive; use 1 or more")
    text = config.get_text_config(decoder=True)
    # An empty cache knows which layers slide, share, or keep a state.
    layers, found = DynamicCache(config=config).layers, []
    for layer, own in zip(layers, text.per_layer_config, strict=True):
        names = {kind.__name__ for kind in type(layer).__mro__}
        elements = state = 0
        if "DynamicLayer" in names:
            window = getattr(layer, "sliding_window", tokens) if decoding else tokens
            elements += min(tokens, window) * token_elements(own)
        if "LinearAttentionLayer" in names:
            inputs, state = _recurrent(own)
            elements += inputs
        found.append(batch * (elements * dtype.itemsize + state * torch.float32.itemsize))
    return found


def token_elements(config: Any) -> int:
    """Elements that one attention layer keeps for one token."""
    rank = getattr(config, "kv_lora_rank", None)
    if rank is not None:
        return rank + config.qk_rope_head_dim
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 2 * _kv_heads(config, heads) * size


def _kv_heads(config: Any, heads: int) -> int:
    if getattr(config, "multi_query", False) and not getattr(
        config, "new_decoder_architecture", False
    ):
        return 1
    for name in ("num_key_value_heads", "num_kv_heads"):
        found = getattr(config, name, None)
        if found is not None:
            return found
    return heads


def _recurrent(config: Any) -> tuple[int, int]:
    """Elements of one sequence in one recurrent layer: inputs of the convolution, state."""
    if config.model_type not in _STATES:
        raise UsageError(
            f"the recurrent state of {config.model_type!r} is not known, only that of "
            f"{', '.join(_STATES)}; trace_ops(source, 'serve', ...).resident of "
            "holdfast.plan.op_trace has it for any model"
        )
    return _STATES[config.model_type](config)


def _delta(c: Any) -> tuple[int, int]:
    keys = c.linear_num_key_heads * c.linear_key_head_dim
    values = c.linear_num_value_heads * c.linear_value_head_dim
    return (2 * keys + values) * c.linear_conv_kernel_dim, values * c.linear_key_head_dim


def _mamba(c: Any) -> tuple[int, int]:
    return c.intermediate_size * c.conv_kernel, c.intermediate_size * c.state_size


def _jamba(c: Any) -> tuple[int, int]:
    inner = c.mamba_expand * c.hidden_size
    return inner * c.mamba_d_conv, inner * c.mamba_d_state


def _mamba2(c: Any) -> tuple[int, int]:
    channels = c.expand * c.hidden_size + 2 * c.n_groups * c.state_size
    return channels * c.conv_kernel, c.num_heads * c.head_dim * c.state_size


def _bamba(c: Any) -> tuple[int, int]:
    channels = c.mamba_expand * c.hidden_size + 2 * c.mamba_n_groups * c.mamba_d_state
    return channels * c.mamba_d_conv, c.mamba_n_heads * c.mamba_d_head * c.mamba_d_state


_STATES: dict[str, Callable[[Any], tuple[int, int]]] = {
    "qwen3_next": _delta,
    "mamba": _mamba,
    "jamba": _jamba,
    "mamba2": _mamba2,
    "bamba": _bamba,
    "lfm2": lambda c: (c.hidden_size * c.conv_L_cache, 0),
}
