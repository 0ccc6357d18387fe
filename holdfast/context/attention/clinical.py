"""Clinical-Longformer and Clinical-BigBird (057): a short encoder that reads 4,096 tokens.

Keeps    per layer for backward q, k, v, the output and a log-sum-exp per query; no score. A token
         reads `window` neighbours (Longformer) or the blocks of a pattern (BigBird), and tokens
         that are marked as global.
Form     the model's dtype. Positions are a longer table, with the rows of the short one repeated.
Bytes    max_len*D*b for positions; Longformer: 3*(D*D+D)*b per layer for the projections of global
         tokens. Activations of attention per layer: b*4*B*n*D + 4*B*Hq*n without global tokens,
         n rounded up to blocks.
Source   Li, Wehbe, Ahmad, Wang, Luo, "Clinical-Longformer and Clinical-BigBird: Transformers for
         long clinical sequences", 2022; Beltagy, Peters, Cohan, "Longformer: The Long-Document
         Transformer", 2020. transformers' LongformerModel and BigBirdModel were read, because
         `to_stock` writes models of these classes.
Departs  transformers' BigBirdModel has no random blocks in evaluation: it counts the first block
         once more for each of them. So does a lengthened BigBird, always, so that the directory
         computes in plain transformers what was trained. Random blocks are those of 072.
"""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    BigBirdConfig,
    BigBirdForMaskedLM,
    BigBirdModel,
    LongformerConfig,
    LongformerForMaskedLM,
    LongformerModel,
    PreTrainedModel,
)
from transformers.masking_utils import bidirectional_mask_function

from holdfast import attach
from holdfast.context.interface import Visible, register, use
from holdfast.context.kernels import attention_with_lse, merge_lse
from holdfast.context.panels import panel_attention
from holdfast.context.patterns import BlockPattern, Panel, sliding_panels
from holdfast.errors import UsageError, unknown

ATTENTIONS = ("longformer", "bigbird")
# Encoders with one table of absolute positions and modules of the same names; from which row the
# table is read depends on the padding token in all but BERT.
_FAMILIES = {"bert": False, "roberta": True, "xlm-roberta": True, "camembert": True}
_PROJECTIONS = ("query", "key", "value")
_SAME = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
    "hidden_act", "hidden_dropout_prob", "attention_probs_dropout_prob", "type_vocab_size",
    "initializer_range", "layer_norm_eps", "pad_token_id", "bos_token_id", "eos_token_id",
    "tie_word_embeddings",
)  # fmt: skip


@dataclass(frozen=True)
class Lengthened:
    """What `lengthen` did, kept as `model.lengthened`; `size` is the window or the block."""

    attention: str
    max_len: int
    size: int


def lengthen(
    model: PreTrainedModel,
    attention: str = "longformer",
    max_len: int = 4096,
    *,
    window: int = 512,
    block: int = 64,
) -> PreTrainedModel:
    """Give a short encoder `max_len` positions and attention whose memory is linear, in place.

    Inputs that fit into the window (n <= window / 2 + 1 tokens for Longformer, 11 blocks for
    BigBird) give what they gave before. A Longformer takes `global_attention_mask` (B,n), 1 for
    tokens that see all and are seen by all, through other projections; these begin as copies.

    Args:
        model: of the families BERT, RoBERTa, XLM-RoBERTa or CamemBERT, with any head.
        window: tokens that one token of a Longformer sees, half of them on either side.
        block: tokens in a block of a BigBird, which has a window of 3, 2 global and 3 random.

    Returns:
        the same model.

    Raises:
        UsageError: a model of another family, a decoder, or lengths that do not go together.
    """
    if attention not in ATTENTIONS:
        raise unknown("attention", attention, ATTENTIONS)
    base, first = _encoder(model)
    size = window if attention == "longformer" else block
    if window < 2 or window % 2:
        raise UsageError(f"window={window} cannot lie evenly around a token; use an even number")
    short = base.embeddings.position_embeddings.num_embeddings - first
    if max_len <= short:
        raise UsageError(
            f"max_len={max_len} is no more than the {short} positions of {type(model).__name__}; "
            "give more"
        )
    _repeat_positions(base, first, max_len)
    if attention == "longformer":
        for layer in base.encoder.layer:
            _add_global(layer.attention.self)
        attend = functools.partial(_attend_longformer, reach=window // 2)
    else:
        attend = functools.partial(_attend_bigbird, pattern=BlockPattern(block))
    name = f"lengthened_{attention}_{size}"
    register(name, attend)
    use(model, name)
    marked: Any = model
    marked.lengthened = Lengthened(attention, max_len, size)
    return model


def lengthened(model: PreTrainedModel) -> Lengthened:
    """What `lengthen` did to this model.

    Raises:
        UsageError: nothing.
    """
    done: Any = getattr(model, "lengthened", None)
    if done is None:
        raise UsageError(f"this {type(model).__name__} was not lengthened; call lengthen first")
    return done


def _encoder(model: PreTrainedModel) -> tuple[Any, int]:
    """The model without its head, and the row of its table that holds position 0."""
    name, config = type(model).__name__, model.config
    if hasattr(model, "lengthened"):
        raise UsageError(f"this {name} was lengthened to {lengthened(model).max_len} already")
    if getattr(config, "model_type", None) not in _FAMILIES:
        raise UsageError(
            f"{name} cannot be lengthened: it needs a table of absolute positions and attention "
            f"that can be replaced, as in models of type {', '.join(_FAMILIES)}; "
            f"this one is {getattr(config, 'model_type', 'unknown')!r}"
        )
    kind = getattr(config, "position_embedding_type", None) or "absolute"
    if kind != "absolute":
        raise UsageError(
            f"{name} has position_embedding_type={kind!r}: without a table of absolute positions "
            "there is nothing to repeat"
        )
    if config.is_decoder:
        raise UsageError(
            f"{name} is a decoder (is_decoder=True); windows on both sides would show it the future"
        )
    first = config.pad_token_id + 1 if _FAMILIES[config.model_type] else 0
    return model.base_model, first


@torch.no_grad()
def _repeat_positions(base: Any, first: int, max_len: int) -> None:
    """Rows of positions 0, 1, ... again and again; rows before them, such as padding's, once."""
    embeddings = base.embeddings
    old = embeddings.position_embeddings
    body = old.weight[first:]
    times = -(-max_len // len(body))
    table = torch.cat([old.weight[:first], body.repeat(times, 1)[:max_len]])
    new = nn.Embedding.from_pretrained(
        table, freeze=not old.weight.requires_grad, padding_idx=old.padding_idx
    )
    embeddings.position_embeddings = new
    rows = torch.arange(len(table), device=table.device)[None]
    embeddings.register_buffer("position_ids", rows, persistent=False)
    embeddings.register_buffer("token_type_ids", torch.zeros_like(rows), persistent=False)
    # RoBERTa's table counts the rows that no token reads.
    base.config.max_position_embeddings = len(table)


def _add_global(attention: Any) -> None:
    for name in _PROJECTIONS:
        own = getattr(attention, name)
        twin = nn.Linear(
            own.in_features, own.out_features, device=own.weight.device, dtype=own.weight.dtype
        )
        attach.add(attention, f"{name}_global", twin.train(own.training))
    _copy_projections(attention)
    attach.wrap(attention, _with_states)


def _with_states(forward: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    # Attention functions are given queries; those of global tokens come from the states.
    return forward(hidden_states, *args, states=hidden_states, **kwargs)


@torch.no_grad()
def _copy_projections(attention: Any) -> None:
    for name in _PROJECTIONS:
        twin = getattr(attention, f"{name}_global")
        twin.load_state_dict(getattr(attention, name).state_dict())


def copy_global(model: PreTrainedModel) -> None:
    """Make the projections of global tokens copies again, after training without such tokens.

    No gradient reaches them there, so that they would stay behind the others.
    """
    base: Any = model.base_model
    if lengthened(model).attention == "longformer":
        for layer in base.encoder.layer:
            _copy_projections(layer.attention.self)


def _padding(module: nn.Module, visible: Visible) -> Tensor | None:
    if visible.given is not None or visible.sees is not bidirectional_mask_function:
        raise UsageError(
            f"{type(module).__name__} hides more than padding; a lengthened encoder takes an "
            "attention_mask of (B,n) alone"
        )
    return visible.valid


def _seed(dropout: float) -> int:
    # From torch's generator, whose state checkpointing restores before it recomputes a block.
    return int(torch.randint(2**31, ())) if dropout else 0


def _attend_longformer(
    module: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Visible,
    *,
    reach: int,
    scaling: float,
    states: Tensor,
    dropout: float = 0.0,
    global_attention_mask: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    n, valid = q.shape[2], _padding(module, visible)
    block = min(reach, n)
    panels = sliding_panels(-(-n // block), block, block)
    options: dict[str, Any] = {"scale": scaling, "dropout": dropout}
    marked = None
    if global_attention_mask is not None:
        marked = global_attention_mask > 0 if valid is None else (global_attention_mask > 0) & valid
    if marked is None or not marked.any():
        out, _lse = panel_attention(
            q, k, v, panels, block, valid=valid, seed=_seed(dropout), **options
        )
        return out.transpose(1, 2), None
    # Global keys are apart, so that none counts twice in the softmax.
    near = ~marked if valid is None else valid & ~marked
    local = panel_attention(q, k, v, panels, block, valid=near, seed=_seed(dropout), **options)
    count = int(marked.sum(1).max())
    at = marked.int().argsort(dim=1, descending=True, stable=True)[:, :count]
    real = marked.gather(1, at)  # (B,g), False where a row of the batch has fewer
    index = at[:, None, :, None]
    some = [x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3])) for x in (k, v)]
    mask = real[:, None, None]
    far = attention_with_lse(q, *some, mask=mask, seed=_seed(dropout), **options)
    out, _lse = merge_lse([local, far])

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (q.shape[1], -1)).transpose(1, 2)

    chosen = states.gather(1, at[..., None].expand(-1, -1, states.shape[2]))
    unpadded = None if valid is None else valid[:, None, None]
    whole, _lse = attention_with_lse(
        heads(module.query_global(chosen)), heads(module.key_global(states)),
        heads(module.value_global(states)), mask=unpadded, seed=_seed(dropout), **options,
    )  # fmt: skip
    index = index.expand(-1, out.shape[1], -1, out.shape[3])
    rows = torch.where(real[:, None, :, None], whole, out.gather(2, index))
    return out.scatter(2, index, rows).transpose(1, 2), None


def _attend_bigbird(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Visible,
    *,
    pattern: BlockPattern,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    valid = _padding(module, visible)
    options: dict[str, Any] = {"scale": scaling, "dropout": dropout, "seed": _seed(dropout)}
    blocks = -(-q.shape[2] // pattern.block)
    if pattern.is_full(blocks):
        mask = None if valid is None else valid[:, None, None]
        out, _lse = attention_with_lse(q, k, v, mask=mask, **options)
    else:
        panels = _stock_panels(pattern, blocks)
        out, _lse = panel_attention(q, k, v, panels, pattern.block, valid=valid, **options)
    return out.transpose(1, 2), None


@functools.lru_cache(maxsize=64)
def _stock_panels(pattern: BlockPattern, blocks: int) -> list[Panel]:
    """With the first block where random ones would be: transformers in evaluation."""
    first = np.zeros((1, blocks, pattern.random), np.int32)
    return pattern.panels(blocks, 1, random=first)


def to_stock(model: PreTrainedModel) -> PreTrainedModel:
    """A lengthened model as transformers' own Longformer or BigBird, with copied weights.

    What it saves opens with `AutoModel` and `AutoModelForMaskedLM`, without Holdfast. Longformer
    counts positions past padding, so that for BERT padding belongs on the right.

    Raises:
        UsageError: a head that these classes do not share, or another activation than they have.
    """
    done = lengthened(model)
    masked_lm = type(model).__name__.endswith("ForMaskedLM")
    if not masked_lm and model is not model.base_model:
        raise UsageError(
            f"{type(model).__name__} has a head that {done.attention} has in another form; lengthen"
            " the model without it or its ForMaskedLM, save that, and put the head on what "
            "AutoModelFor... opens"
        )
    config = model.config
    if masked_lm and config.hidden_act != "gelu":
        raise UsageError(
            f"{type(model).__name__} has hidden_act={config.hidden_act!r}, the head of a stock "
            f"{done.attention} needs 'gelu'; write the base model alone"
        )
    fields = {name: getattr(config, name) for name in _SAME}
    longformer = done.attention == "longformer"
    kinds: Any = (LongformerModel, LongformerForMaskedLM)
    own: Any
    if longformer:
        own = LongformerConfig(
            **fields,
            attention_window=done.size,
            max_position_embeddings=done.max_len + config.pad_token_id + 1,
            sep_token_id=getattr(config, "sep_token_id", config.eos_token_id),
        )
    else:
        kinds = (BigBirdModel, BigBirdForMaskedLM)
        own = BigBirdConfig(
            **fields,
            block_size=done.size,
            num_random_blocks=BlockPattern().random,
            max_position_embeddings=done.max_len,
            classifier_dropout=config.classifier_dropout,
            sep_token_id=getattr(config, "sep_token_id", config.eos_token_id),
        )
    pooled = model.base_model.pooler is not None
    with torch.random.fork_rng(devices=[]):
        # What the source lacks, a pooler, begins at random: the same for everyone.
        torch.manual_seed(0)
        stock = kinds[masked_lm](own) if masked_lm else kinds[0](own, add_pooling_layer=pooled)
    missing, surplus = stock.load_state_dict(_renamed(model, stock, longformer), strict=False)
    missing = [name for name in missing if ".pooler." not in name]
    assert not missing and not surplus, (missing, surplus)
    weight = model.get_input_embeddings().weight
    return stock.to(weight.device, weight.dtype).train(model.training)


def _renamed(model: PreTrainedModel, stock: PreTrainedModel, longformer: bool) -> dict[str, Tensor]:
    """The model's tensors under the names that they have in the stock class."""
    config, state = model.config, {}
    masked_lm = model is not model.base_model
    before = f"{model.base_model_prefix}." if masked_lm else ""
    after = f"{stock.base_model_prefix}." if masked_lm else ""
    heads = {
        "cls.predictions.transform.dense": "lm_head.dense",
        "cls.predictions.transform.LayerNorm": "lm_head.layer_norm",
        "cls.predictions.decoder": "lm_head.decoder",
        "cls.predictions.bias": "lm_head.bias",
    }
    if not longformer:
        heads = {roberta: bert for bert, roberta in heads.items()}
    for name, tensor in model.state_dict().items():
        if masked_lm and not name.startswith(before):
            for old, new in heads.items():
                name = name.replace(old, new)
            state[name] = tensor
            continue
        name = name.removeprefix(before)
        if name == "embeddings.position_embeddings.weight":
            first = config.pad_token_id + 1 if _FAMILIES[config.model_type] else 0
            wanted = config.pad_token_id + 1 if longformer else 0
            # Rows before position 0 are of padding alone, whatever they hold.
            tensor = torch.cat([tensor.new_zeros(wanted, tensor.shape[1]), tensor[first:]])
        elif not longformer:
            name = name.replace("pooler.dense.", "pooler.")
        state[after + name] = tensor
    return state
