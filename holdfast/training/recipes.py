"""The recipe table (160): what each way to save memory in training would hold, before any run.

Keeps    nothing itself; a row is one recipe, its bytes by category at the instant of its peak.
Form     integer bytes by category, as `fit` predicts them; seconds and FLOPs of one step.
Bytes    traced, not estimated: the planner's own composition, with all blocks alike.
Source   A Survey on Memory-Efficient Large-Scale Model Training in AI for Science, 2025; its
         example, AlphaFold 2, is `models/evoformer.py`.
Departs  the survey counts 16 bytes per parameter for mixed precision (bf16 weight and gradient,
         fp32 master and two fp32 moments). No optimizer here keeps an fp32 master beside bf16
         parameters, so there is no such row: the bf16 row is bf16 throughout, as it runs.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

from torch import nn

from holdfast.budget import PLACES, Budget
from holdfast.errors import DoesNotFit, UsageError
from holdfast.plan.blocks import find_stacks
from holdfast.plan.fit import to_plan
from holdfast.plan.fitter import UNBOUNDED, Candidate, Fitter
from holdfast.plan.method import EXACT, Method, Quality
from holdfast.plan.models import ModelSource
from holdfast.plan.plan import Applied, Plan
from holdfast.plan.registry import method, of_slot
from holdfast.plan.search import Solution
from holdfast.plan.skeletons import BF16, Globals, Request, Skeleton, combined
from holdfast.training.chunked import group_, why_not_segments
from holdfast.training.loss import can_chunk
from holdfast.training.models.evoformer import TriangleAttention, chunk_
from holdfast.units import format_bytes

PLAIN = "plain fp32 AdamW"
# Rows of triangle attention whose logits exist at once.
ROWS = 16


@dataclass(frozen=True)
class Recipe:
    """Plain training with something changed; `change` alters the model itself, in place.

    `why_not` is one line where the recipe does not apply to the model.
    """

    label: str
    dtype: str = "float32"
    optimizer: str = "adamw"
    weights: str | None = None
    adapter: str | None = None
    saved: tuple[str, ...] = ()
    in_backward: bool = False
    chunk_loss: bool = False
    micro: int | None = None
    option: str = "keep"
    change: Callable[[nn.Module], Any] | None = None
    why_not: str | None = None

    @property
    def quality(self) -> Quality:
        """Of all methods together; bf16 counts where what trains is stored in it."""
        parts = [BF16] if self.dtype == "bfloat16" else [EXACT]
        for slot, keys in (
            ("optimizer", [self.optimizer]),
            ("weights", [self.weights]),
            ("adapter", [self.adapter]),
            ("saved", self.saved),
        ):
            found = [method(key, slot) for key in keys if key is not None]
            parts += [m.quality(**m.defaults()) for m in found]
        return combined(parts)

    def skeleton(self, batch: int) -> Skeleton:
        common = Globals(self.dtype, self.weights, self.adapter, self.saved, self.micro or batch)
        return Skeleton(common, self.optimizer, self.in_backward, self.quality)


@dataclass(frozen=True, eq=False)
class _Changed(ModelSource):
    """A source whose models are altered as soon as they are built."""

    change: Callable[[nn.Module], Any] = field(default=lambda model: None, repr=False)

    def build(self, device="meta", dtype=None, attention=None) -> nn.Module:
        model = super().build(device, dtype, attention)
        self.change(model)
        return model


class _RecipeFitter(Fitter):
    """The planner, for a model that may be altered, with the loss chunked only where asked."""

    def __init__(self, request: Request, recipe: Recipe, updates: dict):
        # What an optimizer costs depends on shapes alone, so that all recipes share it.
        super().__init__(request, _updates=updates)
        self._chunks = recipe.chunk_loss
        if recipe.change is not None:
            same = {f.name: getattr(self.source, f.name) for f in fields(self.source)}
            self.source = _Changed(**same, change=recipe.change)

    def chunk(self) -> int:
        return super().chunk() if self._chunks else 0


@dataclass(frozen=True)
class Row:
    """A recipe with what is predicted for it."""

    recipe: Recipe
    fitter: Fitter
    candidate: Candidate

    @cached_property
    def cells(self) -> dict[str, int]:
        """Device bytes by category at the peak; they sum to `peak`."""
        return self.candidate.ledger.at_peak("device")

    @property
    def peak(self) -> int:
        return self.candidate.peak

    @property
    def needs(self) -> Budget:
        """The smallest budget for this recipe."""
        ledger = self.candidate.ledger
        return Budget(self.peak + self.fitter.reserve, ledger.peak("host"), ledger.peak("disk"))

    @property
    def seconds(self) -> float:
        return self.candidate.seconds

    @cached_property
    def flops(self) -> int:
        """Of one optimizer step's forward and backward passes, recomputation included."""
        composer, choice = self.candidate.composer, self.candidate.solution.choice
        family = composer.family
        once = sum(
            family.options[composer.option_of(real, choice)].segments[traced].flops
            for traced, real in family.layout
        )
        return once * composer.life.accumulation

    def fits(self, budget: Budget) -> bool:
        needs = self.needs
        return all(getattr(needs, place) <= getattr(budget, place) for place in PLACES)

    @property
    def plan(self) -> Plan:
        """The plan of this row, with the budget that it needs.

        A recipe that changes the model itself is not in the plan's file: apply the row.
        """
        plan = to_plan(self.fitter, self.candidate)
        needs = self.needs
        # A place that a plan names needs a budget, even where nothing comes to lie there.
        places = {p: max(getattr(needs, p), 1) for p in PLACES if self._names(p)}
        return Plan(plan.spec.model_copy(update={"budget": places}))

    def _names(self, place: str) -> bool:
        return bool(getattr(self.needs, place)) or self.recipe.option == place

    def apply(self, model: nn.Module) -> Applied:
        """Make `model` and a new optimizer follow the recipe, in place."""
        if self.recipe.change is not None:
            self.recipe.change(model)
        return self.plan.apply(model)


@dataclass(frozen=True)
class Table:
    """Rows, those that fit first and then by seconds; and which recipes were left out, and why."""

    request: Request
    rows: list[Row]
    left_out: dict[str, str]

    @property
    def plain(self) -> Row:
        return self[PLAIN]

    def __getitem__(self, label: str) -> Row:
        return next(row for row in self.rows if row.recipe.label == label)

    @property
    def smallest(self) -> Row:
        return min(self.rows, key=lambda row: row.needs.device)

    @property
    def fits(self) -> bool:
        return any(row.fits(self.request.budget) for row in self.rows)

    def does_not_fit(self) -> DoesNotFit:
        """The error for a budget that no row fits, with the smallest one that some row does."""
        row, budget = self.smallest, self.request.budget
        needs = row.needs
        caps = [f"{p}={getattr(needs, p)}" for p in ("host", "disk") if getattr(needs, p)]
        option = ",".join([f"device={needs.device}", *caps]) if caps else str(needs.device)
        category = max(row.cells, key=lambda c: row.cells[c])
        error = DoesNotFit(
            f"no recipe fits {budget}; the smallest, {row.recipe.label}, needs "
            f"{format_bytes(needs.device)} on device: {category} are most of it.\n"
            f"Smallest budget for a single recipe: --budget {option}\n"
            "Recipes combine: `holdfast fit` searches plans that may be smaller still."
        )
        error.details = self.document()
        return error

    def document(self) -> dict[str, Any]:
        """What `holdfast plan train --json` prints."""
        budget, fitter = self.request.budget, self.plain.fitter
        return {
            "model": fitter.source.name,
            "fits": self.fits,
            "budget": {"device": budget.device, "host": budget.host, "disk": budget.disk},
            "hardware": fitter.hardware.name,
            "reserve_bytes": fitter.reserve,
            "smallest_budget": self.smallest.needs.device,
            "rows": [self._entry(row) for row in self.rows],
            "left_out": [{"recipe": k, "reason": v} for k, v in self.left_out.items()],
        }

    def _entry(self, row: Row) -> dict[str, Any]:
        quality = row.recipe.quality
        return {
            "recipe": row.recipe.label,
            "fits": row.fits(self.request.budget),
            "trains": "adapter" if row.recipe.adapter else "all",
            "predicted": {
                "peak_bytes": row.peak,
                "by_category": row.cells,
                "host_bytes": row.needs.host,
                "disk_bytes": row.needs.disk,
            },
            "step_seconds": row.seconds,
            "flops": row.flops,
            "flops_ratio": row.flops / self.plain.flops,
            "quality": {
                "kind": quality.kind,
                "estimate": quality.estimate,
                "source": quality.source,
            },
        }


def recipes(model: nn.Module, batch: int, *, on_gpu: bool) -> list[Recipe]:
    """Every recipe, also those that do not apply to `model`; the first is plain training."""
    elsewhere = "host" if on_gpu else "disk"
    no_blocks = None if find_stacks(model) else "it has no list of repeated blocks"
    no_chunks = can_chunk(model)
    triangles = any(isinstance(m, TriangleAttention) for m in model.modules())
    together = "gradients in backward + recompute" + ("" if no_chunks else " + chunked loss")
    rows = [
        Recipe(PLAIN),
        Recipe("bf16 parameters", dtype="bfloat16"),
        Recipe("recompute each block", option="recompute", why_not=no_blocks),
        Recipe(
            "recompute sqrt(L) segments",
            option="recompute",
            change=group_,
            why_not=_why_not_root(model),
        ),
        Recipe(f"saved tensors on {elsewhere}", option=elsewhere, why_not=no_blocks),
        Recipe("gradients in backward", in_backward=True),
        Recipe("chunked loss", chunk_loss=True, why_not=no_chunks),
        Recipe(
            together,
            in_backward=True,
            option="recompute",
            chunk_loss=no_chunks is None,
            why_not=no_blocks,
        ),
        Recipe(
            f"triangle attention by {ROWS} rows",
            change=_chunk_triangles,
            why_not=None if triangles else "it has no triangle attention",
        ),
        Recipe(
            "micro-batches of 1",
            micro=1,
            why_not=None if batch > 1 else "the batch is one sequence",
        ),
    ]
    for found in of_slot("optimizer"):
        if found.key != "adamw" and not found.requires:
            rows.append(Recipe(found.key, optimizer=found.key, why_not=_applies(found, model)))
    optimizers = [m.key for m in of_slot("optimizer")]
    for found in of_slot("saved"):
        own = next((key for key in found.requires if key in optimizers), "adamw")
        reason = _applies(found, model)
        rows.append(Recipe(found.key, optimizer=own, saved=(found.key,), why_not=reason))
    for found in of_slot("adapter"):
        rows.append(Recipe(found.key, adapter=found.key, why_not=_applies(found, model)))
    for found in of_slot("weights"):
        for adapter in found.requires:
            label = f"{adapter} on {found.key}"
            reason = _applies(method(adapter, "adapter"), model) or _applies(found, model)
            rows.append(Recipe(label, weights=found.key, adapter=adapter, why_not=reason))
    return rows


def _chunk_triangles(model: nn.Module) -> None:
    chunk_(model, ROWS)


def _applies(found: Method, model: nn.Module) -> str | None:
    return found.applies(model, **found.defaults())


def _why_not_root(model: nn.Module) -> str | None:
    reason = why_not_segments(model)
    if reason is None:
        shallow = min(len(model.get_submodule(path)) for path in find_stacks(model))
        if shallow < 4:
            return f"{shallow} blocks make no segments between one block and all"
    return reason


class Predictor:
    """Predicts single recipes for one request and keeps the traces that they share.

    The request says model, batch, sequence, budget, hardware and reserve; a recipe brings its own
    dtype and methods, so that `tune`, `allow`, `optimizer` and the like are not asked.
    """

    def __init__(self, request: Request):
        self.request = request
        self._fitters: dict[tuple, Fitter] = {}
        self._updates: dict = {}

    def fitter(self, recipe: Recipe) -> Fitter:
        moves = recipe.option in PLACES
        key = (recipe.chunk_loss, recipe.change, moves)
        if key not in self._fitters:
            # A row says how many bytes it would need elsewhere, whatever the budget has there.
            budget = Budget(UNBOUNDED, UNBOUNDED, UNBOUNDED) if moves else Budget(UNBOUNDED)
            roomy = replace(self.request, budget=budget)
            self._fitters[key] = _RecipeFitter(roomy, recipe, self._updates)
        return self._fitters[key]

    def recipes(self) -> list[Recipe]:
        plain = self.fitter(Recipe(PLAIN))
        on_gpu = plain.hardware.device.kind == "cuda"
        return recipes(plain.skeleton_model, self.request.batch, on_gpu=on_gpu)

    def row(self, recipe: Recipe) -> Row:
        """Raises UsageError where the model cannot run under the recipe."""
        if recipe.why_not is not None:
            raise UsageError(f"{recipe.label} does not apply: {recipe.why_not}")
        fitter = self.fitter(recipe)
        skeleton = recipe.skeleton(self.request.batch)
        composer, problem = fitter.problem(skeleton)
        choice = composer.uniform(recipe.option)
        solution = Solution(choice, composer.seconds(choice), True)
        return Row(recipe, fitter, Candidate(skeleton, composer, problem, solution))


def table(request: Request) -> Table:
    """Predict every recipe that applies to the request's model, whether it fits or not.

    Raises:
        UsageError: malformed input.
    """
    predictor = Predictor(request)
    rows: list[Row] = []
    left_out: dict[str, str] = {}
    for recipe in predictor.recipes():
        if recipe.why_not is not None:
            left_out[recipe.label] = recipe.why_not
            continue
        try:
            rows.append(predictor.row(recipe))
        except UsageError as error:
            # Some reasons only show when the model runs: blocks that cannot be chained, say.
            if recipe.label == PLAIN:
                raise
            left_out[recipe.label] = str(error)
    rows.sort(key=lambda row: (not row.fits(request.budget), row.seconds))
    return Table(request, rows, left_out)
