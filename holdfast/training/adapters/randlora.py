"""RandLoRA (066): updates of full rank from fixed random bases, training only diagonals.

Keeps    per linear, with q = min(in, out), M = max(in, out) and N = ceil(q / r) bases: the
         diagonals Lambda (r, N) and Gamma (N, q), trained; per model one pair of random bases
         A (r, q) and B (M, N, r) for its largest linear, which a seed regenerates. For backward
         the narrower one of the input and its projection, n * q elements.
Form     diagonals in the dtype of the weight, or `dtype`; bases in bfloat16, like peft.
Bytes    N * (r + q) trained elements per linear: a smaller rank trains more. Bases, once:
         2 * (r * q + M * N * r) bytes.
Source   Albert, Zhang, Saratchandran, Rodriguez-Opazo, van den Hengel, Abbasnejad, RandLoRA:
         full-rank parameter-efficient fine-tuning of large models, ICLR 2025; the peft library for
         the order of slices, the random stream and the file format.
Departs  only dense bases; the sparse and very sparse ones are refused when a file asks for them.
         peft sizes the bases by the largest input times the largest output of different linears;
         here the part of those that a linear can reach is kept.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from holdfast.attach import features
from holdfast.errors import UsageError
from holdfast.plan.method import Method
from holdfast.training.adapters.base import Adapter, attach, layers


class Bases(nn.Module):
    """The random pair of one model: A (r, q) and B (M, N, r), of no state dict.

    Args:
        shapes: (in, out) of the linears that use it.
        rank: r.
        seed: of the CPU generator that draws both.
        device: where they lie; on `meta` nothing is drawn.
    """

    A: Tensor
    B: Tensor

    def __init__(self, shapes: list[tuple[int, int]], rank: int, seed: int, device: torch.device):
        super().__init__()
        if rank < 1:
            raise UsageError(f"rank={rank} has no bases; use 1 or more, for example 32")
        self.rank, self.seed = rank, seed
        q = max(min(shape) for shape in shapes)
        wide = max(max(shape) for shape in shapes)
        sides = [max(side) for side in zip(*shapes, strict=True)]
        # The whole of what peft draws, so that one seed means the same bases in both.
        a, b = _draw(rank, min(sides), max(sides), seed, device)
        self.register_buffer("A", a[:, :q].clone(), persistent=False)
        self.register_buffer("B", b[:wide, : -(-q // rank)].clone(), persistent=False)

    def slices(self, inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
        """A (r, q) and B (M, N*r) of one linear, views where the slice allows it."""
        q, wide = min(inputs, outputs), max(inputs, outputs)
        return self.A[:, :q], self.B[:wide, : -(-q // self.rank)].flatten(1)


def _draw(rank: int, q: int, wide: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    if device.type == "meta":
        like: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
        return torch.empty(rank, q, **like), torch.empty(wide, -(-q // rank), rank, **like)
    generator = torch.Generator().manual_seed(seed)

    def kaiming(*shape: int) -> Tensor:
        drawn = torch.empty(shape, dtype=torch.bfloat16, device="cpu")
        return nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)

    a = kaiming(rank, 1, q)
    b = torch.cat([kaiming(wide, 1, rank) for _ in range(-(-q // rank))], 1)
    return (a / a.std())[:, 0].to(device), (b / b.std()).to(device)


def _scaled(a: Tensor, lam: Tensor, gamma: Tensor) -> Tensor:
    """Lambda A Gamma: a (r, q), lam (r, N), gamma (N, q) -> (r*N, q)."""
    return (lam[:, :, None] * gamma * a[:, None]).flatten(0, 1)


class _Update(torch.autograd.Function):
    """x (n, in) -> (n, out), the update without its scale; keeps (n, q) and the diagonals."""

    @staticmethod
    def forward(ctx, x, lam, gamma, bases, inputs, outputs):
        a, b = (t.to(x.dtype) for t in bases.slices(inputs, outputs))
        u = _scaled(a, lam, gamma).to(x.dtype)
        # The diagonals sit on the short side, so a wide input meets B first.
        first, second = (u.mT, b.mT) if inputs <= outputs else (b, u)
        v = x @ first
        ctx.save_for_backward(x if inputs <= outputs else v, lam, gamma)
        ctx.bases, ctx.features = bases, (inputs, outputs)
        return v @ second

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        kept, lam, gamma = ctx.saved_tensors
        inputs, outputs = ctx.features
        a, b = (t.to(g.dtype) for t in ctx.bases.slices(inputs, outputs))
        u = _scaled(a, lam, gamma).to(g.dtype)
        gx = glam = ggamma = None
        if inputs <= outputs:
            gv = g @ b
            gu = gv.mT @ kept
            gx = gv @ u if ctx.needs_input_grad[0] else None
        else:
            gu = kept.mT @ g
            gx = (g @ u.mT) @ b.mT if ctx.needs_input_grad[0] else None
        del u
        # Both gradients need dU * A, (r, N, q).
        ga = gu.view(a.shape[0], -1, a.shape[1]).mul_(a[:, None]).to(lam.dtype)
        glam = torch.einsum("ijq,jq->ij", ga, gamma)
        ggamma = torch.einsum("ijq,ij->jq", ga, lam)
        return gx, glam, ggamma, None, None, None


class RandLoRA(Adapter):
    """y = W x + b + (alpha / rank) sum_j B_j Lambda_j A Gamma_j x; Lambda starts at zero.

    Args:
        rank: r; the number of bases is ceil(min(in, out) / rank).
        alpha: scale times rank; None is 20 * rank.
        dropout: on the input of the update while training.
        seed: of the bases.
        dtype: of the diagonals; None is the weight's.
        bases: made by `attach`, shared by all linears of the model.

    Raises:
        UsageError: the bases were made for smaller linears, rank below 1, dropout outside [0, 1).
    """

    key = "randlora"
    trainable = ("randlora_lambda", "randlora_gamma")
    shares = ("bases",)

    def __init__(
        self,
        linear: nn.Module,
        *,
        bases: Bases,
        rank: int = 32,
        alpha: float | None = None,
        dropout: float = 0.0,
        seed: int = 0,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(linear)
        if not 0 <= dropout < 1:
            raise UsageError(f"dropout={dropout} is outside [0, 1)")
        q = min(self.in_features, self.out_features)
        wide = max(self.in_features, self.out_features)
        if q > bases.A.shape[1] or wide > bases.B.shape[0]:
            raise UsageError(
                f"a linear {self.in_features} -> {self.out_features} needs bases for {q} x {wide}, "
                f"these are for {bases.A.shape[1]} x {bases.B.shape[0]}; attach all targets at once"
            )
        if (rank, seed) != (bases.rank, bases.seed):
            raise UsageError(
                f"rank={rank}, seed={seed}, but the bases are of rank {bases.rank}, "
                f"seed {bases.seed}"
            )
        self.dropout = dropout
        self.scale = (20 * rank if alpha is None else alpha) / rank
        # In a tuple: the model holds the bases once, a layer only points at them.
        self._bases = (bases,)
        like: dict[str, Any] = {"device": self.weight.device, "dtype": dtype or self.weight.dtype}
        count = -(-q // rank)
        self.randlora_lambda = nn.Parameter(torch.zeros(rank, count, **like))
        self.randlora_gamma = nn.Parameter(torch.full((count, q), 1 / max(count, q), **like))

    @property
    def bases(self) -> Bases:
        return self._bases[0]

    @classmethod
    def shared(cls, model: nn.Module, linears: Mapping[str, nn.Module], **knobs: Any) -> dict:
        shapes = [features(linear) for linear in linears.values()]
        device = next(iter(linears.values())).get_parameter("weight").device
        return {"bases": Bases(shapes, knobs["rank"], knobs["seed"], device)}

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        y = self.base_forward(x)
        z = F.dropout(x, self.dropout, self.training).reshape(-1, self.in_features).to(y.dtype)
        update = _Update.apply(
            z,
            self.randlora_lambda,
            self.randlora_gamma,
            self.bases,
            self.in_features,
            self.out_features,
        )
        return y.add_(update.view(y.shape), alpha=self.scale)

    def delta(self) -> Tensor:
        a, b = (t.float() for t in self.bases.slices(self.in_features, self.out_features))
        u = _scaled(a, self.randlora_lambda.detach().float(), self.randlora_gamma.detach().float())
        update = self.scale * (b @ u)
        return update if self.in_features <= self.out_features else update.mT

    @classmethod
    def to_file(cls, knobs: Mapping[str, Any]) -> dict[str, Any]:
        rank, alpha = knobs["rank"], knobs["alpha"]
        return {
            "peft_type": "RANDLORA",
            "r": rank,
            "randlora_alpha": 20 * rank if alpha is None else alpha,
            "randlora_dropout": knobs["dropout"],
            "projection_prng_key": knobs["seed"],
            "save_projection": False,
            "init_weights": True,
        }

    @classmethod
    def from_file(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        for key in ("sparse", "very_sparse"):
            if config.get(key):
                raise UsageError(f"adapter_config.json asks for {key} bases; only dense ones exist")
        return {
            "rank": config["r"],
            "alpha": config["randlora_alpha"],
            "dropout": config.get("randlora_dropout", 0.0),
            "seed": config["projection_prng_key"],
        }

    @classmethod
    def check_others(cls, model: nn.Module, others: Mapping[str, Tensor]) -> None:
        layer: Any = next(iter(layers(model).values()))
        bases = layer.bases
        for name, stored in others.items():
            if (which := name.rpartition("randlora_")[2]) not in ("A", "B"):
                super().check_others(model, {name: stored})
            ours = getattr(bases, which)
            stored = stored[:, 0] if which == "A" else stored
            part = stored[tuple(slice(size) for size in ours.shape)].to(ours)
            if not torch.equal(part, ours):
                raise UsageError(
                    f"{name} in the file is not what seed {bases.seed} draws here; "
                    "merge the adapter with the library that wrote it"
                )


ADAPTER = RandLoRA


def _apply(model: nn.Module, *, rank: int) -> nn.Module:
    return attach(model, "randlora", rank=rank)


METHOD = Method(
    key="randlora",
    slot="adapter",
    writes={("parameters", "extent"): "all; diagonals train"},
    apply=_apply,
    knobs={"rank": (32, 16, 64)},
    automatic=False,
)
