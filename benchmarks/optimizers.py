"""Step times and state bytes of AdamW: torch's default and fused, ours, and installed peers'.

    .venv/bin/pip install -c constraints.txt -r benchmarks/requirements.txt
    .venv/bin/python benchmarks/optimizers.py [--parameters 22e6] [--dtype bfloat16] [--rounds 20]

All optimizers step in turn in one process, so that other load falls on all alike. Ratios are of
medians over rounds. A peer that is not installed, or whose step fails, is listed with its error.
With `--write` the table goes to RESULTS.md.
"""

import argparse
import importlib
import statistics
import time
from collections.abc import Callable

import torch
from results import conditions, write_section

from holdfast.training.optim.adamw4 import AdamW4
from holdfast.training.optim.adamw8 import AdamW8
from holdfast.training.optim.coat import CoatAdamW

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


def peer(module: str, name: str) -> Callable[..., torch.optim.Optimizer]:
    """An optimizer of a package that is imported when it is made."""
    return lambda p: getattr(importlib.import_module(module), name)(p)


def galore(p: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    matrices = {"rank": 128, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
    groups = [
        {"params": [x for x in p if x.dim() == 1]},
        {"params": [x for x in p if x.dim() == 2], **matrices},
    ]
    return peer("galore_torch", "GaLoreAdamW")(groups)


def candidates() -> dict[str, Callable[..., torch.optim.Optimizer]]:
    made: dict[str, Callable] = {
        "torch AdamW (default)": torch.optim.AdamW,
        "torch AdamW (fused)": lambda p: torch.optim.AdamW(p, fused=True),
        "torchao AdamW8bit": peer("torchao.optim", "AdamW8bit"),
        "torchao AdamW4bit": peer("torchao.optim", "AdamW4bit"),
        "torchao AdamWFp8": peer("torchao.optim", "AdamWFp8"),
        "bitsandbytes AdamW8bit": peer("bitsandbytes.optim", "AdamW8bit"),
        "galore-torch GaLoreAdamW": galore,
    }
    for second in ("rank1", "block", "factor"):
        made[f"holdfast AdamW4 ({second})"] = lambda p, second=second: AdamW4(p, second=second)
    made["holdfast AdamW8"] = AdamW8
    made["holdfast CoatAdamW"] = CoatAdamW
    return made


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all state tensors; tensor subclasses and GaLore's projectors are opened."""

    def size(t) -> int:
        if hasattr(t, "__tensor_flatten__"):
            return sum(size(getattr(t, name)) for name in t.__tensor_flatten__()[0])
        if hasattr(t, "ortho_matrix"):
            return size(t.ortho_matrix)
        return t.nbytes if isinstance(t, torch.Tensor) else 0

    return sum(size(t) for state in optimizer.state.values() for t in state.values())


def measure(
    count: float, dtype: torch.dtype, rounds: int
) -> tuple[dict[str, float], dict[str, float], dict[str, str]]:
    """By name: median seconds per step, state bytes per parameter, and errors of the others."""
    optimizers, errors = {}, {}
    for name, make in candidates().items():
        try:
            optimizer = make(parameters(count, dtype))
            # The first steps make states and compile.
            for _ in range(3):
                optimizer.step()
        # Whatever a peer's code raises is a result of the comparison.
        except Exception as error:
            line = next(iter(str(error).strip().splitlines()), "")
            errors[name] = f"{type(error).__name__}: {line}"[:120]
        else:
            optimizers[name] = optimizer
    seconds: dict[str, list[float]] = {name: [] for name in optimizers}
    for _ in range(rounds):
        for name, optimizer in optimizers.items():
            start = time.perf_counter()
            optimizer.step()
            seconds[name].append(time.perf_counter() - start)
    n = sum(p.numel() for p in parameters(count, dtype))
    states = {name: state_bytes(optimizer) / n for name, optimizer in optimizers.items()}
    return {name: statistics.median(times) for name, times in seconds.items()}, states, errors


def table(seconds: dict[str, float], states: dict[str, float], errors: dict[str, str]) -> str:
    default, fused = seconds["torch AdamW (default)"], seconds["torch AdamW (fused)"]
    lines = [
        "| optimizer | ms/step | / default | / fused | state B/parameter |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, value in seconds.items():
        lines.append(
            f"| {name} | {1e3 * value:.2f} | {value / default:.2f} | {value / fused:.2f} "
            f"| {states[name]:.3f} |"
        )
    return "\n".join(lines + [f"| {name} | {error} | | | |" for name, error in errors.items()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=float, default=22e6)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--write", action="store_true", help="store the section in RESULTS.md")
    options = parser.parse_args()

    found = conditions()
    text = table(*measure(options.parameters, getattr(torch, options.dtype), options.rounds))
    count = sum(p.numel() for p in parameters(options.parameters, torch.float32))
    text += f"\n\n{count:,} parameters in {options.dtype}, {torch.get_num_threads()} threads."
    print(text)
    if options.write:
        write_section(f"Optimizer steps, {options.dtype}", text, found)


if __name__ == "__main__":
    main()
