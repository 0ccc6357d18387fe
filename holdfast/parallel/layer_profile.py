"""Profile of a chain: what each layer holds and how long it takes, by micro-batch size.

Every distinct layer runs alone on the device, for each size; equal layers share one measurement.
"""

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from holdfast.errors import DoesNotFit, UsageError
from holdfast.meter import StorageLog, ledger_of
from holdfast.plan.blocks import signature
from holdfast.units import format_bytes

Loss = Callable[[Tensor, Tensor], Tensor]
REPEATS = 3
# The running loss and its scalars, of whatever dtype.
SCALARS = 64


@dataclass(frozen=True)
class Cost:
    """One layer at one micro size; nanoseconds, and bytes beside parameters, gradients and input.

    `backward_ns` and `backward_bytes` include the forward that is run again, `saved_bytes` is what
    it leaves. Where a micro-batch is the whole batch, gradients grow during its backward, and
    `backward_bytes` counts on all their memory from the start: it may be below 0.
    """

    forward_ns: int
    backward_ns: int
    forward_bytes: int
    saved_bytes: int
    backward_bytes: int


@dataclass(frozen=True)
class Layer:
    """Bytes of a layer's parameters and gradients, nanoseconds to move and update them."""

    name: str
    parameter_bytes: int
    gradient_bytes: int
    load_ns: int
    store_ns: int
    update_ns: int
    random: bool  # forward reads the random state
    costs: dict[int, Cost] = field(default_factory=dict)  # sizes that ran


@dataclass(frozen=True)
class Profile:
    """Layers, and the tensors between them: shape without the rows and dtype, 0 is the input."""

    layers: tuple[Layer, ...]
    shapes: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    fixed_bytes: int  # always on the device: buffers and scalars

    def boundary_bytes(self, position: int, rows: int) -> int:
        shape, dtype = self.shapes[position]
        return rows * torch.Size(shape).numel() * dtype.itemsize

    @property
    def bandwidth(self) -> float:
        """Bytes per nanosecond between host and device, from all layers' parameters."""
        moved = sum(layer.parameter_bytes for layer in self.layers)
        return max(moved, 1) / max(sum(layer.load_ns for layer in self.layers), 1)


def profile(
    layers: Sequence[nn.Module],
    x: Tensor,
    target: Tensor,
    loss: Loss,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    *,
    sizes: Sequence[int],
    rows: int,
    budget: int,
    device: torch.device,
) -> Profile:
    """Measure each layer of the chain at each micro size; parameters stay as they are.

    Args:
        x, target: example rows, as many as the largest of `sizes` or more.
        sizes: micro sizes; those at which a layer runs out of memory are left out for it.
        rows: of the whole batch of one device.

    Raises:
        DoesNotFit: a layer's parameters and gradients alone pass the budget.
        UsageError: a layer that is not a function from one tensor (B,...) to one tensor (B,...),
            or that keeps statistics of the batch.
    """
    for i, layer in enumerate(layers):
        _refuse(i, layer, budget)
    with StorageLog(device):  # the first dispatch imports modules whose frames hold tensors
        torch.zeros((), device=device)
    known: dict[Hashable, Cost | None] = {}
    moves: dict[Hashable, tuple[int, int, int]] = {}
    costs: list[dict[int, Cost]] = [{} for _ in layers]
    random = [False] * len(layers)
    shapes: list[tuple[tuple[int, ...], torch.dtype]] = []
    for size in sorted(sizes):
        value, ends = x[:size].to(device), target[:size]
        shapes = [(tuple(value.shape[1:]), value.dtype)]
        for i, layer in enumerate(layers):
            last = i == len(layers) - 1
            end = partial(_end, loss, ends) if last else None
            key = (signature(layer), tuple(value.shape), value.dtype, last)
            run = _Run(i, layer, device)
            if key[0] not in moves:
                moves[key[0]] = run.moves(optimizer)
            reads, out = run.once(value)
            random[i] |= reads
            if key not in known:
                try:
                    known[key] = run.cost(value, end, size < rows)
                except torch.OutOfMemoryError:
                    known[key] = None
            if (cost := known[key]) is not None:
                costs[i][size] = cost
            value = out
            shapes.append((tuple(value.shape[1:]), value.dtype))
    found = []
    for i, layer in enumerate(layers):
        size, trained = parameter_bytes(layer), gradient_bytes(layer)
        load, store, update = moves[signature(layer)]
        found.append(
            Layer(layer_name(i, layer), size, trained, load, store, update, random[i], costs[i])
        )
    buffers = {b.untyped_storage()._cdata: b.nbytes for m in layers for b in m.buffers()}
    return Profile(tuple(found), tuple(shapes), sum(buffers.values()) + SCALARS)


def _end(loss: Loss, target: Tensor, y: Tensor) -> Tensor:
    return loss(y, target.to(y.device, copy=True))


def layer_name(index: int, layer: nn.Module) -> str:
    return f"layer {index} ({layer._get_name()})"


def parameter_bytes(layer: nn.Module) -> int:
    return sum(p.nbytes for p in layer.parameters())


def gradient_bytes(layer: nn.Module) -> int:
    return sum(p.nbytes for p in layer.parameters() if p.requires_grad)


def _refuse(i: int, layer: nn.Module, budget: int) -> None:
    for name, module in layer.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            raise UsageError(
                f"{layer_name(i, layer)} has {type(module).__name__} {name!r}, which sees the "
                "whole batch; micro-batches would change it: use a norm of each sample"
            )
    needed = parameter_bytes(layer) + gradient_bytes(layer)
    if needed > budget:
        raise layer_too_large(layer_name(i, layer), needed, budget, "parameters and gradients")


def layer_too_large(name: str, needed: int, budget: int, what: str) -> DoesNotFit:
    """The error for a layer that no pack can hold."""
    error = DoesNotFit(
        f"{name} alone needs {format_bytes(needed)} on the device for {what}, budget is "
        f"{format_bytes(budget)}; raise it to {needed} bytes or split the layer"
    )
    error.details = {"layer": name, "needed_bytes": needed, "budget_bytes": budget}
    return error


class _Run:
    """One layer alone on the device."""

    def __init__(self, index: int, layer: nn.Module, device: torch.device):
        self.index, self.layer, self.device = index, layer, device
        self.state: dict[str, Tensor] = {}
        for name, p in layer.named_parameters():
            copy = p.detach().to(device, copy=True)
            self.state[name] = copy.requires_grad_(p.requires_grad)
        self.buffers = {name: b.to(device) for name, b in layer.named_buffers()}

    def __call__(self, x: Tensor) -> Tensor:
        return functional_call(self.layer, self.state | self.buffers, (x,))

    @torch.no_grad()
    def once(self, x: Tensor) -> tuple[bool, Tensor]:
        """Whether the forward reads the random state, and its output."""
        before = _random_state(self.device)
        out = self(x)
        if not isinstance(out, Tensor) or out.dim() == 0 or len(out) != len(x):
            given = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise UsageError(
                f"{layer_name(self.index, self.layer)} made {given} of {tuple(x.shape)}; a block "
                f"takes one tensor of {len(x)} rows and returns one; wrap it so that it does"
            )
        if not out.is_floating_point():
            raise UsageError(
                f"{layer_name(self.index, self.layer)} returned {out.dtype}, through which no "
                "gradient passes; a block returns a floating-point tensor"
            )
        return not torch.equal(before, _random_state(self.device)), out

    def cost(self, x: Tensor, end: Callable[[Tensor], Tensor] | None, again: bool) -> Cost:
        """`end` turns the output into the loss; `again`: onto gradients of earlier micros."""
        forward_bytes, _ = self._bytes(lambda log: self(x), x, grad=False)
        saved = 0
        leaf = x.detach().requires_grad_(x.is_floating_point())
        trained = [p for p in self.state.values() if p.requires_grad]

        def clear() -> None:
            for p in trained:
                p.grad = torch.zeros_like(p) if again else None

        def backward(log: StorageLog | None) -> None:
            nonlocal saved
            y = self(leaf)
            if log is not None:
                saved = log.live_bytes()
            if not y.requires_grad:
                return
            if end is None:
                y.backward(torch.ones_like(y))
            else:
                result = end(y)
                del y
                result.backward()
            leaf.grad = None

        clear()
        backward(None)  # the first use of a kernel imports modules
        clear()
        backward_bytes, base = self._bytes(backward, leaf, grad=True)
        if not again:
            backward_bytes -= sum(p.nbytes for p in trained)
        with torch.no_grad():
            forward_ns = _time(lambda: self(x), self.device)
        backward_ns = _time(lambda: backward(None), self.device)
        return Cost(forward_ns, backward_ns, forward_bytes, saved - base, backward_bytes)

    def _bytes(self, run: Callable[[StorageLog], Any], x: Tensor, grad: bool) -> tuple[int, int]:
        """Peak beyond what was there, and what was there."""
        log = StorageLog(self.device)
        log.seed("parameters", [*self.state.values(), *self.buffers.values()])
        log.seed("gradients", [p.grad for p in self.state.values()])
        log.seed("inputs", x)
        base = log.live_bytes()
        with torch.set_grad_enabled(grad), log:
            run(log)
        return ledger_of(log.log).peak() - base, base

    def moves(self, optimizer: Callable[..., torch.optim.Optimizer]) -> tuple[int, int, int]:
        """Nanoseconds to copy the parameters in, the gradients out, and to update on the host."""
        host = [p.detach() for p in self.layer.parameters()]
        device = [torch.empty_like(p, device=self.device) for p in host]
        load = _time(lambda: _copy(device, host), self.device)
        trained = [p.detach().clone() for p in self.layer.parameters() if p.requires_grad]
        if not trained:
            return load, 0, 0
        beyond = [torch.empty_like(p, device=self.device) for p in trained]
        store = _time(lambda: _copy([torch.empty_like(p) for p in trained], beyond), self.device)
        parameters = [nn.Parameter(p) for p in trained]
        stepper = optimizer(parameters)
        for p in parameters:
            p.grad = torch.zeros_like(p)
        stepper.step()  # makes the states
        return load, store, _time(stepper.step, self.device)


def _copy(to: list[Tensor], source: list[Tensor]) -> None:
    for a, b in zip(to, source, strict=True):
        a.copy_(b)


def _random_state(device: torch.device) -> Tensor:
    if device.type == "cuda":
        return torch.cuda.get_rng_state(device)
    return torch.get_rng_state()


def _time(run: Callable[[], Any], device: torch.device) -> int:
    """Least nanoseconds of several runs."""
    best = None
    for _ in range(REPEATS + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter_ns()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took = time.perf_counter_ns() - start
        best = took if best is None else min(best, took)
    assert best is not None
    return best
