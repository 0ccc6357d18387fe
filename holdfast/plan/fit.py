"""`fit`: the best plan for a model and a budget, found before anything is allocated.

What the search finds becomes a plan, a front of alternatives, or, where nothing fits, the smallest
budget that would and the cheapest changes of the request.
"""

from dataclasses import dataclass, replace
from typing import Any

from holdfast.budget import PLACES, Budget
from holdfast.errors import DoesNotFit
from holdfast.plan.file import PlanFile, Training
from holdfast.plan.fitter import Candidate, Fitter
from holdfast.plan.models import ModelSource
from holdfast.plan.plan import Plan
from holdfast.plan.search import Solution
from holdfast.plan.skeletons import QUALITIES, Request
from holdfast.units import format_bytes


def to_plan(fitter: Fitter, candidate: Candidate, training: Training | None = None) -> Plan:
    """The plan file of a candidate, with what is predicted for it."""
    request, ledger = fitter.request, candidate.ledger
    training = training or Training(clip=request.clip)
    spec = PlanFile(
        model=_model_name(request.model, fitter.source),
        task=request.task,  # type: ignore[arg-type]
        batch=request.batch,
        micro_batch=candidate.skeleton.globals.micro,
        sequence=request.sequence,
        budget={p: n for p in PLACES if (n := getattr(request.budget, p))},  # type: ignore[misc]
        methods=fitter.methods_of(candidate.skeleton, candidate.options()),
        training=training,
        hardware=request.hardware or fitter.hardware.name,
        predicted={
            "peak_bytes": ledger.peak("device"),
            "step_seconds": candidate.seconds,
            "quality": candidate.skeleton.quality.kind,
            "ledger": ledger.to_json(),
        },
    )
    return Plan(spec)


def _model_name(model: Any, source: ModelSource) -> str:
    return model if isinstance(model, str) else source.name


def describe(fitter: Fitter, candidate: Candidate) -> dict[str, Any]:
    """A candidate as a row of the Pareto front or a JSON document."""
    ledger = candidate.ledger
    spec = fitter.methods_of(candidate.skeleton, candidate.options())
    return {
        "label": candidate.skeleton.label(),
        "quality": candidate.skeleton.quality.kind,
        "peak_bytes": ledger.peak("device"),
        "host_bytes": ledger.peak("host"),
        "disk_bytes": ledger.peak("disk"),
        "step_seconds": candidate.seconds,
        "micro_batch": candidate.skeleton.globals.micro,
        "methods": spec.model_dump(mode="json"),
    }


def pareto(fitter: Fitter, best: Candidate, points: int = 6) -> list[Candidate]:
    """Plans of the best plan's quality that no other beats in both bytes and time.

    Budgets between the smallest that fits and the best plan's, from the traces already made.
    """
    skeletons = {s for s, _ in fitter._problems}
    found: list[Candidate] = [best]
    lows = []
    for skeleton in skeletons:
        if skeleton.quality.rank > best.skeleton.quality.rank:
            continue
        composer, problem = fitter.problem(skeleton)
        solution = problem.smallest(fitter.request.budget)
        lows.append(Candidate(skeleton, composer, problem, solution))
    found += lows
    low = min(c.peak for c in lows)
    for point in range(1, points):
        cap = low + (best.peak - low) * point // points
        budget = replace(fitter.request.budget, device=cap)
        for candidate in sorted(lows, key=lambda c: c.seconds)[:3]:
            if candidate.peak <= cap:
                faster = candidate.problem.fastest(budget)
                if faster is not None:
                    found.append(replace(candidate, solution=faster))
    front: list[Candidate] = []
    for candidate in sorted(found, key=lambda c: (c.peak, c.seconds)):
        if not front or candidate.seconds < front[-1].seconds:
            front.append(candidate)
    return front


@dataclass(frozen=True)
class Relaxation:
    """A change of the request under which a plan exists: options of the command line."""

    changes: dict[str, Any]
    peak_bytes: int
    step_seconds: float

    def options(self) -> str:
        return " ".join(f"--{name} {_shown(value)}" for name, value in self.changes.items())


def _shown(value: Any) -> str:
    if isinstance(value, Budget):
        caps = [f"{p}={_size(n)}" for p in PLACES if (n := getattr(value, p))]
        return _size(value.device) if len(caps) == 1 else ",".join(caps)
    return str(value)


def _size(nbytes: int) -> str:
    """Rounded up by at most 0.1 %, so that what is printed fits and is still the smallest."""
    unit, name = (2**20, "MiB") if nbytes >= 2**30 else (2**10, "KiB")
    return f"{-(-nbytes // unit)}{name}"


def relaxations(fitter: Fitter, count: int = 3) -> list[Relaxation]:
    """The cheapest changes that make a plan fit: each was searched and fits.

    In order of what they cost: nothing but space elsewhere, another split of the batch, other
    methods, shorter sequences, fewer sequences; then pairs with a larger budget.
    """
    request, budget = fitter.request, fitter.request.budget
    found: list[Relaxation] = []

    def offer(**changes: Any) -> bool:
        if len(found) >= count:
            return True
        other = fitter.relaxed(**changes)
        best = other.search(other.request.budget)
        if best is None:
            return False
        found.append(Relaxation(changes, best.peak, best.seconds))
        return True

    on_gpu = fitter.hardware.device.kind == "cuda"
    elsewhere = "host" if on_gpu else "disk"
    if not getattr(budget, elsewhere):
        room = fitter.hardware.host.memory if on_gpu else 4 * budget.device
        offer(budget=replace(budget, **{elsewhere: room}))
    if request.tuning == "full" and request.task == "finetune":
        offer(tune="any")
    if request.dtype == "float32":
        offer(dtype="auto")
    for worse in QUALITIES[QUALITIES.index(request.allow) + 1 :]:
        if offer(allow=worse):
            break
    shorter = [n for n in (request.sequence // 2, request.sequence // 4) if n >= 16]
    for sequence in shorter:
        if offer(sequence=sequence):
            break
    if request.batch > 1:
        offer(batch=1)
    pairs: list[dict[str, Any]] = [{"sequence": n} for n in shorter]
    if request.allow != "lossy":
        pairs = [{"allow": "lossy"}, *pairs, *({"allow": "lossy"} | p for p in pairs)]
    if request.batch > 1:
        pairs.append({"batch": 1})
    for changes in pairs:
        if len(found) >= count:
            break
        other = fitter.relaxed(**changes)
        smallest = other.smallest()
        needed = smallest_budget(other, smallest)
        if needed < fitter.request.budget.device:
            continue  # offered above, without a larger budget
        larger = {**changes, "budget": replace(budget, device=needed)}
        found.append(Relaxation(larger, smallest.peak, smallest.seconds))
    return found


def smallest_budget(fitter: Fitter, smallest: Candidate) -> int:
    return smallest.peak + fitter.reserve


def does_not_fit(fitter: Fitter) -> DoesNotFit:
    """The error for a budget under which nothing fits; carries a JSON document in `details`."""
    smallest = fitter.smallest()
    ledger = smallest.ledger
    phase = ledger.peak_phase("device")
    cells = ledger.at_peak("device")
    category = max(cells, key=lambda c: cells[c])
    needed = smallest_budget(fitter, smallest)
    changes = relaxations(fitter)
    budget = replace(fitter.request.budget, device=needed)
    lines = [
        f"plan needs {format_bytes(needed)} on device, budget is "
        f"{format_bytes(fitter.request.budget.device)}: {category} in {phase} are the peak.",
        f"Smallest budget that fits: --budget {_shown(budget)}",
    ]
    if changes:
        lines.append("Cheapest ways to fit:")
        lines += [
            f"  {c.options()}   (peak {format_bytes(c.peak_bytes)}, {c.step_seconds:.3g} s/step)"
            for c in changes
        ]
    error = DoesNotFit("\n".join(lines))
    error.details = {
        "fits": False,
        "plan": None,
        "predicted": {
            "peak_bytes": smallest.peak,
            "by_category": cells,
            "by_phase": ledger.phase_peaks("device"),
        },
        "smallest_budget": needed,
        "binding": {"category": category, "phase": phase},
        "relaxations": [
            {
                "options": c.options(),
                "peak_bytes": c.peak_bytes,
                "step_seconds": c.step_seconds,
            }
            for c in changes
        ],
        "alternatives": [],
        "step_seconds": None,
    }
    return error


def fit(model: Any, budget: "str | int | Budget", training: Training | None = None, **options):
    """The best plan for `model` within `budget`.

    Args:
        model: a built-in name, config.json, directory, cached hub id, `module:function`, config
            or module.
        budget: for example "24GiB" or "device=24GiB,host=64GiB".
        options: the other fields of `Request`, for example task="pretrain", sequence=4096.

    Raises:
        DoesNotFit: nothing fits; the message names the smallest budget and relaxations.
        UsageError: malformed input.
    """
    fitter = Fitter(Request(model, Budget.parse(budget), **options))
    best = fitter.search(fitter.request.budget)
    if best is None:
        raise does_not_fit(fitter)
    plan = to_plan(fitter, best, training)
    plan.alternatives = [describe(fitter, c) for c in pareto(fitter, best)]
    cells = best.ledger.at_peak("device")
    plan.binding = {
        "category": max(cells, key=lambda c: cells[c]),
        "phase": best.ledger.peak_phase("device"),
    }
    return plan


def without_each(fitter: Fitter, best: Candidate) -> list[tuple[str, Candidate]]:
    """The plan with one choice taken back at a time: (choice, what the plan would be)."""
    found = []
    skeleton = best.skeleton
    blocks = set(best.solution.choice.values()) - {"keep"}
    for option in sorted(blocks):
        kept = {b: "keep" if o == option else o for b, o in best.solution.choice.items()}
        solution = Solution(kept, best.problem.seconds(kept), True)
        found.append((f"{option} of blocks", replace(best, solution=solution)))
    variants = []
    if skeleton.in_backward:
        variants.append(("gradients in backward", replace(skeleton, in_backward=False)))
    if skeleton.optimizer != "adamw":
        variants.append((skeleton.optimizer, replace(skeleton, optimizer="adamw")))
    for key in skeleton.globals.saved:
        fewer = tuple(k for k in skeleton.globals.saved if k != key)
        variants.append((key, replace(skeleton, globals=replace(skeleton.globals, saved=fewer))))
    for label, other in variants:
        composer, problem = fitter.problem(other)
        found.append((label, replace(best, skeleton=other, composer=composer, problem=problem)))
    return found
