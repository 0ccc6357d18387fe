"""Few-bit backward (180): the derivative of an activation as a step function of 1 to 4 bits.

Keeps    a code per element that says on which step its derivative lies, instead of the input.
Form     codes of `bits` bits, packed; 2^bits - 1 bounds and 2^bits levels per function, global.
Bytes    ceil(N*bits/8) per activation; 1 bit and exact where the derivative has two values.
Source   Novikov, Bershatsky, Gusak, Shonenkov, Dimitrov, Oseledets, "Few-bit Backward: Quantized
         Gradients of Activation Functions for Memory Footprint Reduction", ICML 2023.
Departs  steps are fitted over [-8, 8] (the authors' tables: [-100, 100]), so that the outer levels
         are right where activations lie.

A gated MLP keeps act(gate) and up for their product, so that codes would save 1 - bits/(8*b) of
three tensors. Recomputing act(gate) from gate saves all of one, exactly: `convert` does that there
(`memsave` does the same), and few-bit codes only where no product follows.
"""

import argparse
import functools
import itertools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.attach import swap
from holdfast.errors import UsageError
from holdfast.plan.method import Method, Quality
from holdfast.training.saved.lean import (
    LeanPointwise,
    StepSlope,
    first_order,
    grads_wanted,
    pack_mask,
    report,
    swap_classes,
    where_set,
)
from holdfast.training.saved.memsave import LeanGatedMLP, gated_twin, twin

BITS = (1, 2, 3, 4)
DOMAIN, CELLS = 8.0, 3200
_TABLES = Path(__file__).with_name("tables.json")

# Functions whose slope is fitted. True: the slope is even, so that |x| takes all the steps.
FITTED: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "gelu": (F.gelu, False),
    "gelu_tanh": (lambda x: F.gelu(x, approximate="tanh"), False),
    "quick_gelu": (lambda x: x * torch.sigmoid(1.702 * x), False),
    "silu": (F.silu, False),
    "mish": (F.mish, False),
    "hardswish": (F.hardswish, False),
    "softplus": (F.softplus, False),
    "elu": (F.elu, False),
    "selu": (F.selu, False),
    "sigmoid": (torch.sigmoid, True),
    "tanh": (torch.tanh, True),
}

# Class -> its function, in torch.nn and transformers.activations.
_FUNCTION_OF = {
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "AccurateGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "QuickGELUActivation": "quick_gelu",
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "Mish": "mish",
    "MishActivation": "mish",
    "Hardswish": "hardswish",
    "SELU": "selu",
    "Sigmoid": "sigmoid",
    "Tanh": "tanh",
}


def fit(slope: Tensor, steps: int) -> list[tuple[list[int], list[float], float]]:
    """The best step functions of 1, 2, .. `steps` levels by dynamic programming.

    Args:
        slope: (cells,) fp64 values on equal cells.

    Returns:
        For each count of levels: the first cell of every level but the lowest, the levels, and the
        sum of squared errors.
    """
    cells = slope.numel()
    zero = slope.new_zeros(1)
    s1, s2 = torch.cat([zero, slope.cumsum(0)]), torch.cat([zero, slope.square().cumsum(0)])
    # cost[i, j]: of one level, their mean, for the cells i .. j-1.
    width = torch.arange(cells + 1) - torch.arange(cells + 1)[:, None]
    cost = (s2 - s2[:, None]) - (s1 - s1[:, None]).square() / width.clamp(min=1)
    cost.masked_fill_(width <= 0, torch.inf)
    best, cuts = cost[0], []
    tables = []
    for count in range(1, steps + 1):
        if count > 1:
            best, cut = (best[:, None] + cost).min(0)
            cuts.append(cut)
        edges = [cells]
        for cut in reversed(cuts):
            edges.append(int(cut[edges[-1]]))
        edges = [0, *reversed(edges)]
        levels = [float((s1[j] - s1[i]) / (j - i)) for i, j in itertools.pairwise(edges)]
        tables.append((edges[1:-1], levels, float(best[-1])))
    return tables


def make_tables(cells: int = CELLS) -> dict[str, dict]:
    """Function -> `even`, bits -> bounds, levels and `l2`: the integral of the squared error."""
    made: dict[str, dict] = {}
    for name, (f, even) in FITTED.items():
        low = 0.0 if even else -DOMAIN
        width = (DOMAIN - low) / cells
        edges = low + width * torch.arange(cells + 1, dtype=torch.float64)
        values = f(edges)
        # The mean slope of a cell is exact: the difference of f at its edges.
        tables = fit((values[1:] - values[:-1]) / width, 2 ** max(BITS))
        made[name] = {"even": even, "bits": {}}
        for bits in BITS:
            cuts, levels, error = tables[2**bits - 1]
            made[name]["bits"][str(bits)] = {
                "bounds": [round(float(edges[c]), 4) for c in cuts],
                "levels": [round(level, 6) for level in levels],
                "l2": round(error * width * (2 if even else 1), 6),
            }
    return made


@functools.cache
def _tables() -> dict[str, dict]:
    return json.loads(_TABLES.read_text())


@functools.cache
def slope(name: str, bits: int) -> StepSlope:
    """The fitted steps of a function of `FITTED`."""
    table = _tables()[name]
    row = table["bits"][str(bits)]
    return StepSlope(bits, tuple(row["bounds"]), tuple(row["levels"]), table["even"])


def slope_of(module: Any, bits: int) -> StepSlope | None:
    """The steps for an activation module, or None where it is not one that is known."""
    kind = type(module)
    if kind.__module__.startswith("torch.nn."):
        if kind is nn.GELU:
            return slope("gelu_tanh" if module.approximate == "tanh" else "gelu", bits)
        if kind is nn.LeakyReLU:
            return StepSlope(1, (0.0,), (float(module.negative_slope), 1.0))
        if kind is nn.ELU and module.alpha == 1:
            return slope("elu", bits)
        if kind is nn.Softplus and module.beta == 1:
            return slope("softplus", bits)
    elif kind.__module__ != "transformers.activations":
        return None
    name = _FUNCTION_OF.get(kind.__name__)
    return slope(name, bits) if name else None


class Between(torch.autograd.Function):
    """y = f(x) of slope 1 where low < x < high and 0 elsewhere: one exact bit per element."""

    @staticmethod
    def forward(ctx, x: Tensor, f: Callable[[Tensor], Tensor], low: float, high: float) -> Tensor:
        ctx.save_for_backward(pack_mask((x > low) & (x < high)))
        y = f(x)
        if y is x:
            ctx.mark_dirty(x)
        return y

    @staticmethod
    @first_order
    def backward(ctx, gy: Tensor):
        return where_set(ctx.saved_tensors[0], gy), None, None, None


class FewBit(nn.Module):
    """An activation module with the same output that keeps `bits` bits per element.

    Raises:
        UsageError: `bits` is not 1 to 4, or the activation has no table.
    """

    def __init__(self, inner: nn.Module, bits: int = 3):
        super().__init__()
        _check_bits(bits)
        if not known(inner):
            raise UsageError(
                f"{type(inner).__name__} has no few-bit derivative; known are "
                f"{', '.join(sorted(FITTED))}, leaky_relu and hardtanh of torch.nn and transformers"
            )
        self.inner, self.bits = inner, bits

    def forward(self, x: Tensor) -> Tensor:
        if not grads_wanted(x):
            return self.inner(x)
        if isinstance(self.inner, nn.Hardtanh):
            return Between.apply(x, self.inner, self.inner.min_val, self.inner.max_val)
        return LeanPointwise.apply(x, self.inner, slope_of(self.inner, self.bits))

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


def known(module: nn.Module) -> bool:
    """Whether `FewBit` can wrap an activation module."""
    return type(module) in (nn.Hardtanh, nn.ReLU6) or slope_of(module, BITS[0]) is not None


def GELU(bits: int = 3, approximate: str = "none") -> FewBit:
    """`torch.nn.GELU` with a few-bit backward."""
    return FewBit(nn.GELU(approximate), bits)


def SiLU(bits: int = 3) -> FewBit:
    """`torch.nn.SiLU` with a few-bit backward."""
    return FewBit(nn.SiLU(), bits)


def _twin(module: nn.Module) -> type | None:
    return twin(module) if type(module) is nn.ReLU else gated_twin(module)


def convert(model: nn.Module, bits: int = 3) -> nn.Module:
    """Give every known activation module of `model` a few-bit backward, in place; returns `model`.

    ReLU keeps one exact bit, gated MLPs recompute their activation exactly (see the module's
    docstring). Activations that are called as functions stay, and so do those without a table:
    clipped GELU, Laplace, squared ReLU, PReLU, xIELU.

    Raises:
        UsageError: `bits` is not 1 to 4, or the model itself is one activation: use `FewBit`.
    """
    _check_bits(bits)
    if known(model):
        raise UsageError(f"a bare {type(model).__name__} has no parent; use FewBit(module, {bits})")
    changed: Counter[str] = swap_classes(model, _twin)
    gated = {id(m.act_fn) for m in model.modules() if isinstance(m, LeanGatedMLP)}
    taken = {id(m.inner) for m in model.modules() if isinstance(m, FewBit)} | gated
    for name, module in list(model.named_modules()):
        if id(module) not in taken and known(module):
            swap(model, name, FewBit(module, bits))
            changed[type(module).__name__] += 1
    report("fewbit", changed)
    return model


def _check_bits(bits: int) -> None:
    if bits not in BITS:
        raise UsageError(f"bits={bits!r}: few-bit tables exist for {BITS}; 3 is a good start")


def _applies(model: nn.Module, bits: int = 3) -> str | None:
    if any(known(m) or _twin(m) for m in model.modules()):
        return None
    return "no activation module whose derivative has a table"


METHOD = Method(
    key="fewbit",
    slot="saved",
    writes={("activations", "form"): "few-bit codes of activation functions"},
    apply=convert,
    knobs={"bits": (3, 4, 2, 1)},
    quality=lambda bits=3: Quality("lossy", 0.01 if bits >= 3 else 0.02, "holdfast check fewbit"),
    applies=_applies,
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m holdfast.training.saved.fewbit")
    parser.add_argument("command", choices=["tables"], help="write tables.json anew")
    parser.parse_args()
    _TABLES.write_text(_text(make_tables()))


def _text(tables: dict[str, dict]) -> str:
    """JSON with one line for each function and number of bits."""
    functions = []
    for name, table in tables.items():
        rows = ",\n".join(f'  "{bits}": {json.dumps(row)}' for bits, row in table["bits"].items())
        even = json.dumps(table["even"])
        functions.append(f'"{name}": {{"even": {even}, "bits": {{\n{rows}\n}}}}')
    return "{\n" + ",\n".join(functions) + "\n}\n"


if __name__ == "__main__":
    main()
