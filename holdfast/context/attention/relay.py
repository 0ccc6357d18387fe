"""RelayAttention (117): a prefix that requests share is kept once, and read once per step.

Keeps    keys and values of the prefix once, of each request its own tokens.
Form     both in the model's dtype, or in any form that a bounded cache takes.
Bytes    2*L*H*d*b*(s + B*c) for a prefix of s tokens and B requests with room for c each, where
         caches of their own take 2*L*H*d*b*B*(s + c).
Source   Zhu, Wang, Zhang, Lau, RelayAttention for Efficient Large Language Model Serving with
         Long System Prompts, 2024; no code was read.
Departs  query heads that share a key head are folded into the query axis too, so that no key is
         read twice. Requests may drop entries of their own by any policy; the prefix stays whole.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import causal_mask_function

from holdfast.context.cache.bounded import BoundedCache
from holdfast.context.cache.layer import BoundedLayer, New
from holdfast.context.cache.policies import find
from holdfast.context.cache.policy import CachePolicy, CacheShape
from holdfast.context.interface import Visible
from holdfast.context.kernels import merge_lse
from holdfast.context.rope import Rope
from holdfast.context.stream import prefill_chunks
from holdfast.errors import DoesNotFit, UsageError
from holdfast.forms.base import Form
from holdfast.units import format_bytes


def relay_nbytes(shape: CacheShape, prefix: int, tokens: int) -> int:
    """Keys and values of a prefix, and of `shape.batch` requests with room for `tokens` each."""
    return replace(shape, batch=1).kv_bytes(prefix) + shape.kv_bytes(tokens)


class SharedPrefix:
    """A prefix that was read once; `cache` makes caches for requests that begin with it.

    Args:
        model: switched to the attention "holdfast".
        prefix_ids: (s,) or (1,s) ids, special tokens at the beginning included; at least 2.
        form, place: how and where keys and values are stored, as in `BoundedCache.for_model`.
        on_chunk: called with the number of tokens of each chunk, after it was read.

    Raises:
        UsageError: ids that the model does not have, or a model whose layers do not all keep
            everything that they were given.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prefix_ids: Tensor | Sequence[int],
        *,
        form: Form | None = None,
        place: str = "device",
        on_chunk: Callable[[int], None] | None = None,
    ):
        self.model, self.ids = model, _row(prefix_ids)
        self.form, self.place, self.key = form, place, _key(self.ids)
        vocabulary = model.get_input_embeddings().weight.shape[0]
        if self.length < 2 or not 0 <= int(self.ids.min()) <= int(self.ids.max()) < vocabulary:
            raise UsageError(
                f"a prefix of {self.length} ids, of a model with {vocabulary}: give at least 2, "
                "made by this model's tokenizer"
            )
        self.store = _store(model, self.length, form, place)
        self._modules = {id(module) for module in model.modules()}
        ids = self.ids[None].to(next(model.parameters()).device)
        prefill_chunks(model, ids, self.store, on_chunk=on_chunk)
        for layer in self.store.bounded:
            if layer.window is not None:
                self.check_window(layer.window, self.length)

    @property
    def length(self) -> int:
        return len(self.ids)

    def nbytes(self) -> int:
        return self.store.nbytes()

    def cache(
        self, batch: int, *, tokens: int, policy: CachePolicy | str = "full",
        chunk: int | None = None,
    ) -> "RelayCache":  # fmt: skip
        """An empty cache for `batch` requests that begin with the prefix.

        It behaves as one that has read the prefix: `generate()` gets ids with the prefix, rows
        padded between it and their own tokens; a forward pass gets what follows it.

        Args:
            tokens: room of each request for tokens of its own.
            policy: what happens when they are more; "full" refuses.
            chunk: tokens that are appended at a time.
        """
        policy = find(policy) if isinstance(policy, str) else policy
        return RelayCache(self, policy, batch=batch, tokens=tokens, chunk=chunk)

    def rest(self, ids: Tensor | Sequence[int]) -> Tensor:
        """What follows the prefix in the ids (n,) of a request.

        Raises:
            UsageError: they do not begin with the prefix, or the rest begins with a second
                beginning-of-sequence token.
        """
        row = _row(ids)
        if not torch.equal(row[: self.length], self.ids):
            raise UsageError(
                f"a request of {len(row)} ids does not begin with the prefix of {self.length}; "
                "tokenize prefix and request as one text, with one tokenizer"
            )
        rest, bos = row[self.length :], self.model.config.get_text_config().bos_token_id
        if len(rest) and bos is not None and rest[0] == bos == self.ids[0]:
            raise UsageError(
                f"token {bos}, which begins a sequence, stands at the beginning of the prefix and "
                "again after it; tokenize what follows with add_special_tokens=False"
            )
        return rest

    def check(self, module: nn.Module, dtype: torch.dtype) -> None:
        """Refuse attention modules of another model, and another dtype."""
        if id(module) not in self._modules:
            raise UsageError(
                f"this prefix was read by another {type(self.model).__name__} than the one that "
                "uses its cache; make a SharedPrefix for each model"
            )
        if dtype != self.store.shape.dtype:
            raise UsageError(
                f"this prefix was read in {self.store.shape.dtype} and the model now computes in "
                f"{dtype}; make a new SharedPrefix"
            )

    def check_window(self, window: int, length: int) -> None:
        """Refuse texts that a sliding window of the model does not hold."""
        if length > window:
            raise UsageError(
                f"{length} tokens are more than the model's sliding window of {window}, beyond "
                "which a shared prefix would be hidden from later tokens; use a BoundedCache"
            )

    def look(self, number: int, q: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
        """Attention of all rows over the prefix in layer `number`: q (B,Hq,n,d), as it looks.

        Returns:
            out (B,Hq,n,dv) and lse (B,Hq,n).
        """
        layer = self.store.bounded[number]
        b, _, n, _ = q.shape
        # Nothing of the prefix is hidden from anybody, so rows are queries like any others.
        folded = q.unflatten(1, (layer.heads, -1)).transpose(0, 1).flatten(1, 3)[None]
        every = New(folded.shape[2], self.length, [self.length], q.device)
        out, lse = layer.look(folded, every, scaling)
        return tuple(
            x[0].unflatten(1, (b, -1, n)).transpose(0, 1).flatten(1, 2) for x in (out, lse)
        )


class RelayCache(BoundedCache):
    """Keys and values of requests that share a prefix; `SharedPrefix.cache` makes it.

    `nbytes()` and `peak_nbytes()` are of the requests; the prefix counts for itself, once.
    """

    def __init__(
        self, prefix: SharedPrefix, policy: CachePolicy, *, batch: int, tokens: int,
        chunk: int | None,
    ):  # fmt: skip
        self.prefix, self._made = prefix, 0
        super().__init__(prefix.model, policy, budget=None, tokens=tokens, batch=batch,
                         form=prefix.form, place=prefix.place, chunk=chunk)  # fmt: skip

    def fingerprint(self) -> str:
        return f"{super().fingerprint()}+{self.prefix.key}"

    def make_layer(self, rope: Rope | None) -> "RelayLayer":
        self._made += 1
        return RelayLayer(self, rope, self._made - 1)

    def table(self, rope: Rope) -> Tensor:
        if rope not in self._tables:
            end = self.prefix.length + self.capacity
            positions = torch.arange(self.prefix.length, end, device=self._device)
            self._tables[rope] = rope.at(end).table(positions)
        return self._tables[rope]


class RelayLayer(BoundedLayer):
    """Slots of requests, behind a prefix that all of them see.

    Attributes:
        ready: attention over the prefix of the queries that come next, where somebody has
            computed it for several caches at once.
    """

    cache: RelayCache

    def __init__(self, cache: RelayCache, rope: Rope | None, number: int):
        super().__init__(cache, rope)
        self.number, self.seen = number, cache.prefix.length
        self.ready: tuple[Tensor, Tensor] | None = None

    def attend(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, visible: Visible, *,
        positions: Tensor, scaling: float, window: int | None,
    ) -> Tensor:  # fmt: skip
        prefix = self.cache.prefix
        prefix.check(module, k.dtype)
        if window is not None and visible.sees is not causal_mask_function:
            own = min(self.length + q.shape[2], self.cache.capacity)
            prefix.check_window(window, prefix.length + own)
        return super().attend(module, q, k, v, visible, positions=positions, scaling=scaling,
                              window=window)  # fmt: skip

    def look(self, q: Tensor, new: New, scaling: float, **parts) -> tuple[Tensor, Tensor]:
        shared = self.ready or self.cache.prefix.look(self.number, q, scaling)
        self.ready = None
        if not self.length:
            return shared
        return merge_lse([shared, super().look(q, new, scaling, **parts)])

    def reset(self) -> None:
        super().reset()
        self.seen, self.ready = self.cache.prefix.length, None


class PrefixRegistry:
    """Prefixes by their tokens, within a budget: who was used longest ago goes first.

    Args:
        budget: bytes of all prefixes together, at any time.
        form, place: how and where they are stored.
    """

    def __init__(
        self, model: PreTrainedModel, budget: int, *, form: Form | None = None,
        place: str = "device",
    ):  # fmt: skip
        self.model, self.budget, self.form, self.place = model, budget, form, place
        self._kept: OrderedDict[str, SharedPrefix] = OrderedDict()
        self._users: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def nbytes(self) -> int:
        return sum(prefix.nbytes() for prefix in self._kept.values())

    def find(self, ids: Tensor | Sequence[int]) -> SharedPrefix | None:
        """The longest prefix kept with which ids (n,) begin, or None."""
        row = _row(ids)
        lengths = {prefix.length for prefix in self._kept.values()}
        for length in sorted(lengths, reverse=True):
            prefix = self._kept.get(_key(row[:length]))
            if prefix is not None and torch.equal(prefix.ids, row[:length]):
                self._kept.move_to_end(prefix.key)
                return prefix
        return None

    def add(
        self, ids: Tensor | Sequence[int], *, on_chunk: Callable[[int], None] | None = None
    ) -> SharedPrefix:
        """Read a prefix (s,) and keep it, dropping others that nobody holds.

        Raises:
            DoesNotFit: not even without all others that may be dropped.
        """
        row = _row(ids)
        found = self.find(row)
        if found is not None and found.length == len(row):
            return found
        need = _store(self.model, max(2, len(row)), self.form, self.place).peak_nbytes()
        idle = [p for p in self._kept.values() if not self._users.get(p.key)]
        free = self.budget - self.nbytes()
        if need > free + sum(prefix.nbytes() for prefix in idle):
            error = DoesNotFit(
                f"a prefix of {len(row)} tokens needs {format_bytes(need)}, the budget of all "
                f"prefixes is {format_bytes(self.budget)}, of which "
                f"{format_bytes(self.nbytes())} are taken; raise it or share less"
            )
            error.details = {"needs_bytes": need}
            raise error
        for prefix in idle:
            if need <= self.budget - self.nbytes():
                break
            del self._kept[prefix.key]
            prefix.store.layers.clear()  # layers and cache name each other: free them at once
        prefix = SharedPrefix(self.model, row, form=self.form, place=self.place, on_chunk=on_chunk)
        self._kept[prefix.key] = prefix
        return prefix

    def hold(self, prefix: SharedPrefix) -> None:
        """A request uses it: it is not dropped until `release` was called as often."""
        self._users[prefix.key] = self._users.get(prefix.key, 0) + 1

    def release(self, prefix: SharedPrefix) -> None:
        self._users[prefix.key] -= 1


def _store(model: PreTrainedModel, length: int, form: Form | None, place: str) -> BoundedCache:
    store = BoundedCache.for_model(model, "full", tokens=length, batch=1, form=form, place=place)
    if len(store.bounded) < len(store.layers):
        raise UsageError(
            f"{type(model).__name__} has layers that forget by themselves, so a prefix cannot be "
            "shared; use a BoundedCache"
        )
    return store


def _row(ids: Tensor | Sequence[int]) -> Tensor:
    """(n,) int64 on the CPU."""
    row = torch.as_tensor(ids).to("cpu", torch.long)
    if row.dim() == 2 and row.shape[0] == 1:
        row = row[0]
    if row.dim() != 1:
        raise UsageError(f"ids of shape {tuple(row.shape)}; expected those of one text, (n,)")
    return row


def _key(ids: Tensor) -> str:
    return hashlib.sha256(ids.contiguous().numpy().tobytes()).hexdigest()[:32]
