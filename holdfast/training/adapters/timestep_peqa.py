"""Timestep PEQA (187): one integer denoiser, and a set of scales for each interval of timesteps.

Keeps    the codes of a diffusion model once, frozen; per interval the relative change of every
         scale. A training step of one interval has gradients for that interval's set alone.
Form     codes of `bits` bits, zeros of one byte; scales and changes in the dtype of the weight.
Bytes    PEQA's codes, zeros and scales once, and K times the elements of the scales for K
         intervals; 12 bytes a scale of the sets that train in fp32.
Source   Ryu, Lim, Shim, Memory-efficient personalization using quantized diffusion model, ECCV
         2024; scales as in Kim et al., PEQA, NeurIPS 2023; objective: Ruiz et al., DreamBooth,
         CVPR 2023.
Departs  weights alone are quantised, to the nearest, so that nothing is calibrated. A convolution
         after a skip concatenation gets its own scales for each part through `group`.
No planner record: a plan describes training on text, which has no timesteps.
"""

import inspect
import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from holdfast.attach import linears, swap, wrap
from holdfast.errors import UsageError, unknown
from holdfast.forms.bits import pack
from holdfast.training.adapters.base import attach
from holdfast.training.adapters.peqa import (
    BITS,
    PEQA,
    TILE,
    Grid,
    changed,
    grouped,
    quantize,
    spans,
)


class _ScaledConv(torch.autograd.Function):
    """x (B, C, H, W), scale (m, G) fp32, codes, zeros, bias (m,) or None -> (B, m, H', W')."""

    @staticmethod
    def forward(ctx, x, scale, codes, zeros, bias, layer):
        ctx.layer = layer
        ctx.save_for_backward(x, scale, codes, zeros)
        parts = []
        for rows, tile in layer.tiles(codes, zeros):
            grouped(tile, scale).mul_(scale[rows, :, None])
            part = None if bias is None else bias[rows]
            parts.append(F.conv2d(x, layer.kernel(tile, x), part, **layer.options))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, scale, codes, zeros = ctx.saved_tensors
        layer, (needs_x, needs_scale) = ctx.layer, ctx.needs_input_grad[:2]
        gx: Any = None
        gscale: Any = torch.empty_like(scale) if needs_scale else None
        stride, padding, dilation, groups = layer.options.values()
        for rows, tile in layer.tiles(codes, zeros):
            scaled = tile.clone()
            grouped(scaled, scale).mul_(scale[rows, :, None])
            part, gw, _ = torch.ops.aten.convolution_backward(
                g[:, rows], x, layer.kernel(scaled, x), None, stride, padding, dilation,
                False, [0, 0], groups, [needs_x, needs_scale, False],
            )  # fmt: skip
            if needs_x:
                gx = part if gx is None else gx.add_(part)
            if needs_scale:
                gscale[rows] = grouped(gw.flatten(1).float().mul_(tile), scale).sum(2)
        return gx, gscale, None, None, None, None


class PEQAConv2d(nn.Module):
    """A 2-D convolution by s (1 + c) (q - z) with frozen integers q, z and scales s; c trains.

    Weights are decoded in tiles of output channels; a convolution in groups is decoded whole.

    Args:
        conv: gives its bias and its numbers; its weight is not kept.
        bits: of a code: 2, 3, 4 or 8.
        group: input channels that share a scale, a divisor of those that a filter sees; None is
            all. The channels of one side of a concatenation, so that each side has its own.

    Raises:
        UsageError: other bits, a group that does not divide, or another padding than zeros.
    """

    codes: Tensor
    zeros: Tensor
    scale: Tensor

    def __init__(self, conv: nn.Conv2d, *, bits: int = 4, group: int | None = None):
        super().__init__()
        if bits not in BITS:
            raise UsageError(f"bits={bits} is not a size of code; use 2, 3, 4 or 8")
        if isinstance(conv.padding, str) or conv.padding_mode != "zeros":
            raise UsageError(
                f"padding={conv.padding!r} with mode {conv.padding_mode!r}; PEQAConv2d pads by "
                "numbers, with zeros: leave this convolution out"
            )
        channels = conv.in_channels // conv.groups
        if group is not None and (group < 1 or channels % group):
            raise UsageError(
                f"group={group} does not divide the {channels} input channels of a filter; "
                "use a divisor, or None for one scale a filter"
            )
        self.bits, self.kernel_shape = bits, conv.weight.shape[1:]
        self.options: dict[str, Any] = {
            "stride": conv.stride,
            "padding": conv.padding,
            "dilation": conv.dilation,
            "groups": conv.groups,
        }
        self.columns = self.kernel_shape.numel()
        dense = conv.weight.detach().flatten(1)
        codes, zeros, scale = quantize(dense, bits, self.columns * (group or channels) // channels)
        self.register_buffer("codes", pack(codes, bits))
        self.register_buffer("zeros", zeros)
        self.register_buffer("scale", scale.to(dense.dtype))
        self.scale_change = nn.Parameter(torch.zeros_like(self.scale))
        self.register_parameter("bias", conv.bias)

    def tiles(self, codes: Tensor, zeros: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """code - zero, (rows, columns) fp32, of some output channels at a time."""
        grid = Grid(codes, zeros, self.bits, self.columns)
        step = max(1, TILE // self.columns) if self.options["groups"] == 1 else len(codes)
        for start, end in spans(len(codes), step):
            yield slice(start, end), grid.rows(start, end)

    def kernel(self, tile: Tensor, like: Tensor) -> Tensor:
        return tile.view(-1, *self.kernel_shape).to(like.dtype)

    def scales(self) -> Tensor:
        """s (1 + c) in fp32 (m, G), kept above a thousandth of s."""
        return changed(self.scale, self.scale_change)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, m, H', W')."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return _ScaledConv.apply(x, self.scales(), self.codes, self.zeros, bias, self)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, filters={len(self.codes)}, scales={self.scale.numel()}"


def quantize_denoiser(model: nn.Module, bits: int = 4, *, exclude: Iterable[str] = ()) -> nn.Module:
    """Write the linears and 2-D convolutions of a denoiser as integers, in place; scales train.

    Everything else is frozen.

    Args:
        bits: of a code: 2, 3, 4 or 8; one scale an output.
        exclude: full names of modules to leave as they are, usually the first and last.

    Raises:
        UsageError: an unknown name, or a layer that cannot be written so.
    """
    convs = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    names = [*linears(model), *convs]
    for name in exclude:
        if name not in names:
            raise unknown("linear or convolution", name, names)
    made = {n: PEQAConv2d(m, bits=bits) for n, m in convs.items() if n not in exclude}
    if chosen := [n for n in linears(model) if n not in exclude]:
        attach(model, "peqa", chosen, bits=bits)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name, conv in made.items():
        swap(model, name, conv)
    for layer in _layers(model):
        layer.scale_change.requires_grad_(True)
    return model


def _layers(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, PEQA | PEQAConv2d)]


class TimestepScales(nn.Module):
    """Gives a denoiser of PEQA layers one set of scales per interval of timesteps.

    The interval k holds `edges[k] <= t < edges[k + 1]`. From now on a call of the model looks at
    its timesteps and uses the sets of their intervals, so that samplers and training loops stay as
    they are; a batch of several intervals is sorted and run in parts. Every set starts as the
    scales that the model has. Parameters and state dict of this module are the sets alone: a task.

    Args:
        model: made by `quantize_denoiser`, or with the adapter `peqa`.
        edges: whole numbers, ascending; the first and last bound all timesteps.
        trained: intervals whose sets train; the others keep the scales that the model has.
        timestep: of the model's call, the position or name of the timesteps: an integer, or a
            tensor of none or B elements.

    Raises:
        UsageError: edges that do not ascend, an unknown interval, or a model without PEQA layers.
    """

    def __init__(
        self,
        model: nn.Module,
        edges: Sequence[int],
        *,
        trained: Iterable[int] | None = None,
        timestep: int | str = 1,
    ):
        super().__init__()
        layers = _layers(model)
        if not layers:
            raise UsageError(
                f"{type(model).__name__} has no PEQA layer; quantize_denoiser(model) makes them"
            )
        if len(edges) < 2 or any(a >= b for a, b in itertools.pairwise(edges)):
            raise UsageError(
                f"edges={list(edges)} overlap or are empty; expected ascending bounds, for "
                "example [0, 500, 1000] for two intervals"
            )
        count = len(edges) - 1
        chosen = set(range(count) if trained is None else trained)
        if not chosen <= set(range(count)):
            raise UsageError(
                f"trained={sorted(chosen)}, but the intervals of {list(edges)} are "
                f"{list(range(count))}"
            )
        self.edges = list(edges)
        self.sets = nn.ModuleList(
            nn.ParameterList(
                nn.Parameter(layer.scale_change.detach().clone(), requires_grad=k in chosen)
                for layer in layers
            )
            for k in range(count)
        )
        names = list(inspect.signature(model.forward).parameters)
        if isinstance(timestep, str) and timestep not in names:
            raise unknown("argument of the model", timestep, names)
        position = names.index(timestep) if isinstance(timestep, str) else timestep
        self._timestep = position, names[position]
        # In tuples: the model is no child, so that the state dict holds the sets alone.
        self._model, self._of = (model,), tuple(layers)
        self._chosen = False
        self._select(0)
        self._handle = wrap(model, self._route)

    def interval(self, t: int | Tensor) -> Tensor:
        """Index of the interval of each timestep, of the shape of t.

        Raises:
            UsageError: a timestep in no interval.
        """
        t = torch.as_tensor(t)
        outside = (t < self.edges[0]) | (t >= self.edges[-1])
        if bool(outside.any()):
            raise UsageError(
                f"timestep {t[outside].flatten()[0].item()} lies in no interval of {self.edges}; "
                "let the edges bound all timesteps"
            )
        inner = torch.tensor(self.edges[1:-1], device=t.device, dtype=torch.int64)
        return torch.bucketize(t.long(), inner, right=True)

    @contextmanager
    def at(self, t: int | Tensor) -> Iterator[None]:
        """Use the set of t's interval in whatever runs inside, also parts of the model.

        Raises:
            UsageError: timesteps of several intervals, which only a call of the model can part.
        """
        found = self.interval(t).unique()
        if len(found) != 1:
            raise UsageError(
                f"timesteps of {len(found)} intervals at once; call the model, which sorts them, "
                "or use at() for one interval"
            )
        before = self._chosen
        self._select(int(found))
        self._chosen = True
        try:
            yield
        finally:
            self._chosen = before
            if not before:
                self._select(0)

    def remove(self, keep: int = 0) -> nn.Module:
        """The model, free of this module; it goes on with the set of the interval `keep`."""
        self._handle.remove()
        self._select(keep)
        return self._model[0]

    def _select(self, k: int) -> None:
        for layer, change in zip(self._of, self.sets[k], strict=True):
            layer._parameters["scale_change"] = change

    def _route(self, forward: Any, *args: Any, **kwargs: Any) -> Any:
        if self._chosen:
            return forward(*args, **kwargs)
        position, name = self._timestep
        t = kwargs[name] if name in kwargs else args[position]
        intervals = self.interval(t)
        several = intervals.unique().tolist()
        self._refuse_recompute()
        if len(several) == 1:
            with self.at(t):
                return forward(*args, **kwargs)
        outputs, order = [], []
        for k in several:
            rows = (intervals == k).nonzero()[:, 0]
            part = tree_map(lambda value, rows=rows: _rows(value, rows, len(intervals)), args)
            named = tree_map(lambda value, rows=rows: _rows(value, rows, len(intervals)), kwargs)
            with self.at(self.edges[k]):
                outputs.append(tree_flatten(forward(*part, **named)))
            order.append(rows)
        back = torch.cat(order).argsort()
        joined = [torch.cat(parts)[back] for parts in zip(*(o for o, _ in outputs), strict=True)]
        return tree_unflatten(joined, outputs[0][1])

    def _refuse_recompute(self) -> None:
        active = (m for m in self._model[0].modules() if getattr(m, "gradient_checkpointing", 0))
        if torch.is_grad_enabled() and (module := next(active, None)) is not None:
            raise UsageError(
                f"{type(module).__name__} recomputes in backward, when the scales are those of "
                "another interval; switch gradient checkpointing off"
            )


def _rows(value: Any, rows: Tensor, batch: int) -> Any:
    per_sample = isinstance(value, Tensor) and value.dim() > 0 and len(value) == batch
    return value[rows.to(value.device)] if per_sample else value
