"""Apply a plan's methods to a model, real or traced: one program for prediction and run."""

from typing import Any

import torch
from torch import nn

from holdfast.errors import UsageError
from holdfast.places import Arena, offload
from holdfast.plan.blocks import find_stacks
from holdfast.plan.file import Choice, Methods, parse_runs
from holdfast.plan.method import Method
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
    for slot, choices in (
        ("weights", [methods.weights]),
        ("adapter", [methods.adapter]),
        ("saved", methods.saved),
    ):
        for choice in choices:
            if choice is None:
                continue
            found, knobs = chosen(choice, slot)
            reason = found.applies(model, **knobs)
            if reason is not None:
                raise UsageError(f"{slot} {found.key} does not apply to this model: {reason}")
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


def make_optimizer(
    named: list[tuple[str, nn.Parameter]], methods: Methods, lr: float, weight_decay: float
) -> torch.optim.Optimizer:
    """The plan's optimizer over named parameters; consumes gradients in backward if so planned."""
    found, knobs = chosen(methods.optimizer, "optimizer")
    optimizer = found.apply(named, lr, weight_decay=weight_decay, **knobs)
    if methods.gradients == "backward":
        return StepInBackward(optimizer)
    return optimizer
