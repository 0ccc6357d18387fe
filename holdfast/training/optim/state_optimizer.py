"""StateOptimizer: a torch optimizer whose states are written in another form than the parameter.

A subclass says what it keeps for a parameter (`layout`) and how one parameter is updated
(`update`). From these follow lazy zero states, exact bytes, bitwise `state_dict` round trips, and
steps of one parameter from a post-accumulate-grad hook.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import increment_version

from holdfast.errors import UsageError

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def layout_bytes(layout: Layout) -> int:
    """Bytes of the tensors that a layout names."""
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in layout.values())


def number(value: float | Tensor) -> float:
    """A float or one-element tensor (a learning rate) as a float; 0 for a fake tensor, unread."""
    return 0.0 if isinstance(value, FakeTensor) else float(value)


def check_adam(
    lr: float | Tensor, betas: tuple[float, float], eps: float, weight_decay: float
) -> None:
    """Refuse settings that no Adam has.

    Raises:
        UsageError: a setting is out of range.
    """
    for name, value, ok, range_ in (
        ("lr", lr, number(lr) >= 0, ">= 0"),
        ("betas", betas, all(0 <= b < 1 for b in betas), "in [0, 1)"),
        ("eps", eps, eps > 0, "> 0"),
        ("weight_decay", weight_decay, weight_decay >= 0, ">= 0"),
    ):
        if not ok:
            raise UsageError(f"{name}={value} must be {range_}")


class StateOptimizer(torch.optim.Optimizer):
    """Base of optimizers that keep compressed states.

    `state[p]` holds `step`, a one-element fp32 tensor on the CPU, and the tensors of `layout`, made
    as zeros at the first step and never cast.
    """

    def layout(self, p: Tensor, group: dict[str, Any]) -> Layout:
        """Name -> (shape, dtype) of what is kept for `p`, without `step`."""
        raise NotImplementedError

    def update(self, p: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict) -> None:
        """Change contiguous `p` and `state` in place; `state["step"]` already counts this step."""
        raise NotImplementedError

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch.

        Raises:
            UsageError: a parameter is of a dtype other than float32, bfloat16 or float16.
        """
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            if p.dtype not in DTYPES:
                raise UsageError(
                    f"{type(self).__name__} was given a parameter of dtype {p.dtype}, it updates "
                    "float32, bfloat16 and float16; give such parameters to another optimizer"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; returns what `closure` returned.

        Raises:
            UsageError: a gradient is sparse, or a parameter lies on the meta device.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._step(p, group)
        return loss

    @torch.no_grad()
    def step_param(self, p: Tensor) -> None:
        """Update one parameter, for use in a post-accumulate-grad hook; no gradient, no change.

        Raises:
            UsageError: `p` is not one of this optimizer's parameters, or as in `step`.
        """
        groups = (g for g in self.param_groups if any(q is p for q in g["params"]))
        group = next(groups, None)
        if group is None:
            raise UsageError(
                f"a tensor of shape {tuple(p.shape)} is not a parameter of this optimizer; "
                "add it with add_param_group first"
            )
        # Schedulers ask whether a step came before theirs.
        self._opt_called = True
        if p.grad is not None:
            self._step(p, group)

    def _step(self, p: Tensor, group: dict[str, Any]) -> None:
        grad = p.grad
        assert grad is not None
        if grad.layout is not torch.strided:
            raise UsageError(
                f"{type(self).__name__} was given a sparse gradient for a parameter of shape "
                f"{tuple(p.shape)}; use dense gradients (for example Embedding(sparse=False))"
            )
        if p.device.type == "meta" and not isinstance(p, FakeTensor):
            raise UsageError(
                f"a parameter of shape {tuple(p.shape)} lies on the meta device and cannot be "
                "updated; move the model to a real device, or predict under FakeTensorMode"
            )
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            for name, (shape, dtype) in self.layout(p, group).items():
                state[name] = torch.zeros(shape, dtype=dtype, device=p.device)
        state["step"] += 1
        # Codes follow the order of memory, and kernels see it as one line.
        line = p.contiguous()
        self.update(line, grad.contiguous(), state, group)
        if line is not p:
            p.copy_(line)
        else:
            increment_version(p)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but codes and scales keep their dtype whatever the parameter's is.

        Raises:
            UsageError: the states are not of this optimizer with these settings.
        """
        super().load_state_dict({**state_dict, "state": {}})
        names = [i for group in state_dict["param_groups"] for i in group["params"]]
        mine = [(p, group) for group in self.param_groups for p in group["params"]]
        for name, (p, group) in zip(names, mine, strict=True):
            given = state_dict["state"].get(name)
            if given:
                self.state[p] = self._checked(p, group, given)

    def _checked(self, p: Tensor, group: dict[str, Any], given: dict) -> dict[str, Tensor]:
        layout = {"step": ((), torch.float32), **self.layout(p, group)}
        found = {name: (tuple(t.shape), t.dtype) for name, t in given.items()}
        if found != layout:
            raise UsageError(
                f"the loaded state of a parameter of shape {tuple(p.shape)} holds {found}, "
                f"{type(self).__name__} keeps {layout}; load a state written by the same optimizer "
                "with the same settings"
            )
        return {
            name: value.detach().clone()
            if name == "step"
            else value.detach().to(p.device, copy=True)
            for name, value in given.items()
        }
