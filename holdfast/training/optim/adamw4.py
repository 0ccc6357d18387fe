"""4-bit optimizer states (192): AdamW whose two moments take half a byte per parameter each.

Keeps    m in blocks of 128; v under rank-1 scales, in blocks of 128, or factored.
Form     m: a signed dynamic-exponent code; v: a linear code without zero; two codes per byte.
         Tensors of fewer than `min_numel` elements keep both moments in fp32.
Bytes    64*ceil(N/128) per code tensor, 4*ceil(N/128) per block scales, 4*sum(axes) for rank-1,
         4 for the step: about 1.03*N instead of 8*N.
Source   Li, Chen, Zhu, Memory Efficient Optimizers with 4-bit States, NeurIPS 2023.
Departs  axes of length 1 do not count; v of a tensor whose rank-1 scales would outweigh N/8 bytes
         (thin matrices) and of vectors uses blocks; "factor" sees a tensor as (first axis, rest).

A NaN or infinite gradient spreads as in torch's AdamW: in m and in block-scaled v to the 128
elements of its block, under rank-1 scales only to its own element.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from holdfast.errors import unknown
from holdfast.native.adamw4 import BLOCK, SECOND, axes_of, decode, factor_axes, scale_of
from holdfast.plan.method import Method, Quality
from holdfast.training.optim.state_optimizer import (
    Layout,
    StateOptimizer,
    check_adam,
    layout_bytes,
    number,
)


class AdamW4(StateOptimizer):
    """AdamW on 4-bit states.

    Args:
        lr: a float or a one-element tensor.
        second: how v is scaled: "rank1" (minimum of the maxima along each axis), "block" (absolute
            maximum of 128 elements; fastest), "factor" (kept as row and column means, no codes).
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
        second: str = "rank1",
        min_numel: int = 4097,
    ):
        check_adam(lr, betas, eps, weight_decay)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "second": second, "min_numel": min_numel})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        second = param_group.get("second", self.defaults["second"])
        if second not in SECOND:
            raise unknown("form of the second moment", second, SECOND)
        super().add_param_group(param_group)

    def layout(self, p: Tensor, group: dict[str, Any]) -> Layout:
        return layout(tuple(p.shape), group["second"], group["min_numel"])

    def update(self, p: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict) -> None:
        b1, b2 = group["betas"]
        hyper = (state["step"], number(group["lr"]), b1, b2, group["eps"], group["weight_decay"])
        if "exp_avg" in state:
            torch.ops.holdfast.adamw_(p, grad, state["exp_avg"], state["exp_avg_sq"], *hyper)
            return
        second = form_of(tuple(p.shape), group["second"])
        torch.ops.holdfast.adamw4_(
            p, grad, state["m_code"], state["m_scale"], state.get("v_code"), state["v_scale"],
            second, *hyper,
        )  # fmt: skip

    def moments(self, p: Tensor) -> tuple[Tensor, Tensor]:
        """The two moments kept for `p`, decoded: both in the shape of `p`, fp32."""
        state = self.state[p]
        if "exp_avg" in state:
            return state["exp_avg"], state["exp_avg_sq"]
        n, shape = p.numel(), tuple(p.shape)
        group = next(g for g in self.param_groups if any(q is p for q in g["params"]))
        second = form_of(shape, group["second"])
        m = decode(state["m_code"], "dynamic4") * state["m_scale"][:, None]
        if second == "factor":
            row, column = state["v_scale"].split(factor_axes(shape))
            v = torch.outer(row, column / row.mean().clamp_min(torch.finfo(row.dtype).tiny))
            return m.flatten()[:n].view(shape), v.view(shape)
        scale = scale_of(state["v_scale"], axes_of(shape), second, 0, n)
        v = decode(state["v_code"], "linear4").flatten()[:n] * scale
        return m.flatten()[:n].view(shape), v.view(shape)


def form_of(shape: tuple[int, ...], second: str) -> str:
    """The form of v that a tensor of this shape gets where `second` is asked."""
    axes, n = axes_of(shape), math.prod(shape)
    thin = 32 * sum(axes) > n or not 2 <= len(axes) <= 8
    return "block" if thin else second


def layout(shape: tuple[int, ...], second: str = "rank1", min_numel: int = 4097) -> Layout:
    """Name -> (shape, dtype) of what AdamW4 keeps for a tensor, without the step."""
    n = math.prod(shape)
    if n < min_numel:
        return {"exp_avg": (shape, torch.float32), "exp_avg_sq": (shape, torch.float32)}
    blocks = -(-n // BLOCK)
    codes = ((blocks, BLOCK // 2), torch.uint8)
    form = form_of(shape, second)
    if form == "block":
        scales = blocks
    else:
        scales = sum(axes_of(shape) if form == "rank1" else factor_axes(shape))
    kept: Layout = {"m_code": codes, "m_scale": ((blocks,), torch.float32)}
    if form != "factor":
        kept["v_code"] = codes
    return {**kept, "v_scale": ((scales,), torch.float32)}


def state_bytes(shape: tuple[int, ...], dtype: torch.dtype, second: str = "rank1") -> int:
    """Exact bytes kept for a parameter between steps; its dtype does not matter."""
    return 4 + layout_bytes(layout(tuple(shape), second))


METHOD = Method(
    key="adamw4",
    slot="optimizer",
    writes={("optimizer", "form"): "4-bit codes with scales"},
    apply=lambda named, lr, weight_decay=0.0, second="rank1": AdamW4(
        [p for _, p in named], lr, weight_decay=weight_decay, second=second
    ),
    knobs={"second": ("rank1", "block", "factor")},
    quality=lambda second="rank1": Quality("lossy", 0.01, "holdfast check adamw4 --full"),
    state_bytes=state_bytes,
)
