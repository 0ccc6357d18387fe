"""How a run is shown: a progress bar on stderr, and predicted beside measured bytes."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from holdfast.ledger import CATEGORIES
from holdfast.plan.plan import Plan
from holdfast.units import format_bytes


@contextlib.contextmanager
def progress() -> Iterator[Callable[[dict[str, Any]], None]]:
    """A bar with loss, rate and time left; plain lines where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield _line
        return
    bar = Progress(
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}  {task.fields[seconds]:.2f} s/step"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    with bar:
        task = bar.add_task("training", total=None, loss=float("nan"), seconds=0.0)

        def advance(entry: dict[str, Any]) -> None:
            bar.update(
                task,
                total=entry["steps"],
                completed=entry["step"],
                loss=entry["loss"],
                seconds=entry["seconds"],
            )

        yield advance


def _line(entry: dict[str, Any]) -> None:
    step, steps = entry["step"], entry["steps"]
    if step == 1 or step == steps or step % max(1, steps // 10) == 0:
        print(
            f"step {step}/{steps}  loss {entry['loss']:.4f}  {entry['seconds']:.2f} s",
            file=sys.stderr,
        )


def report(result: dict[str, Any], plan: Plan, out: Path) -> None:
    """Predicted and measured bytes by category, loss and time."""
    console = Console()
    console.print(bytes_table(result))
    whole = result["measured"]["allocator_peak_bytes"]
    if whole is not None:
        console.print(f"allocator's peak over the whole run: {format_bytes(whole)}")
    console.print(
        f"budget {format_bytes(result['budget_bytes'])}: "
        + ("kept" if result["within_budget"] else "EXCEEDED")
    )
    losses = ", ".join(f"{name} {value:.4f}" for name, value in result["loss"].items())
    console.print(f"loss: {losses}; {result['steps']} steps, {result['seconds']:.1f} s; in {out}")


def bytes_table(result: dict[str, Any]) -> Table:
    predicted, measured = result["predicted"], result["measured"]
    table = Table(
        "category", "predicted", "measured", "difference", title="Device bytes at the peak"
    )
    for category in CATEGORIES:
        one = predicted["by_category"].get(category, 0)
        two = measured["by_category"].get(category, 0)
        if one or two:
            table.add_row(category, format_bytes(one), format_bytes(two), format_bytes(two - one))
    one, two = predicted["peak_bytes"], measured["peak_bytes"]
    table.add_row(
        "total", format_bytes(one), format_bytes(two), format_bytes(two - one), style="bold"
    )
    return table


def ranks(result: dict[str, Any], out: Path) -> None:
    """Predicted and measured bytes of every rank by category, loss and time."""
    console = Console()
    table = Table("rank", "category", "predicted", "measured", "difference", title="Device bytes")
    for rank in result["ranks"]:
        predicted, measured = rank["predicted"], rank["measured"]
        for category in CATEGORIES:
            one = predicted["by_category"].get(category, 0)
            two = measured["by_category"].get(category, 0)
            if one or two:
                cells = (format_bytes(one), format_bytes(two), format_bytes(two - one))
                table.add_row(str(rank["rank"]), category, *cells)
        one, two = predicted["peak_bytes"], measured["peak_bytes"]
        cells = (format_bytes(one), format_bytes(two), format_bytes(two - one))
        table.add_row(str(rank["rank"]), "total", *cells, style="bold", end_section=True)
    console.print(table)
    console.print(
        f"budget {format_bytes(result['budget_bytes'])} on each: "
        + ("kept" if result["within_budget"] else "EXCEEDED")
    )
    losses = ", ".join(f"{name} {value:.4f}" for name, value in result["loss"].items())
    console.print(f"loss: {losses}; {result['steps']} steps, {result['seconds']:.1f} s; in {out}")


def excess(result: dict[str, Any], plan: Plan) -> str:
    measured = result["measured"]
    whole = measured["allocator_peak_bytes"]
    worst = max(measured["peak_bytes"], whole or 0)
    return (
        f"the run held {format_bytes(worst)} on device, the plan's budget is "
        f"{format_bytes(plan.budget.device)}; plan again with a budget of at least {worst}"
    )


def run_starts(count: int) -> Callable[[str, int], None]:
    """Says on stderr which run of how many begins."""

    def starts(label: str, index: int) -> None:
        print(f"run {index + 1} of {count}: {label}", file=sys.stderr)

    return starts


def comparison(document: dict[str, Any], out: Path) -> None:
    """Bytes, loss and time of several runs, smallest first; * marks what no other run beats."""
    # A file has no width: nothing is to be cut there.
    console = Console(width=None if sys.stdout.isatty() else 140)
    table = Table(
        "", "run", "predicted", "Meter", "whole run", "peak RSS", "loss", "validation", "s / step",
        title="Peak bytes, loss and time of one job",
    )  # fmt: skip
    for row in document["rows"]:
        if "error" in row:
            table.add_row("!", row["label"], row["error"])
            continue
        held_out = row["validation_loss"]
        table.add_row(
            "*" if row["label"] in document["pareto"] else "",
            row["label"],
            format_bytes(row["predicted_bytes"]),
            format_bytes(row["meter_bytes"]) + ("" if row["within_budget"] else " EXCEEDED"),
            format_bytes(row["peak_bytes"]),
            format_bytes(row["rss_increase_bytes"]),
            f"{row['loss']:.4f}",
            "" if held_out is None else f"{held_out:.4f}",
            f"{row['seconds_per_step'] or 0:.3g}",
        )
    console.print(table)
    console.print(f"* no other run is as good in bytes, loss and time together; files in {out}")
