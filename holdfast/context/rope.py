"""Rotary positions of any Hugging Face model, applied and taken back.

A cache that drops tokens must give those that stay other positions, so it keeps keys un-rotated.
Which elements form a pair differs between architectures; it is found by asking the model's own
function, and a model whose rotation cannot be reproduced is refused.
"""

import copy
import inspect
import sys
from typing import Literal

import torch
from torch import Tensor, nn

from holdfast.errors import UsageError

Layout = Literal["half", "interleaved"]


class Rope:
    """The rotation of one model, or of its layers of one type; `from_model` makes it.

    Attributes:
        width: elements of a head that are rotated; the others pass.
        layout: "half" pairs element i with i + width / 2, "interleaved" 2i with 2i + 1.
    """

    def __init__(self, module: nn.Module, width: int, layout: Layout, layer_type: str | None):
        self.module, self.width, self.layout, self.layer_type = module, width, layout, layer_type

    @classmethod
    def from_model(cls, model: nn.Module, layer_type: str | None = None) -> "Rope":
        """Find a model's rotation.

        Args:
            layer_type: of the layers meant, for models whose layer types rotate differently.

        Raises:
            UsageError: the model has no rotary positions, or rotates in a way that is not known.
        """
        found = find(model, layer_type)
        if found is None:
            raise UsageError(
                f"{type(model).__name__} has no rotary positions (RoPE), so its keys cannot be "
                "given other positions; use a policy that keeps original ones, or another model"
            )
        module, layer_type = found
        width = 2 * _frequencies(module, layer_type).numel()
        for layout in ("half", "interleaved"):
            rope = cls(module, width, layout, layer_type)
            if rope._agrees(model):
                return rope
        raise UsageError(
            f"{type(model).__name__} rotates keys in a way that is neither half nor interleaved "
            "pairs; its cache cannot be re-positioned"
        )

    def _agrees(self, model: nn.Module) -> bool:
        """Whether this layout does what the model's own function does."""
        home = sys.modules[type(self.module).__module__]
        apply = getattr(home, "apply_rotary_pos_emb", None)
        if apply is None:
            return False
        device = _frequencies(self.module, self.layer_type).device
        x = torch.linspace(-1, 1, 3 * self.width, device=device).view(1, 1, 3, -1)
        positions = torch.tensor([[0, 1, 5]], device=device)
        # A copy, because some modules change their frequencies with what they are asked.
        probe = Rope(_duplicate(self.module), self.width, self.layout, self.layer_type)
        cos, sin = _embed(probe.module, x, positions, self.layer_type)
        want = apply(x, x, cos, sin)[0]
        return bool(((probe.rotate(x, positions[:, None]) - want).abs() <= 1e-5).all())

    def table(self, positions: Tensor) -> Tensor:
        """cos and sin, scaled as the model scales them: positions (...) -> (2,...,width/2) fp32."""
        scaling = _attribute(self.module, "attention_scaling", self.layer_type, 1.0)
        angles = positions[..., None].float() * _frequencies(self.module, self.layer_type)
        return torch.stack([angles.cos(), angles.sin()]).mul_(scaling)

    def at(self, length: int) -> "Rope":
        """The rotation that the model uses for sequences of `length` tokens, whatever it reads now.

        Types such as dynamic NTK change their frequencies with the length.
        """
        module = _duplicate(self.module)
        frequencies = _frequencies(module, self.layer_type)
        end = torch.tensor([[length - 1]], device=frequencies.device)
        _embed(module, frequencies, end, self.layer_type)
        return Rope(module, self.width, self.layout, self.layer_type)

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """x (B,H,n,d) as the model rotates it at positions (B|1,H|1,n) int64."""
        return self.turn(x, self.table(positions))

    def inverse_table(self, positions: Tensor) -> Tensor:
        """The table (2,...,width/2) that takes the rotation at positions (...) back."""
        scale = _attribute(self.module, "attention_scaling", self.layer_type, 1.0)
        table = self.table(positions).div_(scale**2)
        table[1].neg_()
        return table

    def unrotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """The inverse of `rotate` at the same positions."""
        return self.turn(x, self.inverse_table(positions))

    def turn(self, x: Tensor, table: Tensor) -> Tensor:
        """x (B,H,n,d) rotated by a table (2,B|1,H|1,n,width/2), computed in fp32, in x's dtype."""
        cos, sin = table
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        out[..., self.width :] = x[..., self.width :]
        (a, b), (to_a, to_b) = self._pairs(x), self._pairs(out)
        if x.dtype == torch.float32:
            torch.mul(a, cos, out=to_a).addcmul_(b, sin, value=-1)
            torch.mul(b, cos, out=to_b).addcmul_(a, sin)
        else:
            a, b = a.float(), b.float()
            to_a.copy_((a * cos).addcmul_(b, sin, value=-1))
            to_b.copy_((b * cos).addcmul_(a, sin))
        return out

    def _pairs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Views of the first and of the second elements of all pairs."""
        if self.layout == "half":
            half = self.width // 2
            return x[..., :half], x[..., half : self.width]
        return x[..., 0 : self.width : 2], x[..., 1 : self.width : 2]


def find(model: nn.Module, layer_type: str | None = None) -> tuple[nn.Module, str | None] | None:
    """The module that knows a model's frequencies and the layer type to ask it for, or None."""
    for module in model.modules():
        names = {name for name, _ in module.named_buffers(recurse=False)}
        if "inv_freq" in names:
            return module, None
        if layer_type is not None and f"{layer_type}_inv_freq" in names:
            return module, layer_type
    return None


def _duplicate(module: nn.Module) -> nn.Module:
    """A copy with buffers of its own; unlike a deep copy it also works on fake tensors."""
    twin = copy.copy(module)
    twin._buffers = {
        name: None if buffer is None else buffer.clone() for name, buffer in module._buffers.items()
    }
    return twin


def _attribute(module: nn.Module, name: str, layer_type: str | None, default: float | None = None):
    return getattr(module, name if layer_type is None else f"{layer_type}_{name}", default)


def _frequencies(module: nn.Module, layer_type: str | None) -> Tensor:
    return _attribute(module, "inv_freq", layer_type).float()


def _embed(
    module: nn.Module, like: Tensor, positions: Tensor, layer_type: str | None
) -> tuple[Tensor, Tensor]:
    named = {} if layer_type is None else {"layer_type": layer_type}
    if "position_ids" not in inspect.signature(module.forward).parameters:
        raise UsageError(f"{type(module).__name__} does not take positions; it is not supported")
    with torch.no_grad():
        return module(like, positions, **named)
