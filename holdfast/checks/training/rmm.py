"""tinylm whose linears keep sketches of their inputs, against exact training and small batches."""

import statistics

import torch
from torch import nn

from holdfast.checks import Result, check, tinylm
from holdfast.training.saved import saved_bytes
from holdfast.training.saved.rmm import VarianceProbe, convert

SEEDS = 3
# Above the exact loss, in nats per byte. At 0.5 the mean over three seeds was measured as 0.06.
COST = {0.5: 0.08, 0.2: 0.15}


def _loss(seed: int, ratio: float | None = None, batch: int = tinylm.BATCH) -> float:
    model = tinylm.model(seed)
    if ratio is not None:
        convert(model, ratio)
    optimizer = torch.optim.Adam(model.parameters(), lr=tinylm.LR)
    for ids in tinylm.batches(tinylm.corpus()[0], tinylm.STEPS, seed, batch):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return tinylm.evaluate(model)


def _variance_ratio(seed: int, ratio: float) -> float:
    """Median over the layers of a trained model."""
    model = convert(tinylm.trained(seed), ratio).train()
    ids = next(tinylm.batches(tinylm.corpus()[0], 1, seed))
    with VarianceProbe(model) as probe:
        model(input_ids=ids, labels=ids).loss.backward()
    return statistics.median(probe.ratios.values())


def _kept(ratio: float | None) -> int:
    """Saved bytes of one linear of 64 to 176 features."""
    model = nn.Sequential(nn.Linear(64, 176))
    if ratio is not None:
        convert(model, ratio)
    x = torch.randn(tinylm.BATCH * tinylm.LENGTH, 64)
    return saved_bytes(lambda: model(x * 1), model)


@check(
    "rmm",
    claim="a fifth of the rows of a linear's input, sketched, still trains; the noise that this "
    "adds is unbiased and reported",
)
def run(seed: int) -> Result:
    seeds = range(seed, seed + SEEDS)
    exact = [_loss(s) for s in seeds]
    measured: dict[str, float] = {}
    passed = True
    for ratio, most in COST.items():
        above = statistics.mean(_loss(s, ratio) - e for s, e in zip(seeds, exact, strict=True))
        rows = round(ratio * tinylm.BATCH * tinylm.LENGTH)
        kept = _kept(ratio)
        measured |= {
            f"loss_above_exact_at_{ratio}": above,
            f"variance_over_batch_variance_at_{ratio}": _variance_ratio(seed, ratio),
            f"saved_bytes_at_{ratio}": kept,
        }
        passed &= above <= most and kept == 4 * rows * 64 + 8
    small = [_loss(s, batch=round(0.2 * tinylm.BATCH)) for s in seeds]
    fewer = statistics.mean(small) - statistics.mean(exact)
    return Result(
        measured,
        baseline={
            "name": "exact gradients of all tokens",
            "loss": statistics.mean(exact),
            "saved_bytes": _kept(None),
            # What else would keep as few rows.
            "loss_above_exact_of_a_fifth_of_the_batch": fewer,
        },
        threshold=f"mean over {SEEDS} seeds: "
        + ", ".join(f"loss <= exact + {most} at ratio {ratio}" for ratio, most in COST.items())
        + ", and below that of a fifth of the batch; saved bytes of a linear == 4*k*n + 8",
        passed=bool(passed) and measured["loss_above_exact_at_0.2"] < fewer,
    )
