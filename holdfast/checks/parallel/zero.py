"""A small language model on two ranks: what each stage holds and sends, beside DDP."""

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from holdfast.checks import Result, check, tinylm
from holdfast.meter import Meter
from holdfast.parallel.launch import launch
from holdfast.parallel.sharded import Traffic
from holdfast.parallel.zero import zero
from holdfast.plan.formulas import zero as formulas

STEPS, LR, BUCKET = 10, 1e-3, 64 * 1024
ADAMW = partial(torch.optim.AdamW, lr=LR)
STATES = ("parameters", "gradients", "optimizer")


def batches(seed: int) -> list[Tensor]:
    """Of this rank: its own half of what one process would read."""
    own = slice(dist.get_rank(), None, dist.get_world_size())
    return [ids[own] for ids in tinylm.batches(tinylm.corpus()[0], STEPS + 1, seed)]


def trained(
    model: nn.Module, optimizer: torch.optim.Optimizer, forward: nn.Module, seed: int
) -> tuple[list[Tensor], dict[str, int], int]:
    """Weights after the steps; then states at a step, and elements sent in one."""

    def step(ids: Tensor) -> None:
        forward(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        # DDP's gradients are views of its buckets, and only seen while they are there.
        optimizer.zero_grad(set_to_none=False)

    *most, last = batches(seed)
    for ids in most:
        step(ids)
    weights = [p.detach() for p in model.parameters()]
    weights = [w.full_tensor() if hasattr(w, "full_tensor") else w.clone() for w in weights]
    with Meter(model, optimizer, inputs=last) as meter:
        step(last)
    with Traffic() as traffic:
        step(last)
    column = meter.ledger.column("device", "step")
    return weights, {c: column[c] for c in STATES}, traffic.elements()


def predicted(stage: int, plain: nn.Module, optimizer) -> tuple[dict[str, int], int]:
    """Resident bytes and elements sent, by formula."""
    ranks = dist.get_world_size()
    if stage == 3:
        blocks = [[tuple(p.shape) for p in layer.parameters()] for layer in plain.model.layers]
        whole = [tuple(p.shape) for p in plain.parameters()]
        inner = {id(p) for layer in plain.model.layers for p in layer.parameters()}
        root = [tuple(p.shape) for p in plain.parameters() if id(p) not in inner]
        held = formulas.sharded_rows(whole, ranks, dist.get_rank())
        # Every rank has the root's rows gathered until its backward, here not at a step.
        return held, formulas.volume_rows([*blocks, root], ranks)
    sums = [sum(p.numel() for p in bucket.parameters) for bucket in optimizer.order]
    return formulas.resident(sums, ranks, stage), formulas.volume(sums, ranks, stage)


def on_each_rank(seed: int) -> dict[str, dict]:
    model = tinylm.model(seed)
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
    reference, states, sent = trained(model, ADAMW(model.parameters()), ddp, seed)
    found = {"ddp": {"states": states, "elements": sent}}
    for stage in (1, 2, 3):
        model, optimizer = zero(tinylm.model(seed), ADAMW, stage=stage, bucket_bytes=BUCKET)
        weights, states, sent = trained(model, optimizer, model, seed)
        pairs = zip(weights, reference, strict=True)
        apart = max((a - b).abs().max().item() for a, b in pairs)
        held, volume = predicted(stage, tinylm.model(seed), optimizer)
        found[f"stage {stage}"] = {
            "states": states, "elements": sent, "apart": apart,
            "predicted": held, "predicted elements": volume,
        }  # fmt: skip
    return found


def _largest(ranks: list[dict], key: str, of: Callable[[dict], float]) -> float:
    return max(of(rank[key]) for rank in ranks)


@check(
    "zero",
    claim="each rank holds and sends what the formulas say, to the byte, and ten AdamW steps equal "
    "data parallelism",
)
def run(seed: int, full: bool = False) -> Result:
    ranks = launch(on_each_rank, 4 if full else 2, seed, limit=300.0)
    measured: dict[str, float] = {}
    exact, largest = True, 0.0
    for stage in (1, 2, 3):
        key = f"stage {stage}"
        exact &= all(rank[key]["states"] == rank[key]["predicted"] for rank in ranks)
        exact &= all(rank[key]["elements"] == rank[key]["predicted elements"] for rank in ranks)
        largest = max(largest, _largest(ranks, key, lambda found: found["apart"]))
        name = f"stage_{stage}"
        states = _largest(ranks, key, lambda found: sum(found["states"].values()))
        measured[f"{name}_state_bytes"] = states
        measured[f"{name}_elements_sent"] = _largest(ranks, key, lambda found: found["elements"])
    measured |= {"equals_formulas": exact, "largest_difference_of_weights": largest}
    plain = _largest(ranks, "ddp", lambda found: sum(found["states"].values()))
    falling = [plain, *(measured[f"stage_{stage}_state_bytes"] for stage in (1, 2, 3))]
    return Result(
        measured=measured,
        baseline={
            "ddp_state_bytes": plain,
            "ddp_elements_sent": _largest(ranks, "ddp", lambda found: found["elements"]),
        },
        threshold="bytes and elements equal the formulas on every rank, weights within 1e-6 of "
        "DDP's, each stage holds less than the one before",
        passed=exact and largest <= 1e-6 and falling == sorted(falling, reverse=True),
    )
