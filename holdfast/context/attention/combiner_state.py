"""What a model with "combiner" (069) keeps while it generates: a running segment and summaries.

Bytes are those of `holdfast.context.attention.combiner`.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin

from holdfast.context.attention.combiner import (
    NAME,
    How,
    Pool,
    attend_far,
    attend_near,
    group_queries,
    pool_tokens,
    summaries,
    waiting,
)
from holdfast.context.kernels import merge_lse
from holdfast.context.masks import Causal
from holdfast.errors import UsageError


class CombinerLayer(CacheLayerMixin):
    """The state of one layer's causal "fixed" attention.

    Args:
        segment: tokens per segment.
        pool: as in `combiner_attention`.
    """

    # The running segment's, what its queries pool to, and those of finished segments.
    _FIELDS = ("keys", "values", "query", "summary_keys", "summary_values")

    def __init__(self, segment: int, pool: Pool = "max"):
        super().__init__()
        self.segment, self.pool, self.seen = segment, pool, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        for name in self._FIELDS:
            self._empty(name, value_states if "values" in name else key_states)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Announce new keys; `attend` gets them once more, with their queries."""
        if waiting.get() is not None:
            waiting.set(None)
            raise UsageError(
                f"a CombinerCache is read by attention {NAME!r}, and this model uses another one; "
                f"switch it by use(model, {NAME!r})"
            )
        waiting.set((self, key_states))
        return key_states, value_states

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
        """Read n more tokens: q (B,Hq,n,d), k (B,H,n,d), v (B,H,n,dv) -> (B,Hq,n,dv)."""
        if not self.is_initialized:
            self.lazy_initialization(k, v)
        n, s, held = q.shape[2], self.segment, self.keys.shape[2]
        whole = held == 0 and n >= s
        take = n // s * s if whole else min(n, s - held)
        read = self._read_segments if whole else self._read
        how = How(s, True, self.pool, q.shape[-1] ** -0.5 if scale is None else scale)
        out = read(*(x[:, :, :take] for x in (q, k, v)), how)
        self.seen += take
        if take == n:
            return out
        return torch.cat([out, self.attend(*(x[:, :, take:] for x in (q, k, v)), scale)], 2)

    def _read_segments(self, q: Tensor, k: Tensor, v: Tensor, how: How) -> Tensor:
        """Whole segments at once."""
        past = self.summary_keys.shape[2]
        self._append("summary_keys", "summary_values", *summaries(q, k, v, how))
        far = attend_far(q, self.summary_keys, self.summary_values, how, past)
        return merge_lse([attend_near(q, k, v, how), far])[0]

    def _read(self, q: Tensor, k: Tensor, v: Tensor, how: How) -> Tensor:
        """Tokens of the running segment, which may be its last ones."""
        held = self.keys.shape[2]
        self._append("keys", "values", k, v)
        near = how.attend(q, self.keys, self.values, Causal(held))
        far = how.attend(q, self.summary_keys, self.summary_values, None)
        # A mean is summed up here and divided when the segment is full.
        running = "max" if self.pool == "max" else "sum"
        self.query = pool_tokens(
            torch.cat([self.query, group_queries(q, k, self.pool)], 2), running
        )
        if self.keys.shape[2] == self.segment:
            query = self.query / self.segment if self.pool == "mean" else self.query
            value, _ = how.attend(query, self.keys, self.values, None)
            key = pool_tokens(self.keys, self.pool)
            self._append("summary_keys", "summary_values", key, value)
            for name in ("keys", "values", "query"):
                self._empty(name, getattr(self, name))
        return merge_lse([near, far])[0]

    def _append(self, key_name: str, value_name: str, k: Tensor, v: Tensor) -> None:
        for name, more in ((key_name, k), (value_name, v)):
            setattr(self, name, torch.cat([getattr(self, name), more], 2))

    def _empty(self, name: str, like: Tensor) -> None:
        setattr(self, name, like.new_empty(*like.shape[:2], 0, like.shape[3]))

    def nbytes(self) -> int:
        held = self._FIELDS if self.is_initialized else ()
        return sum(getattr(self, name).nbytes for name in held)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, self.seen

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.is_initialized, self.seen = False, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        for name in self._FIELDS if self.is_initialized else ():
            held = getattr(self, name)
            setattr(self, name, held.index_select(0, beam_idx.to(held.device)))


class CombinerCache(Cache):
    """What `generate` needs of a model that uses "combiner": pass it as `past_key_values`.

    Args:
        config: the model's, with `config.combiner = {"segment": s}` as in training.

    Raises:
        UsageError: no segment there, or a variant other than "fixed".
    """

    def __init__(self, config: PreTrainedConfig):
        options = dict(getattr(config, NAME, None) or {})
        segment = options.get("segment")
        if segment is None or options.get("variant", "fixed") != "fixed":
            raise UsageError(
                f"config.combiner is {options}; a state needs a known number of tokens per segment "
                "and the variant 'fixed': set config.combiner = {'segment': 64}, or generate with "
                "use_cache=False"
            )
        layers = config.get_text_config(decoder=True).num_hidden_layers
        pool = options.get("pool", "max")
        super().__init__(layers=[CombinerLayer(segment, pool) for _ in range(layers)])

    def nbytes(self) -> int:
        """Of all live storages."""
        return sum(layer.nbytes() for layer in self.layers)
