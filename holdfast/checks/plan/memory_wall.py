"""Rank products and vector products by a probed roofline, and by their FLOPs alone.

Operands are drawn from a pool larger than the caches, so that memory is what a cold one costs. The
rest of the claim is arithmetic on traces: it holds on any machine.
"""

import statistics
import time

import torch
from scipy.stats import kendalltau
from torch.utils.flop_counter import FlopCounterMode

from holdfast.checks import Result, check
from holdfast.plan.hardware_probe import gemm_flops, memory_bandwidth
from holdfast.plan.memory_wall import encoder_decoder
from holdfast.plan.models import resolve
from holdfast.plan.op_trace import decode_ops, trace_ops
from holdfast.plan.roofline import attainable, gemm_intensity
from holdfast.plan.trend import growth

# m, k, n; vectors first. The roofline is wrong about the product of 8 rows, for which a library
# rearranges the matrix first; FLOPs alone are wrong about all vectors.
SHAPES = (
    (1, 2048, 2048),
    (1, 4096, 4096),
    (1, 8192, 8192),
    (8, 3072, 3072),
    (384, 384, 384),
    (512, 768, 512),
    (768, 1024, 1024),
    (1024, 1536, 1536),
)
POOL, ROUNDS = 2**29, 9
MODEL = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000,
}  # fmt: skip
SMALL = MODEL | {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4}
SIZES = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
BERT = SIZES | {"model_type": "bert", "intermediate_size": 3072, "vocab_size": 50257}


def measured_seconds(seed: int) -> list[float]:
    """Median seconds of each shape, rounds interleaved; operands were not read lately.

    One thread, and the time that it ran, so that other programs do not count.
    """
    generator = torch.Generator().manual_seed(seed)
    pool = torch.randn(POOL // 4, generator=generator)
    at = 0

    def take(rows: int, columns: int) -> torch.Tensor:
        nonlocal at
        if at + rows * columns > len(pool):
            at = 0
        piece = pool[at : at + rows * columns].view(rows, columns)
        at += rows * columns
        return piece

    seconds: list[list[float]] = [[] for _ in SHAPES]
    for _ in range(ROUNDS + 1):
        for (m, k, n), found in zip(SHAPES, seconds, strict=True):
            left, right, out = take(m, k), take(k, n), torch.empty(m, n)
            start = time.thread_time()
            torch.mm(left, right, out=out)
            found.append(time.thread_time() - start)
    return [statistics.median(found[1:]) for found in seconds]


def decode_intensity(batch: int) -> float:
    ops = decode_ops(resolve(MODEL), batch, 1, torch.float16).ops
    return sum(o.flops * o.count for o in ops) / sum(o.least * o.count for o in ops)


def counted(seed: int) -> tuple[int, int]:
    """FLOPs of a step by our trace, and of a real one by torch's counter."""
    source = resolve(SMALL)
    ops = trace_ops(source, "pretrain", 2, 64, attention="eager").ops
    model, inputs = source.build("cpu", attention="eager"), source.example_inputs(2, 64, "cpu")
    with FlopCounterMode(display=False) as counter:
        model(**inputs).loss.backward()
    return sum(o.flops * o.count for o in ops), counter.get_total_flops()


@check(
    "memory_wall",
    claim="a probed roofline ranks measured products and vector products (Kendall tau >= 0.8), "
    "FLOPs are exact, and an encoder reuses a byte at least 10 times more than a decoder",
)
def run(seed: int) -> Result:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        peak = gemm_flops(torch.device("cpu"), torch.float32, 2.0, time.thread_time)
        bandwidth = memory_bandwidth(torch.device("cpu"), 2**27, 2.0, time.thread_time)
        seconds = measured_seconds(seed)
    finally:
        torch.set_num_threads(threads)
    work = [2 * m * k * n for m, k, n in SHAPES]
    predicted = [
        flops / attainable(peak, bandwidth, gemm_intensity(*shape, 4))
        for flops, shape in zip(work, SHAPES, strict=True)
    ]
    ours, base = (float(kendalltau(order, seconds).statistic) for order in (predicted, work))
    intensity = {batch: decode_intensity(batch) for batch in (1, 4, 8)}
    both = {n: encoder_decoder(BERT, "gpt2", n) for n in (128, 256, 512)}
    reuse = {n: found["encoder"] / found["decoder"] for n, found in both.items()}
    flops, torchs = counted(seed)
    planted = growth(range(2012, 2025), [3.0 ** (year / 2) for year in range(13)])
    return Result(
        measured={
            "kendall_tau": ours,
            "GFLOP/s": peak / 1e9,
            "GB/s": bandwidth / 1e9,
            "flops": flops,
            **{f"decode_intensity_batch_{b}": x for b, x in intensity.items()},
            **{f"encoder_over_decoder_{n}": x for n, x in reuse.items()},
            "growth_planted_3": planted,
        },
        baseline={"kendall_tau_of_flops_alone": base, "flops_of_torchs_counter": torchs},
        threshold="kendall_tau >= 0.8 and above FLOPs alone; flops equal; decode intensity within "
        "2 % of the batch; encoder_over_decoder_512 >= 10; growth within 1 %",
        passed=ours >= 0.8
        and ours > base
        and flops == torchs
        and all(abs(x / b - 1) <= 0.02 for b, x in intensity.items())
        and reuse[512] >= 10
        and abs(planted / 3 - 1) <= 0.01,
    )
