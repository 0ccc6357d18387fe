"""`holdfast memory table`: what every policy is, and what it costs."""

from typing import Annotated

import typer

from holdfast import cli


def table(
    policy: Annotated[
        list[str] | None, typer.Option("--policy", help="Only these; repeatable [default: all].")
    ] = None,
    md: Annotated[bool, typer.Option("--md", help="Print a table in Markdown.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Show what each policy remembers and how: traits from its code, costs measured now.

    Provenance is the share of what a policy makes that names its source; costs are those of a
    conversation of 24 turns, without a language model, with vectors that are hashes.

    Example: holdfast memory table --md
    """
    from holdfast.errors import UsageError
    from holdfast.longterm.evaluation import taxonomy

    if md and json:
        raise UsageError("--md and --json exclude each other; give one of them")
    with cli.stdout_is_json(json):
        rows = taxonomy.rows(policy)
    if json:
        cli.print_json(rows)
    elif md:
        print(taxonomy.markdown(rows))
    else:
        lines = [list(taxonomy.HEADS), *map(taxonomy.cells, rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        for line in lines:
            padded = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
            print("  ".join(padded).rstrip())
