"""bfloat16 parameters, gradients and states: half the bytes, and what it costs in loss."""

import torch

from holdfast.checks import Result, check, tinylm
from holdfast.meter import Meter
from holdfast.plan.skeletons import BF16

SEEDS = 3


def _train(seed: int, dtype: torch.dtype) -> tuple[float, int]:
    """Validation loss, and bytes of parameters, gradients and optimizer at the step."""
    model = tinylm.model(seed).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=tinylm.LR, fused=True)
    tinylm.train(model, optimizer, seed=seed)
    ids = next(tinylm.batches(tinylm.corpus()[0], 1, seed))
    loss = tinylm.evaluate(model)
    with Meter(model, optimizer, inputs=ids) as meter:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    held = meter.ledger.column("device", "step")
    return loss, sum(held[name] for name in ("parameters", "gradients", "optimizer"))


@check(
    "bf16",
    claim=f"pure bfloat16 training loses at most {BF16.estimate:.0%} of loss against float32, in "
    "half the bytes",
)
def run(seed: int) -> Result:
    measured: dict[str, float] = {}
    baseline: dict[str, float] = {}
    increases = []
    for s in range(seed, seed + SEEDS):
        ours, nbytes = _train(s, torch.bfloat16)
        plain, plain_bytes = _train(s, torch.float32)
        measured[f"loss_seed{s}"], baseline[f"loss_seed{s}"] = ours, plain
        increases.append(ours / plain - 1)
    mean = sum(increases) / SEEDS
    ratio = nbytes / plain_bytes
    return Result(
        measured=measured
        | {"mean_increase": mean, "largest_increase": max(increases)}
        | {"bytes": nbytes, "ratio": ratio},
        baseline=baseline | {"bytes": plain_bytes},
        threshold=f"mean_increase <= {BF16.estimate:g} (what the planner assumes), ratio <= 0.51",
        passed=mean <= BF16.estimate and ratio <= 0.51,
    )
