"""Byte models at 1,024 tokens: summaries of segments beside the last token of each segment.

Both read their own segment and one entry for each earlier one, so they have as many logits; a third
reads its own segment alone. Equal parameters and steps, each at its own best rate of two. Positions
are learned: of rotary ones, which turn keys before they are pooled, this check says nothing.
"""

import torch
from torch import Tensor, nn

from holdfast.checks import Result, check
from holdfast.checks.context._blocks import ByteLM, evaluate, trained
from holdfast.context.attention.combiner import How, attend_far, attend_near, combiner_attention
from holdfast.context.kernels import merge_lse
from holdfast.meter import Meter

WIDTH, HEADS, LAYERS, PARAMETERS = 64, 4, 2, 200_000
LENGTH, SEGMENT, STEPS, BATCH = 1024, 32, 120, 2
RATES = (2.5e-3, 5e-3)
LONG = 4096


class Combiner(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return combiner_attention(q, k, v, segment=SEGMENT)


class FixedSparse(Combiner):
    """Own segment, and the last token of each earlier one."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        how = How(SEGMENT, True, "max", q.shape[-1] ** -0.5)
        last = (x[:, :, SEGMENT - 1 :: SEGMENT] for x in (k, v))
        return merge_lse([attend_near(q, k, v, how), attend_far(q, *last, how)])[0]


class Local(Combiner):
    """Own segment alone."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend_near(q, k, v, How(SEGMENT, True, "max", q.shape[-1] ** -0.5))[0]


def loss(mixer: type[nn.Module], seed: int) -> float:
    """Nats per byte of held-out text."""

    def build() -> ByteLM:
        return ByteLM(WIDTH, [mixer() for _ in range(LAYERS)], PARAMETERS, positions=LENGTH)

    found = (trained(build, STEPS, rate, seed, batch=BATCH, length=LENGTH) for rate in RATES)
    return min(evaluate(model, LENGTH, 24)[0] for model in found)


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    hidden = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
    scores = q @ k.mT * q.shape[-1] ** -0.5
    return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v


def peak(attend, seed: int) -> int:
    """Bytes above the inputs, forward and backward at LONG tokens."""
    generator = torch.Generator().manual_seed(seed)
    *given, dout = (torch.randn(1, 1, LONG, 64, generator=generator) for _ in range(4))
    given = [x.requires_grad_() for x in given]
    with Meter(inputs=(given, dout)) as meter:
        torch.autograd.grad(attend(*given), given, dout)
    return meter.peak - meter.base


@check(
    "combiner",
    claim="with learned positions and as many logits, lower loss than fixed sparse attention at "
    "1,024 tokens; at most a quarter of dense attention's peak at 4,096",
)
def run(seed: int) -> Result:
    found = {mixer: loss(mixer, seed) for mixer in (Combiner, FixedSparse, Local)}
    dense = peak(plain, seed)
    peaks = {
        variant: peak(lambda *qkv, v=variant: combiner_attention(*qkv, variant=v), seed)
        for variant in ("fixed", "axial", "log")
    }
    return Result(
        measured={
            "loss": found[Combiner],
            "logits_per_token": SEGMENT + LENGTH // SEGMENT,
            **{f"peak_bytes_{variant}": nbytes for variant, nbytes in peaks.items()},
            "largest_peak_ratio": max(peaks.values()) / dense,
        },
        baseline={
            "name": "own segment and the last token of each earlier one; dense attention",
            "fixed_sparse_loss": found[FixedSparse],
            "own_segment_alone_loss": found[Local],
            "dense_peak_bytes": dense,
        },
        threshold="loss < fixed sparse attention's; peak of every variant <= 0.25 x dense",
        passed=found[Combiner] < found[FixedSparse] and max(peaks.values()) <= 0.25 * dense,
    )
