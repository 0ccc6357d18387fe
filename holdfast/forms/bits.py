"""Pack small unsigned codes into bytes: an n-bit code takes n bits, 3-bit codes included.

The codes of a row form one little-endian bit stream: code i lies at bits [i*b, (i+1)*b), the
lowest bit first. A row starts on a byte, so its ragged tail is padded with zero bits to a byte.
"""

from torch import Tensor

from holdfast.errors import UsageError
from holdfast.native.bits import nbytes, ops

BITS = (1, 2, 3, 4, 8)


def packed_nbytes(numel: int, bits: int) -> int:
    """Bytes of one row of `numel` codes."""
    _check(bits)
    return nbytes(numel, bits)


def pack(codes: Tensor, bits: int) -> Tensor:
    """codes (..., n) uint8, each below 2^bits -> (..., ceil(n*bits/8)) uint8.

    Higher bits of a code are not masked: they would spill into its neighbours.

    Raises:
        UsageError: `bits` is not one of 1, 2, 3, 4, 8.
    """
    _check(bits)
    if bits == 8:
        return codes.clone()
    return ops.pack_codes(codes, bits)


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
    return ops.unpack_codes(packed, bits, numel)


def _check(bits: int) -> None:
    if bits not in BITS:
        raise UsageError(f"bits={bits} cannot be packed; expected one of {BITS}")
