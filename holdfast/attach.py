"""Find modules of any model by name or role, put others in their place, undo it without trace.

A *linear* here is an `nn.Linear` or the `Conv1D` of GPT-2, whose weight is transposed. Names are
those of `named_modules`; a target means what it means in the peft library.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from holdfast.errors import UsageError

Targets = str | Iterable[str]
ROLES = ("all-linear", "attention", "mlp", "head")
_HEADS = ("lm_head", "head", "classifier", "score", "qa_outputs", "output")


@dataclass
class Handle:
    """Undoes what was attached; also a context manager."""

    # Records, no closures: the deep copy of a model carries handles that undo the copy.
    _undo: list[tuple[Any, str, Any, Any]] = field(default_factory=list)

    def __add__(self, other: "Handle") -> "Handle":
        return Handle(self._undo + other._undo)

    def remove(self) -> None:
        """Restore every changed place, last first; a second call does nothing.

        Raises:
            UsageError: something else was attached on top and must be removed first.
        """
        while self._undo:
            owner, name, old, new = self._undo[-1]
            if isinstance(owner, torch.utils.hooks.RemovableHandle):
                owner.remove()
            else:
                if _get(owner, name) is not new:
                    raise UsageError(
                        f"{type(owner).__name__}.{name} was changed again after it was attached; "
                        "remove the later handle first"
                    )
                _put(owner, name, old)
            self._undo.pop()

    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


_ABSENT = object()


def _get(owner: nn.Module, name: str) -> Any:
    return owner._modules[name] if name in owner._modules else owner.__dict__.get(name, _ABSENT)


def _put(owner: nn.Module, name: str, value: Any) -> None:
    if isinstance(value, nn.Module):
        owner._modules[name] = value
    elif value is None:
        (owner._modules if name in owner._modules else owner.__dict__).pop(name, None)
    else:
        owner.__dict__[name] = value


def is_linear(module: nn.Module) -> bool:
    """Whether `module` computes x W^T + b through its own forward."""
    # nn.MultiheadAttention reads the weight of its output projection past the module's forward.
    return isinstance(module, (nn.Linear, Conv1D)) and not isinstance(
        module, NonDynamicallyQuantizableLinear
    )


def is_transposed(module: nn.Module) -> bool:
    """Whether the weight is stored (in, out), as in GPT-2."""
    return isinstance(module, Conv1D)


def features(module: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear."""
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    assert isinstance(module, nn.Linear)
    return module.in_features, module.out_features


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """All linears by name, in the order of `named_modules`; a shared module appears once."""
    return {name: module for name, module in model.named_modules() if is_linear(module)}


def head(model: nn.Module) -> list[str]:
    """Names of the linears that turn hidden states into the model's answer.

    The output embedding where the model declares one; else what a Hugging Face model holds outside
    its `base_model`; else a child of the model with a customary name.
    """
    found = linears(model)
    output = getattr(model, "get_output_embeddings", lambda: None)()
    if output is not None:
        return [name for name, module in found.items() if module is output]
    base = getattr(model, "base_model", None)
    if isinstance(base, nn.Module) and base is not model:
        inside = set(map(id, base.modules()))
        return [name for name, module in found.items() if id(module) not in inside]
    return [name for name in found if name in _HEADS]


def _role(model: nn.Module, role: str) -> list[str]:
    if role == "head":
        return head(model)
    if role == "all-linear":
        return [name for name in linears(model) if name not in head(model)]
    inside = {
        f"{prefix}.{name}" if prefix else name
        for prefix, entries in blocks(model)
        for name in linears(entries)
    }
    modules = dict(model.named_modules())

    def in_attention(name: str) -> bool:
        parts = name.split(".")
        paths = (".".join(parts[:i]) for i in range(1, len(parts)))
        words = (f"{path.rpartition('.')[2]} {type(modules[path]).__name__}" for path in paths)
        return any(re.search(r"attn|attention", word, re.IGNORECASE) for word in words)

    wanted = role == "attention"
    return [name for name in linears(model) if name in inside and in_attention(name) == wanted]


def find(
    model: nn.Module, targets: Targets = "all-linear", *, exclude: Targets = ()
) -> dict[str, nn.Module]:
    """Linears of `model` that `targets` name, in the model's order.

    Args:
        targets: names, each a full name or its last components (`q_proj`, `c_attn`,
            `layers.0.mlp.up_proj`); or one string: a name, a role (`all-linear` is every linear
            except the head; `attention` and `mlp` are those inside and outside of attention in the
            repeated blocks; `head`), or a regular expression for full names.
        exclude: names to leave out, read the same way.

    Raises:
        UsageError: a target matches no linear; lists the nearest names.
    """
    found = linears(model)
    chosen = _matches(model, found, targets)
    if exclude:
        chosen -= _matches(model, found, exclude)
    if not chosen:
        raise UsageError(
            f"targets {targets!r} without {exclude!r} leave no linear of {type(model).__name__}"
        )
    return {name: module for name, module in found.items() if name in chosen}


def _matches(model: nn.Module, found: dict[str, nn.Module], targets: Targets) -> set[str]:
    single = isinstance(targets, str)
    chosen: set[str] = set()
    for target in [targets] if isinstance(targets, str) else list(targets):
        names = {name for name in found if name == target or name.endswith(f".{target}")}
        if not names and target in ROLES:
            names = set(_role(model, target))
        if not names and single:
            try:
                names = {name for name in found if re.fullmatch(target, name)}
            except re.error as error:
                raise UsageError(f"targets {target!r} is no regular expression: {error}") from error
        if not names:
            raise _no_match(model, found, target)
        chosen |= names
    if not chosen:
        raise UsageError(f"targets {targets!r} name nothing; use for example 'all-linear'")
    return chosen


def _no_match(model: nn.Module, found: dict[str, nn.Module], target: str) -> UsageError:
    # Block indices would only repeat one suggestion.
    known = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in found)
    known.update(dict.fromkeys(name.rpartition(".")[2] for name in found))
    known.update(dict.fromkeys(ROLES))
    near = difflib.get_close_matches(target, known, n=4, cutoff=0.4) or list(known)[:8]
    other = [n for n, m in model.named_modules() if n == target or n.endswith(f".{target}")]
    why = "is not a linear" if other or target in ROLES else "matches no module"
    return UsageError(
        f"target {target!r} {why} of {type(model).__name__}; nearest: {', '.join(near)}"
    )


def swap(model: nn.Module, name: str, new: nn.Module) -> Handle:
    """Put `new` where the module `name` is, everywhere that this same module is registered.

    Raises:
        UsageError: there is no module of that name.
    """
    try:
        old = model.get_submodule(name) if name else None
    except AttributeError:
        old = None
    if old is None:
        raise UsageError(f"{type(model).__name__} has no module {name!r} to replace")
    handle = Handle()
    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):
            if child is not old:
                continue
            parent._modules[key] = new
            handle._undo.append((parent, key, old, new))
            # In evaluation torch's encoder layer reads linear1.weight past the new forward, but not
            # where it thinks that its activation has no fast kernel.
            if isinstance(parent, nn.TransformerEncoderLayer) and parent.activation_relu_or_gelu:
                fast, parent.activation_relu_or_gelu = parent.activation_relu_or_gelu, 0
                handle._undo.append((parent, "activation_relu_or_gelu", fast, 0))
    return handle


def add(model: nn.Module, name: str, new: nn.Module) -> Handle:
    """Register `new` as a further child of `model`.

    Raises:
        UsageError: the model has an attribute of that name.
    """
    if hasattr(model, name):
        raise UsageError(f"{type(model).__name__} already has an attribute {name!r}")
    model.add_module(name, new)
    return Handle([(model, name, None, new)])


def wrap(module: nn.Module, around: Callable[..., Any]) -> Handle:
    """Make `module(...)` call `around(forward, ...)`, where `forward` is what it did before.

    The class, the state dict and the hooks of the module stay as they are.
    """
    before = module.__dict__.get("forward")
    forward = _Around(module.forward, around)
    module.__dict__["forward"] = forward
    return Handle([(module, "forward", before, forward)])


class _Around:
    # An object, not a closure, so that a deep copy of the module calls the copy's forward.
    def __init__(self, inner: Callable[..., Any], around: Callable[..., Any]):
        self.__wrapped__ = inner  # the signature that `inspect` reports
        self.around = around

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.around(self.__wrapped__, *args, **kwargs)


def hook(modules: Iterable[nn.Module], seen: Callable[[nn.Module, Any, Any], Any]) -> Handle:
    """Call `seen(module, inputs, output)` after each forward; what it returns, if not None, is the
    new output."""
    return Handle([(m.register_forward_hook(seen), "", None, None) for m in modules])


def blocks(model: nn.Module) -> list[tuple[str, nn.ModuleList | nn.Sequential]]:
    """The stacks of repeated blocks of a model, by name; an encoder-decoder has two.

    A stack is an outermost list of composite modules of one class. Stacks with less than a tenth of
    the parameters of the largest one are left out. Where the entries all differ in shape they are
    stages, and the stacks inside them are meant.
    """
    stacks = list(_stacks(model, ""))
    sizes = [sum(p.numel() for p in stack.parameters()) for _, stack in stacks]
    return [
        stack for stack, size in zip(stacks, sizes, strict=True) if size * 10 >= max(sizes) and size
    ]


def _stacks(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.ModuleList | nn.Sequential]]:
    for key, child in module.named_children():
        name = f"{prefix}.{key}" if prefix else key
        if not isinstance(child, (nn.ModuleList, nn.Sequential)) or not _is_stack(child):
            yield from _stacks(child, name)
            continue
        shapes = {tuple(tuple(p.shape) for p in entry.parameters()) for entry in child}
        inner = list(_stacks(child, name)) if len(shapes) == len(child) > 1 else []
        yield from inner or [(name, child)]


def _is_stack(module: nn.ModuleList | nn.Sequential) -> bool:
    if not len(module):
        return False
    first = module[0]
    return (
        len({type(entry) for entry in module}) == 1
        and next(first.children(), None) is not None
        and not isinstance(first, (nn.ModuleList, nn.Sequential))
    )
