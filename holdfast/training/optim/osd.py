"""Online Subspace Descent (166): Adam in a subspace that follows the gradient by online PCA.

Keeps    per matrix m x n, s = min(m, n), l = max(m, n): a basis r x s, its own optimizer's state,
         two moments of l*r; vectors and matrices with s <= r: plain Adam.
Form     fp32, whatever the parameter's dtype is: in bf16 the basis would drift.
Bytes    4*(r*s + k*r*s + 2*l*r) + 4 for the step; k = 2 (AdamW on the basis), 1 (Lion), 0 (SGD).
Source   Liang, Liu, Chen, Liu, "Memory-Efficient LLM Training with Online Subspace Descent",
         NeurIPS 2024.
Departs  the basis takes no weight decay, which would shrink the update; a gradient that is zero or
         not finite leaves the basis as it is.

After the step that used it, the basis takes one step of its own down |GPᵀP - G|² at |G| = 1. The
gradient of that needs GPᵀ, which the update has made already, and PᵀGᵀG as (GPᵀ)ᵀG: nothing of
n x n or m x n appears. Only a matrix's first step decomposes a gradient.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

import holdfast.native.adamw4  # noqa: F401  registers torch.ops.holdfast.adamw_
from holdfast.errors import UsageError, unknown
from holdfast.plan.method import Method, Quality
from holdfast.training.optim.projector import Projector
from holdfast.training.optim.state_optimizer import (
    Layout,
    StateOptimizer,
    check_adam,
    layout_bytes,
    number,
)

# Optimizer of the basis -> what it keeps, and its betas.
OPTIMS: dict[str, tuple[tuple[str, ...], tuple[float, float]]] = {
    "adamw": (("basis_m", "basis_v"), (0.9, 0.999)),
    "lion": (("basis_m",), (0.9, 0.99)),
    "sgd": ((), (0.0, 0.0)),
}
_EPS = 1e-8


@dataclass(frozen=True)
class OnlineSubspace(Projector):
    """A projector whose basis lies in the state of a `StateOptimizer` and moves in place.

    Args:
        moments: name -> fp32 tensor like the basis, of the basis' own optimizer.
        optim: that optimizer: "adamw", "lion" or "sgd".
        lr: its rate.
        ortho: factor on |PPᵀ - I|², which keeps the rows apart.

    An optimizer keeps what `layout` names and, in each update, takes `of(state, ...)`, calls
    `start_` once, `down` and `up`, and then `follow_`.
    """

    moments: dict[str, Tensor]
    optim: str = "adamw"
    lr: float = 1 / 200
    ortho: float = 0.0

    @staticmethod
    def layout(shape: tuple[int, ...], rank: int, optim: str = "adamw") -> Layout:
        """Name -> (shape, dtype) of the basis and its optimizer's state for a matrix."""
        return {name: ((rank, min(shape)), torch.float32) for name in ("basis", *OPTIMS[optim][0])}

    @classmethod
    def of(
        cls,
        state: dict[str, Tensor],
        shape: tuple[int, ...],
        optim: str = "adamw",
        lr: float = 1 / 200,
        ortho: float = 0.0,
    ) -> "OnlineSubspace":
        """The subspace that a state holds for a matrix of this shape."""
        moments = {name: state[name] for name in OPTIMS[optim][0]}
        return cls(state["basis"], shape[0] >= shape[1], moments, optim, lr, ortho)

    def start_(self, g: Tensor) -> None:
        """Take the leading singular subspace of g (m, n), fp32."""
        self.basis.copy_(Projector.fit(g, len(self.basis)).basis)

    def follow_(self, g: Tensor, low: Tensor, step: int) -> None:
        """Move the basis by one step of its optimizer.

        Args:
            g: (m, n) fp32; low: `down(g)`.
            step: counts from 1.
        """
        if not self.right:
            g, low = g.mT, low.mT
        gradient, seen = pca_gradient(g, low, self.basis, self.ortho)
        # Numbers on the device, so that nothing waits for them: 0 leaves everything as it is.
        (b1, b2), rate = OPTIMS[self.optim][1], self.lr * seen
        if self.optim == "adamw":
            m, v = self.moments["basis_m"], self.moments["basis_v"]
            m.lerp_(gradient, (1 - b1) * seen)
            v.lerp_(gradient.square(), (1 - b2) * seen)
            c1, c2 = 1 - b1 ** max(step, 1), 1 - b2 ** max(step, 1)
            move = m / v.sqrt().div_(math.sqrt(c2)).add_(_EPS).mul_(c1)
        elif self.optim == "lion":
            m = self.moments["basis_m"]
            move = m.lerp(gradient, 1 - b1).sign_()
            m.lerp_(gradient, (1 - b2) * seen)
        else:
            move = gradient
        self.basis.sub_(move.mul_(rate))


def pca_gradient(
    g: Tensor, low: Tensor, basis: Tensor, ortho: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Gradient of |ĜPᵀP - Ĝ|² + ortho*|PPᵀ - I|² by P, where Ĝ = g / |g|.

    Args:
        g: (l, s) fp32; low: g Pᵀ (l, r); basis: P (r, s).

    Returns:
        (r, s), and 1.0, or zeros and 0.0 where |g| is zero or not finite, as a 0-d tensor.
    """
    norm = torch.linalg.vector_norm(g)
    seen = (norm > 0) & norm.isfinite()
    norm = torch.where(seen, norm, 1.0)
    unit = low / norm
    cross = (unit.mT @ g).div_(norm)
    gram = basis @ basis.mT
    gradient = (unit.mT @ unit) @ basis
    gradient.addmm_(gram, cross).sub_(cross, alpha=2).mul_(2)
    if ortho:
        gradient.addmm_(gram, basis, alpha=4 * ortho).sub_(basis, alpha=4 * ortho)
    return torch.where(seen, gradient, 0.0), seen.to(g.dtype)


def pca_gradient_ref(
    g: Tensor, low: Tensor, basis: Tensor, ortho: float = 0.0
) -> tuple[Tensor, Tensor]:
    """`pca_gradient` by autograd, through the (s, s) projector."""
    with torch.enable_grad():
        p, unit = basis.detach().requires_grad_(), g / g.norm()
        eye = torch.eye(len(p), dtype=p.dtype)
        loss = (unit @ (p.mT @ p) - unit).square().sum() + ortho * (p @ p.mT - eye).square().sum()
        return torch.autograd.grad(loss, p)[0], g.new_ones(())


class OSDAdamW(StateOptimizer):
    """AdamW whose moments and update of a matrix live in an online subspace of rank `rank`.

    Every argument but `params` can also be set per group; a group with `rank=None` is plain AdamW.

    Args:
        optim, subspace_lr, ortho: of the basis, see `OnlineSubspace`; its rate is multiplied by
            what a schedule has made of `lr` since the group was added.
        scale: factor on the projected update; weight decay acts on the whole weight.

    Raises:
        UsageError: a setting is out of range, or a parameter's dtype is not supported.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-2,
        rank: int | None = 128,
        optim: str = "adamw",
        subspace_lr: float = 1 / 200,
        ortho: float = 0.0,
        scale: float = 0.25,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        defaults: dict[str, Any] = {"lr": lr, "rank": rank, "optim": optim}
        defaults |= {"subspace_lr": subspace_lr, "ortho": ortho, "scale": scale}
        defaults |= {"betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        group = {**self.defaults, **param_group}
        check_adam(group["lr"], group["betas"], group["eps"], group["weight_decay"])
        for name, ok, range_ in (
            ("rank", group["rank"] is None or group["rank"] >= 1, "a positive integer or None"),
            ("subspace_lr", group["subspace_lr"] >= 0, ">= 0"),
            ("ortho", group["ortho"] >= 0, ">= 0"),
        ):
            if not ok:
                raise UsageError(f"{name}={group[name]} must be {range_}")
        if group["optim"] not in OPTIMS:
            raise unknown("optimizer of the basis", group["optim"], OPTIMS)
        param_group.setdefault("first_lr", number(group["lr"]))
        super().add_param_group(param_group)

    def layout(self, p: Tensor, group: dict[str, Any]) -> Layout:
        return layout(tuple(p.shape), group["rank"], group["optim"])

    def update(self, p: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict) -> None:
        lr, step = number(group["lr"]), state["step"]
        moments, hyper = (state["exp_avg"], state["exp_avg_sq"]), (*group["betas"], group["eps"])
        decay = group["weight_decay"]
        if "basis" not in state:
            torch.ops.holdfast.adamw_(p, grad, *moments, step, lr, *hyper, decay)
            return
        # A group that was added at rate 0 has no share of it to follow.
        share = lr / group["first_lr"] if group["first_lr"] else 1.0
        rate = group["subspace_lr"] * share
        shape = tuple(grad.shape)
        space = OnlineSubspace.of(state, shape, group["optim"], rate, group["ortho"])
        grad = grad.float()
        # A prediction cannot read the step and takes the larger one, the first.
        if isinstance(grad, FakeTensor) or step == 1:
            space.start_(grad)
        low = space.down(grad)
        change = torch.zeros_like(low)
        torch.ops.holdfast.adamw_(change, low, *moments, step, lr * group["scale"], *hyper, 0.0)
        p.mul_(1 - lr * decay).add_(space.up(change).to(p.dtype))
        space.follow_(grad, low, int(number(step)))


def projected(shape: tuple[int, ...], rank: int | None) -> bool:
    """Whether a parameter of this shape gets a subspace; others take plain Adam."""
    return rank is not None and len(shape) == 2 and min(shape) > rank


def layout(shape: tuple[int, ...], rank: int | None, optim: str = "adamw") -> Layout:
    """Name -> (shape, dtype) of what OSDAdamW keeps for a tensor, without the step."""
    if rank is None or not projected(shape, rank):
        return {name: (shape, torch.float32) for name in ("exp_avg", "exp_avg_sq")}
    low = (shape[0], rank) if shape[0] >= shape[1] else (rank, shape[1])
    moments: Layout = {name: (low, torch.float32) for name in ("exp_avg", "exp_avg_sq")}
    return moments | OnlineSubspace.layout(shape, rank, optim)


def state_bytes(shape: tuple[int, ...], dtype: torch.dtype, rank: int = 128, **_: Any) -> int:
    """Exact bytes kept for a parameter between steps; its dtype does not matter."""
    return 4 + layout_bytes(layout(tuple(shape), rank))


METHOD = Method(
    key="osd",
    slot="optimizer",
    writes={("optimizer", "extent"): "two moments in a subspace of each matrix, which moves too"},
    apply=lambda named, lr, rank=128, weight_decay=0.0: OSDAdamW(
        [p for _, p in named], lr, rank=rank, weight_decay=weight_decay
    ),
    knobs={"rank": (128, 256, 64, 16)},
    quality=lambda rank=128: Quality("lossy", 0.05, "holdfast check osd"),
    automatic=False,
    state_bytes=state_bytes,
)
