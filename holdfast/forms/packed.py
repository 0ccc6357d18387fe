"""Packed: a tensor whose bytes are written in a Form.

Logical shape, dtype and strides are those of the decoded tensor; the bytes are plain buffers. It
works as `nn.Parameter(packed, requires_grad=False)` in `nn.Linear` and `nn.Embedding`. Products and
row look-ups decode tile by tile; any other operation raises instead of silently decoding all.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.errors import UsageError

if TYPE_CHECKING:
    from holdfast.forms.base import Form

aten = torch.ops.aten


class Packed(Tensor):
    """Made by `Form.encode` or `Packed.from_buffers`.

    Attributes:
        form: the Form that wrote the buffers.
        buffers: name -> plain tensor, in the order of `Form.layout`.
        stored_shape: the encoded shape; `shape` is its reverse after `t()`.
    """

    form: "Form"
    buffers: dict[str, Tensor]
    stored_shape: torch.Size
    transposed: bool

    @staticmethod
    def __new__(
        cls,
        form: "Form",
        shape: tuple[int, ...],
        dtype: torch.dtype,
        buffers: Mapping[str, Tensor],
        transposed: bool = False,
    ) -> "Packed":
        shape = torch.Size(shape)
        device = next(iter(buffers.values())).device
        self = Tensor._make_wrapper_subclass(
            cls, shape[::-1] if transposed else shape, dtype=dtype, device=device
        )
        self.form, self.buffers = form, dict(buffers)
        self.stored_shape, self.transposed = shape, transposed
        return self

    @property
    def nbytes_packed(self) -> int:
        """Bytes of all buffers; `nbytes` is what the decoded tensor would take."""
        return sum(b.numel() * b.element_size() for b in self.buffers.values())

    def dequantize(self) -> Tensor:
        """The decoded tensor, dense."""
        dense = self.form.decode(self)
        return dense.t() if self.transposed else dense

    def to_buffers(self) -> dict[str, Tensor]:
        """The buffers by name, for safetensors; form, shape and dtype must be kept beside them.

        Raises:
            UsageError: of a transposed view.
        """
        _require_plain(self, "to_buffers")
        return dict(self.buffers)

    @classmethod
    def from_buffers(
        cls,
        form: "Form",
        shape: tuple[int, ...],
        dtype: torch.dtype,
        buffers: Mapping[str, Tensor],
    ) -> "Packed":
        """The inverse of `to_buffers`; shares the buffers.

        Raises:
            UsageError: a buffer is missing, unexpected, or of another shape or dtype.
        """
        layout = form.layout(torch.Size(shape), dtype)
        if set(layout) != set(buffers):
            raise UsageError(
                f"{form} of shape {tuple(shape)} has buffers {sorted(layout)}, "
                f"got {sorted(buffers)}"
            )
        for name, (want_shape, want_dtype) in layout.items():
            given = buffers[name]
            if tuple(given.shape) != want_shape or given.dtype != want_dtype:
                raise UsageError(
                    f"buffer {name!r} of {form} for shape {tuple(shape)} is "
                    f"{tuple(given.shape)} {given.dtype}; expected {want_shape} {want_dtype}"
                )
        return cls(form, tuple(shape), dtype, {name: buffers[name] for name in layout})

    def _with(self, buffers: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> "Packed":
        return Packed(self.form, self.stored_shape, dtype or self.dtype, buffers, self.transposed)

    def __tensor_flatten__(self):
        # Attributes let compilers and Meter see each buffer under its own name.
        for name, buffer in self.buffers.items():
            setattr(self, f"_{name}", buffer)
        names = [f"_{name}" for name in self.buffers]
        return names, (self.form, self.stored_shape, self.dtype, self.transposed)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], context: Any, outer_size, outer_stride):
        form, shape, dtype, transposed = context
        buffers = {name.removeprefix("_"): buffer for name, buffer in inner.items()}
        return Packed(form, shape, dtype, buffers, transposed)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return (
            f"Packed({self.form}, shape={tuple(self.shape)}, dtype={self.dtype}, "
            f"nbytes_packed={self.nbytes_packed})"
        )

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _FUNCTIONS:
            return _FUNCTIONS[func](*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]
        if func in _OPERATIONS:
            return _OPERATIONS[func](*args, **(kwargs or {}))
        packed = next((a for a in args if isinstance(a, Packed)), None)
        raise UsageError(
            f"{func} is not supported on {packed if packed is not None else 'a Packed tensor'}; "
            "decode it explicitly with .dequantize(), at the price of a dense copy"
        )


def _require_plain(packed: Packed, what: str) -> None:
    if packed.transposed:
        raise UsageError(f"{what} needs the tensor as encoded, got its transpose; undo .t() first")


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not isinstance(weight, Packed):
        raise UsageError("F.linear takes a Packed weight; its input must be a dense tensor")
    return weight.form.matmul(x, weight, bias)


def _matmul(x: Tensor, other: Tensor) -> Tensor:
    if isinstance(x, Packed) or not isinstance(other, Packed):
        raise UsageError("a Packed tensor can only be the right factor of a product; decode it")
    return other.form.matmul(x, _t(other))


def _addmm(bias: Tensor, x: Tensor, other: Tensor) -> Tensor:
    return _matmul(x, other) + bias


def _embedding(
    ids: Tensor,
    weight: Packed,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    # Gradient options are moot, the weight has none; max_norm would have to rewrite it.
    if max_norm is not None:
        raise UsageError("max_norm would change a Packed embedding; pass max_norm=None")
    _require_plain(weight, "embedding")
    return weight.form.rows(weight, ids)


def _requires_grad_(packed: Packed, requires_grad: bool = True) -> Packed:
    if requires_grad:
        raise UsageError(
            f"{packed.form} has no gradient; use nn.Parameter(packed, requires_grad=False)"
        )
    return packed


_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    F.embedding: _embedding,
    torch.matmul: _matmul,
    torch.mm: _matmul,
    Tensor.matmul: _matmul,
    Tensor.mm: _matmul,
    Tensor.__matmul__: _matmul,
    torch.addmm: _addmm,
    Tensor.dequantize: Packed.dequantize,
    Tensor.requires_grad_: _requires_grad_,
}


def _same(packed: Packed) -> Packed:
    return packed._with(packed.buffers)


def _clone(packed: Packed, *, memory_format: torch.memory_format | None = None) -> Packed:
    return packed._with({name: b.clone() for name, b in packed.buffers.items()})


def _to_copy(packed: Packed, *, dtype=None, device=None, non_blocking=False, **_) -> Packed:
    if dtype is not None and dtype != packed.dtype:
        packed = packed.form.cast(packed, dtype)
    moved = {
        # An own copy even without a move, as Tensor.to gives when it has to change anything.
        name: b.to(device=device or b.device, non_blocking=non_blocking, copy=True)
        for name, b in packed.buffers.items()
    }
    return packed._with(moved)


def _copy_(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    if not isinstance(target, Packed) or not isinstance(source, Packed):
        raise UsageError(
            f"cannot copy {type(source).__name__} into {type(target).__name__}: encode or decode "
            "explicitly with Form.encode or .dequantize()"
        )
    mine = (target.form, target.stored_shape, target.dtype, target.transposed)
    theirs = (source.form, source.stored_shape, source.dtype, source.transposed)
    if mine != theirs:
        raise UsageError(f"cannot copy {source} into {target}: form, shape or dtype differ")
    for name, buffer in target.buffers.items():
        buffer.copy_(source.buffers[name], non_blocking=non_blocking)
    return target


def _t(packed: Packed) -> Packed:
    if packed.dim() != 2:
        raise UsageError(f"only 2-D Packed tensors can be transposed, got {tuple(packed.shape)}")
    return Packed(
        packed.form, packed.stored_shape, packed.dtype, packed.buffers, not packed.transposed
    )


def _transpose(packed: Packed, dim0: int, dim1: int) -> Packed:
    return packed if dim0 % packed.dim() == dim1 % packed.dim() else _t(packed)


_OPERATIONS: dict[Any, Callable[..., Any]] = {
    aten.detach.default: _same,
    aten.alias.default: _same,
    aten.clone.default: _clone,
    aten._to_copy.default: _to_copy,
    aten.copy_.default: _copy_,
    aten.t.default: _t,
    aten.transpose.int: _transpose,
}
