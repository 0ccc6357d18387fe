"""PEQA (177): round the weights to integers, then train nothing but their scales.

Keeps    per linear (m, n) with G groups a row: codes and zeros, frozen; the rounding's scales;
         their relative change, trained. For backward x, or with one scale a row the narrower
         of x and the unscaled output.
Form     codes of `bits` bits; zeros of one byte; scales and change in the dtype of the weight, or
         `dtype` for the change.
Bytes    m * ceil(n * bits / 8) + m * G, and m * G elements of scale, and of change. No (m, n) float
         ever lives: weights are decoded in tiles of `TILE` elements, backward too.
Source   Kim, Lee, Kim, Park, Yoo, Kwon, Lee, Memory-efficient fine-tuning of compressed large
         language models via sub-4-bit integer quantization, NeurIPS 2023.
Departs  trains the relative change of a scale, not the scale: one learning rate then suits all
         layers and bit widths, whose scales differ by orders of magnitude, and bfloat16 moves it
         in finer steps. Rounding is to the nearest, over each group's range with zero included.
"""

import math
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from holdfast.attach import features
from holdfast.errors import UsageError
from holdfast.forms.bits import pack, packed_nbytes, unpack
from holdfast.plan.method import Method, Quality
from holdfast.training.adapters.base import Adapter, attach, refuse_tied

TILE = 1 << 20
BITS = (4, 3, 2, 8)


def quantize(w: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Round to the nearest, per group of `group` neighbours in a row.

    w (m, n) -> codes (m, n) uint8, zeros (m, n / group) uint8, scales (m, n / group) fp32 with
    w ~ scale * (code - zero).
    """
    top = 2**bits - 1
    groups = w.float().unflatten(1, (-1, group))
    low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    scale = (high - low) / top
    scale = torch.where(scale > 0, scale, 1.0)
    zero = (-low / scale).round().clamp(0, top)
    codes = (groups / scale[..., None]).round() + zero[..., None]
    return codes.clamp_(0, top).flatten(1).to(torch.uint8), zero.to(torch.uint8), scale


def spans(size: int, step: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + step, size)) for start in range(0, size, step))


class Grid:
    """The frozen integers of one linear, decoded a tile at a time."""

    def __init__(self, codes: Tensor, zeros: Tensor, bits: int, columns: int):
        self.codes, self.zeros, self.bits, self.columns = codes, zeros, bits, columns
        self.group = columns // zeros.shape[1]
        self.per_row = zeros.shape[1] == 1

    def row_spans(self) -> Iterator[tuple[int, int]]:
        return spans(len(self.codes), max(1, TILE // self.columns))

    def column_spans(self) -> Iterator[tuple[int, int]]:
        # Tiles start on a byte and on a group.
        unit = 8 if self.per_row else math.lcm(8, self.group)
        return spans(self.columns, max(1, TILE // len(self.codes) // unit) * unit)

    def rows(self, start: int, end: int) -> Tensor:
        """code - zero of some rows, (end - start, columns) fp32."""
        return self._decode(self.codes[start:end], self.zeros[start:end], self.columns)

    def over_columns(self, start: int, end: int) -> Tensor:
        """code - zero of some columns, (rows, end - start) fp32."""
        first = start * self.bits // 8
        part = self.codes[:, first : first + packed_nbytes(end - start, self.bits)]
        return self._decode(part, self.zeros[:, self.groups(start, end)], end - start)

    def groups(self, start: int, end: int) -> slice:
        return slice(0, 1) if self.per_row else slice(start // self.group, end // self.group)

    def _decode(self, packed: Tensor, zeros: Tensor, columns: int) -> Tensor:
        tile = unpack(packed, self.bits, columns).float()
        grouped(tile, zeros).sub_(zeros[..., None])
        return tile


def grouped(tile: Tensor, per_group: Tensor) -> Tensor:
    """View (rows, columns) as (rows, G, columns / G)."""
    return tile.view(len(tile), per_group.shape[1], -1)


def changed(scale: Tensor, change: Tensor) -> Tensor:
    """scale (1 + change) in fp32, kept above a thousandth of the scale."""
    factor = 1 + change.float()
    # To look at values would wait for a GPU, and cannot be done on fake ones.
    here = factor.device.type == "cpu" and not isinstance(factor, FakeTensor)
    if here and bool((factor.detach() <= 0).any()):
        warnings.warn(
            "a scale reached zero and is held at a thousandth of its start; "
            "lower the learning rate",
            stacklevel=3,
        )
    # Clamped in value, not in gradient, so that a scale can come back.
    held = factor + (factor.detach().clamp(min=1e-3) - factor.detach())
    return scale.float() * held


class _ScaledLinear(torch.autograd.Function):
    """x (t, n), scale (m, G) fp32, grid, bias (m,) or None -> (t, m)."""

    @staticmethod
    def forward(ctx, x, scale, codes, zeros, bits, bias):
        grid = Grid(codes, zeros, bits, x.shape[1])
        y = x.new_empty(len(x), len(codes))
        # One scale a row: d scale is a sum over (gradient * unscaled output), or comes from x.
        keeps_y = grid.per_row and y.shape[1] < x.shape[1]
        unscaled = torch.empty_like(y) if keeps_y else None
        for start, end in grid.row_spans():
            tile, part = grid.rows(start, end), y[:, start:end]
            if not grid.per_row:
                grouped(tile, scale).mul_(scale[start:end, :, None])
                torch.mm(x, tile.to(x.dtype).mT, out=part)
                continue
            product = x @ tile.to(x.dtype).mT
            torch.mul(product, scale[start:end, 0], out=part)
            if unscaled is not None:
                unscaled[:, start:end] = product
        if bias is not None:
            y += bias
        ctx.save_for_backward(x if unscaled is None else unscaled, scale, codes, zeros)
        ctx.bits, ctx.columns, ctx.keeps_y = bits, x.shape[1], unscaled is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        kept, scale, codes, zeros = ctx.saved_tensors
        grid = Grid(codes, zeros, ctx.bits, ctx.columns)
        needs_x, needs_scale = ctx.needs_input_grad[:2]
        gx: Any = g.new_empty(len(g), ctx.columns) if needs_x else None
        gscale: Any = torch.zeros_like(scale) if needs_scale else None
        # The same unscaled tile serves both, so the scale goes to the gradient where it can.
        scaled_g = g * scale[:, 0].to(g.dtype) if needs_x and grid.per_row else g
        if needs_scale and ctx.keeps_y:
            gscale[:, 0] = torch.linalg.vecdot(g.float(), kept.float(), dim=0)
        if not needs_x and (ctx.keeps_y or not needs_scale):
            return None, gscale, None, None, None, None
        for start, end in grid.column_spans():
            tile, of = grid.over_columns(start, end), grid.groups(start, end)
            if needs_scale and not ctx.keeps_y:
                gw = (g.mT @ kept[:, start:end]).float().mul_(tile)
                gscale[:, of] += grouped(gw, scale[:, of]).sum(2)
                del gw
            if needs_x:
                if not grid.per_row:
                    grouped(tile, scale[:, of]).mul_(scale[:, of, None])
                torch.mm(scaled_g, tile.to(g.dtype), out=gx[:, start:end])
        return gx, gscale, None, None, None, None


class PEQA(Adapter):
    """y = s (1 + c) (q - z) x + b with frozen integers q, z and scales s; c starts at zero.

    Attaching frees the dense weight; `detach` and `merge` give the rounded one back. In a file,
    adapter_config.json has `peft_type` "PEQA", `bits` and `group` (null: one scale a row), and the
    tensors are c, one (m, G) `scale_change` a linear: a task, for any copy of the same base.

    Args:
        bits: of a code: 2, 3, 4 or 8.
        group: neighbours in a row that share a scale; None is the whole row.
        dtype: of c; None is the weight's.

    Raises:
        UsageError: other bits, or a group that does not divide the input features.
    """

    key = "peqa"
    trainable = ("scale_change",)
    codes: Tensor
    zeros: Tensor
    scale: Tensor

    def __init__(
        self,
        linear: nn.Module,
        *,
        bits: int = 4,
        group: int | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(linear)
        _check(linear, "this linear", bits, group)
        weight, self.bits = self.weight, bits
        self.weight_required_grad = weight.requires_grad
        span = group or self.in_features
        m, count = self.out_features, self.in_features // span
        self.register_buffer(
            "codes", weight.new_empty(m, packed_nbytes(self.in_features, bits), dtype=torch.uint8)
        )
        self.register_buffer("zeros", weight.new_empty(m, count, dtype=torch.uint8))
        self.register_buffer("scale", weight.new_empty(m, count))
        dense = weight.detach().mT if self.transposed else weight.detach()
        for start, end in spans(m, max(1, TILE // self.in_features)):
            codes, zeros, scale = quantize(dense[start:end], bits, span)
            self.codes[start:end] = pack(codes, bits)
            self.zeros[start:end] = zeros
            self.scale[start:end] = scale
        self.scale_change = nn.Parameter(torch.zeros_like(self.scale, dtype=dtype or weight.dtype))
        self.register_parameter("weight", None)
        linear.register_parameter("weight", None)

    @classmethod
    def shared(cls, model: nn.Module, linears: Mapping[str, nn.Module], **knobs: Any) -> dict:
        for name, linear in linears.items():
            _check(linear, name, knobs["bits"], knobs["group"])
        refuse_tied(model, linears)
        return {}

    def scales(self) -> Tensor:
        """s (1 + c) in fp32 (m, G), kept above a thousandth of s."""
        return changed(self.scale, self.scale_change)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., n) -> (..., m)."""
        kind = x.device.type
        autocast = kind != "meta" and torch.is_autocast_enabled(kind)
        flat = x.reshape(-1, self.in_features)
        flat = flat.to(torch.get_autocast_dtype(kind)) if autocast else flat
        bias = self.bias.to(flat.dtype) if self.bias is not None else None
        y = _ScaledLinear.apply(flat, self.scales(), self.codes, self.zeros, self.bits, bias)
        return y.view(*x.shape[:-1], self.out_features)

    def _with(self, scale: Tensor) -> nn.Module:
        (linear,) = self.replaced
        m, n = self.out_features, self.in_features
        grid = Grid(self.codes, self.zeros, self.bits, n)
        dense = self.scale.new_empty((n, m) if self.transposed else (m, n))
        for start, end in grid.row_spans():
            tile = grid.rows(start, end)
            grouped(tile, scale).mul_(scale[start:end, :, None])
            (dense.mT if self.transposed else dense)[start:end] = tile
        linear.weight = nn.Parameter(dense, requires_grad=self.weight_required_grad)
        linear.bias = self.bias
        return linear.train(self.training)

    def restored(self) -> nn.Module:
        return self._with(self.scale.float())

    def merged(self) -> nn.Module:
        return self._with(self.scales().detach())

    @classmethod
    def to_file(cls, knobs: Mapping[str, Any]) -> dict[str, Any]:
        return {"peft_type": "PEQA", "bits": knobs["bits"], "group": knobs["group"]}

    @classmethod
    def from_file(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        return {"bits": config["bits"], "group": config["group"]}


def _check(linear: nn.Module, name: str, bits: int, group: int | None) -> None:
    inputs, _ = features(linear)
    if bits not in BITS:
        raise UsageError(f"bits={bits} is not a size of code; use 2, 3, 4 or 8")
    if group is not None and (group < 1 or inputs % group):
        raise UsageError(
            f"group={group} does not divide the {inputs} inputs of {name}; "
            f"use a divisor, for example {math.gcd(inputs, 64)}, or None for one scale a row"
        )


ADAPTER = PEQA


def _apply(model: nn.Module, *, bits: int) -> nn.Module:
    return attach(model, "peqa", bits=bits)


METHOD = Method(
    key="peqa",
    slot="adapter",
    writes={
        ("parameters", "form"): "integer codes with scales",
        ("parameters", "extent"): "all; scales train",
    },
    apply=_apply,
    knobs={"bits": (4, 3)},
    automatic=False,
    quality=lambda bits=4: Quality("lossy", 0.02, "holdfast check peqa"),
    forbids={key: "PEQA writes the weights in its own form" for key in ("int4", "int8")},
)
