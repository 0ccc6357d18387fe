"""Few-bit codes: an activation's step, packing, and a projection by an INT4 basis.

    .venv/bin/python benchmarks/bits.py [--rounds 15] [--write]

Candidates take turns in one process, so that other load falls on all alike; times are medians over
rounds, ratios are medians of the ratios within a round. "torch path" is the same code with native
kernels off. With `--write` the tables go to RESULTS.md.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from results import conditions, write_section

from holdfast import native
from holdfast.forms import Affine
from holdfast.forms.bits import pack, unpack
from holdfast.training.optim.projector import Projector
from holdfast.training.saved import fewbit

ACTIVATION = (8, 512, 3072)
# Rows and columns of a gradient and the rank of its subspace.
PROJECTIONS = [(4096, 4096, 128), (4096, 4096, 512), (2816, 1024, 128)]


def take_turns(candidates: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every call, by name; two rounds before the first one counted."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds + 2):
        for name, call in candidates.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: times[2:] for name, times in seconds.items()}


def off(call: Callable[[], object]) -> Callable[[], object]:
    """The same with native kernels off."""

    def slowly():
        with native.force("off"):
            return call()

    return slowly


def table(title: str, seconds: dict[str, list[float]]) -> str:
    """The first candidate is the one that others are compared with."""
    base = next(iter(seconds.values()))
    lines = [f"| {title} | ms | ratio |", "| --- | ---: | ---: |"]
    for name, times in seconds.items():
        ratio = statistics.median(t / b for t, b in zip(times, base, strict=True))
        lines.append(f"| {name} | {1e3 * statistics.median(times):.1f} | {ratio:.2f} |")
    return "\n".join(lines)


def activation(name: str, dtype: torch.dtype, rounds: int) -> str:
    """Forward and backward of one activation module."""
    plain, few = {
        "GELU": (torch.nn.GELU(), fewbit.GELU),
        "SiLU": (torch.nn.SiLU(), fewbit.SiLU),
    }[name]
    g = torch.Generator().manual_seed(0)
    x = (2 * torch.randn(ACTIVATION, generator=g)).to(dtype).requires_grad_()
    gy = torch.randn(ACTIVATION, generator=g).to(dtype)

    def step(module: torch.nn.Module) -> Callable[[], object]:
        return lambda: torch.autograd.grad(module(x), x, gy)

    candidates = {f"torch.nn.{name}": step(plain)}
    candidates |= {f"{bits}-bit": step(few(bits)) for bits in fewbit.BITS}
    candidates["3-bit, torch path"] = off(step(few(3)))
    return table(f"{name}, {str(dtype).removeprefix('torch.')}", take_turns(candidates, rounds))


def packing(rounds: int) -> str:
    """Three-bit codes to bytes and back, beside a copy of the codes."""
    codes = torch.randint(8, ACTIVATION, dtype=torch.uint8).flatten()
    packed, n = pack(codes, 3), codes.numel()
    candidates = {
        "clone": codes.clone,
        "pack": lambda: pack(codes, 3),
        "unpack": lambda: unpack(packed, 3, n),
        "pack, torch path": off(lambda: pack(codes, 3)),
        "unpack, torch path": off(lambda: unpack(packed, 3, n)),
    }
    return table("3-bit codes", take_turns(candidates, rounds))


def projection(m: int, n: int, rank: int, rounds: int) -> str:
    """A gradient into its subspace and back, by a basis that is kept in 4 bits."""
    g = torch.Generator().manual_seed(0)
    grad = torch.randn(m, n, generator=g)
    basis = torch.linalg.qr(torch.randn(n, rank, generator=g))[0].mT.contiguous()
    packed = Affine(bits=4, group=256).encode(basis)

    def there_and_back(basis: torch.Tensor) -> None:
        projector = Projector(basis, True)
        projector.up(projector.down(grad))

    candidates = {
        "decode the basis, then multiply": lambda: there_and_back(packed.dequantize()),
        "multiply by codes": lambda: there_and_back(packed),
        "fp32 basis": lambda: there_and_back(basis),
        "decode, torch path": off(lambda: there_and_back(packed.dequantize())),
    }
    return table(f"{m} x {n}, rank {rank}", take_turns(candidates, rounds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--write", action="store_true", help="store the section in RESULTS.md")
    options = parser.parse_args()

    found = conditions()
    parts = [
        activation(name, dtype, options.rounds)
        for name in ("GELU", "SiLU")
        for dtype in (torch.float32, torch.bfloat16)
    ]
    parts.append(packing(options.rounds))
    parts += [projection(*shape, options.rounds) for shape in PROJECTIONS]
    shape = " x ".join(map(str, ACTIVATION))
    text = "\n\n".join(parts)
    text += f"\n\nActivations are {shape}; {torch.get_num_threads()} threads."
    print(text)
    if options.write:
        write_section("Few-bit codes", text, found)


if __name__ == "__main__":
    main()
