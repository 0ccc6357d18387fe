"""ZeRO (028): data parallelism in which each rank keeps only its share of the model states.

Keeps    stage 1: the optimizer's states of 1/N of the parameters; stage 2: gradients of these too;
         stage 3: parameters of these too, others for as long as a unit computes.
Form     stages 1 and 2: flat buckets in the parameters' dtype, padded to a multiple of N; states in
         fp32, with an fp32 master copy where parameters are in half precision. Stage 3: torch's
         FSDP2, each parameter split by rows, in fp32; half precision is gathered.
Bytes    holdfast.plan.formulas.zero: `resident` and `gradient_peak`, `sharded_rows`; with P the
         padded number of parameters in fp32 8P + 8P/N, 4P + 12P/N, 16P/N.
Source   Rajbhandari, Rasley, Ruwase and He, "ZeRO: Memory Optimizations Toward Training Trillion
         Parameter Models", SC 2020.
Departs  parameters are split within buckets and not each as a whole; gradients are averaged, as
         DistributedDataParallel does; a parameter that got no gradient in stages 1 and 2 is stepped
         with zeros; activations are partitioned apart, in `holdfast.parallel.partition`.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable
from torch.distributed.device_mesh import DeviceMesh

from holdfast.errors import UsageError
from holdfast.parallel.shard_optimizer import Make, ShardOptimizer, Unit, check_elementwise
from holdfast.parallel.sharded import Sharded
from holdfast.plan.formulas.zero import bucketed

BUCKET_BYTES = 25 * 2**20


def zero(
    model: nn.Module,
    optimizer_cls: Make,
    *,
    stage: int,
    mesh: DeviceMesh | None = None,
    params: Iterable[Any] | None = None,
    bucket_bytes: int = BUCKET_BYTES,
    units: Sequence[nn.Module] | None = None,
) -> tuple[nn.Module, "ShardOptimizer"]:
    """Spread a model's states over the ranks of `mesh`; every rank calls this on the same model.

    The loop stays that of one process, each rank with its own part of the batch:

        model, optimizer = zero(model, partial(torch.optim.AdamW, lr=1e-3), stage=2)
        loss = model(x); loss.backward(); optimizer.clip_grad_norm_(1.0); optimizer.step()

    Values come from the first rank. Several backward passes before a step accumulate; `step`
    consumes the gradients. `state_dict` is this rank's, and `consolidated` everyone's.

    Args:
        optimizer_cls: any optimizer whose update is elementwise, as a class or a partial of it.
        stage: 1, 2 or 3.
        mesh: one-dimensional; None means all ranks.
        params: parameters or groups of them, as the optimizer would be given; by default all that
            train.
        bucket_bytes: of gradients that stages 1 and 2 reduce at a time.
        units: modules that stage 3 gathers one at a time; by default the model's blocks.

    Raises:
        UsageError: an unknown stage, an optimizer that is not elementwise, nothing to train, a
            parameter shared by two units, or weights that do not exist yet.
    """
    if stage not in (1, 2, 3):
        raise UsageError(f"stage={stage} is unknown; use 1, 2 or 3 (plain DDP is stage 0)")
    if bucket_bytes < 1:
        raise UsageError(f"bucket_bytes={bucket_bytes} holds nothing; use 1 or more")
    if any(p.is_meta for p in model.parameters()):
        raise UsageError("some parameters are on the meta device; load the weights before zero()")
    if mesh is not None and mesh.ndim != 1:
        raise UsageError(f"mesh has {mesh.ndim} dimensions; pass the one of data parallelism")
    groups = _groups(model, params)
    check_elementwise(optimizer_cls)
    group = None if mesh is None else mesh.get_group()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            values = tensor.detach().contiguous()
            dist.broadcast(values, group=group, group_src=0)
            tensor.copy_(values)
    if stage == 3:
        from holdfast.parallel.zero_rows import Rows  # FSDP takes a second to import

        return model, Rows(model, optimizer_cls, groups, mesh, units)
    return model, _Buckets(model, optimizer_cls, groups, group, stage, bucket_bytes)


def _groups(model: nn.Module, params: Iterable[Any] | None) -> list[dict[str, Any]]:
    """Parameter groups, each parameter once and in the model's order."""
    given: list[Any] = list(model.parameters() if params is None else params)
    given = given if given and isinstance(given[0], dict) else [{"params": given}]
    order = {id(p): i for i, p in enumerate(model.parameters())}
    if any(id(p) not in order for g in given for p in g["params"]):
        raise UsageError("params holds a parameter that is not the model's")
    groups = []
    for g in given:
        trained = {id(p): p for p in g["params"] if p.requires_grad}
        groups.append({**g, "params": sorted(trained.values(), key=lambda p: order[id(p)])})
    if not any(g["params"] for g in groups):
        raise UsageError(f"{type(model).__name__} has no parameter that requires a gradient")
    return groups


def _same_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors begin at one place; fake tensors have places too, but no pointers."""
    same = a.untyped_storage()._cdata == b.untyped_storage()._cdata
    return same and a.storage_offset() == b.storage_offset()


class _Bucket(Unit):
    """Parameters that became views of one flat buffer, and the gradients of their shard.

    `grads` is as long as the buffer in stage 1 and as the shard in stage 2, where `buffer` holds
    the gradients of the whole bucket from the first one until they are reduced.
    """

    def __init__(
        self,
        parameters: list[nn.Parameter],
        group: dist.ProcessGroup | None,
        stage: int,
        limit: int,
    ):
        layout, self.stage = Sharded([p.shape for p in parameters], group), stage
        with torch.no_grad():
            self.flat = parameters[0].new_zeros(layout.padded)
            for p, view in zip(parameters, layout.views(self.flat), strict=True):
                view.copy_(p)
                p.data = view
        own = layout.own(self.flat)
        half = own.itemsize < 4
        super().__init__(layout, parameters, own.float() if half else own, apart=half)
        self.grads = self.flat.new_zeros(layout.padded if stage == 1 else layout.shard)
        self.buffer: Tensor | None = self.grads if stage == 1 else None
        # A gradient larger than a bucket is reduced in autograd's own tensor, if that needs no pad.
        self.direct = stage == 2 and layout.numel > limit and layout.numel == layout.padded
        self.ready: set[int] = set()
        self.empty = True

    def reduced(self) -> Tensor | None:
        if self.empty:
            return None
        return self.grads if self.stage == 2 else self.layout.own(self.grads)

    def take(self) -> Tensor:
        """The whole gradient of the bucket, flat; the parameters' own are gone."""
        first, layout = self.parameters[0], self.layout
        if self.direct and first.grad is not None:
            flat = first.grad.view(-1)
        else:
            flat = self.flat.new_zeros(layout.padded) if self.buffer is None else self.buffer
            for number, p in enumerate(self.parameters):
                view = layout.view(flat, number)
                if p.grad is None:
                    view.zero_()
                elif not _same_memory(p.grad, view):
                    view.copy_(p.grad)
        for p in self.parameters:
            p.grad = None
        if self.stage == 2:
            self.buffer = None
        self.ready.clear()
        return flat

    def forget(self) -> None:
        for p in self.parameters:
            p.grad = None
        if self.stage == 2:
            self.buffer = None
        self.ready.clear()
        self.empty = True


class _Buckets(ShardOptimizer):
    """Stages 1 and 2. Buckets are reduced in one fixed order on all ranks, that of backward.

    Stage 1 adds up whole gradients and reduces them once, in `clip_grad_norm_` or `step`; stage 2
    reduces each bucket in each backward as soon as its last gradient is there.
    """

    def __init__(
        self,
        model: nn.Module,
        make: Make,
        groups: list[dict[str, Any]],
        group: dist.ProcessGroup | None,
        stage: int,
        bucket_bytes: int,
    ):
        self.stage = stage
        buckets = [_in_buckets(g["params"], group, stage, bucket_bytes) for g in groups]
        super().__init__(make, groups, buckets)
        place = {id(p): i for i, p in enumerate(model.parameters())}
        # By the gradient that comes last: a bucket must not wait for one whose turn is later.
        self.order: list[_Bucket] = sorted(
            (b for found in buckets for b in found),
            key=lambda b: -min(place[id(p)] for p in b.parameters),
        )
        self._turn, self._collected, self._running = 0, False, False
        self._pending: tuple[_Bucket, dist.Work, Tensor, Tensor] | None = None
        self._gathers: list[dist.Work] = []
        for bucket in self.order:
            for number, p in enumerate(bucket.parameters):
                p.register_hook(functools.partial(self._arriving, bucket, number))
                if stage == 2:
                    p.register_post_accumulate_grad_hook(functools.partial(self._arrived, bucket))
        model.register_load_state_dict_post_hook(self._loaded)

    @property
    def held(self) -> dict[str, list[Tensor]]:
        masters: list[Tensor] = [b.master for b in self.order if b.apart]
        return {"gradients": [b.grads for b in self.order], "optimizer": masters}

    @torch.no_grad()
    def _loaded(self, model: nn.Module, keys) -> None:
        for bucket in self.order:
            if bucket.apart:
                bucket.master.copy_(bucket.layout.own(bucket.flat))

    def _arriving(self, bucket: _Bucket, number: int, grad: Tensor) -> None:
        """Before autograd adds a gradient: let it add into the bucket."""
        p = bucket.parameters[number]
        if self._collected:
            raise UsageError(
                "backward ran after the gradients were clipped; clip once, after the last backward"
            )
        if p.grad is not None or bucket.direct:
            return
        if bucket.buffer is None and self._next() is bucket:
            self._settle()  # so that there is one buffer at a time
            bucket.buffer = bucket.flat.new_zeros(bucket.layout.padded)
        if bucket.buffer is not None:
            p.grad = bucket.layout.view(bucket.buffer, number).zero_()

    def _arrived(self, bucket: _Bucket, p: nn.Parameter) -> None:
        if not self._running:
            self._running = True
            Variable._execution_engine.queue_callback(self._end_of_backward)
        bucket.ready.add(id(p))
        while (due := self._next()) and len(due.ready) == len(due.parameters):
            self._reduce(due)

    def _end_of_backward(self) -> None:
        # Also what got no gradient here: it may have got one on another rank.
        while bucket := self._next():
            self._reduce(bucket)
        self._settle()
        self._turn, self._running = 0, False

    def _next(self) -> _Bucket | None:
        return self.order[self._turn] if self._turn < len(self.order) else None

    @torch.no_grad()
    def _reduce(self, bucket: _Bucket) -> None:
        self._settle()
        self._turn += 1
        flat = bucket.take()
        out = bucket.grads if bucket.empty else torch.empty_like(bucket.grads)
        work = bucket.layout.begin_reduce(flat, out)
        self._pending = (bucket, work, out, flat)

    def _settle(self) -> None:
        """Wait for the bucket that is under way."""
        if self._pending is not None:
            bucket, work, out, _ = self._pending
            self._pending = None
            work.wait()
            if out is not bucket.grads:
                bucket.grads.add_(out)
            bucket.empty = False

    def _collect(self) -> None:
        if self._collected:
            return
        self._collected = True
        if self.stage == 1:
            works = [
                bucket.layout.begin_reduce(bucket.take(), bucket.layout.own(bucket.grads))
                for bucket in self.order
            ]
            for bucket, work in zip(self.order, works, strict=True):
                work.wait()
                bucket.empty = False

    def _publish(self, unit: Unit) -> None:
        layout = unit.layout
        assert isinstance(unit, _Bucket)
        if not _same_memory(unit.parameters[0], unit.flat):
            raise UsageError(
                "the model's parameters were moved or converted after zero(); call zero() last"
            )
        if unit.apart:
            layout.own(unit.flat).copy_(unit.master)
        self._gathers.append(layout.begin_gather(unit.flat))

    def _finish(self) -> None:
        for work in self._gathers:
            work.wait()
        self._gathers.clear()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients; they are None between steps, whatever `set_to_none` says."""
        self._collected, self._turn, self._running = False, 0, False
        self._settle()
        for bucket in self.order:
            bucket.forget()


def _in_buckets(
    parameters: list[nn.Parameter],
    group: dist.ProcessGroup | None,
    stage: int,
    bucket_bytes: int,
) -> list[_Bucket]:
    """Parameters of one dtype and device together, in the order in which gradients come."""
    alike: dict[tuple, list[nn.Parameter]] = {}
    for p in reversed(parameters):
        alike.setdefault((p.dtype, p.device), []).append(p)
    return [
        _Bucket([ps[i] for i in numbers], group, stage, limit)
        for ps in alike.values()
        for limit in [bucket_bytes // ps[0].itemsize]
        for numbers in bucketed([p.numel() for p in ps], limit)
    ]
