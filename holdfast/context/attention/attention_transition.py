"""Attention Transition (112): layer by layer, earlier blocks of a long prompt are attended more.

Keeps    nothing; probabilities exist for the edited rows of one layer at a time.
Form     probabilities fp32 (fp64 for fp64); output in the dtype of the inputs.
Bytes    temporary, beside exact attention: at most (4+2)*B*Hq*r*m for r = max(block, tail) rows and
         m keys, whereof 4 are probabilities; for 16-bit floats k and v in fp32, too.
Source   Gao, Wang, Fang, Hu, Cheng, "Empower Your Model with Longer and Better Context
         Comprehension", 2023; constants are those of the later released version. No code was read.
Departs  rows of every batch entry are edited, places are counted without padding, rows of the tail
         are edited once per layer, and nothing moves to a key that a query does not see.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import bidirectional_mask_function

from holdfast.context.interface import Use, Visible, register, use
from holdfast.context.kernels import attention_with_lse, per_key_head
from holdfast.errors import UsageError

NAME = "attention_transition"


class Edit(NamedTuple):
    """Rows [rows[0], rows[1]) give weights below `threshold` to the keys of `columns`."""

    rows: tuple[int, int]
    columns: tuple[int, int]
    threshold: float


@dataclass(frozen=True)
class AttentionTransition:
    """Which weights move, and where to; places are counted from the first token that is no padding.

    Args:
        begin: leading tokens that belong to no block.
        tail: last tokens, which collect what the blocks have gathered.
        divide: if given, the tail is n // divide tokens instead.
        threshold: weights below this share of uniform attention are moved; 0 moves nothing.
        strong, weak: shares, within the block, of keys with a weight above or below the threshold.
        factor: times the moved weight; rows sum to 1 with 1.0, to more with more.

    Raises:
        UsageError: a value that is out of its range.
    """

    begin: int = 5
    tail: int = 50
    divide: int | None = None
    threshold: float = 0.5
    strong: float = 100.0
    weak: float = 5.0
    factor: float = 1.0

    def __post_init__(self) -> None:
        if self.begin < 0 or self.tail < 1 or (self.divide is not None and self.divide < 2):
            raise UsageError(
                f"begin={self.begin}, tail={self.tail}, divide={self.divide}: begin is 0 or more, "
                "tail 1 or more, divide 2 or more"
            )
        if min(self.threshold, self.factor) < 0 or min(self.strong, self.weak) <= 0:
            raise UsageError(
                f"threshold={self.threshold}, factor={self.factor} must be 0 or more and "
                f"strong={self.strong}, weak={self.weak} above 0"
            )

    def edits(self, n: int, layer: int, layers: int) -> Iterator[Edit]:
        """What layer `layer` of `layers` edits in n tokens; nothing where they are few."""
        tail = self.tail if self.divide is None else max(1, n // self.divide)
        first = self.begin + 3
        if layer >= layers - 1 or n <= first + tail:
            return
        block = math.ceil((n - first - tail) / (layers + 3))
        start = first + (layer + 3) * block
        stop = min(start + block, n - tail)
        if start < stop:
            columns = start - 3 * block, start - 2 * block
            yield Edit((start, stop), columns, self.threshold / (start - self.begin))
        if layer:
            block = math.ceil((n - tail - 3) / (layers + 3))
            start = 3 + (layer + 2) * block
            columns = start, min(start + block, n)
            yield Edit((n - tail, n), columns, self.threshold / (n - tail))


def transition_(
    p: Tensor, columns: Tensor, seen: Tensor, threshold: float, options: AttentionTransition
) -> Tensor:
    """Move weights in place, in rows that give some key of the block more than `threshold`.

    Args:
        p: (B,Hq,r,m) probabilities.
        columns: (t,) int64, the keys of the block.
        seen: (B|1,Hq|1,r,t) bool, False where a query does not see one of them.

    Returns:
        (B,Hq,r) bool, the rows that changed; other rows of `p` hold no meaning.
    """
    block = p[..., columns]
    attends = (block > threshold).any(-1)
    before = p.sum(-1)
    p.masked_fill_(p < threshold, 0)
    moved = before - p.sum(-1)
    share = torch.where(block >= threshold, options.strong, options.weak) * seen
    share /= share.sum(-1, keepdim=True)
    # A row that sees no key of the block has no share, and does not attend to it either.
    p.index_add_(-1, columns, (moved * options.factor)[..., None] * share)
    return attends & (moved > 0)


def attend(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Visible,
    *,
    scaling: float,
    dropout: float = 0.0,
    options: AttentionTransition = AttentionTransition(),
    **_: Any,
) -> tuple[Tensor, None]:
    """Hugging Face attention "attention_transition", for decoders.

    A prompt that is read in one pass gets all edits; queries that come after cached keys get those
    of the tail.
    """
    layer, layers = _place(module, visible, dropout)
    out, lse = attention_with_lse(q, k, v, mask=visible.mask, scale=scaling)
    if out.requires_grad:
        out = out.clone()  # attention's backward needs its own as it was
    start = visible.row - visible.col
    end = start + q.shape[2]
    for batch, places in _sequences(visible.valid, end, q.device):
        for edit in options.edits(len(places), layer, layers):
            if start and edit.rows[1] < len(places):
                continue  # a block's rows are edited where the whole prompt is there
            rows = places[slice(*edit.rows)]
            rows = rows[rows >= start] - start
            at = batch, slice(None), rows
            keys = batch, slice(None), slice(end)
            columns = places[slice(*edit.columns)]
            out[at] = _edited(
                out[at], q[at] * scaling, k[keys], v[keys], lse[at],
                _seen(visible, q, batch, rows, end), columns, edit.threshold, options,
            )  # fmt: skip
    return out.transpose(1, 2), None


register(NAME, attend)


def attach(model: PreTrainedModel, options: AttentionTransition = AttentionTransition()) -> Use:
    """Switch a model to attention with these options; `remove()`, or leaving `with`, switches back.

    Raises:
        UsageError: a model whose attention cannot be replaced, such as one bound to one kernel.
    """
    name = NAME
    if options != AttentionTransition():
        name = f"{NAME}-{dataclasses.astuple(options)}"
        register(name, partial(attend, options=options))
    return use(model, name)


def _place(module: nn.Module, visible: Visible, dropout: float) -> tuple[int, int]:
    """The layer's index, and how many layers there are."""
    if dropout:
        raise UsageError(
            f"{NAME} changes attention at inference and has no dropout, {dropout} was asked for; "
            "call model.eval()"
        )
    if visible.given is not None or visible.sees is bidirectional_mask_function:
        what = "a 4-D attention mask" if visible.given is not None else "attention to both sides"
        raise UsageError(
            f"{type(module).__name__} has {what}; {NAME} needs a causal model and, where tokens "
            "are padding, the 2-D attention_mask"
        )
    layer = getattr(module, "layer_idx", None)
    if layer is None:
        raise UsageError(
            f"{type(module).__name__} does not say which layer it is (layer_idx); {NAME} edits "
            "other rows in each layer, so it needs to know"
        )
    return layer, module.config.num_hidden_layers


def _sequences(
    valid: Tensor | None, end: int, device: torch.device
) -> Iterator[tuple[slice, Tensor]]:
    """Batch entries that share the places of their tokens among the keys, and these places."""
    if valid is None:
        yield slice(None), torch.arange(end, device=device)
        return
    for b, row in enumerate(valid[:, :end]):
        yield slice(b, b + 1), row.nonzero()[:, 0]


def _seen(visible: Visible, q: Tensor, batch: slice, rows: Tensor, end: int) -> Tensor:
    """(B|1,1,r,end) bool: which keys some queries see."""
    b = torch.arange(len(q), device=q.device)[batch].view(-1, 1, 1, 1)
    keys = torch.arange(end, device=q.device)
    assert callable(visible.mask)
    seen = visible.mask(b, b.new_zeros(1, 1, 1), rows[:, None], keys)
    return seen.view((1,) * (4 - seen.dim()) + seen.shape)


def _edited(
    old: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, seen: Tensor, columns: Tensor,
    threshold: float, options: AttentionTransition,
) -> Tensor:  # fmt: skip
    """What some queries read after the edit, (B,Hq,r,dv); `old` where none was made."""
    scores = per_key_head(q.to(lse.dtype), k) @ k.to(lse.dtype).mT
    p = scores.view(*q.shape[:3], -1).masked_fill_(~seen, -math.inf).sub_(lse[..., None]).exp_()
    if p.requires_grad:
        p = p.clone()  # the backward of exp needs its own as it was
    changed = transition_(p, columns, seen[..., columns], threshold, options)
    new = (per_key_head(p, v) @ v.to(p.dtype)).view(*p.shape[:3], -1)
    return torch.where(changed[..., None], new.to(old.dtype), old)
