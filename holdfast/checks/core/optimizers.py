"""torch's AdamW as plans use it: fused, without scratch, equal to the plain loop over tensors."""

from torch import nn

from holdfast.checks import Result, check, tinylm
from holdfast.meter import Meter
from holdfast.plan.registry import method

STEPS = 20
ERROR = 1e-6


def _train(seed: int, fused: bool) -> tuple[nn.Module, int, int]:
    """The model, the optimizer's scratch in one update, and its state, in bytes."""
    model = tinylm.model(seed).train()
    make = method("adamw", "optimizer").apply
    optimizer = make(list(model.named_parameters()), tinylm.LR, weight_decay=0.1, fused=fused)
    scratch = 0
    for number, ids in enumerate(tinylm.batches(tinylm.corpus()[0], STEPS, seed)):
        model(input_ids=ids, labels=ids).loss.backward()
        if number < STEPS - 1:
            optimizer.step()
        else:
            with Meter(model, optimizer) as meter:
                optimizer.step()
            scratch = meter.peak - meter.base
        optimizer.zero_grad()
    return model, scratch, meter.at_peak["optimizer"]


@check(
    "optimizers",
    claim=f"the fused AdamW moves weights as the loop over tensors does, to {ERROR:g}, and needs "
    "no scratch",
)
def run(seed: int) -> Result:
    fused, scratch, state = _train(seed, fused=True)
    loop, loop_scratch, loop_state = _train(seed, fused=False)
    error = max(
        float((a - b).detach().abs().max())
        for a, b in zip(fused.parameters(), loop.parameters(), strict=True)
    )
    expected = sum(
        method("adamw", "optimizer").state_bytes(tuple(p.shape), p.dtype)
        for p in fused.parameters()
    )
    return Result(
        measured={"error": error, "scratch_bytes": scratch, "state_bytes": state},
        baseline={"scratch_bytes": loop_scratch, "state_bytes": loop_state, "formula": expected},
        threshold=f"error <= {ERROR:g} after {STEPS} steps, scratch_bytes = 0 where the loop has "
        "some, state_bytes = formula",
        passed=error <= ERROR and scratch == 0 < loop_scratch and state == expected,
    )
