"""What lean autograd Functions share: packed masks, first-order backward, swapping by class.

Every Function here keeps tensors only through `save_for_backward`, so that saved-tensor hooks,
checkpointing and offload see each byte, and asks `ctx.needs_input_grad` in each forward call.
"""

import functools
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.errors import HoldfastError
from holdfast.native.bits import ops

_log = logging.getLogger(__name__)

# Multiplying eight 0/1 bytes by this gathers them in the top byte; multiplying one byte by it moves
# bit 7-k to the top of byte k. Both without a carry. Written as a signed 64-bit number.
_GATHER = 0x8040201008040201 - (1 << 64)
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def pack_mask(mask: Tensor) -> Tensor:
    """One bit per element: bool of any shape -> (ceil(numel / 8),) uint8, in an order of its own.

    `forms.bits` packs one bit too; this pair takes the fewer passes that the time of a ReLU allows.
    """
    flat = mask.flatten()
    if flat.numel() % 8:
        flat = F.pad(flat, (0, -flat.numel() % 8))
    return (
        (flat.view(torch.int64) * _GATHER)
        .view(torch.uint8)[7::8]
        .clone(memory_format=torch.contiguous_format)
    )


def where_set(packed: Tensor, x: Tensor) -> Tensor:
    """x where the packed mask is set, 0 elsewhere, also where x is infinite or NaN."""
    words = packed.to(torch.int64).mul_(_GATHER)
    # 0 or -1 per element: `and` with the bits of x has no branch that a random mask mispredicts,
    # which makes `where` and `masked_fill` ten times slower on a CPU.
    passes = (words.view(torch.int8) >> 7)[: x.numel()].view(x.shape)
    return (x.view(_INTEGERS[x.element_size()]) & passes).view(x.dtype)


def first_order(backward: Callable) -> Callable:
    """Refuse `create_graph=True` in a backward that is not itself differentiable."""

    @functools.wraps(backward)
    def checked(ctx, *grads: Tensor):
        if torch.is_grad_enabled():
            raise HoldfastError(
                f"{type(ctx).__name__.removesuffix('Backward')} has no double backward, because "
                "it does not keep its input; call backward without create_graph, or use the "
                "original layer where second derivatives are needed"
            )
        return backward(ctx, *grads)

    return checked


class LeanPointwise(torch.autograd.Function):
    """y = f(x), exact, with a slope that takes 2^bits values: keeps packed codes instead of x."""

    @staticmethod
    def forward(ctx, x: Tensor, f: Callable[[Tensor], Tensor], slope: "StepSlope") -> Tensor:
        ctx.slope = slope
        ctx.save_for_backward(ops.step_codes(x, slope.bounds, slope.bits, slope.even))
        # Afterwards, because f may overwrite x.
        y = f(x)
        if y is x:
            ctx.mark_dirty(x)
        return y

    @staticmethod
    @first_order
    def backward(ctx, gy: Tensor):
        (packed,), slope = ctx.saved_tensors, ctx.slope
        return ops.step_slope(packed, gy, slope.levels, slope.bits), None, None


@dataclass(frozen=True)
class StepSlope:
    """A derivative as a step function: `levels[i]` where i of the ascending `bounds` are below x.

    Args:
        even: the steps are those of |x|.
    """

    bits: int
    bounds: tuple[float, ...]
    levels: tuple[float, ...]
    even: bool = False


def grads_wanted(*tensors: Tensor | None) -> bool:
    """Whether autograd records an operation on these tensors now."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Cast as autocast would: inside a Function it would cast after the tensors were kept."""
    kind = next(t for t in tensors if t is not None).device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def swap_classes(model: nn.Module, twin: Callable[[nn.Module], type | None]) -> Counter[str]:
    """Give each module its lean twin class in place; returns how many of each class changed.

    A twin is a subclass that changes only `forward`: parameters, names, hooks, `state_dict` and
    `isinstance` stay as they were.
    """
    changed: Counter[str] = Counter()
    for module in model.modules():
        lean = twin(module)
        if lean is not None:
            changed[type(module).__name__] += 1
            module.__class__ = lean
    return changed


def report(method: str, changed: Counter[str]) -> None:
    """Log what a conversion changed."""
    listed = ", ".join(f"{count} {name}" for name, count in sorted(changed.items()))
    _log.info("%s converted %s", method, listed or "nothing")
