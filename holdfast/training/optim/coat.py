"""COAT (027): FP8 optimizer states with an expanded range, FP8 saved activations.

Keeps    m and v in blocks of `block`; for activations see `training.saved.coat_activations`.
Form     E4M3 of 448 * (|x| / max)^k, where k, a multiple of 1/16 per moment and block, stretches
         the magnitudes of the block over the range of E4M3; the largest magnitude, and k.
Bytes    2 * (N + 5*ceil(N/block)) + 4 for the step: 2.08*N at block 128, instead of 8*N.
Source   Xi, Cai, Zhu, Lu, Keutzer, Chen, Han, COAT: Compressing Optimizer States and Activation for
         Memory-Efficient FP8 Training, ICLR 2025.
Departs  the paper's three fp32 numbers per block, its center c, its scale s and k, are two: c
         cancels in the round trip, and max gives s; k needs a byte. The largest magnitude of a
         block is decoded exactly. k is at most 16, so that a constant block has one.

A gradient with entries that are not finite, or whose squares are not, is refused before anything is
written: it would make a whole block unreadable.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from holdfast.errors import UsageError
from holdfast.native.coat import BLOCKS, decode
from holdfast.plan.method import Method, Quality
from holdfast.training.optim.state_optimizer import (
    Layout,
    StateOptimizer,
    check_adam,
    layout_bytes,
    number,
)
from holdfast.training.saved.coat_activations import ACTIVATIONS, coat_activations

__all__ = ["METHODS", "CoatAdamW", "coat_activations", "state_bytes"]

_STATES = ("m_code", "m_scale", "m_power", "v_code", "v_scale", "v_power")


class CoatAdamW(StateOptimizer):
    """AdamW on FP8 states with dynamic range expansion.

    Args:
        lr: a float or a one-element tensor.
        block: elements that share a largest magnitude and a power: 32, 64, 128 or 256.

    Raises:
        UsageError: a setting is out of range, a parameter's dtype is not supported; in a step, a
            gradient is not finite: no parameter and no state has changed then.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        block: int = 128,
    ):
        check_adam(lr, betas, eps, weight_decay)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "block": block})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        block = param_group.get("block", self.defaults["block"])
        if block not in BLOCKS:
            raise UsageError(f"block={block!r}; expected one of {BLOCKS}")
        super().add_param_group(param_group)

    def layout(self, p: Tensor, group: dict[str, Any]) -> Layout:
        return layout(tuple(p.shape), group["block"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """As in torch.

        Raises:
            UsageError: a gradient is not finite (nothing has changed), or as in `StateOptimizer`.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        _require_finite(p for group in self.param_groups for p in group["params"])
        super().step()
        return loss

    def step_param(self, p: Tensor) -> None:
        """As in `StateOptimizer`; refuses a gradient that is not finite."""
        _require_finite([p])
        super().step_param(p)

    def update(self, p: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict) -> None:
        states = (state[name] for name in _STATES)
        torch.ops.holdfast.coat_(
            p, grad, *states, group["block"], state["step"], number(group["lr"]),
            *group["betas"], group["eps"], group["weight_decay"],
        )  # fmt: skip

    def moments(self, p: Tensor) -> tuple[Tensor, Tensor]:
        """The two moments kept for `p`, decoded: both in the shape of `p`, fp32."""
        state = self.state[p]
        group = next(g for g in self.param_groups if any(q is p for q in g["params"]))
        m, v = (
            decode(state[f"{x}_code"], state[f"{x}_scale"], state[f"{x}_power"], group["block"])
            for x in "mv"
        )
        return m.view(p.shape), v.view(p.shape)


def _require_finite(params: Iterable[Tensor]) -> None:
    grads = [p.grad for p in params if p.grad is not None]
    # Sparse and meta gradients are refused later, each in its own words.
    dense = [g for g in grads if g.layout is torch.strided and g.numel() and not g.is_meta]
    by_device: dict[torch.device, list[Tensor]] = {}
    for g in dense:
        by_device.setdefault(g.device, []).append(g)
    for device, found in by_device.items():
        # Read once, so that a GPU waits once.
        finite = torch.ones((), dtype=torch.bool, device=device)
        for g in found:
            finite.logical_and_(_is_finite(g))
        if isinstance(finite, FakeTensor) or finite:
            continue
        wrong = [g for g in found if not _is_finite(g)]
        raise UsageError(
            f"{len(wrong)} gradient(s) hold NaN or infinite entries, or squares that are infinite, "
            f"the first of shape {tuple(wrong[0].shape)}; parameters and states were left as they "
            "are: skip this step, or lower the rate or the loss scale"
        )


def _is_finite(g: Tensor) -> Tensor:
    # NaN wins in aminmax, so two numbers tell everything; isfinite would take a copy.
    return torch.stack(torch.aminmax(g)).float().square().isfinite().all()


def layout(shape: tuple[int, ...], block: int = 128) -> Layout:
    """Name -> (shape, dtype) of what CoatAdamW keeps for a tensor, without the step."""
    n = torch.Size(shape).numel()
    blocks = -(-n // block)
    kept: Layout = {}
    for moment in "mv":
        kept[f"{moment}_code"] = ((n,), torch.uint8)
        kept[f"{moment}_scale"] = ((blocks,), torch.float32)
        kept[f"{moment}_power"] = ((blocks,), torch.uint8)
    return kept


def state_bytes(shape: tuple[int, ...], dtype: torch.dtype, block: int = 128) -> int:
    """Exact bytes kept for a parameter between steps; its dtype does not matter."""
    return 4 + layout_bytes(layout(tuple(shape), block))


OPTIMIZER = Method(
    key="coat",
    slot="optimizer",
    writes={("optimizer", "form"): "FP8 codes with expanded range"},
    apply=lambda named, lr, weight_decay=0.0, block=128: CoatAdamW(
        [p for _, p in named], lr, weight_decay=weight_decay, block=block
    ),
    knobs={"block": (128, 64, 256)},
    quality=lambda block=128: Quality("lossy", 0.005, "holdfast check coat --full"),
    state_bytes=state_bytes,
    automatic=False,
)
METHODS = (OPTIMIZER, ACTIVATIONS)
