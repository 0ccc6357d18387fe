"""The one place that knows torch's private distributed classes (torch 2.13).

`Stage` is torch's PipelineStage whose saved tensors, receive buffers and sent outputs live exactly
as long as needed, at moments that the order of actions decides and no timing can change. `Runtime`
is torch's schedule runtime with hooks around each action.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    SEND_B,
    SEND_F,
    InferenceMode,
    _Action,
    _batch_p2p,
    _ComputationType,
    _PipelineScheduleRuntime,
    _wait_batch_p2p,
)
from torch.distributed.pipelining.stage import _RecvInfo

from holdfast.errors import HoldfastError
from holdfast.parallel.schedule import Action, Schedule
from holdfast.places import ActivationStore

# Compute actions that begin before a sent tensor is dropped; by then the receiver is ready for it.
SEND_WINDOW = 2


class Listener(Protocol):
    """What keeps the saved tensors of a rank's actions; called in the order of the schedule."""

    def before(self, action: Action) -> None:
        """The action is about to run."""

    def store(self, action: Action, keep: list[Tensor]) -> ActivationStore:
        """A store that this forward is to be entered with."""

    def saved(self, action: Action) -> None:
        """The forward has ended, its stores are full and its inputs and outputs let go."""

    def after(self, action: Action) -> None:
        """The action has ended."""


def to_torch(schedule: Schedule) -> dict[int, list[_Action | None]]:
    """A compute-only schedule as torch's actions."""
    return {
        rank: [_Action(a.stage, _ComputationType.from_str(a.kind), a.micro) for a in order]
        for rank, order in schedule.items()
    }


def with_communication(schedule: Schedule) -> dict[int, list[tuple[int, str, int]]]:
    """What torch runs for a schedule: (stage, F I W B SEND_F RECV_F SEND_B RECV_B, micro)."""
    from torch.distributed.pipelining.schedules import _add_send_recv

    stages = 1 + max(a.stage for order in schedule.values() for a in order)
    actions: dict[int, list[_Action]] = to_torch(schedule)  # type: ignore[assignment]
    lowered = _add_send_recv(actions, lambda s: s % len(schedule), stages)
    return {
        rank: [(a.stage_index, a.computation_type.value, a.microbatch_index or 0) for a in order]
        for rank, order in lowered.items()
    }


def _let_go(tensor: Tensor) -> None:
    """Drop a tensor's bytes; shape, gradient function and gradient stay."""
    tensor.data = tensor.data.new_empty(1).expand(tensor.shape)


class Stage(PipelineStage):
    """One chunk of the model; `keeper` hears of each action.

    Receive buffers exist from the moment at which torch posts the receive to the end of the action
    that consumes them. An output's bytes go once they are sent, an input's once they are saved.
    """

    keeper: Listener

    def __init__(
        self,
        module: nn.Module,
        index: int,
        stages: int,
        device: torch.device,
        group: dist.ProcessGroup | None,
        like: tuple[Tensor, Tensor] | None = None,
    ):
        given: dict[str, Any] = {}
        if like is not None:
            # With all shapes known, stages have nothing to tell each other before they begin.
            given = {"input_args": like[0] if index == 0 else like[1], "output_args": like[1]}
        super().__init__(module, index, stages, device, group=group, **given)
        self._leaves: tuple[Tensor, ...] = ()

    def _setup_forward_recv_info(self, num_microbatches: int, has_backward: bool) -> None:
        super()._setup_forward_recv_info(1, has_backward)
        first = self.args_recv_info[0]
        for micro in range(num_microbatches):
            self.args_recv_info[micro] = _without_buffers(first)

    def _setup_backward_recv_info(self, num_microbatches: int) -> None:
        super()._setup_backward_recv_info(1)
        self.chunks = num_microbatches
        first = self.grad_recv_info[0]
        for micro in range(num_microbatches):
            self.grad_recv_info[micro] = _without_buffers(first)

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        _give_buffers(self.args_recv_info[fwd_chunk_id], self.device)
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        if self.has_backward and not self.is_last:
            _give_buffers(self.grad_recv_info[bwd_chunk_id], self.device)
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        operations = super().get_fwd_send_ops(fwd_chunk_id)
        for output in self.fwd_cache[fwd_chunk_id][0]:
            # The operations hold the bytes until they are sent; backward needs the function alone.
            _let_go(output)
        return operations

    def forward_one_chunk(self, fwd_chunk_id, args, kwargs=None, save_forward_output=True):
        action = Action(self.stage_index, "F", fwd_chunk_id)
        self.keeper.before(action)
        # A micro-batch is a view of the batch, which stays whatever becomes of the view.
        keep = [t for t in args if isinstance(t, Tensor)] if self.is_first else []
        with self.keeper.store(action, keep):
            output = super().forward_one_chunk(fwd_chunk_id, args, kwargs, save_forward_output)
        if not self.is_first:
            for info in self.args_recv_info[fwd_chunk_id]:
                info.buffer = None
            leaves, self._leaves = self._leaves, ()
            outputs, values = self.fwd_cache[fwd_chunk_id]
            self.fwd_cache[fwd_chunk_id] = outputs, [*leaves, *values[len(leaves) :]]
            for leaf in leaves:
                _let_go(leaf)
        return output

    def backward_one_chunk(
        self, bwd_chunk_id, loss=None, full_backward=True, last_backward=False
    ) -> None:
        action = Action(self.stage_index, "B" if full_backward else "I", bwd_chunk_id)
        self.keeper.before(action)
        inputs = self.fwd_cache[bwd_chunk_id][1]
        super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)
        for tensor in inputs:
            if isinstance(tensor, Tensor):
                tensor.grad = None  # what is sent lies in bwd_cache
        if self.is_first:
            self.bwd_cache.pop(bwd_chunk_id, None)
        elif not full_backward:
            values, groups, output, _ = self.backward_state[bwd_chunk_id]
            self.backward_state[bwd_chunk_id] = values, groups, output, None
        for info in self.grad_recv_info[bwd_chunk_id] if not self.is_last else ():
            info.buffer = None
        self.keeper.after(action)

    def backward_weight_one_chunk(self, bwd_chunk_id, last_backward=False) -> None:
        action = Action(self.stage_index, "W", bwd_chunk_id)
        self.keeper.before(action)
        super().backward_weight_one_chunk(bwd_chunk_id, last_backward)
        self.keeper.after(action)

    def _retrieve_recv_activations(self, fwd_chunk_id: int) -> tuple:
        # A view, so that whoever keeps a reference (a checkpoint) keeps the bytes as well when the
        # leaf itself lets go of them.
        leaves = super()._retrieve_recv_activations(fwd_chunk_id)
        self._leaves = leaves
        return tuple(leaf.view_as(leaf) for leaf in leaves)


def _without_buffers(infos: tuple[_RecvInfo, ...]) -> tuple[_RecvInfo, ...]:
    return tuple(
        _RecvInfo(i.input_name, i.source, None, i.tensor_meta, is_root_arg=i.is_root_arg)
        for i in infos
    )


def _give_buffers(infos: tuple[_RecvInfo, ...], device: torch.device) -> None:
    for info in infos:
        if not info.is_root_arg and info.tensor_meta is not None:
            info.buffer = torch.empty_strided(
                info.tensor_meta.shape,
                info.tensor_meta.stride,
                dtype=info.tensor_meta.dtype,
                device=device,
            )


@contextlib.contextmanager
def rehearsal(rank: int, ranks: int) -> Iterator[None]:
    """Be rank `rank` of `ranks` without the others: nothing is sent, what is received is anything.

    Raises:
        HoldfastError: this process belongs to a process group already.
    """
    if dist.is_initialized():
        raise HoldfastError(
            "a step of another rank cannot be rehearsed inside a process group; plan first, then "
            "start the processes"
        )
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def rehearsing() -> bool:
    return dist.is_initialized() and dist.get_backend() == "fake"


class Runtime(_PipelineScheduleRuntime):
    """Run `schedule` on this rank's stages.

    Args:
        keeper: hears of every action; shared by all stages.
        loss_fn: (output, target) -> mean loss of a micro-batch; gradients are of the batch's mean.
        patient: wait for a sent tensor SEND_WINDOW actions later, so that bytes do not depend on
            timing; False where ranks wait for each other elsewhere as well, which could deadlock.
    """

    def __init__(
        self,
        stages: list[Stage],
        schedule: Schedule,
        micros: int,
        keeper: Listener,
        loss_fn: Callable[..., Tensor],
        patient: bool = True,
    ):
        # torch would scale .grad after the step, and with it what was accumulated before.
        super().__init__(
            stages, micros, loss_fn=lambda *args: loss_fn(*args) / micros, scale_grads=False
        )
        self.keeper, self.patient = keeper, patient
        for stage in stages:
            stage.keeper = keeper
        self._prepare_schedule_with_comms(to_torch(schedule))
        self._sent: deque[tuple[int, list[dist.Work], list[dist.P2POp]]] = deque()
        self._begun = 0
        by_index = {stage.stage_index: stage for stage in stages}
        self._comp_type_to_function_map[SEND_F] = lambda action, _: self._send(
            by_index[action.stage_index].get_fwd_send_ops(action.microbatch_index)
        )
        self._comp_type_to_function_map[SEND_B] = lambda action, _: self._send(
            by_index[action.stage_index].get_bwd_send_ops(action.microbatch_index)
        )

    def _warmup_p2p(self, stages, has_backward: bool, p2p_done: bool) -> None:
        if rehearsing():
            for stage in stages:
                stage._inference_mode = InferenceMode.STATIC
        else:
            super()._warmup_p2p(stages, has_backward, p2p_done)

    def _send(self, operations: list[dist.P2POp]) -> None:
        self._sent.append((self._begun, _batch_p2p(operations), operations))

    def before(self) -> None:
        """A compute action begins: let go of what was sent SEND_WINDOW actions ago."""
        self._begun += 1
        if self.patient:
            self._settle(self._begun - SEND_WINDOW)
            return
        while self._sent and all(work.is_completed() for work in self._sent[0][1]):
            self._sent.popleft()

    def _settle(self, until: int) -> None:
        while self._sent and self._sent[0][0] <= until:
            _wait_batch_p2p(self._sent.popleft()[1])

    def _maybe_compute_loss(
        self, stage, output: Any, target_mbs, mb_index: int, loss_kwargs=None
    ) -> None:
        action = Action(stage.stage_index, "F", mb_index)
        if stage.is_last:
            with self.keeper.store(action, [target_mbs[mb_index]]):
                super()._maybe_compute_loss(stage, output, target_mbs, mb_index, loss_kwargs)
            for tensor in stage.fwd_cache[mb_index][0]:
                _let_go(tensor)
        self.keeper.saved(action)
        self.keeper.after(action)

    def run(self, *args: Any, target: Tensor, **kwargs: Any) -> list[Tensor]:
        """One batch; the losses of its micro-batches where the last stage is, else none."""
        losses: list[Tensor] = []
        try:
            self.step(*args, target=target, losses=losses, return_outputs=False, **kwargs)
            self._settle(self._begun)
        finally:
            self._sent.clear()
            self._begun = 0
        return [loss.detach() * self._n_microbatches for loss in losses]
