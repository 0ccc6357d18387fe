"""tinylm trained by Q-GaLore against GaLore, its float and always refreshing form."""

import statistics

import torch
from torch import nn

from holdfast.checks import Result, check, tinylm
from holdfast.forms import Dense, Form
from holdfast.training.optim.qgalore import QGaLoreAdamW, int8_linear

SEEDS, RANK, GAP, LR = 3, 16, 50, 1e-2


class _FloatBasis(QGaLoreAdamW):
    @classmethod
    def basis_form(cls, columns: int) -> Form:
        return Dense()


def _groups(model: nn.Module) -> list[dict]:
    """The matrices of the blocks in subspaces; embeddings, head and norms by plain Adam."""
    inside = [p for n, p in model.named_parameters() if ".layers." in n and p.dim() == 2]
    ids = {id(p) for p in inside}
    others = [p for p in model.parameters() if id(p) not in ids]
    return [{"params": inside}, {"params": others, "rank": None, "lr": tinylm.LR}]


def _loss(seed: int, optimizer: type[QGaLoreAdamW], pack: bool = False) -> float:
    model = tinylm.model(seed)
    if pack:
        int8_linear(model)
    tinylm.train(model, optimizer(_groups(model), LR, rank=RANK, gap=GAP), seed=seed)
    return tinylm.evaluate(model)


def _refreshes(seed: int, cos: float) -> int:
    """Singular value decompositions in 60 steps of a gradient whose subspace never changes."""
    g = torch.Generator().manual_seed(seed)
    planted = torch.randn(96, 4, generator=g) @ torch.randn(4, 64, generator=g)
    p = nn.Parameter(torch.zeros(96, 64))
    optimizer = QGaLoreAdamW([p], LR, rank=4, gap=2, cos=cos)
    for step in range(60):
        p.grad = planted * (1 + 0.1 * torch.cos(torch.tensor(float(step))))
        optimizer.step()
    return optimizer.refreshes()


@check(
    "qgalore",
    claim="an INT4 basis and INT8 weights cost little loss, and a stable subspace saves refreshes",
)
def run(seed: int) -> Result:
    seeds = range(seed, seed + SEEDS)
    floating, int4, int8 = (
        statistics.mean(_loss(s, *how) for s in seeds)
        for how in ((_FloatBasis,), (QGaLoreAdamW,), (QGaLoreAdamW, True))
    )
    # A cosine never reaches 2, so that the gap never grows: GaLore.
    ours, galore = _refreshes(seed, 0.4), _refreshes(seed, 2)
    return Result(
        measured={"loss_int4": int4, "loss_int4_int8_weights": int8, "refreshes": ours},
        baseline={
            "name": "GaLore: float basis, float weights, fixed gap",
            "loss": floating,
            "refreshes": galore,
        },
        threshold="mean over 3 seeds: loss with INT4 basis <= baseline + 0.02, with INT8 weights "
        "too <= baseline + 0.04; refreshes of a planted subspace <= half of the baseline's",
        passed=int4 <= floating + 0.02 and int8 <= floating + 0.04 and ours <= galore / 2,
    )
