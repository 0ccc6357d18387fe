"""CompAct (124): keep x·P instead of a linear's input; its gradient and Adam are as small.

Keeps    per input of n columns, T tokens: z = x·P, T x r with r = ratio*n, shared by the linears
         that read the same input; a gradient of m x r and two moments of it per weight m x n.
Form     z and gradients in the model's dtype, moments in fp32; P is drawn from a seed, tile by
         tile, in each forward pass and each update, and never kept.
Bytes    T*r*b per distinct input; m*r*b gradient, 8*m*r + 4 state, b for the leaf, per weight.
Source   Shamshoum, Hodos, Sieradzki, Schuster, "CompAct: Compressed Activations for
         Memory-Efficient LLM Training", NAACL 2025.
Departs  layers of equal width share P, so that q, k and v can share z; where P changes, v stays and
         m turns with it, shrunk by r/n: unshrunk it would enter with n/r times its energy.

The weight gets no gradient of its own shape. Beside it lies a leaf (m, r) in one element of memory,
and what autograd accumulates there is the compressed gradient, so that clipping, accumulation and
gradients consumed in backward see nothing unusual. An update changes the weight through the leaf.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary
from transformers.pytorch_utils import Conv1D

import holdfast.native.adamw4  # noqa: F401  registers torch.ops.holdfast.adamw_
from holdfast.attach import Targets, features, find, is_transposed
from holdfast.errors import UsageError
from holdfast.plan.method import Method, Quality
from holdfast.training.adapters.base import refuse_tied
from holdfast.training.optim.state_optimizer import Layout, StateOptimizer, check_adam, number
from holdfast.training.saved.lean import autocast, first_order, report

if TYPE_CHECKING:
    _Layer: TypeAlias = Any
else:
    _Layer = object

# Elements of P, or of an update, that exist at a time: 8 MiB in fp32.
TILE = 2**21


@dataclass(frozen=True)
class Like:
    """Makes a leaf whose update costs what that of another does; equal where the costs are."""

    shape: tuple[int, ...]
    rank: int
    dtype: torch.dtype
    transposed: bool

    def __call__(self) -> nn.Parameter:
        weight = torch.empty(self.shape, dtype=self.dtype)
        return Sketch(weight, self.rank, 1, 0, self.transposed).leaf()


@dataclass(eq=False)
class Sketch:
    """How one weight is trained: through which P, until which step.

    Args:
        gap: optimizer steps with one P.
        steps: optimizer steps taken; only the optimizer changes it, so that P is the same in all
            forward passes before an update, and in the update.
    """

    weight: Tensor
    rank: int
    gap: int
    seed: int
    transposed: bool
    steps: int = field(default=0)

    @property
    def wide(self) -> Tensor:
        """The weight as (out, in)."""
        return self.weight.mT if self.transposed else self.weight

    @property
    def epoch(self) -> int:
        return self.steps // self.gap

    def leaf(self) -> nn.Parameter:
        """A parameter (out, rank) in one element of memory, tied to this sketch."""
        low = nn.Parameter(self.weight.new_zeros(()).expand(self.wide.shape[0], self.rank))
        return self.tie(low)

    def tie(self, low: nn.Parameter) -> nn.Parameter:
        like = Like(tuple(self.weight.shape), self.rank, self.weight.dtype, self.transposed)
        low.sketch, low.like = self, like  # type: ignore[attr-defined]
        return low

    def tiles(self, epoch: int | None = None) -> Iterator[tuple[slice, Tensor]]:
        """P (in, rank) of an epoch by rows: which, and fp32 normal numbers of variance 1/rank."""
        width, device = self.wide.shape[1], self.weight.device
        epoch = self.epoch if epoch is None else epoch
        rows = max(1, TILE // self.rank)
        for start in range(0, width, rows):
            end = min(start + rows, width)
            # A generator of its own: dropout must draw as it would without us.
            mixed = ((self.seed * 1_000_003 + epoch) * 1_000_003 + width) * 1_000_003 + start
            generator = torch.Generator(device).manual_seed(mixed % 2**63)
            tile = torch.empty(end - start, self.rank, device=device)
            yield slice(start, end), tile.normal_(0, self.rank**-0.5, generator=generator)

    def compress(self, x: Tensor) -> Tensor:
        """x (..., in) -> x P (T, rank)."""
        flat = x.reshape(-1, x.shape[-1])
        z = flat.new_zeros(len(flat), self.rank)
        for at, tile in self.tiles():
            z.addmm_(flat[:, at], tile.to(x.dtype))
        return z

    def add_(self, change: Tensor, keep: float) -> None:
        """weight = keep * weight + change Pᵀ, with change (out, rank) fp32."""
        wide = self.wide.mul_(keep)
        for at, tile in self.tiles():
            if wide.dtype is torch.float32:
                wide[:, at].addmm_(change, tile.mT)
                continue
            rows = max(1, TILE // len(tile))
            for part, piece in zip(wide[:, at].split(rows), change.split(rows), strict=True):
                part.add_((piece @ tile.mT).to(wide.dtype))

    def advance_(self, m: Tensor, steps: int, *, certainly: bool = False) -> None:
        """Count a step; where P changes, or `certainly`, turn the first moment (out, rank)."""
        old, self.steps = self.epoch, steps
        if self.epoch == old and not certainly:
            return
        turn = m.new_zeros(self.rank, self.rank)
        for (_, before), (_, after) in zip(self.tiles(old), self.tiles(), strict=True):
            turn.addmm_(before.mT, after)
        m.copy_(m @ turn.mul_(self.rank / self.wide.shape[1]))


class CompactProduct(torch.autograd.Function):
    """x Wᵀ + b, exact, that keeps z for the leaf's gradient gyᵀz and W for that of x."""

    @staticmethod
    def forward(ctx, x, weight, bias, low, z, key: TensorWeakRef) -> Tensor:
        need_x, _, _, need_low, *_ = ctx.needs_input_grad
        ctx.save_for_backward(z if need_low else None, weight if need_x else None)
        ctx.dtype, ctx.key = low.dtype, key
        return F.linear(x, weight, bias)

    @staticmethod
    @first_order
    def backward(ctx, gy: Tensor):
        z, weight = ctx.saved_tensors
        # An input that outlives the step must not keep its z.
        x = ctx.key()
        if x is not None:
            _shared.pop(x, None)
        flat = gy.reshape(-1, gy.shape[-1])
        gx = gy @ weight if weight is not None else None
        gb = flat.sum(0) if ctx.needs_input_grad[2] else None
        return gx, None, gb, (flat.mT @ z).to(ctx.dtype), None, None


# Input -> its version, which projection, z. An entry goes with its input, or in backward.
_shared: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


class _Compact(_Layer):
    # What changes while training without a gradient of its own; checkpoints ask.
    trained_in_place = ("weight",)
    sketch: Sketch

    def forward(self, x: Tensor) -> Tensor:
        low = self.low
        if not (torch.is_grad_enabled() and low.requires_grad):
            return super().forward(x)
        sketch = self.sketch
        cast, weight, bias = autocast(x, sketch.wide, self.bias)
        which = (x._version, sketch.rank, sketch.seed, sketch.epoch, cast.dtype)
        known, z = _shared.get(x, (None, None))
        if known != which:
            with torch.no_grad():
                z = sketch.compress(cast)
            _shared[x] = which, z
        return CompactProduct.apply(cast, weight, bias, low, z, TensorWeakRef(x))

    def _tie(self) -> None:
        """After a copy or a conversion: one element of memory again, and what belongs together."""
        low, weight = self.low, self.weight
        if low.untyped_storage().nbytes() > low.element_size() or low.dtype != weight.dtype:
            low.data = weight.data.new_zeros(()).expand(low.shape)
        self.sketch.weight = weight
        self.sketch.tie(low)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._tie()
        return self

    def __setstate__(self, state):
        super().__setstate__(state)
        self._tie()

    # The leaf is no part of the model: its files are those of the plain one.
    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[f"{prefix}low"]

    def _load_from_state_dict(self, state, prefix, meta, strict, missing, unexpected, errors):
        super()._load_from_state_dict(state, prefix, meta, strict, missing, unexpected, errors)
        if f"{prefix}low" in missing:
            missing.remove(f"{prefix}low")


class CompactLinear(_Compact, nn.Linear):
    """nn.Linear made by `compact`."""


class CompactConv1D(_Compact, Conv1D):
    """The linear of GPT-2 made by `compact`."""


_TWINS: dict[type, type] = {nn.Linear: CompactLinear, Conv1D: CompactConv1D}


def compact(
    model: nn.Module,
    ratio: float = 0.25,
    gap: int = 50,
    *,
    targets: Targets = "all-linear",
    seed: int = 0,
) -> nn.Module:
    """Make trainable linears keep a projection of their input, in place; returns `model`.

    Make the optimizer, a `CompActAdamW`, afterwards. Outputs and the gradients of everything else
    stay exact. There is no double backward.

    Args:
        ratio: of a linear's inputs that the projection keeps.
        gap: optimizer steps with one projection.
        targets: see `holdfast.attach.find`.

    Raises:
        UsageError: a setting is out of range, a weight is shared, or no linear trains.
    """
    if not 0 < ratio <= 1:
        raise UsageError(f"ratio={ratio} is outside (0, 1]; the published setting is 0.25")
    if gap < 1:
        raise UsageError(f"gap={gap} must be 1 step or more; the published setting is 50")
    chosen = {
        name: linear
        for name, linear in find(model, targets).items()
        if type(linear) in _TWINS and linear.weight.requires_grad
    }
    if not chosen:
        raise UsageError(
            f"no linear of {type(model).__name__} named by {targets!r} trains and is a plain one; "
            "compact a model once, before anything else changes its linears"
        )
    refuse_tied(model, chosen)
    for linear in chosen.values():
        rank = max(1, round(ratio * features(linear)[0]))
        weight = linear.get_parameter("weight").requires_grad_(False)
        weight.grad = None
        sketch = Sketch(weight, rank, gap, seed, is_transposed(linear))
        linear.sketch, linear.low = sketch, sketch.leaf()  # type: ignore[assignment]
    report("compact", Counter(type(linear).__name__ for linear in chosen.values()))
    for linear in chosen.values():
        linear.__class__ = _TWINS[type(linear)]
    return model


class CompActAdamW(StateOptimizer):
    """AdamW on the compressed gradients of a model that `compact` changed, plain AdamW elsewhere.

    Args:
        scale: factor on updates that come through a projection; like every argument but `params`
            it can be set per group (the authors halve it for the output of attention).

    Raises:
        UsageError: a setting is out of range, or a parameter's dtype is not supported.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-2,
        scale: float = 0.25,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        check_adam(lr, betas, eps, weight_decay)
        if scale <= 0:
            raise UsageError(f"scale={scale} must be > 0")
        defaults = {"lr": lr, "scale": scale, "betas": betas, "eps": eps}
        super().__init__(params, {**defaults, "weight_decay": weight_decay})

    def layout(self, p: Tensor, group: dict[str, Any]) -> Layout:
        return {name: (tuple(p.shape), torch.float32) for name in ("exp_avg", "exp_avg_sq")}

    def update(self, p: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict) -> None:
        self._adamw(p, grad, state, group, number(group["lr"]), group["weight_decay"])

    @staticmethod
    def _adamw(p, grad, state, group, lr: float, decay: float) -> None:
        moments, hyper = (state["exp_avg"], state["exp_avg_sq"]), (*group["betas"], group["eps"])
        torch.ops.holdfast.adamw_(p, grad, *moments, state["step"], lr, *hyper, decay)

    def _step(self, p: Tensor, group: dict[str, Any]) -> None:
        sketch = getattr(p, "sketch", None)
        if sketch is None:
            super()._step(p, group)
            return
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            for name, (shape, dtype) in self.layout(p, group).items():
                state[name] = torch.zeros(shape, dtype=dtype, device=p.device)
        state["step"] += 1
        grad = p.grad
        assert grad is not None
        self._through(sketch, grad.contiguous(), state, group)
        # A prediction cannot read the step and takes the larger one.
        certainly = isinstance(p, FakeTensor)
        sketch.advance_(state["exp_avg"], int(number(state["step"])), certainly=certainly)

    def _through(self, sketch: Sketch, grad: Tensor, state: dict, group: dict) -> None:
        lr = number(group["lr"])
        change = torch.zeros_like(state["exp_avg"])
        self._adamw(change, grad, state, group, lr * group["scale"], 0.0)
        sketch.add_(change, 1 - lr * group["weight_decay"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch; the projections go on from the loaded step.

        Raises:
            UsageError: the states are not of this optimizer with these settings.
        """
        super().load_state_dict(state_dict)
        for p, state in self.state.items():
            if hasattr(p, "sketch"):
                p.sketch.steps = int(state["step"])


def _apply(model: nn.Module, *, ratio: float, gap: int) -> nn.Module:
    return compact(model, ratio, gap)


def _applies(model: nn.Module, **_: Any) -> str | None:
    return None if any(type(m) in _TWINS for m in model.modules()) else "it has no plain linear"


METHODS = (
    Method(
        key="compact",
        slot="saved",
        writes={
            ("parameters", "extent"): "all; linears train through projections",
            ("gradients", "extent"): "m x r a linear, from inputs kept as x·P",
        },
        apply=_apply,
        applies=_applies,
        knobs={"ratio": (0.25, 0.5, 0.125), "gap": (50, 200, 500)},
        quality=lambda ratio=0.25, gap=50: Quality("lossy", 0.05, "holdfast check compact"),
        automatic=False,
        forbids={"rmm": "each keeps less of the same inputs in its own way"},
        requires={"compact_adamw": "only it carries a compressed gradient into the weight"},
    ),
    Method(
        key="compact_adamw",
        slot="optimizer",
        writes={("optimizer", "extent"): "two moments of m x r a linear"},
        apply=lambda named, lr, scale=0.25, weight_decay=0.0: CompActAdamW(
            [p for _, p in named], lr, scale, weight_decay=weight_decay
        ),
        knobs={"scale": (0.25, 0.5, 1.0, 2.0)},
        automatic=False,
        requires={"compact": "without compressed gradients it is adamw"},
    ),
)
