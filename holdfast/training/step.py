"""One training step within a plan: what happens to blocks, gradients and the optimizer.

The same functions run for real and under the planner's fake trace, so that a prediction and a
measurement are of one program.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from holdfast import attach
from holdfast.training.loss import IGNORE


def recompute(block: nn.Module) -> attach.Handle:
    """Run `block` again in the backward pass instead of keeping what it saves."""
    return attach.wrap(block, _recomputed)


def _recomputed(forward, *args, **kwargs):
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


class StepInBackward(torch.optim.Optimizer):
    """Update each parameter as soon as its gradient exists, and free the gradient.

    Wraps any optimizer that treats parameters one by one. Excludes accumulation and clipping of
    the global norm, which need all gradients at once. Schedulers, `state_dict` and `param_groups`
    are those of the wrapped optimizer; `step` only counts.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.wrapped = optimizer
        self.defaults = optimizer.defaults
        self._handles = []
        for index, group in enumerate(optimizer.param_groups):
            for parameter in group["params"]:
                hook = self._consumer(index)
                self._handles.append(parameter.register_post_accumulate_grad_hook(hook))

    def _consumer(self, index: int):
        step_param = getattr(self.wrapped, "step_param", None)

        def consume(parameter: nn.Parameter) -> None:
            if step_param is not None:
                step_param(parameter)
            else:
                groups = self.wrapped.param_groups
                # Looked up now: load_state_dict replaces the groups.
                self.wrapped.param_groups = [{**groups[index], "params": [parameter]}]
                try:
                    self.wrapped.step()
                finally:
                    self.wrapped.param_groups = groups
            parameter.grad = None

        return consume

    @property
    def param_groups(self):
        return self.wrapped.param_groups

    @property
    def state(self):
        return self.wrapped.state

    def state_dict(self):
        return self.wrapped.state_dict()

    def load_state_dict(self, state_dict):
        self.wrapped.load_state_dict(state_dict)

    def step(self, closure=None):
        return None

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.wrapped.zero_grad(set_to_none=set_to_none)

    def register_step_pre_hook(self, hook):
        return self.wrapped.register_step_pre_hook(hook)

    def register_step_post_hook(self, hook):
        return self.wrapped.register_step_post_hook(hook)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __repr__(self) -> str:
        return f"StepInBackward({self.wrapped!r})"


def counted_tokens(batch: dict[str, Any]) -> int | None:
    """Label tokens that count in the loss; None where the batch has no token labels."""
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.dim() < 2:
        return None
    return int((labels[:, 1:] != IGNORE).sum())
