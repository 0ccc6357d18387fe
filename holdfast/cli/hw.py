"""`holdfast hw`: hardware files, which predicted times are computed from."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from holdfast.cli.hw_compare import compare

app = typer.Typer(
    help="Hardware: measure this machine, compare machines.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


app.command("compare")(compare)


@app.command("probe")
def probe(
    out: Annotated[
        Path | None, typer.Option("--out", help="Write a hardware file (YAML) here.")
    ] = None,
    disk: Annotated[
        Path | None, typer.Option("--disk", help="Folder whose disk is measured.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Measure this machine: compute, memory, disk and, with a GPU, the link to it; under 20 s.

    Example: holdfast hw probe --out this.yaml
    """
    from holdfast.cli import print_json, stdout_is_json
    from holdfast.errors import UsageError
    from holdfast.plan.hardware import describe, hardware_fields, save_hardware
    from holdfast.plan.hardware_probe import probe as measure

    if out is not None and not out.parent.is_dir():
        raise UsageError(f"--out {out}: no folder {out.parent}; create it or choose another")
    with stdout_is_json(json_):
        hardware = measure(
            disk_directory=disk, tell=lambda what: print(f"measuring {what}", file=sys.stderr)
        )
    if out is not None:
        save_hardware(hardware, out)
    if json_:
        print_json(hardware_fields(hardware))
        return
    rows = describe(hardware)
    width = max(len(quantity) for quantity, _ in rows)
    for quantity, value in rows:
        print(f"{quantity:<{width}}  {value}")
    if out is not None:
        print(f"{'written':<{width}}  {out}")
