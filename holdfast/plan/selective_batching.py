"""Selective batching: many requests through one Hugging Face causal LM, without padding.

All tokens of an iteration, whole prompts and single next tokens alike, are one flat batch of one
row. Only attention looks at requests one by one, each over its own contiguous keys and values, in
the room that a scheduler has reserved for it; preempted ones wait in a host arena.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.errors import UsageError
from holdfast.places import HostArena
from holdfast.plan.length_aware import LengthAwareScheduler, Request

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

ATTENTION = "holdfast_selective"


@dataclass
class Span:
    """The tokens of one request in the flat batch, and its keys and values of all layers.

    `kv` is (L,2,H,capacity,d); this iteration writes entries `start` to `stop` from the batch's
    tokens `first` on.
    """

    kv: Tensor
    first: int
    start: int
    stop: int


def kv_shape(config: "PretrainedConfig") -> tuple[int, int, int]:
    """Layers, key/value heads and head size of a config."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    return text.num_hidden_layers, getattr(text, "num_key_value_heads", None) or heads, size


def kv_bytes_per_token(config: "PretrainedConfig", dtype: torch.dtype) -> int:
    """2*L*H*d*b: keys and values of one token in all layers."""
    layers, heads, size = kv_shape(config)
    return 2 * layers * heads * size * dtype.itemsize


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    spans: Sequence[Span] = (),
    **unused: Any,
) -> tuple[Tensor, None]:
    """Attention of each span over its own past: query (1,Hq,n,d), key and value (1,H,n,d).

    Keys and values are written into the spans first. Returns (1,n,Hq,d) and no weights.
    """
    layer = cast(int, module.layer_idx)
    out = torch.empty_like(query.transpose(1, 2))
    for span in spans:
        tokens = slice(span.first, span.first + span.stop - span.start)
        kv = span.kv[layer]
        kv[0, :, span.start : span.stop] = key[0, :, tokens]
        kv[1, :, span.start : span.stop] = value[0, :, tokens]
        keys, values = kv[None, 0, :, : span.stop], kv[None, 1, :, : span.stop]
        mask, causal = None, span.start == 0 and span.stop > 1
        if sliding_window is not None and span.stop > sliding_window:
            at = torch.arange(span.start, span.stop, device=query.device)[:, None]
            back = at - torch.arange(span.stop, device=query.device)
            mask, causal = (back >= 0) & (back < sliding_window), False
        found = F.scaled_dot_product_attention(
            query[:, :, tokens],
            keys,
            values,
            attn_mask=mask,
            is_causal=causal,
            scale=scaling,
            enable_gqa=keys.shape[1] != query.shape[1],
        )
        out[:, tokens] = found.transpose(1, 2)
    return out, None


class SelectiveBatching:
    """Greedy generation for many requests at once, within the scheduler's budget of KV bytes.

    Args:
        model: a decoder whose attention goes through transformers' attention interface. It is
            switched to this one's attention; `close` switches it back.
        scheduler: fresh; its `kv_bytes_per_token` is that of the model in its dtype.
        host_budget: bytes of keys and values that preempted requests may hold on the host.

    Every request's tokens are those of `model.generate` on it alone.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        scheduler: LengthAwareScheduler,
        *,
        host_budget: int,
    ):
        from transformers import AttentionInterface

        self.model, self.scheduler = model, scheduler
        needed = kv_bytes_per_token(model.config, model.dtype)
        if scheduler.kv_bytes_per_token != needed:
            raise UsageError(
                f"the scheduler counts {scheduler.kv_bytes_per_token} bytes per token, this model "
                f"in {model.dtype} takes {needed}; make the scheduler with kv_bytes_per_token="
                f"{needed}"
            )
        if not type(model)._supports_attention_backend:
            raise UsageError(
                f"{type(model).__name__} does not take other attention functions; choose a model "
                "that does, such as LLaMA, Qwen or GPT-2"
            )
        if getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
            raise UsageError(f"{type(model).__name__} caps its attention logits; choose another")
        AttentionInterface.register(ATTENTION, attend)
        self._attention = model.config._attn_implementation
        model.set_attn_implementation(ATTENTION)
        self.host = HostArena(host_budget)
        self.outputs: dict[Hashable, list[int]] = {}
        self._prompts: dict[Hashable, Tensor] = {}
        self._kv: dict[Hashable, Tensor] = {}
        ends = model.generation_config.eos_token_id
        self._ends = set(ends if isinstance(ends, list) else [] if ends is None else [ends])

    @property
    def device_bytes(self) -> int:
        """Bytes of keys and values that are allocated on the device."""
        return sum(kv.untyped_storage().nbytes() for kv in self._kv.values())

    def submit(self, id: Hashable, prompt: Tensor, max_output: int, text: str = "") -> Request:
        """Queue a prompt, int64 (n,); `text` is what a predictor of lengths reads."""
        if prompt.dim() != 1:
            raise UsageError(f"prompt is {tuple(prompt.shape)}; give the ids of one request, (n,)")
        request = self.scheduler.submit(id, len(prompt), max_output, text)
        self._prompts[id] = prompt.to(self.model.device)
        self.outputs[id] = []
        return request

    @torch.no_grad()
    def step(self) -> dict[Hashable, int]:
        """One iteration: the next token of every running request, by id."""
        admission = self.scheduler.admit()
        for request in admission.preempted:
            self._swap_out(request)
        for request in admission.admitted:
            self._make_room(request)
        running = list(self.scheduler.running.values())
        if not running:
            return {}
        spans, ids, first = [], [], 0
        for request in running:
            start, fresh = self._entries(request)
            spans.append(Span(self._kv[request.id], first, start, start + len(fresh)))
            ids.append(fresh)
            first += len(fresh)
        device = self.model.device
        positions = torch.cat([torch.arange(s.start, s.stop, device=device) for s in spans])
        lasts = torch.tensor([s.first + s.stop - s.start - 1 for s in spans], device=device)
        logits = self.model(
            input_ids=torch.cat(ids)[None],
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=lasts,
            spans=spans,
        ).logits
        chosen = logits[0].argmax(-1).tolist()
        must_end = {request.id for request in self.scheduler.step()}
        for request, token in zip(running, chosen, strict=True):
            self.outputs[request.id].append(token)
            if token in self._ends or request.id in must_end:
                self.scheduler.finish(request.id)
                del self._kv[request.id], self._prompts[request.id]
        return {request.id: token for request, token in zip(running, chosen, strict=True)}

    def cancel(self, id: Hashable) -> None:
        """Drop a request, running or waiting; its output so far stays in `outputs`."""
        self.scheduler.cancel(id)
        self._kv.pop(id, None)
        del self._prompts[id]
        self.host.evict(id)

    def run(self) -> dict[Hashable, list[int]]:
        """Step until all requests have ended; returns `outputs`."""
        while self.scheduler.busy:
            self.step()
        return self.outputs

    def close(self) -> None:
        """Give the model its attention back, and drop all keys and values."""
        self.model.set_attn_implementation(self._attention)
        self._kv.clear()
        self.host.close()

    def _entries(self, request: Request) -> tuple[int, Tensor]:
        """Where this iteration writes, and the tokens that it reads."""
        if not request.begun:
            return 0, self._prompts[request.id]
        last = self.outputs[request.id][-1]
        return request.held - 1, torch.tensor([last], device=self.model.device)

    def _make_room(self, request: Request) -> None:
        layers, heads, size = kv_shape(self.model.config)
        shape = (layers, 2, heads, request.capacity, size)
        kv = torch.empty(shape, dtype=self.model.dtype, device=self.model.device)
        if request.begun:
            self.host.get(request.id, out=kv[..., : request.held - 1, :])
            self.host.evict(request.id)
        self._kv[request.id] = kv

    def _swap_out(self, request: Request) -> None:
        # The newest token's keys and values are not computed yet.
        self.host.put(request.id, self._kv.pop(request.id)[..., : request.held - 1, :])
