"""The search behind `fit`: skeletons of global choices, and an option for every block of each.

Order of preference: it fits; exact before bounded before lossy (and lossy only where allowed);
least predicted time; least bytes on the host. Global choices are a branch and bound over
skeletons, choices per block a mixed-integer program.
"""

import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from holdfast import attach
from holdfast.budget import Budget
from holdfast.errors import HoldfastError, UsageError
from holdfast.ledger import Ledger
from holdfast.places import DiskArena
from holdfast.plan import apply
from holdfast.plan.compose import Composer, Family, Life
from holdfast.plan.family import UpdateCosts, trace_family
from holdfast.plan.file import Choice, Methods, format_runs
from holdfast.plan.hardware import Hardware, default_hardware, load_hardware
from holdfast.plan.method import EXACT
from holdfast.plan.models import ModelSource, resolve
from holdfast.plan.models import loss_of as scalar_loss
from holdfast.plan.registry import methods
from holdfast.plan.search import Problem, Solution
from holdfast.plan.skeletons import QUALITIES, Globals, Request, Skeleton, generate
from holdfast.training.loss import can_chunk

UNBOUNDED = 2**62
# What torch's CPU allocator holds beside tensors: a generator's state for each recomputed block,
# and the scratch of its attention kernel.
RNG_STATE = 5056
ATTENTION_WORKSPACE = 2**16
# Logits of one chunk of the loss, in fp32.
CHUNK_BYTES = 64 * 2**20


@dataclass
class Candidate:
    """A skeleton with its blocks decided."""

    skeleton: Skeleton
    composer: Composer
    problem: Problem
    solution: Solution

    @cached_property
    def ledger(self) -> Ledger:
        return self.composer.ledger(self.solution.choice)

    @property
    def peak(self) -> int:
        return self.ledger.peak("device")

    @property
    def seconds(self) -> float:
        return self.composer.seconds(self.solution.choice)

    @property
    def order(self) -> tuple:
        """Smaller is better, among candidates that fit."""
        quality = self.skeleton.quality
        # Two sums of the same times differ by less than a nanosecond; the plainer plan comes first.
        seconds = round(self.seconds, 9)
        return (quality.rank, round(quality.estimate, 6), seconds, self.ledger.peak("host"))

    def options(self) -> dict[str, str]:
        by_stack: dict[str, list[str]] = {}
        for path, index in self.problem.blocks:
            by_stack.setdefault(path, []).append(self.solution.choice[path, index])
        return {path: format_runs(options) for path, options in by_stack.items()}


@dataclass
class Fitter:
    """Traces and searches for one request; traces are kept, so that other budgets are cheap."""

    request: Request
    source: ModelSource = field(init=False)
    hardware: Hardware = field(init=False)
    _families: dict[tuple, Family] = field(default_factory=dict)
    _problems: dict[tuple[Skeleton, int], tuple[Composer, Problem]] = field(default_factory=dict)
    _updates: dict[tuple[str, str], UpdateCosts] = field(default_factory=dict)
    left_out: dict[Globals, str] = field(default_factory=dict)

    def __post_init__(self):
        if (self.request.reserve or 0) < 0:
            raise UsageError(f"reserve {self.request.reserve} is negative; use 0 bytes or more")
        self.source = resolve(self.request.model)
        # Transformers builds such a model: a range of negative length is empty.
        depth = getattr(self.source.config, "num_hidden_layers", None)
        if isinstance(depth, int) and depth < 0:
            raise UsageError(
                f"num_hidden_layers {depth} of {self.source.name} is negative; use 1 or more"
            )
        named = self.request.hardware
        self.hardware = load_hardware(named) if named else default_hardware()
        limit = self.source.max_sequence
        if limit is not None and self.request.sequence > limit:
            raise UsageError(
                f"sequence {self.request.sequence} exceeds the {limit} positions of "
                f"{self.source.name}; use --sequence {limit} or less"
            )

    @property
    def reserve(self) -> int:
        if self.request.reserve is not None:
            return self.request.reserve
        if self.hardware.device.kind == "cuda":
            return 2**30
        depth = sum(len(stack) for _, stack in attach.blocks(self.skeleton_model))
        return ATTENTION_WORKSPACE + RNG_STATE * depth

    @cached_property
    def skeleton_model(self) -> nn.Module:
        return self.source.build("meta", torch.float32)

    @property
    def _stored_dtype(self) -> str:
        return str(getattr(self.source.config, "dtype", None) or "").removeprefix("torch.")

    def chunk(self) -> int:
        if can_chunk(self.skeleton_model) is not None:
            return 0
        head: Any = self.skeleton_model
        vocabulary = head.get_output_embeddings().weight.shape[0]
        return max(64, min(4096, CHUNK_BYTES // (4 * vocabulary) // 64 * 64))

    def _applies(self, key: str) -> bool:
        found = methods()[key]
        return found.applies(self.skeleton_model, **found.defaults()) is None

    def skeletons(self, allow: str | None = None) -> list[Skeleton]:
        """All global choices up to a quality, best quality first."""
        # What is named is wanted, whatever its quality.
        limit = QUALITIES.index("lossy" if self.request.methods else allow or self.request.allow)
        found = [s for s in self._skeletons if s.quality.rank <= limit]
        return sorted(found, key=lambda s: (s.quality.rank, round(s.quality.estimate, 6)))

    @cached_property
    def _skeletons(self) -> list[Skeleton]:
        return list(generate(self.request, self._stored_dtype, self._applies))

    def methods_of(self, skeleton: Skeleton, blocks: dict[str, str]) -> Methods:
        def entry(key: str | None) -> Choice | None:
            return None if key is None else {key: methods()[key].defaults()}

        common = skeleton.globals
        return Methods(
            dtype=common.dtype,  # type: ignore[arg-type]
            weights=entry(common.weights),
            adapter=entry(common.adapter),
            optimizer=entry(skeleton.optimizer) or {},
            gradients="backward" if skeleton.in_backward else "step",
            saved=[entry(key) or {} for key in common.saved],
            loss_chunk=self.chunk(),
            blocks=blocks,
        )

    def _block_options(self) -> list[str]:
        budget = self.request.budget
        on_gpu = self.hardware.device.kind == "cuda"
        # Without a GPU, host memory is the same memory.
        return (
            ["keep", "recompute"]
            + (["host"] if on_gpu and budget.host else [])
            + (["disk"] if budget.disk else [])
        )

    def family(self, common: Globals) -> Family:
        key = self._family_key(common)
        if key not in self._families:
            self._families[key] = self._trace(common, self.request.sequence)
        return self._families[key]

    def _family_key(self, common: Globals) -> tuple:
        return (common, self.request.sequence, tuple(self._block_options()))

    def relaxed(self, **changes: Any) -> "Fitter":
        """A fitter for a changed request that shares the model and the traces made so far."""
        other = copy.copy(self)
        other.request = replace(self.request, **changes)
        other._problems = {}
        other.__dict__.pop("_skeletons", None)
        return other

    def _trace(self, common: Globals, sequence: int) -> Family:
        dtype = getattr(torch, common.dtype)
        # The optimizer is not traced here, but a method may be refused without its own.
        needed = (key for saved in common.saved for key in methods()[saved].requires)
        own = [key for key in needed if methods()[key].slot == "optimizer"]
        planned = self.methods_of(Skeleton(common, (own or ["adamw"])[0], False, EXACT), {})
        moving = [o for o in self._block_options() if o in ("host", "disk")]

        def option(name: str):
            def apply_option(block: nn.Module):
                arena = DiskArena(UNBOUNDED) if name == "moved" else None
                apply.set_option(block, "disk" if arena is not None else name, arena)
                return arena

            return apply_option

        names = [o for o in self._block_options() if o not in moving]
        names += ["moved"] if moving else []
        family = trace_family(
            lambda: self.source.build("meta", dtype),
            lambda: self.source.example_inputs(common.micro, sequence, "cpu", dtype),
            lambda model: apply.prepare(model, planned),
            lambda model, batch: scalar_loss(model(**batch)),
            {name: option(name) for name in names},
            self.hardware.seconds,
        )
        if moving:
            # Bytes leave the device alike, whether they go to the host or to disk.
            trace, moved = family.options.pop("moved"), family.moved.pop("moved", {})
            alike = family.uniform.pop("moved")
            for place in moving:
                family.options[place], family.uniform[place] = trace, alike
                family.moved[place] = moved
                family.extra_seconds[place] = {
                    block: self._copy_seconds(trace, block, nbytes, place)
                    for block, nbytes in moved.items()
                }
        return family

    def _copy_seconds(self, trace, block: tuple[str, int], nbytes: int, place: str) -> float:
        """Time of moving a block's bytes away and back that computing does not hide."""
        path, k = block
        away = self.hardware.transfer_seconds(nbytes, "device", place)
        back = self.hardware.transfer_seconds(nbytes, place, "device")
        if self.hardware.device.kind != "cuda":
            return away + back
        forward, backward = (trace.segments[name, path, k].seconds for name in ("F", "B"))
        return max(0.0, away - forward) + max(0.0, back - backward)

    def traceable(self, skeleton: Skeleton) -> bool:
        """Whether the skeleton's step can be traced; why not is kept in `left_out`.

        Raises:
            HoldfastError: no skeleton is left.
        """
        common = skeleton.globals
        if common not in self.left_out:
            try:
                self.family(common)
                return True
            except UsageError:
                raise
            except Exception as error:  # whatever a model's own code may raise
                self.left_out[common] = f"{type(error).__name__}: {error}".splitlines()[0]
        if all(s.globals in self.left_out for s in self.skeletons()):
            raise HoldfastError(
                f"a step of {self.source.name} in {common.dtype} cannot be traced "
                f"({self.left_out[common]}); try --dtype bfloat16 with --allow lossy, or measure "
                "it with holdfast.meter.Meter"
            )
        return False

    def problem(self, skeleton: Skeleton) -> tuple[Composer, Problem]:
        key = (skeleton, self.request.sequence)
        if key not in self._problems:
            life = Life(skeleton.in_backward, self.request.batch // skeleton.globals.micro)
            family = self.family(skeleton.globals)
            composer = Composer(family, life, self._update(skeleton))
            options = self._block_options()
            if family.resting_bytes:
                options = [o for o in options if o not in ("host", "disk")]
            self._problems[key] = (composer, Problem(composer, options))
        return self._problems[key]

    def _update(self, skeleton: Skeleton) -> UpdateCosts:
        key = (skeleton.optimizer, skeleton.globals.dtype)
        if key not in self._updates:
            planned = self.methods_of(replace(skeleton, in_backward=False), {})

            def make(parameters):
                named = [(f"p{i}", p) for i, p in enumerate(parameters)]
                return apply.make_optimizer(named, planned, 1e-3, 0.0)

            self._updates[key] = UpdateCosts(make, self.hardware.seconds)
        return self._updates[key]

    @cached_property
    def _dense_elements(self) -> int:
        weights: dict[int, int] = {}
        for name in ("get_input_embeddings", "get_output_embeddings"):
            try:
                module = getattr(self.skeleton_model, name)()
            except (AttributeError, NotImplementedError):
                continue  # not every architecture has them
            if module is not None:
                weights |= {id(p): p.numel() for p in module.parameters()}
        return sum(weights.values())

    def least_bytes(self, skeleton: Skeleton) -> int:
        """A lower bound without a trace: full parameters in their dtype, and their states."""
        common = skeleton.globals
        size = getattr(torch, common.dtype).itemsize
        count = sum(p.numel() for p in self.skeleton_model.parameters())
        if common.adapter:
            # Integer weights keep the embeddings and the head dense.
            bits = {"int4": 4, "int8": 8}.get(common.weights or "", 8 * size)
            if ("parameters", "form") in methods()[common.adapter].writes:
                bits = 2
            dense = min(self._dense_elements, count)
            return dense * size + (count - dense) * bits // 8
        fewer = any(("gradients", "extent") in methods()[key].writes for key in common.saved)
        gradients = 0 if skeleton.in_backward or fewer else size * count
        state_bytes = methods()[skeleton.optimizer].state_bytes
        states = 0
        if state_bytes is not None:
            knobs = methods()[skeleton.optimizer].defaults()
            states = sum(
                state_bytes(tuple(p.shape), getattr(torch, common.dtype), **knobs)
                for p in self.skeleton_model.parameters()
            )
        return size * count + gradients + states

    def _least_seconds(self, skeleton: Skeleton) -> float:
        """A lower bound without a trace of its own: splitting a batch never saves time."""
        plain = replace(skeleton.globals, micro=self.request.batch)
        if self._family_key(plain) not in self._families:
            return 0.0
        composer, _ = self.problem(replace(skeleton, globals=plain))
        return Problem(composer, ["keep"]).least_seconds()

    def search(self, budget: Budget, allow: str | None = None) -> Candidate | None:
        """The best plan within `budget`, by the order of preference; None where nothing fits."""
        room = replace(budget, device=max(0, budget.device - self.reserve))
        best: Candidate | None = None
        for skeleton in self.skeletons(allow):
            quality = (skeleton.quality.rank, round(skeleton.quality.estimate, 6))
            if best is not None and quality > best.order[:2]:
                break
            if self.least_bytes(skeleton) > room.device:
                continue
            if best is not None and self._least_seconds(skeleton) >= best.seconds:
                continue
            if not self.traceable(skeleton):
                continue
            composer, problem = self.problem(skeleton)
            if best is not None and problem.least_seconds() >= best.seconds:
                continue
            solution = problem.fastest(room)
            if solution is None:
                continue
            candidate = Candidate(skeleton, composer, problem, solution)
            if best is None or candidate.order < best.order:
                best = candidate
        return best

    def smallest(self, allow: str | None = None) -> Candidate:
        """The plan with the fewest device bytes up to a quality."""
        budget = self.request.budget
        rough: list[Candidate] = []
        skeletons = self.skeletons(allow)
        narrow = {replace(s, quality=EXACT) for s in skeletons if s.globals.dtype == "bfloat16"}
        for skeleton in sorted(skeletons, key=self.least_bytes):
            half = replace(skeleton.globals, dtype="bfloat16")
            if skeleton.globals.dtype != "bfloat16" and (
                replace(skeleton, globals=half, quality=EXACT) in narrow
            ):
                continue  # the same plan in half the bytes is allowed
            low = min((c.peak for c in rough), default=UNBOUNDED)
            if self.least_bytes(skeleton) >= low:
                continue
            if not self.traceable(skeleton):
                continue
            composer, problem = self.problem(skeleton)
            solution = problem.smallest_uniform(budget)
            rough.append(Candidate(skeleton, composer, problem, solution))
        low = min((c.peak for c in rough), default=0)
        best: Candidate | None = None
        for candidate in sorted(rough, key=lambda c: c.peak):
            # Mixing options gains a little over the best uniform choice, never much.
            hopeless = candidate.problem.least_peak() >= low or candidate.peak > 1.05 * low
            if hopeless and best is not None:
                continue
            solution = candidate.problem.smallest(budget)
            candidate = replace(candidate, solution=solution)
            if best is None or candidate.peak < best.peak:
                best = candidate
        if best is None:
            raise UsageError(
                f"no method of tune={self.request.tuning} and allow={self.request.allow} applies "
                f"to {self.source.name}; try --tune any or --allow lossy"
            )
        return best
