"""Byte models trained at 256 tokens and read at 4,096: what is kept, and what it is worth.

LAVO beside linear attention with the same bytes of state, and beside attention with learned
positions, which keeps everything. Equal parameters and steps, each at its own best rate of two.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.checks import Result, check
from holdfast.checks.context._blocks import ByteLM, evaluate, trained
from holdfast.context.attention.lavo import LavoAttention
from holdfast.context.kernels import attention_with_lse
from holdfast.context.masks import Causal

WIDTH, LAYERS, PARAMETERS = 64, 2, 120_000
HEADS, MEMORY, WINDOW = 2, 32, 31
SHORT, LONG, STEPS, BATCH = 256, 4096, 120, 8
RATES = (4e-3, 8e-3)


class Lavo(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = LavoAttention(WIDTH, HEADS, memory=MEMORY, window=WINDOW)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x)[0]


class Plain(nn.Module):
    """Softmax attention; positions are the model's."""

    heads = HEADS

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention_with_lse(q, k, v, mask=Causal())[0]


class Linear(Plain):
    """Linear attention with features elu(x)+1; its state is a sum of d*d and one of d in fp32."""

    # One head, so that its state is as large as the budget allows.
    heads = 1

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = F.elu(q) + 1, F.elu(k) + 1
        weights = (q @ k.mT).tril()
        return weights @ v / weights.sum(-1, keepdim=True)

    @classmethod
    def nbytes(cls) -> int:
        size = WIDTH // cls.heads
        return 4 * cls.heads * (size * size + size)


def with_positions(model: ByteLM, n: int) -> ByteLM:
    """More rows of positions, as they were before training."""
    rows = 0.1 * torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(0))
    rows[:SHORT] = model.positions.weight.detach()
    model.positions = nn.Embedding.from_pretrained(rows)
    return model


def losses(mixer: type[nn.Module], seed: int, positions: int = 0) -> tuple[float, float]:
    """Nats per byte of the same text, read in pieces of SHORT and of LONG."""
    pieces = LONG // SHORT

    def read(rate: float) -> tuple[float, float]:
        def build() -> ByteLM:
            mixers = [mixer() for _ in range(LAYERS)]
            return ByteLM(WIDTH, mixers, PARAMETERS, positions=positions)

        model = trained(build, STEPS, rate, seed, batch=BATCH, length=SHORT)
        model = with_positions(model, LONG) if positions else model
        return evaluate(model, LONG, 8, pieces=pieces)[0], evaluate(model, LONG, 8)[0]

    return min(read(rate) for rate in RATES)


@check(
    "lavo",
    claim="perplexity rises by at most 5 % from 256 to 4,096 tokens, less than with learned "
    "positions; better than linear attention in as many bytes",
)
def run(seed: int) -> Result:
    ours, absolute = losses(Lavo, seed), losses(Plain, seed, positions=SHORT)
    linear = losses(Linear, seed)

    def rise(pair: tuple[float, float]) -> float:
        return math.exp(pair[1] - pair[0]) - 1

    layer = LavoAttention(WIDTH, HEADS, memory=MEMORY, window=WINDOW).requires_grad_(False)
    state, nbytes = None, {}
    text = torch.randn(1, 10_000, WIDTH, generator=torch.Generator().manual_seed(seed))
    for until in (100, 100_000):
        while state is None or state.seen < until:
            step = min(until - (state.seen if state else 0), 10_000)
            _, state = layer(text[:, :step], state)
        nbytes[until] = state.nbytes()
    return Result(
        measured={
            "perplexity_256": math.exp(ours[0]),
            "perplexity_4096": math.exp(ours[1]),
            "rise": rise(ours),
            "state_bytes_at_1e2": nbytes[100],
            "state_bytes_at_1e5": nbytes[100_000],
        },
        baseline={
            "name": "learned positions, which keeps all keys and values; linear attention (elu)",
            "learned_perplexity_256": math.exp(absolute[0]),
            "learned_perplexity_4096": math.exp(absolute[1]),
            "learned_rise": rise(absolute),
            "linear_perplexity_256": math.exp(linear[0]),
            "linear_perplexity_4096": math.exp(linear[1]),
            "linear_state_bytes": Linear.nbytes(),
        },
        threshold="rise <= 5 % and < learned positions'; perplexity < linear attention's at 256 "
        "and 4,096 in no more bytes of state; equal bytes after 1e2 and 1e5 tokens",
        passed=rise(ours) <= 0.05
        and rise(ours) < rise(absolute)
        and ours[0] < linear[0]
        and ours[1] < linear[1]
        and nbytes[100] == nbytes[100_000] <= Linear.nbytes(),
    )
