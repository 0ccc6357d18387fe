"""LoRA: train a product of two thin matrices beside each frozen weight. The adapter baseline.

Keeps    per linear A (r, in) and B (out, r), trained; x (shared with whatever else keeps it) and
         x A^T (n, r) for backward. The frozen weight keeps nothing.
Form     the dtype of the weight, or `dtype`; the base may be dense or packed.
Bytes    (in + out) * r trained elements; n * r activations beside x.
Source   Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen, LoRA, ICLR 2022; file format and
         defaults of the peft library. On packed weights: Dettmers, Pagnoni, Holtzman, Zettlemoyer,
         QLoRA, NeurIPS 2023.
Departs  on packed weights the base is rounded to affine groups instead of NF4 with nested scales.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.errors import UsageError
from holdfast.plan.method import Method
from holdfast.training.adapters.base import Adapter, attach


class LoRA(Adapter):
    """y = W x + b + (alpha / rank) B A x; B starts at zero, A as in `nn.Linear` (global generator).

    Args:
        rank: rows of A.
        alpha: scale times rank; None is `rank`, a scale of 1.
        dropout: on the input of A while training; keeps a second x for backward.
        dtype: of A and B; None is the weight's. With torch.float32 beside a bfloat16 base, A and B
            are master weights, cast where they are used, and activations stay bfloat16.

    Raises:
        UsageError: rank below 1, dropout outside [0, 1).
    """

    key = "lora"
    trainable = ("lora_A", "lora_B")

    def __init__(
        self,
        linear: nn.Module,
        *,
        rank: int = 8,
        alpha: float | None = None,
        dropout: float = 0.0,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(linear)
        if rank < 1:
            raise UsageError(f"rank={rank} trains nothing; use 1 or more, for example 8")
        if not 0 <= dropout < 1:
            raise UsageError(f"dropout={dropout} is outside [0, 1)")
        self.rank, self.dropout = rank, dropout
        self.scale = (rank if alpha is None else alpha) / rank
        like: dict[str, Any] = {"device": self.weight.device, "dtype": dtype or self.weight.dtype}
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, **like))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, **like))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        flat = x.reshape(-1, self.in_features)
        y = self.base_forward(flat)
        u = F.linear(F.dropout(flat, self.dropout, self.training), self.lora_A.to(x.dtype))
        # Into the fresh output of the base: no second (n, out) tensor ever lives. It is no view,
        # because autograd copies what flows back through a view that was written to.
        y = y.addmm_(u.to(y.dtype), self.lora_B.to(y.dtype).mT, alpha=self.scale)
        return y.view(*x.shape[:-1], self.out_features)

    def delta(self) -> Tensor:
        return self.scale * (self.lora_B.detach().float() @ self.lora_A.detach().float())

    @classmethod
    def to_file(cls, knobs: Mapping[str, Any]) -> dict[str, Any]:
        rank, alpha = knobs["rank"], knobs["alpha"]
        return {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": rank if alpha is None else alpha,
            "lora_dropout": knobs["dropout"],
            "init_lora_weights": True,
        }

    @classmethod
    def from_file(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        for key in ("use_dora", "rank_pattern", "alpha_pattern", "target_parameters", "lora_bias"):
            if config.get(key):
                raise UsageError(
                    f"adapter_config.json has {key}={config[key]!r}, which this LoRA does not do; "
                    "merge it with peft and load the merged model"
                )
        root = math.sqrt(config["r"]) if config.get("use_rslora") else 1.0
        return {
            "rank": config["r"],
            "alpha": config["lora_alpha"] * root,
            "dropout": config.get("lora_dropout", 0.0),
        }


ADAPTER = LoRA


def _apply(model: nn.Module, *, rank: int) -> nn.Module:
    return attach(model, "lora", rank=rank)


METHOD = Method(
    key="lora",
    slot="adapter",
    writes={("parameters", "extent"): "all; two thin matrices a linear train"},
    apply=_apply,
    knobs={"rank": (8, 16, 32, 64)},
)
