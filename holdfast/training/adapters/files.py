"""Adapters on disk: adapter_config.json and adapter_model.safetensors in one directory.

LoRA and RandLoRA are written in the format of the peft library, which opens them; the others use
the same two files with keys and a `peft_type` of their own, which peft refuses.
"""

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from holdfast.errors import UsageError
from holdfast.training.adapters.base import (
    Adapter,
    adapter_class,
    adapter_state_dict,
    attach,
    attached,
    layers,
    load_adapter_state_dict,
    methods,
)

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}


def save(model: nn.Module, directory: str | os.PathLike) -> None:
    """Write the adapter of `model` into `directory`, which is made if absent.

    Each file appears whole or not at all; the tensors first, so that a configuration on disk always
    has its tensors.
    """
    record = attached(model)
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    state = {
        _PREFIX + _in_file(record.cls, name): tensor.contiguous()
        for name, tensor in adapter_state_dict(model).items()
    }
    for name, layer in layers(model).items():
        frozen = record.cls.beside(layer)
        state |= {f"{_PREFIX}{name}.{key}": tensor.contiguous() for key, tensor in frozen.items()}
    config = getattr(model, "config", None)
    document = {
        "base_model_name_or_path": getattr(config, "_name_or_path", None) or None,
        "task_type": next((t for e, t in _TASKS.items() if type(model).__name__.endswith(e)), None),
        "target_modules": _short_targets(model, record.names),
        "fan_in_fan_out": any(layer.transposed for layer in layers(model).values()),
        "bias": "none",
        "inference_mode": True,
        **record.cls.to_file(record.knobs),
    }
    _write(path / TENSORS, lambda part: save_file(state, part, metadata={"format": "pt"}))
    text = json.dumps(document, indent=2, sort_keys=True) + "\n"
    _write(path / CONFIG, lambda part: Path(part).write_text(text, encoding="utf-8"))


def load(model: nn.Module, directory: str | os.PathLike) -> nn.Module:
    """Put the adapter in `directory` on `model`, in place; written by `save` or by peft.

    A model that has an adapter of the same kind, targets and knobs takes over the tensors alone.

    Raises:
        UsageError: files missing or damaged, an unknown kind of adapter, an option that is not
            supported, or tensors that do not fit the model.
    """
    path = Path(directory)
    config = read_config(path)
    cls = _class_of(config, path)
    if whole := config.get("modules_to_save"):
        raise UsageError(
            f"{path / CONFIG} has modules_to_save={whole!r}: whole modules are no part of an "
            "adapter here; merge it with peft and load the merged model"
        )
    if config.get("bias", "none") != "none":
        raise UsageError(f"{path / CONFIG} trains biases (bias={config['bias']!r}); not supported")
    knobs = cls.from_file(config)
    state, others = _read_tensors(path, cls)
    names = list(dict.fromkeys(name.rpartition(".")[0] for name in state))
    if "_holdfast_adapter" in model.__dict__:
        record = attached(model)
        ours, theirs = record.cls.to_file(record.knobs), cls.to_file(record.knobs | knobs)
        if ours != theirs:
            raise UsageError(
                f"the model has an adapter {ours}, {path} holds {theirs}; detach(model) first"
            )
    else:
        attach(model, cls.key, targets=names, **knobs)
    cls.check_others(model, others)
    load_adapter_state_dict(model, state)
    return model


def read_config(directory: str | os.PathLike) -> dict[str, Any]:
    """adapter_config.json of a directory.

    Raises:
        UsageError: absent, or no JSON object.
    """
    path = Path(directory) / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"no adapter in {directory}: {CONFIG} is missing") from error
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise UsageError(f"{path} names no peft_type; expected an adapter's configuration")
    return config


def _class_of(config: dict[str, Any], path: Path) -> type[Adapter]:
    kind = config["peft_type"].lower()
    if kind not in methods():
        raise UsageError(
            f"{path} holds a {config['peft_type']} adapter; known here: {', '.join(methods())}"
        )
    return adapter_class(kind)


def _in_file(cls: type[Adapter], name: str) -> str:
    # peft keeps LoRA's matrices in linears of their own.
    return f"{name}.weight" if cls.key == "lora" else name


def _read_tensors(path: Path, cls: type[Adapter]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The adapter's tensors under our names, and all others under those of the file."""
    try:
        stored = load_file(path / TENSORS)
    except (FileNotFoundError, SafetensorError) as error:
        raise UsageError(f"{path / TENSORS} cannot be read: {error}") from error
    state: dict[str, Tensor] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in stored.items():
        name = key.removeprefix(_PREFIX).removesuffix(".weight")
        ours = name.rpartition(".")[2] in cls.trainable
        (state if ours else others)[name if ours else key] = tensor
    if not state:
        raise UsageError(f"{path / TENSORS} holds no tensor of a {cls.key} adapter")
    return state, others


def _short_targets(model: nn.Module, names: list[str]) -> list[str]:
    """Last components where they name the same modules, as people write them; else full names."""
    short = {name.rpartition(".")[2] for name in names}
    same = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in short}
    return sorted(short if same == set(names) else names)


def _write(path: Path, write: Any) -> None:
    part = path.with_name(path.name + ".part")
    write(part)
    with open(part, "rb") as file:
        os.fsync(file.fileno())
    os.replace(part, path)
