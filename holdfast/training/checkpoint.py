"""Checkpoints that resume bitwise after a kill at any moment.

A checkpoint is a directory that appears under its name only when it is complete; the one before
it goes only after that. Tensors are safetensors, the rest is JSON: nothing is unpickled.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from holdfast.errors import HoldfastError
from holdfast.files import whole_directory, write_tensors, write_text

_NAME = re.compile(r"step-(\d{9})")


def _kept_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What changes while training: trainable parameters and persistent buffers, ties once."""
    persistent = model.state_dict().keys()
    found: dict[str, Tensor] = {
        n: p for n, p in model.named_parameters() if p.requires_grad and n in persistent
    }
    for prefix, module in model.named_modules():
        # What a method trains without a gradient of its own.
        for name in getattr(module, "trained_in_place", ()):
            found[f"{prefix}.{name}" if prefix else name] = getattr(module, name)
    for name, buffer in model.named_buffers():
        if name in persistent and not is_traceable_wrapper_subclass(buffer):
            found[name] = buffer
    # Of what is split over ranks (DTensor), this rank's part, which shares its memory.
    return {n: t.detach().to_local() if hasattr(t, "to_local") else t for n, t in found.items()}


def _counters(model: nn.Module) -> dict[str, dict[str, int]]:
    """Module -> the numbers that it advances while training and names in `counted`."""
    found = {
        n: {k: getattr(m, k) for k in getattr(m, "counted", ())} for n, m in model.named_modules()
    }
    return {name: numbers for name, numbers in found.items() if numbers}


def _flatten(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    state = optimizer.state_dict()
    tensors, rest = {}, {}
    for index, entries in state["state"].items():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{name}"] = value
            else:
                rest[f"{index}.{name}"] = value
    return tensors, rest


def save(
    root: Path,
    step: int,
    model: nn.Module | dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    extra: dict,
    *,
    keep_older: bool = False,
) -> Path:
    """Write `root/step-...` and remove older checkpoints once it is in place.

    Args:
        model: or the tensors to keep, where they are not one model's.
        keep_older: leave older checkpoints, until `remove_older`.
    """
    target = root / f"step-{step:09d}"
    if target.exists():
        return target
    kept = model if isinstance(model, dict) else _kept_tensors(model)
    tensors = {f"model.{n}": t for n, t in kept.items()}
    state_tensors, rest = _flatten(optimizer)
    tensors |= state_tensors
    tensors["rng.cpu"] = torch.get_rng_state()
    for index in range(torch.cuda.device_count()):
        tensors[f"rng.cuda.{index}"] = torch.cuda.get_rng_state(index)
    # Sorted, because a state that was loaded lies in another order than one that grew.
    counters = {} if isinstance(model, dict) else _counters(model)
    content = {"step": step, "optimizer": rest, "counters": counters, **extra}
    document = json.dumps(content, sort_keys=True)
    with whole_directory(target) as partial:
        write_tensors(partial / "state.safetensors", dict(sorted(tensors.items())))
        write_text(partial / "state.json", document)
    if not keep_older:
        remove_older(root, step)
    return target


def remove_older(root: Path, step: int) -> None:
    """Remove every checkpoint of another step."""
    for older in _all(root):
        if older.name != f"step-{step:09d}":
            shutil.rmtree(older)


def steps(root: Path) -> list[int]:
    """Steps of the complete checkpoints."""
    return [int(path.name.removeprefix("step-")) for path in _all(root)]


def _all(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    return sorted(p for p in root.iterdir() if _NAME.fullmatch(p.name))


def latest(root: Path) -> Path | None:
    """The newest complete checkpoint."""
    found = _all(root)
    return found[-1] if found else None


def load(
    path: Path, model: nn.Module | dict[str, Tensor], optimizer: torch.optim.Optimizer
) -> dict:
    """Restore everything in place; returns the JSON part.

    Raises:
        HoldfastError: the checkpoint does not match the model.
    """
    document = json.loads((path / "state.json").read_text(encoding="utf-8"))
    kept = model if isinstance(model, dict) else _kept_tensors(model)
    states: dict[int, dict[str, Any]] = {}
    with safe_open(str(path / "state.safetensors"), framework="pt") as file, torch.no_grad():
        names = set(file.keys())
        missing = {f"model.{n}" for n in kept} - names
        if missing:
            raise HoldfastError(
                f"checkpoint {path} lacks {len(missing)} tensors of the model, "
                f"for example {sorted(missing)[0]}; it belongs to another plan"
            )
        for name, tensor in kept.items():
            tensor.copy_(file.get_tensor(f"model.{name}"))
        for name in names:
            if name.startswith("optimizer."):
                _, index, key = name.split(".", 2)
                states.setdefault(int(index), {})[key] = file.get_tensor(name).clone()
        for key, value in document["optimizer"].items():
            index, name = key.split(".", 1)
            states.setdefault(int(index), {})[name] = value
        current = optimizer.state_dict()
        optimizer.load_state_dict({"state": states, "param_groups": current["param_groups"]})
        for name, numbers in document.get("counters", {}).items():
            assert isinstance(model, nn.Module)
            for key, value in numbers.items():
                setattr(model.get_submodule(name), key, value)
        torch.set_rng_state(file.get_tensor("rng.cpu"))
        for index in range(torch.cuda.device_count()):
            if f"rng.cuda.{index}" in names:
                torch.cuda.set_rng_state(file.get_tensor(f"rng.cuda.{index}"), index)
    return document
