"""A planted task: of eight layers two differ from the teacher's; does the schedule find them?"""

import copy

import torch
from torch import Tensor, nn

from holdfast.checks import Result, check
from holdfast.training.adapters import attach
from holdfast.training.adapters.ist import ImportanceSchedule, RandomSchedule

DEPTH, WIDTH, PLANTED, STEPS, SEEDS = 8, 16, 2, 200, 5
RANK, BATCH, NOISE, LR = 4, 64, 0.1, 1e-2


class Part(nn.Module):
    """A layer that reads and writes its own part of the stream, so that no other can stand in."""

    def __init__(self, index: int):
        super().__init__()
        self.index = index
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, DEPTH, WIDTH) -> the same shape."""
        change = self.down(torch.tanh(self.up(x[:, self.index])))
        return x.index_add(1, torch.tensor([self.index]), change[:, None])


def _net() -> nn.Sequential:
    return nn.Sequential(*(Part(i) for i in range(DEPTH)))


def trained(schedule_class: type[RandomSchedule], seed: int) -> tuple[float, bool]:
    """Loss after training without the noise of targets, and whether the planted layers lead."""
    torch.manual_seed(seed)
    student = _net()
    teacher = copy.deepcopy(student)
    planted = torch.randperm(DEPTH)[:PLANTED]
    with torch.no_grad():
        for i in planted.tolist():
            weight = teacher[i].up.weight
            # Of the adapter's rank, so that it can be learned.
            weight.add_(torch.randn(2 * WIDTH, RANK) @ torch.randn(RANK, WIDTH) / RANK**0.5)
    attach(student, "lora", rank=RANK)
    schedule = schedule_class(student, PLANTED, seed=seed)
    optimizer = torch.optim.Adam([p for p in student.parameters() if p.requires_grad], lr=LR)
    for _ in range(STEPS):
        x = torch.randn(BATCH, DEPTH, WIDTH)
        with torch.no_grad():
            target = teacher(x)
            # Without it, layers that need no change would never get a gradient.
            target += NOISE * torch.randn_like(target)

        def loss(x: Tensor = x, target: Tensor = target) -> Tensor:
            return (student(x) - target).square().sum(2).mean()

        schedule.before_step(loss)
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.after_step()
    x = torch.randn(16 * BATCH, DEPTH, WIDTH)
    with torch.no_grad():
        error = (student(x) - teacher(x)).square().sum(2).mean().item()
    found = set(schedule.scores.topk(PLANTED).indices.tolist()) == set(planted.tolist())
    return error, found


@check(
    "ist",
    claim="finds the two layers of eight that need training, and ends no worse than drawing at "
    "random",
)
def run(seed: int) -> Result:
    with torch.random.fork_rng(devices=[]):
        ours = [trained(ImportanceSchedule, seed + s) for s in range(SEEDS)]
        chance = [trained(RandomSchedule, seed + s)[0] for s in range(SEEDS)]
    found = sum(hit for _, hit in ours)
    loss, random_loss = sum(error for error, _ in ours) / SEEDS, sum(chance) / SEEDS
    return Result(
        measured={"seeds_found": found, "of_seeds": SEEDS, "loss": loss},
        baseline={"name": "random layers, as many in each step", "loss": random_loss},
        threshold="the planted layers have the two highest scores in >= 4 of 5 seeds, "
        "loss <= random",
        passed=found >= 4 and loss <= random_loss,
    )
