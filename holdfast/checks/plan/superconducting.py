"""Describe this machine's processor in a layered file, and predict its products from that file.

The numbers that go into the file are measured: the peak rate, the share of it that one product
reaches between others, the bandwidth of the cache and that of memory. What is predicted are other
shapes.
"""

import statistics
import time
from pathlib import Path

import torch

from holdfast.checks import Result, check
from holdfast.plan.hardware import load_hardware
from holdfast.plan.hardware_probe import gemm_flops, launch_seconds, memory_bandwidth
from holdfast.plan.layered import parse
from holdfast.plan.ops import Gemm, Op
from holdfast.plan.roofline import Level, Machine
from holdfast.plan.superconducting import Workload, compare
from holdfast.units import parse_bytes

CALIBRATION = (640, 640, 640)
SHAPES = (
    (256, 256, 256),
    (512, 512, 512),
    (320, 640, 480),
    (1024, 256, 1024),
    (256, 2048, 512),
    (768, 768, 1536),
    (1024, 1024, 1024),
)
ROUNDS = 15
MODEL = {
    "model_type": "llama", "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 16,
    "num_attention_heads": 16, "vocab_size": 32000, "dtype": "bfloat16",
}  # fmt: skip
CLOCK = 1e9


def product(m: int, k: int, n: int, dtype: torch.dtype = torch.float32) -> Op:
    size = dtype.itemsize
    gemm = Gemm(1, m, k, n, size, ("inputs", "parameters", "temporary"))
    traffic = (("inputs", size * m * k), ("parameters", size * k * n), ("temporary", size * m * n))
    name = str(dtype).removeprefix("torch.")
    return Op("forward", "mm", ((m, k), (k, n)), name, 2 * m * k * n, traffic, gemm=gemm)


def cache_bytes(index: str, otherwise: int) -> int:
    """Size of a cache as Linux reports it; index0 is the first level's data, index2 the second."""
    path = Path("/sys/devices/system/cpu/cpu0/cache", index, "size")
    return parse_bytes(path.read_text().strip() + "iB") if path.is_file() else otherwise


def described(calibration_seconds: float) -> Machine:
    """This processor, one thread of it, as a layered file would say it."""
    cpu = torch.device("cpu")
    store, cache = cache_bytes("index0", 2**15), cache_bytes("index2", 2**20)
    peak = gemm_flops(cpu, torch.float32, 2.0, time.thread_time)
    reached = product(*CALIBRATION).flops / calibration_seconds / peak
    # Three arrays of a triad, together in half of the cache; and far outside of it.
    near, far = (
        memory_bandwidth(cpu, n // 4 * 4, 2.0, time.thread_time) for n in (cache // 6, 2**27)
    )

    def given(value: float, source: str = "measured by this check") -> dict:
        return {"value": value, "source": source}

    def level(name: str, capacity: int, bandwidth: float) -> dict:
        rates = {"capacity": given(capacity), "bandwidth": given(bandwidth)}
        free = {"latency": given(0.0, "hidden by prefetching"), "joules_per_byte": given(1e-12)}
        return {"name": name, "per": "chip", "stage": "room"} | rates | free

    rest = {"temperature": given(300.0), "cooling": given(1.0)}
    one = given(1, "one thread")
    return parse(
        {
            "name": "this-processor",
            "stages": {"room": rest},
            "device": {"clock": given(CLOCK, "a unit; only its product with MACs counts")}
            | {"stage": "room"},
            "tile": {
                "macs_per_cycle": {"float32": given(peak / 2 / CLOCK)},
                "utilisation": given(min(1.0, reached)),
                "store": given(store, "as Linux reports it, or usual"),
                "joules_per_mac": {"float32": given(1e-12, "not used here")},
            },
            "chip": {"tiles": one, "launch": given(launch_seconds(cpu))},
            "levels": [level("cache", cache, near), level("memory", 2**34, far)],
            "blade": {"chips": one},
            "system": {"blades": one},
        },
        "the check",
    ).machine()


def measured_seconds(seed: int) -> list[float]:
    """Least seconds that one thread ran for each product, interleaved; the calibration first."""
    generator = torch.Generator().manual_seed(seed)
    operands = [
        [torch.randn(size, generator=generator) for size in ((m, k), (k, n), (m, n))]
        for m, k, n in (CALIBRATION, *SHAPES)
    ]
    seconds: list[list[float]] = [[] for _ in operands]
    for _ in range(ROUNDS + 2):
        for (left, right, out), found in zip(operands, seconds, strict=True):
            start = time.thread_time()
            torch.mm(left, right, out=out)
            found.append(time.thread_time() - start)
    return [min(found[2:]) for found in seconds]


def errors(machine: Machine, seconds: list[float]) -> list[float]:
    predicted = [machine.cost(product(*shape)).seconds for shape in SHAPES]
    return [abs(p / s - 1) for p, s in zip(predicted, seconds, strict=True)]


def flat(name: str, peak: float, bandwidth: float) -> Machine:
    rates = {"bfloat16": peak, "float32": peak}
    return Machine(name, rates, (Level("memory", 1e15, bandwidth),))


@check(
    "superconducting",
    claim="a processor described in a layered file has its products predicted within 25 %; "
    "speed-ups tend to the ratio of bandwidths for decoding and of peaks for large products",
)
def run(seed: int) -> Result:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        calibration, *seconds = measured_seconds(seed)
        machine = described(calibration)
    finally:
        torch.set_num_threads(threads)
    ours = errors(machine, seconds)
    base = errors(Machine.from_hardware(load_hardware("cpu-2core")), seconds)
    one, two = flat("one", 1e13, 1e11), flat("two", 7e13, 3e11)
    (setting,) = compare([one, two], Workload(MODEL, "serve", batch=1, sequence=64)).settings
    decode = setting.speedup(1, "decode") or 0.0
    large = product(16384, 16384, 16384, torch.bfloat16)
    peaks = one.cost(large).seconds / two.cost(large).seconds
    rising = [flat("", 1e13, 1e9 * 4**i).cost(large).seconds for i in range(12)]
    saturates = rising == sorted(rising, reverse=True) and rising[-1] == large.flops / 1e13
    return Result(
        measured={
            "worst_error": max(ours),
            "median_error": statistics.median(ours),
            "decode_speedup": decode,
            "product_speedup": peaks,
            "saturates": saturates,
        },
        baseline={"worst_error_of_preset_cpu-2core": max(base), "bandwidth_ratio": 3.0}
        | {"peak_ratio": 7.0},
        threshold="worst_error <= 0.25; speedups within 2 % of their ratios; more bandwidth is "
        "never slower and ends at the compute bound",
        passed=max(ours) <= 0.25
        and abs(decode / 3 - 1) <= 0.02
        and abs(peaks / 7 - 1) <= 0.02
        and saturates,
    )
