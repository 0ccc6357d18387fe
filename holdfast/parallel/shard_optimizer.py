"""ShardOptimizer: an elementwise optimizer that steps one rank's shards of a model's parameters.

What ranks share is here: clipping by the global norm, states that resume on the same rank, and
states put together so that any number of ranks resumes from them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from holdfast.errors import UsageError
from holdfast.parallel.sharded import Sharded, until_let_go

Make = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


def check_elementwise(make: Make) -> None:
    """Refuse an optimizer that updates a matrix in another way than its two halves laid flat."""
    with unset_fake_temporarily():  # it compares values
        _check_elementwise(make)


def _check_elementwise(make: Make) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(4, 6, generator=generator)
    whole = nn.Parameter(start.clone())
    halves = [nn.Parameter(part.clone()) for part in start.view(2, 12)]
    try:
        optimizers = [make([{"params": [whole]}]), make([{"params": halves}])]
        for _ in range(2):
            # Of very different sizes, so that scales shared by a block or a row show.
            grad = torch.randn(4, 6, generator=generator).exp()
            whole.grad, parts = grad, grad.view(2, 12).clone()
            for half, part in zip(halves, parts, strict=True):
                half.grad = part
            for optimizer in optimizers:
                optimizer.step()
        same = torch.allclose(whole.detach().view(2, 12), torch.stack([*halves]), rtol=1e-5)
    except (RuntimeError, TypeError, ValueError) as error:
        name = getattr(make, "func", make)
        raise UsageError(f"{name} cannot step flat shards: {error}") from error
    if not same:
        raise UsageError(
            f"{getattr(make, 'func', make)} is not elementwise: it updates a shard in another way "
            "than the whole tensor; use AdamW, Adam, SGD or the like"
        )


class Unit:
    """Parameters that are split together: `master` is this rank's flat shard, which is stepped.

    Args:
        shard: flat, in the dtype that is stepped.
        apart: nothing of the model holds the shard's values, so that states must save it.
    """

    def __init__(
        self, layout: Sharded, parameters: list[nn.Parameter], shard: Tensor, *, apart: bool
    ):
        self.layout, self.parameters, self.apart = layout, parameters, apart
        self.master = nn.Parameter(shard)

    def reduced(self) -> Tensor | None:
        """The mean gradient of the shard, None where there is none."""
        raise NotImplementedError


class ShardOptimizer(torch.optim.Optimizer):
    """What the stages share: it steps, clips, saves and restores shards.

    `param_groups` are those of the wrapped optimizer, with shards for parameters, so that schedules
    work as always. `held` tells a Meter what lies neither in a parameter nor in the state.
    """

    def __init__(self, make: Make, groups: list[dict[str, Any]], units: Sequence[Sequence[Unit]]):
        self.units = [unit for group in units for unit in group]
        self._numbers = {
            id(p): i for i, p in enumerate(p for group in groups for p in group["params"])
        }
        self.inner = make(
            [
                {**given, "params": [unit.master for unit in group]}
                for given, group in zip(groups, units, strict=True)
            ]
        )
        super().__init__(self.inner.param_groups, self.inner.defaults)
        self.state = self.inner.state

    @property
    def held(self) -> dict[str, list[Tensor]]:
        """Tensors by category of the ledger."""
        return {}

    def _collect(self) -> None:
        """Make every unit's `reduced` final."""

    def _publish(self, unit: Unit) -> None:
        """Bring a stepped shard to where the model computes with it."""

    def _finish(self) -> None:
        """After all units were stepped."""

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale the gradients so that their norm over all ranks is at most `max_norm`.

        Returns:
            The norm before, a scalar in fp32, equal on all ranks; NaN or infinite where it is.
        """
        self._collect()
        found = [grad for unit in self.units if (grad := unit.reduced()) is not None]
        layout = self.units[0].layout
        total = torch.zeros((), device=self.units[0].master.device)
        for grad in found:
            total += grad.float().square().sum()
        until_let_go(lambda: dist.all_reduce(total, group=layout.group), total)
        norm = total.sqrt()
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for grad in found:
            grad.mul_(scale.to(grad.dtype))
        return norm

    @torch.no_grad()
    def step(self, closure=None):
        """Reduce what is left to reduce, update this rank's shards, share them, drop gradients."""
        if closure is not None:
            raise UsageError("a closure would run backward inside step; call backward before it")
        self._collect()
        for unit in self._in_order():
            self._step_unit(unit)
            self._publish(unit)
        self._finish()
        self.zero_grad()

    def _step_unit(self, unit: Unit) -> None:
        """Update one shard: gradients in the shard's dtype exist for it alone."""
        grad = unit.reduced()
        if grad is None:
            return
        groups = self.inner.param_groups
        (group,) = (g for g in groups if any(p is unit.master for p in g["params"]))
        unit.master.grad = grad.to(unit.master.dtype)
        self.inner.param_groups = [{**group, "params": [unit.master]}]
        try:
            self.inner.step()
        finally:
            self.inner.param_groups = groups
            unit.master.grad = None

    def state_dict(self) -> dict[str, Any]:
        """This rank's states, with how many ranks there are in each entry."""
        inner = self.inner.state_dict()
        entries = {}
        for index, unit in enumerate(self._in_order()):
            entry = dict(inner["state"].get(index, {}))
            if unit.apart:
                entry["master"] = unit.master.detach()
            layout = unit.layout
            entry |= {"ranks": layout.ranks, "rank": layout.rank, "shard": layout.shard}
            entries[index] = entry
        return {"state": entries, "param_groups": inner["param_groups"]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` of the same rank or `consolidated` of any world returned.

        Raises:
            UsageError: the shards belong to another number of ranks, another rank or other buckets.
        """
        entries, groups = state_dict["state"], state_dict["param_groups"]
        if not entries or any("ranks" not in entry for entry in entries.values()):
            entries = self._split(entries)
            fresh = self.inner.state_dict()["param_groups"]
            groups = [
                {**saved, "params": now["params"]} for saved, now in zip(groups, fresh, strict=True)
            ]
        states = {index: dict(entries.get(index, {})) for index in range(len(self.units))}
        for entry, unit in zip(states.values(), self._in_order(), strict=True):
            layout = unit.layout
            here = (layout.ranks, layout.rank, layout.shard)
            saved = tuple(entry.pop(name, None) for name in ("ranks", "rank", "shard"))
            if saved != here:
                raise UsageError(
                    f"the optimizer state was saved by rank {saved[1]} of {saved[0]} with shards "
                    f"of {saved[2]}, this is rank {here[1]} of {here[0]} with {here[2]}; in the "
                    "old world call consolidated() and load what it returns"
                )
        for entry, unit in zip(states.values(), self._in_order(), strict=True):
            if "master" in entry:
                with torch.no_grad():
                    unit.master.copy_(entry.pop("master"))
        states = {index: entry for index, entry in states.items() if entry}
        self.inner.load_state_dict({"state": states, "param_groups": groups})
        self.param_groups, self.state = self.inner.param_groups, self.inner.state

    @torch.no_grad()
    def consolidated(self) -> dict[str, Any] | None:
        """The state of the unsharded optimizer, which any number of ranks can load.

        All ranks call it; the first one gets the state, in host memory, others None. Where shards
        are apart from the model, such as fp32 copies of half precision, `master` is their values.
        """
        mine = self.state_dict()
        found: dict[int, dict[str, Any]] = {}
        first = self.units[0].layout.rank == 0
        for index, unit in enumerate(self._in_order()):
            for name, value in mine["state"][index].items():
                if name in ("ranks", "rank", "shard"):
                    continue
                whole = self._whole(unit, value)
                if first:
                    for number, p in enumerate(unit.parameters):
                        part = whole[number] if isinstance(whole, list) else value
                        part = part.to("cpu", copy=True) if isinstance(part, Tensor) else part
                        found.setdefault(self._numbers[id(p)], {})[name] = part
        if not first:
            return None
        numbers: dict[int, list[int]] = {}
        for index, unit in enumerate(self._in_order()):
            numbers[index] = [self._numbers[id(p)] for p in unit.parameters]
        groups = [
            {**group, "params": sorted(n for index in group["params"] for n in numbers[index])}
            for group in mine["param_groups"]
        ]
        return {"state": dict(sorted(found.items())), "param_groups": groups}

    def _whole(self, unit: Unit, value: Any) -> Any:
        """Each parameter's part of a state that has an element for each of the shard's."""
        if not isinstance(value, Tensor) or value.shape != unit.master.shape:
            return None
        layout = unit.layout
        flat = value.new_zeros(layout.padded)
        layout.own(flat)[: value.numel()] = value
        layout.gather_(flat)
        return layout.views(flat)

    def _split(self, whole: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
        """This rank's entries from a consolidated state."""
        entries: dict[int, dict[str, Any]] = {}
        for index, unit in enumerate(self._in_order()):
            layout, entry = unit.layout, {}
            saved = [whole.get(self._numbers[id(p)], {}) for p in unit.parameters]
            for name, example in saved[0].items():
                shapes = [getattr(other.get(name), "shape", None) for other in saved]
                if shapes == layout.shapes and name != "step":
                    shard = torch.zeros(unit.master.shape, dtype=example.dtype)
                    for number, source, target in layout.pieces():
                        shard[target] = saved[number][name].reshape(-1)[source]
                    entry[name] = shard
                elif any(not _equal(other.get(name), example) for other in saved):
                    raise UsageError(
                        f"state {name!r} differs between parameters of one bucket; they were not "
                        "always stepped together, so no flat shard can continue them"
                    )
                else:
                    entry[name] = example
            entries[index] = entry | {
                "ranks": layout.ranks, "rank": layout.rank, "shard": layout.shard
            }  # fmt: skip
        return entries

    def _in_order(self) -> list[Unit]:
        """Units as the wrapped optimizer numbers them."""
        found = {id(unit.master): unit for unit in self.units}
        return [found[id(p)] for group in self.inner.param_groups for p in group["params"]]


def _equal(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b
