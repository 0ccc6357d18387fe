"""`holdfast plan place`: offsets for buffers, or fast and slow memory for a program's tensors."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from holdfast import cli

if TYPE_CHECKING:
    from holdfast.plan.placement import Placement


def place(
    file: Annotated[
        Path, typer.Argument(help="CSV: buffers as MiniMalloc's, or a program's operands.")
    ],
    capacity: Annotated[str, typer.Option(help="Bytes of (fast) memory, for example 1MiB.")],
    method: Annotated[
        str, typer.Option(help="portfolio, exact, greedy or muzero; local for programs.")
    ] = "portfolio",
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Pack buffers into one arena, or choose which of a program's tensors are in fast memory when.

    A file with columns id,lower,upper,size holds buffers; the answer adds offset. One with columns
    instruction,compute,tensor,access,nbytes,alias holds a program.

    Example: holdfast plan place buffers.csv --capacity 1MiB
    """
    from holdfast.plan.placement_program import COLUMNS
    from holdfast.units import parse_bytes

    limit = parse_bytes(capacity)
    with cli.stdout_is_json(json):
        program = _header(file) == list(COLUMNS)
        show = _place_program if program else _pack_buffers
        document, lines = show(file, limit, method)
    if json:
        cli.print_json(document)
    else:
        print("\n".join(lines))


def _header(file: Path) -> list[str]:
    from holdfast.errors import UsageError

    try:
        with file.open() as lines:
            return [cell.strip() for cell in next(lines, "").split(",")]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} cannot be read ({error}); name a CSV file") from None


def _pack_buffers(file: Path, capacity: int, method: str) -> tuple[dict[str, Any], list[str]]:
    from holdfast.errors import DoesNotFit, unknown
    from holdfast.plan.pack import best_fit, format_csv, pack, read_csv

    if method not in ("portfolio", "exact", "greedy"):
        raise unknown("method for buffers", method, ("portfolio", "exact", "greedy"))
    buffers, _ = read_csv(file)
    found = best_fit(buffers) if method == "greedy" else pack(buffers, capacity)
    if found.height > capacity:
        error = DoesNotFit(
            f"best-fit needs {found.height} bytes, capacity is {capacity}; try --method exact"
        )
        error.details = {"height": found.height, "lower_bound": found.lower_bound}
        raise error
    document = {
        "kind": "packing",
        "capacity_bytes": capacity,
        "height_bytes": found.height,
        "lower_bound_bytes": found.lower_bound,
        "optimal": found.optimal,
        "offsets": found.offsets,
    }
    return document, [format_csv(buffers, found.offsets).rstrip()]


def _place_program(file: Path, capacity: int, method: str) -> tuple[dict[str, Any], list[str]]:
    from dataclasses import asdict

    from holdfast.plan.malloc_game import solve
    from holdfast.plan.placement import TwoLevel, validate
    from holdfast.plan.placement_exact import exact
    from holdfast.plan.placement_greedy import greedy
    from holdfast.plan.placement_program import Program
    from holdfast.units import format_bytes

    program, hardware = Program.from_file(file), TwoLevel(capacity)
    found = solve(program, hardware, method)  # type: ignore[arg-type]
    validate(found)
    rule = greedy(program, hardware)
    best = found if found.bound else exact(program, hardware, start=rule)
    optimal = found.total == best.bound
    residencies = [_shown(found, k) for k in range(len(found.residencies))]
    document = {
        "kind": "placement",
        "method": found.method,
        "hardware": asdict(hardware),
        "total_ns": found.total,
        "slow_ns": found.slowest,
        "greedy_ns": rule.total,
        "exact_ns": best.total,
        "bound_ns": best.bound,
        "optimal": optimal,
        "height_bytes": found.height,
        "residencies": residencies,
    }
    proof = "optimal, proven" if optimal else f"{found.total / best.bound - 1:.2%} above the bound"
    if optimal and method == "portfolio":
        proof += "; learning skipped"
    lines = [
        f"{found.method}: {found.total} ns ({proof})",
        f"exact {best.total} ns, bound {best.bound} ns; greedy {rule.total} ns; all slow "
        f"{found.slowest} ns",
        f"fast memory: {format_bytes(found.height)} of {format_bytes(capacity)}; slow "
        f"{hardware.slow / 1e9:g} GB/s, fast {hardware.fast / 1e9:g} GB/s, copies "
        f"{hardware.copy / 1e9:g} GB/s after {hardware.latency} ns",
        "storage,start,end,offset,size,copied",
    ]
    lines += [
        ",".join(str(r[c]) for c in ("storage", "start", "end", "offset", "nbytes", "copied"))
        for r in residencies
    ]
    return document, lines


def _shown(placement: "Placement", k: int) -> dict[str, Any]:
    r = placement.residencies[k]
    storage = placement.program.storages[r.storage]
    uses = [placement.program.uses[u].instruction for u in r.uses]
    return {
        "storage": storage.name,
        "nbytes": storage.nbytes,
        "offset": r.offset,
        "start": r.start,
        "end": r.end,
        "copied": bool(r.chunks),
        "instructions": uses,
    }
