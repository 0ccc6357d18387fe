"""PEQA: training only the scales of a 3-bit model wins back most of what the rounding lost."""

import copy

import torch

from holdfast.checks import Result, check, tinylm
from holdfast.training.adapters import attach
from holdfast.training.adapters.base import layers

STEPS = 100
LR = 1e-2


def rounded_and_trained(seed: int, bits: int, group: int | None) -> tuple[float, float, int]:
    """Validation loss after rounding, after training the scales, and bytes of the linears."""
    model = attach(copy.deepcopy(tinylm.trained(seed)), "peqa", bits=bits, group=group)
    before = tinylm.evaluate(model)
    scales = [p for p in model.parameters() if p.requires_grad]
    tinylm.train(model, torch.optim.Adam(scales, lr=LR), steps=STEPS, seed=seed + 1)
    held = sum(
        t.nbytes for layer in layers(model).values() for t in (*layer.buffers(), layer.scale_change)
    )
    return before, tinylm.evaluate(model), held


@check("peqa", claim="scales alone win back half of what 3-bit rounding costs, or more")
def run(seed: int) -> Result:
    dense = tinylm.evaluate(tinylm.trained(seed))
    # More training helps any model: the yardstick trains the same scales of 8-bit weights.
    _, ideal, _ = rounded_and_trained(seed, 8, None)
    measured = {}
    for name, bits, group in (
        ("3bit_row", 3, None),
        ("2bit_row", 2, None),
        ("2bit_group16", 2, 16),
    ):
        before, after, size = rounded_and_trained(seed, bits, group)
        measured |= {
            f"{name}_rounded": before,
            f"{name}_trained": after,
            f"{name}_bytes": size,
        }
        if group is None:
            measured[f"{name}_recovered"] = 1 - (after - ideal) / (before - dense)
    # Where rounding costs nothing there is nothing to win back.
    gap = measured["3bit_row_rounded"] - dense
    return Result(
        measured=measured,
        baseline={"fp32": dense, "8bit_trained": ideal},
        threshold="3bit_row_recovered >= 0.5, of a cost of 0.004 or more",
        passed=gap >= 0.004 and measured["3bit_row_recovered"] >= 0.5,
    )
