"""`holdfast check`: run the proofs of systems and of the core, and record what they measured."""

import sys
import traceback
from typing import Annotated, Any

import typer

from holdfast import checks
from holdfast.checks import docs
from holdfast.cli import print_json, stdout_is_json
from holdfast.errors import UsageError
from holdfast.units import format_bytes


def check(
    keys: Annotated[
        list[str] | None, typer.Argument(metavar="KEY", help="Keys or numbers, or core names.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Run every check that exists.")] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print one object for one KEY, else a list.")
    ] = False,
    write: Annotated[
        bool,
        typer.Option("--write", help="Store records, and regenerate docs/systems.md from them."),
    ] = False,
    full: Annotated[
        bool, typer.Option("--full", help="The larger form, where one exists.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", help="Seed of everything random.")] = 0,
) -> None:
    """Prove a system's claim against a named baseline.

    Runs a scaled-down experiment with a fixed seed; progress goes to stderr. Exits 0 only if
    every check that ran has passed.

    \b
    Example:
      holdfast check resume adamw4
      holdfast check --all --write
    """
    if bool(keys) == every:
        raise UsageError("name the checks to run, or --all: for example `holdfast check adamw4`")
    chosen = [checks.load(key) for key in (checks.available() if every else keys or [])]
    results = []
    with stdout_is_json(json):
        for found in chosen:
            print(f"{found.key}: {found.claim}", file=sys.stderr, flush=True)
            results.append(_run(found, full=full, seed=seed))
            print(_verdict(results[-1]), file=sys.stderr, flush=True)
            if write and "error" not in results[-1]:
                checks.write_record(results[-1])
        if write and not docs.write():
            print("docs/systems.md belongs to a source checkout: not written", file=sys.stderr)
    if json:
        print_json(results[0] if len(results) == 1 and not every else results)
    else:
        for result in results:
            print(f"{'passed' if result['passed'] else 'FAILED'}  {result['system']}")
    raise typer.Exit(0 if all(result["passed"] for result in results) else 1)


def _run(found: checks.Check, *, full: bool, seed: int) -> dict[str, Any]:
    """One result; a check that raises has failed, and the others still run."""
    try:
        return checks.run_check(found.key, full=full, seed=seed)
    except Exception as error:
        traceback.print_exc()
        known = {"system": found.key, "claim": found.claim, "passed": False, "seed": seed}
        reason = {"error": f"{type(error).__name__}: {error}"}
        return dict.fromkeys(checks.FIELDS) | known | reason


def _verdict(result: dict[str, Any]) -> str:
    if "error" in result:
        return f"  FAILED: {result['error']}"
    verdict = "passed" if result["passed"] else "FAILED"
    return (
        f"  {verdict}: {checks.figures(result['measured'])}; "
        f"baseline {checks.figures(result['baseline'])}; threshold {result['threshold']}; "
        f"{result['seconds']:.1f} s, {format_bytes(result['peak_bytes'])}"
    )
