"""Reversible sequences: keep what a stack of blocks returns, and rebuild from it what each was fed.

Keeps    the output; 32 numbers of each part of the input, to tell whether it was rebuilt.
Form     the dtype of the input, which parts keep from block to block.
Bytes    N*b for any number of blocks, + 32*b per part; + the state of the generator (CPU 5,056,
         CUDA 16) for each function that draws random numbers. During backward also N*b rebuilt,
         N*b of their gradient, what one function of one block saves, and all parameters'
         gradients, which autograd receives together.
Source   Gomez, Ren, Urtasun, Grosse, "The Reversible Residual Network: Backpropagation Without
         Storing Activations", 2017 (two parts); Zhao, Dong, Shen, Zhang, Wei, Chen,
         "Memory-Efficient Differentiable Transformer Architecture Search", 2021 (any number).
Departs  generators are put back where a function drew from them; batch norms update their running
         statistics once; an input that was not rebuilt is an error, not a wrong gradient.

In bf16 and fp16 every addition rounds, and rebuilt inputs drift with depth. Keep the stream in fp32
and compute the functions under autocast, where that matters.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.batchnorm import _BatchNorm

from holdfast.errors import HoldfastError, UsageError
from holdfast.training.saved.lean import first_order, grads_wanted

PROBES = 32


@dataclass(frozen=True)
class MultiSplit:
    """Additive coupling of `parts` equal slices of dimension `dim`: y_k = x_k + g_k(y_<k, x_>k).

    With two parts y_1 = x_1 + g_1(x_2), y_2 = x_2 + g_2(y_1), the coupling of RevNets.
    """

    parts: int = 2
    dim: int = -1

    def __post_init__(self):
        if self.parts < 2:
            raise UsageError(f"a coupling of {self.parts} part(s) is not invertible; use 2 or more")

    def split(self, x: Tensor) -> list[Tensor]:
        size = x.shape[self.dim]
        if size % self.parts:
            below = size - size % self.parts
            raise UsageError(
                f"dimension {self.dim} of {tuple(x.shape)} has {size} elements, which do not split "
                f"into {self.parts} equal parts; use {below or self.parts} or {below + self.parts}"
            )
        return list(x.chunk(self.parts, self.dim))

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(parts), self.dim)


class ReversibleSequence(nn.Module):
    """Blocks in a row whose inputs are rebuilt in the backward pass instead of kept.

    Args:
        blocks: each holds one module per part, in order; several may share parameters. Module k is
            called with the other parts in order, then the context, and returns what to add to
            part k: the same shape, no wider dtype. It must repeat itself: random numbers only from
            torch's default generators, no state but that of batch norms.
        coupling: how a tensor becomes parts and parts become a tensor.
        reversible: False keeps every activation, as autograd does; the values are the same. May be
            changed at any time.

    Raises:
        UsageError: no blocks, or one with another number of functions than the coupling has parts.
    """

    def __init__(
        self, blocks: Iterable[nn.ModuleList], coupling: MultiSplit, *, reversible: bool = True
    ):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.coupling, self.reversible = coupling, reversible
        if not len(self.blocks):
            raise UsageError("a reversible sequence needs one block or more, got none")
        for i, block in enumerate(self.blocks):
            count = len(cast(nn.ModuleList, block))
            if count != coupling.parts:
                raise UsageError(
                    f"block {i} has {count} functions for {coupling.parts} parts; give it one "
                    "for each part"
                )

    def forward(self, x: Tensor, *context: Tensor | None) -> Tensor:
        """x, split along the coupling's dimension -> the same shape.

        Args:
            context: further tensors, the same for every function; they receive gradients.

        Raises:
            UsageError: x is not divisible or not floating point; a function returns another shape
                or dtype, or updates a buffer.
            HoldfastError: in backward, where a function did not repeat itself or reads a tensor
                that requires gradients and is neither a parameter of the sequence nor context.
        """
        if not x.is_floating_point():
            raise UsageError(f"x is {x.dtype}; reversible blocks add to it in floating point")
        parameters = [p for p in self.parameters() if p.requires_grad]
        if self.reversible and grads_wanted(x, *context, *parameters):
            return Reversible.apply(self, len(context), x, *context, *parameters)
        parts = self.coupling.split(x)
        for _, k, function in self.functions():
            parts[k] = parts[k] + _update(function, k, parts, context)
        return self.coupling.join(parts)

    @torch.no_grad()
    def inverse(self, y: Tensor, *context: Tensor | None) -> Tensor:
        """The x of which `forward` made y; for functions that draw no random numbers."""
        parts = self.coupling.split(y)
        with _statistics_frozen(self):
            for _, k, function in reversed(list(self.functions())):
                parts[k] = parts[k] - _update(function, k, parts, context)
        return self.coupling.join(parts)

    def functions(self) -> Iterator[tuple[int, int, nn.Module]]:
        """(position, part, function) in the order in which they run."""
        blocks = cast(Iterable[nn.ModuleList], self.blocks)
        flat = (function for block in blocks for function in block)
        return ((i, i % self.coupling.parts, function) for i, function in enumerate(flat))


class Reversible(torch.autograd.Function):
    """The forward pass without a graph; the backward pass builds that of one function at a time."""

    @staticmethod
    def forward(ctx, sequence: ReversibleSequence, context_size: int, x: Tensor, *tensors):
        context = tensors[:context_size]
        ctx.sequence, ctx.context_size = sequence, context_size
        # A saved-tensor hook may return a copy of a parameter: autograd's own is known by its id.
        ctx.parameter_ids = [id(p) for p in tensors[context_size:]]
        present = [x, *(t for t in tensors if t is not None), *sequence.buffers()]
        devices = sorted({(t.device.type, t.device.index or 0) for t in present})
        ctx.autocast = _autocast_state({kind for kind, _ in devices})
        # Fake tensors draw no numbers and have none to compare.
        ctx.real = not isinstance(x, FakeTensor) and not x.is_meta
        ctx.generators = _generators(devices) if ctx.real else []

        parts = sequence.coupling.split(x)
        probe = _probe(parts)
        ctx.drawn, states = [], []
        with _autocast(ctx.autocast), _buffers_checked(sequence):
            for i, k, function in sequence.functions():
                before = [generator.get_state() for generator in ctx.generators]
                parts[k] = parts[k] + _update(function, k, parts, context)
                for which, state in enumerate(before):
                    if not torch.equal(state, ctx.generators[which].get_state()):
                        ctx.drawn.append((i, which))
                        states.append(state)
        y = sequence.coupling.join(parts)
        # Parameters cost nothing to keep, and autograd then refuses those that changed meanwhile.
        ctx.save_for_backward(y, probe, *tensors, *states)
        return y

    @staticmethod
    @first_order
    def backward(ctx, gy: Tensor):
        y, probe, *rest = ctx.saved_tensors
        size, count = ctx.context_size, len(ctx.parameter_ids)
        needs = ctx.needs_input_grad[3:]
        context = [
            kept if kept is None else kept.detach().requires_grad_(need)
            for kept, need in zip(rest[:size], needs[:size], strict=True)
        ]
        leaves = [*map(id, context), *ctx.parameter_ids]
        sums: dict[int, Tensor | None] = dict.fromkeys(leaves)
        states = dict(zip(ctx.drawn, rest[size + count :], strict=True))

        coupling = ctx.sequence.coupling
        parts, grads = coupling.split(y), coupling.split(gy)
        scale = _probe(parts)
        with _autocast(ctx.autocast), _statistics_frozen(ctx.sequence), _restored(ctx.generators):
            for i, k, function in reversed(list(ctx.sequence.functions())):
                for which, generator in enumerate(ctx.generators):
                    if (i, which) in states:
                        generator.set_state(states[i, which])
                _undo(function, k, parts, grads, context, sums)
        if ctx.real:
            _check_rebuilt(probe, _probe(parts), scale)
        del parts
        gx = coupling.join(grads) if ctx.needs_input_grad[2] else None
        found = [sums[leaf] if need else None for leaf, need in zip(leaves, needs, strict=True)]
        return None, None, gx, *found


def _update(function: nn.Module, k: int, parts: Sequence[Tensor], context: Sequence) -> Tensor:
    """What `function` adds to part k."""
    part = parts[k]
    added = function(*parts[:k], *parts[k + 1 :], *context)
    if added.shape != part.shape or torch.promote_types(added.dtype, part.dtype) != part.dtype:
        raise UsageError(
            f"{type(function).__name__} returned {tuple(added.shape)} {added.dtype} for a part of "
            f"{tuple(part.shape)} {part.dtype}; it must return that shape and no wider dtype"
        )
    return added


def _undo(
    function: nn.Module,
    k: int,
    parts: list[Tensor],
    grads: list[Tensor],
    context: Sequence[Tensor | None],
    sums: dict[int, Tensor | None],
) -> None:
    """Replace part k by what it was before `function`, and add the gradients of what it read.

    A function of its own, so that nothing of it is alive while the next one runs.
    """
    inputs = [part.detach().requires_grad_() for part in parts]
    with torch.enable_grad():
        added = _update(function, k, inputs, context)
    if added.requires_grad:
        part_of = {id(leaf): i for i, leaf in enumerate(inputs)}
        leaves = _leaves(added)
        for leaf in leaves:
            if id(leaf) not in part_of and id(leaf) not in sums:
                raise HoldfastError(
                    f"{type(function).__name__} reads a tensor of {tuple(leaf.shape)} that "
                    "requires gradients and would receive none: make it a parameter of the "
                    "sequence or pass it as context; parameters must be the same objects as in "
                    "the forward pass"
                )
        found = torch.autograd.grad(added, leaves, grads[k].to(added.dtype))
        for leaf, gradient in zip(leaves, found, strict=True):
            i = part_of.get(id(leaf))
            if i is not None:
                grads[i] = grads[i] + gradient
            else:
                known = sums[id(leaf)]
                sums[id(leaf)] = gradient if known is None else known + gradient
    parts[k] = parts[k] - added.detach()


def _leaves(root: Tensor) -> list[Tensor]:
    """Every tensor whose gradient depends on that of `root`, from its graph."""
    if root.grad_fn is None:
        return [root]
    seen: set[Any] = {root.grad_fn}
    waiting, leaves = list(seen), []
    while waiting:
        node = waiting.pop()
        if type(node).__name__ == "AccumulateGrad":
            leaves.append(node.variable)
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)
    return leaves


def _probe(parts: Sequence[Tensor]) -> Tensor:
    """`PROBES` evenly spaced numbers of each part, or all if there are fewer, in one tensor."""
    size = parts[0].numel()
    count = min(PROBES, size)
    index = torch.arange(count, device=parts[0].device) * size // max(1, count)
    return torch.cat([part.detach().take(index) for part in parts])


def _check_rebuilt(probe: Tensor, rebuilt: Tensor, output: Tensor) -> None:
    scale = torch.maximum(probe.abs(), output.abs()).max() if probe.numel() else 1
    # Rounding drifts by a few eps; other random numbers change the leading digits.
    error = ((rebuilt - probe).abs() / scale).max().item() if probe.numel() else 0.0
    limit = max(1e-3, 8 * torch.finfo(probe.dtype).eps)
    # Not `error <= limit`: an overflowed loss scale makes NaN, which its scaler handles.
    if error > limit:
        raise HoldfastError(
            f"the input rebuilt in backward is off by {error:.2g} of its size (limit {limit:.2g}), "
            "so gradients would be wrong: a function did not repeat itself. Draw random numbers "
            "from torch's default generators, which are replayed. If it draws none, rounding was "
            "amplified, by values too large for their dtype or a norm of constant values: "
            "normalise what functions return, or keep the stream in a wider dtype"
        )


def _generators(devices: Iterable[tuple[str, int]]) -> list[torch.Generator]:
    """The default generators of the CPU and of these devices."""
    found = [torch.default_generator]
    for kind, index in devices:
        if kind not in ("cpu", "meta"):
            found.append(torch.get_device_module(kind).default_generators[index])
    return found


@contextlib.contextmanager
def _restored(generators: Sequence[torch.Generator]) -> Iterator[None]:
    states = [generator.get_state() for generator in generators]
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def _autocast_state(kinds: Iterable[str]) -> list[tuple[str, bool, torch.dtype]]:
    return [
        (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        for kind in kinds
        if torch.amp.is_autocast_available(kind)
    ]


def _autocast(state: Iterable[tuple[str, bool, torch.dtype]]) -> contextlib.ExitStack:
    stack = contextlib.ExitStack()
    for kind, enabled, dtype in state:
        # A cast that is cached where no graph is recorded would cut the gradient of a later user.
        stack.enter_context(torch.autocast(kind, dtype, enabled=enabled, cache_enabled=False))
    return stack


@contextlib.contextmanager
def _statistics_frozen(sequence: nn.Module) -> Iterator[None]:
    """Batch norms normalise as before, and leave the running statistics that forward updated."""
    tracking = [
        module
        for module in sequence.modules()
        if isinstance(module, _BatchNorm) and module.training and module.track_running_stats
    ]
    for module in tracking:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in tracking:
            module.track_running_stats = True


@contextlib.contextmanager
def _buffers_checked(sequence: nn.Module) -> Iterator[None]:
    """Refuse functions that update a buffer: running again, they would update it again."""
    held = [
        (path, module, name, buffer, buffer._version)
        for path, module in sequence.named_modules()
        if not isinstance(module, _BatchNorm)
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    yield
    for path, module, name, buffer, version in held:
        if module._buffers[name] is not buffer or buffer._version != version:
            raise UsageError(
                f"{type(module).__name__} at {path} updates its buffer {name!r} in forward, and "
                "would update it again in backward; put it in eval mode or keep it out of "
                "reversible blocks"
            )
