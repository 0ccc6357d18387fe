"""Form: how the bytes of a tensor are written.

A subclass says which buffers it has (`layout`) and how a flat range of elements is written and
read. Bytes, tiling, checks, products and their gradients follow from that and live here.
Everything runs in tiles of about `tile_numel` elements, so that scratch does not grow with the
tensor: reading or multiplying needs a few fp32 tiles, never the dense tensor.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from holdfast.errors import UsageError
from holdfast.forms.packed import Packed

Buffers = dict[str, Tensor]
Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def tile_numel(device: torch.device) -> int:
    """Elements per tile: on a CPU few enough to stay in cache, elsewhere to fill the device."""
    return 1 << 19 if device.type == "cpu" else 1 << 22


@dataclass(frozen=True)
class Form(ABC):
    """Base of frozen dataclasses that hold a form's options."""

    @abstractmethod
    def layout(self, shape: torch.Size, dtype: torch.dtype) -> Layout:
        """Name -> (shape, dtype) of every buffer of a tensor; raises UsageError if it cannot."""

    @abstractmethod
    def grain(self, shape: torch.Size) -> int:
        """Elements of the flattened tensor that are written and read as one unit."""

    @abstractmethod
    def _write(
        self, flat: Tensor, start: int, buffers: Buffers, shape: torch.Size, generator
    ) -> None:
        """Write flat (n,), the elements from `start` (a multiple of the grain), to the buffers."""

    @abstractmethod
    def _read(self, buffers: Buffers, start: int, stop: int, shape: torch.Size) -> Tensor:
        """Elements start .. stop (multiples of the grain, or the end) -> (stop - start,)."""

    @abstractmethod
    def _take(self, buffers: Buffers, rows: Tensor, shape: torch.Size) -> Tensor:
        """rows (k,) int64 of a 2-D tensor -> (k, columns)."""

    def _prepare(self, tensor: Tensor, buffers: Buffers) -> None:  # noqa: B027
        """Fill buffers that need the whole tensor before `_write`; most forms have none."""

    def _check(self, low: float, high: float) -> None:
        """Refuse a tensor whose smallest and largest entries this form cannot hold."""
        if not (math.isfinite(low) and math.isfinite(high)):
            raise UsageError(
                f"{self} holds finite numbers only, the tensor has NaN or infinite entries; "
                "find their cause, or keep this tensor in Dense()"
            )

    def nbytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """Exact bytes of an encoded tensor of this shape and dtype."""
        layout = self.layout(torch.Size(shape), dtype)
        return sum(math.prod(size) * kind.itemsize for size, kind in layout.values())

    @torch.no_grad()
    def encode(
        self, tensor: Tensor, *, generator: torch.Generator | None = None, check: bool = True
    ) -> Packed:
        """Write a tensor; its dtype becomes the logical dtype.

        `generator` serves stochastic rounding. `check=False` skips the search for non-finite
        entries (one pass, and a synchronisation on a GPU), as do fake and meta tensors.

        Raises:
            UsageError: shape, dtype or values that this form cannot hold.
        """
        layout = self.layout(tensor.shape, tensor.dtype)
        buffers = {
            # Zeros, because scales of empty groups are never written.
            name: (torch.empty if tensor.numel() else torch.zeros)(
                size, dtype=dtype, device=tensor.device
            )
            for name, (size, dtype) in layout.items()
        }
        flat = tensor.reshape(-1)
        if tensor.numel():
            grain = self.grain(tensor.shape)
            if check and not _is_symbolic(tensor):
                self._check_values(flat)
            self._prepare(tensor, buffers)
            for start, stop in tiles(flat, grain):
                self._write(flat[start:stop], start, buffers, tensor.shape, generator)
        return Packed(self, tensor.shape, tensor.dtype, buffers)

    def _check_values(self, flat: Tensor) -> None:
        # NaN wins both ways in aminmax, so two numbers per tile tell everything.
        ends = [torch.stack(torch.aminmax(flat[start:stop])) for start, stop in tiles(flat, 1)]
        low, high = torch.aminmax(torch.stack(ends).double(), dim=0)
        self._check(low[0].item(), high[1].item())

    @torch.no_grad()
    def decode(self, packed: Packed, out: Tensor | None = None) -> Tensor:
        """Read a tensor as encoded, into `out` if given; scratch is at most a few tiles.

        Raises:
            UsageError: `out` has another shape, dtype or device, or is not contiguous.
        """
        shape, dtype = packed.stored_shape, packed.dtype
        if out is None:
            out = torch.empty(shape, dtype=dtype, device=packed.device)
        elif (out.shape, out.dtype, out.device) != (shape, dtype, packed.device) or (
            not out.is_contiguous()
        ):
            raise UsageError(
                f"out is {tuple(out.shape)} {out.dtype} on {out.device}; expected a contiguous "
                f"{tuple(shape)} {dtype} on {packed.device}"
            )
        flat = out.view(-1)
        for start, stop in tiles(flat, self.grain(shape)):
            flat[start:stop].copy_(self._read(packed.buffers, start, stop, shape))
        return out

    def cast(self, packed: Packed, dtype: torch.dtype) -> Packed:
        """The same numbers under another logical dtype; buffers are shared where they can be."""
        shape = packed.stored_shape
        if self.layout(shape, dtype) == self.layout(shape, packed.dtype):
            return Packed(self, shape, dtype, packed.buffers, packed.transposed)
        again = self.encode(self.decode(packed).to(dtype), check=False)
        return Packed(self, shape, dtype, again.buffers, packed.transposed)

    def matmul(self, x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
        """x (..., in) @ W.T + bias for W (out, in) -> (..., out); differentiable in x and bias.

        W is decoded a tile of rows at a time, again in backward; nothing of it is saved. The
        result has x's dtype, or autocast's where that is on.

        Raises:
            UsageError: W is not 2-D, or sizes or dtypes disagree.
        """
        if packed.dim() != 2 or x.dim() == 0 or x.shape[-1] != packed.shape[1]:
            raise UsageError(
                f"cannot multiply {tuple(x.shape)} by the transpose of a Packed "
                f"{tuple(packed.shape)}; expected (..., in) and (out, in)"
            )
        kind = x.device.type
        if kind != "meta" and torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
            bias = None if bias is None else bias.to(x.dtype)
        elif x.dtype != packed.dtype or (bias is not None and bias.dtype != x.dtype):
            raise UsageError(
                f"input is {x.dtype}, Packed weight {packed.dtype}, bias "
                f"{None if bias is None else bias.dtype}; make them one dtype or use autocast"
            )
        flat = x.reshape(-1, x.shape[-1])
        y = _Product.apply(flat, bias, packed)
        # A view that is written to in place, as an adapter does, costs a copy in backward.
        return y if x.dim() == 2 else y.view(*x.shape[:-1], packed.shape[0])

    @torch.no_grad()
    def rows(self, packed: Packed, ids: Tensor) -> Tensor:
        """Rows of a 2-D tensor, only these decoded: ids (...) integers -> (..., columns).

        Raises:
            UsageError: the tensor is not 2-D.
        """
        if packed.dim() != 2:
            raise UsageError(f"rows need a 2-D tensor, got {tuple(packed.shape)}")
        flat, columns = ids.reshape(-1).long(), packed.shape[1]
        out = torch.empty(flat.numel(), columns, dtype=packed.dtype, device=packed.device)
        step = max(1, tile_numel(packed.device) // max(1, columns))
        for start in range(0, flat.numel(), step):
            part = flat[start : start + step]
            out[start : start + step] = self._take(packed.buffers, part, packed.stored_shape)
        return out.view(*ids.shape, columns)

    def row_tiles(self, packed: Packed, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
        """(first, last + 1, rows in `dtype`) of a 2-D tensor as encoded, tile by tile."""
        shape = packed.stored_shape
        rows, columns = shape
        if not packed.numel():
            return
        grain, numel = self.grain(shape), rows * columns
        step = max(1, tile_numel(packed.device) // columns)
        # Tiles that begin on a grain read nothing twice.
        whole = grain // math.gcd(grain, columns)
        step = step // whole * whole or step
        predicting = _is_predicting(next(iter(packed.buffers.values())))
        end = min(rows, 2 * step) if predicting else rows
        for first in range(0, end, step):
            last = min(first + step, rows)
            start, stop = first * columns, last * columns
            low = start // grain * grain
            high = min(-(-stop // grain) * grain, numel)
            tile = self._read(packed.buffers, low, high, shape)
            ready = tile[start - low : stop - low].view(-1, columns).to(dtype)
            del tile
            yield first, last, ready
        if end < rows:
            # As in `tiles`; the rest is a view without bytes, so that its products still count.
            yield end, rows, ready[:1].expand(rows - end, columns)


def tiles(flat: Tensor, grain: int) -> Iterator[tuple[int, int]]:
    """Ranges of about `tile_numel` elements of flat (n,) that begin at multiples of `grain`.

    Fake and meta tensors get the first two only: these already hold what the peak holds, and a
    prediction would spend seconds on hundreds of equal tiles.
    """
    step = max(1, tile_numel(flat.device) // grain) * grain
    end = min(flat.numel(), 2 * step) if _is_predicting(flat) else flat.numel()
    for start in range(0, end, step):
        yield start, min(start + step, flat.numel())


def columns_of(shape: torch.Size) -> int:
    """The last dimension; a scalar is one row of one."""
    return shape[-1] if shape else 1


def rows_of(shape: torch.Size) -> int:
    """The product of all dimensions but the last."""
    return math.prod(shape[:-1])


def require_float(form: Form, dtype: torch.dtype) -> None:
    if dtype not in FLOATS:
        raise UsageError(f"{form} holds float32, bfloat16 or float16, got {dtype}; convert it")


def reciprocal(scale: Tensor) -> Tensor:
    """1 / scale, and 0 below the smallest normal number, where 1 / scale would overflow."""
    return torch.where(scale >= torch.finfo(torch.float32).tiny, 1 / scale, 0.0)


def _is_symbolic(tensor: Tensor) -> bool:
    return isinstance(tensor, FakeTensor) or tensor.is_meta or torch.compiler.is_compiling()


def _is_predicting(tensor: Tensor) -> bool:
    """No data and no graph being recorded, which would have to be complete."""
    recording = torch.compiler.is_compiling() or get_proxy_mode() is not None
    return not recording and _is_symbolic(tensor)


def _plain(tensor: Tensor):
    """No autocast on the tensor's device; meta tensors know none."""
    kind = tensor.device.type
    return nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False)


class _Product(torch.autograd.Function):
    """x (n, in) @ W.T + bias. Its gradient in x is a product with the transpose."""

    @staticmethod
    def forward(ctx, x: Tensor, bias: Tensor | None, packed: Packed) -> Tensor:
        # The weight outlives the step, so keeping the wrapper costs no bytes.
        ctx.packed = packed
        with _plain(x):
            y = (_times if packed.transposed else _times_t)(x, packed)
            return y if bias is None else y.add_(bias)

    @staticmethod
    def backward(ctx, gy: Tensor):
        packed, dx = ctx.packed, None
        if ctx.needs_input_grad[0]:
            with _plain(gy):
                dx = (_times_t if packed.transposed else _times)(gy, packed)
        return dx, gy.sum(0) if ctx.needs_input_grad[1] else None, None


def _times_t(x: Tensor, packed: Packed) -> Tensor:
    """x (n, k) @ S.T for S (m, k) as encoded -> (n, m); each tile gives its own columns."""
    y = x.new_zeros(x.shape[0], packed.stored_shape[0])
    for first, last, tile in packed.form.row_tiles(packed, x.dtype):
        torch.mm(x, tile.t(), out=y[:, first:last])
    return y


def _times(x: Tensor, packed: Packed) -> Tensor:
    """x (n, m) @ S for S (m, k) as encoded -> (n, k), summed over tiles in fp32."""
    y = x.new_zeros(
        x.shape[0], packed.stored_shape[1], dtype=torch.promote_types(x.dtype, torch.float32)
    )
    for first, last, tile in packed.form.row_tiles(packed, x.dtype):
        if x.dtype == y.dtype:
            # Not addmm_, which torch's flop counter does not know.
            torch.addmm(y, x[:, first:last], tile, out=y)
        else:
            # Rounding every partial sum to half precision would grow with the number of tiles.
            y += x[:, first:last] @ tile
    return y.to(x.dtype)
