"""Apply a plan's methods to a model, real or traced: one program for prediction and run."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from holdfast.errors import UsageError
from holdfast.places import Arena, offload
from holdfast.plan.blocks import find_stacks
from holdfast.plan.file import Choice, Methods, parse_runs
from holdfast.plan.method import Method
from holdfast.plan.records import BACKWARD, refusal
from holdfast.plan.registry import method
from holdfast.training.loss import chunk_loss_
from holdfast.training.step import StepInBackward, recompute


def chosen(choice: Choice, slot: str) -> tuple[Method, dict[str, Any]]:
    """The method and knobs of an entry such as {"lora": {"rank": 8}}.

    Raises:
        UsageError: unknown method or knob.
    """
    ((key, given),) = choice.items()
    found = method(key, slot)
    for knob in given or {}:
        if knob not in found.knobs:
            known = ", ".join(found.knobs) or "none"
            raise UsageError(f"{slot} {key} has no knob {knob!r}; knobs: {known}")
    return found, {**found.defaults(), **(given or {})}


def prepare(model: nn.Module, methods: Methods) -> nn.Module:
    """Weights, adapter, saved tensors and loss, in this order, in place."""
    every = _all_chosen(methods)
    consumed = [BACKWARD] if methods.gradients == "backward" else []
    reason = refusal([*(found.key for found, _ in every), *consumed])
    if reason is not None:
        raise UsageError(f"these methods do not go together: {reason}")
    for found, knobs in every:
        if found.slot == "optimizer":
            continue
        reason = found.applies(model, **knobs)
        if reason is not None:
            raise UsageError(f"{found.slot} {found.key} does not apply to this model: {reason}")
        found.apply(model, **knobs)
    if methods.loss_chunk:
        chunk_loss_(model, methods.loss_chunk)
    return model


def set_option(block: nn.Module, option: str, arena: Arena | None) -> None:
    """Make one block keep, recompute or move what it saves for backward."""
    if option == "recompute":
        recompute(block)
    elif option in ("host", "disk"):
        if arena is None:
            raise UsageError(f"blocks use {option}, but the budget has no {option} bytes")
        offload(block, arena)


def set_blocks(model: nn.Module, blocks: dict[str, str], arenas: dict[str, Arena]) -> None:
    """Give every block its option; `blocks` as in a plan file.

    Raises:
        UsageError: a path or a number of blocks that the model does not have.
    """
    known = find_stacks(model)
    for path, runs in blocks.items():
        if path not in known:
            raise UsageError(f"blocks: {path!r} is no list of blocks; known: {', '.join(known)}")
        members: Any = model.get_submodule(path)
        options = parse_runs(runs)
        if len(options) != len(members):
            raise UsageError(
                f"blocks: {path} has {len(members)} blocks, the plan lists {len(options)}"
            )
        for option in dict.fromkeys(options):
            chosen_blocks = [m for m, o in zip(members, options, strict=True) if o == option]
            if option in arenas:
                offload(chosen_blocks, arenas[option])
            else:
                for block in chosen_blocks:
                    set_option(block, option, None)


def wrap_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, methods: Methods
) -> torch.optim.Optimizer:
    """What steps instead of `optimizer` where a method also acts around each step."""
    for found, knobs in _all_chosen(methods):
        if found.wrap is not None:
            optimizer = found.wrap(model, optimizer, **knobs)
    return optimizer


def calibrate(model: nn.Module, batches: Sequence[Mapping[str, Any]], methods: Methods) -> None:
    """Let methods that start from data see some, once, before a new run's first step."""
    for found, knobs in _all_chosen(methods):
        if found.calibrate is not None:
            found.calibrate(model, batches, **knobs)


def _all_chosen(methods: Methods) -> list[tuple[Method, dict[str, Any]]]:
    single = {"weights": methods.weights, "adapter": methods.adapter}
    return [
        *(chosen(choice, slot) for slot, choice in single.items() if choice is not None),
        *(chosen(choice, "saved") for choice in methods.saved),
        chosen(methods.optimizer, "optimizer"),
    ]


def make_optimizer(
    named: list[tuple[str, nn.Parameter]], methods: Methods, lr: float, weight_decay: float
) -> torch.optim.Optimizer:
    """The plan's optimizer over named parameters; consumes gradients in backward if so planned."""
    found, knobs = chosen(methods.optimizer, "optimizer")
    optimizer = found.apply(named, lr, weight_decay=weight_decay, **knobs)
    if methods.gradients == "backward":
        return StepInBackward(optimizer)
    return optimizer
