"""ParamStore: a chain's parameters in host memory, those of a few layers at a time on a device.

The modules keep their own parameters, which stay on the host and are always valid; a layer runs
through `torch.func.functional_call` on copies that the store makes, hands out and takes back.
Copies count against the budget from the moment at which they are asked for. On CUDA they run on a
side stream, else on a thread; memory is always claimed by the caller's thread, so that a meter
there sees all of it.
"""

import os
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from holdfast.errors import UsageError
from holdfast.places import ArenaFull
from holdfast.places.copies import Copies
from holdfast.units import format_bytes

ALIGN = 64


class HostPool:
    """Makes host tensors and counts those that live; pinned for a CUDA device."""

    def __init__(self, device: torch.device):
        self.pinned = device.type == "cuda"
        self.resident_bytes = self.peak_bytes = 0
        self.on_new: Callable[[Tensor], None] | None = None

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        made = torch.empty(tuple(shape), dtype=dtype, pin_memory=self.pinned)
        self.resident_bytes += made.nbytes
        self.peak_bytes = max(self.peak_bytes, self.resident_bytes)
        weakref.finalize(made.untyped_storage(), self._gone, made.nbytes)
        if self.on_new is not None:
            self.on_new(made)
        return made

    def copy(self, tensor: Tensor) -> Tensor:
        """A host copy, complete on return."""
        return self.empty(tensor.shape, tensor.dtype).copy_(tensor)

    def _gone(self, nbytes: int) -> None:
        self.resident_bytes -= nbytes


@dataclass
class _Resident:
    leaves: dict[str, Tensor]
    ready: Callable[[], None] | None  # waits for the copies that were begun
    nbytes: int  # parameters, and gradients where they were promised


class ParamStore:
    """Moves parameters of `layers` to `device` and gradients back, never above `budget` bytes.

    `resident_bytes` is what is on the device: parameters, and gradients that were promised;
    `peak_bytes` is its maximum. `bytes_in` counts parameters copied to the device, `bytes_out`
    gradients copied from it.

    Args:
        shared: parameters lie where other ranks read them, see `share_`, and are not to be pinned.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        budget: int,
        device: torch.device,
        host: HostPool,
        *,
        shared: bool = False,
    ):
        self.layers, self.budget, self.device, self.host = layers, budget, device, host
        self.resident_bytes = self.peak_bytes = self.bytes_in = self.bytes_out = 0
        self.on_new: Callable[[str, Tensor], None] | None = None  # told category and tensor
        self._resident: dict[int, _Resident] = {}
        self._named = [dict(layer.named_parameters()) for layer in layers]
        self.buffers = [
            {name: buffer.to(device) for name, buffer in layer.named_buffers()} for layer in layers
        ]
        self._cuda = device.type == "cuda"
        self._copies = Copies(device)
        if self._cuda:
            for p in _distinct(layers) if not shared else ():
                p.data = p.data.pin_memory()

    def load(self, layers: Iterable[int]) -> None:
        """Begin to copy the parameters of `layers` to the device; those that are there stay.

        Raises:
            ArenaFull: they would pass the budget.
        """
        for layer in layers:
            if layer in self._resident:
                continue
            named = self._named[layer]
            nbytes = sum(p.nbytes for p in named.values())
            self._claim(nbytes)
            leaves = {
                name: torch.empty_like(p.data, device=self.device) for name, p in named.items()
            }
            if self.on_new is not None:
                for leaf in leaves.values():
                    self.on_new("parameters", leaf)
            pairs = [(leaves[name], p.data) for name, p in named.items()]
            self._resident[layer] = _Resident(leaves, self._copies.start(pairs), nbytes)
            self.bytes_in += nbytes

    def promise_gradients(self, layers: Iterable[int]) -> None:
        """Claim the device bytes of the gradients that a backward over `layers` will leave.

        Raises:
            ArenaFull: they would pass the budget.
        """
        for layer in layers:
            found = self._resident[layer]
            nbytes = sum(p.nbytes for p in self._named[layer].values() if p.requires_grad)
            self._claim(nbytes)
            found.nbytes += nbytes

    def state(self, layer: int) -> dict[str, Tensor]:
        """Parameters, as leaves that require gradients where the module's do, and buffers."""
        found = self._resident[layer]
        if found.ready is not None:
            found.ready()
            found.ready = None
            for name, leaf in found.leaves.items():
                leaf.requires_grad_(self._named[layer][name].requires_grad)
        return found.leaves | self.buffers[layer]

    def take_gradients(self, layers: Iterable[int]) -> dict[nn.Parameter, Tensor]:
        """Host copies of the gradients of `layers`, summed where a parameter occurs twice."""
        found: dict[nn.Parameter, Tensor] = {}
        for layer in layers:
            for name, leaf in self._resident[layer].leaves.items():
                if leaf.grad is None:
                    continue
                parameter = self._named[layer][name]
                self.bytes_out += leaf.grad.nbytes
                if self.on_new is not None:
                    self.on_new("gradients", leaf.grad)
                moved = self.host.copy(leaf.grad)
                leaf.grad = None
                found[parameter] = found[parameter].add_(moved) if parameter in found else moved
        return found

    def drop(self, layers: Iterable[int]) -> None:
        """Free the device's copies of `layers`, and what was promised for their gradients."""
        for layer in layers:
            self.resident_bytes -= self._resident.pop(layer).nbytes

    def drop_all(self) -> None:
        """Free everything, also what is still on its way."""
        if self._cuda:
            torch.cuda.synchronize(self.device)
        for found in self._resident.values():
            if found.ready is not None:
                found.ready()
        self.drop(list(self._resident))

    def _claim(self, nbytes: int) -> None:
        if self.resident_bytes + nbytes > self.budget:
            raise ArenaFull(
                f"device holds {format_bytes(self.resident_bytes)} of parameters and gradients, "
                f"{format_bytes(nbytes)} more pass its budget of {format_bytes(self.budget)}; "
                "use smaller packs or a larger budget"
            )
        self.resident_bytes += nbytes
        self.peak_bytes = max(self.peak_bytes, self.resident_bytes)


def share_(layers: Sequence[nn.Module], group: dist.ProcessGroup) -> None:
    """Put the parameters of `layers` into memory that all ranks of one machine share, in place.

    Rank 0's values win. Collective.

    Raises:
        UsageError: ranks hold different parameters.
    """
    parameters = list(_distinct(layers))
    spans, size = [], 0
    for p in parameters:
        spans.append(size)
        size += -(-p.nbytes // ALIGN) * ALIGN
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    mine = [(tuple(p.shape), p.dtype) for p in parameters]
    shapes: list = [None] * world
    dist.all_gather_object(shapes, mine, group=group)
    other = next((r for r in range(world) if shapes[r] != shapes[0]), None)
    if other is not None:  # on every rank, so that none waits for another
        raise UsageError(
            f"rank {other} holds {len(shapes[other])} parameters of other shapes than rank 0's "
            f"{len(shapes[0])}; give every rank the same blocks"
        )
    folder = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(prefix="holdfast-", dir=folder) as directory:
        told = [f"{directory}/parameters"]
        dist.broadcast_object_list(told, src=0, group=group)
        path = told[0]
        if rank == 0:
            with open(path, "wb") as file:
                os.ftruncate(file.fileno(), max(size, 1))
        dist.barrier(group)
        flat = torch.from_file(path, shared=True, size=max(size, 1), dtype=torch.uint8)
        for p, start in zip(parameters, spans, strict=True):
            view = flat[start : start + p.nbytes].view(p.dtype).view(p.shape)
            if rank == 0:
                view.copy_(p.data)
            p.data = view
        dist.barrier(group)


def _distinct(layers: Sequence[nn.Module]) -> Iterator[nn.Parameter]:
    seen: set[int] = set()
    for layer in layers:
        for p in layer.parameters():
            if id(p) not in seen:
                seen.add(id(p))
                yield p
