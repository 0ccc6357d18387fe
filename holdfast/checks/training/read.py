"""READ against training only the head, and against full tuning, on a domain new to the model."""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from holdfast.checks import Result, check, tinylm
from holdfast.meter import Meter
from holdfast.training.adapters.read import READ

STEPS, LR = 100, 3e-3
HIDDEN = 128


def new_domain(tokens: Tensor) -> Tensor:
    """The same files with small letters rotated by 13: known bytes, unknown words."""
    letters = (tokens >= ord("a")) & (tokens <= ord("z"))
    return torch.where(letters, (tokens - ord("a") + 13) % 26 + ord("a"), tokens)


def _batches(seed: int, steps: int) -> Iterator[Tensor]:
    return map(new_domain, tinylm.batches(tinylm.corpus()[0], steps, seed))


@torch.no_grad()
def _loss(model: nn.Module) -> float:
    model.eval()
    batches = list(map(new_domain, tinylm.batches(tinylm.corpus()[1], 8, seed=0)))
    return sum(model(input_ids=ids, labels=ids).loss.item() for ids in batches) / len(batches)


def trained(model: nn.Module, seed: int) -> tuple[float, int]:
    """Validation loss and the peak of a step."""
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=LR)

    def step(ids: Tensor) -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    *batches, last = _batches(seed + 1, STEPS)
    for ids in batches:
        step(ids)
    with Meter(model, optimizer, inputs=last) as meter:
        step(last)
    return _loss(model), meter.peak


@check(
    "read",
    claim="a net over depth learns a new domain better than the head alone, in at most 0.6 x the "
    "peak of full tuning",
)
def run(seed: int) -> Result:
    full = copy.deepcopy(tinylm.trained(seed))
    head = copy.deepcopy(full)
    head.requires_grad_(False).lm_head.requires_grad_(True)
    ours = copy.deepcopy(full)
    before = _loss(full)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        side = READ(ours, hidden=HIDDEN)
    read_loss, read_peak = trained(ours, seed)
    head_loss, head_peak = trained(head, seed)
    full_loss, full_peak = trained(full, seed)
    return Result(
        measured={
            "loss": read_loss,
            "peak_bytes": read_peak,
            "peak_ratio": read_peak / full_peak,
            "side_parameters": sum(p.numel() for p in side.parameters()),
        },
        baseline={
            "untrained_loss": before,
            "head_only_loss": head_loss,
            "head_only_peak_bytes": head_peak,
            "full_tuning_loss": full_loss,
            "full_tuning_peak_bytes": full_peak,
        },
        threshold="loss <= head only - 0.05, peak <= 0.6 x full tuning",
        passed=read_loss <= head_loss - 0.05 and read_peak <= 0.6 * full_peak,
    )
