"""Repeated blocks of any model: where they are, which are alike, and a shallow copy of the model.

A depth-40 model is traced with three blocks: the first, the last, and one of each kind between.
Every other block takes the record of the kept block that it equals.
"""

from dataclasses import dataclass
from typing import cast

from torch import nn

from holdfast import attach

# Attributes that number a block without changing what it computes.
_NUMBERING = {"layer_idx", "layer_id", "idx", "index", "layer_number", "layer_index", "block_idx"}


@dataclass(frozen=True)
class Stack:
    """One list of repeated blocks: `kept[k]` is the real index of traced block k, and
    `representative[i]` the traced block that stands for real block i."""

    path: str
    kept: tuple[int, ...]
    representative: tuple[int, ...]

    @property
    def depth(self) -> int:
        return len(self.representative)


def _scalars(module: nn.Module) -> tuple:
    values = []
    for name, value in sorted(vars(module).items()):
        if name in _NUMBERING or name.startswith("_"):
            continue
        if isinstance(value, bool | int | float | str | type(None)) or (
            isinstance(value, tuple) and all(isinstance(v, int | float | str) for v in value)
        ):
            values.append((name, value))
    return tuple(values)


def signature(block: nn.Module) -> tuple:
    """Equal for two blocks that run the same operations on the same shapes."""
    parts = []
    for name, module in block.named_modules():
        own = tuple(
            (key, tuple(p.shape), p.dtype, p.requires_grad)
            for key, p in module.named_parameters(recurse=False)
        )
        buffers = tuple(
            (k, tuple(b.shape), b.dtype) for k, b in module.named_buffers(recurse=False)
        )
        parts.append((name, type(module), own, buffers, _scalars(module)))
    return tuple(parts)


def find_stacks(model: nn.Module) -> list[str]:
    """Paths of the lists of two or more repeated blocks, in module order."""
    return [path for path, stack in attach.blocks(model) if len(stack) > 1]


def choose_kept(signatures: list[tuple]) -> Stack:
    """Which blocks to trace: the first, one of each kind in the middle, the last."""
    depth = len(signatures)
    kept = [0]
    middle: dict[tuple, int] = {}
    for index in range(1, depth - 1):
        if signatures[index] not in middle:
            middle[signatures[index]] = index
            kept.append(index)
    if depth > 1:
        kept.append(depth - 1)
    position = {real: k for k, real in enumerate(kept)}
    representative = [
        position[i] if i in (0, depth - 1) else position[middle[signatures[i]]]
        for i in range(depth)
    ]
    return Stack("", tuple(kept), tuple(representative))


def members(model: nn.Module, path: str) -> list[nn.Module]:
    """The blocks of the list at `path`."""
    return list(cast(nn.ModuleList, model.get_submodule(path)))


def stacks_of(model: nn.Module) -> list[Stack]:
    stacks = []
    for path in find_stacks(model):
        chosen = choose_kept([signature(block) for block in members(model, path)])
        stacks.append(Stack(path, chosen.kept, chosen.representative))
    return stacks


def whole(stacks: list[Stack]) -> list[Stack]:
    """The same stacks with every block kept: for models that cannot run shallow."""
    return [Stack(s.path, tuple(range(s.depth)), tuple(range(s.depth))) for s in stacks]


def truncate_(model: nn.Module, stacks: list[Stack]) -> nn.Module:
    """Drop in place the blocks that are not kept."""
    for stack in stacks:
        survivors = [members(model, stack.path)[i] for i in stack.kept]
        listed = isinstance(model.get_submodule(stack.path), nn.ModuleList)
        parent, _, name = stack.path.rpartition(".")
        shallow = nn.ModuleList(survivors) if listed else nn.Sequential(*survivors)
        setattr(model.get_submodule(parent), name, shallow)
    return model
