"""MemSave (172): do not store what a frozen parameter will never need.

Keeps    a layer's input only if its weight needs a gradient; masks and window indices otherwise.
Form     ReLU and Dropout 1 bit per element; MaxPool the position in the window, 1 byte mostly.
Bytes    Conv, ConvTranspose, BatchNorm in eval: N*b if the weight is trainable, else 0;
         ReLU, Dropout: ceil(N/8); MaxPool: 1 per output up to 256 window positions;
         RMSNorm: N*b + 4 per row; gated MLP: 2*N*b for its product act(gate) * up instead of 3;
         everything else as in PyTorch.
Source   Bhatia, Dangel, "Lowering PyTorch's memory consumption for selective differentiation",
         2024; method of the paper.
Departs  masks take one bit, not one byte; the mask of Dropout is kept instead of replayed;
         RMSNorm is added, because the one of Hugging Face keeps two fp32 copies of its input, and
         the gated MLP, because act(gate) costs less to compute again than to keep.

Linear, LayerNorm and BatchNorm in training are left alone: PyTorch keeps no more than needed there.
A mask costs its bits even where the next layer keeps the output of the ReLU anyway (1/32 in fp32).
Calls of `torch.nn.functional` inside other modules are out of reach.
"""

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.plan.method import Method
from holdfast.training.saved.lean import (
    autocast,
    first_order,
    grads_wanted,
    pack_mask,
    report,
    swap_classes,
    where_set,
)

if TYPE_CHECKING:
    # A mixin here reads the attributes of whatever layer it is mixed into.
    _Layer: TypeAlias = Any
else:
    _Layer = object

_aten = torch.ops.aten


def _shape_only(like: Tensor, shape: torch.Size) -> Tensor:
    """A tensor of `shape` that takes one element of memory, where a kernel reads only the shape."""
    return like.new_empty(1).expand(shape)


class Convolution(torch.autograd.Function):
    """`aten.convolution` that keeps x only for dW and W only for dx."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, settings: tuple) -> Tensor:
        need_x, need_weight, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if need_weight else None, weight if need_x else None)
        ctx.shapes, ctx.settings = (x.shape, weight.shape), settings
        return _aten.convolution(x, weight, bias, *settings)

    @staticmethod
    @first_order
    def backward(ctx, gy: Tensor):
        x, weight = (
            kept if kept is not None else _shape_only(gy, shape)
            for kept, shape in zip(ctx.saved_tensors, ctx.shapes, strict=True)
        )
        transposed = ctx.settings[3]
        out = weight.shape[1] * ctx.settings[5] if transposed else weight.shape[0]
        needs = list(ctx.needs_input_grad[:3])
        return *_aten.convolution_backward(gy, x, weight, [out], *ctx.settings, needs), None


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, module, padding, transposed, output_padding
) -> Tensor:
    x, weight, bias = autocast(x, weight, bias)
    single = x.dim() == weight.dim() - 1
    settings = (module.stride, padding, module.dilation, transposed, output_padding, module.groups)
    y = Convolution.apply(x.unsqueeze(0) if single else x, weight, bias, settings)
    return y.squeeze(0) if single else y


class _LeanConv(_Layer):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # PyTorch keeps no more than we would where both gradients are wanted.
        both = x.requires_grad and weight.requires_grad
        if both or not grads_wanted(x, weight, bias) or self.padding_mode != "zeros":
            return super()._conv_forward(x, weight, bias)
        padding = self.padding
        if isinstance(padding, str):
            pads = self._reversed_padding_repeated_twice
            if pads[::2] != pads[1::2]:
                x, pads = F.pad(x, pads), [0] * len(pads)
            padding = tuple(reversed(pads[::2]))
        zeros = (0,) * len(self.stride)
        return _convolve(x, weight, bias, self, padding, False, zeros)


class _LeanConvTranspose(_Layer):
    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        both = x.requires_grad and self.weight.requires_grad
        if both or not grads_wanted(x, self.weight, self.bias):
            return super().forward(x, output_size)
        out_pad = self._output_padding(
            x, output_size, self.stride, self.padding, self.kernel_size, len(self.stride),
            self.dilation,
        )  # fmt: skip
        return _convolve(x, self.weight, self.bias, self, self.padding, True, tuple(out_pad))


class BatchNormEval(torch.autograd.Function):
    """Batch norm with fixed statistics: affine per channel, so that dx needs no x."""

    @staticmethod
    def forward(ctx, x, weight, bias, mean, var, eps: float) -> Tensor:
        # Parameters and buffers belong to the model: keeping them costs nothing.
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight, mean, var)
        ctx.eps = eps
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    @first_order
    def backward(ctx, gy: Tensor):
        x, weight, mean, var = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:3])
        if x is not None:
            grads = _aten.native_batch_norm_backward(
                gy, x, weight, mean, var, None, None, False, ctx.eps, needs
            )
            return *grads, None, None, None
        gx = gb = None
        if needs[0]:
            scale = (var + ctx.eps).rsqrt()
            scale = scale if weight is None else scale * weight
            gx = gy * scale.to(gy.dtype).view(-1, *[1] * (gy.dim() - 2))
        if needs[2]:
            gb = gy.sum([0, *range(2, gy.dim())])
        return gx, None, gb, None, None, None


class _LeanBatchNorm(_Layer):
    def forward(self, x: Tensor) -> Tensor:
        fixed = not self.training and self.running_var is not None
        if not fixed or not grads_wanted(x, self.weight, self.bias):
            return super().forward(x)
        self._check_input_dim(x)
        return BatchNormEval.apply(
            x, self.weight, self.bias, self.running_mean, self.running_var, self.eps
        )


class ReLUMask(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, inplace: bool) -> Tensor:
        # Like PyTorch's, the gradient passes where x is NaN: that is not <= 0.
        ctx.save_for_backward(pack_mask((x <= 0).logical_not_()))
        if inplace:
            ctx.mark_dirty(x)
            return x.relu_()
        return x.relu()

    @staticmethod
    @first_order
    def backward(ctx, gy: Tensor):
        return where_set(ctx.saved_tensors[0], gy), None


class _LeanReLU(_Layer):
    def forward(self, x: Tensor) -> Tensor:
        if not grads_wanted(x):
            return super().forward(x)
        return ReLUMask.apply(x, self.inplace and not x._is_view())


class DropoutMask(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, p: float) -> Tensor:
        # This operator draws the same numbers as F.dropout on every device.
        y, kept = _aten.native_dropout(x, p, True)
        ctx.scale = 1 / (1 - p)
        ctx.save_for_backward(pack_mask(kept))
        return y

    @staticmethod
    @first_order
    def backward(ctx, gy: Tensor):
        return where_set(ctx.saved_tensors[0], gy).mul_(ctx.scale), None


class _LeanDropout(_Layer):
    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not 0 < self.p < 1 or not grads_wanted(x):
            return super().forward(x)
        return DropoutMask.apply(x, self.p)


class MaxPoolIndices(torch.autograd.Function):
    """Max pooling that keeps, per output, which position of its window won."""

    @staticmethod
    def forward(ctx, x: Tensor, module: nn.Module, dims: int) -> Tensor:
        pool: Callable[..., Any] = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[dims - 1]
        kernel, stride, padding, dilation = window = tuple(
            _per_dim(getattr(module, name), dims)
            for name in ("kernel_size", "stride", "padding", "dilation")
        )
        y, index = pool(
            x, kernel, stride, padding, dilation, ceil_mode=module.ceil_mode, return_indices=True
        )
        ctx.shape, ctx.window = x.shape, window
        corner, steps = _windows(x.shape[-dims:], y.shape[-dims:], window, x.device)
        count = math.prod(kernel)
        code = torch.uint8 if count <= 2**8 else torch.int16 if count <= 2**15 else torch.int32
        # Looked up by the step itself: searching or dividing takes ten times as long on a CPU.
        reach = sum(
            (k - 1) * d * math.prod(x.shape[x.dim() - dims + i + 1 :])
            for i, (k, d) in enumerate(zip(kernel, dilation, strict=True))
        )
        position = torch.zeros(reach + 1, dtype=code, device=x.device)
        position[steps] = torch.arange(count, dtype=code, device=x.device)
        step = (index - corner).flatten()
        ctx.save_for_backward(position.index_select(0, step).view(y.shape))
        return y

    @staticmethod
    @first_order
    def backward(ctx, gy: Tensor):
        (code,) = ctx.saved_tensors
        dims = len(ctx.window[0])
        corner, steps = _windows(ctx.shape[-dims:], gy.shape[-dims:], ctx.window, gy.device)
        step = steps.index_select(0, code.flatten().int()).view(code.shape)
        gx = gy.new_zeros(*ctx.shape[:-dims], ctx.shape[-dims:].numel())
        gx.scatter_add_(-1, step.add_(corner).flatten(-dims), gy.flatten(-dims))
        return gx.view(ctx.shape), None, None


def _per_dim(value: int | tuple, dims: int) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,) * dims


def _windows(size, out, window, device) -> tuple[Tensor, Tensor]:
    """Flat index of each window's corner (*out,), and the flat step to each of its positions.

    Both int64. Steps may coincide only where the window is wider than the input, and then they
    lead from one corner to the same element.
    """
    corner = torch.zeros((), dtype=torch.int64, device=device)
    steps, weight = corner.view(1), 1
    rows = list(zip(size, out, *window, strict=True))
    for n, o, kernel, stride, padding, dilation in reversed(rows):
        line = (torch.arange(o, device=device) * stride - padding) * weight
        corner = line.view(-1, *[1] * corner.dim()) + corner
        step = torch.arange(kernel, device=device) * (dilation * weight)
        steps = (step[:, None] + steps).flatten()
        weight *= n
    return corner, steps


class _LeanMaxPool(_Layer):
    def forward(self, x: Tensor) -> Tensor:
        if self.return_indices or not grads_wanted(x):
            return super().forward(x)
        kinds = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
        dims = next(d for d, kind in enumerate(kinds, start=1) if isinstance(self, kind))
        return MaxPoolIndices.apply(x, self, dims)


class RMSNormInput(torch.autograd.Function):
    """RMS norm over the last dimension that keeps x as it came and one fp32 number per row."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        rstd = wide.pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight if ctx.needs_input_grad[0] else None, rstd)
        y = (wide * rstd).to(x.dtype)
        return y if weight is None else weight * y

    @staticmethod
    @first_order
    def backward(ctx, gy: Tensor):
        x, weight, rstd = ctx.saved_tensors
        unit = x * rstd  # in fp32 at least, like rstd
        gx = gw = None
        if ctx.needs_input_grad[1]:
            gw = (gy * unit.to(x.dtype)).sum(list(range(gy.dim() - 1)))
        if ctx.needs_input_grad[0]:
            g = (gy if weight is None else gy * weight).to(rstd.dtype)
            gx = ((g - unit * (g * unit).mean(-1, keepdim=True)) * rstd).to(x.dtype)
        return gx, gw, None


class _LeanRMSNorm(_Layer):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if not grads_wanted(x, weight) or (weight is not None and weight.dtype != x.dtype):
            return super().forward(x)
        if isinstance(self, nn.RMSNorm):
            eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        else:
            eps = self.variance_epsilon
        return RMSNormInput.apply(x, weight, eps)


class GatedProduct(torch.autograd.Function):
    """act(gate) * up that keeps gate and up; act(gate) is computed again in backward."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.act = act
        ctx.save_for_backward(gate, up)
        return act(gate) * up

    @staticmethod
    @first_order
    def backward(ctx, gy: Tensor):
        gate, up = ctx.saved_tensors
        with torch.enable_grad():
            leaf = gate.detach().requires_grad_()
            active = ctx.act(leaf)
        ggate = gup = None
        if ctx.needs_input_grad[1]:
            gup = gy * active.detach()
        if ctx.needs_input_grad[0]:
            (ggate,) = torch.autograd.grad(active, leaf, gy * up)
        return ggate, gup, None


class LeanGatedMLP(_Layer):
    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if not grads_wanted(gate, up):
            return self.down_proj(self.act_fn(gate) * up)
        return self.down_proj(GatedProduct.apply(gate, up, self.act_fn))


def _twins() -> dict[type, type]:
    twins: dict[type, type] = {}
    for mixin, names in {
        _LeanConv: ("Conv1d", "Conv2d", "Conv3d"),
        _LeanConvTranspose: ("ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"),
        _LeanBatchNorm: ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d"),
        _LeanMaxPool: ("MaxPool1d", "MaxPool2d", "MaxPool3d"),
        _LeanReLU: ("ReLU",),
        _LeanDropout: ("Dropout",),
        _LeanRMSNorm: ("RMSNorm",),
    }.items():
        for name in names:
            base = getattr(nn, name)
            # Reachable under its own name, so that a pickled model finds it again.
            twin = type(f"Lean{name}", (mixin, base), {"__module__": __name__})
            globals()[twin.__name__] = twins[base] = twin
    return twins


_TWINS = _twins()


def _code(function: Callable) -> tuple:
    code = function.__code__
    return code.co_code, code.co_names, code.co_varnames


@functools.cache
def _hf_twins() -> dict[tuple, type]:
    from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
    from transformers.models.t5.modeling_t5 import T5LayerNorm

    return {
        _code(LlamaRMSNorm.forward): _LeanRMSNorm,
        _code(T5LayerNorm.forward): _LeanRMSNorm,
        _code(LlamaMLP.forward): LeanGatedMLP,
    }


def _mixin_of_hf(kind: Any) -> type | None:
    """The mixin for a class of transformers that computes what a known one of LLaMA or T5 does.

    The library copies these classes from model to model under other names, and a few differ in a
    line: the compiled code tells them apart, a list of names would age.
    """
    if not kind.__module__.startswith("transformers.models."):
        return None
    return _hf_twins().get(_code(kind.forward)) if hasattr(kind.forward, "__code__") else None


def twin(module: nn.Module) -> type | None:
    """The lean class of a module, or None: subclasses are not known to compute the same."""
    kind = type(module)
    if kind not in _TWINS:
        mixin = _mixin_of_hf(kind)
        if mixin is None:
            return None
        _TWINS[kind] = type(f"Lean{kind.__name__}", (mixin, kind), {"__module__": __name__})
    return _TWINS[kind]


def gated_twin(module: nn.Module) -> type | None:
    """`twin` for gated MLPs alone."""
    return twin(module) if _mixin_of_hf(type(module)) is LeanGatedMLP else None


def memsave(model: nn.Module) -> nn.Module:
    """Convert every layer that is known by its class, in place; returns `model`.

    Later changes of `requires_grad` and of train or eval mode are respected in each call. What was
    converted is logged. Outputs and gradients stay as they were; there is no double backward.
    """
    report("memsave", swap_classes(model, twin))
    return model


def _applies(model: nn.Module) -> str | None:
    if any(twin(module) for module in model.modules()):
        return None
    return (
        "no layer that keeps more than it needs: no convolution, ReLU, Dropout, RMSNorm, gated MLP"
    )


METHOD = Method(
    key="memsave",
    slot="saved",
    writes={("activations", "extent"): "only what a gradient needs"},
    apply=memsave,
    applies=_applies,
)
