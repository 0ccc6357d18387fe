"""A causal language model as a chain of blocks: what comes before the layers, each layer, the rest.

A chain is a list of modules that each take one tensor (B,...) and return one; systems that move
layers one by one run it. The parts refer to the model's own modules, so that training the chain
trains the model.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast import attach
from holdfast.errors import UsageError


class _Reached(Exception):
    """Ends a forward at the first layer, with what that was given."""

    def __init__(self, given: tuple[tuple, dict]):
        self.given = given


class Front(nn.Module):
    """Token ids (B,n) -> the hidden states (B,n,d) that enter the first layer."""

    def __init__(self, backbone: nn.Module, first: nn.Module, parts: list[nn.Module]):
        super().__init__()
        self.parts = nn.ModuleList(parts)
        # Unregistered: the layers inside are other blocks'.
        self._whole = (backbone, first)

    def forward(self, ids: Tensor) -> Tensor:
        args, kwargs = _entering(*self._whole, ids)
        return args[0] if args else kwargs["hidden_states"]


class Inner(nn.Module):
    """One layer, given beside its input what the model gave it for one row."""

    def __init__(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]):
        super().__init__()
        self.layer = layer
        self.args, self.kwargs = self._keep("args", args), self._keep("kwargs", kwargs)

    def _get_name(self) -> str:
        return self.layer._get_name()

    def _keep(self, name: str, value: Any) -> Any:
        """Put tensors into buffers, which move with the block and are counted."""
        if isinstance(value, Tensor):
            name = f"given_{name}"
            self.register_buffer(name, value.detach(), persistent=False)
            return _Named(name)
        if isinstance(value, tuple | list):
            return tuple(self._keep(f"{name}_{i}", part) for i, part in enumerate(value))
        if isinstance(value, dict):
            return {key: self._keep(f"{name}_{key}", part) for key, part in value.items()}
        return value

    def _given(self, value: Any) -> Any:
        if isinstance(value, _Named):
            return getattr(self, value.name)
        if isinstance(value, tuple):
            return tuple(map(self._given, value))
        if isinstance(value, dict):
            return {key: self._given(part) for key, part in value.items()}
        return value

    def forward(self, h: Tensor) -> Tensor:
        out = self.layer(h, *self._given(self.args), **self._given(self.kwargs))
        return out[0] if isinstance(out, tuple) else out


class _Named:
    def __init__(self, name: str):
        self.name = name


class Tail(nn.Module):
    """Hidden states (B,n,d) -> logits (B,n,V)."""

    def __init__(self, parts: list[nn.Module]):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, h: Tensor) -> Tensor:
        for part in self.parts:
            h = part(h)
        return h


def causal_lm_chain(model: nn.Module, ids: Tensor, *, verify: bool = True) -> list[nn.Module]:
    """The blocks of a Hugging Face causal language model, for unpadded rows as long as `ids`.

    Args:
        ids: (B,n) token ids; the chain is run on the first row and compared with the model.
        verify: False where there are no values to compare, on fake tensors.

    Raises:
        UsageError: the model has no single stack of layers, or is not a chain around one.
    """
    stacks = attach.blocks(model)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    name = type(model).__name__
    if len(stacks) != 1 or head is None:
        raise UsageError(
            f"{name} has {len(stacks)} stacks of layers and "
            f"{'a' if head is not None else 'no'} language model head; expected one of each"
        )
    layers = list(stacks[0][1])
    row = ids[:1]
    backbone = cast(nn.Module, model.base_model)
    before, after = _around(model, layers, row)
    args, kwargs = _entering(backbone, layers[0], row)
    rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
    chain: list[nn.Module] = [Front(backbone, layers[0], before)]
    chain += [Inner(layer, args[1:], rest) for layer in layers]
    chain.append(Tail(after))
    if not verify:
        return chain
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            expected, h = model(input_ids=row, use_cache=False).logits, row
            for block in chain:
                h = block.eval()(h)
    finally:
        for block in chain:
            block.train(training)
        model.train(training)
    if h.shape != expected.shape or not torch.allclose(h, expected, rtol=1e-3, atol=1e-4):
        raise UsageError(
            f"{name} computes something between its layers and its logits that is no chain of "
            "modules; build the blocks by hand, each from one tensor to one tensor"
        )
    return chain


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean cross-entropy of each position's logits (B,n,V) against the next token of ids (B,n)."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).to(wide), ids[:, 1:].flatten())


def _entering(backbone: nn.Module, first: nn.Module, ids: Tensor) -> tuple[tuple, dict]:
    def stop(_: Callable, *args: Any, **kwargs: Any) -> None:
        raise _Reached((args, kwargs))

    with attach.wrap(first, stop):
        try:
            backbone(input_ids=ids, use_cache=False)
        except _Reached as reached:
            return reached.given
    raise UsageError(f"{type(backbone).__name__} does not call its layers in order")


def _around(
    model: nn.Module, layers: list[nn.Module], ids: Tensor
) -> tuple[list[nn.Module], list[nn.Module]]:
    """Modules that hold something before the first layer, and leaves after the last one."""
    inside = {id(m) for layer in layers for m in layer.modules()}
    order: list[nn.Module] = []
    at: dict[str, int] = {}

    def seen(module: nn.Module, given: Any, out: Any) -> None:
        if module is layers[0]:
            at["first"] = len(order)
        if module is layers[-1]:
            at["last"] = len(order)
        leaf = next(module.children(), None) is None
        if id(module) not in inside and (leaf or _holds(module)):
            order.append(module)

    outer = [m for m in model.modules() if id(m) not in inside]
    with attach.hook([*outer, *{layers[0], layers[-1]}], seen), torch.no_grad():
        model(input_ids=ids, use_cache=False)
    return [m for m in order[: at["first"]] if _holds(m)], order[at["last"] :]


def _holds(module: nn.Module) -> bool:
    """Whether it has parameters or buffers of its own."""
    return any(v is not None for v in (*module._parameters.values(), *module._buffers.values()))
