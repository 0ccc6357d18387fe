"""A sequence that neither plain training nor full recompute can hold on the device, in less time.

Without a GPU device and host are one memory: the split is simulated. The arena, weights, gradients
and whatever torch allocates in a step count as device, slots for swapped rows as host.
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from holdfast.checks import Result, check
from holdfast.meter import Meter
from holdfast.parallel.addresses import Planned
from holdfast.parallel.memo_swap import Memo, host_bytes
from holdfast.training.step import recompute

LAYERS, WIDTH, HEADS, TOKENS, VOCABULARY = 30, 32, 2, 4096, 64
DEVICE, HOST = 28 * 2**20, 136 * 2**20
ROUNDS = 3
Step = Callable[[], None]


def model_of(seed: int) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        n_layer=LAYERS, n_embd=WIDTH, n_head=HEADS, n_positions=TOKENS, vocab_size=VOCABULARY,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, activation_function="gelu",
        use_cache=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).train()


def step_of(model: nn.Module, ids: Tensor) -> Step:
    def step() -> None:
        model.zero_grad(set_to_none=False)
        model(input_ids=ids, labels=ids).loss.backward()

    step()  # gradients exist from now on
    return step


def peak(model: nn.Module, step: Step, *inputs: Tensor) -> int:
    """Bytes on the device, kernels' workspaces included."""
    with Meter(model, inputs=inputs, backend="allocator") as meter:
        step()
    return meter.peak


def timed(steps: dict[str, Step]) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds, and of all processors, the copying thread's included; steps take turns."""
    clocks = time.perf_counter, time.process_time
    spent: dict[str, list[list[float]]] = {name: [[], []] for name in steps}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            starts = [clock() for clock in clocks]
            step()
            for clock, start, values in zip(clocks, starts, spent[name], strict=True):
                values.append(clock() - start)
    seconds, processors = (
        {name: statistics.median(values[i]) for name, values in spent.items()} for i in (0, 1)
    )
    return seconds, processors


def largest_difference(got: nn.Module, want: nn.Module) -> float:
    pairs = zip(got.parameters(), want.parameters(), strict=True)
    return max((a.grad - b.grad).abs().max().item() for a, b in pairs)


@check(
    "memo_swap",
    claim="trains a length that plain training and full recompute cannot hold on the (simulated) "
    "device, in less time than full recompute",
)
def run(seed: int) -> Result:
    ids = torch.randint(VOCABULARY, (1, TOKENS), generator=torch.Generator().manual_seed(seed))
    plain, again, ours = (model_of(seed) for _ in range(3))
    for block in again.transformer.h:
        recompute(block)
    memo = Memo(ours.transformer.h, host=HOST)
    steps = {"plain": step_of(plain, ids), "recompute": step_of(again, ids)}
    planned = Planned(step_of(ours, ids))
    for _ in range(2):
        planned()
    assert planned.layout is not None and planned.memory is not None and memo.sizes is not None
    device = peak(ours, planned, ids, planned.memory)
    plain_device = peak(plain, steps["plain"], ids)
    recompute_device = peak(again, steps["recompute"], ids)
    seconds, processors = timed({"memo": planned, **steps})
    difference = max(largest_difference(model, plain) for model in (ours, again))
    held = memo.host_nbytes
    formula = host_bytes(memo.sizes, LAYERS, memo.rows)
    return Result(
        measured={
            "simulated_device_bytes": device,
            "simulated_host_bytes": held,
            "step_seconds": seconds["memo"],
            "time_ratio": seconds["memo"] / seconds["recompute"],
            "processor_time_ratio": processors["memo"] / processors["recompute"],
            "swapped_tokens": memo.rows,
            "arena_bytes": planned.layout.height,
            "storages_outside_the_arena": planned.outside,
            "gradient_difference": difference,
        },
        baseline={
            "plain_device_bytes": plain_device,
            "plain_step_seconds": seconds["plain"],
            "recompute_device_bytes": recompute_device,
            "recompute_step_seconds": seconds["recompute"],
        },
        threshold=f"device <= {DEVICE} B < recompute's and plain's; host = formula <= {HOST} B; "
        "step < recompute's; no storage outside the arena; gradients equal to 1e-6",
        passed=device <= DEVICE < min(recompute_device, plain_device)
        and held == formula <= HOST
        and seconds["memo"] < seconds["recompute"]
        and planned.outside == 0
        and difference <= 1e-6,
    )
