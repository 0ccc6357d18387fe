"""tinylm with a few-bit SiLU against the exact SiLU, and the bytes of a GELU network."""

import statistics

import torch
from torch import nn

from holdfast.attach import swap
from holdfast.checks import Result, check, tinylm
from holdfast.training.saved import saved_bytes
from holdfast.training.saved.fewbit import FewBit, convert

SEEDS = 3


def _model(seed: int, bits: int | None) -> nn.Module:
    model = tinylm.model(seed)
    for name, module in list(model.named_modules()):
        # Not `convert`, which would recompute these exactly: the check is about the step function.
        if bits is not None and name.endswith("act_fn"):
            swap(model, name, FewBit(module, bits))
    return model


def _loss(seed: int, bits: int | None) -> float:
    model = _model(seed, bits)
    tinylm.train(model, torch.optim.Adam(model.parameters(), lr=tinylm.LR), seed=seed)
    return tinylm.evaluate(model)


def _gradient_error(seed: int, bits: int) -> float:
    """Relative error of the gate projections' gradients on one batch of an untrained model."""
    grads = []
    for steps in (bits, None):
        model = _model(seed, steps)
        ids = next(tinylm.batches(tinylm.corpus()[0], 1, seed))
        model(input_ids=ids, labels=ids).loss.backward()
        gates = [p.grad.flatten() for n, p in model.named_parameters() if "gate_proj" in n]
        grads.append(torch.cat(gates))
    return ((grads[0] - grads[1]).norm() / grads[1].norm()).item()


def _mlp_bytes() -> tuple[int, int, int]:
    """Saved bytes of Linear, GELU, Linear with GELU exact and 3-bit; elements of the GELU."""
    plain = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    x = torch.randn(128, 64)
    before = saved_bytes(lambda: plain(x), plain, [x])
    return before, saved_bytes(lambda: convert(plain, 3)(x), plain, [x]), 128 * 256


@check(
    "fewbit",
    claim="a 3-bit derivative trains like the exact one, and its code takes 3 bits per element",
)
def run(seed: int) -> Result:
    seeds = range(seed, seed + SEEDS)
    exact = [_loss(s, None) for s in seeds]
    above = {
        bits: statistics.mean(_loss(s, bits) - e for s, e in zip(seeds, exact, strict=True))
        for bits in (3, 1)
    }
    error = {bits: _gradient_error(seed, bits) for bits in (3, 1)}
    before, after, n = _mlp_bytes()
    return Result(
        measured={
            "loss_above_exact_3_bits": above[3],
            "loss_above_exact_1_bit": above[1],
            "gradient_error_3_bits": error[3],
            "gradient_error_1_bit": error[1],
            "mlp_saved_bytes": after,
        },
        baseline={
            "name": "torch's SiLU and GELU",
            "loss": statistics.mean(exact),
            "mlp_saved_bytes": before,
        },
        threshold="mean over 3 seeds: loss at 3 bits <= exact + 0.02; on one batch: gradient error "
        "of 3 bits <= half of 1 bit's; saved bytes lower by 4*N - 3*N/8",
        passed=above[3] <= 0.02
        and error[3] <= 0.5 * error[1]
        and before - after == 4 * n - 3 * n // 8,
    )
