"""`holdfast plan wall`: what bounds a workload, and what would move it."""

from pathlib import Path
from typing import Annotated

import typer

from holdfast import cli


def wall(
    model: Annotated[
        str,
        typer.Argument(
            help="Built-in name, config.json, directory, cached hub id, module:function."
        ),
    ],
    task: Annotated[str, typer.Option(help="finetune, pretrain or serve.")] = "finetune",
    hardware: Annotated[
        str | None, typer.Option(help="Preset or file, of one level or layered.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Sequences on one device.")] = 1,
    sequence: Annotated[int, typer.Option(help="Tokens in a sequence, or in the cache.")] = 1024,
    devices: Annotated[int, typer.Option(help="Data-parallel devices.")] = 1,
    dtype: Annotated[
        str, typer.Option(help="auto (the config's), float32, bfloat16 or float16.")
    ] = "auto",
    attention: Annotated[
        str | None, typer.Option(help="transformers' implementation, for example eager.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the roofline here, .png or .svg.")] = None,
    trend: Annotated[
        bool, typer.Option("--trend", help="Add how fast computing outgrows memory.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Say whether each phase is bound by computing, memory, launches or the interconnect.

    Example: holdfast plan wall llama-3.1-8b --task serve --hardware h100-80gb --batch 8
    """
    from holdfast.plan import figures, memory_wall
    from holdfast.plan.layered import as_machine
    from holdfast.plan.trend import PARTS
    from holdfast.plan.trend import trend as fit

    with cli.stdout_is_json(json):
        if plot is not None:
            figures.plots()  # a missing library is said before anything is traced
        report = memory_wall.wall(
            model,
            None if hardware is None else as_machine(hardware, max(1, devices)),
            task,  # type: ignore[arg-type]
            batch,
            sequence,
            devices=devices,
            dtype=dtype,
            attention=attention,
        )
        if plot is not None:
            report.plot(plot)
    grown = fit() if trend else None
    if json:
        cli.print_json(report.document() | ({"trend": grown} if grown else {}))
        return
    print(report.table())
    if grown:
        rates = ", ".join(f"{name} x{rate:.2f}" for name, rate in grown["per_two_years"].items())
        ridges = ", ".join(f"{at:.0f} in {year}" for year, at in grown["ridge"].items())
        print(f"every two years, over {len(PARTS)} data-centre GPUs: {rates}")
        print(f"FLOPs per byte where both sides of the roofline meet: {ridges}")
    if plot is not None:
        print(f"drawn in {plot}")
