"""tinylm trained by CompAct against full Adam in loss, and against GaLore in bytes."""

import statistics

import torch
from torch import nn

from holdfast.checks import Result, check, tinylm
from holdfast.forms import Dense, Form
from holdfast.meter import Meter
from holdfast.training.optim.qgalore import QGaLoreAdamW
from holdfast.training.saved.compact import CompActAdamW, compact

SEEDS, RATIO, GAP, LR = 3, 0.25, 50, 1e-2
RANK = 16  # a quarter of tinylm's width


class GaLore(QGaLoreAdamW):
    """A float basis, refreshed at a fixed gap."""

    @classmethod
    def basis_form(cls, columns: int) -> Form:
        return Dense()


def _groups(model: nn.Module, **others) -> list[dict]:
    """What the blocks train, and the rest at tinylm's own rate."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    inside = [p for n, p in named if ".layers." in n and p.dim() == 2]
    outside = [p for n, p in named if not (".layers." in n and p.dim() == 2)]
    return [{"params": inside}, {"params": outside, "lr": tinylm.LR, **others}]


def _compact(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = compact(tinylm.model(seed), RATIO, GAP)
    return model, CompActAdamW(_groups(model), LR)


def _full(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = tinylm.model(seed)
    return model, torch.optim.AdamW(model.parameters(), tinylm.LR, weight_decay=0.0, fused=True)


def _galore(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = tinylm.model(seed)
    return model, GaLore(_groups(model, rank=None), LR, rank=RANK, gap=GAP, cos=2)


def _loss(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> float:
    tinylm.train(model, optimizer, seed=seed)
    return tinylm.evaluate(model)


def _peak(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Of a step without a new projection or basis."""
    (ids,) = tinylm.batches(tinylm.corpus()[0], 1, 0)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    with Meter(model, optimizer, inputs=ids) as meter:
        step()
    return meter.peak


@check(
    "compact",
    claim="a quarter of each linear's input is enough to train nearly as well, in fewer bytes than "
    "GaLore at the same rank",
)
def run(seed: int) -> Result:
    seeds = range(seed, seed + SEEDS)
    ours, full = (statistics.mean(_loss(*m(s), s) for s in seeds) for m in (_compact, _full))
    peaks = {m: _peak(*m(seed)) for m in (_compact, _galore, _full)}
    return Result(
        measured={"loss": ours, "peak_bytes": peaks[_compact]},
        baseline={
            "name": "full AdamW; GaLore of the same rank with 8-bit moments",
            "loss": full,
            "peak_bytes": peaks[_galore],
            "peak_bytes_full": peaks[_full],
        },
        threshold="mean over 3 seeds: loss <= full AdamW + 0.1; peak of a step < GaLore's",
        passed=ours <= full + 0.1 and peaks[_compact] < peaks[_galore],
    )
