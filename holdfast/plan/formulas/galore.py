"""Elements of weights and Adam states per matrix, for plain training, GaLore and LoRA.

A matrix m x n with m <= n, rank r. Source: Zhao, Zhang, Chen, Wang, Anandkumar, Tian, "GaLore:
Memory-Efficient LLM Training by Gradient Low-Rank Projection", ICML 2024, table 1; Hu and others,
"LoRA", ICLR 2022. That paper's totals of whole models count embeddings in a way that it does not
say, so `model_bytes` states its own counting.
"""

from collections.abc import Iterable
from typing import Literal, NamedTuple

from holdfast.errors import UsageError, unknown

Scheme = Literal["full", "galore", "lora"]


class Elements(NamedTuple):
    """Numbers that are kept for one matrix."""

    weights: int
    states: int


def matrix(m: int, n: int, rank: int, scheme: Scheme) -> Elements:
    """Elements of one matrix, whichever side is shorter.

    full: mn and 2mn. galore: mn and mr + 2nr, a basis of the shorter side and two moments along the
    longer. lora: mn + mr + nr and 2mr + 2nr.

    Raises:
        UsageError: sizes below 1, a rank above the shorter side, or an unknown scheme.
    """
    m, n = sorted((m, n))
    if m < 1 or not 1 <= rank <= m:
        raise UsageError(f"rank {rank} of a matrix {m} x {n} is outside 1 to {m}")
    if scheme == "full":
        return Elements(m * n, 2 * m * n)
    if scheme == "galore":
        return Elements(m * n, m * rank + 2 * n * rank)
    if scheme == "lora":
        return Elements(m * n + m * rank + n * rank, 2 * m * rank + 2 * n * rank)
    raise unknown("scheme", scheme, ("full", "galore", "lora"))


def model_bytes(
    matrices: Iterable[tuple[int, int]],
    others: int,
    rank: int,
    scheme: Scheme,
    itemsize: int = 2,
) -> int:
    """Bytes of weights and states of a model.

    Args:
        matrices: shapes that are projected or adapted: those of the blocks.
        others: elements of everything else (embeddings, head, norms), trained plainly with two
            states each; under lora they are frozen and have none.
    """
    kept = sum(sum(matrix(m, n, rank, scheme)) for m, n in matrices)
    return itemsize * (kept + others * (1 if scheme == "lora" else 3))
