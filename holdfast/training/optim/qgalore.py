"""Q-GaLore (065): Adam in a low-rank subspace, INT4 basis, INT8 weights, subspaces kept while good.

Keeps    per matrix m x n, s = min(m, n), l = max(m, n): a basis r x s, two moments of l*r; vectors
         and matrices with s <= r: plain Adam.
Form     basis: 4-bit affine groups; moments: 8-bit dynamic codes in blocks of 256; weights after
         `int8_linear`: 8-bit affine groups, rounded stochastically at each update.
Bytes    r*s/2 + 3 per group; 2*(l*r + 4*ceil(l*r/256)); 40 for the schedule and the step; weights
         m*n + 5 per group. A group is the largest divisor of a row's length up to 256.
Source   Zhang, Jaiswal, Yin, Liu, Zhao, Tian, Wang, "Q-GaLore: Quantized GaLore with INT4
         Projection and Layer-Adaptive Low-Rank Gradients", 2024; Zhao et al., "GaLore", ICML 2024.
Departs  moments are carried into a new basis (the authors' code goes on with those of the old one;
         on the test model that costs 0.02 nats per byte, on each of three seeds);
         |cos| instead of cos, because the signs of singular vectors are arbitrary; the next refresh
         is a step kept per matrix, because `step % gap` jumps when the gap changes.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers.pytorch_utils import Conv1D

from holdfast.attach import head
from holdfast.errors import UsageError
from holdfast.forms import Affine, Blockwise, Form, Packed
from holdfast.forms.base import reciprocal
from holdfast.plan.method import Method, Quality
from holdfast.training.optim.projector import Projector
from holdfast.training.optim.state_optimizer import (
    Layout,
    StateOptimizer,
    check_adam,
    layout_bytes,
    number,
)
from holdfast.training.saved.lean import first_order

if TYPE_CHECKING:
    # A mixin here reads the attributes of whatever layer it is mixed into.
    _Layer: TypeAlias = Any
else:
    _Layer = object

QUEUE = 5
MOMENTS = {"m": Blockwise("dynamic8", 256), "v": Blockwise("dynamic8_unsigned", 256)}
# The `schedule` tensor: gap, step of the next refresh, refreshes so far, then the last cosines.
_GAP, _NEXT, _DONE, _COSINES = 0, 1, 2, 3


def group_of(columns: int) -> int | None:
    """Elements per affine group: the largest divisor up to 256, or None (a row) if below 32."""
    best = max(d for d in range(1, min(columns, 256) + 1) if columns % d == 0)
    return best if best >= 32 else None


class QGaLoreAdamW(StateOptimizer):
    """AdamW whose moments and update of a matrix live in a subspace of rank `rank`.

    Every argument but `params` can also be set per group; a group with `rank=None` is plain AdamW.
    Weights that `int8_linear` converted are read and written in their form.

    Args:
        gap: steps between refreshes of a subspace, at first.
        cos: where the mean |cosine| between successive first singular vectors reaches this over
            5 refreshes, the gap of that matrix is multiplied by `growth`.
        scale: factor on the projected update; weight decay acts on the whole weight.
        seed: of stochastic rounding; step and parameter are mixed in, so that a resumed run draws
            the same numbers.

    Raises:
        UsageError: a setting is out of range, or a parameter's dtype is not supported.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-2,
        rank: int | None = 128,
        gap: int = 200,
        cos: float = 0.4,
        growth: int = 2,
        scale: float = 0.25,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        seed: int = 0,
    ):
        self.seed = seed
        self._index: dict[int, int] = {}
        defaults: dict[str, Any] = {
            "lr": lr,
            "rank": rank,
            "gap": gap,
            "cos": cos,
            "growth": growth,
        }
        defaults |= {"scale": scale, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        group = {**self.defaults, **param_group}
        check_adam(group["lr"], group["betas"], group["eps"], group["weight_decay"])
        for name, ok, range_ in (
            ("rank", group["rank"] is None or group["rank"] >= 1, "a positive integer or None"),
            ("gap", group["gap"] >= 1, ">= 1"),
            ("growth", group["growth"] >= 1, ">= 1"),
        ):
            if not ok:
                raise UsageError(f"{name}={group[name]} must be {range_}")
        super().add_param_group(param_group)

    @classmethod
    def basis_form(cls, columns: int) -> Form:
        """The form in which a basis with rows of this length is kept."""
        return Affine(bits=4, group=group_of(columns))

    def layout(self, p: Tensor, group: dict[str, Any]) -> Layout:
        """Names of a form's buffers follow the basis `p` and the moments `m` and `v`."""
        return self._layout(tuple(p.shape), group["rank"])

    @classmethod
    def _layout(cls, shape: tuple[int, ...], rank: int | None) -> Layout:
        if rank is None or not projected(shape, rank):
            return {name: (shape, torch.float32) for name in ("exp_avg", "exp_avg_sq")}
        kept: Layout = {"schedule": ((_COSINES + QUEUE,), torch.float32)}
        for name, (form, size) in cls._forms(shape, rank).items():
            buffers = form.layout(torch.Size(size), torch.float32)
            kept |= {f"{name}_{buffer}": spec for buffer, spec in buffers.items()}
        return kept

    @classmethod
    def _forms(cls, shape: tuple[int, ...], rank: int) -> dict[str, tuple[Form, tuple[int, int]]]:
        long, short = max(shape), min(shape)
        low = (long, rank) if shape[0] >= shape[1] else (rank, long)
        moments = {name: (form, low) for name, form in MOMENTS.items()}
        return {"p": (cls.basis_form(short), (rank, short)), **moments}

    def update(self, p: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict) -> None:
        if "exp_avg" in state:
            change = _adam(grad.float(), state["exp_avg"], state["exp_avg_sq"], state, group)
        else:
            change = self._projected(grad, state, group).mul_(group["scale"])
        lr = number(group["lr"])
        keep = 1 - lr * group["weight_decay"]
        if isinstance(p, Packed):
            weight = p.dequantize().float().mul_(keep).sub_(change, alpha=lr)
            generator = self._generator(p, state)
            p.copy_(p.form.encode(weight.to(p.dtype), generator=generator, check=False))
        else:
            p.mul_(keep).sub_(change.mul_(lr).to(p.dtype))

    def _projected(self, grad: Tensor, state: dict[str, Tensor], group: dict) -> Tensor:
        """The update of a matrix (m, n) before its scale; refreshes the basis where that is due."""
        # Read on the host in every step; a state that comes with its parameter is moved once.
        schedule = state["schedule"] = state["schedule"].cpu()
        forms = self._forms(tuple(grad.shape), group["rank"])
        packed = {
            name: Packed(
                form, size, torch.float32,
                {b: state[f"{name}_{b}"] for b in form.layout(torch.Size(size), torch.float32)},
            )
            for name, (form, size) in forms.items()
        }  # fmt: skip
        right = grad.shape[0] >= grad.shape[1]
        m, v = packed["m"].dequantize(), packed["v"].dequantize()
        # A prediction cannot read the schedule and takes the larger step, that of a refresh.
        if isinstance(grad, FakeTensor) or state["step"] >= schedule[_NEXT]:
            old = packed["p"].dequantize()
            new = Projector.fit(grad, group["rank"]).basis
            packed["p"].copy_(forms["p"][0].encode(new, check=False))
            _advance(schedule, state["step"], old, new, group)
            m, v = _carry(m, v, old, packed["p"].dequantize(), right)
            del old, new
        projector = Projector(packed["p"], right)
        update = _adam(projector.down(grad), m, v, state, group)
        for name, moment in (("m", m), ("v", v)):
            packed[name].copy_(forms[name][0].encode(moment, check=False))
        return projector.up(update)

    def _generator(self, p: Tensor, state: dict[str, Tensor]) -> torch.Generator | None:
        if isinstance(state["step"], FakeTensor):
            return None
        if id(p) not in self._index:
            every = [q for g in self.param_groups for q in g["params"]]
            self._index = {id(q): i for i, q in enumerate(every)}
        mixed = (self.seed * 1_000_003 + self._index[id(p)]) * 1_000_003 + int(state["step"])
        return torch.Generator(p.device).manual_seed(mixed % 2**63)

    def refreshes(self) -> int:
        """Subspaces computed so far, over all matrices."""
        kept = [s["schedule"][_DONE] for s in self.state.values() if "schedule" in s]
        return int(sum(kept))


def projected(shape: tuple[int, ...], rank: int | None) -> bool:
    """Whether a parameter of this shape gets a subspace; others take plain Adam."""
    return rank is not None and len(shape) == 2 and min(shape) > rank


def _adam(g: Tensor, m: Tensor, v: Tensor, state: dict[str, Tensor], group: dict) -> Tensor:
    """Change m and v in place -> the bias-corrected step, a new tensor."""
    (b1, b2), step = group["betas"], number(state["step"])
    m.lerp_(g, 1 - b1)
    v.mul_(b2).addcmul_(g, g, value=1 - b2)
    # A prediction reads step 0; its numbers do not matter.
    c1, c2 = 1 - b1 ** max(step, 1), 1 - b2 ** max(step, 1)
    return m / v.sqrt().div_(math.sqrt(c2)).add_(group["eps"]).mul_(c1)


def _advance(schedule: Tensor, step: Tensor, old: Tensor, new: Tensor, group: dict) -> None:
    """Note a refresh: the cosine of the first vectors, the gap, the step of the next refresh."""
    if isinstance(schedule, FakeTensor):
        return
    done = int(schedule[_DONE])
    if done == 0:
        schedule[_GAP] = group["gap"]
    else:
        schedule[_COSINES + (done - 1) % QUEUE] = torch.dot(old[0], new[0]).abs() / old[0].norm()
        if done >= QUEUE and schedule[_COSINES:].mean() >= group["cos"]:
            schedule[_GAP] *= group["growth"]
    schedule[_DONE] += 1
    schedule[_NEXT] = step + schedule[_GAP]


def _carry(m: Tensor, v: Tensor, old: Tensor, new: Tensor, right: bool) -> tuple[Tensor, Tensor]:
    """Moments in the old basis -> in the new one; zeros stay zeros.

    m turns with the basis. v takes the squared entries of the turn: what it becomes where the
    coordinates of the gradient are not correlated.
    """
    turn = old @ new.mT
    if right:
        return m @ turn, v @ turn.square()
    return turn.mT @ m, turn.mT.square() @ v


@dataclass(frozen=True)
class Int8Weight(Affine):
    """8-bit affine groups whose stochastic rounding is unbiased up to the ends of a group.

    Affine spends every code on the range, so that a draw beyond an end would be clipped; here the
    zero point is rounded up and one code is left over for the draw.
    """

    bits: int = 8
    group: int | None = 256
    scale_dtype: torch.dtype = torch.float32
    rounding: Literal["nearest", "stochastic"] = "stochastic"

    def _write(self, flat, start, buffers, shape, generator) -> None:
        groups = buffers["scale"].shape[1]
        columns = buffers["codes"].shape[1]
        at = slice(start // columns, (start + flat.numel()) // columns)
        x = flat.float().view(-1, groups, columns // groups)
        low, high = x.amin(-1, keepdim=True).clamp_(max=0), x.amax(-1, keepdim=True).clamp_(min=0)
        scale = (high - low).div_(254)
        inverse = reciprocal(scale)
        zero = (-low * inverse).ceil_()
        q = x * inverse
        if self.rounding == "stochastic":
            q.add_(torch.rand(q.shape, generator=generator, device=q.device)).floor_()
        else:
            q.round_()
        q.add_(zero).clamp_(0, 255)
        buffers["scale"][at], buffers["zero"][at] = scale.squeeze(-1), zero.squeeze(-1).byte()
        buffers["codes"][at] = q.byte().view(-1, columns)


def trainable(packed: Packed) -> nn.Parameter:
    """A parameter that is written in a form and receives dense gradients."""
    parameter = nn.Parameter(packed, requires_grad=False)
    # Packed refuses it, as its own products have no gradient in the weight; Int8Linear's has.
    with torch._C.DisableTorchFunctionSubclass():
        parameter.requires_grad_(True)
    return parameter


class PackedProduct(torch.autograd.Function):
    """x @ W.T + bias for a packed W (out, in), or x @ W + bias for Conv1D's W (in, out).

    W is decoded a tile of rows at a time.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Packed, bias: Tensor | None, transposed: bool) -> Tensor:
        # The weight is the model's: keeping the wrapper costs no bytes.
        ctx.weight, ctx.transposed = weight, transposed
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None)
        if not transposed:
            return weight.form.matmul(x, weight, bias)
        y = _by_rows(x, weight)
        return y if bias is None else y.add_(bias)

    @staticmethod
    @first_order
    def backward(ctx, gy: Tensor):
        (x,), weight = ctx.saved_tensors, ctx.weight
        need_x, need_weight, need_bias, _ = ctx.needs_input_grad
        gx = gw = None
        if need_x:
            gx = weight.form.matmul(gy, weight) if ctx.transposed else _by_rows(gy, weight)
        flat = gy.reshape(-1, gy.shape[-1])
        if need_weight:
            inputs = x.reshape(-1, x.shape[-1])
            product = inputs.mT @ flat if ctx.transposed else flat.mT @ inputs
            gw = product.to(weight.dtype)
        return gx, gw, flat.sum(0) if need_bias else None, None


def _by_rows(x: Tensor, weight: Packed) -> Tensor:
    """x (..., rows) @ W (rows, columns), summed over tiles of rows."""
    y = x.new_zeros(*x.shape[:-1], weight.shape[1])
    for first, last, tile in weight.form.row_tiles(weight, x.dtype):
        y += x[..., first:last] @ tile
    return y


class _Int8(_Layer):
    """A linear whose trainable weight is written in 8 bits; made by `int8_linear`."""

    def forward(self, x: Tensor) -> Tensor:
        transposed = isinstance(self, Conv1D)
        if not transposed and not (torch.is_grad_enabled() and self.weight.requires_grad):
            return super().forward(x)
        bias: Tensor | None = self.bias
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
            bias = None if bias is None else bias.to(x.dtype)
        return PackedProduct.apply(x, self.weight, bias, transposed)


class Int8Linear(_Int8, nn.Linear):
    """`torch.nn.Linear` in 8 bits."""


class Int8Conv1D(_Int8, Conv1D):
    """The transposed linear of GPT-2 in 8 bits."""


_TWINS: dict[type, type] = {nn.Linear: Int8Linear, Conv1D: Int8Conv1D}


def int8_linear(model: nn.Module) -> nn.Module:
    """Write the weights of all linears but the output head in 8 bits, in place; returns `model`.

    They stay trainable as they were, by `QGaLoreAdamW`. Shared weights and layers of other classes
    than `nn.Linear` and `Conv1D` are left alone. Move and cast the model first: a trainable packed
    weight stays where and what it is. Make the optimizer afterwards.

    Raises:
        UsageError: there is nothing to convert.
    """
    shared: set[int] = set()
    seen: set[int] = set()
    for _, p in model.named_parameters(remove_duplicate=False):
        (shared if id(p) in seen else seen).add(id(p))
    heads = set(head(model))
    found = [
        module
        for name, module in model.named_modules()
        if type(module) in _TWINS and name not in heads and id(module.weight) not in shared
    ]
    if not found:
        raise UsageError(
            f"{type(model).__name__} has no nn.Linear or Conv1D of its own besides its head; "
            "int8_linear converts only those"
        )
    for module in found:
        weight = module.get_parameter("weight")
        form = Int8Weight(group=group_of(weight.shape[1]))
        near = replace(form, rounding="nearest").encode(weight.detach())
        packed = Packed(form, near.shape, near.dtype, near.buffers)
        frozen = nn.Parameter(packed, requires_grad=False)
        module.weight = trainable(packed) if weight.requires_grad else frozen
        module.__class__ = _TWINS[type(module)]
    return model


def state_bytes(shape: tuple[int, ...], dtype: torch.dtype, rank: int = 128, **_: Any) -> int:
    """Exact bytes kept for a parameter between steps; its dtype does not matter."""
    return 4 + layout_bytes(QGaLoreAdamW._layout(tuple(shape), rank))


METHOD = Method(
    key="qgalore",
    slot="optimizer",
    writes={
        ("optimizer", "form"): "8-bit moments, 4-bit bases",
        ("optimizer", "extent"): "two moments in a subspace of each matrix",
    },
    apply=lambda named, lr, rank=128, gap=200, weight_decay=0.0: QGaLoreAdamW(
        [p for _, p in named], lr, rank=rank, gap=gap, weight_decay=weight_decay
    ),
    knobs={"rank": (128, 256, 64, 16), "gap": (200, 50)},
    quality=lambda rank=128, gap=200: Quality("lossy", 0.05, "holdfast check qgalore"),
    state_bytes=state_bytes,
)
