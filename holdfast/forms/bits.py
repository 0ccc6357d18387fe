"""Pack small unsigned codes into bytes: an n-bit code takes n bits, 3-bit codes included.

The codes of a row form one little-endian bit stream: code i lies at bits [i*b, (i+1)*b), the
lowest bit first. A row starts on a byte, so its ragged tail is padded with zero bits to a byte.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.errors import UsageError

BITS = (1, 2, 3, 4, 8)


def packed_nbytes(numel: int, bits: int) -> int:
    """Bytes of one row of `numel` codes."""
    _check(bits)
    return -(-numel * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """codes (..., n) uint8, each below 2^bits -> (..., ceil(n*bits/8)) uint8.

    Higher bits of a code are not masked: they would spill into its neighbours.

    Raises:
        UsageError: `bits` is not one of 1, 2, 3, 4, 8.
    """
    size = packed_nbytes(codes.shape[-1], bits)
    if bits == 8:
        return codes.clone()
    if bits == 3:
        # Eight codes are 24 bits, so three bytes repeat the pattern.
        eight = _rows_of(codes, 8)
        word = eight[..., 0].int()
        for i in range(1, 8):
            word |= eight[..., i].int() << (3 * i)
        packed = torch.stack([(word >> shift) & 255 for shift in (0, 8, 16)], -1).to(torch.uint8)
        return packed.flatten(-2)[..., :size].contiguous()
    per_byte = 8 // bits
    parts = _rows_of(codes, per_byte)
    packed = parts[..., 0].clone()
    for i in range(1, per_byte):
        packed |= parts[..., i] << (bits * i)
    return packed


def unpack(packed: Tensor, bits: int, numel: int) -> Tensor:
    """packed (..., ceil(numel*bits/8)) uint8 -> (..., numel) uint8; the inverse of `pack`.

    Raises:
        UsageError: `bits` is not one of 1, 2, 3, 4, 8, or the last dimension is another size.
    """
    size = packed_nbytes(numel, bits)
    if packed.shape[-1] != size:
        raise UsageError(
            f"{packed.shape[-1]} bytes per row cannot hold {numel} codes of {bits} bits; "
            f"expected {size}"
        )
    if bits == 8:
        return packed.clone()
    mask = (1 << bits) - 1
    if bits == 3:
        three = _rows_of(packed, 3)
        word = three[..., 0].int() | three[..., 1].int() << 8 | three[..., 2].int() << 16
        parts = [((word >> (3 * i)) & mask).to(torch.uint8) for i in range(8)]
    else:
        parts = [(packed >> shift) & mask for shift in range(0, 8, bits)]
    return torch.stack(parts, -1).flatten(-2)[..., :numel].contiguous()


def _rows_of(x: Tensor, unit: int) -> Tensor:
    """(..., n) padded with zeros -> (..., ceil(n/unit), unit)."""
    if x.shape[-1] % unit:
        x = F.pad(x, (0, -x.shape[-1] % unit))
    return x.unflatten(-1, (x.shape[-1] // unit, unit))


def _check(bits: int) -> None:
    if bits not in BITS:
        raise UsageError(f"bits={bits} cannot be packed; expected one of {BITS}")
