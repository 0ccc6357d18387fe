"""Build a family: trace a model under its global methods, once for each option of a block."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from holdfast.errors import HoldfastError
from holdfast.ledger import CATEGORIES
from holdfast.meter import StorageLog, fake_step, ledger_of, open_storages
from holdfast.places import Arena
from holdfast.plan.blocks import members, stacks_of, truncate_, whole
from holdfast.plan.compose import Family, Like, Trainable, UpdateCost, trainables
from holdfast.plan.trace import Observer, align_, record, to_fake_

OpSeconds = Callable[[int, int, torch.dtype], float]


def trace_family(
    build: Callable[[], nn.Module],
    inputs: Callable[[], dict[str, Any]],
    prepare: Callable[[nn.Module], nn.Module],
    run: Callable[[nn.Module, dict[str, Any]], torch.Tensor],
    options: dict[str, Callable[[nn.Module], Arena | None]],
    op_seconds: OpSeconds,
    observe: Callable[[str], Observer] | None = None,
) -> Family:
    """Trace one model under each option.

    Args:
        build: () -> the full model on the meta device.
        inputs: () -> the batch of one micro-step, called in fake mode.
        prepare: applies the global methods to the (shallow, fake) model.
        run: (model, batch) -> scalar loss.
        options: name -> what it does to one block; returns the arena that the block fills, if any.
        observe: name of an option -> what sees each operation of its trace.
    """
    stacks = stacks_of(build())
    try:
        return _trace(build, inputs, prepare, run, options, op_seconds, stacks, observe)
    except Exception:
        if all(len(s.kept) == s.depth for s in stacks):
            raise
    # A model that cannot run shallow, or runs its blocks out of order, is traced whole.
    return _trace(build, inputs, prepare, run, options, op_seconds, whole(stacks), observe)


def _trace(build, inputs, prepare, run, options, op_seconds, stacks, observe) -> Family:
    family = Family(stacks, {}, {}, [])
    for name, apply in options.items():
        # Constructors and copies of modules do not work on fake tensors.
        shallow = truncate_(build(), stacks)
        with fake_step():
            model = prepare(to_fake_(shallow)).train()
            if not family.base:
                _persistent(family, model)
                family.between_steps = max(map(_between_steps, model.modules()))
            # Where layers rest by turns, the step that holds most is predicted.
            busiest = getattr(model, "busiest_step_", None)
            if busiest is not None:
                if any(len(s.kept) != s.depth for s in stacks):
                    raise HoldfastError("blocks differ in what trains, so none stands for another")
                trained = [p for p in model.parameters() if p.requires_grad]
                busiest()
                family.resting_bytes = sum(p.nbytes for p in trained if not p.requires_grad)
            arenas = {
                (stack.path, k): apply(block)
                for stack in stacks
                for k, block in enumerate(members(model, stack.path))
            }
            batch = inputs()
            trace = record(
                model,
                stacks,
                partial(_backward, run, model, batch),
                inputs=batch,
                op_seconds=op_seconds,
                observe=observe and observe(name),
            )
        if not trace.regular and any(len(s.kept) != s.depth for s in stacks):
            raise HoldfastError("blocks do not run once each in order")
        family.options[name] = trace
        moved = {block: arena.bytes_in for block, arena in arenas.items() if arena is not None}
        if moved:
            family.moved[name] = moved
        family.base["inputs"] = trace.base["inputs"]
    family.uniform = copy.deepcopy(family.options)
    if all(trace.regular for trace in family.options.values()):
        for trace in family.uniform.values():
            align_([trace], stacks)
        align_(list(family.options.values()), stacks)
    return family


def _backward(run, model, batch) -> None:
    run(model, batch).backward()


def _persistent(family: Family, model: nn.Module) -> None:
    """Bytes of parameters and buffers, and the shapes that train, at full depth."""
    owner: dict[int, tuple[str, int] | None] = {}
    times: dict[tuple[str, int], int] = {}
    inside: dict[int, tuple[str, int]] = {}
    for stack in family.stacks:
        for k, block in enumerate(members(model, stack.path)):
            times[stack.path, k] = stack.representative.count(k)
            for tensor in (*block.parameters(), *block.buffers()):
                inside.setdefault(id(tensor), (stack.path, k))
    family.base = dict.fromkeys(CATEGORIES, 0)
    found = []
    for category, tensors in (
        ("parameters", list(model.parameters())),
        ("buffers", list(model.buffers())),
    ):
        for tensor in tensors:
            home = inside.get(id(tensor))
            count = times[home] if home else 1
            for storage in open_storages(tensor):
                if storage._cdata not in owner:
                    owner[storage._cdata] = home
                    family.base[category] += count * storage.nbytes()
            if tensor.requires_grad:
                like = getattr(tensor, "like", None)
                found.append(Trainable(tuple(tensor.shape), tensor.dtype, count, like))
    family.trainable = trainables(found)
    named = {name: getattr(p, "like", None) for name, p in model.named_parameters()}
    family.likes = {name: like for name, like in named.items() if like is not None}


def _between_steps(module: nn.Module) -> int:
    """Bytes of scratch at the peak of what a module does after the optimizer's step."""
    act = getattr(module, "between_steps_", None)
    if act is None:
        return 0
    storages = StorageLog()
    storages.seed("parameters", [*module.parameters(), *module.buffers()])
    base = storages.live_bytes()
    with storages:
        act()
    return ledger_of(storages.log).peak("device") - base


class UpdateCosts:
    """Cost of updating a parameter of each shape with one optimizer, traced once per shape."""

    def __init__(self, make: Callable[[list[nn.Parameter]], Any], op_seconds: OpSeconds):
        self.make, self.op_seconds = make, op_seconds
        self._known: dict[tuple, UpdateCost] = {}

    def __call__(
        self, shape: tuple[int, ...], dtype: torch.dtype, like: Like | None = None
    ) -> UpdateCost:
        found = self._known.get((shape, dtype, like))
        if found is None:
            found = self._known[shape, dtype, like] = self._trace(shape, dtype, like)
        return found

    def _trace(self, shape: tuple[int, ...], dtype: torch.dtype, like: Like | None) -> UpdateCost:
        with fake_step():
            parameter = like() if like else nn.Parameter(torch.empty(shape, dtype=dtype))
            optimizer = self.make([parameter])
            parameter.grad = torch.empty(shape, dtype=dtype)
            optimizer.step()
            # Not a Meter: collecting garbage once per shape would take longer than the trace.
            storages = StorageLog()
            storages.seed("parameters", [parameter, parameter.grad])
            base = storages.live_bytes()
            storages.seed("optimizer", list(optimizer.state.values()))
            state = storages.live_bytes() - base
            with storages:
                optimizer.step()
            scratch = ledger_of(storages.log).peak("device") - base - state
            kept = parameter.numel() * parameter.element_size()
        # Parameter and gradient are read, parameter written, states read and written.
        moved = 3 * kept + 2 * state
        return UpdateCost(state, scratch, self.op_seconds(0, moved, dtype))
