"""What every adapter does: attach to a model in place, give its state, merge, detach.

An adapter layer takes over the weight and bias of the linear that it replaces, under the same
names, so that the state dict of the model only gains the adapter's keys, and tied or offloaded
weights stay what they were.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.attach import Handle, Targets, add, features, find, is_transposed, linears, swap
from holdfast.errors import UsageError, unknown
from holdfast.forms.packed import Packed

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_NOT_METHODS = {"apiq_fit", "base", "files", "ist", "packed", "read", "timestep_peqa"}


class Adapter(nn.Module):
    """A linear with a trainable addition; `weight` and `bias` are those of the linear it replaces.

    A subclass takes its knobs as keyword arguments after the linear, and says in `trainable` which
    of its parameters are the adapter.
    """

    key: ClassVar[str]
    trainable: ClassVar[tuple[str, ...]]
    # Constructor arguments that `shared` makes, as opposed to knobs of the user.
    shares: ClassVar[tuple[str, ...]] = ()
    weight: Tensor
    bias: Tensor | None
    replaced: tuple[Any]

    def __init__(self, linear: nn.Module):
        super().__init__()
        self.in_features, self.out_features = features(linear)
        self.transposed = is_transposed(linear)
        self.register_parameter("weight", linear._parameters["weight"])
        self.register_parameter("bias", linear._parameters["bias"])
        # In a tuple, so that the replaced module is no child of this one.
        self.replaced = (linear,)

    @classmethod
    def shared(cls, model: nn.Module, linears: Mapping[str, nn.Module], **knobs: Any) -> dict:
        """Judge all linears together, and make what their layers share: constructor arguments.

        Called once, before the model changes.
        """
        return {}

    @classmethod
    def to_file(cls, knobs: Mapping[str, Any]) -> dict[str, Any]:
        """The knobs as keys of adapter_config.json."""
        raise NotImplementedError

    @classmethod
    def from_file(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """The knobs from adapter_config.json.

        Raises:
            UsageError: the file asks for something that this adapter does not do.
        """
        raise NotImplementedError

    @classmethod
    def check_others(cls, model: nn.Module, others: Mapping[str, Tensor]) -> None:
        """Judge the tensors in a file that are no layer's parameters.

        Raises:
            UsageError: they mean something that the attached adapter does not do.
        """
        if others:
            raise UsageError(
                f"the file holds {next(iter(others))}, which is no tensor of a {cls.key} adapter"
            )

    def beside(self) -> dict[str, Tensor]:
        """Frozen tensors that a file must hold too, because the given model does not tell them."""
        return {}

    def base_forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out) of the frozen linear; autograd keeps nothing for it but W."""
        weight = self.weight.mT if self.transposed else self.weight
        return F.linear(x, weight, self.bias)

    def delta(self) -> Tensor:
        """What the adapter adds to the weight, (out, in), in fp32."""
        raise NotImplementedError

    def restored(self) -> nn.Module:
        """The replaced linear with the parameters that this layer has now."""
        (linear,) = self.replaced
        linear.weight, linear.bias = self.weight, self.bias
        return linear.train(self.training)

    def merged(self) -> nn.Module:
        """A plain linear that computes what this layer does."""
        linear = self.restored()
        delta = self.delta()
        weight = decode(linear)
        with torch.no_grad():
            # In fp32, rounded once.
            weight.copy_(weight.float() + (delta.mT if self.transposed else delta))
        return linear

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


@dataclass
class Attached:
    """What `attach` did to a model; kept on the model until `detach` or `merge`."""

    cls: type[Adapter]
    knobs: dict[str, Any]
    names: list[str]
    handle: Handle
    was_trainable: list[nn.Parameter]


def methods() -> list[str]:
    """Keys of the adapters: the modules of this package."""
    here = importlib.import_module(__package__).__path__
    return sorted(m.name for m in pkgutil.iter_modules(here) if m.name not in _NOT_METHODS)


def adapter_class(key: str) -> type[Adapter]:
    """The layer class of an adapter.

    Raises:
        UsageError: no adapter has this key.
    """
    if key not in methods():
        raise unknown("adapter", key, methods())
    return importlib.import_module(f"{__package__}.{key}").ADAPTER


def attached(model: nn.Module) -> Attached:
    """The record that `attach` left on `model`.

    Raises:
        UsageError: the model has no adapter.
    """
    record = model.__dict__.get("_holdfast_adapter")
    if record is None:
        raise UsageError(f"{type(model).__name__} has no adapter; attach(model, 'lora') adds one")
    return record


def attach(
    model: nn.Module, method: str, targets: Targets = "all-linear", **knobs: Any
) -> nn.Module:
    """Freeze `model` and put an adapter on the linears that `targets` name, in place.

    Only the adapter's parameters require gradients afterwards. They have the dtype of the weight
    they adapt unless the knob `dtype` says otherwise, and lie on its device.

    Args:
        method: an adapter's key, for example `lora`, `peqa`, `randlora`.
        targets: see `holdfast.attach.find`.
        knobs: of the adapter; see its class.

    Raises:
        UsageError: unknown adapter, knob or target, or the model has an adapter already.
    """
    cls = adapter_class(method)
    if "_holdfast_adapter" in model.__dict__:
        raise UsageError(
            f"{type(model).__name__} already has the adapter {attached(model).cls.key!r}; "
            "merge(model) or detach(model) first"
        )
    signature = inspect.signature(cls.__init__).parameters
    known = [k for k, p in signature.items() if p.kind is p.KEYWORD_ONLY and k not in cls.shares]
    for knob in knobs:
        if knob not in known:
            raise unknown(f"knob of {method}", knob, known)
    knobs = {name: signature[name].default for name in known} | knobs
    chosen = find(model, targets)
    names = list(chosen)
    shared = cls.shared(model, chosen, **knobs)
    handle = Handle()
    try:
        for name in names:
            # One at a time and not held here: a layer may free the weight that it replaces.
            layer = cls(linear := chosen.pop(name), **knobs, **shared).train(linear.training)
            handle += swap(model, name, layer)
            del linear
    except BaseException:
        handle.remove()
        raise
    # The forward of a bare container would run a further child, so there a layer holds it.
    owner = _at(model, names)[0] if isinstance(model, _CONTAINERS) else model
    for value in shared.values():
        handle += add(owner, f"holdfast_{method}", value)
    own = {id(layer.get_parameter(key)) for layer in _at(model, names) for key in cls.trainable}
    was_trainable = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
    for parameter in was_trainable:
        parameter.requires_grad_(False)
        parameter.grad = None
    model.__dict__["_holdfast_adapter"] = Attached(cls, knobs, names, handle, was_trainable)
    return model


def _at(model: nn.Module, names: list[str]) -> list[Any]:
    return [model.get_submodule(name) for name in names]


def layers(model: nn.Module) -> dict[str, Adapter]:
    """The adapter layers of a model by name."""
    names = attached(model).names
    return dict(zip(names, _at(model, names), strict=True))


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's parameters alone, as `layer name.parameter name`, detached but not copied."""
    return {
        f"{name}.{key}": getattr(layer, key).detach()
        for name, layer in layers(model).items()
        for key in layer.trainable
    }


@torch.no_grad()
def load_adapter_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy what `adapter_state_dict` gave into the adapter of `model`.

    Raises:
        UsageError: a tensor is missing, unknown or of another shape; nothing is copied then.
    """
    own = adapter_state_dict(model)
    for problem, names in (
        ("lacks", own.keys() - state.keys()),
        ("has, but the model does not,", state.keys() - own.keys()),
    ):
        if names:
            some = ", ".join(sorted(names)[:3])
            raise UsageError(
                f"the adapter state {problem} {some} ({len(names)} in all); "
                "attach with the same targets and knobs"
            )
    for name, tensor in own.items():
        if tensor.shape != state[name].shape:
            raise UsageError(
                f"{name} is {tuple(state[name].shape)} in the adapter state, "
                f"{tuple(tensor.shape)} in the model; attach with the same knobs"
            )
    for name, tensor in own.items():
        tensor.copy_(state[name])


def decode(linear: nn.Module) -> nn.Parameter:
    """Give a linear whose weight is Packed a dense one of the same numbers; returns its weight."""
    weight = linear.get_parameter("weight")
    if isinstance(weight, Packed):
        weight = nn.Parameter(weight.dequantize().contiguous(), requires_grad=False)
        linear.weight = weight
    return weight


def refuse_tied(model: nn.Module, changed: Mapping[str, nn.Module]) -> None:
    """Raise UsageError if the weight of one of `changed` is also that of another module."""
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                users.setdefault(id(parameter), []).append(f"{name}.{key}")
    for linear in changed.values():
        if len(tied := users.get(id(linear.weight), ())) > 1:
            raise UsageError(
                f"{' and '.join(tied)} are one tensor, so a change of one would be one of the "
                "other; leave them out of targets or untie the model"
            )


def detach(model: nn.Module) -> nn.Module:
    """Remove the adapter; the model is what it was before `attach`."""
    record = attached(model)
    for layer in layers(model).values():
        layer.restored()
    return _leave(model, record)


def merge(model: nn.Module) -> nn.Module:
    """Add the adapter into the weights, in place: a plain dense model that computes the same.

    Packed weights are decoded, one after the other.

    Raises:
        UsageError: an adapted weight is shared with another module.
    """
    record = attached(model)
    adapted = layers(model)
    refuse_tied(model, adapted)
    for layer in adapted.values():
        layer.merged()
    _leave(model, record)
    for linear in linears(model).values():
        decode(linear)
    return model


def _leave(model: nn.Module, record: Attached) -> nn.Module:
    record.handle.remove()
    for parameter in record.was_trainable:
        parameter.requires_grad_(True)
    del model.__dict__["_holdfast_adapter"]
    return model
