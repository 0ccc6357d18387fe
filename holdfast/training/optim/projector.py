"""Projector: a gradient seen in the leading singular subspace of its smaller side."""

from dataclasses import dataclass

import torch
from torch import Tensor

# Rows of the longer side that are converted to fp64 at a time.
_ROWS = 1024


@dataclass(frozen=True)
class Projector:
    """An orthonormal basis (rank, smaller side) of rows; `down` and `up` apply it.

    The smaller side of an (m, n) gradient is n where m >= n (project right), else m (left).
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
        return g @ self.basis.mT if self.right else self.basis @ g

    def up(self, u: Tensor) -> Tensor:
        """The inverse on the subspace: -> (m, n)."""
        return u @ self.basis if self.right else self.basis.mT @ u


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
