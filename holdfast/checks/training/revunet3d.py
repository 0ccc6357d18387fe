"""Volumes that fit a budget, and ellipsoids segmented, against the same net without reversal."""

import torch
from torch import Tensor

from holdfast.checks import Result, check
from holdfast.meter import Meter
from holdfast.training.models.revunet3d import (
    MBConv3d,
    RevUNet3d,
    VolumePlan,
    dice,
    dice_bce,
    plan_volume,
    predict_step,
    regions,
)
from holdfast.training.step import recompute

BUDGET = 64 * 2**20
WIDTH, DEPTH, BLOCKS = 8, 2, 2
SIDE, STEPS, LR, HELD_OUT = 24, 80, 0.01, 8
# Brightness of each label's tissue in each of four modalities.
BRIGHTNESS = torch.tensor(
    [[0.0, 0.0, 0.0, 0.0], [0.5, -1.0, 1.0, 0.0], [1.0, 0.5, 0.0, -0.5], [0.0] * 4, [0.0, 1, 1, 1]]
)
NOISE = 0.6


def ellipsoids(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noisy volumes (count,4,SIDE,SIDE,SIDE) of three nested ellipsoids each, and their regions."""
    axis = torch.linspace(-1, 1, SIDE)
    grid = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1)
    labels = torch.zeros(count, SIDE, SIDE, SIDE, dtype=torch.long)
    for volume in labels:
        centre = 0.7 * (torch.rand(3, generator=generator) - 0.5)
        radii = 0.45 + 0.3 * torch.rand(3, generator=generator)
        turn = torch.linalg.qr(torch.randn(3, 3, generator=generator)).Q
        distance = (((grid - centre) @ turn) / radii).norm(dim=-1)
        for label, within in ((2, 1.0), (4, 0.75), (1, 0.45)):
            volume[distance < within] = label
    noise = torch.randn(count, 4, SIDE, SIDE, SIDE, generator=generator)
    return BRIGHTNESS[labels].permute(0, 4, 1, 2, 3) + NOISE * noise, regions(labels)


def train(seed: int, reversible: bool) -> float:
    """Mean Dice over held-out volumes and regions, after the same steps from the same weights."""
    torch.manual_seed(seed)
    net = RevUNet3d(width=WIDTH, depth=DEPTH, blocks=1, reversible=reversible)
    optimizer = torch.optim.Adam(net.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=STEPS)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        x, target = ellipsoids(1, generator)
        optimizer.zero_grad()
        dice_bce(net(x), target).backward()
        optimizer.step()
        schedule.step()
    x, target = ellipsoids(HELD_OUT, torch.Generator().manual_seed(seed + 1000))
    with torch.no_grad():
        return dice(net(x), target).mean().item()


def allocated(plan: VolumePlan, reversible: bool) -> int:
    """Bytes that a real step of a plan takes from the allocator, workspaces included."""
    net = RevUNet3d(width=plan.width, depth=plan.depth, blocks=plan.blocks, reversible=reversible)
    optimizer = torch.optim.Adam(net.parameters())
    x, target = (torch.zeros(1, channels, *(plan.crop,) * 3) for channels in (4, 3))

    def step() -> None:
        dice_bce(net(x), target).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    with Meter(net, optimizer, inputs=(x, target), backend="allocator") as meter:
        step()
    return meter.peak


def _recomputed() -> RevUNet3d:
    net = RevUNet3d(width=WIDTH, depth=DEPTH, blocks=BLOCKS, reversible=False)
    for module in [m for m in net.modules() if isinstance(m, MBConv3d)]:
        recompute(module)
    return net


@check(
    "revunet3d",
    claim="trains on at least twice the volume within the same bytes, and segments as well",
)
def run(seed: int) -> Result:
    sizes = {"width": WIDTH, "depth": DEPTH, "blocks": BLOCKS}
    plans = {
        "reversible": plan_volume(BUDGET, crop=40, **sizes),
        "plain": plan_volume(BUDGET, crop=20, reversible=False, **sizes),
    }
    taken = {name: allocated(plan, name == "reversible") for name, plan in plans.items()}
    volume = {name: plan.crop**3 for name, plan in plans.items()}
    scores = {name: train(seed, name == "reversible") for name in plans}
    gain = volume["reversible"] / volume["plain"]
    apart = abs(scores["reversible"] - scores["plain"])
    return Result(
        measured={
            "crop": plans["reversible"].crop,
            "volume_ratio": gain,
            "predicted_bytes": plans["reversible"].peak,
            "allocated_bytes": taken["reversible"],
            "dice": scores["reversible"],
        },
        baseline={
            "name": "the same net without reversal",
            "crop": plans["plain"].crop,
            "predicted_bytes": plans["plain"].peak,
            "allocated_bytes": taken["plain"],
            "dice": scores["plain"],
            "predicted_bytes_at_our_crop_recomputing_each_function": predict_step(
                _recomputed, plans["reversible"].crop
            ).peak,
        },
        threshold=f"volume within {BUDGET // 2**20} MiB >= 2 x baseline, by prediction, and both "
        "really within it by the allocator; Dice >= 0.85 and within 0.02 of baseline",
        passed=gain >= 2
        and max(taken.values()) <= BUDGET
        and scores["reversible"] >= 0.85
        and apart <= 0.02,
    )
