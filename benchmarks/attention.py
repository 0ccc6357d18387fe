"""Exact attention with its log-sum-exp beside torch's scaled_dot_product_attention.

    .venv/bin/python benchmarks/attention.py [--rounds 7] [--lengths 1024 2048 4096] [--write]

Forward and backward; candidates take turns in one process. Times are medians over rounds, ratios
are medians of the ratios within a round to the first candidate of a table. MiB are what a call
holds at its peak beside its inputs, by the meter. With `--write` the tables go to RESULTS.md.
"""

import argparse
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from bits import take_turns
from results import conditions, write_section
from torch import Tensor

from holdfast.context.kernels import attention_with_lse, merge_lse
from holdfast.context.masks import Causal
from holdfast.meter import Meter

BATCH, HEADS, SIZE = 1, 8, 64
Candidates = dict[str, Callable[[], object]]


class Inputs:
    """q, k, v as models give them, views of (B,n,H,d), and a gradient of the output."""

    def __init__(self, length: int, dtype: torch.dtype):
        g = torch.Generator().manual_seed(0)
        *qkv, self.dout = (
            torch.randn(BATCH, length, HEADS, SIZE, generator=g).to(dtype).transpose(1, 2)
            for _ in range(4)
        )
        self.qkv = [x.requires_grad_() for x in qkv]
        # A row padded on its left, as tokenizers pad prompts.
        self.valid = torch.arange(length)[None] >= length // 8
        self.causal = torch.ones(length, length, dtype=torch.bool).tril()

    def step(self, attend: Callable[..., Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(attend(*self.qkv), self.qkv, self.dout)


def causal(x: Inputs) -> Candidates:
    half = x.dout.shape[2] // 2

    def merged(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        far = attention_with_lse(q, k[:, :, :half], v[:, :, :half], mask=Causal())
        near = attention_with_lse(q, k[:, :, half:], v[:, :, half:], mask=Causal(-half))
        return merge_lse([far, near])[0]

    return {
        "SDPA": x.step(lambda *qkv: F.scaled_dot_product_attention(*qkv, is_causal=True)),
        "ours": x.step(lambda *qkv: attention_with_lse(*qkv, mask=Causal())[0]),
        "ours, two halves merged": x.step(merged),
    }


def padded(x: Inputs) -> Candidates:
    mask = x.causal & x.valid[:, None, None]

    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & x.valid[b, j]

    return {
        "SDPA": x.step(lambda *qkv: F.scaled_dot_product_attention(*qkv, attn_mask=mask)),
        "ours": x.step(lambda *qkv: attention_with_lse(*qkv, mask=mask)[0]),
        "ours, mask as a function": x.step(lambda *qkv: attention_with_lse(*qkv, mask=sees)[0]),
    }


def dropped(x: Inputs) -> Candidates:
    options = {"is_causal": True, "dropout_p": 0.1}
    return {
        "SDPA": x.step(lambda *qkv: F.scaled_dot_product_attention(*qkv, **options)),
        "ours": x.step(lambda *qkv: attention_with_lse(*qkv, mask=Causal(), dropout=0.1)[0]),
    }


def table(title: str, candidates: Candidates, x: Inputs, rounds: int) -> str:
    """The first candidate is the one that others are compared with."""
    seconds = take_turns(candidates, rounds)
    base = next(iter(seconds.values()))
    lines = [f"| {title} | ms | ratio | MiB |", "| --- | ---: | ---: | ---: |"]
    for name, times in seconds.items():
        ratio = statistics.median(t / b for t, b in zip(times, base, strict=True))
        with Meter(inputs=(x.qkv, x.dout, x.valid, x.causal)) as meter:
            candidates[name]()
        mib = (meter.peak - meter.base) / 2**20
        lines.append(f"| {name} | {1e3 * statistics.median(times):.0f} | {ratio:.2f} | {mib:.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--write", action="store_true", help="store the section in RESULTS.md")
    options = parser.parse_args()

    found = conditions()
    parts = []
    for length in options.lengths:
        x = Inputs(length, torch.float32)
        for kind, build in (("causal", causal), ("causal, padded", padded), ("dropout", dropped)):
            parts.append(table(f"{length} tokens, {kind}", build(x), x, options.rounds))
    half = Inputs(options.lengths[0], torch.bfloat16)
    title = f"{options.lengths[0]} tokens, causal, bfloat16"
    parts.append(table(title, causal(half), half, options.rounds))
    text = "\n\n".join(parts)
    text += (
        f"\n\n{BATCH} row, {HEADS} heads of {SIZE}; the padded row's first eighth is padding; "
        f"dropout of 10 % under a causal mask; {torch.get_num_threads()} threads."
    )
    print(text)
    if options.write:
        write_section("Attention", text, found)


if __name__ == "__main__":
    main()
