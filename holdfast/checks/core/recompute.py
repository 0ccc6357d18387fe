"""Recompute: the same gradients, and between forward and backward only what enters a block."""

import torch
from torch import Tensor, nn

from holdfast.checks import Result, check, tinylm
from holdfast.meter import Meter, predict
from holdfast.training.step import recompute

LAYERS, BATCH, LENGTH = 8, 8, 128
AT_MOST = 0.35


def _model(seed: int) -> nn.Module:
    return tinylm.model(seed, num_hidden_layers=LAYERS).train()


def _recomputed(model: nn.Module) -> nn.Module:
    for block in model.model.layers:
        recompute(block)
    return model


def _step(model: nn.Module, _, ids: Tensor) -> list[Tensor]:
    model(input_ids=ids, labels=ids).loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return gradients


def _measure(model: nn.Module, ids: Tensor) -> tuple[int, list[Tensor]]:
    """Activations at the peak of a step, and its gradients."""
    _step(model, None, ids)
    with Meter(model, inputs=ids) as meter:
        gradients = _step(model, None, ids)
    return meter.at_peak["activations"], gradients


@check(
    "recompute",
    claim=f"running {LAYERS} blocks again in backward keeps at most {AT_MOST:g} of plain "
    "autograd's activations, as predicted, with bitwise equal gradients",
)
def run(seed: int) -> Result:
    ids = next(tinylm.batches(tinylm.corpus()[0], 1, seed, BATCH, LENGTH))
    plain, want = _measure(_model(seed), ids)
    ours, got = _measure(_recomputed(_model(seed)), ids)
    theirs = _model(seed)
    theirs.gradient_checkpointing_enable({"use_reentrant": False})
    transformers, _ = _measure(theirs, ids)
    forecast = predict(
        lambda: (_recomputed(_model(seed)), None, torch.zeros(BATCH, LENGTH, dtype=torch.int64)),
        _step,
    )
    predicted = forecast.at_peak["activations"]
    equal = all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
    return Result(
        measured={
            "activation_bytes": ours,
            "ratio": ours / plain,
            "predicted_bytes": predicted,
            "gradients_equal": equal,
        },
        baseline={"plain_bytes": plain, "transformers_checkpointing_bytes": transformers},
        threshold=f"activation_bytes <= {AT_MOST:g} x plain_bytes, <= transformers' and "
        "= predicted_bytes; gradients bitwise equal",
        passed=ours <= AT_MOST * plain and ours <= transformers and ours == predicted and equal,
    )
