"""How fast computing outgrows memory and interconnect: a log-linear fit to data sheets."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from holdfast.errors import UsageError


@dataclass(frozen=True)
class Part:
    """A data-centre processor: dense FLOP/s of its fastest training format, bytes/s each way."""

    name: str
    year: int
    flops: float
    bandwidth: float
    interconnect: float
    source: str


# Interconnect: all links of one part together, one direction.
PARTS = (
    Part("Tesla P100 SXM2", 2016, 21.2e12, 732e9, 80e9, "NVIDIA Tesla P100 data sheet, 2016; fp16"),
    Part("Tesla V100 SXM2", 2017, 125e12, 900e9, 150e9, "NVIDIA Tesla V100 data sheet, 2018; fp16"),
    Part("A100 SXM 40GB", 2020, 312e12, 1555e9, 300e9, "NVIDIA A100 data sheet, 2020; bf16"),
    Part("A100 SXM 80GB", 2020, 312e12, 2039e9, 300e9, "NVIDIA A100 80GB data sheet, 2021; bf16"),
    Part("H100 SXM", 2022, 989e12, 3350e9, 450e9, "NVIDIA H100 data sheet, 2022; bf16"),
    Part("H200 SXM", 2023, 989e12, 4800e9, 450e9, "NVIDIA H200 data sheet, 2023; bf16"),
    Part("B200 HGX", 2024, 2250e12, 8000e9, 900e9, "NVIDIA HGX B200 data sheet, 2024; bf16"),
)


def growth(years: Sequence[float], values: Sequence[float]) -> float:
    """Factor per two years, by least squares on logarithms.

    Raises:
        UsageError: fewer than two different years, or a value that is not positive.
    """
    if len(set(years)) < 2 or len(years) != len(values):
        raise UsageError(
            f"a trend needs values for two different years or more, given years {sorted(years)}"
        )
    if min(values) <= 0:
        raise UsageError(f"a trend of logarithms needs positive values, given {min(values)}")
    year = torch.tensor(years, dtype=torch.float64)
    log = torch.tensor(values, dtype=torch.float64).log()
    year = year - year.mean()
    slope = (year @ (log - log.mean())) / (year @ year)
    return math.exp(2 * slope.item())


def trend(parts: Sequence[Part] = PARTS, until: int = 2030) -> dict[str, Any]:
    """Growth per two years of FLOP/s, memory and interconnect, and the ridge projected to a year.

    `ridge` is the newest part's FLOPs per byte of memory, and what it becomes at these rates.
    """
    years = [part.year for part in parts]
    rates = {
        name: growth(years, [getattr(part, name) for part in parts])
        for name in ("flops", "bandwidth", "interconnect")
    }
    newest = max(parts, key=lambda part: part.year)
    now = newest.flops / newest.bandwidth
    later = now * (rates["flops"] / rates["bandwidth"]) ** ((until - newest.year) / 2)
    return {"per_two_years": rates, "ridge": {newest.year: now, until: later}}
