"""A window in every layer and a memory in some: the cache of the Focused Transformer (`fot`)."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.masking_utils import causal_mask_function

from holdfast.context import kernels
from holdfast.context.cache.deferred import DeferredLayer
from holdfast.context.cache.slots import Slots
from holdfast.context.interface import Visible
from holdfast.context.kernels import Spec
from holdfast.context.masks import Block, Causal, MaskMod
from holdfast.context.rope import Rope
from holdfast.errors import UsageError
from holdfast.forms.base import Form

# Memory keys that are looked at together, and pairs of them and queries while the best are sought.
KEYS, PAIRS = 2048, 1 << 18


class FoTCache(Cache):
    """A transformers cache with a window in every layer and a memory in some.

    Args:
        model: with rotary positions; it must use the attention "holdfast".
        mem_layers: layers with a memory.
        window, memory: tokens.
        topk: keys of the memory that each query attends to; None is all.
        form, place: of the memory.
    """

    def __init__(
        self, model: PreTrainedModel, mem_layers: tuple[int, ...], *, window: int, memory: int,
        topk: int | None, form: Form | None, place: str,
    ):  # fmt: skip
        self.window, self.memory, self.topk = window, memory, topk
        self.form, self.place = form, place
        plain = DynamicCache(config=model.config).layers
        odd = [x for x in plain if type(x) not in (DynamicLayer, DynamicSlidingWindowLayer)]
        if odd:
            raise UsageError(
                f"{type(model).__name__} has layers of type {type(odd[0]).__name__}, which "
                "cannot be cut into windows; use DynamicCache"
            )
        self.rope = Rope.from_model(model)
        self._table: Tensor | None = None
        super().__init__(layers=[FoTLayer(self, i in mem_layers) for i in range(len(plain))])

    def table(self, device: torch.device) -> Tensor:
        """cos and sin (2,window,width/2) fp32."""
        if self._table is None:
            self._table = self.rope.at(self.window).table(torch.arange(self.window, device=device))
        return self._table

    def nbytes(self) -> int:
        table = 0 if self._table is None else self._table.nbytes
        own = (layer.nbytes() for layer in self.layers if isinstance(layer, FoTLayer))
        return table + sum(own)


class FoTLayer(DeferredLayer):
    """The current window of a layer, and in some layers a memory of those before.

    Attributes:
        count: tokens in the window, padding included.
        moved: tokens that were ever moved from it to the memory.
    """

    def __init__(self, cache: FoTCache, remembers: bool):
        super().__init__()
        self.cache, self.remembers = cache, remembers
        self.local: Slots | None = None
        self.memory: Slots | None = None
        self.count = self.moved = 0
        self._padded = False

    @property
    def remembered(self) -> int:
        return min(self.moved, self.cache.memory) if self.remembers else 0

    def attend(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, visible: Visible, *,
        positions: Tensor, scaling: float, window: int | None,
    ) -> Tensor:  # fmt: skip
        if visible.given is not None:
            raise UsageError(
                "a 4-D attention mask names tokens that are in no window any more; pass a mask "
                "(B,m) of real tokens, or use DynamicCache"
            )
        local = self._allocate(k, v)
        rope, table = self.cache.rope, self.cache.table(q.device)
        back = rope.inverse_table(positions)[:, :, None]
        q, k = rope.turn(q.detach(), back), rope.turn(k.detach(), back)
        real = torch.ones_like(k[:, :1, :, :1], dtype=torch.bool)
        if visible.valid is not None:
            real, self._padded = visible.valid[:, None, :, None], True
        window = None if visible.sees is causal_mask_function else window
        out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])
        start = 0
        while start < q.shape[2]:
            if self.count == self.cache.window:
                self._remember(local)
            stop = min(q.shape[2], start + self.cache.window - self.count)
            new, here = slice(start, stop), slice(self.count, self.count + stop - start)
            for name, x in (("keys", k), ("values", v.detach()), ("real", real)):
                local.write(name, here.start, x[:, :, new])
            self.count = here.stop
            at = rope.turn(q[:, :, new], table[:, here])
            sums = kernels.empty_sums(at, v)
            kernels.merge_(*sums, *self._look(at, here.start, scaling, window))
            if self.remembered:
                for part in self._look_back(at, scaling):
                    kernels.merge_(*sums, *part)
            out[:, new] = sums[0].transpose(1, 2)
            start = stop
        self.seen += q.shape[2]
        return out

    def _look(
        self, q: Tensor, first: int, scaling: float, window: int | None
    ) -> tuple[Tensor, Tensor]:
        """Attention within the window; `first` is the place of the first query."""
        assert self.local is not None
        rope, used = self.cache.rope, slice(0, self.count)
        k = rope.turn(self.local.read("keys", used), self.cache.table(q.device)[:, used])
        mask: MaskMod = Causal(first)
        if self._padded or window is not None:
            real = self.local.read("real", used)[:, 0, :, 0]
            far = self.count if window is None else window
            mask = lambda b, h, i, j: (  # noqa: E731
                real[b, j] & (j <= i + first) & (j > i + first - far)
            )
        spec = Spec(mask=mask, scale=scaling)
        return kernels.forward(q, k, self.local.read("values", used), spec)

    def _look_back(self, q: Tensor, scaling: float) -> Iterator[tuple[Tensor, Tensor]]:
        """Attention to parts of the memory, of all queries or of some at a time."""
        assert self.memory is not None
        if self.cache.topk is not None:
            yield self._look_at_best(q, scaling, self.cache.topk)
            return
        for at in self._ranges(KEYS):
            keys, values = (self.memory.read(name, at) for name in ("keys", "values"))
            yield kernels.forward(q, keys, values, Spec(mask=self._real(at), scale=scaling))

    def _look_at_best(self, q: Tensor, scaling: float, topk: int) -> tuple[Tensor, Tensor]:
        """Attention of each query to the keys of the memory with the largest inner products."""
        assert self.memory is not None
        out, lse = kernels.empty_sums(q, self.memory.read("values", slice(0, 0)))
        for start in range(0, q.shape[2], 64):
            rows = slice(start, start + 64)
            part = q[:, :, rows]
            best, index = part.new_empty(0), torch.empty(0, dtype=torch.int64, device=q.device)
            for at in self._ranges(PAIRS // part.shape[2]):
                k = self.memory.read("keys", at)
                scores = kernels.scores_of(part, k, Spec(scale=scaling), self._block(part, at))
                slots = torch.arange(at.start, at.stop, device=q.device).expand_as(scores)
                if best.numel():
                    scores, slots = torch.cat([best, scores], -1), torch.cat([index, slots], -1)
                best, places = scores.topk(min(topk, scores.shape[-1]))
                index = slots.gather(-1, places)
            sums = best.logsumexp(-1)
            # Padding is among the best where there is too little else; it gets nothing.
            shown = sums.masked_fill(sums == -math.inf, 0)[..., None]
            p = (best - shown).exp_()
            for at in self._ranges(PAIRS // part.shape[2]):
                # What lies elsewhere goes to a last column, which is dropped.
                width = at.stop - at.start
                place = torch.where(
                    (index >= at.start) & (index < at.stop), index - at.start, width
                )
                weights = p.new_zeros(*p.shape[:3], width + 1).scatter_(-1, place, p)[..., :width]
                v = self.memory.read("values", at)
                got = kernels.per_key_head(weights, v) @ v.to(p.dtype)
                out[:, :, rows] += got.view(*p.shape[:3], -1)
            lse[:, :, rows] = sums
        return out, lse

    def _ranges(self, width: int) -> Iterator[slice]:
        for start in range(0, self.remembered, width):
            yield slice(start, min(start + width, self.remembered))

    def _real(self, at: slice) -> MaskMod | None:
        if not self._padded:
            return None
        assert self.memory is not None
        real = self.memory.read("real", at)[:, 0, :, 0]
        return lambda b, h, i, j: real[b, j]

    def _block(self, q: Tensor, at: slice) -> Block:
        mask = None
        if self._padded:
            assert self.memory is not None
            mask = self.memory.read("real", at)[:, :, None, :, 0]
        return Block(slice(0, q.shape[2]), slice(0, at.stop - at.start), mask)

    def _remember(self, local: Slots) -> None:
        """Move the window to the memory, where the oldest is overwritten, and start another."""
        if self.memory is not None:
            start, rope = self.moved % self.cache.memory, self.cache.rope
            zero = torch.zeros(1, 1, 1, dtype=torch.int64, device=local.device)
            keys = rope.rotate(local.read("keys", slice(None)), zero)
            self.memory.write("keys", start, keys)
            for name in ("values", "real"):
                self.memory.write(name, start, local.read(name, slice(None)))
        self.moved += self.count
        self.count = 0

    def _allocate(self, k: Tensor, v: Tensor) -> Slots:
        if self.local is not None:
            if self.local.batch != len(k):
                raise UsageError(
                    f"this cache holds {self.local.batch} rows and got {len(k)}; "
                    "make a new cache for another batch"
                )
            return self.local
        cache = self.cache

        def slots(entries: int, place: str, form: Form | None) -> Slots:
            made = Slots(len(k), entries, k.device, place)
            made.add("keys", k.shape[1], k.shape[3], k.dtype, form)
            made.add("values", v.shape[1], v.shape[3], v.dtype, form)
            made.add("real", 1, 1, torch.bool)
            return made

        self.local = slots(cache.window, "device", None)
        if self.remembers:
            self.memory = slots(cache.memory, cache.place, cache.form)
        self.is_initialized = True
        return self.local

    def _both(self) -> list[Slots]:
        return [slots for slots in (self.local, self.memory) if slots is not None]

    def nbytes(self) -> int:
        return sum(slots.nbytes for slots in self._both())

    def reset(self) -> None:
        self.count = self.moved = self.seen = 0
        self._padded, self._waiting = False, None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        for slots in self._both():
            slots.reorder(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        for slots in self._both():
            slots.select(torch.arange(slots.batch)[indices.cpu()])
