"""A training step and a decode step of attention modules beside dense attention.

    .venv/bin/python benchmarks/attention_modules.py [--rounds 5] [--lengths 1024 4096] [--write]

Every candidate projects (1,n,512) to 8 heads, attends causally and projects back; candidates take
turns in one process. Times are medians over rounds, ratios are medians of the ratios within a round
to the first candidate of a table. MiB are what a training step holds at its peak beside inputs and
parameters, or what a decode step's state holds. With `--write` the tables go to RESULTS.md.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from bits import take_turns
from results import conditions, write_section
from torch import Tensor, nn

from holdfast.context.attention.combiner import combiner_attention
from holdfast.context.attention.combiner_state import CombinerLayer
from holdfast.context.attention.lavo import LavoAttention
from holdfast.context.attention.rcmha import RCMHA, RCMHAState
from holdfast.meter import Meter

WIDTH, HEADS = 512, 8


class Dense(nn.Module):
    """Projections around an attention function; decoding keeps all keys and values."""

    def __init__(self, attend: Callable[..., Tensor]):
        super().__init__()
        self.attend = attend
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def project(self, x: Tensor) -> Tensor:
        return self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attend(*self.project(x)).transpose(1, 2).flatten(2))


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    hidden = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
    return (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(hidden, -torch.inf).softmax(-1) @ v


class Lavo(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = LavoAttention(WIDTH, HEADS)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[0]


class Rcmha(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = RCMHA(WIDTH, HEADS)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x, need_weights=False)[0]


def modules() -> dict[str, nn.Module]:
    """The first is what the others are compared with."""
    found: dict[str, nn.Module] = {"SDPA": Dense(sdpa), "written out": Dense(written_out)}
    for variant in ("fixed", "axial", "log"):
        attend = lambda q, k, v, x=variant: combiner_attention(q, k, v, variant=x)  # noqa: E731
        found[f"Combiner, {variant}"] = Dense(attend)
    return found | {"LAVO": Lavo(), "RCMHA": Rcmha()}


def training(n: int, rounds: int) -> str:
    """Forward and backward."""
    x = torch.randn(1, n, WIDTH, requires_grad=True)
    dout = torch.randn(1, n, WIDTH)
    steps, held = {}, {}
    for name, module in modules().items():
        wanted = [x, *(p for p in module.parameters() if p.requires_grad)]

        def step(module: nn.Module = module, wanted: list[Tensor] = wanted) -> object:
            return torch.autograd.grad(module(x), wanted, dout)

        with Meter(module, inputs=(x, dout)) as meter:
            step()
        steps[name], held[name] = step, meter.peak - meter.base
    return table(f"{n} tokens, forward and backward", steps, held, rounds)


@torch.inference_mode()
def decoding(n: int, rounds: int) -> str:
    """Eight tokens, one by one, after n others; states grow on from round to round."""
    found, x = modules(), torch.randn(1, n, WIDTH)
    tokens = x[:, :8].split(1, 1)
    dense, lavo, rcmha = found["SDPA"], found["LAVO"].inner, found["RCMHA"].inner
    q, *past = dense.project(x)
    segments, relative = CombinerLayer(64), RCMHAState()
    segments.attend(q, *past)
    _, window = lavo(x)
    rcmha(x, x, x, need_weights=False, state=relative)
    held = {
        "SDPA, all keys and values": sum(y.nbytes for y in past),
        "Combiner, segments of 64": segments.nbytes(),
        "LAVO": window.nbytes(),
        "RCMHA": relative.nbytes(),
    }

    def grow(q: Tensor, *new: Tensor) -> Tensor:
        past[:] = [torch.cat(pair, 2) for pair in zip(past, new, strict=True)]
        return F.scaled_dot_product_attention(q, *past)

    def by(attend: Callable[..., Tensor]) -> None:
        for token in tokens:
            dense.out(attend(*dense.project(token)).transpose(1, 2).flatten(2))

    calls = (
        lambda: by(grow),
        lambda: by(segments.attend),
        lambda: [lavo(token, window) for token in tokens],
        lambda: [rcmha(*(token,) * 3, need_weights=False, state=relative) for token in tokens],
    )
    return table(f"8 tokens after {n}", dict(zip(held, calls, strict=True)), held, rounds)


def table(title: str, steps: dict[str, Any], held: dict[str, int], rounds: int) -> str:
    seconds = take_turns(steps, rounds)
    base = next(iter(seconds.values()))
    lines = [f"| {title} | ms | ratio | MiB |", "| --- | ---: | ---: | ---: |"]
    for name, times in seconds.items():
        ratio = statistics.median(t / b for t, b in zip(times, base, strict=True))
        mib = held[name] / 2**20
        lines.append(f"| {name} | {1e3 * statistics.median(times):.1f} | {ratio:.2f} | {mib:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--write", action="store_true", help="store the section in RESULTS.md")
    options = parser.parse_args()

    found = conditions()
    torch.manual_seed(0)
    parts = [kind(n, options.rounds) for n in options.lengths for kind in (training, decoding)]
    text = "\n\n".join(parts)
    text += f"\n\nOne row, width {WIDTH}, {HEADS} heads, fp32; {torch.get_num_threads()} threads."
    print(text)
    if options.write:
        write_section("Attention modules", text, found)


if __name__ == "__main__":
    main()
