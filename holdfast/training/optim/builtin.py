"""torch's own optimizers as methods: the exact baselines that every plan may choose."""

from collections.abc import Iterable

import torch
from torch import nn

from holdfast.plan.method import Method


def _adamw(
    named: Iterable[tuple[str, nn.Parameter]], lr: float, *, weight_decay: float = 0.0, fused=True
) -> torch.optim.AdamW:
    # Fused needs no scratch and one pass; torch offers it for floating dtypes on CPU and CUDA.
    return torch.optim.AdamW(
        [p for _, p in named], lr=lr, weight_decay=weight_decay, fused=fused, foreach=False
    )


def _sgd(
    named: Iterable[tuple[str, nn.Parameter]], lr: float, *, weight_decay: float = 0.0, momentum=0.0
) -> torch.optim.SGD:
    return torch.optim.SGD(
        [p for _, p in named], lr=lr, weight_decay=weight_decay, momentum=momentum, fused=True
    )


ADAMW = Method(
    key="adamw",
    slot="optimizer",
    writes={},
    apply=_adamw,
    knobs={"fused": (True, False)},
    state_bytes=lambda shape, dtype, **knobs: 4 + 2 * torch.Size(shape).numel() * dtype.itemsize,
)
SGD = Method(
    key="sgd",
    slot="optimizer",
    writes={("optimizer", "extent"): "momentum, if any"},
    apply=_sgd,
    knobs={"momentum": (0.0, 0.9)},
    automatic=False,
    state_bytes=lambda shape, dtype, momentum=0.0: (
        torch.Size(shape).numel() * dtype.itemsize if momentum else 0
    ),
)
METHODS = (ADAMW, SGD)
