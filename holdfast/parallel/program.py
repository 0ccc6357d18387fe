"""Program: one rank's part of a plan for several devices, and a step of it.

The same code runs for real, in the processes of a run, and on fake tensors, where `rehearse` is
each rank in turn: what a rank will hold is predicted by running its own program.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from holdfast.errors import UsageError
from holdfast.ledger import Ledger
from holdfast.meter import Meter, fake_step
from holdfast.parallel._torch_pp import rehearsal, rehearsing
from holdfast.parallel.chain import causal_lm_chain, next_token_loss
from holdfast.parallel.offload_plan import StageCost
from holdfast.parallel.pipeoffload import PipeOffload, pipeoffload
from holdfast.places import Arena, HostArena
from holdfast.plan import apply
from holdfast.plan.file import Parallel, PlanFile
from holdfast.plan.models import loss_of, resolve
from holdfast.plan.plan import Plan
from holdfast.plan.trace import to_fake_
from holdfast.training.step import counted_tokens


@dataclass(frozen=True)
class Layout:
    """Where a rank stands: its replica, its place in the replica's pipeline, and its groups."""

    replica: int
    position: int
    data: DeviceMesh
    pipeline: dist.ProcessGroup
    ends: dist.ProcessGroup | None

    @classmethod
    def of(cls, parallel: Parallel, device: str = "cpu") -> "Layout":
        """The layout of this process; every rank calls this.

        Raises:
            UsageError: as many ranks as the plan is for are not running.
        """
        if dist.get_world_size() != parallel.ranks:
            raise UsageError(
                f"the plan is for {parallel.ranks} ranks (data {parallel.data} x pipeline "
                f"{parallel.pipeline}), {dist.get_world_size()} are running"
            )
        shape = (parallel.data, parallel.pipeline)
        mesh = init_device_mesh(device, shape, mesh_dim_names=("data", "pipeline"))
        replica, position = mesh.get_coordinate() or (0, 0)
        ends = None
        for number, ranks in enumerate(mesh.mesh.tolist()):
            # All ranks take part in making each group.
            made = dist.new_group([ranks[0], ranks[-1]]) if len(ranks) > 1 else None
            if number == replica and position in (0, len(ranks) - 1):
                ends = made
        return cls(replica, position, mesh["data"], mesh["pipeline"].get_group(), ends)


class Program:
    """A model under a plan with a `parallel` section, on this rank.

    Args:
        model: the whole model on this rank's device, the same on all ranks; the parts of other
            ranks are emptied.
        layout: of this process.
        arenas: where blocks' activations move, as of `Plan.arenas`.

    `named` are this rank's parameters by the model's names, `optimizer` steps them, `whole` is
    what a Meter should look at.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: PlanFile,
        layout: Layout,
        arenas: dict[str, Arena] | None = None,
    ):
        assert spec.parallel is not None, "the plan is for one device"
        self.spec, self.parallel, self.layout = spec, spec.parallel, layout
        self.device = next(model.parameters()).device
        model.train()
        apply.prepare(model, spec.methods)
        apply.set_blocks(model, spec.methods.blocks, arenas or {})
        self.pipe: PipeOffload | None = None
        self._tied: list[nn.Parameter] = []
        if self.parallel.pipeline > 1:
            self._cut(model)
        else:
            self._share(model)

    def _share(self, model: nn.Module) -> None:
        """Every rank has the whole model, or with ZeRO its share of the states."""
        training = self.spec.training
        self.whole: nn.Module = model
        self.named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if not self.parallel.zero:
            self.optimizer = apply.make_optimizer(
                list(self.named.items()),
                self.spec.methods,
                training.learning_rate,
                training.weight_decay,
            )
            return
        from holdfast.parallel.zero import zero

        make = partial(
            torch.optim.AdamW,
            lr=training.learning_rate,
            weight_decay=training.weight_decay,
            fused=True,
        )
        self.whole, self.optimizer = zero(
            model, make, stage=self.parallel.zero, mesh=self.layout.data
        )
        self.named = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def _cut(self, model: nn.Module) -> None:
        """This rank keeps its parts of the chain and lets go of all others."""
        spec, parallel = self.spec, self.parallel
        ids = torch.zeros(1, spec.sequence, dtype=torch.long, device=self.device)
        width = _width(model)
        names = {id(p): n for n, p in model.named_parameters()}
        chain = causal_lm_chain(model, ids, verify=not rehearsing())
        parts = split_chain(chain, parallel.pipeline * parallel.chunks)
        mine = [parts[c * parallel.pipeline + self.layout.position] for c in range(parallel.chunks)]
        self.whole = nn.ModuleList(mine)
        own = {id(p): p for p in self.whole.parameters()}
        ends = [{id(p) for p in part.parameters()} for part in (parts[0], parts[-1])]
        self._tied = [p for key, p in own.items() if key in ends[0] & ends[1]]
        for tensor in (*model.parameters(), *model.buffers()):
            if id(tensor) not in own and not any(tensor is b for b in self.whole.buffers()):
                tensor.data = tensor.data.new_empty(0)
        self._names = {key: names[key] for key in own}
        self.named = {names[key]: p for key, p in own.items() if p.requires_grad}
        training = spec.training
        self.optimizer = apply.make_optimizer(
            list(self.named.items()), spec.methods, training.learning_rate, training.weight_decay
        )
        dtype = next(iter(own.values())).dtype
        like = torch.empty(
            spec.micro_batch, spec.sequence, width, dtype=dtype, device=self.device,
            requires_grad=True,
        )  # fmt: skip
        self.pipe = pipeoffload(
            mine,
            microbatches=spec.accumulation,
            loss_fn=next_token_loss,
            order=parallel.order,
            split_backward=parallel.order != "1f1b",
            offload=parallel.offload,
            costs=[StageCost(*cost[:6], left=cost[6]) for cost in parallel.costs],
            like=like,
            process_group=self.layout.pipeline,
        )

    def step(self, micros: list[dict[str, Tensor]]) -> float:
        """One optimizer step on this replica's micro-batches; the mean loss of all replicas."""
        loss = self._pipelined(micros) if self.pipe is not None else self._whole(micros)
        if self.spec.training.clip is not None:
            self._clip(self.spec.training.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def _whole(self, micros: list[dict[str, Tensor]]) -> float:
        counts = [_tokens(m) for m in micros]
        total = torch.zeros((), device=self.device)
        for micro, count in zip(micros, counts, strict=True):
            loss = loss_of(self.whole(**micro))
            weight = count / sum(counts)
            (loss * weight if weight != 1.0 else loss).backward()
            total += loss.detach() * weight
        if not self.parallel.zero:
            self._average(self.named.values())
        dist.all_reduce(total)
        return _number(total) / self.parallel.data

    def _pipelined(self, micros: list[dict[str, Tensor]]) -> float:
        assert self.pipe is not None
        ids = torch.cat([m["input_ids"] for m in micros])
        labels = torch.cat([m["labels"] for m in micros])
        losses = self.pipe.step(ids, labels)
        self._average(self.named.values())
        for parameter in self._tied:
            dist.all_reduce(parameter.grad, group=self.layout.ends)
        total = torch.zeros((), device=self.device)
        if losses:
            total += torch.stack(losses).mean()
        dist.all_reduce(total)
        return _number(total) / self.parallel.data

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and persistent buffers as they lie on this rank, for its checkpoint."""
        return {name: _local(value) for name, value in self.whole.state_dict().items()}

    def gathered(self) -> dict[str, Tensor] | None:
        """The whole model's parameters on the first rank, None elsewhere; every rank calls this."""
        if self.pipe is None:
            whole = {
                name: value.full_tensor() if isinstance(value, DTensor) else value
                for name, value in self.whole.state_dict().items()
            }
            return whole if dist.get_rank() == 0 else None
        own = {self._names[id(p)]: p.detach() for p in self.whole.parameters()}
        parts: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(own if self.layout.replica == 0 else {}, parts)
        if parts is None:
            return None
        return {name: tensor for part in parts for name, tensor in part.items()}

    def _average(self, parameters: Iterable[nn.Parameter]) -> None:
        if self.parallel.data == 1:
            return
        group = self.layout.data.get_group()
        grads = [p.grad for p in parameters if p.grad is not None]
        works = [dist.all_reduce(grad, group=group, async_op=True) for grad in grads]
        for work in works:
            work.wait()
        torch._foreach_div_(grads, self.parallel.data)

    def _clip(self, limit: float) -> None:
        if self.pipe is None:
            clip = getattr(self.optimizer, "clip_grad_norm_", None)
            if clip is not None:
                clip(limit)
            else:
                nn.utils.clip_grad_norm_(self.named.values(), limit)
            return
        # A tied parameter is on two ranks and counts once.
        tied = {id(p) for p in self._tied} if self.layout.position else set()
        grads = [p.grad for p in self.named.values() if p.grad is not None and id(p) not in tied]
        total = torch.stack([g.float().square().sum() for g in grads]).sum()
        dist.all_reduce(total, group=self.layout.pipeline)
        factor = (limit / (total.sqrt() + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_([p.grad for p in self.named.values() if p.grad is not None], factor)


def split_chain(chain: list[nn.Module], parts: int) -> list[nn.Module]:
    """A chain in `parts` runs of layers, as even as they can be; the ends keep what is around.

    Raises:
        UsageError: there are fewer layers than parts.
    """
    front, *layers, tail = chain
    if len(layers) < parts:
        raise UsageError(
            f"{len(layers)} layers cannot be cut in {parts} parts; use fewer pipeline ranks or "
            "fewer chunks"
        )
    runs, begin = [], 0
    for size in part_layers(len(layers), parts):
        runs.append(layers[begin : begin + size])
        begin += size
    runs[0], runs[-1] = [front, *runs[0]], [*runs[-1], tail]
    return [nn.Sequential(*run) for run in runs]


def part_layers(layers: int, parts: int) -> list[int]:
    """How many layers each part has, the first ones one more where it does not divide."""
    return [layers // parts + (part < layers % parts) for part in range(parts)]


def rehearse(
    spec: PlanFile, rank: int, *, apart: bool = False, steps: int = 2
) -> tuple[Meter, "Program"]:
    """Run steps of a rank on fake tensors; the Meter of the last one.

    Args:
        steps: the first one makes the optimizer's states.
        apart: the device is not the host's memory: what is offloaded is not counted with it.

    Raises:
        HoldfastError: this process belongs to a process group.
        UsageError: the plan does not suit the model.
    """
    assert spec.parallel is not None
    source = resolve(spec.model)
    model = source.build("meta", getattr(torch, spec.methods.dtype))
    with rehearsal(rank, spec.parallel.ranks):
        layout = Layout.of(spec.parallel)
        with fake_step():
            program = Program(to_fake_(model), spec, layout, Plan(spec).arenas())
            if apart and program.pipe is not None:
                program.pipe.arena = _Elsewhere(2**62)
            micros = [
                source.example_inputs(spec.micro_batch, spec.sequence, "cpu")
                for _ in range(spec.accumulation)
            ]
            for _ in range(steps - 1):
                program.step(micros)
            with Meter(program.whole, program.optimizer, inputs=micros) as meter:
                program.step(micros)
    return meter, program


def part_sizes(spec: PlanFile) -> list[tuple[int, int]]:
    """For each part of a pipelined plan: bytes that a forward saves, and that W needs after I.

    Args:
        spec: its costs are not looked at.
    """
    assert spec.parallel is not None
    pipeline = spec.parallel.pipeline
    parts = pipeline * spec.parallel.chunks
    unknown = [(1, 1, 1, 0, 0, 0, 0)] * parts
    changes = {"data": 1, "order": "bfs", "offload": 0, "costs": unknown}
    alone = spec.model_copy(
        update={
            "batch": spec.micro_batch,
            "parallel": spec.parallel.model_copy(update=changes),
        }
    )
    sizes: dict[int, tuple[int, int]] = {}
    for rank in range(pipeline):
        pipe = rehearse(alone, rank, steps=1)[1].pipe
        assert pipe is not None
        sizes |= pipe.sizes
    return [sizes[part] for part in range(parts)]


class _Elsewhere(HostArena):
    """Counts what it would hold and holds nothing: the host of a device that is rehearsed."""

    def _reserve(self, tensor: Tensor) -> Any:
        self._charge(tensor.nbytes)
        return SimpleNamespace(raw=SimpleNamespace(nbytes=tensor.nbytes))

    def _write(self, entry: Any, tensor: Tensor) -> None: ...

    def _read(self, entry: Any, out: Tensor) -> None: ...

    def _release(self, entry: Any) -> None:
        self._charge(-entry.slot.raw.nbytes)


def _width(model: nn.Module) -> int:
    """Of the hidden states that layers pass on."""
    config: Any = model.config
    return config.get_text_config().hidden_size


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def _tokens(micro: dict[str, Tensor]) -> int:
    if isinstance(micro["labels"], FakeTensor):
        return 1
    return counted_tokens(micro) or 1


def _number(value: Tensor) -> float:
    return 0.0 if isinstance(value, FakeTensor) else float(value)


def ledger_of(spec: PlanFile, *, apart: bool = False) -> Ledger:
    """What every rank of a plan will hold, by rehearsing those that differ.

    Raises:
        HoldfastError, UsageError: as `rehearse`.
    """
    assert spec.parallel is not None
    parallel = spec.parallel
    cells: dict[tuple[int, str, str, str], int] = {}
    # Replicas are alike, but for ZeRO's shares: the last one's may be padded.
    different = range(parallel.pipeline) if parallel.pipeline > 1 else (0, parallel.ranks - 1)
    known = {rank: rehearse(spec, rank, apart=apart) for rank in set(different)}
    for rank in range(parallel.ranks):
        like = rank % parallel.pipeline if parallel.pipeline > 1 else rank
        meter, program = known.get(like) or known[0]
        cells |= {(rank, *key[1:]): value for key, value in meter.ledger.items()}
        if apart and program.pipe is not None and program.pipe.measured is not None:
            cells[rank, "host", "activations", "backward"] = program.pipe.measured.host_bytes
    return Ledger(cells)
