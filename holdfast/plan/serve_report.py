"""What `holdfast fit --task serve` prints: the choice, its alternatives, and ways out."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.table import Table

from holdfast.errors import DoesNotFit
from holdfast.plan.serve import Choice, Server
from holdfast.plan.skeletons import QUALITIES
from holdfast.units import format_bytes


def document(server: Server, best: Choice | None, found: Sequence[Choice]) -> dict[str, Any]:
    """What `holdfast fit --task serve --json` prints."""
    asked = server.asked
    shown = best or server.smallest()
    return {
        "fits": best is not None,
        "task": "serve",
        "plan": None if best is None else best.row() | {"command": command(server, best)},
        "predicted": {
            "peak_bytes": shown.peak,
            "by_category": shown.ledger.at_peak("device"),
            "by_phase": shown.ledger.phase_peaks("device"),
        },
        "step_seconds": shown.step_seconds,
        "hardware": server.hardware.name,
        "alternatives": [choice.row() for choice in found if choice is not best],
        "binding": {"phase": shown.ledger.peak_phase("device")},
        "smallest_budget": shown.peak + server.reserve,
        "relaxations": [] if best is not None else relaxations(server),
        "asked": {"requests": asked.batch, "tokens_per_request": asked.sequence},
    }


def relaxations(server: Server) -> list[dict[str, Any]]:
    """Changes of the request, each of which fits; none where the weights alone do not."""
    asked, found = server.asked, []
    if asked.allow != "lossy":
        for allow in QUALITIES[QUALITIES.index(asked.allow) + 1 :]:
            names = ("full", "sinks_recent")
            other = Server(replace(asked, allow=allow, policies=names)).best()
            if other is not None:
                found.append({"options": f"--allow {allow}", **other.row()})
                break
    now = server.smallest()
    held = now.ledger.column("device", "decode")["cache"]
    free = server.room - now.peak + held
    for name in ("batch", "sequence"):
        # The cache is proportional to both; working memory shrinks a little with them, too.
        most = max(0, free) * getattr(asked, name) // held
        for value in range(most, max(0, most - 4), -1):
            changed = (
                replace(asked, batch=value) if name == "batch" else replace(asked, sequence=value)
            )
            smaller = Server(changed).smallest()
            if smaller.peak <= server.room:
                found.append({"options": f"--{name} {value}", **smaller.row()})
                break
    return found


def does_not_fit(server: Server) -> DoesNotFit:
    """The error with the smallest budget and what else would fit."""
    details = document(server, None, ())
    lines = [
        f"serving {server.asked.batch} requests of {server.asked.sequence} tokens needs "
        f"{format_bytes(details['smallest_budget'])} on device, budget is "
        f"{format_bytes(server.asked.budget.device)}: weights are "
        f"{format_bytes(sum(server.weights.values()))}.",
    ]
    if details["relaxations"]:
        lines.append("Cheapest ways to fit:")
        lines += [
            f"  {one['options']}   (peak {format_bytes(one['peak_bytes'])}, {one['policy']} "
            f"{one['form']})"
            for one in details["relaxations"]
        ]
    error = DoesNotFit("\n".join(lines))
    error.details = details
    return error


def command(server: Server, best: Choice) -> str:
    """The command that serves this choice."""
    total = best.request_bytes * server.asked.batch
    parts = [
        "holdfast serve", str(server.source.name), f"--context-budget {total}",
        f"--policy {best.policy}", f"--tokens-per-request {best.capacity}",
    ]  # fmt: skip
    if best.form != "dense":
        parts.append(f"--form {best.form}")
    return " ".join(parts)


def show(server: Server, best: Choice, found: Sequence[Choice]) -> None:
    """Print the choice, its bytes by phase, and the alternatives."""
    asked = server.asked
    # A file has no width: nothing is to be cut there.
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(
        f"{server.source.name}: {asked.batch} requests of {asked.sequence} tokens in "
        f"{format_bytes(asked.budget.device)} ({format_bytes(server.reserve)} kept free), "
        f"time for {server.hardware.name}"
    )
    table = Table("", "policy", "form", "quality", "kept", "each", "fit", "peak", "s/step")
    for choice in sorted(found, key=lambda c: (c is not best, QUALITIES.index(c.quality))):
        table.add_row(
            "*" if choice is best else "", choice.policy, choice.form, choice.quality,
            f"{choice.capacity:,}", format_bytes(choice.request_bytes), str(choice.requests),
            format_bytes(choice.peak), f"{choice.step_seconds:.3g}",
        )  # fmt: skip
    console.print(table)
    phases = best.ledger.phase_peaks("device")
    console.print(
        "kept: tokens of a request; fit: requests within the budget. * peaks at "
        + ", ".join(f"{format_bytes(phases[p])} in {p}" for p in ("load", "prefill", "decode"))
    )
    if best.quality == "lossy":
        console.print("What dropping costs on your text: holdfast cache compare")
    console.print(command(server, best), soft_wrap=True)
