"""Projector: a gradient seen in the leading singular subspace of its smaller side."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.forms import Affine, Packed

# Rows of the longer side that are converted to fp64 at a time.
_ROWS = 1024


@dataclass(frozen=True)
class Projector:
    """An orthonormal basis (rank, smaller side) of rows; `down` and `up` apply it, in fp32.

    The smaller side of an (m, n) gradient is n where m >= n (project right), else m (left). A basis
    that is kept as affine codes is decoded a range of columns at a time: each range meets its part
    of the gradient once, and neither the whole basis nor a whole fp32 gradient exists.
    """

    basis: Tensor
    right: bool

    @classmethod
    def fit(cls, g: Tensor, rank: int) -> "Projector":
        """The top `rank` singular vectors of g (m, n), largest first; signs are arbitrary."""
        right = g.shape[0] >= g.shape[1]
        return cls(leading(g if right else g.mT, rank), right)

    def down(self, g: Tensor) -> Tensor:
        """(m, n) -> (m, rank) right, (rank, n) left."""
        low = None
        for columns, tile in self._tiles():
            left, right = (g[:, columns], tile.mT) if self.right else (tile, g[columns])
            left, right = left.to(tile.dtype), right.to(tile.dtype)
            low = left @ right if low is None else torch.addmm(low, left, right, out=low)
        assert low is not None
        return low

    def up(self, u: Tensor) -> Tensor:
        """The inverse on the subspace: -> (m, n)."""
        short = self.basis.shape[1]
        out = u.new_empty((u.shape[0], short) if self.right else (short, u.shape[1]))
        for columns, tile in self._tiles():
            if self.right:
                torch.mm(u, tile, out=out[:, columns])
            else:
                torch.mm(tile.mT, u, out=out[columns])
        return out

    def _tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """Ranges of columns with their part of the basis."""
        basis = self.basis
        if isinstance(basis, Packed) and isinstance(basis.form, Affine):
            yield from basis.form.column_tiles(basis)
        else:
            dense = basis.dequantize() if isinstance(basis, Packed) else basis
            yield slice(0, basis.shape[1]), dense


def leading(g: Tensor, rank: int) -> Tensor:
    """Top right singular vectors of a tall g (m, n) -> (rank, n), fp32 at least.

    Eigenvectors of gᵀg in fp64. Squaring halves the digits, which leaves singular values apart down
    to 1e-8 of the largest: more than an SVD in fp32 does, in less time and without its (m, n)
    factor. Values that are not finite give a basis of NaN, as the update then is NaN anyway.
    """
    gram = g.new_zeros(g.shape[1], g.shape[1], dtype=torch.float64)
    for rows in g.split(_ROWS):
        wide = rows.double()
        gram.addmm_(wide.mT, wide)
    # eigh raises on NaN, where a loss that diverges should be seen as a loss that diverges.
    finite = gram.isfinite().all()
    _, vectors = torch.linalg.eigh(torch.where(finite, gram, 0.0))
    basis = torch.where(finite, vectors.mT[-rank:].flip(0), torch.nan)
    return basis.to(torch.promote_types(g.dtype, torch.float32)).contiguous()


def leading_ref(g: Tensor, rank: int) -> Tensor:
    """`leading` by the definition."""
    return torch.linalg.svd(g.double(), full_matrices=False).Vh[:rank].to(g.dtype)
