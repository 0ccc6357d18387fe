"""LazyDP (012): DP-SGD for embedding tables, with a row's noise paid when the row is next read.

Keeps    per row, up to which step its noise was paid; per step, the sum of squared learning rates.
Form     int32 per row; fp64 per step since the last flush.
Bytes    4*V for a table of V rows, instead of 4*V*d of dense noise in each step.
Source   Lim, Kim, Lee, Yeom, Rhu, "LazyDP: Co-Designing Algorithm-Software for Scalable Training of
         Differentially Private Recommendation Models", ASPLOS 2024.
Departs  a row that one example reads twice enters the example's norm as the sum of both gradients,
         not of both norms; learning rates may change; a read of a row that owes noise is an error.

A row that was not read in k steps owes k draws of noise; their sum is one draw of k times the
variance, so that the released model has the law of DP-SGD's with noise on every row in every step.
That holds only for plain SGD. Noise comes from torch's generator, not from a cryptographic one.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from holdfast import attach
from holdfast.errors import HoldfastError, UsageError
from holdfast.training.optim.ghost import GhostNorms

PIECE = 1 << 20  # elements of noise that exist at a time


class LazyDPSGD(torch.optim.Optimizer):
    """DP-SGD over dense parameters and embedding tables.

    One step is `losses = ...` of shape (B,), `optimizer.backward(losses)` instead of a backward
    pass, and `optimizer.step(upcoming)` with the rows that the next batch will read; in the end
    `optimizer.flush()`, before the model is evaluated, saved or released.

    Args:
        params: parameters or groups, as for any optimizer; those of the tables are left out.
        tables: `nn.Embedding(..., sparse=True)` modules, anywhere in the model.
        lr: learning rate; schedulers may change it, and a group may have its own.
        noise_multiplier: standard deviation of the noise over `max_grad_norm`.
        max_grad_norm: bound on the norm of one example's gradient, tables included.
        expected_batch: the sum of gradients is divided by it, not by the size of a random batch.
        generator: of the noise, for tests; by default seeded by the system. It is not part of
            `state_dict()`: whoever reads its state can subtract the noise.

    Raises:
        UsageError: a table is not sparse or not plain; a setting that SGD with lazy noise lacks,
            such as momentum or weight decay.
    """

    def __init__(
        self,
        params: Iterable,
        tables: Sequence[nn.Embedding],
        lr: float,
        noise_multiplier: float,
        max_grad_norm: float,
        *,
        expected_batch: float,
        generator: torch.Generator | None = None,
        **refused: Any,
    ):
        for name, value in (
            ("lr", lr), ("noise_multiplier", noise_multiplier), ("max_grad_norm", max_grad_norm),
            ("expected_batch", expected_batch),
        ):  # fmt: skip
            positive = name in ("max_grad_norm", "expected_batch")
            if not math.isfinite(value) or value < 0 or (positive and value == 0):
                raise UsageError(f"{name}={value} must be {'> 0' if positive else '>= 0'}")
        _refuse(refused)
        self.noise_multiplier, self.max_grad_norm = noise_multiplier, max_grad_norm
        self.expected_batch, self.tables = expected_batch, list(tables)
        self._generators: dict[torch.device, torch.Generator] = {}
        if generator is not None:
            self._generators[generator.device] = generator
        # Sums of squared learning rates up to each step since the last flush.
        self._squares = torch.zeros(1024, dtype=torch.float64)
        self._now = 0
        self._norms: GhostNorms | None = None
        self._clipped = False
        for table in self.tables:
            _check_table(table)
            table.register_forward_pre_hook(self._before_read)
            table.register_state_dict_pre_hook(self._before_save)
        mine = {id(table.weight) for table in self.tables}
        super().__init__(_without(params, mine), {"lr": lr})
        weights = [table.weight for table in self.tables]
        self.add_param_group({"params": weights, "lr": lr, "tables": True, "steps": 0})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        _refuse(param_group.keys() - {"params", "lr", "tables", "steps", "initial_lr"})
        super().add_param_group(param_group)

    @property
    def _group(self) -> dict[str, Any]:
        return next(group for group in self.param_groups if group.get("tables"))

    @property
    def steps(self) -> int:
        """Steps taken, for the accountant."""
        return self._group["steps"]

    def watch(self, model: nn.Module) -> attach.Handle:
        """See each forward pass of `model`, for the norms of single examples' gradients.

        Raises:
            UsageError: the trainable parameters of the model are not those of the optimizer; or as
                `GhostNorms`.
        """
        mine = {id(p) for group in self.param_groups for p in group["params"]}
        theirs = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
        if mine != theirs.keys():
            lacking = [name for key, name in theirs.items() if key not in mine]
            raise UsageError(
                "the optimizer's parameters are not those of the model that train: "
                + (f"the optimizer lacks {', '.join(lacking[:3])}" if lacking else "it has others")
                + "; give it model.parameters() and every table"
            )
        self._norms = GhostNorms(model)
        return self._norms.handle

    def backward(self, losses: Tensor) -> Tensor:
        """Fill the gradients with the sum of clipped ones: losses (B,) -> unclipped norms (B,).

        Several calls before a step add up, for a batch in parts.

        Raises:
            UsageError: the losses are not one per example, or as `GhostNorms`.
        """
        if losses.dim() != 1:
            raise UsageError(
                f"losses of shape {tuple(losses.shape)}: give one per example, (B,), for example "
                'with reduction="none"'
            )
        if self._norms is None:
            raise UsageError("nothing is watched; call optimizer.watch(model) before its forward")
        norms = self._norms(losses)
        share = (self.max_grad_norm / (norms + 1e-6)).clamp(max=1)
        if not self._clipped:
            self.zero_grad()
        if len(losses):
            (share.to(losses) * losses).sum().backward()
        self._clipped = True
        return norms

    @torch.no_grad()
    def step(self, upcoming: Sequence[Tensor] | None = None) -> None:  # type: ignore[override]
        """Update, and pay the noise of the rows that are read next.

        Args:
            upcoming: for each table the ids, of any shape, that the next batch reads; None only
                where nothing is read before `flush()`.

        Raises:
            UsageError: no `backward` of this optimizer came before; or one entry per table is
                missing.
        """
        if not self._clipped:
            raise UsageError(
                "no clipped gradients: call optimizer.backward(losses) before each step; gradients "
                "of losses.mean().backward() are not private"
            )
        if upcoming is not None and len(upcoming) != len(self.tables):
            raise UsageError(f"rows of {len(upcoming)} tables given, expected {len(self.tables)}")
        self._clipped = False
        deviation = self.noise_multiplier * self.max_grad_norm
        for group in self.param_groups:
            rate = float(group["lr"]) / self.expected_batch
            if group.get("tables"):
                group["steps"] += 1
                self._advance(float(group["lr"]))
                for p in group["params"]:
                    if p.grad is not None:
                        found = p.grad.coalesce()
                        p.index_add_(0, found.indices()[0], found.values(), alpha=-rate)
                continue
            for p in group["params"]:
                # Also without a gradient: who is absent must not show.
                noisy = deviation * self._randn(p.shape, p)
                p.sub_(noisy if p.grad is None else noisy.add_(p.grad), alpha=rate)
        if upcoming is not None:
            for table, ids in zip(self.tables, upcoming, strict=True):
                self._pay(table, ids.to(table.weight.device).flatten().unique())

    @torch.no_grad()
    def flush(self) -> None:
        """Pay the noise that every row owes; afterwards the model may be released."""
        for table in self.tables:
            rows, width = table.weight.shape
            for start in range(0, rows, max(1, PIECE // width)):
                end = min(rows, start + max(1, PIECE // width))
                self._pay(table, torch.arange(start, end, device=table.weight.device))
        self.state.clear()
        self._now = 0

    @property
    def owes(self) -> bool:
        """Whether some row may lack noise."""
        return self._now > 0

    def _advance(self, rate: float) -> None:
        if self._now + 1 == len(self._squares):
            self._squares = torch.cat([self._squares, torch.zeros_like(self._squares)])
        self._squares[self._now + 1] = self._squares[self._now] + rate**2
        self._now += 1

    def _paid(self, table: nn.Embedding) -> Tensor:
        """(V,) int32: up to which step since the last flush a row's noise was paid."""
        state = self.state[table.weight]
        if "paid" not in state:
            rows = table.weight.shape[0]
            state["paid"] = torch.zeros(rows, dtype=torch.int32, device=table.weight.device)
        return state["paid"]

    def _pay(self, table: nn.Embedding, rows: Tensor) -> None:
        """Noise for distinct `rows` of a table, up to the present step."""
        paid, weight = self._paid(table), table.weight
        rows = rows[paid[rows] < self._now]
        weight.index_add_(0, rows, self.owed(weight, rows, paid[rows]), alpha=-1)
        paid[rows] = self._now

    def owed(self, weight: Tensor, rows: Tensor, since: Tensor) -> Tensor:
        """The noise that rows (m,) owe for the steps after `since` (m,): (m,d), in their units."""
        squares = self._squares[: self._now + 1].to(rows.device)
        spread = (squares[-1] - squares[since.long()]).sqrt_()
        scale = self.noise_multiplier * self.max_grad_norm / self.expected_batch
        noise = self._randn((len(rows), weight.shape[1]), weight)
        return noise.mul_((spread * scale).to(weight.dtype)[:, None])

    def _randn(self, shape: Sequence[int], like: Tensor) -> Tensor:
        generator = self._generators.get(like.device)
        if generator is None:
            generator = self._generators[like.device] = torch.Generator(like.device)
            generator.seed()
        return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)

    def _before_read(self, table: nn.Module, args: tuple) -> None:
        assert isinstance(table, nn.Embedding)
        paid = self._paid(table) if self.owes else None
        if paid is not None and (paid[args[0].to(paid.device)] < self._now).any():
            raise UsageError(
                "a row is read whose noise is not paid: give step() the rows of the next batch, "
                "or call flush() before evaluating"
            )

    def _before_save(self, *_: Any) -> None:
        if self.owes:
            raise UsageError(
                "rows owe noise, and an unpaid row shows that nobody read it; call flush() before "
                "state_dict()"
            )

    def state_dict(self) -> dict[str, Any]:
        """As in torch, after a flush; rows owe nothing then, and nothing is kept for them.

        Raises:
            UsageError: rows owe noise.
        """
        self._before_save()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch; raises UsageError where rows owe noise that would be forgotten."""
        self._before_save()
        super().load_state_dict(state_dict)


class DenseDPSGD(LazyDPSGD):
    """The reference: noise on every row of every table in every step."""

    @torch.no_grad()
    def step(self, upcoming: Sequence[Tensor] | None = None) -> None:  # type: ignore[override]
        super().step(None)
        for table in self.tables:
            weight = table.weight
            rows = torch.arange(len(weight), device=weight.device)
            weight.sub_(self.owed(weight, rows, torch.zeros_like(rows)))
        self._now = 0


def _refuse(names: Iterable[str]) -> None:
    names = sorted(names)
    if names:
        raise UsageError(
            f"{', '.join(names)}: LazyDP is plain SGD, because the noise of several steps is one "
            "draw only where a step is linear in it; momentum, Adam and weight decay are not"
        )


def _check_table(table: nn.Module) -> None:
    plain = type(table) is nn.Embedding and table.sparse and table.weight.requires_grad
    if not plain or table.max_norm is not None or table.scale_grad_by_freq:
        raise UsageError(
            f"{table} is not a table for LazyDP: use a trainable nn.Embedding with sparse=True, "
            "without max_norm and scale_grad_by_freq"
        )
    if table.padding_idx is not None:
        raise UsageError(
            f"a table with padding_idx={table.padding_idx}: every row of DP-SGD gets noise; leave "
            "it out and mask the output at padded places instead"
        )


def _without(params: Iterable, left_out: set[int]) -> list[dict[str, Any]]:
    """Groups of what remains."""
    given = list(params)
    groups = given if given and isinstance(given[0], dict) else [{"params": given}]
    kept = [
        {**g, "params": [p for p in g["params"] if id(p) not in left_out and p.requires_grad]}
        for g in groups
    ]
    return [group for group in kept if group["params"]] or [{"params": []}]


class LookaheadLoader:
    """Poisson batches, each with the rows that the batch after it reads.

    `for batch, upcoming in loader: ... optimizer.step(upcoming)`; `upcoming` is None at the end.

    Args:
        fetch: indices (m,) int64 -> a batch; m may be 0.
        rows: a batch -> for each table the ids that it reads.
        examples: how many there are.
        sample_rate: probability with which each example enters a batch, independently.
        steps: number of batches.
        generator: of the sampling, for tests; by default seeded by the system, because a
            predictable choice protects nobody.
    """

    def __init__(
        self,
        fetch: Callable[[Tensor], Any],
        rows: Callable[[Any], Sequence[Tensor]],
        *,
        examples: int,
        sample_rate: float,
        steps: int,
        generator: torch.Generator | None = None,
    ):
        if not 0 < sample_rate <= 1:
            raise UsageError(f"sample_rate={sample_rate} is outside (0, 1]")
        self.fetch, self.rows, self.examples = fetch, rows, examples
        self.sample_rate, self.steps = sample_rate, steps
        self.generator = generator
        if generator is None:
            self.generator = torch.Generator()
            self.generator.seed()

    @property
    def expected_batch(self) -> float:
        return self.sample_rate * self.examples

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[Any, list[Tensor] | None]]:
        following = self.fetch(self._sample()) if self.steps else None
        for step in range(self.steps):
            batch, upcoming = following, None
            if step + 1 < self.steps:
                following = self.fetch(self._sample())
                upcoming = list(self.rows(following))
            yield batch, upcoming

    def _sample(self) -> Tensor:
        """Ascending indices: distances between chosen ones are geometric, so that the time is
        that of a batch and not of the whole data."""
        stay = math.log1p(-self.sample_rate) if self.sample_rate < 1 else -math.inf
        guess = int(self.expected_batch + 6 * math.sqrt(self.expected_batch)) + 16
        chosen, last = [], -1
        while last < self.examples:
            u = torch.rand(guess, generator=self.generator, dtype=torch.float64)
            gaps = (torch.log1p(-u) / stay).clamp_(max=self.examples).long() + 1
            chosen.append(last + gaps.cumsum(0))
            last = int(chosen[-1][-1])
        found = torch.cat(chosen)
        return found[found < self.examples]


def epsilon(noise_multiplier: float, sample_rate: float, steps: int, delta: float) -> float:
    """The privacy loss of `steps` steps on Poisson batches, by Opacus's RDP accountant.

    Raises:
        HoldfastError: Opacus is not installed.
    """
    try:
        from opacus.accountants import RDPAccountant
    except ImportError as error:
        raise HoldfastError(
            "the privacy accountant needs Opacus: pip install 'holdfast[privacy]'"
        ) from error
    accountant = RDPAccountant()
    accountant.history = [(noise_multiplier, sample_rate, steps)]
    return float(accountant.get_epsilon(delta))
