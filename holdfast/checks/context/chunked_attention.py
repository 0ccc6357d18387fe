"""Attention without O(n^2) memory against the two products and a softmax that everybody writes.

Bytes come from the Meter at 16,384 tokens, and from the resident set of fresh processes at 8,192;
times from pairs in turn, so that a busy machine slows both. Ours runs twice: as it is chosen on
this machine, and on torch operations alone, chunk by chunk, as on devices without a fused kernel.
"""

import contextlib
import statistics
import subprocess
import sys
import time
from unittest import mock

import torch
from torch import Tensor

from holdfast.checks import Result, check
from holdfast.context import kernels
from holdfast.context.kernels import attention_with_lse
from holdfast.host import PeakRss
from holdfast.meter import Meter

LONG, SHORT, WIDTH = 16384, 8192, 64
Q_CHUNK, K_CHUNK = 512, 1024
PAIRS = 2
OURS = ("chosen", "chunks")


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1) @ v


def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention_with_lse(q, k, v, q_chunk=Q_CHUNK, k_chunk=K_CHUNK)[0]


def path(name: str) -> contextlib.AbstractContextManager:
    """Inside, "chunks" has torch operations alone; the others what they would have anyway."""
    if name != "chunks":
        return contextlib.nullcontext()
    return mock.patch.object(kernels, "choose_path", lambda *_, **__: "torch")


def inputs(n: int, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v, dout = (torch.randn(1, 1, n, WIDTH, generator=generator) for _ in range(4))
    return [x.requires_grad_() for x in (q, k, v)], dout


def run_once(name: str, given: list[Tensor], dout: Tensor | None) -> list[Tensor]:
    """The output, and with `dout` the gradients of q, k and v."""
    attend = plain if name == "plain" else ours
    with path(name), torch.set_grad_enabled(dout is not None):
        out = attend(*given)
        return [out] if dout is None else [out, *torch.autograd.grad(out, given, dout)]


def resident(name: str, backward: bool) -> int:
    """How far the resident set of a fresh process rises over one pass at SHORT tokens."""
    command = f"from {__name__} import main; main({name!r}, {backward})"
    done = subprocess.run(
        [sys.executable, "-c", command], check=True, capture_output=True, text=True
    )
    return int(done.stdout)


def main(name: str, backward: bool) -> None:
    torch.set_num_threads(1)
    given, dout = inputs(SHORT)
    # The first pass, a short one, loads code and starts what stays.
    run_once(name, *inputs(16))
    with PeakRss() as rss:
        run_once(name, given, dout if backward else None)
    print(rss.increase)


def bytes_of(name: str, given: list[Tensor], dout: Tensor) -> int:
    """Above the inputs, at the peak of one pass forward and backward; output and gradients too."""
    with Meter(inputs=(given, dout)) as meter:
        run_once(name, given, dout)
    return meter.peak - meter.base


def slowness(given: list[Tensor], dout: Tensor) -> dict[str, float]:
    """Time forward and backward over that of plain attention: medians of pairs."""

    def seconds(name: str) -> float:
        start = time.perf_counter()
        run_once(name, given, dout)
        return time.perf_counter() - start

    rounds = [{name: seconds(name) for name in (*OURS, "plain")} for _ in range(PAIRS)]
    return {n: statistics.median(times[n] / times["plain"] for times in rounds) for n in OURS}


@check(
    "chunked_attention",
    claim="16,384 tokens forward and backward in at most 1/10 of plain attention's bytes, no "
    "slower; exact, also chunk by chunk",
)
def run(seed: int) -> Result:
    given, dout = inputs(LONG, seed)
    nbytes = {name: bytes_of(name, given, dout) for name in (*OURS, "plain")}
    times = slowness(given, dout)
    rss = {(n, b): resident(n, b) for n in (*OURS, "plain") for b in (False, True)}
    # A tiny denominator is the resolution of the resident set, not a merit.
    forward, backward = (
        min(rss["plain", b] / max(rss[n, b], 2**20) for n in OURS) for b in (False, True)
    )
    short, dshort = inputs(2048, seed)
    exact = [x.double() for x in run_once("plain", [x.double() for x in short], dshort.double())]
    error = max(
        (x.double() - y).abs().max().item()
        for n in OURS
        for x, y in zip(run_once(n, short, dshort), exact, strict=True)
    )
    return Result(
        measured={
            "bytes": nbytes["chosen"],
            "bytes_by_chunks": nbytes["chunks"],
            "time_over_plain": times["chosen"],
            "time_over_plain_by_chunks": times["chunks"],
            "resident_ratio_forward": forward,
            "resident_ratio_with_backward": backward,
            "largest_error": error,
        },
        baseline={
            "name": "two products and a softmax, without a mask",
            "bytes": nbytes["plain"],
            "resident_forward": rss["plain", False],
            "resident_with_backward": rss["plain", True],
        },
        threshold="both of ours: bytes <= 1/10 x plain, and time <= plain; resident set at 8,192 "
        "tokens 15x below plain forward, 10x with backward; error <= 1e-5",
        passed=all(nbytes[n] <= nbytes["plain"] / 10 and times[n] <= 1 for n in OURS)
        and forward >= 15
        and backward >= 10
        and error <= 1e-5,
    )
