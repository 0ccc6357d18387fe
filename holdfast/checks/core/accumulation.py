"""Accumulation: a batch in parts has the whole's gradient and a fraction of its activations."""

import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from holdfast.checks import Result, check
from holdfast.checks.core.resume import WRITTEN, Case
from holdfast.plan.plan import Plan
from holdfast.training.data import DataSource
from holdfast.training.run import Run, Settings

BATCH, PARTS = 16, 8
ERROR, AT_MOST = 1e-5, 0.3


def _run(directory: Path, micro_batch: int) -> tuple[dict[str, Tensor], Run]:
    """One step of gradient descent at rate 1, so that the weights move by the gradient."""
    case = Case(
        "llama",
        batch=BATCH,
        micro_batch=micro_batch,
        methods={"optimizer": {"sgd": {}}},
        training={"learning_rate": 1.0, "schedule": "constant", "warmup": 0.0},
    )
    plan = case.write(directory)
    settings = Settings(DataSource((str(directory / "data.txt"),)), steps=1)
    run = Run(Plan.load(plan), settings, directory / "out", device="cpu")
    run.run()
    return load_file(directory / "out" / WRITTEN), run


@check(
    "accumulation",
    claim=f"a step of {BATCH} sequences in {PARTS} parts moves the weights alike to {ERROR:g} and "
    f"keeps at most {AT_MOST:g} of the activations",
)
def run(seed: int) -> Result:
    with tempfile.TemporaryDirectory() as directory:
        whole, plain = _run(Path(directory) / "whole", BATCH)
        parts, ours = _run(Path(directory) / "parts", BATCH // PARTS)
        torch.manual_seed(plain.plan.spec.training.seed)
        start = dict(plain.source.build("cpu", torch.float32).state_dict())
    error = max(
        float((parts[n] - whole[n]).abs().max() / (whole[n] - start[n]).abs().max()) for n in whole
    )
    kept, plain_kept = (
        max(r.measured.ledger.column("device", p)["activations"] for p in ("forward", "backward"))
        for r in (ours, plain)
    )
    return Result(
        measured={"error": error, "activation_bytes": kept, "ratio": kept / plain_kept},
        baseline={"activation_bytes": plain_kept},
        threshold=f"error <= {ERROR:g} of the gradient's largest entry, ratio <= {AT_MOST:g}",
        passed=error <= ERROR and kept <= AT_MOST * plain_kept,
    )
