"""Layered gradient accumulation (083): loop over layers outside, over micro-batches inside.

A modular pipeline does the same across ranks: layer l is on rank l mod d, so that a rank waits for
d - 1 layers, not for d - 1 stages of many.

Keeps    of the model states this rank's 1/N (ZeRO-3); of one layer, or of two while the next is on
         its way, gathered parameters and gradients; the inputs of all layers for all micro-batches.
Form     shards and states in fp32, gathered layers in the parameters' dtype, boundary tensors as
         they are, on the device or in an arena.
Bytes    holdfast.plan.formulas.layered: `boundaries` for the inputs; `gathered` for what a rank
         sends, which does not depend on the number of micro-batches.
Source   Lamy-Poirier, "Layered gradient accumulation and modular pipeline parallelism: fast and
         efficient training of large language models", 2021.
Departs  the last layer runs forward, loss and backward of a micro-batch in one go, which saves one
         gather and one recomputation of it; dropout repeats from seeds, one number for each layer
         and micro-batch, not from stored generator states; frozen parameters are not split.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from holdfast.errors import UsageError
from holdfast.parallel import schedule as schedules
from holdfast.parallel.layer_shards import ShardedLayers
from holdfast.parallel.offload_plan import OffloadPlan, StageCost, timeline
from holdfast.parallel.pipeoffload import PipeOffload, pipeoffload
from holdfast.places.arena import Arena
from holdfast.training.step import recompute as recomputed

Micro = tuple[Tensor, Any]


def layered_accumulate(
    blocks: Sequence[nn.Module],
    micros: Sequence[Micro],
    loss_fn: Callable[[Tensor, Any], Tensor],
    *,
    shard: ShardedLayers | None = None,
    arena: Arena | None = None,
    seed: int | None = None,
) -> Tensor:
    """Gradients of the mean loss over micro-batches, computed one layer at a time.

    Without `shard` gradients accumulate in the parameters, as after backward. With it each layer is
    gathered once in each direction, and reduced and stepped as soon as its last micro-batch has
    passed, so that its optimizer runs before the layer below has its gradients; after an error in
    between, start again from saved states.

    Args:
        blocks: layers in order, each from one tensor to one tensor; embedding and head belong to
            the first and the last one.
        micros: pairs of the first block's input and whatever `loss_fn` wants beside the output.
        loss_fn: (output, target) -> a scalar; equal weights are given to the micro-batches.
        arena: where inputs of layers wait for backward; None leaves them on the device.
        seed: of dropout; drawn from the global generator, which is otherwise left alone, if None.

    Returns:
        The mean loss, without a graph.

    Raises:
        UsageError: no block or no micro-batch, a block that returns no tensor, that changes its
            buffers (batch norm would see micro-batches in another order) or that `shard` lacks.
    """
    if not blocks or not micros:
        raise UsageError(f"{len(blocks)} blocks and {len(micros)} micro-batches; both need one")
    if shard is not None and [id(b) for b in shard.blocks] != [id(b) for b in blocks]:
        raise UsageError("shard was made for other blocks; pass ShardedLayers(blocks, ...)")
    for i, block in enumerate(blocks):
        _refuse_running_statistics(i, block)
    if seed is None:
        seed = int(torch.randint(2**62, ()))
    walk = _Walk(blocks, micros, shard, _Kept(arena), seed)
    try:
        walk.forward()
        loss = walk.turn(loss_fn)
        walk.backward()
        if shard is not None:
            shard.settle()
    finally:
        walk.kept.clear()
        if shard is not None:
            shard.release()
    return loss


def modular_pipeline(
    layers: Sequence[nn.Module],
    *,
    microbatches: int,
    loss_fn: Callable[[Any, Any], Tensor],
    recompute: bool = True,
    offload: int | str = 0,
    asynchronous: bool = True,
    costs: Sequence[StageCost] | None = None,
    arena: Arena | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> PipeOffload:
    """Train layers spread over ranks, layer l on rank l mod d, all micro-batches through each.

    Every micro-batch is under way at the turn, so a rank holds micros * layers / d of what a layer
    saves: with `recompute` that is its input, which `offload` keeps in host memory.

    Args:
        layers: of the whole model, in order; a rank uses its own. Each passes one tensor on.
        offload: of this rank's layers, how many keep nothing on the device, or "full".
        asynchronous, costs, arena: see `pipeoffload`.

    Warns:
        UserWarning: fewer micro-batches than ranks leave every rank idle between its layers.

    Raises:
        UsageError: the ranks do not divide the layers, or a layer has batch norm.
    """
    ranks, rank = dist.get_world_size(process_group), dist.get_rank(process_group)
    if not layers or len(layers) % ranks:
        raise UsageError(
            f"{ranks} ranks do not divide {len(layers)} layers; group layers, or use other ranks"
        )
    if microbatches < ranks:
        share = bubble(ranks, len(layers), microbatches)
        warnings.warn(
            f"{microbatches} micro-batches on {ranks} ranks: each waits {share:.0%} of the time it "
            f"computes; with {ranks} it would be {bubble(ranks, len(layers), ranks):.0%}",
            stacklevel=2,
        )
    mine = list(layers)[rank::ranks]
    for index, layer in enumerate(mine):
        _refuse_running_statistics(index * ranks + rank, layer)
        if recompute:
            recomputed(layer)
    return pipeoffload(
        mine,
        microbatches=microbatches,
        loss_fn=loss_fn,
        order="bfs",
        split_backward=False,
        offload=offload,
        asynchronous=asynchronous,
        costs=costs,
        arena=arena,
        process_group=process_group,
    )


def bubble(ranks: int, layers: int, micros: int) -> float:
    """Simulated idle time of a rank in a modular pipeline of equal layers, relative to its work."""
    order = schedules.breadth_first(ranks, layers // ranks, micros)
    trace = timeline(OffloadPlan(order), [StageCost(1, 1, 1, 0)] * layers)
    return trace.bubble((0, "compute")) / trace.busy((0, "compute"))


class _Walk:
    """One batch through all layers and back."""

    def __init__(self, blocks, micros, shard, kept, seed):
        self.blocks, self.micros, self.shard, self.kept = blocks, micros, shard, kept
        self.seed, self.last = seed, len(blocks) - 1

    @torch.no_grad()
    def forward(self) -> None:
        for layer in range(self.last):
            with self._gathered(layer, then=layer + 1):
                for micro in range(len(self.micros)):
                    self.kept.put(("x", layer + 1, micro), self._run(layer, micro)[1])

    def turn(self, loss_fn: Callable[[Tensor, Any], Tensor]) -> Tensor:
        """The last layer: forward, loss and backward."""
        total: Tensor | None = None
        with self._gathered(self.last, then=self.last - 1, backward=True):
            for micro, (_, target) in enumerate(self.micros):
                x, y = self._run(self.last, micro)
                loss = loss_fn(y, target) / len(self.micros)
                loss.backward()
                self._pass_on(self.last, micro, x)
                del x, y  # before the next one's activations
                total = loss.detach() if total is None else total + loss.detach()
            self._finished(self.last)
        assert total is not None
        return total

    def backward(self) -> None:
        for layer in reversed(range(self.last)):
            with self._gathered(layer, then=layer - 1, backward=True):
                for micro in range(len(self.micros)):
                    grad = self.kept.pop(("dx", layer + 1, micro))
                    x, y = self._run(layer, micro)
                    if y.requires_grad:
                        torch.autograd.backward(y, grad)
                    self._pass_on(layer, micro, x)
                    del x, y, grad
                self._finished(layer)

    def _run(self, layer: int, micro: int) -> tuple[Tensor, Tensor]:
        going_back = torch.is_grad_enabled()
        take = self.kept.pop if going_back else self.kept.get
        x = take(("x", layer, micro)) if layer else self.micros[micro][0]
        if going_back and layer:
            x = x.detach().requires_grad_()
        block = self.blocks[layer]
        versions = [b._version for b in block.buffers()]
        with _seeded(self.seed + layer * len(self.micros) + micro, x.device):
            y = block(x)
        if not isinstance(y, Tensor):
            raise UsageError(
                f"block {layer} returned {type(y).__name__}; layers pass one tensor on, wrap it"
            )
        if versions != [b._version for b in block.buffers()]:
            raise UsageError(_changes_buffers(layer, block))
        return x, y

    def _pass_on(self, layer: int, micro: int, x: Tensor) -> None:
        if layer:
            grad = torch.zeros_like(x) if x.grad is None else x.grad
            self.kept.put(("dx", layer, micro), grad)

    def _gathered(self, layer: int, then: int, backward: bool = False):
        if self.shard is None:
            return contextlib.nullcontext()
        return self.shard.computing(layer, then if then >= 0 else None, backward)

    def _finished(self, layer: int) -> None:
        if self.shard is not None:
            self.shard.reduce(layer)


class _Kept:
    """Boundary tensors by key, in an arena or as they are."""

    def __init__(self, arena: Arena | None):
        self.arena = arena
        self.tensors: dict[tuple, Tensor] = {}
        self.keys: set[tuple] = set()

    def put(self, key: tuple, tensor: Tensor) -> None:
        if self.arena is None:
            self.tensors[key] = tensor
        else:
            self.arena.put((id(self), key), tensor)
            self.keys.add(key)

    def get(self, key: tuple) -> Tensor:
        return self.tensors[key] if self.arena is None else self.arena.get((id(self), key))

    def pop(self, key: tuple) -> Tensor:
        if self.arena is None:
            return self.tensors.pop(key)
        tensor = self.get(key)
        self.arena.evict((id(self), key))
        self.keys.discard(key)
        return tensor

    def clear(self) -> None:
        self.tensors.clear()
        if self.arena is not None:
            for key in self.keys:
                self.arena.evict((id(self), key))
        self.keys.clear()


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_gpu else []):
        torch.default_generator.manual_seed(seed)
        if on_gpu:
            torch.cuda.manual_seed(seed)
        yield


def _refuse_running_statistics(index: int, block: nn.Module) -> None:
    for module in block.modules():
        if isinstance(module, _NormBase) and module.training and module.track_running_stats:
            raise UsageError(_changes_buffers(index, module))


def _changes_buffers(index: int, module: nn.Module) -> str:
    return (
        f"block {index} changes its buffers in forward ({type(module).__name__}): layers see each "
        "micro-batch twice and in another order; use layer norm, or put it in eval mode"
    )
