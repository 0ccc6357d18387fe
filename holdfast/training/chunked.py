"""Cut the work of a step: slices of one call, or segments of a stack of blocks.

Keeps    what crosses the cuts: the inputs of a slice or of a segment, and the outputs.
Form     the dtypes of the plain computation; values and gradients are exact.
Bytes    a call whose temporaries grow with the cut dimension holds those of `size` rows at a time.
         L blocks in k segments keep k boundaries and, while one segment runs backward, the inside
         of L/k blocks: b*k + a*L/k, least at k = sqrt(L*a/b), which is sqrt(L) where a block saves
         no more than its boundary (a = b).
Source   Chen, Xu, Zhang, Guestrin, Training Deep Nets with Sublinear Memory Cost, 2016 (segments);
         Jumper et al., Highly accurate protein structure prediction with AlphaFold, 2021,
         supplementary 1.11.8 (slices).
Departs  slices may also be recomputed in the backward pass; the paper slices at inference only.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from holdfast import attach
from holdfast.errors import UsageError
from holdfast.plan.blocks import find_stacks, signature
from holdfast.training.step import recompute


def chunked(
    fn: Callable[..., Tensor], dim: int, size: int, *, recompute: bool = False
) -> Callable[..., Tensor]:
    """`fn` over slices of its first argument, concatenated: equal where rows of `dim` are separate.

    Args:
        fn: (x, *others) -> Tensor whose `dim` has the length of that of x; others are not sliced.
        size: rows of a slice; the last one may be shorter.
        recompute: run each slice again in the backward pass, so that there too the temporaries of
            one slice exist at a time.

    Raises:
        UsageError: size below 1; when called, a slice whose output has another length.
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise UsageError(f"chunk size {size!r} is not a positive integer; use 1 or more rows")

    def over_slices(x: Tensor, *others):
        again = recompute and torch.is_grad_enabled()
        parts = []
        # One split, whose gradient is one concatenation; slicing would add as many full tensors.
        for piece in x.split(size, dim):
            if again:
                part = checkpoint(fn, piece, *others, use_reentrant=False)
            else:
                part = fn(piece, *others)
            if part.shape[dim] != piece.shape[dim]:
                raise UsageError(
                    f"a slice of {piece.shape[dim]} rows along dim {dim} gave "
                    f"{part.shape[dim]}; choose a dim that the function keeps"
                )
            parts.append(part)
        return torch.cat(parts, dim)

    return over_slices


class Segment(nn.Module):
    """Consecutive blocks as one: each is fed what the one before it returned.

    A tensor becomes the next block's first argument, a tuple all positional ones; further
    arguments are the same for all blocks.
    """

    def __init__(self, blocks: list[nn.Module]):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, *args, **kwargs):
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            output = block(*args, **kwargs)
            if i == last:
                return output
            if isinstance(output, Tensor):
                args = (output, *args[1:])
            elif isinstance(output, tuple) and len(output) == len(args):
                args = output
            else:
                raise UsageError(
                    f"{type(block).__name__} returns {type(output).__name__} for "
                    f"{len(args)} positional arguments; segments need blocks that return their "
                    "first argument's successor, or a tuple of all"
                )

    def __getattr__(self, name: str):
        # Models ask a block for its kind of mask; blocks of one segment are of one kind.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("blocks")[0], name)


def _split(blocks: list[nn.Module], segments: int) -> Iterator[list[nn.Module]]:
    small, larger = divmod(len(blocks), segments)
    start = 0
    for i in range(segments):
        stop = start + small + (i < larger)
        yield blocks[start:stop]
        start = stop


def why_not_segments(model: nn.Module) -> str | None:
    """None where blocks can run in segments, else one line that says why not."""
    stacks = find_stacks(model)
    if not stacks:
        return "it has no list of repeated blocks"
    for path in stacks:
        kinds = {_kind(block) for block in model.get_submodule(path)}
        if len(kinds) > 1:
            return f"the blocks of {path} are of {len(kinds)} kinds and may be fed differently"
    return None


def _kind(block: nn.Module) -> tuple:
    # What trains does not decide what a block is fed.
    return tuple(
        (name, kind, tuple((key, shape) for key, shape, *_ in own), scalars)
        for name, kind, own, _, scalars in signature(block)
    )


def group_(model: nn.Module, segments: int | None = None) -> attach.Handle:
    """Put every stack of blocks into `segments` of equal length, in place, within one block.

    Args:
        segments: per stack; by default the square root of its depth, rounded up.

    Returns:
        A handle that restores the stack. Until then names in the state dict have one index more.

    Raises:
        UsageError: more segments than blocks, or blocks of several kinds.
    """
    reason = why_not_segments(model)
    if reason is not None:
        raise UsageError(f"{type(model).__name__} cannot run in segments: {reason}")
    handle = attach.Handle()
    for path in find_stacks(model):
        blocks = list(model.get_submodule(path))
        count = math.ceil(math.sqrt(len(blocks))) if segments is None else segments
        if not 1 <= count <= len(blocks):
            raise UsageError(
                f"{path} has {len(blocks)} blocks, which cannot make {count} segments; "
                f"use 1 to {len(blocks)}"
            )
        grouped = nn.ModuleList(Segment(part) for part in _split(blocks, count))
        handle += attach.swap(model, path, _like(model.get_submodule(path), grouped))
    return handle


def _like(stack: nn.Module, grouped: nn.ModuleList) -> nn.Module:
    return grouped if isinstance(stack, nn.ModuleList) else nn.Sequential(*grouped)


def checkpoint_segments(model: nn.Module, segments: int | None = None) -> attach.Handle:
    """Recompute consecutive blocks together in the backward pass, in place.

    Args and raises as `group_`; the handle restores the model.
    """
    paths = find_stacks(model)
    handle = group_(model, segments)
    for path in paths:
        for segment in model.get_submodule(path):
            handle += recompute(segment)
    return handle
