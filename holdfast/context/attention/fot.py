"""Focused Transformer (162): some layers also attend to a memory of all windows before, and are
trained not to be distracted by it.

Keeps    in all layers the keys and values of the current window of l tokens; in memory layers S
         those of the last n_mem tokens of earlier windows.
Form     the window's keys un-rotated, in the model's dtype; memory keys as if at position 0, in any
         form, on the device or in host memory; one byte per entry that says it is no padding.
Bytes    2*L*B*H*l*d*b + L*B*l, 2*|S|*B*H*n_mem*d*b_mem + |S|*B*n_mem, and a table of rotations,
         4*l*width. Training: keys and values of C windows per row are copied for each memory layer,
         2*B*C*H*n*d*b.
Source   Tworkowski, Staniszewski, Pacek, Wu, Michalewski, Milos, "Focused Transformer: Contrastive
         Training for Context Scaling", NeurIPS 2023. No code was read.
Departs  windows are cut where tokens are counted from the start, also while decoding; a memory that
         is full forgets its oldest window. Row j of a pack of k reaches back ceil(C*(j+1)/k) rows.
         The search for the best keys is exact: it focuses, but saves no work.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from holdfast.context import interface
from holdfast.context.attention.fot_cache import FoTCache
from holdfast.context.cache.deferred import NAME
from holdfast.context.interface import Visible
from holdfast.context.kernels import attention_with_lse
from holdfast.context.masks import Causal
from holdfast.context.rope import Rope
from holdfast.errors import UsageError, unknown
from holdfast.forms.base import Form

BACKENDS = ("dense", "topk")
TRAINING = "fot"


class FoT:
    """A model of which some layers have a memory: makes caches for it, and trains it.

    Args:
        model: a decoder with rotary positions.
        mem_layers: layers with a memory, from 0.
        backend: "dense" attends to the whole memory, "topk" each query to its best keys there.
        topk: how many those are, by inner product; 32 by default.

    Raises:
        UsageError: no such layers, an unknown backend, or a model without rotary positions.
    """

    def __init__(
        self, model: PreTrainedModel, mem_layers: Sequence[int], backend: str = "dense",
        topk: int | None = None,
    ):  # fmt: skip
        layers = model.config.get_text_config(decoder=True).num_hidden_layers
        outside = [layer for layer in mem_layers if not 0 <= layer < layers]
        if outside or not mem_layers:
            raise UsageError(
                f"mem_layers={list(mem_layers)}: expected one or more of 0 to {layers - 1}, the "
                f"layers of this {type(model).__name__}"
            )
        if backend not in BACKENDS:
            raise unknown("memory backend", backend, BACKENDS)
        if topk is not None and (backend != "topk" or topk < 1):
            raise UsageError(f'topk={topk} needs backend="topk" and must be 1 or more')
        self.model, self.mem_layers = model, tuple(sorted(set(mem_layers)))
        self.topk = (topk or 32) if backend == "topk" else None
        self._rope = Rope.from_model(model)

    def cache(
        self, *, window: int, memory: int, form: Form | None = None, place: str = "device"
    ) -> "FoTCache":
        """An empty cache for the model, which is switched to the attention "holdfast".

        Args:
            window: tokens that all layers attend to exactly; at most what the model was trained at.
            memory: tokens that memory layers remember, a multiple of the window.
            form: how the memory is stored; by default in the model's dtype.
            place: of the memory: "device", or "host".
        """
        if window < 1 or memory < window or memory % window:
            raise UsageError(
                f"memory={memory} and window={window}: expected a memory of one or more windows"
            )
        if place not in ("device", "host"):
            raise UsageError(f'place={place!r}; expected "device" or "host"')
        interface.use(self.model, NAME)
        return FoTCache(
            self.model, self.mem_layers, window=window, memory=memory, topk=self.topk, form=form,
            place=place,
        )  # fmt: skip

    def across(self, range: int, pack: int = 1) -> "Across":
        """Let memory layers attend across the rows of a batch, for training, until `.remove()`.

        Rows must be consecutive windows of documents, one document after the other; the loss is the
        model's own. Start with a small range and raise `.range` of what is returned.

        Args:
            range: rows before its own that a row attends to, at most (C).
            pack: rows with different ranges up to `range`, over and over; 1 gives all the same.
        """
        modules = [
            module
            for module in self.model.modules()
            if getattr(module, "layer_idx", None) in self.mem_layers
        ]
        if any(getattr(module, "_fot", None) is not None for module in modules):
            raise UsageError(
                "this model attends across its batch already; change the range of what across() "
                "returned, or remove it first"
            )
        reach(0, range, pack)
        across = Across(self._rope, range, pack, modules, interface.use(self.model, TRAINING))
        for module in modules:
            module._fot = across  # type: ignore[assignment]
        return across


@dataclass(eq=False)
class Across:
    """How far memory layers attend across a batch; undoes `FoT.across`; also a context manager."""

    rope: Rope
    range: int
    pack: int
    modules: list[nn.Module]
    before: interface.Use

    def remove(self) -> None:
        """Give the model its attention back; a second call does nothing."""
        while self.modules:
            self.modules.pop()._fot = None  # type: ignore[assignment]
        self.before.remove()

    def __enter__(self) -> "Across":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def reach(rows: int, most: int, pack: int = 1) -> list[int]:
    """How many rows before itself each row of a batch attends to."""
    if most < 0 or pack < 1:
        raise UsageError(f"range={most}, pack={pack}: use a range of 0 or more and packs of 1")
    return [min(row, -(-most * (row % pack + 1) // pack)) for row in range(rows)]


def cross_batch_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    range: int,
    pack: int = 1,
    memory_keys: Tensor | None = None,
    valid: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """Causal attention to the own window and, in the same softmax, to all of the windows before.

    Args:
        q, k, v: (B,Hq,n,d), (B,H,n,d), (B,H,n,dv); rows are consecutive windows.
        range, pack: as in `FoT.across`.
        memory_keys: (B,H,n,d), keys as other rows see them; by default k.
        valid: (B,n) bool, False for padding.
        scale, dropout, seed: as in `attention_with_lse`.

    Returns:
        (B,Hq,n,dv); gradients reach keys and values of the rows before.
    """
    rows, n = q.shape[0], q.shape[2]
    if k.shape[2] != n:
        raise UsageError(
            f"{n} queries and {k.shape[2]} keys: attention across a batch reads whole windows; "
            "train without a cache (use_cache=False)"
        )
    own = reach(rows, range, pack)
    most = max(own, default=0)
    back = torch.arange(most, 0, -1, device=q.device)
    near = back <= torch.tensor(own, device=q.device)[:, None]
    before = (torch.arange(rows, device=q.device)[:, None] - back).clamp(min=0)

    def with_rows_before(x: Tensor, seen: Tensor) -> Tensor:
        """x (B,H,n,e) behind those of earlier rows: (B,H,(most+1)*n,e)."""
        return torch.cat([seen[before].transpose(1, 2).flatten(2, 3), x], 2)

    past = most * n
    real = None if valid is None else torch.cat([valid[before].flatten(1), valid], 1)

    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        shown = j - past <= i
        if most:
            shown = torch.where(j < past, near[b, (j // n).clamp(max=most - 1)], shown)
        return shown if real is None else shown & real[b, j]

    keys = with_rows_before(k, k if memory_keys is None else memory_keys)
    mask = Causal() if not most and real is None else sees
    out, _ = attention_with_lse(
        q, keys, with_rows_before(v, v), mask=mask, scale=scale, dropout=dropout, seed=seed
    )
    return out


def cross_batch_ref(
    q: Tensor, k: Tensor, v: Tensor, *, range: int, pack: int = 1, memory_keys: Tensor | None = None
) -> Tensor:
    """`cross_batch_attention` row by row, as many heads of keys as of queries."""
    memory_keys = k if memory_keys is None else memory_keys
    out = []
    for row, back in enumerate(reach(len(q), range, pack)):
        keys = torch.cat([*memory_keys[row - back : row], k[row]], 1)
        values = torch.cat([*v[row - back : row], v[row]], 1)
        scores = q[row] @ keys.mT * q.shape[-1] ** -0.5
        future = torch.ones_like(scores, dtype=torch.bool).triu(1 + keys.shape[1] - k.shape[2])
        out.append(scores.masked_fill(future, -math.inf).softmax(-1) @ values)
    return torch.stack(out)


class _Turn(torch.autograd.Function):
    """`Rope.turn`, which writes in place, with its gradient: turning the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor, rope: Rope) -> Tensor:
        ctx.save_for_backward(table)
        ctx.rope = rope
        return rope.turn(x, table)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors[0]
        return ctx.rope.turn(grad, torch.stack([cos, -sin])), None, None


def at_start(rope: Rope, k: Tensor, positions: Tensor) -> Tensor:
    """Keys (B,H,n,d) that were rotated at positions (B|1,n), as if at 0; differentiable."""
    table = rope.inverse_table(positions)
    # Some types of rotation also scale, at position 0 too.
    table = table * rope.table(torch.zeros_like(positions[:1, :1]))[0]
    return _Turn.apply(k, table[:, :, None], rope)


def _attend(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, visible: Visible, *,
    scaling: float, dropout: float = 0.0, position_ids: Tensor | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    own: Across | None = getattr(module, "_fot", None)
    seed = int(torch.randint(2**31, ())) if dropout else 0
    if own is None:
        out, _lse = attention_with_lse(
            q, k, v, mask=visible.mask, scale=scaling, dropout=dropout, seed=seed
        )
        return out.transpose(1, 2), None
    if not visible.causal:
        raise UsageError("attention across a batch needs plain causal attention in memory layers")
    if position_ids is None:
        position_ids = torch.arange(q.shape[2], device=q.device)[None]
    out = cross_batch_attention(
        q, k, v, range=own.range, pack=own.pack, scale=scaling, dropout=dropout, seed=seed,
        memory_keys=at_start(own.rope, k, position_ids), valid=visible.valid,
    )  # fmt: skip
    return out.transpose(1, 2), None


interface.register(TRAINING, _attend)
