"""Cache layers that do their work inside attention.

transformers calls a layer's `update` just before attention and tells it no positions. So `update`
only says which layer is next, and everything happens in the attention function "holdfast", which
knows positions and who is padding. Without such a layer that function is plain exact attention.
"""

from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

from holdfast.context import interface, kernels
from holdfast.context.interface import Visible
from holdfast.errors import UsageError

NAME = "holdfast"
_next: ContextVar["DeferredLayer | None"] = ContextVar("next", default=None)


class DeferredLayer(CacheLayerMixin):
    """Base of cache layers that do their work in an attention function.

    Attributes:
        attention: the name of that function, "holdfast" or another that asks `waiting`.
    """

    attention = NAME
    is_sliding = False
    is_croppable = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0
        self._waiting: Tensor | None = None

    def attend(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, visible: Visible, *,
        positions: Tensor, scaling: float, window: int | None,
    ) -> Tensor:  # fmt: skip
        """Append k, v (B,H,n,d) and look: q (B,Hq,n,d) -> (B,n,Hq,dv).

        Args:
            positions: (B|1,n) int64 at which the model rotated q and k.
            window: keys as far away as this are hidden; None hides none.
        """
        raise NotImplementedError

    def nbytes(self) -> int:
        """Bytes held between two forward passes."""
        raise NotImplementedError

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any):
        """Keep nothing yet: the attention function that follows does the work."""
        if self._waiting is not None:
            raise UsageError(
                "this cache got new keys, but nobody attended to the last ones: the model does "
                f"not use the attention {self.attention!r}; call "
                f"model.set_attn_implementation({self.attention!r})"
            )
        self._waiting = key_states
        _next.set(self)
        return key_states, value_states

    def takes(self, keys: Tensor) -> bool:
        """Whether these are the keys of the last `update`; they are then no longer waited for."""
        mine = self._waiting is keys
        self._waiting = None
        return mine

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, self.seen

    def get_max_length(self) -> int:
        return -1

    def crop(self, *_: Any) -> None:
        raise UsageError(
            f"{type(self).__name__} cannot go back to an earlier length: what was dropped is gone; "
            "decode without assistant models and without contrastive search"
        )

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise UsageError(
            f"{type(self).__name__} has a fixed number of rows; repeat the input ids "
            f"{repeats} times before the first forward pass"
        )


def waiting(keys: Tensor) -> DeferredLayer | None:
    """The layer that was updated with these keys, if any: what attends to them asks once."""
    layer = _next.get()
    _next.set(None)
    return layer if layer is not None and layer.takes(keys) else None


def _attend(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, visible: Visible, *,
    scaling: float, dropout: float = 0.0, position_ids: Tensor | None = None,
    sliding_window: int | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    layer = waiting(k)
    if layer is None:
        seed = int(torch.randint(2**31, ())) if dropout else 0
        out, _ = kernels.attention_with_lse(
            q, k, v, mask=visible.mask, scale=scaling, dropout=dropout, seed=seed
        )
        return out.transpose(1, 2), None
    if position_ids is None:
        position_ids = torch.arange(layer.seen, layer.seen + q.shape[2], device=q.device)[None]
    out = layer.attend(module, q, k, v, visible, positions=position_ids, scaling=scaling,
                       window=sliding_window)  # fmt: skip
    return out, None


interface.register(NAME, _attend)
