"""Model sources: from what a user names to a model without weights and the inputs of one step.

A source is a built-in shape, a config.json, a model directory, a hub id in the local cache,
`module:function`, a transformers config or any `nn.Module`. Nothing is downloaded and no code
from a model repository is run.

A function named by `module:function` takes no arguments and returns one of

- a module with a method `example_inputs(batch, sequence, device) -> dict`, or
- a pair `(module, example_inputs)` with such a function.

The dict holds the keyword arguments of one training step. The module, called with them, returns
the loss: a scalar tensor, an object or dict with `loss`, or a tuple that starts with it.
"""

import copy
import hashlib
import importlib
import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from holdfast.errors import UsageError, unknown
from holdfast.plan.heads import (
    Head,
    Step,
    build_head,
    choose_head,
    config_from_dict,
    head_inputs,
    position_limit,
)
from holdfast.plan.shapes import SHAPES, find_shape

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Kind = Literal["shape", "config", "directory", "hub", "callable", "module"]
Inputs = Callable[[int, int, torch.device], dict[str, Any]]

_CALLABLE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
# Fields that do not change what the model holds or computes.
_INCIDENTAL = ("transformers_version", "_name_or_path", "dtype", "use_cache", "architectures")


@dataclass(frozen=True, eq=False)
class ModelSource:
    """A model that can be built without its weights.

    `path` is the local directory of its weights, None where there are none. `make` is set for
    sources that are code, not a config: it returns the module and, if known, its `example_inputs`.
    """

    name: str
    kind: Kind
    config: "PretrainedConfig | None" = None
    path: Path | None = None
    make: Callable[[], tuple[nn.Module, Inputs | None]] | None = field(default=None, repr=False)

    @cached_property
    def _head(self) -> Head | None:
        return None if self.config is None else choose_head(self.config)

    @property
    def _shape(self) -> "PretrainedConfig":
        assert self.config is not None, "sources without `make` have a config"
        return self.config

    @property
    def task_head(self) -> str:
        """A task of `HEADS`; else "base" (a config without a loss) or "custom" (code)."""
        if self._head is not None:
            return self._head.task
        return "base" if self.make is None else "custom"

    def build(
        self,
        device: torch.device | str = "meta",
        dtype: torch.dtype | None = None,
        attention: str | None = None,
    ) -> nn.Module:
        """A fresh module on `device`, in training mode.

        To trace one, build it on meta outside of FakeTensorMode and convert its tensors: some
        constructors read values, which fake tensors do not have.

        Args:
            dtype: of floating-point parameters and buffers; by default fp32 for configs, and as
                they are for modules.
            attention: transformers' attn_implementation; by default sdpa where the architecture
                has it, else eager.
        """
        device = torch.device(device)
        if self.make is None:
            return build_head(self._shape, self._head, device, dtype or torch.float32, attention)
        with device:
            module = self.make()[0]
        if device.type == "meta":
            module = meta_copy(module)
        elif self.kind == "module":
            module = copy.deepcopy(module)
        return module.to(device=device, dtype=dtype).train()

    def example_inputs(
        self,
        batch: int,
        sequence: int,
        device: torch.device | str = "meta",
        dtype: torch.dtype = torch.float32,
    ) -> dict[str, Any]:
        """Keyword arguments of one training step, labels included.

        Text: int64 (batch, sequence), without padding and hence without a mask. Images:
        `dtype` (batch, channels, height, width) of the config's size; `sequence` is not used.

        Raises:
            UsageError: nothing says what a step is fed, or `sequence` exceeds the positions.
        """
        for what, value in (("batch", batch), ("sequence", sequence)):
            if value < 1:
                raise UsageError(f"{what} {value} is not positive; use 1 or more")
        device = torch.device(device)
        if self.make is None:
            return head_inputs(
                self._shape, self._head, Step(batch, sequence, device, dtype), self.max_sequence
            )
        if self._inputs is None:
            raise UsageError(
                f"{self.name} does not say what one training step is fed; return "
                "(module, example_inputs) or give the module a method "
                "example_inputs(batch, sequence, device) that returns a dict of keyword arguments"
            )
        inputs = self._inputs(batch, sequence, device)
        if not isinstance(inputs, dict):
            raise UsageError(
                f"example_inputs of {self.name} returned {type(inputs).__name__}; expected a dict "
                "of the keyword arguments of one training step"
            )
        return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}

    @cached_property
    def max_sequence(self) -> int | None:
        """Longest sequence that the model's table of positions allows; None if unbounded."""
        if self.make is not None:
            return None
        return position_limit(self._shape, self.build)

    @cached_property
    def _inputs(self) -> Inputs | None:
        assert self.make is not None
        with torch.device("meta"):
            return self.make()[1]

    def fingerprint(self) -> str:
        """SHA-256 over the fields, or the modules and shapes, that decide bytes and time."""
        if self.make is None:
            fields = self._shape.to_dict()
            content: Any = {k: v for k, v in fields.items() if k not in _INCIDENTAL}
        else:
            module = self.build()
            content = {
                "modules": [(n, repr(type(m)), m.extra_repr()) for n, m in module.named_modules()],
                "tensors": [
                    (n, tuple(t.shape), str(t.dtype), t.requires_grad)
                    for n, t in (*module.named_parameters(), *module.named_buffers())
                ],
            }
        text = json.dumps([self.task_head, content], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()


def loss_of(output: Any) -> Tensor:
    """The scalar loss in what a model returned.

    Raises:
        UsageError: there is none.
    """
    if isinstance(output, Mapping):
        loss = output.get("loss")
    elif isinstance(output, tuple) and output and not hasattr(output, "loss"):
        loss = output[0]
    else:
        loss = getattr(output, "loss", output)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise UsageError(
            f"the model returned {type(output).__name__} without a scalar loss; return the loss, "
            "or an object or dict with `loss`, when called with the step's keyword arguments"
        )
    return loss


def meta_copy(module: nn.Module) -> nn.Module:
    """A copy on the meta device: same shapes, dtypes, ties and requires_grad, no memory."""
    shadows: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        shadow = torch.empty_like(tensor, device="meta", requires_grad=False)
        if isinstance(tensor, nn.Parameter):
            shadow = nn.Parameter(shadow, requires_grad=tensor.requires_grad)
        shadows[id(tensor)] = shadow
    return copy.deepcopy(module, shadows)


def resolve(
    spec: "str | os.PathLike[str] | dict[str, Any] | nn.Module | PretrainedConfig",
) -> ModelSource:
    """The source that `spec` names; an existing path wins over a name.

    A name with a slash is a hub id: taken from the local cache if it is there, else from the
    built-in shape of the same id.

    Raises:
        UsageError: unknown name, missing file, malformed config, or no such function.
    """
    if isinstance(spec, nn.Module):
        return _from_module(spec)
    if isinstance(spec, dict):
        config = config_from_dict(spec, "the given dict")
        return ModelSource(f"{config.model_type} config", "config", config)
    if isinstance(spec, str | os.PathLike):
        return _from_name(os.fspath(spec))
    from transformers import PretrainedConfig

    if isinstance(spec, PretrainedConfig):
        return ModelSource(f"{spec.model_type} config", "config", copy.deepcopy(spec))
    raise UsageError(
        f"model {spec!r} is a {type(spec).__name__}; expected a name, a path, a config or a module"
    )


def _from_name(name: str) -> ModelSource:
    path = Path(name).expanduser()
    if path.is_file():
        return ModelSource(name, "config", _read_config(path))
    if (path / "config.json").is_file():
        return ModelSource(name, "directory", _read_config(path / "config.json"), _weights(path))
    if _CALLABLE.fullmatch(name):
        function = _import(name)
        return ModelSource(name, "callable", make=lambda: _call(name, function))
    shape = find_shape(name)
    snapshot = _cached(name) if shape is None or "/" in name else None
    if snapshot is not None:
        config = _read_config(snapshot / "config.json")
        return ModelSource(name, "hub", config, _weights(snapshot))
    if shape is not None:
        return ModelSource(shape.name, "shape", config_from_dict(shape.config, shape.name))
    if path.is_dir():
        hint = ""
        if (path / "adapter_config.json").is_file():
            hint = "; it holds an adapter: name the model that the adapter belongs to"
        raise UsageError(f"model directory {name} has no config.json{hint}")
    raise _unknown(name)


def _unknown(name: str) -> UsageError:
    if name.endswith(".json") or name.startswith((".", "/", "~")):
        return UsageError(f"model {name}: no such file or directory")
    elsewhere = (
        "the path of a config.json, a model directory, a hub id in the local cache (nothing is "
        "downloaded: for another model save its config.json and give that path) or module:function"
    )
    if "/" in name:
        return UsageError(f"model {name!r} is not in the local cache; expected {elsewhere}")
    error = unknown("model", name, [shape.name for shape in SHAPES])
    return UsageError(f"{error}. A model may also be {elsewhere}")


def _read_config(path: Path) -> "PretrainedConfig":
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UsageError(f"{path} is not readable JSON: {error}; expected a config.json") from error
    return config_from_dict(fields, str(path))


def _weights(directory: Path) -> Path | None:
    return directory if any(any(directory.glob(pattern)) for pattern in _WEIGHTS) else None


def _cached(name: str) -> Path | None:
    """The cached snapshot of a hub id; looks at files only, never at the network."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def _from_module(module: nn.Module) -> ModelSource:
    from transformers import PretrainedConfig

    name, config = type(module).__name__, getattr(module, "config", None)
    inputs = getattr(module, "example_inputs", None)
    if not isinstance(config, PretrainedConfig):
        return ModelSource(name, "module", make=lambda: (module, inputs))
    config = copy.deepcopy(config)
    config.architectures = [name]
    if inputs is None:
        dtype = next((p.dtype for p in module.parameters()), torch.float32)
        inputs = partial(ModelSource(name, "config", config).example_inputs, dtype=dtype)
    return ModelSource(name, "module", config, make=lambda: (module, inputs))


def _import(spec: str) -> Callable[[], Any]:
    module_name, _, function_name = spec.partition(":")
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a user's module may fail in any way
        raise UsageError(
            f"model {spec!r}: importing {module_name} from {here} or the Python path failed: "
            f"{type(error).__name__}: {error}"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise unknown("function", spec, [f"{module_name}:{n}" for n in vars(module)])
    return function


def _call(spec: str, function: Callable[[], Any]) -> tuple[nn.Module, Inputs | None]:
    try:
        made = function()
    except Exception as error:
        raise UsageError(
            f"model {spec!r} failed when called without arguments: {type(error).__name__}: {error}"
        ) from error
    module, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(module, nn.Module) or not (inputs is None or callable(inputs)):
        raise UsageError(
            f"model {spec!r} returned {type(made).__name__}; expected an nn.Module or "
            "(module, example_inputs)"
        )
    return module, inputs or getattr(module, "example_inputs", None)
