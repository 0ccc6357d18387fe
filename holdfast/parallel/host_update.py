"""Just-in-time updates on the host: a pack's parameters are updated while the next pack runs.

A parameter in several packs waits for the last of them, a clipped norm for the last gradient.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
import torch.distributed as dist
from torch import Tensor, nn

from holdfast.parallel.boundaries import Boundaries
from holdfast.parallel.pack_planner import Configuration, Planner

Optimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


class Updates:
    """Brings gradients to the rank that updates a parameter, and updates on a thread of its own.

    One optimizer serves all packs: it leaves parameters without a gradient alone.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        planner: Planner,
        configuration: Configuration,
        optimizer: Optimizer,
        clip_norm: float | None,
        boundaries: Boundaries,
        rank: int,
        group: dist.ProcessGroup | None,
    ):
        self.steps, self.clip_norm, self.rank = planner.steps(configuration), clip_norm, rank
        self.boundaries, self.group = boundaries, group
        self.shared = planner.mode == "dp" and planner.ranks > 1
        self._visits = self._find_visits(blocks)
        # By pack: its trained parameters, each with a number that all ranks know it by.
        self._held: dict[int, list[tuple[int, nn.Parameter]]] = {}
        for index, (p, visits) in enumerate(self._visits.items()):
            for k in visits:
                self._held.setdefault(k, []).append((index, p))
        self._owner = self._find_owners(planner.ranks)
        mine = [p for p, owner in self._owner.items() if owner == rank]
        self.optimizer = optimizer(mine) if mine else None
        self._thread = ThreadPoolExecutor(1, "holdfast-update")
        self._futures: list[Future[None]] = []
        self._pending: dict[nn.Parameter, Tensor] = {}  # until their parameter's last pack
        self._unclipped: dict[nn.Parameter, Tensor] = {}

    def _find_visits(self, blocks: Sequence[nn.Module]) -> dict[nn.Parameter, list[int]]:
        """Each trained parameter's backward packs, in the order in which they run."""
        visits: dict[nn.Parameter, list[int]] = {}
        for k, step in enumerate(self.steps):
            if step.kind == "B":
                held = (p for layer in step.layers for p in blocks[layer].parameters())
                for p in dict.fromkeys(p for p in held if p.requires_grad):
                    visits.setdefault(p, []).append(k)
        return visits

    def _find_owners(self, ranks: int) -> dict[nn.Parameter, int]:
        """Which rank updates a parameter: in "pp" the one that runs its last backward pack."""
        if self.shared:
            return {p: visits[-1] % ranks for p, visits in self._visits.items()}
        return {p: self.steps[visits[-1]].rank for p, visits in self._visits.items()}

    def give(self, k: int, gradients: dict[nn.Parameter, Tensor]) -> None:
        """Take the gradients of pack k to where their parameters are updated, and start that."""
        due: dict[nn.Parameter, Tensor] = {}
        for index, p in self._held.get(k, []):
            visits = self._visits[p]
            gradient = gradients.get(p)
            if not self.shared and self._owner[p] != self.rank:
                self.boundaries.send_gradient(p, gradient, self._owner[p], k, index)
                continue
            if gradient is not None:
                waiting = self._pending.pop(p, None)
                self._pending[p] = gradient if waiting is None else waiting.add_(gradient)
            if k != visits[-1]:
                continue
            for other in visits[:-1]:
                rank = self.steps[other].rank
                if not self.shared and rank != self.rank:
                    came = self.boundaries.receive_gradient(p, rank, other, index)
                    waiting = self._pending.pop(p, None)
                    self._pending[p] = came if waiting is None else waiting.add_(came)
            if p in self._pending:
                due[p] = self._pending.pop(p)
            elif self.shared:
                due[p] = torch.zeros_like(p)  # the other ranks may have one
        self._futures.append(self._thread.submit(self._update, due))

    def _update(self, due: dict[nn.Parameter, Tensor]) -> None:
        """On the update thread: sum over data-parallel ranks, then update or keep for clipping."""
        for p in list(due) if self.shared else []:
            dist.reduce(due[p], self._owner[p], group=self.group)
            if self._owner[p] != self.rank:
                del due[p]
        if self.clip_norm is None:
            self._apply(due)
        else:
            self._unclipped.update(due)
        # The thread lets go of its argument only some time after the result is known.
        due.clear()

    def _apply(self, due: dict[nn.Parameter, Tensor]) -> None:
        if not due:
            return
        assert self.optimizer is not None
        try:
            for p, gradient in due.items():
                p.grad = gradient
            # Parameters without a gradient, which are all others, are left alone.
            self.optimizer.step()
        finally:
            for p in due:
                p.grad = None

    def finish(self) -> None:
        """Wait for all updates of a step; with a clipped norm, do them."""
        for future in self._futures:
            future.result()
        self._futures.clear()
        if self.clip_norm is None:
            return
        norm = torch.zeros((), dtype=torch.float64)
        for gradient in self._unclipped.values():
            norm += gradient.double().square().sum()
        if self.group is not None:
            dist.all_reduce(norm, group=self.group)
        # As torch.nn.utils.clip_grad_norm_ does.
        factor = (self.clip_norm / (norm.sqrt() + 1e-6)).clamp(max=1.0)
        for gradient in self._unclipped.values():
            gradient.mul_(factor.to(gradient.dtype))
        self._apply(self._unclipped)
        self._unclipped.clear()

    def clear(self) -> None:
        """Forget the gradients of a step that failed, once the update under way has ended."""
        for future in self._futures:
            if not future.cancel():
                future.exception()
        for held in (self._futures, self._pending, self._unclipped):
            held.clear()
