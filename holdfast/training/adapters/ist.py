"""IST (025): in each step, train the adapters of a few layers, drawn by how much they matter.

Keeps    a score per layer; gradients, and what adapters save for backward, of the k drawn layers
         alone. Optimizer states of layers that rest stay as they are.
Form     scores fp32, on the host.
Bytes    4*L for the scores. What adapters save falls to k/L; the model's own activations are held
         from the lowest drawn layer upwards, so a step's peak differs from step to step. A plan
         predicts the highest, that of a step which draws the first layer, with the last ones.
Source   Yao, Gao, Li, Zhao, Wang, Li, Zhao, Xu, "Layer-wise Importance Matters: Less Memory for
         Better Performance in Parameter-efficient Fine-tuning of Large Language Models",
         EMNLP Findings 2024. No code was read; constants are chosen here.
Departs  nothing known.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.errors import UsageError
from holdfast.plan.method import Method, Quality
from holdfast.plan.models import loss_of
from holdfast.training.adapters.base import Adapter

_LAYER = re.compile(r"(?:^|(.*?)\.)(\d+)\.")


def adapter_layers(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The trainable parameters of `model` by layer: the name up to its first number.

    Raises:
        UsageError: nothing trains, or something that trains belongs to no numbered layer.
    """
    found: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            layer = _layer_of(name)
            if layer is None:
                raise UsageError(
                    f"{name} trains and has no layer index in its name; a schedule draws among the "
                    "adapters of numbered layers, so freeze it or leave it out of the targets"
                )
            found.setdefault(layer, []).append(parameter)
    if not found:
        raise UsageError(
            f"{type(model).__name__} has nothing to train; attach an adapter first, for example "
            "attach(model, 'lora')"
        )
    return found


def _layer_of(name: str) -> str | None:
    match = _LAYER.match(name)
    return match[0].rstrip(".") if match else None


class RandomSchedule:
    """Draws k layers with equal chances before each step; the others rest.

    Call `before_step` before the first forward pass of a step and `after_step` after the
    optimizer's: in between, parameters of resting layers need no gradient and have none, so that no
    optimizer moves them by momentum or decay.

    Args:
        adapters: a model with adapters of `holdfast.training.adapters` or of peft.
        k: layers that train in a step; None is a quarter of them, at least one.
        seed: of the draws.

    Raises:
        UsageError: k outside 1 to the number of layers, or adapters without a layer index.
    """

    def __init__(self, adapters: nn.Module, k: int | None = None, *, seed: int = 0):
        self.model = adapters
        self.layers = adapter_layers(adapters)
        count = len(self.layers)
        self.k = max(1, count // 4) if k is None else k
        if not 1 <= self.k <= count:
            raise UsageError(f"k={k} layers cannot be drawn from {count}; use 1 to {count}")
        self.scores = torch.zeros(count)
        self.step = 0
        self._random = torch.Generator().manual_seed(seed)

    def draw(self) -> list[int]:
        """k layers without replacement, the next always with probability softmax(scores)."""
        # The k largest of scores with Gumbel noise are such a draw.
        uniform = torch.rand(len(self.scores), generator=self._random).clamp(1e-12, 1 - 1e-7)
        noisy = self.scores - (-uniform.log()).log()
        return sorted(noisy.topk(self.k).indices.tolist())

    def before_step(self, loss: Callable[[], Tensor | float] | None = None) -> list[int]:
        """Draw, and let only these layers train; returns their positions in `layers`."""
        drawn = self.draw()
        for i, parameters in enumerate(self.layers.values()):
            for parameter in parameters:
                parameter.requires_grad_(i in drawn)
                if i not in drawn:
                    parameter.grad = None
        return drawn

    def after_step(self) -> None:
        """Every layer's parameters are trainable again, for checkpoints and whoever asks."""
        self.step += 1
        for parameters in self.layers.values():
            for parameter in parameters:
                parameter.requires_grad_(True)

    def state_dict(self) -> dict[str, Tensor]:
        return {
            "scores": self.scores.clone(),
            "step": torch.tensor(self.step),
            "generator": self._random.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.scores.copy_(state["scores"])
        self.step = int(state["step"])
        self._random.set_state(state["generator"].cpu())


class ImportanceSchedule(RandomSchedule):
    """Draws layers by scores that it learns while training.

    Every `every` steps it draws sets of k layers, takes the loss with the response of all adapters
    outside of a set scaled by `beta`, and moves the scores of a set's layers by
    `rate * (exp(-loss) - the mean of that over the sets)`.

    Args:
        every: steps between two measurements; the first one is after `every` steps.
        beta: what is left of a suppressed response.
        candidates: sets per measurement.
        rate: of the scores.

    Raises:
        UsageError: as `RandomSchedule`; every or candidates too small, beta outside [0, 1).
    """

    def __init__(
        self,
        adapters: nn.Module,
        k: int | None = None,
        every: int = 10,
        beta: float = 0.25,
        *,
        candidates: int = 3,
        rate: float = 10.0,
        seed: int = 0,
    ):
        super().__init__(adapters, k, seed=seed)
        for name, value, least in (("every", every, 1), ("candidates", candidates, 2)):
            if value < least:
                raise UsageError(f"{name}={value} measures nothing; use {least} or more")
        if not 0 <= beta < 1:
            raise UsageError(f"beta={beta} is outside [0, 1), so nothing would be suppressed")
        self.every, self.beta, self.candidates, self.rate = every, beta, candidates, rate

    def before_step(self, loss: Callable[[], Tensor | float] | None = None) -> list[int]:
        """Measure where it is time to, then draw.

        Args:
            loss: () -> the loss of this step's first batch; called without gradients.

        Raises:
            UsageError: it is time to measure and there is no `loss`.
        """
        if self.step and self.step % self.every == 0 and self.k < len(self.layers):
            if loss is None:
                raise UsageError(
                    f"step {self.step} measures importance; "
                    "pass before_step a function that returns the loss of a batch"
                )
            self.measure(loss)
        return super().before_step(loss)

    @torch.no_grad()
    def measure(self, loss: Callable[[], Tensor | float]) -> None:
        """Update the scores from the loss under each candidate set."""
        names = list(self.layers)
        sets = [self.draw() for _ in range(self.candidates)]
        training = [module for module in self.model.modules() if module.training]
        # Dropout would add its noise to the comparison, and draw numbers that training then lacks.
        self.model.eval()
        try:
            rewards = []
            for drawn in sets:
                outside = {name for i, name in enumerate(names) if i not in drawn}
                with suppressed(self.model, outside, self.beta):
                    rewards.append(torch.as_tensor(loss()).detach().float().neg().exp().cpu())
        finally:
            for module in training:
                module.training = True
        mean = torch.stack(rewards).mean()
        for drawn, reward in zip(sets, rewards, strict=True):
            self.scores[drawn] += self.rate * (reward - mean)


@contextmanager
def suppressed(model: nn.Module, layers: set[str], beta: float) -> Iterator[None]:
    """Scale what the adapters of some layers add to their linears' outputs by `beta`."""
    before: list[tuple[nn.Parameter, Tensor]] = []
    handles = []
    try:
        for name, module in model.named_modules():
            if _layer_of(f"{name}.") not in layers:
                continue
            if isinstance(module, Adapter):
                # Every adapter here is linear in the last of its trainable parameters.
                parameter = module.get_parameter(module.trainable[-1])
                before.append((parameter, parameter.data))
                parameter.data = parameter.data * beta
            elif isinstance(getattr(module, "base_layer", None), nn.Module):
                handles.append(module.register_forward_hook(_Blend(beta), with_kwargs=True))
        yield
    finally:
        for parameter, data in before:
            parameter.data = data
        for handle in handles:
            handle.remove()


class _Blend:
    """Pulls the output of a peft layer towards that of the layer which it adapts."""

    def __init__(self, beta: float):
        self.beta = beta

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        return torch.lerp(module.base_layer(*args, **kwargs), output, self.beta)


class ScheduledOptimizer(torch.optim.Optimizer):
    """Draws at a step's first forward pass in training, and wakes all layers after its step.

    Otherwise it is the wrapped optimizer. `state_dict` holds the schedule as one more entry, whose
    index is the number of parameters, so that a resumed run draws on.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, schedule: RandomSchedule):
        self.wrapped, self.schedule = optimizer, schedule
        self.defaults = optimizer.defaults
        self._entry = sum(len(group["params"]) for group in optimizer.param_groups)
        self._drawn = False
        self._handle = schedule.model.register_forward_pre_hook(self._first, with_kwargs=True)

    def _first(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self._drawn or not (model.training and torch.is_grad_enabled()):
            return
        self._drawn = True
        self.schedule.before_step(lambda: loss_of(model(*args, **kwargs)))

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        result = self.wrapped.step(closure)
        self.schedule.after_step()
        self._drawn = False
        return result

    @property
    def param_groups(self):
        return self.wrapped.param_groups

    @property
    def state(self):
        return self.wrapped.state

    def state_dict(self) -> dict[str, Any]:
        document = self.wrapped.state_dict()
        return {
            **document,
            "state": {**document["state"], self._entry: self.schedule.state_dict()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        states = dict(state_dict["state"])
        self.schedule.load_state_dict(states.pop(self._entry))
        self.wrapped.load_state_dict({**state_dict, "state": states})

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.wrapped.zero_grad(set_to_none=set_to_none)

    def register_step_pre_hook(self, hook):
        return self.wrapped.register_step_pre_hook(hook)

    def register_step_post_hook(self, hook):
        return self.wrapped.register_step_post_hook(hook)

    def remove(self) -> None:
        """Stop drawing; the wrapped optimizer goes on alone."""
        self._handle.remove()

    def __repr__(self) -> str:
        return f"ScheduledOptimizer({self.wrapped!r})"


def _applies(model: nn.Module, keep: float = 0.25) -> str | None:
    if "_holdfast_adapter" not in model.__dict__:
        return "it draws among the adapters of layers, and the plan has no adapter"
    try:
        adapter_layers(model)
    except UsageError as error:
        return str(error)
    return None


def _count(model: nn.Module, keep: float) -> int:
    return max(1, round(keep * len(adapter_layers(model))))


def _apply(model: nn.Module, *, keep: float) -> nn.Module:
    def busiest_step_() -> None:
        """Leave what trains in the step with most bytes: everything above the first layer is held
        for backward, and gradients of the last layers live longest."""
        groups = list(adapter_layers(model).values())
        k = _count(model, keep)
        for parameters in groups[1 : len(groups) - k + 1]:
            for parameter in parameters:
                parameter.requires_grad_(False)

    # Predictions call it before they trace a step.
    model.__dict__["busiest_step_"] = busiest_step_
    return model


def _wrap(model: nn.Module, optimizer: torch.optim.Optimizer, *, keep: float) -> ScheduledOptimizer:
    return ScheduledOptimizer(optimizer, ImportanceSchedule(model, _count(model, keep)))


METHOD = Method(
    key="ist",
    slot="saved",
    writes={("gradients", "extent"): "a few layers' adapters, drawn in each step"},
    apply=_apply,
    wrap=_wrap,
    knobs={"keep": (0.25, 0.5, 0.75)},
    quality=lambda keep=0.25: Quality("lossy", 0.0, "holdfast check ist"),
    applies=_applies,
    automatic=False,
)
