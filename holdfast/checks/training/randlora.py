"""RandLoRA fits an update whose directions all matter alike better than LoRA, parameters equal."""

import torch
import torch.nn.functional as F
from torch import nn

from holdfast.checks import Result, check
from holdfast.training.adapters import attach

SIDE = 64
STEPS = 600
# (adapter, knobs): 64 * 2 * 17 = 2,176 and 32 * (2 + 64) = 2,112 trained numbers.
LORA, RANDLORA = ("lora", {"rank": 17}), ("randlora", {"rank": 2, "alpha": 2})
RATES = (3e-3, 1e-2, 3e-2)


def fitted(method: str, knobs: dict, seed: int, rate: float, flat: bool) -> tuple[float, int]:
    """Relative squared error of the fitted update, and how many numbers were trained."""
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(SIDE, SIDE, generator=generator) / SIDE**0.5
    if flat:
        teacher = torch.linalg.qr(teacher).Q
    torch.manual_seed(seed)
    student = nn.Linear(SIDE, SIDE, bias=False)
    nn.init.zeros_(student.weight)
    model = attach(nn.Sequential(student), method, **knobs)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        x = torch.randn(128, SIDE, generator=generator)
        optimizer.zero_grad()
        F.mse_loss(model(x), x @ teacher.T).backward()
        optimizer.step()
        schedule.step()
    error = (model[0].delta() - teacher).square().sum() / teacher.square().sum()
    return error.item(), sum(p.numel() for p in trained)


@check("randlora", claim="fits a flat-spectrum update with 0.7 of LoRA's error, equal parameters")
def run(seed: int) -> Result:
    def best(way: tuple[str, dict], flat: bool) -> tuple[float, int]:
        # Each at its best rate, or the comparison would be one of rates.
        return min(fitted(*way, seed, rate, flat) for rate in RATES)

    ours, base = best(RANDLORA, True), best(LORA, True)
    result = Result.ratio(ours[0], base[0], at_most=0.7, floor=0.1, name="error")
    result.measured["trained"], result.baseline["trained"] = ours[1], base[1]
    # The other side: where few directions dominate, a product of low rank is the better fit.
    result.measured["gaussian_error"] = best(RANDLORA, False)[0]
    result.baseline["gaussian_error"] = best(LORA, False)[0]
    return result
