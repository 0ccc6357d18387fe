"""tinylm under FP8 states with and without expansion, 8-bit states, and FP8 activations."""

import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from holdfast.checks import Result, check, tinylm
from holdfast.forms import Fp8
from holdfast.native.coat import decode, encode
from holdfast.training.optim.adamw8 import AdamW8
from holdfast.training.optim.coat import CoatAdamW, coat_activations, state_bytes
from holdfast.training.saved import saved_bytes

# The card's bounds: nats per byte above fp32, and the mean squared error of an update of size one.
COST, ERROR = 0.03, 1e-3
BLOCK = 128


class PlainFp8(torch.optim.Optimizer):
    """AdamW on E4M3 states under the same blocks, without expansion: the baseline."""

    form = Fp8("e4m3", "block", BLOCK)

    def __init__(self, params, lr: float):
        super().__init__(params, {"lr": lr, "step": 0})

    @staticmethod
    def _kept(state: dict[str, Any], name: str) -> Tensor | float:
        return state[name].dequantize() if name in state else 0.0

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> Any:
        for group in self.param_groups:
            group["step"] += 1
            for p in group["params"]:
                state = self.state[p]
                m = 0.9 * self._kept(state, "m") + 0.1 * p.grad
                v = 0.999 * self._kept(state, "v") + 0.001 * p.grad.square()
                state["m"], state["v"] = self.form.encode(m), self.form.encode(v)
                size = (v / (1 - 0.999 ** group["step"])).sqrt_().add_(1e-8)
                p.mul_(1 - 0.01 * group["lr"])
                p.addcdiv_(m, size, value=-group["lr"] / (1 - 0.9 ** group["step"]))


class Shadows(torch.optim.AdamW):
    """AdamW that also lets other optimizers take each of its steps, from the same place."""

    def __init__(self, params, lr: float, others: dict[str, Any]):
        super().__init__(params, lr=lr)
        self.mine = [p for group in self.param_groups for p in group["params"]]
        self.copies = {n: [p.detach().clone() for p in self.mine] for n in others}
        self.others = {n: make(self.copies[n], lr=lr) for n, make in others.items()}
        self.apart, self.size = dict.fromkeys(others, 0.0), 0.0

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> Any:
        for name, copies in self.copies.items():
            for q, p in zip(copies, self.mine, strict=True):
                q.copy_(p)
                q.grad = p.grad
            self.others[name].step()
        before = [p.clone() for p in self.mine]
        super().step()
        for i, p in enumerate(self.mine):
            self.size += (p - before[i]).square().sum().item()
            for name, copies in self.copies.items():
                self.apart[name] += (p - copies[i]).square().sum().item()


def _followed(seed: int) -> tuple[float, dict[str, float]]:
    """Loss under fp32 states; how far others' updates are from its own, relative to their size."""
    model = tinylm.model(seed)
    others = {"expanded": CoatAdamW, "plain": PlainFp8, "adamw8": _ours}
    optimizer = Shadows(model.parameters(), tinylm.LR, others)
    tinylm.train(model, optimizer, seed=seed)
    apart = {name: (x / optimizer.size) ** 0.5 for name, x in optimizer.apart.items()}
    return tinylm.evaluate(model), apart


def _loss(seed: int, make=torch.optim.AdamW, lean: bool = False) -> float:
    model = tinylm.model(seed)
    if lean:
        coat_activations(model)
    tinylm.train(model, make(model.parameters(), lr=tinylm.LR), seed=seed)
    return tinylm.evaluate(model)


def _ours(params, lr: float) -> AdamW8:
    # Without the size threshold, so that every state has 8 bits.
    return AdamW8(params, lr=lr, min_numel=1)


def _expanded(x: Tensor) -> Tensor:
    code, scale, power = encode(x, BLOCK)
    return decode(code, scale, power, BLOCK)


def _plain(x: Tensor) -> Tensor:
    return PlainFp8.form.encode(x).dequantize()


def _updates(seed: int) -> dict[str, dict[str, float]]:
    """Updates of size one from moments over e^-3 .. e^3 (one deviation of log v) in each block."""
    g = torch.Generator().manual_seed(seed)
    v = torch.exp(3 * torch.randn(1 << 18, generator=g))
    m = v.sqrt() * torch.randn(len(v), generator=g).sign()
    found = {}
    for name, form in (("expanded", _expanded), ("plain", _plain)):
        kept = form(v)
        update = form(m) / (kept.sqrt() + 1e-8)
        found[name] = {
            "zeros": (kept == 0).double().mean().item(),
            "error": (update - m.sign()).square().double().mean().item(),
        }
    return found


def _activation_bytes(seed: int) -> dict[str, int]:
    """What a bf16 tinylm saves for backward."""
    ids = next(tinylm.batches(tinylm.corpus()[0], 1, seed))
    kept = {}
    for name in ("plain", "fp8"):
        model: Any = tinylm.model(seed).bfloat16()
        if name == "fp8":
            coat_activations(model)
        kept[name] = saved_bytes(functools.partial(model, input_ids=ids), model, [ids])
    return kept


@check(
    "coat",
    claim="FP8 states with an expanded range move weights as fp32 states do and train as well; "
    "activations in FP8 take about half of bf16's",
)
def run(seed: int, full: bool = False) -> Result:
    seeds = range(seed, seed + (3 if full else 1))
    followed = [_followed(s) for s in seeds]
    loss = {
        "fp32": statistics.mean(x for x, _ in followed),
        "plain": statistics.mean(_loss(s, PlainFp8) for s in seeds),
        "expanded": statistics.mean(_loss(s, CoatAdamW) for s in seeds),
        "adamw8": statistics.mean(_loss(s, _ours) for s in seeds),
        "activations": statistics.mean(_loss(s, lean=True) for s in seeds),
    }
    apart = {
        name: statistics.mean(x[name] for _, x in followed)
        for name in ("expanded", "plain", "adamw8")
    }
    updates, kept = _updates(seed), _activation_bytes(seed)
    parameters = list(tinylm.model(seed).parameters())
    return Result(
        measured={
            **{f"loss_{name}": loss[name] for name in ("expanded", "adamw8", "activations")},
            "update_difference": apart["expanded"],
            "update_difference_adamw8": apart["adamw8"],
            "wide_block_error": updates["expanded"]["error"],
            "wide_block_lost": updates["expanded"]["zeros"],
            "state_bytes": sum(state_bytes(p.shape, p.dtype) for p in parameters),
            "saved_bytes": kept["fp8"],
        },
        baseline={
            "loss_fp32": loss["fp32"],
            "loss_plain_fp8": loss["plain"],
            "update_difference_plain_fp8": apart["plain"],
            "wide_block_error_plain_fp8": updates["plain"]["error"],
            "wide_block_lost_plain_fp8": updates["plain"]["zeros"],
            "state_bytes_fp32": sum(8 * p.numel() + 4 for p in parameters),
            "saved_bytes_bf16": kept["plain"],
        },
        threshold=f"mean losses of ours <= fp32 + {COST}; update difference < half of plain FP8's; "
        f"wide blocks: error < {ERROR:g} < plain's, none lost, plain loses > 1 %; saved bytes < "
        "0.55 x bf16's",
        passed=max(loss["expanded"], loss["adamw8"], loss["activations"]) <= loss["fp32"] + COST
        and apart["expanded"] < 0.5 * apart["plain"]
        and updates["expanded"]["error"] < ERROR < updates["plain"]["error"]
        and updates["expanded"]["zeros"] == 0
        and updates["plain"]["zeros"] > 0.01
        and kept["fp8"] < 0.55 * kept["plain"],
    )
