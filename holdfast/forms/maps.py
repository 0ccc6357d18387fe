"""Code maps: the sorted values that 4-bit and 8-bit codes stand for, each made by its formula.

Every map lies in [-1, 1] (signed) or [0, 1] (unsigned) and reaches 1, so that the largest entry of
a block that was divided by its absolute maximum is kept exactly.

Source   dynamic: Dettmers, 8-Bit Approximations for Parallelism in Deep Learning, ICLR 2016, and
         Dettmers et al., 8-bit Optimizers via Block-wise Quantization, ICLR 2022; 4-bit dynamic and
         linear: Li, Chen, Zhu, Memory Efficient Optimizers with 4-bit States, NeurIPS 2023; NF4:
         Dettmers et al., QLoRA: Efficient Finetuning of Quantized LLMs, NeurIPS 2023.
"""

from functools import cache
from statistics import NormalDist

import torch
from torch import Tensor

from holdfast.errors import unknown


def _dynamic(decades: int, signed: bool) -> list[float]:
    """0, 1, and in decade e = 0 .. decades-1 the midpoints of 2^e (unsigned: 2^(e+1)) equal cells.

    Decade e spans 10^(e - decades + 1) * [0.1, 1]: small values get range, large ones precision.
    """
    values = [0.0, 1.0]
    for e in range(decades):
        cells = 2**e if signed else 2 ** (e + 1)
        top = 10.0 ** (e - decades + 1)
        positive = [top * (0.1 + 0.9 * (i + 0.5) / cells) for i in range(cells)]
        values += positive + [-v for v in positive if signed]
    return sorted(values)


def _nf4() -> list[float]:
    """0 and the quantiles of a normal law at 7 negative, 8 positive steps, over the largest."""
    # The outermost probability lies between the ends of 15 and of 16 equally likely cells.
    outer = 1 - (1 / 30 + 1 / 32) / 2
    quantile = NormalDist().inv_cdf

    def side(count: int) -> list[float]:
        return [quantile(outer + (0.5 - outer) * i / count) for i in range(count)]

    negative, positive = side(7), side(8)
    return sorted(
        [-v / negative[0] for v in negative] + [0.0] + [v / positive[0] for v in positive]
    )


_MAPS = {
    "dynamic4": (4, lambda: _dynamic(3, signed=True)),
    "nf4": (4, _nf4),
    "linear4": (4, lambda: [(i + 1) / 16 for i in range(16)]),
    "dynamic8": (8, lambda: _dynamic(7, signed=True)),
    "dynamic8_unsigned": (8, lambda: _dynamic(7, signed=False)),
}
NAMES = tuple(_MAPS)


@cache
def levels(name: str) -> tuple[float, ...]:
    """The map's values in rising order: 16 for 4 bits, 256 for 8 bits.

    Raises:
        UsageError: no map has this name.
    """
    if name not in _MAPS:
        raise unknown("code map", name, NAMES)
    return tuple(_MAPS[name][1]())


def bits(name: str) -> int:
    """Bits per code, 4 or 8.

    Raises:
        UsageError: no map has this name.
    """
    levels(name)
    return _MAPS[name][0]


def table(name: str, device: torch.device | str | None = None) -> Tensor:
    """The values of a code, indexed by the code: (2^bits,) fp32."""
    # Built anew each time: a cached tensor would leak between real and fake modes.
    return torch.tensor(levels(name), dtype=torch.float32, device=device)


def midpoints(name: str, device: torch.device | str | None = None) -> Tensor:
    """Where the nearest value changes: (2^bits - 1,) fp32, for `torch.bucketize`.

    With `right=False` a number exactly on a midpoint takes the smaller value.
    """
    values = table(name, device)
    return (values[1:] + values[:-1]) / 2
