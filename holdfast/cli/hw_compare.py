"""`holdfast hw compare`: speed and energy of machines that need not exist."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from holdfast import cli

if TYPE_CHECKING:
    from holdfast.plan.superconducting import Comparison


def compare(
    machines: Annotated[
        list[str],
        typer.Argument(help="Two or more presets or files, the reference first."),
    ],
    model: Annotated[
        str,
        typer.Option(help="Built-in name, config.json, directory, cached hub id, module:function."),
    ],
    task: Annotated[str, typer.Option(help="finetune, pretrain or serve.")] = "serve",
    batch: Annotated[int, typer.Option(help="Sequences over all chips of a machine.")] = 1,
    sequence: Annotated[int, typer.Option(help="Tokens in a sequence or prompt.")] = 1024,
    tokens: Annotated[int, typer.Option(help="Tokens made per sequence in serving.")] = 128,
    dtype: Annotated[
        str, typer.Option(help="auto (the config's), float32, bfloat16 or float16.")
    ] = "auto",
    sweep: Annotated[
        list[str] | None,
        typer.Option(help="Name=values, for example levels.dram.bandwidth=0.5,1,2 or batch=1,8."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Compare machines on one workload, each under its own best plan, relative to the first.

    Example: holdfast hw compare h100-hgx illustrative-scd --model llama-3.1-8b --batch 8
    """
    from holdfast.plan.superconducting import Workload, check_sweep
    from holdfast.plan.superconducting import compare as run

    with cli.stdout_is_json(json):
        workload = Workload(model, task, batch, sequence, tokens, dtype)  # type: ignore[arg-type]
        found = run(machines, workload, dict(check_sweep(text) for text in sweep or []))
    if json:
        cli.print_json(found.document())
    else:
        _show(found)


def _show(found: "Comparison") -> None:
    work = found.document()
    print(
        f"{work['model']}: {work['task']}, batch {work['batch']}, sequence {work['sequence']}, "
        f"{work['dtype']}"
    )
    lines = [["setting", "machine", "plan", "bound by", "faster", "energy", "seconds", "joules"]]
    fictional = False
    for setting in work["settings"]:
        for outcome in setting["outcomes"]:
            if "does_not_fit" in outcome:
                lines.append([setting["setting"], outcome["does_not_fit"], *[""] * 6])
                continue
            fictional |= outcome["illustrative"]
            total, ratios = outcome["total"], outcome["speedup"]
            by_phase = [f"{v:.3g}x {k}" for k, v in ratios.items() if v and k != "total"]
            lines.append(
                [setting["setting"], outcome["machine"]]
                + [f"tensor {outcome['tensor']}, data {outcome['data']}", total["bound"]]
                + [f"{ratios['total']:.3g}x ({', '.join(by_phase)})" if ratios["total"] else "-"]
                + [_or_dash(outcome["energy_ratio"], "x"), _or_dash(total["seconds"])]
                + [_or_dash(total["joules"])]
            )
    # What does not fit is a sentence, which would make its column as wide.
    widths = [max(len(line[i]) for line in lines if line[2]) for i in range(len(lines[0]))]
    for line in lines:
        print("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip())
    if fictional:
        print(
            "an illustrative machine is made of numbers that claim nothing: ratios show what the "
            "model says about them, seconds and joules are not given"
        )


def _or_dash(value: Any, unit: str = "") -> str:
    return "-" if value is None else f"{value:.3g}{unit}"
