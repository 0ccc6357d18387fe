"""A cache of keys and values that never takes more than a budget, in any Hugging Face model."""

import hashlib
import json
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)

from holdfast.context import interface
from holdfast.context.cache.deferred import NAME, DeferredLayer
from holdfast.context.cache.layer import CHUNK, BoundedLayer
from holdfast.context.cache.policy import CachePolicy, CacheShape
from holdfast.context.cache.slots import block, vector_nbytes, write_scratch
from holdfast.context.rope import Rope
from holdfast.errors import DoesNotFit, UsageError
from holdfast.files import sync_directory, write_tensors
from holdfast.forms.base import Form
from holdfast.units import format_bytes, parse_bytes


class BoundedCache(Cache):
    """A transformers cache whose attention layers share a budget; `for_model` makes it.

    Attributes:
        capacity: entries per row and head in each layer, known once the number of rows is.
        chunk: tokens that are appended at a time.
    """

    def __init__(self, model: PreTrainedModel, policy: CachePolicy, *, budget: int | None,
                 tokens: int | None, batch: int | None, form: Form | None, place: str,
                 chunk: int | None):  # fmt: skip
        self.policy, self.form, self.place = policy, form, place
        self.budget, self._tokens, self._chunk = budget, tokens, chunk
        self.config = model.config.get_text_config(decoder=True)
        self._model = weakref.ref(model)
        self._tables: dict[Rope, Tensor] = {}
        # Of positions that somebody still holds: the model does, while a forward pass lasts.
        self._back = WeakTensorKeyDictionary()
        self.capacity = self.chunk = 0
        # True while a question is read that is to be forgotten.
        self.asking = False
        self._device = next(model.parameters()).device
        super().__init__(layers=self._layers(model))
        self.shape = self._shape(batch or 1, next(model.parameters()).dtype)
        if batch is not None or tokens is not None:
            self.settle(self.shape.batch, self.shape.dtype)

    @classmethod
    def for_model(
        cls,
        model: PreTrainedModel,
        policy: CachePolicy | str,
        *,
        budget: int | str | None = None,
        tokens: int | None = None,
        batch: int | None = None,
        form: Form | None = None,
        place: str = "device",
        chunk: int | None = None,
    ) -> "BoundedCache":
        """An empty cache for a model, which is switched to the attention "holdfast".

        Args:
            policy: a policy, or the name of one with its default options.
            budget: bytes of everything that the cache holds at any time, choosing what to drop
                included: 64 * 2**20, or "64MiB".
            tokens: entries per row and head instead of a budget.
            batch: rows; by default those of the first forward pass.
            form: how keys and values are stored, such as `Int8()`; by default in their dtype.
            place: "device", or "host".
            chunk: tokens that are appended at a time, by default at most 512.

        Raises:
            UsageError: neither or both of budget and tokens, or a model that cannot be bounded.
            DoesNotFit: the budget is below what the policy needs.
        """
        if isinstance(policy, str):
            from holdfast.context.cache.policies import find

            policy = find(policy)
        if (budget is None) == (tokens is None):
            raise UsageError(
                "a bounded cache needs a budget in bytes or a number of tokens, one of them: "
                'budget="64MiB" or tokens=1024'
            )
        if place not in ("device", "host"):
            raise UsageError(f'place={place!r}; expected "device" or "host"')
        interface.use(model, NAME)
        nbytes = None if budget is None else parse_bytes(budget)
        return cls(model, policy, budget=nbytes, tokens=tokens, batch=batch, form=form,
                   place=place, chunk=chunk)  # fmt: skip

    def _layers(self, model: PreTrainedModel) -> list[Any]:
        """Bounded layers for full attention; for sliding ones too if there are no others."""
        plain = DynamicCache(config=model.config).layers
        kinds = getattr(self.config, "layer_types", None) or [None] * len(plain)
        full = any(type(layer) is DynamicLayer for layer in plain)
        ropes: dict[str | None, Rope] = {}
        layers: list[Any] = []
        for layer, kind in zip(plain, kinds, strict=True):
            sliding = type(layer) is DynamicSlidingWindowLayer
            if type(layer) is DynamicLayer or (sliding and not full):
                if self.policy.rotates and kind not in ropes:
                    ropes[kind] = Rope.from_model(model, kind)
                layers.append(self.make_layer(ropes.get(kind)))
            elif sliding or type(layer) is LinearAttentionLayer:
                layers.append(layer)
            else:
                raise UsageError(
                    f"{type(model).__name__} has layers of type {type(layer).__name__}, "
                    "which cannot be bounded; use DynamicCache"
                )
        if not any(isinstance(layer, DeferredLayer) for layer in layers):
            raise UsageError(f"{type(model).__name__} has no attention layer to bound")
        return layers

    def make_layer(self, rope: Rope | None) -> DeferredLayer:
        return BoundedLayer(self, rope)

    @property
    def bounded(self) -> list[BoundedLayer]:
        """The layers that the policy bounds."""
        return [layer for layer in self.layers if isinstance(layer, BoundedLayer)]

    def _shape(self, batch: int, dtype: torch.dtype) -> CacheShape:
        number = next(i for i, x in enumerate(self.layers) if isinstance(x, DeferredLayer))
        config = self.config.per_layer_config[number]
        query_heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // query_heads
        heads = getattr(config, "num_key_value_heads", None) or query_heads
        count = sum(isinstance(layer, DeferredLayer) for layer in self.layers)
        return CacheShape(count, batch, heads, query_heads, width, width, dtype, self.form)

    def settle(self, batch: int, dtype: torch.dtype) -> CacheShape:
        """Fix shape, capacity and chunk at the first forward pass."""
        if self.capacity and (batch, dtype) == (self.shape.batch, self.shape.dtype):
            return self.shape
        self.shape = self._shape(batch, dtype)
        self.capacity, self.chunk = self._fit()
        self.policy.bind(self)
        return self.shape

    def _fit(self) -> tuple[int, int]:
        if self._tokens is not None:
            chunk = self._chunk or default_chunk(self._tokens)
            self.policy.check(self._tokens, chunk)
            least = self.policy.least(chunk)
            if self._tokens < least:
                raise DoesNotFit(
                    f"{self._tokens} tokens do not hold chunks of {chunk} and what "
                    f"{self.policy!r} keeps; use {least} or more, or a smaller chunk"
                )
            return self._tokens, chunk
        assert self.budget is not None
        low, high = 0, self.budget // max(1, self.shape.kv_bytes(1))
        while low < high:
            middle = (low + high + 1) // 2
            chunk = self._chunk or default_chunk(middle)
            if self.predict(middle, chunk) <= self.budget:
                low = middle
            else:
                high = middle - 1
        chunk = self._chunk or default_chunk(low)
        if low < max(1, self.policy.least(chunk)):
            least = 1
            while least < self.policy.least(self._chunk or default_chunk(least)):
                least += 1
            need = self.predict(least, self._chunk or default_chunk(least))
            error = DoesNotFit(
                f"{self.policy!r} needs {format_bytes(need)} for {least} entries in "
                f"{self.shape.layers} layers of {self.shape.batch} rows, the budget is "
                f"{format_bytes(self.budget)}; raise it, lower the batch, or store int8"
            )
            error.details = {"needs_bytes": need}
            raise error
        self.policy.check(low, chunk)
        return low, chunk

    def allocate(self, batch: int) -> None:
        """Allocate slots and tables now, and not in the first forward pass."""
        shape = self.settle(batch, self.shape.dtype)
        like = {"dtype": shape.dtype, "device": self._device}
        k = torch.empty(batch, shape.heads, 0, shape.key_width, **like)
        q = torch.empty(batch, shape.query_heads, 0, shape.key_width, **like)
        for layer in self.bounded:
            layer._allocate(q, k, k)
            if layer._rope is not None and self.policy.at_slots:
                self.table(layer._rope)

    def predict(self, capacity: int, chunk: int) -> int:
        """Bytes at the peak with so many entries: slots, tables, and choosing what stays."""
        total = self.predict_held(capacity) + self._scratch(capacity, chunk) + self._others(chunk)
        # Where uneven rows put their last tokens, until they are scored.
        waiting = 8 * self.shape.layers * self.shape.batch * chunk
        return total + waiting * self.policy.observes

    def predict_held(self, capacity: int) -> int:
        """Bytes of slots and tables."""
        shape, policy = self.shape, self.policy
        heads = shape.heads if policy.per_head else 1
        own = sum(4 * (shape.heads if per_head else heads) for per_head in policy.fields.values())
        own += 8 * heads if policy.keeps_index else 0
        ropes = {layer._rope for layer in self.bounded if layer._rope is not None}
        tables = sum(4 * rope.width for rope in ropes) * policy.at_slots
        return shape.kv_bytes(capacity) + capacity * (shape.layers * shape.batch * own + tables)

    def _scratch(self, capacity: int, chunk: int) -> int:
        """Choosing entries and moving a block, or writing a piece: in one layer at a time."""
        shape, widths = self.shape, (self.shape.key_width, self.shape.value_width)
        rows = shape.batch * shape.heads
        move = max(vector_nbytes(width, shape.dtype, shape.form) for width in widths)
        write = max(
            write_scratch(shape.batch, shape.heads, width, shape.dtype, shape.form)
            for width in widths
        )
        # Rows of different length: where every token of a chunk comes from and goes to.
        uneven = 48 * shape.batch * chunk
        choose = self.policy.scratch(shape, capacity) + rows * block(capacity) * move
        return max(choose, write + uneven)

    def _others(self, chunk: int) -> int:
        """Sliding layers of hybrid models, which stay transformers' own."""
        shape, held, widest = self.shape, 0, 0
        for layer in self.layers:
            if isinstance(layer, DynamicSlidingWindowLayer):
                row = 2 * shape.batch * shape.heads * shape.key_width * shape.dtype.itemsize
                held += row * (layer.sliding_window - 1)
                widest = max(widest, row * (layer.sliding_window - 1 + chunk))
        return held + widest

    def table(self, rope: Rope) -> Tensor:
        """cos and sin (2,capacity,width/2) fp32 of positions 0, 1, 2, ..."""
        if rope not in self._tables:
            own = rope.at(self.capacity)
            device = next(rope.module.buffers()).device
            self._tables[rope] = own.table(torch.arange(self.capacity, device=device))
        return self._tables[rope]

    def back(self, rope: Rope, positions: Tensor) -> Tensor:
        """The table that takes the model's rotation at positions (B|1,n) back."""
        known = self._back.setdefault(positions, {})
        if rope not in known:
            known[rope] = rope.inverse_table(positions)[:, :, None]
        return known[rope]

    def fingerprint(self) -> str:
        model = self._model()
        if model is None:
            raise UsageError("the model of this cache is gone; keep it while the cache is used")
        return fingerprint(model)

    def observe(self, nats: Tensor) -> None:
        """Tell the policy how surprising the tokens just read were: (B,n) nats, NaN unknown."""
        for layer in self.bounded:
            layer.observe(nats)

    def turn(self) -> None:
        """A new turn of a dialogue begins."""
        self.policy.turn(self)

    def nbytes(self) -> int:
        """Bytes held between two forward passes, tables included."""
        layers = sum(
            layer.nbytes()
            if isinstance(layer, DeferredLayer)
            else sum(
                t.numel() * t.element_size() for t in (layer.keys, layer.values) if t is not None
            )
            for layer in self.layers
        )
        return layers + sum(t.numel() * t.element_size() for t in self._tables.values())

    def peak_nbytes(self) -> int:
        """Bytes that it never exceeds."""
        return self.predict(self.capacity, self.chunk) if self.capacity else 0

    def state_dict(self) -> dict[str, Tensor]:
        """What it knows, entries in use only; with `meta()` enough to go on from."""
        return {
            f"{number}.{name}": tensor[:, :, : layer.length].contiguous()
            for number, layer in enumerate(self.bounded)
            if layer.slots is not None
            for name, tensor in layer.slots.tensors.items()
        }

    def meta(self) -> dict[str, Any]:
        """Counts and identity, ready for JSON."""
        return {
            "format": 1, "model": self.fingerprint(), "policy": self.policy.identity(),
            "form": repr(self.form), "capacity": self.capacity,
            "seen": [layer.seen for layer in self.bounded],
            "counts": [layer.counts for layer in self.bounded],
            "read": [layer.read for layer in self.bounded],
        }  # fmt: skip

    def save(self, path: str | Path, notes: dict[str, Any] | None = None) -> None:
        """Write a safetensors file that `load` reads; replaced atomically.

        `notes` are kept beside the cache, as JSON.
        """
        if any(type(layer) is not BoundedLayer for layer in self.layers):
            raise UsageError("this cache has layers of other kinds, which cannot be saved yet")
        path = Path(path)
        partial = path.with_name(path.name + ".partial")
        meta = self.meta() | {"notes": notes or {}}
        write_tensors(partial, self.state_dict(), {"holdfast": json.dumps(meta)})
        partial.replace(path)
        sync_directory(path.parent)

    def load(self, path: str | Path) -> dict[str, Any]:
        """Go on from a saved cache of the same model, policy and form; returns its notes.

        The capacity may be another.

        Raises:
            UsageError: another model, policy or form, or more entries than fit.
        """
        from safetensors import SafetensorError, safe_open

        if not Path(path).exists():
            raise UsageError(f"{path} does not exist; give a file that was saved by this command")
        try:
            opened = safe_open(path, "pt")
        except SafetensorError as error:
            raise UsageError(f"{path} is not a saved cache ({error})") from error
        with opened as file:
            meta = json.loads((file.metadata() or {}).get("holdfast", "{}"))
            mine = self.meta()
            for what in ("format", "model", "policy", "form"):
                if meta.get(what) != mine[what]:
                    raise UsageError(
                        f"{path} was saved with {what} {meta.get(what)!r}, this cache has "
                        f"{mine[what]!r}; load it with what it was made with"
                    )
            rows, most = len(meta["counts"][0]), max(map(max, meta["counts"]))
            if not self.capacity:
                self.settle(rows, self.shape.dtype)
            if not self.policy.resizes and meta["capacity"] != self.capacity:
                raise UsageError(
                    f"{path} was saved with {meta['capacity']} entries, this cache has "
                    f"{self.capacity}, which are parted otherwise; give it the same budget"
                )
            if most > self.capacity or rows != self.shape.batch:
                raise UsageError(
                    f"{path} holds {most} entries in {rows} rows, this cache has room for "
                    f"{self.capacity} in {self.shape.batch}; raise the budget"
                )
            self.allocate(rows)
            for number, layer in enumerate(self.bounded):
                for name, tensor in layer.slots.tensors.items():
                    saved = file.get_tensor(f"{number}.{name}")
                    tensor[:, :, : saved.shape[2]] = saved.to(tensor.device)
                layer.counts, layer.read = meta["counts"][number], meta["read"][number]
                layer.seen, layer._last = meta["seen"][number], None
            return meta["notes"]


def default_chunk(capacity: int) -> int:
    return max(1, min(CHUNK, capacity // 4))


def fingerprint(model: PreTrainedModel) -> str:
    """What tells models apart whose caches must not be mixed: config and some weights."""
    config = model.config.to_dict()
    skipped = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
    text = json.dumps({k: v for k, v in config.items() if k not in skipped}, default=str)
    some = model.get_input_embeddings().weight.detach().flatten()[:1024].float().cpu()
    return hashlib.sha256(text.encode() + some.numpy().tobytes()).hexdigest()[:16]
