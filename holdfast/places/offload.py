"""Offload whole modules: every forward goes through its own ActivationStore."""

import weakref
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from holdfast import attach
from holdfast.places.activations import ActivationStore
from holdfast.places.arena import Arena


def offload(
    modules: nn.Module | Iterable[nn.Module], arena: Arena, *, overlap: bool | None = None
) -> attach.Handle:
    """Keep everything that each module's forward saves for backward in `arena`.

    Buffers stay on the device, and so do inputs that need no gradient, except the first
    positional one: masks and rotary tables are shared by all blocks and would be copied for each.
    A checkpoint inside the forward (wrapped before this call) composes: the block's inputs are
    what moves. A checkpoint around an offloaded module has nothing left to recompute.

    Args:
        modules: blocks in the order in which they run, none inside another; a `ModuleList` means
            its members.
        overlap: see `ActivationStore`.
    """
    # A ModuleList has no forward of its own.
    if isinstance(modules, nn.Module) and not isinstance(modules, nn.ModuleList):
        modules = [modules]
    line = _Line(arena, overlap)
    handle = attach.Handle()
    for module in modules:
        handle += attach.wrap(module, _Through(module, line))
    return handle


class _Line:
    """What the modules of one call share: the arena, and the store that was entered last."""

    def __init__(self, arena: Arena, overlap: bool | None):
        self.arena, self.overlap = arena, overlap
        self.last: Callable[[], ActivationStore | None] = lambda: None

    def __deepcopy__(self, memo: dict) -> "_Line":
        # The copy of a model runs on the same budget.
        return self


class _Through:
    """Runs a forward inside a store; an object, so that a deep copy refers to the copied module."""

    def __init__(self, module: nn.Module, line: _Line):
        self.module, self.line = module, line

    def __call__(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        line, module = self.line, self.module
        keep = chain(module.parameters(), module.buffers(), _shared_inputs(args, kwargs))
        store = ActivationStore(
            line.arena,
            # Beside parameters on a GPU, what is saved in host memory stays there.
            device=next((p.device for p in module.parameters()), None),
            keep=keep,
            after=line.last(),
            overlap=line.overlap,
        )
        line.last = weakref.ref(store)
        with store:
            return forward(*args, **kwargs)


def _shared_inputs(args: tuple, kwargs: dict) -> Iterator[Tensor]:
    for value in (*args[1:], *kwargs.values()):
        parts = value if isinstance(value, tuple | list) else [value]
        yield from (t for t in parts if isinstance(t, Tensor) and not t.requires_grad)
