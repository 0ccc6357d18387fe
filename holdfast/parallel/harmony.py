"""Harmony (135): train a model that does not fit the devices of one machine, pack after pack.

Keeps    parameters, gradients, optimizer states and the tensors between packs on the host; on a
         device one pack of layers and, where it fits, the parameters of the next.
Form     that of the model; gradients leave the device once, summed over all micro-batches.
Bytes    moved per step: 3|W| - |W_last| in mode "pp" on any number of devices, N times that in mode
         "dp" (parameters in for each direction, gradients out; the last backward pack, W_last, runs
         forward and backward in one visit). Host: |W|, states, gradients not yet applied, and the
         batch's tensor at each pack's start until the last pack that starts there has run.
Source   Li, Phanishayee, Murray, Tarnawski, Kim, "Harmony: Overcoming the Hurdles of GPU Memory
         Capacity to Train Massive DNN Models on Commodity Servers", PVLDB 2022; the layout of the
         authors' repository was read, not its code.
Departs  tensors between packs travel through host memory and torch.distributed (gloo), also
         between GPUs; up to 6 layers every packing is searched; packs whose successor does not fit
         beside them run without prefetch, where the paper's capacity always holds two; a parameter
         in several packs is updated after the last of them; a clipped norm delays all updates;
         parameters are loaded ahead, rows between packs when they are needed.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from itertools import zip_longest
from time import perf_counter
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

from holdfast.errors import HoldfastError, UsageError, unknown
from holdfast.ledger import Ledger
from holdfast.meter import StorageLog, ledger_of, open_storages
from holdfast.parallel.boundaries import Boundaries
from holdfast.parallel.host_update import Optimizer, Updates
from holdfast.parallel.layer_profile import Loss, profile
from holdfast.parallel.pack_planner import Configuration, Planner, Step
from holdfast.parallel.packing import divisors
from holdfast.parallel.param_store import HostPool, ParamStore, share_
from holdfast.units import parse_bytes


def harmony(
    blocks: Sequence[nn.Module],
    batch: tuple[Tensor, Tensor],
    budget: int | str,
    mode: Literal["pp", "dp"] = "pp",
    devices: int | Sequence[torch.device | str] = 1,
    *,
    loss: Loss,
    optimizer: Optimizer,
    clip_norm: float | None = None,
    configuration: Configuration | None = None,
    seed: int = 0,
) -> "Harmony":
    """Profile `blocks`, choose micro-batches and packs, and return what runs them.

    The blocks' parameters stay on the host and are updated there; between steps the blocks are an
    ordinary model. With several devices every rank of the process group calls this with the same
    arguments; from then on all ranks share the parameters of rank 0.

    Args:
        blocks: a chain on the CPU, each from one tensor (B,...) to one tensor (B,...); see
            `holdfast.parallel.chain.causal_lm_chain` for Hugging Face models.
        batch: an example (x, target) of the size of every later batch.
        budget: device bytes of each rank.
        mode: "pp" sends packs round the devices, "dp" gives each a share of the batch's rows.
        devices: how many, or which; one for each rank of the process group.
        loss: (output, target) -> a scalar, the mean over rows in which each row weighs the same.
        optimizer: makes the optimizer of a list of parameters, on the host.
        clip_norm: clip gradients to this global norm; all updates then wait for the last gradient.
        configuration: micro sizes and packs; None searches for them.
        seed: of random layers; dropout differs from step to step, layer to layer, row to row.

    Raises:
        DoesNotFit: a layer alone passes the budget; names it.
        UsageError: blocks or arguments that this cannot run.
    """
    if mode not in ("pp", "dp"):
        raise unknown("mode", mode, ("pp", "dp"))
    x, target = batch
    ranks, rank, device = _place(devices)
    shares = ranks if mode == "dp" else 1
    if len(x) != len(target) or len(x) % shares or not len(x):
        raise UsageError(
            f"batch has {len(x)} rows of x and {len(target)} of target for {shares} data-parallel "
            "device(s); give equally many, a multiple of the devices"
        )
    if any(p.device.type != "cpu" for block in blocks for p in block.parameters()):
        raise UsageError("blocks must be on the CPU, where parameters are kept; call .cpu() first")
    if not blocks:
        raise UsageError("blocks is empty; give at least one module")
    rows, size = len(x) // shares, parse_bytes(budget)
    agreed: list[Any] = [None]
    if rank == 0:  # one measures and chooses
        sizes = divisors(rows) if configuration is None else _sizes(configuration)
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                found = profile(
                    blocks, x, target, loss, optimizer,
                    sizes=sizes, rows=rows, budget=size, device=device,
                )  # fmt: skip
            planner = Planner(found, rows, size, mode, ranks)
            if configuration is None:
                configuration = planner.search()
            else:
                planner.check(configuration)
            agreed = [(found, configuration)]
        except HoldfastError as error:
            agreed = [error]
    if ranks > 1:
        dist.broadcast_object_list(agreed, src=0)
    if isinstance(agreed[0], HoldfastError):
        raise agreed[0]
    found, configuration = agreed[0]
    planner = Planner(found, rows, size, mode, ranks)
    return Harmony(blocks, planner, configuration, loss, optimizer, clip_norm, seed, rank, device)


def _sizes(configuration: Configuration) -> list[int]:
    return sorted({configuration.micro_forward, configuration.micro_backward})


def _place(devices: int | Sequence[torch.device | str]) -> tuple[int, int, torch.device]:
    """Number of ranks, this one's number and its device."""
    count = devices if isinstance(devices, int) else len(devices)
    world = dist.get_world_size() if dist.is_initialized() else 1
    if (count != world and count != 1) or count < 1:
        raise UsageError(
            f"{count} devices for a process group of {world}; start one process for each, with "
            "torchrun or holdfast.parallel.launch"
        )
    rank = dist.get_rank() if count > 1 else 0
    if isinstance(devices, int):
        gpu = torch.cuda.is_available() and torch.cuda.device_count() >= count
        return count, rank, torch.device(f"cuda:{rank}" if gpu else "cpu")
    return count, rank, torch.device(devices[rank])


class Harmony:
    """Runs steps of a configuration; made by `harmony`.

    `plan` is the configuration. Learning rates may be changed between steps in `optimizer`.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        planner: Planner,
        configuration: Configuration,
        loss: Loss,
        optimizer: Optimizer,
        clip_norm: float | None,
        seed: int,
        rank: int,
        device: torch.device,
    ):
        self.blocks, self.planner, self.plan, self.loss = blocks, planner, configuration, loss
        self.seed, self.rank, self.device = seed, rank, device
        self.ranks, self.steps, self.seconds = planner.ranks, 0, 0.0
        # Host tensors travel by gloo, whatever the default group's backend is.
        self.group = dist.new_group(backend="gloo") if self.ranks > 1 else None
        if self.group is not None:
            share_(blocks, self.group)
        self.host = HostPool(device)
        shared = self.group is not None
        self.store = ParamStore(blocks, planner.budget, device, self.host, shared=shared)
        # In mode "dp" every rank runs all packs, on its rows.
        self._shares = self.ranks if planner.mode == "dp" else 1
        self._first_row = rank * planner.rows if planner.mode == "dp" else 0
        self._here = here = 0 if planner.mode == "dp" else rank
        self.boundaries = Boundaries(planner, self.host, here, configuration, self.group)
        every = enumerate(planner.steps(configuration))
        self._line = [(k, step) for k, step in every if step.rank == here]
        self.updates = Updates(
            blocks, planner, configuration, optimizer, clip_norm, self.boundaries, rank, self.group
        )
        self._random = any(layer.random for layer in planner.profile.layers)

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """This rank's, for the parameters that it updates; None where it updates none."""
        return self.updates.optimizer

    def step(self, x: Tensor, target: Tensor) -> float:
        """One step of training on a batch of the example's size; returns its loss.

        Collective over the ranks, each of which is given the whole batch. After an exception the
        packs that were already updated stay updated.

        Raises:
            UsageError: a batch of another number of rows.
        """
        rows = self.planner.rows * self._shares
        if len(x) != rows or len(target) != rows:
            raise UsageError(
                f"step got {len(x)} rows of x and {len(target)} of target; micro-batches were "
                f"planned for {rows}: pass such batches, or make another runtime"
            )
        began = perf_counter()
        own = slice(self._first_row, self._first_row + self.planner.rows)
        forked = [self.device] if self.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(forked) if self._random else nullcontext():
                total = self._run(x[own], target[own]).cpu()
            self.updates.finish()
            self.boundaries.finish()
            if self.ranks > 1:
                # Also the barrier before anyone reads parameters that another rank has updated.
                dist.all_reduce(total, group=self.group)
        except BaseException:
            self.store.drop_all()
            self.boundaries.clear()
            self.updates.clear()
            raise
        self.steps += 1
        self.seconds = perf_counter() - began
        return total.item()

    def _run(self, x: Tensor, target: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        following = [step for _, step in self._line[1:]]
        for _, step in self._line[:1]:
            self.boundaries.expect(step)
        for (k, step), after in zip_longest(self._line, following):
            self.store.load(step.layers)
            if step.kind == "B":
                self.store.promise_gradients(step.layers)
            if after is not None:
                self.boundaries.expect(after)
                if self.planner.prefetched(step, after, self.plan):
                    self.store.load(after.layers)
            if step.kind == "F":
                self._forward(step, x)
            else:
                total += self._backward(step, x, target)
                self.updates.give(k, self.store.take_gradients(step.layers))
            self.store.drop(step.layers)
            self.boundaries.done(step)
        return total

    def _enter(self, step: Step, x: Tensor, row: int, micro: int) -> Tensor:
        if step.start:
            return self.boundaries.take("x", step.start, row, micro, self.device)
        return x[row : row + micro].to(self.device, copy=True)

    @torch.no_grad()
    def _forward(self, step: Step, x: Tensor) -> None:
        micro = self.plan.micro_forward
        for row in range(0, self.planner.rows, micro):
            h = self._enter(step, x, row, micro)
            for layer in step.layers:
                h = self._layer(layer, h, row)
                if self.boundaries.wants("x", layer + 1):
                    self.boundaries.put("x", layer + 1, row, h)

    def _backward(self, step: Step, x: Tensor, target: Tensor) -> Tensor:
        """Forward again from the pack's input, then backward; returns the loss that it formed."""
        micro = self.plan.micro_backward
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for row in range(0, self.planner.rows, micro):
            entered = self._enter(step, x, row, micro)
            if step.start:
                entered.requires_grad_()
            h = entered
            for layer in step.layers:
                h = self._layer(layer, h, row)
            if step.stop == self.planner.depth:
                ends = target[row : row + micro].to(self.device, copy=True)
                loss = self.loss(h, ends) * (micro / (self.planner.rows * self._shares))
                total += loss.detach()
                del h, ends
                if loss.requires_grad:
                    loss.backward()
                del loss
            else:
                slope = self.boundaries.take("dy", step.stop, row, micro, self.device)
                if h.requires_grad:
                    h.backward(slope)
                del h, slope
            if step.start:
                slope = torch.zeros_like(entered) if entered.grad is None else entered.grad
                self.boundaries.put("dy", step.start, row, slope)
                del slope
            del entered
        return total

    def _layer(self, layer: int, h: Tensor, row: int) -> Tensor:
        if self._random:
            # The same numbers in both directions, whatever packs the layer is in.
            place = (self.steps * self.planner.depth + layer) * self.planner.rows * self._shares
            torch.manual_seed(self.seed + place + self._first_row + row)
        return functional_call(self.blocks[layer], self.store.state(layer), (h,))

    def measure_step(self, x: Tensor, target: Tensor) -> tuple[float, Ledger]:
        """`step`, and what it held by place: where there is no GPU, host and device are told apart
        by who made a tensor, so that the split is simulated."""
        log = StorageLog(self.device)
        log.seed("parameters", [p for block in self.blocks for p in block.parameters()])
        log.seed("inputs", [x, target])
        for storage in log.log.storages:
            storage.place = "host"
        log.seed("buffers", self.store.buffers)
        self.store.on_new = log.tag

        def on_host(tensor: Tensor) -> None:
            sid = log.id_of(tensor.untyped_storage())
            assert sid is not None
            log.log.storages[sid].place = "host"

        self.host.on_new = on_host
        try:
            with log:
                loss = self.step(x, target)
        finally:
            self.host.on_new = self.store.on_new = None
        return loss, ledger_of(log.log)

    def report(self) -> dict[str, Any]:
        """Configuration, seconds and bytes, predicted and counted; JSON-ready."""
        planner, store, done = self.planner, self.store, max(self.steps, 1)
        trace = planner.trace(self.plan)
        states = [] if self.optimizer is None else list(self.optimizer.state.values())
        return {
            "mode": planner.mode,
            "devices": self.ranks,
            "rank": self.rank,
            "split": "measured" if self.device.type == "cuda" else "simulated",
            "configuration": asdict(self.plan),
            "seconds": {"predicted": trace.end / 1e9, "last_step": self.seconds},
            "bytes_per_step": {
                "parameters_in": store.bytes_in // done,
                "gradients_out": store.bytes_out // done,
                "all_ranks_expected": planner.weight_traffic(self.plan),
                "boundaries_in": self.boundaries.bytes_in // done,
                "boundaries_out": self.boundaries.bytes_out // done,
                "sent_to_ranks": self.boundaries.bytes_sent // done,
            },
            "device": {
                "budget": planner.budget,
                "predicted_peak": trace.peak(self._here, "device") + planner.profile.fixed_bytes,
                "parameters_and_gradients_peak": store.peak_bytes,
            },
            "host": {
                "parameters": planner.parameters(range(planner.depth)),
                "optimizer": sum(s.nbytes() for s in open_storages(states)),
                "peak_beside": self.host.peak_bytes,
            },
        }
