"""Activation offload: same gradients, and one block's activations on the device at a time."""

import tempfile
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu

from holdfast.checks import Result, check
from holdfast.meter import Meter, predict
from holdfast.places import DiskArena, HostArena, offload

BLOCKS, WIDTH, BATCH, LENGTH = 8, 64, 4, 128
CAP = 64 << 20
AT_MOST = 0.2


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, batch_first=True, norm_first=True)
            for _ in range(BLOCKS)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def _step(model: nn.Module, _, x: Tensor) -> list[Tensor]:
    torch.manual_seed(1)  # dropout
    model(x).square().mean().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return gradients


def _measure(model: Stack, x: Tensor, around: AbstractContextManager) -> tuple[int, list[Tensor]]:
    """Peak bytes above model and input, and the gradients, of one step inside `around`."""
    with around:
        _step(model, None, x)
        with Meter(model, inputs=x) as meter:
            gradients = _step(model, None, x)
    return meter.peak - meter.base, gradients


@check(
    "offload",
    claim=f"with saved activations on disk a step of {BLOCKS} blocks peaks at most at {AT_MOST:g} "
    "of plain autograd's bytes above the model, as predicted, with bitwise equal gradients",
)
def run(seed: int) -> Result:
    torch.manual_seed(seed)
    model, x = Stack(), torch.randn(BATCH, LENGTH, WIDTH)
    with (
        tempfile.TemporaryDirectory() as directory,
        DiskArena(CAP, directory) as disk,
        DiskArena(CAP, directory) as fake,
        HostArena(CAP) as host,
    ):
        plain, want = _measure(model, x, nullcontext())
        on_cpu, _ = _measure(model, x, save_on_cpu())
        on_disk, from_disk = _measure(model, x, offload(model.blocks, disk))
        # Host memory is the device's here, so nothing is saved; only exactness is at stake.
        _, from_host = _measure(model, x, offload(model.blocks, host))

        def build():
            model = Stack()
            offload(model.blocks, fake)
            return model, None, torch.randn(BATCH, LENGTH, WIDTH)

        forecast = predict(build, _step)
        predicted = forecast.peak - forecast.base
        equal = all(
            torch.equal(a, b) and torch.equal(a, c)
            for a, b, c in zip(want, from_disk, from_host, strict=True)
        )
        left = disk.resident_bytes + len(host)
        moved = (disk.bytes_in, disk.bytes_out, disk.peak_bytes)
        as_predicted = predicted == on_disk and moved == (
            fake.bytes_in,
            fake.bytes_out,
            fake.peak_bytes,
        )
    return Result(
        measured={
            "peak_bytes": on_disk,
            "ratio": on_disk / plain,
            "predicted_bytes": predicted,
            "disk_bytes": moved[2],
            "gradients_equal": equal,
            "bytes_left": left,
        },
        baseline={"plain_bytes": plain, "save_on_cpu_bytes": on_cpu},
        threshold=f"peak_bytes <= {AT_MOST:g} x plain_bytes and = predicted_bytes; gradients "
        "bitwise equal; no bytes left",
        passed=on_disk <= AT_MOST * plain and as_predicted and equal and not left,
    )
