"""8-bit AdamW: two moments of one byte per parameter each, the customary compressed baseline.

Keeps    m and v in blocks of 256.
Form     m: codes of a signed dynamic-exponent map; v: of an unsigned one; a scale per block.
         Tensors of fewer than `min_numel` elements keep both moments in fp32.
Bytes    2*N + 8*ceil(N/256) + 4 for the step: about 2.03*N instead of 8*N.
Source   Dettmers, Lewis, Shleifer, Zettlemoyer, 8-bit Optimizers via Block-wise Quantization,
         ICLR 2022.
Departs  a second moment that is not zero is never written as zero: its smallest level holds all
         that lies below.

A NaN or infinite gradient spreads to the 256 elements of its block.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from holdfast.native.adamw8 import BLOCK, SIGNED, UNSIGNED
from holdfast.plan.method import Method, Quality
from holdfast.training.optim.state_optimizer import (
    Layout,
    StateOptimizer,
    check_adam,
    layout_bytes,
    number,
)


class AdamW8(StateOptimizer):
    """AdamW on 8-bit states.

    Args:
        lr: a float or a one-element tensor.
        min_numel: tensors with fewer elements keep fp32 moments.

    Raises:
        UsageError: a setting is out of range, or a parameter's dtype is not supported.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        min_numel: int = 4097,
    ):
        check_adam(lr, betas, eps, weight_decay)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "min_numel": min_numel})

    def layout(self, p: Tensor, group: dict[str, Any]) -> Layout:
        return layout(tuple(p.shape), group["min_numel"])

    def update(self, p: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict) -> None:
        b1, b2 = group["betas"]
        hyper = (state["step"], number(group["lr"]), b1, b2, group["eps"], group["weight_decay"])
        if "exp_avg" in state:
            torch.ops.holdfast.adamw_(p, grad, state["exp_avg"], state["exp_avg_sq"], *hyper)
            return
        torch.ops.holdfast.adamw8_(
            p, grad, state["m_code"], state["m_scale"], state["v_code"], state["v_scale"], *hyper
        )

    def moments(self, p: Tensor) -> tuple[Tensor, Tensor]:
        """The two moments kept for `p`, decoded: both in the shape of `p`, fp32."""
        state = self.state[p]
        if "exp_avg" in state:
            return state["exp_avg"], state["exp_avg_sq"]
        m = SIGNED.decode(state["m_code"], state["m_scale"])
        v = UNSIGNED.decode(state["v_code"], state["v_scale"])
        return m.view(p.shape), v.view(p.shape)


def layout(shape: tuple[int, ...], min_numel: int = 4097) -> Layout:
    """Name -> (shape, dtype) of what AdamW8 keeps for a tensor, without the step."""
    n = torch.Size(shape).numel()
    if n < min_numel:
        return {"exp_avg": (shape, torch.float32), "exp_avg_sq": (shape, torch.float32)}
    codes, scales = ((n,), torch.uint8), ((-(-n // BLOCK),), torch.float32)
    return {"m_code": codes, "m_scale": scales, "v_code": codes, "v_scale": scales}


def state_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Exact bytes kept for a parameter between steps; its dtype does not matter."""
    return 4 + layout_bytes(layout(tuple(shape)))


METHOD = Method(
    key="adamw8",
    slot="optimizer",
    writes={("optimizer", "form"): "8-bit codes with scales"},
    apply=lambda named, lr, weight_decay=0.0: AdamW8(
        [p for _, p in named], lr, weight_decay=weight_decay
    ),
    quality=lambda: Quality("lossy", 0.006, "holdfast check coat --full"),
    state_bytes=state_bytes,
    automatic=False,
)
