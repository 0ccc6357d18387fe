"""MEMO (121): what a layer saves for backward is swapped to the host or recomputed, token by token.

Keeps    of each layer but the last two, in the host: its input, its attention's output with the
         log-sum-exp, and of everything else that it saves the rows of the first tokens. The other
         rows are computed again from the rows of input and attention output; attention never is.
Form     that of the model; values are moved, gradients are those of plain training.
Bytes    S = S_in + S_attn + S_oth per layer, by storages: for a GPT block 16*b*s*h elements (input
         1, attention output 1, rest 14) and b*s*(H + 4) fp32 numbers for log-sum-exp and norms.
         Host: (layers - 2) * (S_in + S_attn + rows/s * S_oth), rows = ceil(alpha * s). Device:
         2 S whatever the depth, and the transients of one layer.
Source   "Efficiently Training 7B LLM with 1 Million Sequence Length on 8 GPUs" (MEMO), 2024.
Departs  recomputed rows are put under autograd's one graph, so that backward runs once; the
         log-sum-exp counts as attention output. The two rounding buffers are lifetimes: storages of
         layer i are freed when layer i + 2 begins, and planned addresses make them the same bytes
         (`holdfast.parallel.addresses`). Slots on the host are pinned in place, because an arena's
         pinned slots are rounded up to powers of two.
"""

import functools
import math
import time
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from holdfast import attach
from holdfast.errors import DoesNotFit, HoldfastError, UsageError
from holdfast.parallel import addresses
from holdfast.parallel.token_rows import KEPT, ROWS, Base, Layout, Record, close, parts_of
from holdfast.places.copies import Copies, Pair, pin
from holdfast.units import format_bytes


@dataclass(frozen=True)
class Sizes:
    """Bytes that one layer saves for `tokens` tokens: S_in, S_attn and S_oth."""

    inputs: int
    attention: int
    others: int
    tokens: int

    @property
    def total(self) -> int:
        return self.inputs + self.attention + self.others

    def swapped(self, rows: int) -> int:
        """Bytes that leave the device where the first `rows` tokens of the rest are swapped."""
        return self.inputs + self.attention + self.others // self.tokens * rows


def host_bytes(sizes: Sizes, layers: int, rows: int) -> int:
    """What the host holds: the last two layers are never swapped."""
    return max(layers - 2, 0) * sizes.swapped(rows)


def solve_rows(sizes: Sizes, layers: int, *, bandwidth: float, seconds: float, host: int) -> int:
    """The most rows whose copy hides behind one layer's forward and that the host can hold.

    Input and attention output are swapped even where their copy alone takes longer; then it is 0.

    Args:
        bandwidth: bytes per second from device to host.
        seconds: of one layer's forward.
        host: bytes.

    Raises:
        DoesNotFit: the host cannot hold inputs and attention outputs.
    """
    least = host_bytes(sizes, layers, 0)
    if least > host:
        error = DoesNotFit(
            f"inputs and attention outputs of {layers - 2} layers take {format_bytes(least)} on "
            f"the host, its budget is {format_bytes(host)}; raise it by "
            f"{format_bytes(least - host)} or shorten the sequence"
        )
        error.details = {"host": least}
        raise error

    def too_many(rows: int) -> bool:
        slow = sizes.swapped(rows) / bandwidth > seconds
        return slow or host_bytes(sizes, layers, rows) > host

    return max(bisect_right(range(sizes.tokens + 1), False, key=too_many) - 1, 0)


class _Layer:
    """What runs instead of a block's forward."""

    def __init__(self, memo: "Memo", block: nn.Module, index: int):
        self.memo, self.block, self.index = memo, block, index
        self.parts = parts_of(block)
        self.device = next(block.parameters()).device
        self.layout: Layout | None = None
        self.slots: list[Tensor | None] = []

    def __call__(self, forward: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(x, *args, **kwargs)
        if torch._C._current_graph_task_id() != -1:
            raise UsageError("memo computes rows again itself; turn gradient checkpointing off")
        if torch.is_autocast_enabled(x.device.type):
            raise UsageError("memo does not run under autocast; cast the model itself")
        x, rows, mask = self.parts.inputs(x, *args, **kwargs)
        if x.untyped_storage().nbytes() != x.nbytes:
            x = x.clone()  # or all that it is a view of would be swapped
        self.memo.enter(self)
        weights = [*self.block.parameters(), *self.block.buffers()]
        wanted = functools.partial(self.memo.backward, self.index)
        record = Record(self.parts, x, rows, mask, apart=weights, wanted=wanted)
        made = record.take()
        y = made[-1]
        if not y.requires_grad:
            return y
        if self.layout is None or not record.matches(self.layout):
            name = type(self.block).__name__
            self.layout = record.examine(made, name)

            def plain() -> Tensor:
                with torch.no_grad():
                    own = forward(x, *args, **kwargs)
                return own[0] if isinstance(own, tuple) else own

            if not close(plain(), y):
                raise UsageError(
                    f"{name} does not compute post(x, attention(pre(x))) with causal attention; "
                    "give it methods pre and post that do"
                )
            self.memo.provide(self, plain)
        self.memo.leave(self, record)
        return y

    def bases(self) -> list[Base]:
        assert self.layout is not None
        return self.layout.bases

    def pairs(self, record: Record) -> Iterator[Pair]:
        """What is swapped of a record: its places on the device and on the host."""
        assert self.layout is not None
        for flat, slot, base in zip(record.flat, self.slots, self.layout.bases, strict=True):
            if slot is not None and flat is not None:
                if base.kind == ROWS:
                    flat = base.rows(flat, self.layout.tokens)[:, : slot.shape[1]]
                yield flat, slot

    def make_slots(self, rows: int) -> None:
        """One slab of exactly the bytes that the layer swaps."""
        assert self.layout is not None
        bases = self.layout.bases
        counts = [
            base.count // self.layout.tokens * rows if base.kind == ROWS else base.count
            for base in bases
        ]
        wanted = [i for i, base in enumerate(bases) if base.kind != KEPT and counts[i]]
        # The widest elements first: every slot is aligned, and there is no gap.
        wanted.sort(key=lambda i: -bases[i].dtype.itemsize)
        nbytes = sum(counts[i] * bases[i].dtype.itemsize for i in wanted)
        slab = torch.empty(nbytes, dtype=torch.uint8)
        if self.device.type == "cuda":
            pin(slab)
        self.slots = [None] * len(bases)
        for i in wanted:
            size = counts[i] * bases[i].dtype.itemsize
            piece, slab = slab[:size].view(bases[i].dtype), slab[size:]
            self.slots[i] = bases[i].rows(piece, rows) if bases[i].kind == ROWS else piece


class Memo:
    """Runs a stack of blocks by MEMO, in place: `memo = Memo(model.model.layers, host=...)`.

    It acts where gradients are wanted; under `no_grad` the blocks are plain. A key-value cache that
    the model makes while training stays empty. Each backward follows its forward and runs once.

    Args:
        blocks: in the order in which they run; Hugging Face's LLaMA and GPT-2 blocks and alike, or
            blocks with `pre(x, *rows) -> (q, k, v)` and `post(x, attention) -> y`, x (B,n,h).
        host: budget in bytes.
        alpha: share of the tokens whose rows are swapped and not recomputed; "auto" is the most
            that the host holds and that is copied in the time of a layer's forward.
        bandwidth, seconds: bytes per second from device to host, and of one layer's forward, for
            "auto"; None measures them in the first forward.

    Attributes:
        sizes, rows: of the first layer, and how many tokens are swapped; known after a forward.

    Raises:
        UsageError: alpha outside [0, 1], or a block of unknown structure; in the first forward, a
            block that is not token-wise.
        DoesNotFit: in the first forward, the host's budget is too small.
    """

    def __init__(
        self,
        blocks: Iterable[nn.Module],
        *,
        host: int,
        alpha: float | Literal["auto"] = "auto",
        bandwidth: float | None = None,
        seconds: float | None = None,
    ):
        if alpha != "auto" and not 0 <= alpha <= 1:
            raise UsageError(f"alpha={alpha} is outside [0, 1]; it is the share of swapped tokens")
        self.host, self.alpha, self.bandwidth, self.seconds = host, alpha, bandwidth, seconds
        self.layers = [_Layer(self, block, i) for i, block in enumerate(blocks)]
        self.sizes: Sizes | None = None
        self.rows = 0
        self._copies: Copies | None = None
        # Weak: a graph that is thrown away takes its records along.
        self._records: list[Callable[[], Record | None]] = [lambda: None] * len(self.layers)
        self._turn = -1
        self._handle = attach.Handle()
        for layer in self.layers:
            self._handle += attach.wrap(layer.block, layer)

    def remove(self) -> None:
        """Make the blocks what they were, and free the host's bytes."""
        self._handle.remove()
        for layer in self.layers:
            layer.layout, layer.slots = None, []

    def __deepcopy__(self, memo: dict) -> "Memo":
        raise UsageError("a model that runs by memo cannot be copied; remove() it first")

    @property
    def host_nbytes(self) -> int:
        """Bytes held on the host."""
        return sum(t.nbytes for layer in self.layers for t in layer.slots if t is not None)

    def swaps(self, index: int) -> bool:
        return 0 <= index < len(self.layers) - 2

    def provide(self, layer: _Layer, run: Callable[[], Any]) -> None:
        """The first layer chooses how many rows are swapped; each makes its slots on the host."""
        assert layer.layout is not None
        sizes = Sizes(*layer.layout.nbytes, layer.layout.tokens)
        if layer.index == 0:
            for other in self.layers:
                other.slots = []
            for other in self.layers[1:]:
                other.layout = None
            self.sizes, self.rows = sizes, self._solve(layer, sizes, run)
        if self.swaps(layer.index):
            needed = self.host_nbytes + sizes.swapped(self.rows)
            if needed > self.host:
                raise DoesNotFit(
                    f"layers 0 to {layer.index} swap {format_bytes(needed)}, the host's budget is "
                    f"{format_bytes(self.host)}; raise it or lower alpha"
                )
            layer.make_slots(self.rows)

    def _solve(self, layer: _Layer, sizes: Sizes, run: Callable[[], Any]) -> int:
        if self.alpha != "auto":
            # 0.55 * 100 is a little more than 55.
            return math.ceil(round(self.alpha * sizes.tokens, 6))
        bandwidth, seconds = self.bandwidth, self.seconds
        if seconds is None:
            seconds = min(_seconds(run, layer.device) for _ in range(3))
        if bandwidth is None:
            there = torch.zeros(max(sizes.inputs, 2**24), dtype=torch.uint8, device=layer.device)
            here = torch.zeros_like(there, device="cpu", pin_memory=there.is_cuda)
            fastest = min(_seconds(lambda: here.copy_(there), layer.device) for _ in range(3))
            bandwidth = there.nbytes / fastest
        return solve_rows(
            sizes, len(self.layers), bandwidth=bandwidth, seconds=seconds, host=self.host
        )

    def enter(self, layer: _Layer) -> None:
        """A layer's forward begins: the second one before it leaves the device."""
        if layer.index == 0:
            for get in self._records:
                if (abandoned := get()) is not None:
                    abandoned.give_up()
            self._turn = -1
        if self.swaps(layer.index - 2):
            self._drop(layer.index - 2)
        addresses.cut()

    def leave(self, layer: _Layer, record: Record) -> None:
        """A layer's forward has run: what it saved begins to go to the host."""
        self._records[layer.index] = weakref.ref(record)
        if self.swaps(layer.index):
            record.wait = self._start([(slot, part) for part, slot in layer.pairs(record)], layer)
        if layer.index == len(self.layers) - 1:
            addresses.cut()

    def backward(self, index: int, record: Record) -> None:
        """A layer's backward wants a saved tensor; the first time it begins."""
        if self._records[index]() is not record:
            raise HoldfastError("this is backward of an earlier forward; run it before the next")
        if self._turn == index:
            return
        self._turn = index
        addresses.cut()
        if index + 1 < len(self.layers):
            self._drop(index + 1)
        self._load(index)
        self._load(index - 1)
        if self.swaps(index):
            record.wait()
            layout = self.layers[index].layout
            assert layout is not None
            record.recompute(layout, self.rows)

    def _drop(self, index: int) -> None:
        record = self._records[index]()
        if record is not None:
            record.drop(self.layers[index].bases())

    def _load(self, index: int) -> None:
        """Begin to bring a layer's bytes back, unless they are there."""
        record = self._records[index]() if self.swaps(index) else None
        if record is None or not record.away:
            return
        layer = self.layers[index]
        for i, base in enumerate(layer.bases()):
            if base.kind != KEPT:
                record.flat[i] = torch.empty(base.count, dtype=base.dtype, device=layer.device)
                record.versions[i] = None
        record.wait = self._start(list(layer.pairs(record)), layer)

    def _start(self, pairs: list[Pair], layer: _Layer) -> Callable[[], None]:
        if self._copies is None:
            self._copies = Copies(layer.device)
        return self._copies.start(pairs)


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start
