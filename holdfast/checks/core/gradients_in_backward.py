"""Gradients consumed in backward: the same weights, and one tensor's gradient at a time."""

import torch
from torch import Tensor, nn

from holdfast.checks import Result, check, tinylm
from holdfast.meter import Log, Meter
from holdfast.training.step import StepInBackward

STEPS, LAYERS = 10, 4
# Few tokens, so that gradients and not activations are what a plain step peaks with.
BATCH, LENGTH = 1, 16


def held(log: Log, category: str) -> int:
    """The most bytes of a category at any moment of a log."""
    now = most = 0
    for sid, change, _ in log.events:
        if log.storages[sid].category == category:
            now += change
            most = max(most, now)
    return most


def _train(seed: int, in_backward: bool) -> tuple[nn.Module, Meter, Log]:
    model = tinylm.model(seed, num_hidden_layers=LAYERS).train()
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(
        model.parameters(), lr=tinylm.LR, fused=True
    )
    if in_backward:
        optimizer = StepInBackward(optimizer)
    for number, ids in enumerate(tinylm.batches(tinylm.corpus()[0], STEPS, seed, BATCH, LENGTH)):
        # The rate changes as under a schedule.
        optimizer.param_groups[0]["lr"] = tinylm.LR * (1 - number / STEPS)
        if number < STEPS - 1:
            _step(model, optimizer, ids)
            continue
        with Meter(model, optimizer, inputs=ids) as meter:
            _step(model, optimizer, ids)
    return model, meter, meter.log


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor) -> None:
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@check(
    "gradients_in_backward",
    claim="updating each parameter in backward gives bitwise the weights of the plain step and "
    "never holds more gradient than one block's",
)
def run(seed: int) -> Result:
    plain, plain_meter, plain_log = _train(seed, in_backward=False)
    ours, meter, log = _train(seed, in_backward=True)
    pairs = zip(plain.parameters(), ours.parameters(), strict=True)
    equal = all(torch.equal(a, b) for a, b in pairs)
    block = sum(p.nbytes for p in ours.model.layers[0].parameters())
    gradients, all_of_them = held(log, "gradients"), held(plain_log, "gradients")
    return Result(
        measured={"gradient_bytes": gradients, "peak_bytes": meter.peak, "weights_equal": equal},
        baseline={
            "gradient_bytes": all_of_them,
            "peak_bytes": plain_meter.peak,
            "one_block_bytes": block,
        },
        threshold="0 < gradient_bytes <= one_block_bytes, peak_bytes < baseline's; weights "
        f"bitwise equal after {STEPS} steps",
        passed=0 < gradients <= block and meter.peak < plain_meter.peak and equal,
    )
