"""COAT (027), activations: what backward reads is kept in FP8.

Keeps    the inputs of norms and activation functions, both factors of a gated product, and the
         inputs of linears; one copy where several linears read one tensor. A linear whose weight is
         frozen keeps nothing; ReLU keeps one bit.
Form     E4M3 under an absolute maximum: of 16 neighbours, in bf16, for norms, activations and
         products; of the tensor, in fp32, for linears.
Bytes    18*ceil(N/16) per norm, activation and factor, plus 4 per row of an RMS norm and 8 per row
         of a layer norm; N + 4 per input of linears. A bf16 activation takes 2*N otherwise.
Source   Xi, Cai, Zhu, Lu, Keutzer, Chen, Han, COAT: Compressing Optimizer States and Activation for
         Memory-Efficient FP8 Training, ICLR 2025.
Departs  matrix products stay in the dtype of their inputs, so that output gradients need no E5M2
         and norm outputs no transposed copy; act(gate) is computed again instead of kept; the
         output of fused attention, which attention itself keeps, is not kept once more in FP8.

Outputs are exact; gradients see inputs to about 2^-4 of each element. There is no double backward.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.pytorch_utils import Conv1D

from holdfast.attach import is_transposed
from holdfast.forms.base import FLOATS, reciprocal
from holdfast.plan.method import Method, Quality
from holdfast.training.saved import memsave
from holdfast.training.saved.fewbit import known
from holdfast.training.saved.lean import (
    autocast,
    first_order,
    grads_wanted,
    report,
    swap_classes,
)

if TYPE_CHECKING:
    _Layer: TypeAlias = Any
else:
    _Layer = object

GROUP = 16
_E4M3 = torch.float8_e4m3fn
_LARGEST = torch.finfo(_E4M3).max
_aten = torch.ops.aten


def encode_groups(x: Tensor) -> tuple[Tensor, Tensor]:
    """x of any shape -> E4M3 codes (groups, 16), zeros at the end; bf16 steps (groups, 1)."""
    flat = x.detach().reshape(-1)
    if flat.numel() % GROUP:
        flat = F.pad(flat, (0, -flat.numel() % GROUP))
    groups = flat.view(-1, GROUP)
    low, high = torch.aminmax(groups, dim=1, keepdim=True)
    step = (torch.maximum(-low, high).float() / _LARGEST).bfloat16()
    return _codes(groups, step.float()), step


def encode_tensor(x: Tensor) -> tuple[Tensor, Tensor]:
    """x of any shape -> E4M3 codes in that shape, one fp32 step."""
    low, high = torch.aminmax(x.detach())
    step = torch.maximum(-low, high).float() / _LARGEST
    return _codes(x.detach(), step).contiguous(), step


def _codes(x: Tensor, step: Tensor) -> Tensor:
    # A rounded step may be a little small, and a number above the largest would become NaN.
    return (x * reciprocal(step)).clamp_(-_LARGEST, _LARGEST).to(_E4M3)


def decode(codes: Tensor, step: Tensor, like: Tensor, shape: torch.Size | None = None) -> Tensor:
    """What was encoded, in the dtype of `like` and in `shape`, by default its own."""
    x = codes.to(like.dtype).mul_(step)
    shape = like.shape if shape is None else shape
    return x.view(-1)[: shape.numel()].view(shape)


# Input of linears -> its version and its codes, for the next linear that reads the same tensor.
_read_before: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _encode_once(x: Tensor) -> tuple[Tensor, Tensor]:
    found = _read_before.get(x)
    if found is not None and found[0] == x._version:
        return found[1]
    encoded = encode_tensor(x)
    # A leaf may live for long, and its codes with it.
    if x.grad_fn is not None:
        _read_before[x] = (x._version, encoded)
    return encoded


_VIEWS = ("View", "UnsafeView", "ReshapeAlias", "Transpose", "Permute", "Unsqueeze", "Squeeze")


def _kept_by_attention(x: Tensor) -> bool:
    """Whether x is a view of what a fused attention keeps for its own backward pass."""
    node: Any = x.grad_fn
    while node is not None and node.name().startswith(_VIEWS):
        node = node.next_functions[0][0]
    return node is not None and node.name().startswith("ScaledDotProduct")


class LinearFp8(torch.autograd.Function):
    """x W^T + b that keeps x as codes; `turned` says that the weight is stored (in, out)."""

    @staticmethod
    def forward(ctx, x, weight, bias, codes: Tensor, step: Tensor, turned: bool) -> Tensor:
        ctx.turned, ctx.shape = turned, x.shape
        ctx.save_for_backward(codes, step, weight if ctx.needs_input_grad[0] else None)
        return F.linear(x, weight.t() if turned else weight, bias)

    @staticmethod
    @first_order
    def backward(ctx, gy: Tensor):
        codes, step, weight = ctx.saved_tensors
        gx = gw = gb = None
        flat = gy.reshape(-1, gy.shape[-1])
        if ctx.needs_input_grad[0]:
            gx = gy @ (weight.t() if ctx.turned else weight)
        if ctx.needs_input_grad[1]:
            x = decode(codes, step, gy, ctx.shape).view(-1, ctx.shape[-1])
            gw = x.t() @ flat if ctx.turned else flat.t() @ x
        if ctx.needs_input_grad[2]:
            gb = flat.sum(0)
        return gx, gw, gb, None, None, None


class _CoatLinear(_Layer):
    def forward(self, x: Tensor) -> Tensor:
        needed = torch.is_grad_enabled() and self.weight.requires_grad
        if not needed or x.dtype not in FLOATS or not x.numel() or _kept_by_attention(x):
            return super().forward(x)
        codes, step = _encode_once(x)
        x, weight, bias = autocast(x, self.weight, self.bias)
        return LinearFp8.apply(x, weight, bias, codes, step, is_transposed(self))


class RMSNormFp8(torch.autograd.Function):
    """RMS norm over the last dimension that keeps x as codes and one fp32 number per row."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor | None, eps: float, norm: Callable) -> Tensor:
        rstd = x.float().square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(*encode_groups(x), weight, rstd)
        return norm(x)

    @staticmethod
    @first_order
    def backward(ctx, gy: Tensor):
        codes, step, weight, rstd = ctx.saved_tensors
        unit = decode(codes, step, rstd, gy.shape).mul_(rstd)
        gx = gw = None
        if ctx.needs_input_grad[1]:
            gw = (gy * unit.to(gy.dtype)).sum(list(range(gy.dim() - 1)))
        if ctx.needs_input_grad[0]:
            g = (gy if weight is None else gy * weight).float()
            gx = ((g - unit * (g * unit).mean(-1, keepdim=True)) * rstd).to(gy.dtype)
        return gx, gw, None, None


class _CoatRMSNorm(_Layer):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        fits = x.dtype in FLOATS and (weight is None or weight.dtype == x.dtype)
        if not grads_wanted(x, weight) or not fits:
            return super().forward(x)
        if isinstance(self, nn.RMSNorm):
            eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        else:
            eps = self.variance_epsilon
        return RMSNormFp8.apply(x, weight, eps, super().forward)


class LayerNormFp8(torch.autograd.Function):
    """Layer norm that keeps x as codes, and mean and reciprocal deviation of each row."""

    @staticmethod
    def forward(ctx, x: Tensor, weight, bias, shape: tuple[int, ...], eps: float) -> Tensor:
        y, mean, rstd = _aten.native_layer_norm(x, shape, weight, bias, eps)
        ctx.save_for_backward(*encode_groups(x), weight, bias, mean, rstd)
        ctx.normalized = shape
        return y

    @staticmethod
    @first_order
    def backward(ctx, gy: Tensor):
        codes, step, weight, bias, mean, rstd = ctx.saved_tensors
        grads = _aten.native_layer_norm_backward(
            gy, decode(codes, step, gy), ctx.normalized, mean, rstd, weight, bias,
            list(ctx.needs_input_grad[:3]),
        )  # fmt: skip
        return *grads, None, None


class _CoatLayerNorm(_Layer):
    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        plain = torch.is_autocast_enabled(x.device.type) or x.dtype not in FLOATS
        if plain or not grads_wanted(x, weight, bias):
            return super().forward(x)
        return LayerNormFp8.apply(x, weight, bias, self.normalized_shape, self.eps)


class PointwiseFp8(torch.autograd.Function):
    """y = f(x) that keeps x as codes and differentiates f at what they say."""

    @staticmethod
    def forward(ctx, x: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.f = f
        ctx.save_for_backward(*encode_groups(x))
        return f(x)

    @staticmethod
    @first_order
    def backward(ctx, gy: Tensor):
        codes, step = ctx.saved_tensors
        with torch.enable_grad():
            x = decode(codes, step, gy).requires_grad_()
            y = ctx.f(x)
        return *torch.autograd.grad(y, x, gy), None


class _CoatPointwise(_Layer):
    def forward(self, x: Tensor) -> Tensor:
        if not grads_wanted(x) or x.dtype not in FLOATS:
            return super().forward(x)
        return PointwiseFp8.apply(x, super().forward)


class GatedProductFp8(torch.autograd.Function):
    """act(gate) * up that keeps gate and up as codes."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.act = act
        ctx.save_for_backward(*encode_groups(gate), *encode_groups(up))
        return act(gate) * up

    @staticmethod
    @first_order
    def backward(ctx, gy: Tensor):
        gate_codes, gate_step, up_codes, up_step = ctx.saved_tensors
        with torch.enable_grad():
            gate = decode(gate_codes, gate_step, gy).requires_grad_()
            active = ctx.act(gate)
        ggate = gup = None
        if ctx.needs_input_grad[1]:
            gup = gy * active.detach()
        if ctx.needs_input_grad[0]:
            up = decode(up_codes, up_step, gy)
            (ggate,) = torch.autograd.grad(active, gate, up.mul_(gy))
        return ggate, gup, None


class _CoatGatedMLP(_Layer):
    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if not grads_wanted(gate, up) or gate.dtype not in FLOATS:
            return self.down_proj(self.act_fn(gate) * up)
        return self.down_proj(GatedProductFp8.apply(gate, up, self.act_fn))


_PLAIN = {nn.Linear: _CoatLinear, Conv1D: _CoatLinear, nn.LayerNorm: _CoatLayerNorm}
# Also what `memsave` has converted before.
_LEAN = {memsave._LeanRMSNorm: _CoatRMSNorm, memsave.LeanGatedMLP: _CoatGatedMLP}
_OURS = (_CoatLinear, _CoatRMSNorm, _CoatLayerNorm, _CoatPointwise, _CoatGatedMLP)
_made: dict[type, type] = {}


def _named(mixin: type, kind: type) -> type:
    if kind not in _made:
        made = type(f"Coat{kind.__name__}", (mixin, kind), {"__module__": __name__})
        # Reachable under its own name, so that a pickled model finds it again.
        _made[kind] = globals()[made.__name__] = made
    return _made[kind]


for _kind, _mixin in {**_PLAIN, nn.RMSNorm: _CoatRMSNorm, nn.GELU: _CoatPointwise}.items():
    _named(_mixin, _kind)


def twin(module: nn.Module) -> type | None:
    """The class that keeps FP8 for a module, or None where it is not known."""
    kind = type(module)
    if isinstance(module, _OURS):
        return None
    if kind in _PLAIN:
        return _named(_PLAIN[kind], kind)
    lean = kind if isinstance(module, tuple(_LEAN)) else memsave.twin(module)
    for base, mixin in _LEAN.items():
        if lean is not None and issubclass(lean, base):
            return _named(mixin, kind)
    if kind is nn.ReLU:
        return lean
    if known(module) and not getattr(module, "inplace", False):
        return _named(_CoatPointwise, kind)
    return None


def coat_activations(model: nn.Module) -> nn.Module:
    """Make every layer that is known by its class keep FP8, in place; returns `model`.

    Later changes of `requires_grad` are respected in each call. What was converted is logged.
    Functions that modules call themselves, attention among them, keep what they did.
    """
    # A gated MLP differentiates its activation itself.
    gated = [m for m in model.modules() if issubclass(twin(m) or type(m), _CoatGatedMLP)]
    inner = {id(m.act_fn) for m in gated}
    changed = swap_classes(model, lambda m: None if id(m) in inner else twin(m))
    report("coat_activations", changed)
    return model


def _applies(model: nn.Module) -> str | None:
    if any(twin(module) for module in model.modules()):
        return None
    return "no linear, norm, activation or gated MLP that is known by its class"


ACTIVATIONS = Method(
    key="coat_activations",
    slot="saved",
    writes={("activations", "form"): "FP8 inputs of linears, norms, activations and products"},
    apply=coat_activations,
    quality=lambda: Quality("lossy", 0.01, "holdfast check coat --full"),
    applies=_applies,
    automatic=False,
)
