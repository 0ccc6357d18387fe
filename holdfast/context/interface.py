"""Attention functions of ours in stock Hugging Face models, with masks that are never built.

A model that calls transformers' AttentionInterface asks two functions: one for its mask, once per
forward pass, and one for attention, in every layer. `register` sets both under a name: the mask is
then a `Visible`, which says who sees whom without a tensor of n x m.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from holdfast.context.masks import Causal, MaskMod
from holdfast.errors import UsageError, unknown

Attend = Callable[..., tuple[Tensor, Tensor | None]]
_names: set[str] = set()
# Terms that some models add to their scores; a function that was not written for them must refuse.
_TERMS = ("softcap", "s_aux", "position_bias")


@dataclass(frozen=True, eq=False)
class Visible:
    """Who sees whom in one forward pass: n queries and m keys, in the order that they are given.

    Args:
        valid: (B,m) bool, False for keys that are padding; None if none is.
        sees: transformers' mask function of batch, head, query and key positions.
        row, col: positions of the first query and of the first key.
        given: (B|1,Hq|1,n,m) bool that a user passed instead; nothing else holds then.
    """

    valid: Tensor | None = None
    sees: Callable[..., Any] = causal_mask_function
    row: int = 0
    col: int = 0
    given: Tensor | None = field(default=None, repr=False)

    @property
    def causal(self) -> bool:
        """Whether keys are hidden by their position alone, as in a plain decoder."""
        return self.given is None and self.sees is causal_mask_function

    @property
    def mask(self) -> Tensor | MaskMod | None:
        """For `attention_with_lse`: a mask function of indices, a given mask, or None for all."""
        if self.given is not None:
            return self.given
        sees, valid, row, col = self.sees, self.valid, self.row, self.col
        if sees is causal_mask_function:
            ordered: MaskMod | None = Causal(row - col)
        elif sees is bidirectional_mask_function:
            ordered = None
        else:
            ordered = lambda b, h, i, j: sees(b, h, i + row, j + col)  # noqa: E731
        if valid is None:
            return ordered
        if ordered is None:
            return lambda b, h, i, j: valid[b, j]
        return lambda b, h, i, j: valid[b, j] & ordered(b, h, i, j)

    # With a static cache `generate` prepares masks ahead and hands them in again: these two are
    # what transformers then asks of them.
    ndim = 4

    def contiguous(self) -> "Visible":
        return self

    def dense(self, batch: int, n: int, m: int, device: torch.device | str = "cpu") -> Tensor:
        """The mask as a tensor (B|1,Hq|1,n,m) bool: for references."""
        mask = self.mask
        if mask is None:
            return torch.ones(1, 1, n, m, dtype=torch.bool, device=device)
        if isinstance(mask, Tensor):
            return mask
        b, i, j = (torch.arange(size, device=device) for size in (batch, n, m))
        seen = mask(b.view(-1, 1, 1, 1), torch.zeros_like(b[:1]), i.view(-1, 1), j)
        return seen.expand(torch.broadcast_shapes(seen.shape, (1, 1, n, m)))


def register(name: str, attend: Attend, *, terms: tuple[str, ...] = ()) -> None:
    """Let models use `attend` under `name`, in every process that imports the caller's module.

    Args:
        attend: called as `attend(module, q, k, v, visible, scaling=, dropout=, **kwargs)` with
            q (B,Hq,n,d), k (B,H,m,d), v (B,H,m,dv); returns ((B,n,Hq,dv), None).
        terms: what else models may pass that changes scores ("softcap", "s_aux",
            "position_bias") and that `attend` honours; models with others are refused.
    """
    refused = [term for term in _TERMS if term not in terms]

    def call(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any,
        scaling: float | None = None, dropout: float = 0.0, **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        present = [term for term in refused if kwargs.get(term) is not None]
        if present:
            raise UsageError(
                f"{type(module).__name__} attends with {', '.join(present)}, which {name!r} does "
                "not compute; use this model with its own attention"
            )
        visible = _visible(module, attention_mask, query, key)
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        return attend(
            module, query, key, value, visible, scaling=scaling, dropout=dropout, **kwargs
        )

    _names.add(name)
    AttentionInterface.register(name, call)
    AttentionMaskInterface.register(name, _mask)


@dataclass
class Use:
    """A model that was switched to another attention; a context manager, too."""

    model: PreTrainedModel
    before: str | None

    def remove(self) -> None:
        """Switch back; a second call does nothing."""
        if self.before is not None:
            self.model.set_attn_implementation(self.before)
            self.before = None

    def __enter__(self) -> "Use":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def use(model: PreTrainedModel, name: str) -> Use:
    """Switch a model to a registered attention function; `remove()` switches back.

    Raises:
        UsageError: a name that nobody registered, or a model whose attention cannot be replaced.
    """
    if name not in _names:
        raise unknown("attention", name, _names)
    before = model.config._attn_implementation
    # transformers warns and leaves such a model as it is; it is refused here, with one message.
    if not model._can_set_attn_implementation():
        raise UsageError(
            f"{type(model).__name__} does not let its attention be replaced; it needs a "
            "transformers model that uses AttentionInterface"
        )
    model.set_attn_implementation(name)
    return Use(model, before)


def _mask(
    *,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | Visible | None = None,
    **_: Any,
) -> Visible:
    """The mask function that models call."""
    if isinstance(attention_mask, Visible):
        return attention_mask
    valid = attention_mask
    if valid is not None:
        # It covers what was ever read, or just the tokens of this call.
        if valid.shape[-1] != kv_length:
            valid = valid[:, kv_offset : kv_offset + kv_length]
        if valid.shape[-1] < kv_length:
            valid = nn.functional.pad(valid, (0, kv_length - valid.shape[-1]))
        valid = None if bool(valid.all()) else valid.bool()
    return Visible(valid, mask_function, q_offset, kv_offset)


def _visible(module: nn.Module, mask: Any, q: Tensor, k: Tensor) -> Visible:
    if isinstance(mask, Visible):
        return mask
    if mask is None:
        # Some models ask for no mask where a kernel would know that it is causal.
        causal = getattr(module, "is_causal", True) and q.shape[2] > 1
        sees = causal_mask_function if causal else bidirectional_mask_function
        return Visible(None, sees, k.shape[2] - q.shape[2])
    if isinstance(mask, Tensor) and mask.dim() == 4:
        if mask.is_floating_point():
            hidden = mask <= torch.finfo(mask.dtype).min / 2
            if not bool(((mask == 0) | hidden).all()):
                raise UsageError(
                    "a 4-D attention mask with values between 0 and minus infinity is a bias; "
                    "pass a bool mask, True where a query sees a key"
                )
            mask = ~hidden
        return Visible(given=mask.bool()[..., : k.shape[2]])
    raise UsageError(
        f"attention_mask is {type(mask).__name__} of shape {tuple(getattr(mask, 'shape', ()))}; "
        "expected (B,m) with 1 for real tokens, or (B|1,Hq|1,n,m) bool"
    )
