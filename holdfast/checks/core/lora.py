"""LoRA beside int4 weights learns a new domain as well as beside dense ones, in fewer bytes."""

import copy
import sysconfig
from pathlib import Path

import torch
from torch import Tensor, nn

from holdfast.checks import Result, check, tinylm
from holdfast.errors import UsageError
from holdfast.meter import Meter
from holdfast.training.adapters import attach
from holdfast.training.adapters.packed import pack_weights

STEPS, RANK = 60, 4
# The same search for both sides; each counts with its best.
RATES = (3e-3, 1e-2, 3e-2)


def manual() -> tuple[Tensor, Tensor]:
    """Training and validation tokens of the language reference: English, where tinylm read code."""
    path = Path(sysconfig.get_path("stdlib")) / "pydoc_data" / "topics.py"
    if not path.exists():
        raise UsageError(f"{path} is missing; this check needs Python's documentation topics")
    text = path.read_bytes().translate(None, bytes(range(128, 256)))
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    return tokens[: -len(tokens) // 10], tokens[-len(tokens) // 10 :]


@torch.no_grad()
def loss_on(model: nn.Module, tokens: Tensor) -> float:
    starts = torch.linspace(0, len(tokens) - tinylm.LENGTH, tinylm.VALIDATION_WINDOWS).long()
    windows = tokens.unfold(0, tinylm.LENGTH, 1)[starts]
    losses = [model(input_ids=ids, labels=ids).loss.item() for ids in windows.split(64)]
    return sum(losses) / len(losses)


def tuned(model: nn.Module, seed: int, rate: float) -> tuple[float, dict[str, int], int]:
    """Validation loss after STEPS, bytes by category at the peak of one of them, and that peak."""
    train, val = manual()
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    for i, ids in enumerate(tinylm.batches(train, STEPS, seed)):
        if i < STEPS - 1:
            _step(model, optimizer, ids)
            continue
        with Meter(model, optimizer, inputs=(ids,)) as meter:
            _step(model, optimizer, ids)
    return loss_on(model.eval(), val), meter.at_peak, meter.peak


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor) -> None:
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def head_only(model: nn.Module) -> nn.Module:
    """The usual cheap way: freeze everything but the output layer."""
    model.requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    return model


def trained_numbers(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@check("lora", claim="learns beside int4 weights what it learns beside dense ones, within 1 %")
def run(seed: int) -> Result:
    start = tinylm.trained(seed)
    before = loss_on(start, manual()[1])
    ways = {
        "lora": (lambda m: attach(m, "lora", rank=RANK), RATES),
        "int4_lora": (lambda m: attach(pack_weights(m), "lora", rank=RANK), RATES),
        # For orientation; a change of domain is where a new head alone does well.
        "head": (head_only, RATES),
        "full": (lambda m: m, (tinylm.LR,)),
    }
    found: dict[str, dict[str, float]] = {}
    for name, (prepare, rates) in ways.items():
        torch.manual_seed(seed)
        models = [prepare(copy.deepcopy(start)) for _ in rates]
        runs = [tuned(m, seed, r) for m, r in zip(models, rates, strict=True)]
        loss, held, peak = min(runs, key=lambda run: run[0])
        found[name] = {"loss": loss, "trained": trained_numbers(models[0]), "peak": peak}
        found[name] |= {kind: held[kind] for kind in ("parameters", "optimizer")}
    int4, base = found.pop("int4_lora"), found.pop("lora")
    others = {f"{name}_{key}": value for name, row in found.items() for key, value in row.items()}
    return Result(
        measured=int4,
        baseline=base | {"loss_before": before} | others,
        threshold="loss <= 1.01 x dense LoRA's (down by 0.2), parameters <= 0.4 x, peak below",
        passed=before - base["loss"] >= 0.2
        and int4["loss"] <= 1.01 * base["loss"]
        and int4["parameters"] <= 0.4 * base["parameters"]
        and int4["peak"] < base["peak"],
    )
