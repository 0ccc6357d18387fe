"""A ResNet-like net of which every second convolution trains, against the same net unconverted."""

import copy
import statistics
import time

import torch
from torch import nn

from holdfast.checks import Result, check
from holdfast.training.saved import saved_bytes
from holdfast.training.saved.memsave import memsave

WIDTH, DEPTH, BATCH, SIZE, STEPS = 64, 6, 8, 32, 21


def _net() -> nn.Sequential:
    def unit(i: int, o: int) -> list[nn.Module]:
        norm = nn.BatchNorm2d(o).eval().requires_grad_(False)
        return [nn.Conv2d(i, o, 3, padding=1, bias=False), norm, nn.ReLU(inplace=True)]

    body = [layer for _ in range(DEPTH) for layer in unit(WIDTH, WIDTH)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, 10)]
    net = nn.Sequential(*unit(3, WIDTH), nn.MaxPool2d(2), *body, *head)
    for i, conv in enumerate(m for m in net if isinstance(m, nn.Conv2d)):
        conv.requires_grad_(i % 2 == 0)
    return net


def _step(net: nn.Module, x: torch.Tensor) -> float:
    """Seconds of the processor, which other processes disturb least."""
    start = time.process_time()
    net.zero_grad()
    net(x).square().mean().backward()
    return time.process_time() - start


@check(
    "memsave",
    claim="keeps exactly the inputs that trainable layers need, at least 30 % less than PyTorch, "
    "in about the same time",
)
def run(seed: int) -> Result:
    torch.manual_seed(seed)
    plain = _net()
    lean = memsave(copy.deepcopy(plain))
    x = torch.randn(BATCH, 3, SIZE, SIZE)
    full, pooled = BATCH * WIDTH * SIZE**2, BATCH * WIDTH * SIZE**2 // 4
    trainable = DEPTH // 2  # the first convolution trains too, and sees the caller's x
    formula = trainable * pooled * 4 + (full + DEPTH * pooled) // 8 + pooled + BATCH * WIDTH * 4
    kept = {name: saved_bytes(lambda m=m: m(x), m, [x]) for name, m in _pair(plain, lean)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    # In pairs, so that a busy machine slows both halves of a ratio.
    ratios = [_step(lean, x) / _step(plain, x) for _ in range(STEPS)]
    torch.set_num_threads(threads)
    apart = max(
        ((a.grad - b.grad).abs().max() / b.grad.abs().max()).item()
        for a, b in zip(lean.parameters(), plain.parameters(), strict=True)
        if b.grad is not None
    )
    ratio = statistics.median(ratios)
    return Result(
        measured={
            "saved_bytes": kept["lean"],
            "formula_bytes": formula,
            "time_ratio": ratio,
            "gradient_difference": apart,
        },
        baseline={"name": "the same layers of PyTorch", "saved_bytes": kept["plain"]},
        threshold="saved bytes == formula and <= 0.7 x baseline, time <= 1.15 x baseline, "
        "relative gradient difference <= 1e-6",
        passed=kept["lean"] == formula
        and kept["lean"] <= 0.7 * kept["plain"]
        and ratio <= 1.15
        and apart <= 1e-6,
    )


def _pair(plain: nn.Module, lean: nn.Module) -> list[tuple[str, nn.Module]]:
    return [("plain", plain), ("lean", lean)]
