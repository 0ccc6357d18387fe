"""Every row of the recipe table against a measured step, for a language model and an Evoformer."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from holdfast.budget import Budget
from holdfast.checks import Result, check, tinylm
from holdfast.meter import Meter, predict
from holdfast.plan.models import loss_of, resolve
from holdfast.plan.skeletons import Request
from holdfast.training.chunked import checkpoint_segments
from holdfast.training.models.evoformer import Evoformer, TriangleAttention
from holdfast.training.recipes import Row, table

RESIDUES = (64, 128)
CHUNK, DEPTH, WITHIN = 8, 16, 0.005


def measured(row: Row, build: Callable[[], nn.Module]) -> Meter:
    """One real step under a recipe, after one that warms up.

    Bytes elsewhere are bounded as well: the row's plan gives each arena exactly what is predicted.
    """
    request = row.fitter.request
    micro = row.candidate.skeleton.globals.micro
    source, model = resolve(build()), build()
    dtype = getattr(torch, row.recipe.dtype)
    batches = [
        source.example_inputs(micro, request.sequence, "cpu", dtype)
        for _ in range(request.batch // micro)
    ]
    applied = row.apply(model)

    def step() -> None:
        for batch in batches:
            loss_of(applied.model(**batch)).backward()
        applied.optimizer.step()
        applied.optimizer.zero_grad()

    step()
    with Meter(applied.model, applied.optimizer, inputs=batches) as meter:
        step()
    return meter


def triangle(residues: int, chunk: int | None) -> tuple[TriangleAttention, tuple[Tensor]]:
    """Triangle attention as narrow as its logits are dominant, and pairs for it."""
    module = TriangleAttention(4, 4, 2, starting=True)
    module.chunk = chunk
    return module, (torch.ones(1, residues, residues, 4, requires_grad=True),)


def triangle_bytes(residues: int, chunk: int | None) -> int:
    """Most bytes that forward and backward hold above the module and its input, traced."""

    def build():
        module, inputs = triangle(residues, chunk)
        return module, None, inputs

    meter = predict(build, lambda module, _, inputs: module(*inputs).sum().backward())
    return meter.peak - meter.base


class _Linear(nn.Module):
    """A block that saves what enters it and nothing else."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class Chain(nn.Module):
    """A stack of blocks whose inside is as large as their boundary."""

    def __init__(self, depth: int = DEPTH):
        super().__init__()
        self.blocks = nn.ModuleList(_Linear() for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def segment_bytes(segments: int | None) -> int:
    """Most bytes that a step of a chain holds above model and input; None recomputes nothing."""
    model, x = Chain(), torch.ones(256, 16, requires_grad=True)
    if segments is not None:
        checkpoint_segments(model, segments)
    model(x).sum().backward()
    with Meter(model, inputs=x) as meter:
        model(x).sum().backward()
    return meter.peak - meter.base


def _evoformer() -> Evoformer:
    torch.manual_seed(0)
    return Evoformer(depth=4)


@check(
    "recipes",
    claim="predicts the peak of every recipe of memory-efficient training, for a language model "
    "and an Evoformer, and orders chunks and segments as theory does",
)
def run(seed: int) -> Result:
    cases = {
        "tinylm": (lambda: tinylm.model(seed, num_hidden_layers=4), 2, 48),
        "evoformer": (_evoformer, 1, 24),
    }
    off: dict[str, float] = {}
    for name, (build, batch, sequence) in cases.items():
        request = Request(
            build(), Budget.parse("1GiB"), batch=batch, sequence=sequence, hardware="cpu-2core"
        )
        for row in table(request).rows:
            off[f"{name}, {row.recipe.label}"] = abs(row.peak / measured(row, build).peak - 1)
    growth = {
        chunk: triangle_bytes(RESIDUES[1], chunk) / triangle_bytes(RESIDUES[0], chunk)
        for chunk in (None, CHUNK)
    }
    held = {k: segment_bytes(k) for k in (1, 2, 4, 8, 16)}
    worst = max(off, key=lambda name: off[name])
    return Result(
        measured={
            "rows": len(off),
            "exact_rows": sum(error == 0 for error in off.values()),
            "worst_error": off[worst],
            "worst_row": worst,
            "growth_chunked": growth[CHUNK],
            "segment_bytes": {str(k): nbytes for k, nbytes in held.items()},
        },
        baseline={
            "name": "all rows of triangle attention at once",
            "growth": growth[None],
            "bytes_without_segments": segment_bytes(None),
        },
        threshold=f"every prediction within {WITHIN:.1%} of the measured peak; from "
        f"{RESIDUES[0]} to {RESIDUES[1]} residues bytes grow 7 to 8 x plain and 3.8 to 4.2 x in "
        f"chunks of {CHUNK}; of {DEPTH} blocks, sqrt({DEPTH}) segments hold the least",
        passed=off[worst] <= WITHIN
        and 7 <= growth[None] <= 8
        and 3.8 <= growth[CHUNK] <= 4.2
        and min(held, key=lambda k: held[k]) == round(DEPTH**0.5),
    )
