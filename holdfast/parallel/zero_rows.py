"""ZeRO stage 3: torch's FSDP2 splits, gathers and reduces; the optimizer steps this rank's rows."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from holdfast import attach
from holdfast.errors import UsageError
from holdfast.parallel.shard_optimizer import Make, ShardOptimizer, Unit
from holdfast.parallel.sharded import Sharded, until_let_go


class _Row(Unit):
    """One parameter of which FSDP gives this rank some rows."""

    def __init__(self, parameter: nn.Parameter, group: dist.ProcessGroup):
        multiple = parameter.numel() // parameter.shape[0]
        layout = Sharded([parameter.shape], group, multiple=multiple)
        super().__init__(layout, [parameter], _local(parameter), apart=False)

    def reduced(self) -> Tensor | None:
        grad = self.parameters[0].grad
        return None if grad is None else _local(grad)

    def refresh(self) -> None:
        """Loading a state dict may have given the parameter another tensor."""
        self.master.data = _local(self.parameters[0])


def _local(tensor: Any) -> Tensor:
    return tensor.to_local().detach().view(-1)


class _Comm:
    """What FSDP asks for its buffers; they are let go as soon as it drops them."""

    def allocate(self, size, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)


class _Gather(_Comm):
    def __call__(self, output_tensor, input_tensor, group, async_op=False) -> dist.Work | None:
        gather = partial(
            dist.all_gather_single, output_tensor, input_tensor, group=group, async_op=async_op
        )
        if async_op:
            return gather()
        return until_let_go(gather, output_tensor, input_tensor)


class _Reduce(_Comm):
    def __call__(self, output_tensor, input_tensor, group, op, async_op=False) -> dist.Work | None:
        reduce = partial(
            dist.reduce_scatter_single,
            output_tensor,
            input_tensor,
            op=op,
            group=group,
            async_op=async_op,
        )
        if async_op:
            return reduce()
        return until_let_go(reduce, output_tensor, input_tensor)


class Rows(ShardOptimizer):
    """Stage 3: torch's FSDP2 gathers, frees and reduces; the optimizer steps the local rows."""

    def __init__(
        self,
        model: nn.Module,
        make: Make,
        groups: list[dict[str, Any]],
        mesh: DeviceMesh | None,
        units: Sequence[nn.Module] | None,
    ):
        device = next(model.parameters()).device
        if mesh is None:
            mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        if units is None:
            units = [block for _, stack in attach.blocks(model) for block in stack]
        _check_units(model, units)
        policy = _in_full_precision(model)
        names = {id(p): name for name, p in model.named_parameters()}
        for module in (*units, model):
            sharded = fully_shard(module, mesh=mesh, mp_policy=policy)
            sharded.set_custom_all_gather(_Gather())
            sharded.set_custom_reduce_scatter(_Reduce())
        now = dict(model.named_parameters())
        groups = [{**g, "params": [now[names[id(p)]] for p in g["params"]]} for g in groups]
        ranks = mesh.get_group()
        super().__init__(make, groups, [[_Row(p, ranks) for p in g["params"]] for g in groups])
        self._gathered: dict[int, nn.Parameter] = {}
        self._watching = {m: m.register_forward_pre_hook(self._watch) for m in (*units, model)}

    @property
    def held(self) -> dict[str, list[Tensor]]:
        return {"parameters": list(self._gathered.values())}

    def _watch(self, module: nn.Module, args) -> None:
        # FSDP keeps these, and empties their storage while they are not gathered.
        self._watching.pop(module).remove()
        found = [p for p in module.parameters() if not isinstance(p, DTensor)]
        self._gathered |= {id(p): p for p in found}

    def _collect(self) -> None:
        for unit in self.units:
            assert isinstance(unit, _Row)
            unit.refresh()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        for unit in self.units:
            unit.parameters[0].grad = None


def _check_units(model: nn.Module, units: Sequence[nn.Module]) -> None:
    """Refuse a parameter that two units share: one would free what the other computes with."""
    owner: dict[int, int] = {}
    inside = {id(m): i for i, unit in enumerate(units) for m in unit.modules()}
    for prefix, module in model.named_modules():
        unit = inside.get(id(module), -1)
        for name, p in module.named_parameters(recurse=False):
            if owner.setdefault(id(p), unit) != unit:
                raise UsageError(
                    f"{prefix}.{name} is tied to a parameter of another unit; stage 3 gathers "
                    "units one at a time, so pass units= in which both are outside"
                )


def _in_full_precision(model: nn.Module) -> MixedPrecisionPolicy:
    """Make parameters the fp32 masters of what is gathered in their former dtype."""
    kinds = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if len(kinds) > 1:
        names = ", ".join(sorted(str(kind) for kind in kinds))
        raise UsageError(f"parameters are in {names}; stage 3 wants one dtype, convert the model")
    (kind,) = kinds
    if kind.itemsize >= 4:
        return MixedPrecisionPolicy()
    for p in model.parameters():
        if p.is_floating_point():
            p.data = p.data.float()
    return MixedPrecisionPolicy(param_dtype=kind, reduce_dtype=kind)
