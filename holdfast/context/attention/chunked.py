"""Attention "chunked" for stock Hugging Face models: exact, and no score is kept (113).

`use(model, "chunked")` switches a model; `model.set_attn_implementation("chunked")` does, too, once
this module is imported. Padding, sliding windows, decoders, encoders and additive position biases
are computed; bytes and sources are those of `holdfast.context.kernels`.
"""

from typing import Any

import torch
from torch import Tensor, nn

from holdfast.context.interface import Visible, register
from holdfast.context.kernels import attention_with_lse

NAME = "chunked"


def attend(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Visible,
    *,
    scaling: float,
    dropout: float = 0.0,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer, called by the model.

    Args:
        q: (B,Hq,n,d).
        k, v: (B,H,m,d) and (B,H,m,dv).
        position_bias: (1,Hq,n,m), what a model of T5's kind adds to its scores.

    Returns:
        (B,n,Hq,dv), and None: probabilities do not exist.
    """
    # From torch's generator, whose state checkpointing restores before it recomputes a block.
    seed = int(torch.randint(2**48, ())) if dropout else 0
    out, _lse = attention_with_lse(
        q, k, v, mask=visible.mask, bias=position_bias, scale=scaling, dropout=dropout, seed=seed
    )
    return out.transpose(1, 2), None


register(NAME, attend, terms=("position_bias",))
