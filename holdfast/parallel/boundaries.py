"""Boundaries: the tensors between packs, kept on the host or sent to the rank that needs them."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from holdfast.parallel.pack_planner import Configuration, Planner, Step
from holdfast.parallel.param_store import HostPool


class Boundaries:
    """Tensors between packs, rows of a batch by (kind, position), on the host.

    "x" is what enters the layer at a position, "dy" the gradient of what enters it. A producer
    gives rows to every rank that wants them; a consumer takes other numbers of rows than came.
    """

    def __init__(
        self,
        planner: Planner,
        host: HostPool,
        rank: int,
        c: Configuration,
        group: dist.ProcessGroup | None,
    ):
        self.planner, self.host, self.rank, self.c, self.group = planner, host, rank, c, group
        self.bytes_in = self.bytes_out = self.bytes_sent = 0
        self._held: dict[tuple[str, int], Tensor] = {}
        self._awaited: dict[tuple[str, int], list[tuple[int, Any]]] = {}
        self._sent: list[tuple[Any, Tensor]] = []
        # Who wants what: all packs that start at a position want its x, the backward pack that
        # ends there its dy.
        steps = planner.steps(c)
        self.wanted: dict[tuple[str, int], list[Step]] = {}
        self.maker: dict[tuple[str, int], int] = {}
        for step in steps:
            if step.start:
                self.wanted.setdefault(("x", step.start), []).append(step)
                if step.kind == "B":
                    self.maker["dy", step.start] = step.rank
            if step.kind == "B" and step.stop < planner.depth:
                self.wanted.setdefault(("dy", step.stop), []).append(step)
        for step in steps:
            if step.kind == "F":
                for position in range(step.start + 1, step.stop + 1):
                    self.maker["x", position] = step.rank
        self._left: dict[tuple[str, int], int] = {}

    def wants(self, kind: str, position: int) -> bool:
        return (kind, position) in self.wanted

    def put(self, kind: str, position: int, row: int, value: Tensor) -> None:
        """Rows from `row` on, for all who want them."""
        ranks = {step.rank for step in self.wanted[kind, position]}
        for rank in sorted(ranks):
            self.bytes_out += value.nbytes
            if rank == self.rank:
                self._buffer(kind, position)[row : row + len(value)].copy_(value)
            else:
                piece = self.host.copy(value.detach().contiguous())
                self._send(piece, rank, self._tag(kind, position, row))

    def expect(self, step: Step) -> None:
        """Begin to receive what `step` will take from other ranks."""
        for kind, position in self._inputs(step):
            key = kind, position
            maker = self.maker[key]
            if maker == self.rank or key in self._held:
                continue
            micro = self.c.micro_forward if kind == "x" else self.c.micro_backward
            buffer = self._buffer(kind, position)
            self._awaited[key] = [
                (row, self._receive(buffer[row : row + micro], maker, self._tag(*key, row)))
                for row in range(0, len(buffer), micro)
            ]

    def take(self, kind: str, position: int, row: int, rows: int, device: torch.device) -> Tensor:
        """A new device tensor of `rows` rows."""
        key = kind, position
        waiting = self._awaited.get(key, [])
        while waiting and waiting[0][0] < row + rows:
            waiting.pop(0)[1].wait()
        value = self._held[key][row : row + rows].to(device, copy=True)
        self.bytes_in += value.nbytes
        return value

    def done(self, step: Step) -> None:
        """Free what no later pack of this rank takes."""
        for key in self._inputs(step):
            self._left[key] -= 1
            if not self._left[key]:
                del self._held[key], self._left[key]
                self._awaited.pop(key, None)

    def finish(self) -> None:
        """Wait until everything sent has left; drop what a failed step left behind."""
        for work, _ in self._sent:
            work.wait()
        self.clear()

    def send_gradient(
        self, p: nn.Parameter, gradient: Tensor | None, rank: int, k: int, index: int
    ) -> None:
        """Pack k's part of the gradient of a parameter that `rank` updates."""
        piece = self.host.copy(torch.zeros_like(p) if gradient is None else gradient)
        self._send(piece, rank, self._gradient_tag(k, index))

    def receive_gradient(self, p: nn.Parameter, rank: int, k: int, index: int) -> Tensor:
        piece = self.host.empty(p.shape, p.dtype)
        self._receive(piece, rank, self._gradient_tag(k, index)).wait()
        return piece

    def _send(self, piece: Tensor, rank: int, tag: int) -> None:
        self.bytes_sent += piece.nbytes
        self._sent.append((dist.isend(piece, rank, group=self.group, tag=tag), piece))

    def _receive(self, piece: Tensor, rank: int, tag: int) -> Any:
        return dist.irecv(piece, rank, group=self.group, tag=tag)

    def _gradient_tag(self, k: int, index: int) -> int:
        planner = self.planner
        return 2 * planner.depth * planner.rows + index * 2 * planner.depth + k

    def clear(self) -> None:
        for held in (self._sent, self._held, self._awaited, self._left):
            held.clear()

    def _inputs(self, step: Step) -> list[tuple[str, int]]:
        found = [("x", step.start)] if step.start else []
        if step.kind == "B" and step.stop < self.planner.depth:
            found.append(("dy", step.stop))
        return found

    def _buffer(self, kind: str, position: int) -> Tensor:
        key = kind, position
        if key not in self._held:
            shape, dtype = self.planner.profile.shapes[position]
            self._held[key] = self.host.empty((self.planner.rows, *shape), dtype)
            self._left[key] = sum(step.rank == self.rank for step in self.wanted[key])
        return self._held[key]

    def _tag(self, kind: str, position: int, row: int) -> int:
        return ((kind == "dy") * self.planner.depth + position) * self.planner.rows + row
