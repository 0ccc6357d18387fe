"""Plan: what `fit` returns and `train` runs; also for loops of one's own.

plan = holdfast.fit("llama-3.2-1b", budget="24GiB")
model, optimizer = plan.apply(model, optimizer)
"""

import os
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import nn

from holdfast.budget import Budget
from holdfast.errors import UsageError
from holdfast.ledger import CATEGORIES, Ledger
from holdfast.places import Arena, DiskArena, HostArena
from holdfast.plan import apply, file
from holdfast.plan.file import PlanFile
from holdfast.units import format_bytes


class Applied(NamedTuple):
    """A model and an optimizer that follow a plan."""

    model: nn.Module
    optimizer: torch.optim.Optimizer


@dataclass
class Plan:
    """A validated plan file, and what else `fit` found: `alternatives` and why."""

    spec: PlanFile
    alternatives: list[dict[str, Any]] = field(default_factory=list)
    binding: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Plan":
        return cls(file.read(path))

    def save(self, path: str | os.PathLike[str]) -> None:
        file.write(self.spec, path)

    @cached_property
    def predicted(self) -> Ledger:
        """Predicted bytes by place, category and phase; empty for a plan written by hand."""
        return Ledger.from_json(self.spec.predicted.get("ledger", []))

    @property
    def budget(self) -> Budget:
        return Budget(**self.spec.budget)

    @property
    def step_seconds(self) -> float:
        return float(self.spec.predicted.get("step_seconds", 0.0))

    def table(self) -> str:
        """Predicted bytes per category in each phase, as text."""
        phases = self.predicted.phases()
        rows = [f"{'category':<14}" + "".join(f"{p:>14}" for p in phases)]
        columns = {p: self.predicted.column("device", p) for p in phases}
        for category in CATEGORIES:
            if any(columns[p][category] for p in phases):
                cells = "".join(f"{format_bytes(columns[p][category]):>14}" for p in phases)
                rows.append(f"{category:<14}{cells}")
        totals = "".join(f"{format_bytes(sum(columns[p].values())):>14}" for p in phases)
        return "\n".join([*rows, f"{'total':<14}{totals}"])

    def arenas(self) -> dict[str, Arena]:
        """One arena for each place that a block's activations move to."""
        used = {o for runs in self.spec.methods.blocks.values() for o in file.parse_runs(runs)}
        budget = self.budget
        found: dict[str, Arena] = {}
        if "host" in used and budget.host:
            found["host"] = HostArena(budget.host)
        if "disk" in used and budget.disk:
            found["disk"] = DiskArena(budget.disk)
        return found

    def apply(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Applied:
        """Make `model` follow the plan, in place, and give the optimizer that goes with it.

        Args:
            model: in the plan's dtype, or it is converted.
            optimizer: its learning rate and weight decay are taken over; it must not have
                stepped yet. Without one, the plan's training section decides.

        Returns:
            The model and the optimizer to use from now on, for both `step()` and `state_dict()`.

        Raises:
            UsageError: the plan does not suit the model, or the optimizer is not a fresh one.

        In a loop of one's own, with nothing else changed:

        >>> methods = {"gradients": "backward"}
        >>> spec = PlanFile(model="mine", sequence=1, budget={"device": 2**20}, methods=methods)
        >>> model = nn.Linear(4, 1)
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        >>> model, optimizer = Plan(spec).apply(model, optimizer)
        >>> for batch in torch.randn(3, 8, 4):
        ...     model(batch).square().mean().backward()
        ...     assert model.weight.grad is None  # consumed in backward, as planned
        ...     optimizer.step()
        ...     optimizer.zero_grad()

        In Hugging Face's Trainer, with the plan's micro-batch and accumulation, and its clipping
        instead of the Trainer's default of 1.0:

            args = TrainingArguments(
                per_device_train_batch_size=plan.spec.micro_batch,
                gradient_accumulation_steps=plan.spec.accumulation,
                max_grad_norm=plan.spec.training.clip or 0,
            )
            Trainer(model=model, args=args, train_dataset=data, optimizers=(optimizer, None))
        """
        methods, training = self.spec.methods, self.spec.training
        rate, decay = training.learning_rate, training.weight_decay
        if optimizer is not None:
            if optimizer.state:
                raise UsageError(
                    "the optimizer has stepped already; apply the plan before the first step"
                )
            if len(optimizer.param_groups) != 1:
                raise UsageError(
                    f"the optimizer has {len(optimizer.param_groups)} parameter groups; "
                    "apply the plan with one group"
                )
            rate = optimizer.param_groups[0]["lr"]
            decay = optimizer.param_groups[0].get("weight_decay", 0.0)
        model.to(getattr(torch, methods.dtype)).train()
        apply.prepare(model, methods)
        apply.set_blocks(model, methods.blocks, self.arenas())
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        optimizer = apply.make_optimizer(named, methods, rate, decay)
        return Applied(model, apply.wrap_optimizer(model, optimizer, methods))
