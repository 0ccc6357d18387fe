"""BigBird (072): block-sparse attention of a window, global blocks and random blocks.

Keeps    q, k, v, the output and one log-sum-exp per query for backward; no score. With w, g and r
         blocks of k tokens a query reads (w+g+r)*k keys; queries of global blocks read all.
Form     inputs and output in their dtype; the lists of blocks are integers, one for each layer.
Bytes    b*(2*B*Hq*n*d + 2*B*H*n*d) + 4*B*Hq*n per layer for backward, n rounded up to blocks; while
         it runs, panels of at most n keys and values per query head. Lists of blocks: at most
         4*Hq*(n/k)*(w+g+r), in host memory.
Source   Zaheer, Guruganesh, Dubey, Ainslie, Alberti, Ontanon, Pham, Ravula, Wang, Yang, Ahmed, "Big
         Bird: Transformers for Longer Sequences", NeurIPS 2020; transformers' BigBirdModel was read
         to compare with it.
Departs  the internal form (ITC) alone: the extended one adds tokens, which is no matter of an
         attention function. Rows next to a global block see w+g+r-1 blocks, as in the published
         code, because window and global blocks overlap there. Random blocks are drawn from all
         others and are the same in training and evaluation; transformers draws them from the
         beginning of the sequence, and in evaluation counts the first block r more times instead.
"""

import functools
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import bidirectional_mask_function

from holdfast.context.interface import Use, Visible, register, use
from holdfast.context.kernels import attention_with_lse
from holdfast.context.panels import panel_attention
from holdfast.context.patterns import BlockPattern
from holdfast.errors import UsageError

NAME = "bigbird"
_FLEX_BLOCKS = (16, 32, 64, 128)


def bigbird_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: BlockPattern,
    *,
    layer: int = 0,
    valid: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """Attention of every block to the blocks that the pattern gives it; full for short inputs.

    Args:
        q: (B,Hq,n,d).
        k, v: (B,H,n,d) and (B,H,n,dv) with Hq a multiple of H.
        layer: of the random blocks, with the pattern's seed.
        valid: (B,n) bool, False for keys that are padding.
        scale: of the scores; d ** -0.5 by default.
        dropout: share of probabilities that are dropped after the softmax; `seed` decides which.

    Returns:
        (B,Hq,n,dv) in q's dtype.

    Warns:
        where so few blocks are given that attention is full.
    """
    heads, n = q.shape[1:3]
    blocks = -(-n // pattern.block)
    if pattern.is_full(blocks):
        warnings.warn(
            f"{n} tokens are {blocks} blocks of {pattern.block}: up to "
            f"{pattern.width + pattern.random} blocks every token attends to all",
            stacklevel=2,
        )
        mask = None if valid is None else valid[:, None, None]
        out, _ = attention_with_lse(q, k, v, mask=mask, scale=scale, dropout=dropout, seed=seed)
        return out
    if choose_path(q, pattern, dropout) == "flex":
        return _flex(q, k, v, pattern, layer, valid, scale)
    panels = pattern.panels(blocks, heads, layer)
    out, _ = panel_attention(
        q, k, v, panels, pattern.block, valid=valid, scale=scale, dropout=dropout, seed=seed
    )
    return out


def choose_path(q: Tensor, pattern: BlockPattern, dropout: float = 0.0) -> str:
    """ "flex" where torch compiles flex attention for these blocks, else "panels"."""
    fits = q.device.type == "cuda" and pattern.block in _FLEX_BLOCKS and not dropout
    return "flex" if fits else "panels"


def bigbird(model: PreTrainedModel, pattern: BlockPattern | None = None) -> Use:
    """Switch an encoder to BigBird's attention; `remove()` switches back.

    Raises:
        UsageError: a decoder, a causal pattern, or a model whose attention cannot be replaced.
    """
    pattern = BlockPattern() if pattern is None else pattern
    if getattr(model.config, "is_decoder", False) or pattern.causal:
        raise UsageError(
            f"{type(model).__name__} with causal={pattern.causal}: BigBird's attention is "
            "bidirectional, its global blocks would show a decoder the future; give an encoder and "
            "a pattern with causal=False"
        )
    if pattern == BlockPattern():
        return use(model, NAME)
    sizes = (pattern.block, pattern.window, pattern.global_, pattern.random, pattern.seed)
    name = "_".join(map(str, (NAME, *sizes)))
    register(name, functools.partial(attend, pattern=pattern))
    return use(model, name)


def attend(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Visible,
    *,
    scaling: float,
    dropout: float = 0.0,
    pattern: BlockPattern = BlockPattern(),
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer, called by the model; returns (B,n,Hq,dv) and no probabilities.

    Raises:
        UsageError: a mask that is more than padding, or keys of another sequence.
    """
    if visible.given is not None or visible.sees is not bidirectional_mask_function:
        raise UsageError(
            f"{type(module).__name__} hides more than padding from its queries; BigBird's attention"
            " is bidirectional and takes an attention_mask of (B,n) alone"
        )
    # From torch's generator, whose state checkpointing restores before it recomputes a block.
    seed = int(torch.randint(2**31, ())) if dropout else 0
    out = bigbird_attention(
        q, k, v, pattern, layer=getattr(module, "layer_idx", None) or 0, valid=visible.valid,
        scale=scaling, dropout=dropout, seed=seed,
    )  # fmt: skip
    return out.transpose(1, 2), None


def _flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: BlockPattern,
    layer: int,
    valid: Tensor | None,
    scale: float | None,
) -> Tensor:
    mask = pattern.block_mask(q.shape[2], q.shape[1], layer, valid=valid, device=q.device)
    # The kernel's own tiles may be larger than a block, and then it refuses the mask.
    tiles = ("BLOCK_M", "BLOCK_N", "BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2")
    options = dict.fromkeys(tiles, min(pattern.block, 64))
    return _compiled()(
        q, k, v, block_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1],
        kernel_options=options,
    )  # fmt: skip


@functools.cache
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


register(NAME, attend)
