"""Byte models that differ in their attention alone: plain, convolved, relative, and both.

All have as many parameters, as many steps and their own best rate of two; three seeds.
"""

import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.checks import Result, check
from holdfast.checks.context._blocks import ByteLM, evaluate, trained
from holdfast.context.attention.rcmha import RCMHA, sinusoids
from holdfast.meter import Meter

WIDTH, HEADS, LAYERS, PARAMETERS = 64, 4, 2, 120_000
STEPS, BATCH, LENGTH, SEEDS = 120, 16, 64, 3
RATES = (3e-3, 6e-3)
MEMORY_LENGTH = 256


class Own(nn.Module):
    """Self-attention by a module with the signature of `nn.MultiheadAttention`."""

    def __init__(self, attention: nn.Module):
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        # nn.MultiheadAttention is causal by its mask alone, the others by themselves.
        n = x.shape[1]
        mask = torch.ones(n, n, dtype=torch.bool).triu(1)
        return self.attention(x, x, x, attn_mask=mask, need_weights=False, is_causal=True)[0]


class Convolved(nn.Module):
    """MDHA: plain attention on convolved queries, keys and values."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.kernels = nn.Parameter(torch.empty(3 * WIDTH, 1, 3))
        self.out = nn.Linear(WIDTH, WIDTH)
        nn.init.uniform_(self.kernels, -(3**-0.5), 3**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        rows = F.conv1d(F.pad(self.qkv(x).mT, (2, 0)), self.kernels, groups=3 * WIDTH).mT
        q, k, v = rows.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        # Scores as the other three have them, not a kernel that holds none.
        scores = q @ k.mT * q.shape[-1] ** -0.5
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        p = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        return self.out((p @ v).transpose(1, 2).flatten(2))


class NaiveRelative(nn.Module):
    """RMHA as it is written down: a vector for each pair of a query and a key."""

    def __init__(self):
        super().__init__()
        self.inner = relative()

    def forward(self, x: Tensor) -> Tensor:
        inner, n = self.inner, x.shape[1]
        rows = F.linear(x, inner.in_proj_weight, inner.in_proj_bias)
        q, k, v = rows.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        places = torch.arange(n)
        distances = (places[:, None] - places).flatten()
        pairs = inner.relative(sinusoids(distances, WIDTH)).view(n, n, HEADS, -1)
        scores = (q + inner.content_bias[:, None]) @ k.mT
        scores = scores + torch.einsum("bhid,ijhd->bhij", q + inner.position_bias[:, None], pairs)
        hidden = torch.ones(n, n, dtype=torch.bool).triu(1)
        p = (scores * q.shape[-1] ** -0.5).masked_fill(hidden, -torch.inf).softmax(-1)
        return inner.out_proj((p @ v).transpose(1, 2).flatten(2))


def relative() -> RCMHA:
    """RMHA: kernels of one row that stay 1."""
    attention = RCMHA(WIDTH, HEADS, 1)
    nn.init.ones_(attention.kernels.requires_grad_(False))
    return attention


KINDS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "mha": (lambda: Own(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)), LENGTH),
    "mdha": (Convolved, LENGTH),
    "rmha": (lambda: Own(relative()), 0),
    "rcmha": (lambda: Own(RCMHA(WIDTH, HEADS)), 0),
}


def model(kind: str) -> ByteLM:
    mixer, positions = KINDS[kind]
    return ByteLM(WIDTH, [mixer() for _ in range(LAYERS)], PARAMETERS, positions=positions)


def accuracies(kind: str, seed: int) -> list[float]:
    """One per seed, all at the rate that is better with the first."""

    def accuracy(rate: float, seed: int) -> float:
        found = trained(lambda: model(kind), STEPS, rate, seed, batch=BATCH, length=LENGTH)
        return evaluate(found, LENGTH, 512)[1]

    first = {rate: accuracy(rate, seed) for rate in RATES}
    best = max(first, key=first.__getitem__)
    return [first[best], *(accuracy(best, s) for s in range(seed + 1, seed + SEEDS))]


def activation_bytes(mixer: nn.Module) -> int:
    """Peak of one layer's attention, forward and backward, above inputs and parameters."""
    x = torch.randn(2, MEMORY_LENGTH, WIDTH, requires_grad=True)
    gradients = [*mixer.parameters(), x]
    mixer(x).sum().backward()
    with Meter(mixer, inputs=[x, *(p.grad for p in gradients)]) as meter:
        mixer(x).sum().backward()
    return meter.peak - meter.base


@check(
    "rcmha",
    claim="at equal parameters and steps, at least as accurate as plain, convolved and relative "
    "attention; without the tensors of naive relative attention",
)
def run(seed: int) -> Result:
    found = {kind: accuracies(kind, seed) for kind in KINDS}
    mean = {kind: statistics.mean(values) for kind, values in found.items()}
    spread = {kind: statistics.stdev(values) for kind, values in found.items()}
    ours, others = mean["rcmha"], [kind for kind in KINDS if kind != "rcmha"]
    ties = [kind for kind in others if abs(ours - mean[kind]) <= spread["rcmha"]]
    nbytes = {kind: activation_bytes(mixer()) for kind, (mixer, _) in KINDS.items()}
    naive = activation_bytes(NaiveRelative())
    return Result(
        measured={
            "accuracy": ours,
            "accuracy_stdev": spread["rcmha"],
            "ties": ", ".join(ties) or "none",
            "activation_bytes": nbytes["rcmha"],
        },
        baseline={
            "name": "plain (torch's, fused), convolved and relative multi-head attention",
            **{f"accuracy_{kind}": mean[kind] for kind in others},
            **{f"activation_bytes_{kind}": nbytes[kind] for kind in others},
            "activation_bytes_naive_rmha": naive,
        },
        threshold="mean accuracy of 3 seeds >= each of MHA, MDHA and RMHA, less one standard "
        "deviation; activation bytes <= naive RMHA's",
        passed=all(ours >= mean[kind] - spread["rcmha"] for kind in others)
        and nbytes["rcmha"] <= naive,
    )
