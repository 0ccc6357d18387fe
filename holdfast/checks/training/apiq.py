"""ApiQ: at 2 bits the last block stays nearer to the given model's than after rounding or LoftQ."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.attach import hook
from holdfast.checks import Result, check, tinylm
from holdfast.forms.affine import Affine
from holdfast.training.adapters import attach
from holdfast.training.adapters.apiq import apiq
from holdfast.training.adapters.base import layers

# 16 divides the 176 inputs of the widest linear, 32 does not.
SHAPE = {"bits": 2, "group": 16, "rank": 4}
BATCHES, EPOCHS = 8, 20
LOFTQ_ROUNDS = 5


def last_block(model: nn.Module) -> Tensor:
    """Its output on validation windows that no method has seen."""
    val = tinylm.corpus()[1]
    ids = torch.stack(list(tinylm.batches(val, 4, seed=7))).flatten(0, 1)
    seen: list[Tensor] = []
    block: Any = model.model.layers[-1]
    with hook([block], lambda _, inputs, out: seen.append(out)), torch.no_grad():
        model(input_ids=ids)
    return seen[0]


def rounded(model: nn.Module) -> nn.Module:
    """Each weight to the nearest of its codes; B is zero."""
    return attach(model, "apiq", **SHAPE)


@torch.no_grad()
def loftq(model: nn.Module) -> nn.Module:
    """Codes and adapter of each weight by itself, in turn: W ~ round(W - BA), BA ~ svd(W - codes).

    Li et al., LoftQ: LoRA-fine-tuning-aware quantization for large language models, ICLR 2024.
    """
    dense = {name: p.clone() for name, p in model.named_parameters()}
    attach(model, "apiq", **SHAPE)
    for name, layer in layers(model).items():
        w, form, rank = dense[f"{name}.weight"], Affine(SHAPE["bits"], SHAPE["group"]), layer.rank
        low = torch.zeros_like(w)
        for _ in range(LOFTQ_ROUNDS):
            packed = form.encode(w - low)
            u, s, v = torch.linalg.svd(w - packed.dequantize(), full_matrices=False)
            b, a = u[:, :rank] * s[:rank].sqrt(), s[:rank].sqrt()[:, None] * v[:rank]
            low = b @ a
        layer.take(packed)
        layer.lora_B.copy_(b / layer.scale)
        layer.lora_A.copy_(a)
    return model


def held(model: nn.Module) -> int:
    """Bytes of codes, scales, zeros, A and B."""
    return sum(
        layer.packed.nbytes_packed + layer.lora_A.nbytes + layer.lora_B.nbytes
        for layer in layers(model).values()
    )


@check("apiq", claim="halves the last block's error of rounding to 2 bits, and is below LoftQ's")
def run(seed: int) -> Result:
    given = tinylm.trained(seed)
    wanted = last_block(given)
    ids = tinylm.batches(tinylm.corpus()[0], BATCHES, seed + 1, batch=8)
    calib = [{"input_ids": part} for part in ids]

    def ours(model: nn.Module) -> nn.Module:
        torch.manual_seed(seed)
        return apiq(model, calib, **SHAPE, epochs=EPOCHS)

    found: dict[str, dict[str, float]] = {}
    for name, method in {
        "apiq": ours,
        "rounded": rounded,
        "loftq": loftq,
    }.items():
        model = method(copy.deepcopy(given))
        found[name] = {
            "mse": (last_block(model) - wanted).square().mean().item(),
            "loss": tinylm.evaluate(model),
            "bytes": held(model),
        }
    mse = {name: numbers["mse"] for name, numbers in found.items()}
    sizes = {numbers["bytes"] for numbers in found.values()}

    def named(*methods: str) -> dict[str, float]:
        return {f"{m}_{what}": value for m in methods for what, value in found[m].items()}

    return Result(
        measured=named("apiq"),
        baseline={"given_loss": tinylm.evaluate(given), **named("rounded", "loftq")},
        threshold="apiq_mse <= 0.5 x rounded, below loftq; bytes equal",
        passed=mse["apiq"] <= 0.5 * mse["rounded"]
        and mse["apiq"] < mse["loftq"]
        and len(sizes) == 1,
    )
