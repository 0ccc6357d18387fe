"""Step times and state bytes of AdamW: torch's default and fused, torchao's if present, and ours.

    python benchmarks/optimizers.py [--parameters 22e6] [--dtype bfloat16] [--rounds 20]

All optimizers step in turn in one process, so that other load falls on all alike. Ratios are of
medians over rounds.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from holdfast import native
from holdfast.training.optim.adamw4 import AdamW4

# One LLaMA-like block of width 1024, two matrices of attention merged.
BLOCK = [(2048, 1024), (1024, 2048), (2816, 1024), (2816, 1024), (1024, 2816), (1024,), (1024,)]


def parameters(count: float, dtype: torch.dtype) -> list[torch.nn.Parameter]:
    """Blocks until there are `count` elements; gradients are normal numbers of one size."""
    g = torch.Generator().manual_seed(0)
    made: list[torch.nn.Parameter] = []
    while sum(p.numel() for p in made) < count:
        for shape in BLOCK:
            p = torch.nn.Parameter((0.02 * torch.randn(shape, generator=g)).to(dtype))
            p.grad = (1e-3 * torch.randn(shape, generator=g)).to(dtype)
            made.append(p)
    return made


def candidates() -> dict[str, Callable[..., torch.optim.Optimizer]]:
    made: dict[str, Callable] = {
        "torch AdamW (default)": torch.optim.AdamW,
        "torch AdamW (fused)": lambda p: torch.optim.AdamW(p, fused=True),
    }
    try:
        from torchao.optim import AdamW4bit
    except ImportError:
        print("torchao is not installed: its 4-bit AdamW is left out")
    else:
        made["torchao AdamW4bit"] = AdamW4bit
    for second in ("rank1", "block", "factor"):
        made[f"holdfast AdamW4 ({second})"] = lambda p, second=second: AdamW4(p, second=second)
    return made


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all state tensors; tensor subclasses are opened."""

    def size(t) -> int:
        if hasattr(t, "__tensor_flatten__"):
            return sum(size(getattr(t, name)) for name in t.__tensor_flatten__()[0])
        return t.nbytes if isinstance(t, torch.Tensor) else 0

    return sum(size(t) for state in optimizer.state.values() for t in state.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=float, default=22e6)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()

    dtype = getattr(torch, options.dtype)
    optimizers = {
        n: make(parameters(options.parameters, dtype)) for n, make in candidates().items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in optimizers}
    for _ in range(options.rounds + 3):
        for name, optimizer in optimizers.items():
            start = time.perf_counter()
            optimizer.step()
            seconds[name].append(time.perf_counter() - start)

    # The first rounds make states and compile.
    median = {name: statistics.median(times[3:]) for name, times in seconds.items()}
    default, fused = list(median.values())[:2]
    n = sum(p.numel() for g in next(iter(optimizers.values())).param_groups for p in g["params"])
    print(
        f"{n:,} parameters, {options.dtype}, {torch.get_num_threads()} threads, "
        f"native: {native.status()['variant'] or native.status()['reason']}"
    )
    print(f"{'':26}{'ms/step':>9}{'/ default':>11}{'/ fused':>9}{'state B/param':>15}")
    for name, value in median.items():
        per = state_bytes(optimizers[name]) / n
        print(f"{name:26}{1e3 * value:9.2f}{value / default:11.2f}{value / fused:9.2f}{per:15.3f}")


if __name__ == "__main__":
    main()
