"""How a plan is shown: tables for people, one document for programs."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from holdfast.ledger import CATEGORIES
from holdfast.plan import fit
from holdfast.plan.fitter import Candidate, Fitter
from holdfast.plan.plan import Plan
from holdfast.plan.records import Record, records
from holdfast.units import format_bytes


def document(fitter: Fitter, best: Candidate, plan: Plan, front: list[Candidate]) -> dict[str, Any]:
    """What `fit --json` prints for a plan that fits."""
    ledger = best.ledger
    cells = ledger.at_peak("device")
    return {
        "fits": True,
        "plan": plan.spec.model_dump(mode="json"),
        "predicted": {
            "peak_bytes": ledger.peak("device"),
            "by_category": cells,
            "by_phase": ledger.phase_peaks("device"),
            "host_bytes": ledger.peak("host"),
            "disk_bytes": ledger.peak("disk"),
        },
        "records": {c: r._asdict() for c, r in records(plan.spec.methods).items()},
        "step_seconds": best.seconds,
        "quality": best.skeleton.quality.kind,
        "hardware": fitter.hardware.name,
        "reserve_bytes": fitter.reserve,
        "alternatives": [fit.describe(fitter, c) for c in front],
        "binding": {
            "category": max(cells, key=lambda c: cells[c]),
            "phase": ledger.peak_phase("device"),
        },
        "relaxations": [],
        "left_out": _left_out(fitter),
    }


def show(
    fitter: Fitter,
    best: Candidate,
    plan: Plan,
    front: list[Candidate],
    out: Path,
    *,
    explain: bool,
) -> None:
    """Print the plan, its bytes, and the front of alternatives."""
    console = Console()
    spec, budget = plan.spec, fitter.request.budget
    console.print(
        f"[bold]{fitter.source.name}[/bold] fits {budget}: "
        f"peak {format_bytes(best.peak)} in {best.ledger.peak_phase('device')}, "
        f"{best.seconds:.3g} s per step on {fitter.hardware.name} (predicted)"
    )
    for what, reason in _left_out(fitter).items():
        console.print(f"left out, cannot be traced: {what}: {reason}")
    if fitter.reserve:
        console.print(f"{format_bytes(fitter.reserve)} are kept free for what is no tensor")
    methods = Table("what", "how", title="Plan", show_header=False)
    methods.add_row("parameters", " + ".join(_named(spec)))
    methods.add_row("optimizer", next(iter(spec.methods.optimizer)))
    methods.add_row(
        "gradients",
        "consumed in backward" if spec.methods.gradients == "backward" else "kept until the step",
    )
    for path, runs in spec.methods.blocks.items():
        methods.add_row(path, runs)
    if spec.accumulation > 1:
        methods.add_row("accumulation", f"{spec.accumulation} x {spec.micro_batch} sequences")
    methods.add_row("loss", _loss(spec.methods.loss_chunk))
    methods.add_row("quality", best.skeleton.quality.kind)
    console.print(methods)
    if explain:
        console.print(_records_table(plan))
    console.print(_bytes_table(plan))
    table = Table("plan", "peak", "s / step", "quality", title="Pareto front: bytes against time")
    for candidate in front:
        chosen = candidate is best
        blocks = "; ".join(candidate.options().values())
        table.add_row(
            ("* " if chosen else "  ") + candidate.skeleton.label() + f" | {blocks}",
            format_bytes(candidate.peak),
            f"{candidate.seconds:.3g}",
            candidate.skeleton.quality.kind,
        )
    console.print(table)
    if explain:
        _explain(console, fitter, best)
    console.print(f"wrote {out}; run it with: holdfast train {out} --data PATH")


def _left_out(fitter: Fitter) -> dict[str, str]:
    return {common.label(): reason for common, reason in fitter.left_out.items()}


def _named(spec) -> list[str]:
    parts = [spec.methods.dtype]
    for choice in (spec.methods.weights, spec.methods.adapter, *spec.methods.saved):
        if choice:
            parts.append(next(iter(choice)))
    return parts


def _loss(chunk: int) -> str:
    return f"in chunks of {chunk} tokens" if chunk else "the model's own"


def _records_table(plan: Plan) -> Table:
    table = Table("what", *Record._fields, title="What is kept, in what form, where, how long")
    for category, record in records(plan.spec.methods).items():
        table.add_row(category, *record)
    return table


def _bytes_table(plan: Plan) -> Table:
    ledger = plan.predicted
    phases = ledger.phases()
    table = Table("category", *phases, title="Predicted device bytes at each phase's peak")
    columns = {p: ledger.column("device", p) for p in phases}
    for category in CATEGORIES:
        if any(columns[p][category] for p in phases):
            table.add_row(category, *(format_bytes(columns[p][category]) for p in phases))
    table.add_row("total", *(format_bytes(sum(columns[p].values())) for p in phases), style="bold")
    return table


def _explain(console: Console, fitter: Fitter, best: Candidate) -> None:
    cells = best.ledger.at_peak("device")
    category = max(cells, key=lambda c: cells[c])
    phase = best.ledger.peak_phase("device")
    console.print(
        f"What binds: {category} in {phase}, {format_bytes(cells[category])} of "
        f"{format_bytes(best.peak)}"
    )
    table = Table("method", "saves", "costs", title="What each choice saves and costs")
    for label, other in fit.without_each(fitter, best):
        table.add_row(
            label,
            format_bytes(other.peak - best.peak),
            f"{best.seconds - other.seconds:+.3g} s per step",
        )
    console.print(table)


def show_devices(document: dict[str, Any], label: str, out: Path) -> None:
    """Print a plan for several devices: every rank's bytes, and what else was tried."""
    console = Console()
    console.print(
        f"fits: {label}; {document['step_seconds']:.3g} s per step on {document['hardware']} "
        "(predicted)"
    )
    table = Table("rank", "device peak", "host", "most of it", title="Predicted bytes of each rank")
    for rank in document["predicted"]["ranks"]:
        cells = rank["by_category"]
        most = max(cells, key=lambda c: cells[c])
        table.add_row(
            str(rank["rank"]),
            format_bytes(rank["peak_bytes"]),
            format_bytes(rank["host_bytes"]),
            f"{most}, {format_bytes(cells[most])}",
        )
    console.print(table)
    tried = Table("way", "peak", "s / step", title="Tried, fastest first")
    for way in document["alternatives"]:
        peak = "not possible" if way["peak_bytes"] is None else format_bytes(way["peak_bytes"])
        tried.add_row(way["label"], peak, f"{way['step_seconds']:.3g}")
    console.print(tried)
    count = len(document["predicted"]["ranks"])
    console.print(
        f"plan in {out}; run it with: torchrun --nproc-per-node {count} -m holdfast train {out} "
        "--data DIR, or on this machine with --local"
    )
