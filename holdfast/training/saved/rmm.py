"""Randomised-matmul linear (181): keep a sketch of a linear's input for the weight's gradient.

Keeps    Z = S X / k of k = ratio*B rows instead of X of B rows (all tokens of a call), where the
         weight trains; S is made again from a seed. Output, dX and the bias's gradient are exact.
Form     the dtype of X; the seed is one int64.
Bytes    b*k*n + 8 per call of a layer with n inputs.
Source   Bershatsky, Mikhalev, Katrutsa, Gusak, Merkulov, Oseledets, "Memory-Efficient
         Backpropagation through Large Linear Layers", 2022.
Departs  the DCT is scaled by B/k, not by k*B, and follows random signs, without which neighbouring
         tokens that resemble each other make a few of its rows carry everything; a seed per layer
         and call, from a counter of its own, which is kept with Z, so that the two agree also where
         a block is recomputed.

dW = (S dY)^T Z is unbiased, because E[S^T S] = k I. S is made in tiles, once in each pass, never
held whole. Its k*B draws take time: at 64 features and 1,024 rows a step on a CPU takes two (ratio
0.2, rademacher) to five times (0.5, gaussian) as long; the share falls as layers grow wider.
Layers that read one input (query, key, value) keep one sketch each, where PyTorch keeps that input
once: with three of them nothing is saved above a ratio of 1/3.
"""

import functools
import hashlib
import math
from collections import Counter
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers.pytorch_utils import Conv1D

from holdfast import attach
from holdfast.errors import UsageError, unknown
from holdfast.forms.bits import unpack
from holdfast.plan.method import Method, Quality
from holdfast.training.saved.lean import autocast, first_order, grads_wanted, report

if TYPE_CHECKING:
    # A mixin here reads the attributes of whatever layer it is mixed into.
    _Layer: TypeAlias = Any
else:
    _Layer = object

SKETCHES = ("gaussian", "rademacher", "dct")
TILE = 1 << 18  # elements of S that exist at a time


def sketch(x: Tensor, rows: int, kind: str, seed: int) -> Tensor:
    """S @ x for the `rows` random rows that `seed` stands for: x (B,n) -> (rows,n).

    E[S^T S] = rows * I. The sum is kept in fp32 at least, and so is the result.
    """
    count, device = x.shape[0], x.device
    dtype = torch.promote_types(x.dtype, torch.float32)
    # A fake tensor draws nothing, and its device need not exist.
    fake = isinstance(x, FakeTensor)
    generator = None if fake else torch.Generator(device).manual_seed(seed)
    if kind == "dct":
        chosen = torch.randperm(count, generator=generator, device=device)[:rows]
        signs = _signs(count, dtype, device, generator)
    out = x.new_zeros(rows, x.shape[1], dtype=dtype)
    width = max(1, TILE // rows)
    for start in range(0, count, width):
        part = x[start : start + width]
        if kind == "dct":
            tile = _dct_tile(chosen, start, len(part), count, dtype)
            tile *= signs[start : start + width]
        elif kind == "gaussian":
            tile = x.new_empty(rows, len(part), dtype=dtype).normal_(generator=generator)
        else:
            tile = _signs(rows * len(part), dtype, device, generator).view(rows, -1)
        if x.dtype == dtype:
            out.addmm_(tile, part)
        else:
            out += tile.to(x.dtype) @ part
    return out


def _signs(
    count: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator | None
) -> Tensor:
    """(count,) of -1 and 1: eight from each byte that is drawn, a tenth of `bernoulli_`'s time."""
    drawn = torch.empty(-(-count // 8), dtype=torch.uint8, device=device)
    bits = unpack(drawn.random_(0, 256, generator=generator), 1, count)
    return bits.to(dtype).mul_(2).sub_(1)


def _dct_tile(chosen: Tensor, start: int, width: int, count: int, dtype: torch.dtype) -> Tensor:
    """Columns of sqrt(B) times the orthonormal DCT-II, for the chosen of its B rows."""
    t = torch.arange(start, start + width, device=chosen.device)
    # Whole turns are taken off in integers: fp32 has no precision left at large arguments.
    angle = (chosen[:, None] * (2 * t + 1)) % (4 * count)
    tile = angle.to(dtype).mul_(math.pi / (2 * count)).cos_().mul_(math.sqrt(2))
    return tile.masked_fill_((chosen == 0)[:, None], 1.0)


class SketchedLinear(torch.autograd.Function):
    """x W^T + b that keeps a sketch of x."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, kind: str, rows: int, seed):
        z = sketch(x.reshape(-1, x.shape[-1]), rows, kind, seed).div_(rows)
        need_x = ctx.needs_input_grad[0]
        ctx.kind = kind
        ctx.save_for_backward(z.to(x.dtype), torch.full((), seed), weight if need_x else None)
        return F.linear(x, weight, bias)

    @staticmethod
    @first_order
    def backward(ctx, gy: Tensor):
        z, seed, weight = ctx.saved_tensors
        rows = gy.reshape(-1, gy.shape[-1])
        gx = gy @ weight if weight is not None else None
        drawn = 0 if isinstance(seed, FakeTensor) else int(seed)
        gw = sketch(rows, len(z), ctx.kind, drawn).to(z.dtype).mT @ z
        gb = rows.sum(0) if ctx.needs_input_grad[2] else None
        return gx, gw, gb, None, None, None


def variance(x: Tensor, gy: Tensor, rows: int, kind: str) -> float:
    """Expected squared Frobenius error of the sketched dW: x (B,n), gy (B,m).

    For the DCT an estimate from one draw of its signs; exact for the others.
    """
    count = len(x)
    exact = (gy.mT @ x).square().sum()
    if kind == "dct":
        # Rows are drawn without replacement from the terms that sum to dW.
        x, gy = (sketch(t, count, "dct", 0) / math.sqrt(count) for t in (x, gy))
        spread = _paired(x, gy) - exact / count
        return float(count * (count - rows) / rows * spread / max(1, count - 1))
    total = x.square().sum() * gy.square().sum() + exact
    if kind == "rademacher":
        total = total - 2 * _paired(x, gy)
    return float(total / rows)


def batch_variance(x: Tensor, gy: Tensor) -> float:
    """The variance that dW has because the batch is a sample: x (B,n), gy (B,m)."""
    count = len(x)
    exact = (gy.mT @ x).square().sum()
    return float((count * _paired(x, gy) - exact) / max(1, count - 1))


def _paired(x: Tensor, gy: Tensor) -> Tensor:
    return (x.square().sum(1) * gy.square().sum(1)).sum()


class _Randomized(_Layer):
    """What a linear gains: `ratio`, `sketch`, `seed` and the number of its `calls`."""

    counted = ("calls",)  # checkpoints hold it, so that a run resumes with the sketches to come

    def _sketch_with(self, ratio: float, kind: str, seed: int) -> None:
        if not 0 < ratio <= 1:
            raise UsageError(f"ratio={ratio} is outside (0, 1]; 0.2 keeps a fifth of the rows")
        if kind not in SKETCHES:
            raise unknown("sketch", kind, SKETCHES)
        self.ratio, self.sketch, self.seed, self.calls = ratio, kind, seed, 0

    def rows(self, count: int) -> int:
        """Rows kept of `count`; raises UsageError where that would be none."""
        rows = round(self.ratio * count)
        if rows < 1:
            raise UsageError(
                f"ratio={self.ratio} of {count} rows keeps none; use a ratio of at least "
                f"{1 / max(count, 1):.3g}, or a larger batch"
            )
        return rows

    def forward(self, x: Tensor) -> Tensor:
        # A forward that runs within backward is a recomputation of a call that was counted, though
        # perhaps without gradients.
        if torch._C._current_graph_task_id() == -1:
            self.calls += 1
        if not grads_wanted(self.weight):
            return super().forward(x)
        rows = self.rows(math.prod(x.shape[:-1]))
        weight = self.weight.t() if isinstance(self, Conv1D) else self.weight
        seed = _mixed(self.seed, self.calls)
        return SketchedLinear.apply(*autocast(x, weight, self.bias), self.sketch, rows, seed)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, ratio={self.ratio}, sketch={self.sketch!r}"


def _mixed(*numbers: int) -> int:
    """63 bits that look random and stand for these integers."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


class RandomizedLinear(_Randomized, nn.Linear):
    """`torch.nn.Linear` that keeps a sketch of `ratio` of its input's rows.

    Args:
        sketch: "gaussian", "rademacher" (a little less variance, and the least time) or "dct" (rows
            of a cosine transform, drawn without replacement: the least variance, exact at ratio 1).
        seed: sketches are a function of this and of the number of the call.

    Raises:
        UsageError: `ratio` is outside (0, 1], or keeps no row of a call; an unknown sketch.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        ratio: float = 0.2,
        sketch: str = "gaussian",
        seed: int = 0,
        device=None,
        dtype=None,
    ):
        super().__init__(in_features, out_features, bias, device, dtype)
        self._sketch_with(ratio, sketch, seed)


class RandomizedConv1D(_Randomized, Conv1D):
    """The same for the transposed linear of GPT-2; `convert` makes it."""


_TWINS: dict[type, type] = {nn.Linear: RandomizedLinear, Conv1D: RandomizedConv1D}


def _convertible(model: nn.Module, targets: attach.Targets) -> list[Any]:
    return [
        module
        for module in attach.find(model, targets).values()
        if type(module) in (*_TWINS, *_TWINS.values())
    ]


def convert(
    model: nn.Module,
    ratio: float = 0.2,
    sketch: str = "gaussian",
    *,
    targets: attach.Targets = "all-linear",
    seed: int = 0,
) -> nn.Module:
    """Let the linears that `targets` name keep sketches, in place; returns `model`.

    Parameters, names, hooks and `state_dict` stay as they are; the head is no target by default.
    Modules of other classes that are linears too stay. A second call sets another ratio or sketch.

    Raises:
        UsageError: as `RandomizedLinear`; or a target matches no linear.
    """
    changed: Counter[str] = Counter()
    for index, module in enumerate(_convertible(model, targets)):
        if type(module) in _TWINS:
            changed[type(module).__name__] += 1
            module.__class__ = _TWINS[type(module)]
        module._sketch_with(ratio, sketch, _mixed(seed, index))
    report("rmm", changed)
    return model


class VarianceProbe:
    """What sketching adds to the noise of each weight's gradient, next to the batch's own.

    `with VarianceProbe(model) as probe: loss.backward()` (with the forward pass inside) keeps the
    inputs as an ordinary linear would. Then `probe.ratios[name]` is the variance of dW through the
    sketch over its variance through the choice of the batch: above 1 the sketch is the louder one.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.ratios: dict[str, float] = {}
        self._sums: dict[str, tuple[float, float]] = {}

    def __enter__(self) -> "VarianceProbe":
        self._handle = attach.Handle()
        for name, module in self.model.named_modules():
            if isinstance(module, _Randomized):
                self._handle += attach.hook([module], functools.partial(self._watch, name))
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    def _watch(self, name: str, module: _Randomized, args: tuple, output: Tensor) -> None:
        if output.requires_grad:
            x = args[0].detach()
            output.register_hook(functools.partial(self._measure, name, module, x))

    def _measure(self, name: str, module: _Randomized, x: Tensor, gy: Tensor) -> None:
        x, gy = (t.reshape(-1, t.shape[-1]).detach().double() for t in (x, gy))
        sketched, batch = self._sums.get(name, (0.0, 0.0))
        sketched += variance(x, gy, module.rows(len(x)), module.sketch)
        batch += batch_variance(x, gy)
        self._sums[name] = sketched, batch
        self.ratios[name] = sketched / batch if batch > 0 else math.inf


def _applies(model: nn.Module, **knobs: Any) -> str | None:
    found = attach.linears(model).keys() - set(attach.head(model))
    if any(type(m := model.get_submodule(n)) in _TWINS and m.weight.requires_grad for n in found):
        return None
    return "no linear besides the head trains its weight"


METHOD = Method(
    key="rmm",
    slot="saved",
    writes={("activations", "form"): "random sketches of the inputs of linears"},
    apply=convert,
    knobs={"ratio": (0.2, 0.5), "sketch": SKETCHES},
    quality=lambda ratio=0.2, sketch="gaussian": Quality(
        "lossy", 0.05 if ratio < 0.5 else 0.03, "holdfast check rmm"
    ),
    applies=_applies,
    automatic=False,
)
