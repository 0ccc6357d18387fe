import copy
import gc
import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from holdfast.errors import DoesNotFit, UsageError
from holdfast.meter import Meter
from holdfast.training.models import revunet3d
from holdfast.training.models.revunet3d import (
    REGIONS,
    RevMBConv3d,
    RevUNet3d,
    dice,
    dice_bce,
    plan_volume,
    predict_step,
    regions,
)
from holdfast.training.reversible import PROBES
from holdfast.training.saved import saved_bytes


def net(**sizes):
    torch.manual_seed(0)
    return RevUNet3d(**({"width": 4, "depth": 2, "blocks": 2, "expansion": 2} | sizes))


def volume(side=8, batch=1, dtype=torch.float32):
    torch.manual_seed(1)
    x = torch.randn(batch, 4, side, side, side, dtype=dtype)
    return x, (torch.rand(batch, 3, side, side, side) < 0.3).to(dtype)


def step(model, x, target):
    model.zero_grad()
    logits = model(x)
    dice_bce(logits, target).backward()
    return [logits.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-4), (torch.float64, 1e-10)], ids=["fp32", "fp64"]
)
def test_switch_changes_neither_outputs_nor_gradients(dtype, limit):
    model = net().to(dtype)
    plain = copy.deepcopy(model)
    plain.reversible = False
    assert not any(s.reversible for s in plain.modules() if isinstance(s, RevMBConv3d))
    data = volume(dtype=dtype)
    got, want = step(model, *data), step(plain, *data)
    # Together: a bias before a norm has a gradient of rounding errors alone.
    gradients = [torch.cat([g.flatten() for g in found[1:]]) for found in (got, want)]
    for a, b in ((got[0], want[0]), gradients):
        assert (a - b).norm() <= limit * b.norm()


def test_empty_crops_have_the_same_gradients_too():
    model, (x, target) = net(), volume()
    got = torch.cat([g.flatten() for g in step(model, 0 * x, 0 * target)[1:]])
    model.reversible = False
    want = torch.cat([g.flatten() for g in step(model, 0 * x, 0 * target)[1:]])
    assert (got - want).norm() <= 1e-4 * want.norm()


def test_block_is_invertible():
    block, x = RevMBConv3d(6, blocks=3).double(), torch.randn(2, 6, 4, 5, 3, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(block.inverse(block(x)), x, atol=1e-12, rtol=0)


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("batch", [1, 2])
def test_saved_bytes_follow_the_formula_for_any_number_of_blocks(blocks, batch):
    model, (x, _) = net(blocks=blocks, depth=2, width=4), volume(12, batch)
    voxels, sequences = 12**3, 5
    levels = 2 * (4 * voxels + 8 * voxels // 8) + 16 * voxels // 64
    want = 4 * batch * levels + sequences * 2 * PROBES * 4
    # Half the coarsest input has 8 * 27 numbers, so that every probe is full.
    assert saved_bytes(lambda: model(x), model, [x]) == want


@pytest.mark.parametrize("backend", ["logical", "allocator"])
def test_peak_does_not_grow_with_blocks_and_plain_does(backend):
    gc.collect()
    x, target = volume(16)
    above, weights = {}, {}
    # The last block's parts are still slices of the output, so 2 blocks are the fewest of many.
    for blocks in (2, 5):
        model = net(blocks=blocks)
        weights[blocks] = sum(p.numel() * p.element_size() for p in model.parameters())
        for reversible in (True, False):
            model.reversible = reversible
            step(model, x, target)
            model.zero_grad()
            with Meter(model, inputs=(x, target), backend=backend) as meter:
                step(model, x, target)
            above[blocks, reversible] = meter.peak - meter.base
    # Gradients are as large as the weights.
    assert above[5, True] - above[2, True] <= weights[5] - weights[2]
    assert above[5, False] >= 2 * above[2, False]


def test_at_peak_names_what_remains():
    """The working set of one full-resolution block, not the kept outputs, is the peak."""
    meter = predict_step(net, 16)
    assert sum(meter.at_peak.values()) == meter.peak
    assert meter.ledger.peak_phase() == "backward"
    kept = saved_bytes(lambda: net()(volume(16)[0]), net())
    assert meter.at_peak["activations"] + meter.at_peak["temporary"] > 2 * kept


@pytest.mark.parametrize("reversible", [True, False])
def test_prediction_equals_measurement(reversible):
    model = net(reversible=reversible)
    optimizer = torch.optim.Adam(model.parameters())
    # Zeros, as in the prediction: bytes do not depend on values.
    x, target = torch.zeros(1, 4, 8, 8, 8), torch.zeros(1, 3, 8, 8, 8)

    def train():
        dice_bce(model(x), target).backward()
        optimizer.step()
        optimizer.zero_grad()

    train()
    with Meter(model, optimizer, inputs=(x, target)) as meter:
        train()
    assert predict_step(lambda: net(reversible=reversible), 8).peak == meter.peak


class Peaks:
    """Peaks that grow as a net's do, in place of predictions."""

    def __init__(self, monkeypatch):
        self.asked = []
        monkeypatch.setattr(revunet3d, "predict_step", self.predict)

    def predict(self, build, crop, batch):
        with torch.device("meta"):
            width = build().stem.out_channels
        self.asked.append((crop, width))
        self.peak = 1000 + crop**3 * width
        self.at_peak = {"activations": self.peak}
        return self


@pytest.mark.parametrize("first", [8, 64, 512])
@pytest.mark.parametrize("usable", [9000, 1000 + 40**3 * 8, 1000 + 40**3 * 8 - 1, 10**8])
def test_largest_crop_is_found_from_any_start(monkeypatch, first, usable):
    peaks = Peaks(monkeypatch)
    plan = plan_volume(usable, crop=first, width=8, depth=2, margin=0)
    want = max(c for c in range(4, 400, 4) if 1000 + c**3 * 8 <= usable)
    assert (plan.crop, plan.peak) == (want, 1000 + want**3 * 8)
    assert len(peaks.asked) == len(set(peaks.asked)) <= 8


def test_width_and_depth_are_sought_too(monkeypatch):
    Peaks(monkeypatch)
    plan = plan_volume(1000 + 8**3 * 12, "width", crop=8, depth=1, margin=0)
    assert (plan.width, plan.crop) == (12, 8)
    assert plan_volume("1MB", "depth", crop=24, width=4, margin=0.5).depth == 3  # 24 = 3 * 2^3
    assert plan_volume(4 * 2**20, crop=8, width=4).at_peak.keys() == {"activations"}


def test_a_real_plan_fits_and_the_next_does_not():
    plan = plan_volume("2MiB", crop=16, width=4, depth=1, blocks=1)
    assert plan.peak <= 0.8 * 2**21
    larger = predict_step(lambda: RevUNet3d(width=4, depth=1, blocks=1), plan.crop + 2)
    assert larger.peak > 0.8 * 2**21


def test_regions_overlap():
    labels = torch.tensor([0, 1, 2, 3, 4]).view(1, 5, 1, 1)
    masks = regions(labels).flatten(1).view(3, 5)
    assert list(REGIONS) == ["whole", "core", "enhancing"]
    assert masks.tolist() == [[0, 1, 1, 1, 1], [0, 1, 0, 1, 1], [0, 0, 0, 1, 1]]


def test_losses_by_hand():
    target = torch.zeros(1, 1, 1, 2, 2)
    target[..., 0, :] = 1
    logits = torch.tensor([[9.0, -9.0], [9.0, -9.0]]).view(1, 1, 1, 2, 2)
    # One voxel of two found, one of two wrong: (2*1 + 1) / (2 + 2 + 1).
    torch.testing.assert_close(dice(logits, target), torch.tensor([0.6]))
    # Of the four voxels two cost -log p and two -log(1 - p), at p = sigmoid(9).
    bce = (math.log1p(math.exp(-9)) + math.log1p(math.exp(9))) / 2
    assert dice_bce(logits, target).item() == pytest.approx(1 - 3 / 5 + bce)
    assert dice(-9 * torch.ones(1, 1, 2, 2, 2), torch.zeros(1, 1, 2, 2, 2)).item() == 1


def test_bf16_autocast_and_recompute_around_it():
    model, (x, target) = net(), volume()
    with torch.autocast("cpu", torch.bfloat16):
        step(model, x, target)
    assert all(p.grad.isfinite().all() for p in model.parameters())
    want = [g.clone() for g in step(model, x, target)]
    model.zero_grad()
    dice_bce(checkpoint(model, x, use_reentrant=False), target).backward()
    for p, g in zip(model.parameters(), want[1:], strict=True):
        torch.testing.assert_close(p.grad, g)


def test_bad_sizes_are_refused():
    with pytest.raises(UsageError, match="5 channels do not split into two halves; use 6"):
        RevMBConv3d(5)
    with pytest.raises(UsageError, match=r"multiples of 4.*to \(8, 12, 8\)"):
        net()(torch.zeros(1, 4, 8, 10, 8))
    with pytest.raises(UsageError, match=r"expected \(B,C,D,H,W\)"):
        net()(torch.zeros(4, 8, 8, 8))
    with pytest.raises(UsageError, match="depth 0 halves nothing"):
        RevUNet3d(depth=0)
    with pytest.raises(UsageError, match="vary='height' is not a size; use one of crop"):
        plan_volume("1GiB", "height")


def test_budget_below_the_smallest_names_what_would_do(monkeypatch):
    Peaks(monkeypatch)
    with pytest.raises(DoesNotFit, match=r"crop 4 needs 1\.48 KiB.*raise the budget to 1\.85 KiB"):
        plan_volume(1000, width=8, depth=2)
