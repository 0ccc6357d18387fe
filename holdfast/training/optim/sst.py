"""SST (059): train in SVD form, all singular values always and a few sampled vectors in turn.

Keeps    per weight m x n, q = min(m, n): U (m x q), sigma (q), V (n x q) instead of the weight;
         gradients and optimizer states of r columns of U and V and of sigma alone.
Form     in the model's dtype; decompositions in fp32 at least.
Bytes    weights b*(q*(m + n) + q), where a dense weight takes b*m*n: twice as much if m = n. With
         AdamW, gradients and moments 3*b*(r*(m + n) + q) instead of 3*b*m*n. 8 for the step.
Source   Zhao, Zhang, Wang, Wang, Wang, Zhang, Cannistraci, "Sparse Spectral Training and Inference
         on Euclidean and Hyperbolic Neural Networks", 2024.
Departs  the moments of sigma are fresh at each swap too, because its order changes.

The gradients of active vectors leave out sigma ("enhanced"), so that directions of small singular
values learn too. At a swap and at a decomposition moments start anew: they are of other vectors,
or of the same with another sign.
"""

import copy
import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from holdfast.attach import Handle, Targets, features, find, linears, swap
from holdfast.errors import UsageError
from holdfast.plan.method import Method, Quality
from holdfast.training.adapters.base import Adapter, Attached, refuse_tied
from holdfast.training.saved.lean import autocast, first_order
from holdfast.training.step import StepInBackward

FACTORS = ("u", "v", "sigma", "u_rest", "v_rest")


class SpectralProduct(torch.autograd.Function):
    """x V diag(sigma) Uᵀ with rows of singular vectors; keeps x alone, like a linear."""

    @staticmethod
    def forward(ctx, x, u, v, sigma, u_rest, v_rest) -> Tensor:
        ctx.save_for_backward(x, u, v, sigma, u_rest, v_rest)
        active, rest = sigma.split([len(u), len(u_rest)])
        flat = x.reshape(-1, x.shape[-1])
        y = (flat @ v.mT).mul_(active) @ u
        y.addmm_((flat @ v_rest.mT).mul_(rest), u_rest)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @first_order
    def backward(ctx, gy: Tensor):
        x, u, v, sigma, u_rest, v_rest = ctx.saved_tensors
        active, rest = sigma.split([len(u), len(u_rest)])
        flat, g = x.reshape(-1, x.shape[-1]), gy.reshape(-1, gy.shape[-1])
        g_active, g_rest = g @ u.mT, g @ u_rest.mT
        h = flat @ v.mT
        gu, gv = h.mT @ g, g_active.mT @ flat
        gs = torch.cat([(h * g_active).sum(0), ((flat @ v_rest.mT).mul_(g_rest)).sum(0)])
        gx = None
        if ctx.needs_input_grad[0]:
            gx = g_active.mul_(active) @ v
            gx = gx.addmm_(g_rest.mul_(rest), v_rest).view(x.shape)
        return gx, gu, gv, gs, None, None


class SpectralLinear(Adapter):
    """A linear as U diag(sigma) Vᵀ whose `rank` active singular vectors and all values train.

    `u` (rank, out) and `v` (rank, in) are the active vectors, `u_rest` and `v_rest` the others,
    `sigma` the values of both in this order.

    Raises:
        UsageError: `rank` is not between 1 and the smaller side.
    """

    key = "sst"
    trainable = ("u", "v", "sigma")
    # Saved beside a frozen model it would be larger than the model: it is always merged.
    apart: ClassVar[bool] = False
    # What changes while training without a gradient of its own; checkpoints ask.
    trained_in_place = ("u_rest", "v_rest")
    u: Tensor
    v: Tensor
    sigma: Tensor
    u_rest: Tensor
    v_rest: Tensor
    steps: Tensor

    def __init__(self, linear: nn.Module, *, rank: int):
        super().__init__(linear)
        q = min(self.in_features, self.out_features)
        if not 1 <= rank <= q:
            raise UsageError(
                f"rank={rank}, but a linear {self.in_features} -> {self.out_features} has {q} "
                f"singular values; use 1 to {q}"
            )
        self.rank, weight = rank, self.weight.detach()
        self.register_parameter("weight", None)
        for name in FACTORS:
            n = {"u": rank, "v": rank, "sigma": q}.get(name, q - rank)
            side = () if name == "sigma" else (self._side(name),)
            self.register_parameter(
                name, nn.Parameter(weight.new_empty(n, *side), name in self.trainable)
            )
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=weight.device))
        self._write(weight.mT if self.transposed else weight)

    def _side(self, name: str) -> int:
        return self.out_features if name.startswith("u") else self.in_features

    @classmethod
    def from_linear(cls, linear: nn.Module, rank: int) -> "SpectralLinear":
        """The SVD form of an nn.Linear or Conv1D, which stays as it is."""
        return cls(linear, rank=rank)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        x, bias, *factors = autocast(x, self.bias, *(getattr(self, name) for name in FACTORS))
        u, v, sigma, u_rest, v_rest = factors
        y = SpectralProduct.apply(x, u, v, sigma, u_rest, v_rest)
        return y if bias is None else y + bias

    @torch.no_grad()
    def dense(self) -> Tensor:
        """The weight (out, in), fp32 at least."""
        u, v, sigma, u_rest, v_rest = (_wide(getattr(self, name)) for name in FACTORS)
        active, rest = sigma.split([len(u), len(u_rest)])
        return ((u * active[:, None]).mT @ v).addmm_((u_rest * rest[:, None]).mT, v_rest)

    @torch.no_grad()
    def _write(self, weight: Tensor) -> None:
        """Take over the SVD of a weight (out, in); the largest values are active."""
        u, sigma, vh = torch.linalg.svd(_wide(weight), full_matrices=False)
        for name, rows in (("u", u.mT), ("v", vh)):
            getattr(self, name).copy_(rows[: self.rank])
            getattr(self, f"{name}_rest").copy_(rows[self.rank :])
        self.sigma.copy_(sigma)

    def decompose_(self) -> None:
        """Make the vectors orthogonal again, by the SVD of what they are now; same output."""
        self._write(self.dense())

    @torch.no_grad()
    def normalise_(self) -> None:
        """After a step: no value below 0, active vectors of length 1."""
        self.sigma.clamp_(min=0)
        for vectors in (self.u, self.v):
            length = torch.linalg.vector_norm(vectors, dim=1, keepdim=True, dtype=torch.float32)
            vectors.div_(length.clamp_(min=torch.finfo(torch.float32).tiny).to(vectors.dtype))

    def between_steps_(self) -> None:
        """The most that happens between two steps; predictions trace it."""
        self.normalise_()
        self.decompose_()

    @torch.no_grad()
    def activate_(self, chosen: Tensor) -> None:
        """Make these vectors, indices (rank,) into `sigma`, the active ones; same output."""
        wanted = set(chosen.tolist())
        leaving = [i for i in range(self.rank) if i not in wanted]
        coming = sorted(i - self.rank for i in wanted if i >= self.rank)
        device = self.sigma.device
        out, into = (torch.tensor(i, dtype=torch.int64, device=device) for i in (leaving, coming))
        active, rest = self.sigma.split([self.rank, len(self.sigma) - self.rank])
        for front, back in ((self.u, self.u_rest), (self.v, self.v_rest), (active, rest)):
            held = back[into]
            back[into] = front[out]
            front[out] = held

    def _fill(self, linear: nn.Module) -> nn.Module:
        dense = self.dense().to(self.sigma.dtype)
        linear.weight = nn.Parameter(dense.mT.contiguous() if self.transposed else dense)
        linear.bias = self.bias  # type: ignore[assignment]
        return linear.train(self.training)

    def to_linear(self) -> nn.Module:
        """A new plain linear, of the class that it came from, that computes the same."""
        plain = copy.copy(self.replaced[0])
        plain._parameters = dict(plain._parameters)
        self._fill(plain)
        if self.bias is not None:
            plain.bias = nn.Parameter(self.bias.detach().clone())
        return plain

    def merged(self) -> nn.Module:
        """The linear that this layer replaced, with the weight of now; the layer is spent."""
        linear = self._fill(self.replaced[0])
        for name in FACTORS:
            self.register_parameter(name, None)
        return linear

    def restored(self) -> nn.Module:
        raise UsageError("SST replaced the weights, there is nothing to detach; use merge(model)")

    @classmethod
    def to_file(cls, knobs):
        raise UsageError(
            "SST changes whole weights and has no adapter file; merge(model) and save_pretrained"
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}"


class LorentzSpectralLinear(SpectralLinear):
    """The same between hyperboloids: points (..., 1 + d) whose first coordinate is time.

    The linear makes the space part of the output from the whole input, and time follows from it:
    t = sqrt(|space|² + radius²).
    """

    radius: float = 1.0

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., 1 + out), with -t² + |space|² = -radius²."""
        space = super().forward(x)
        time = (space.square().sum(-1, keepdim=True) + self.radius**2).sqrt()
        return torch.cat([time, space], -1)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def spectral(model: nn.Module, rank: int = 8, targets: Targets = "all-linear") -> nn.Module:
    """Put trainable linears in SVD form, in place; returns `model`.

    Everything else trains as it did. `holdfast.training.adapters.merge` makes it plain again.

    Raises:
        UsageError: a rank that a linear does not have, shared weights, or no linear that trains.
    """
    if "_holdfast_adapter" in model.__dict__:
        raise UsageError(f"{type(model).__name__} has an adapter already; merge(model) first")
    found = find(model, targets)
    chosen = {name: linear for name, linear in found.items() if linear.weight.requires_grad}
    if not chosen:
        raise UsageError(f"no linear of {type(model).__name__} named by {targets!r} trains")
    refuse_tied(model, chosen)
    names, handle = list(chosen), Handle()
    for name in names:
        layer = SpectralLinear.from_linear(linear := chosen.pop(name), rank)
        handle += swap(model, name, layer.train(linear.training))
        linear.register_parameter("weight", None)
        del linear
    model.__dict__["_holdfast_adapter"] = Attached(
        SpectralLinear, {"rank": rank}, names, handle, []
    )
    return model


def probabilities(sigma: Tensor) -> Tensor:
    """Of sampling each vector: half uniform, half by singular value; fp64 (q,)."""
    wide = sigma.detach().double().cpu()
    total, even = wide.sum(), torch.full_like(wide, 1 / len(wide))
    return 0.5 * even + 0.5 * (wide / total if total > 0 else even)


class SST(torch.optim.Optimizer):
    """Drives a model's `SpectralLinear`s: an optimizer around another one.

    `param_groups`, `state` and `state_dict` are those of the inner optimizer; what else there is to
    resume lies in the layers. Making it draws the first active vectors.

    Args:
        optimizer: any that treats parameters one by one, over the model's trainable parameters.
        interval: steps with the same active vectors; a round of as many intervals as it takes to
            have sampled all ends with a decomposition.
        warmup: steps after each swap over which all rates rise to what they are.
        sample: sigma (q,) -> the probability of each vector.

    Raises:
        UsageError: the model has no spectral layer, or the optimizer consumes gradients in
            backward, where no step has its own rate.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        interval: int = 200,
        warmup: int = 10,
        seed: int = 0,
        sample: Callable[[Tensor], Tensor] = probabilities,
    ):
        self.layers = [m for m in model.modules() if isinstance(m, SpectralLinear)]
        if not self.layers:
            raise UsageError(f"{type(model).__name__} has no SpectralLinear; use spectral(model)")
        if isinstance(optimizer, StepInBackward):
            raise UsageError(
                "SST warms up its rates at each step, which gradients consumed in backward do not "
                "have; plan with gradients: step"
            )
        if interval < 1 or warmup < 0:
            raise UsageError(f"interval={interval}, warmup={warmup} must be at least 1 and 0")
        self.wrapped, self.interval, self.warmup = optimizer, interval, warmup
        self.seed, self.sample = seed, sample
        self.defaults = optimizer.defaults
        self.steps = int(self.layers[0].steps)
        if self.steps == 0:
            self._swap()
        # As a hook, so that it is part of the step for whoever watches the optimizer.
        optimizer.register_step_post_hook(self._after)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the inner optimizer, and what SST does after it."""
        groups, done = self.wrapped.param_groups, self.steps % self.interval
        rates = [group["lr"] for group in groups]
        if done < self.warmup:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate * ((done + 1) / (self.warmup + 1))
        try:
            return self.wrapped.step(closure) if closure is not None else self.wrapped.step()
        finally:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate

    def _after(self, *_) -> None:
        self.steps += 1
        for layer in self.layers:
            layer.normalise_()
            layer.steps.fill_(self.steps)
        if self.steps % self.interval == 0:
            for layer in self.layers:
                if (self.steps // self.interval) % math.ceil(len(layer.sigma) / layer.rank) == 0:
                    layer.decompose_()
            self._swap()
            for layer in self.layers:
                for name in layer.trainable:
                    self.wrapped.state.pop(layer.get_parameter(name), None)

    def _swap(self) -> None:
        for index, layer in enumerate(self.layers):
            mixed = (self.seed * 1_000_003 + self.steps) * 1_000_003 + index
            generator = torch.Generator().manual_seed(mixed % 2**63)
            share = self.sample(layer.sigma)
            layer.activate_(torch.multinomial(share, layer.rank, generator=generator))

    @property
    def param_groups(self):  # type: ignore[override]
        return self.wrapped.param_groups

    @property
    def state(self):  # type: ignore[override]
        return self.wrapped.state

    def state_dict(self):
        return self.wrapped.state_dict()

    def load_state_dict(self, state_dict) -> None:
        """As in torch; load the model before, the step counter lies there."""
        self.wrapped.load_state_dict(state_dict)
        self.steps = int(self.layers[0].steps)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.wrapped.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.wrapped.add_param_group(param_group)

    def register_step_pre_hook(self, hook):
        return self.wrapped.register_step_pre_hook(hook)

    def register_step_post_hook(self, hook):
        return self.wrapped.register_step_post_hook(hook)


def _apply(model: nn.Module, *, rank: int, interval: int, warmup: int) -> nn.Module:
    return spectral(model, rank)


def _wrap(model: nn.Module, optimizer, *, rank: int, interval: int, warmup: int) -> SST:
    return SST(model, optimizer, interval, warmup)


def _applies(model: nn.Module, *, rank: int, **_: Any) -> str | None:
    found = linears(model)
    least = min((min(features(linear)) for linear in found.values()), default=0)
    if least < rank:
        return (
            f"a linear has {least} singular values, fewer than rank {rank}"
            if found
            else "no linear"
        )
    return None


METHOD = Method(
    key="sst",
    slot="adapter",
    writes={
        ("parameters", "form"): "singular values and vectors, up to twice the bytes",
        ("parameters", "extent"): "all; singular values and sampled vectors train",
    },
    apply=_apply,
    applies=_applies,
    wrap=_wrap,
    knobs={"rank": (8, 16, 32, 64), "interval": (200, 50), "warmup": (10, 0, 20)},
    quality=lambda rank=8, interval=200, warmup=10: Quality("lossy", 0.05, "holdfast check sst"),
    automatic=False,
    forbids={"backward": "SST warms up its rates at each step, which then has nothing to do"},
)
