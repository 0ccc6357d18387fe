"""`holdfast compare`: one job under several methods, side by side."""

from pathlib import Path
from typing import Annotated

import typer

from holdfast import cli
from holdfast.errors import HoldfastError, OverBudget, UsageError


def compare(
    data: Annotated[
        list[str], typer.Option(help="Text file, directory or JSONL; may be repeated.")
    ],
    plans: Annotated[
        list[Path] | None, typer.Argument(help="Plan files of the same job; or use --methods.")
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Combinations such as plain,adamw4,lora+int4,memsave+recompute@1e-3: keys of "
            "methods, plain, recompute, backward, chunk, bf16; @ gives a learning rate."
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="With --methods: what is trained, as in holdfast fit.")
    ] = None,
    task: Annotated[str, typer.Option(help="With --methods: finetune or pretrain.")] = "pretrain",
    batch: Annotated[int, typer.Option(help="With --methods: sequences in a step.")] = 1,
    sequence: Annotated[int, typer.Option(help="With --methods: tokens in a sequence.")] = 256,
    learning_rate: Annotated[float, typer.Option(help="With --methods.")] = 1e-3,
    steps: Annotated[int, typer.Option(help="Optimizer steps of every run.")] = 50,
    glob: Annotated[str | None, typer.Option(help='Files of a directory, e.g. "**/*.py".')] = None,
    text_field: Annotated[str, typer.Option(help="Field of JSONL lines.")] = "text",
    validation: Annotated[float, typer.Option(help="Fraction of the data held out.")] = 0.05,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="bytes, a directory or a cached hub id [default: the model's]."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda [default: cuda if any].")] = None,
    out: Annotated[Path, typer.Option(help="Directory for runs, table and plot.")] = Path(
        "runs/compare"
    ),
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Train one job under several methods, side by side.

    Writes a table and a plot of peak bytes, loss and time.

    The same command again continues what was cut off and repeats nothing.

    Example: holdfast compare --model gpt2 --methods plain,adamw4,lora+int4 --data corpus.txt
    """
    from holdfast.budget import Budget
    from holdfast.plan.file import training
    from holdfast.plan.skeletons import Request
    from holdfast.training import compare as comparison
    from holdfast.training import show

    if bool(plans) == bool(methods):
        raise UsageError("compare takes either plan files or --methods; give one of the two")
    with cli.stdout_is_json(json):
        if plans:
            contenders = comparison.from_files(plans)
        else:
            assert methods is not None
            if model is None:
                raise UsageError("--methods needs --model; name what is trained, for example gpt2")
            roomy = Budget(1, 0, 0)  # each plan gets the budget that it needs
            request = Request(model, roomy, task=task, batch=batch, sequence=sequence)
            contenders = comparison.from_methods(
                request, methods.split(","), training(learning_rate=learning_rate)
            )
        options = [part for path in data for part in ("--data", path)]
        options += ["--steps", str(steps), "--validation", str(validation)]
        options += ["--text-field", text_field]
        for name, value in (("glob", glob), ("tokenizer", tokenizer), ("device", device)):
            options += [f"--{name}", value] if value is not None else []
        document = comparison.run(contenders, out, options, show.run_starts(len(contenders)))
        if any("error" not in row for row in document["rows"]):
            comparison.draw(document, out / "compare.png")
    if json:
        cli.print_json(document)
    else:
        show.comparison(document, out)
    failed = [row["label"] for row in document["rows"] if "error" in row]
    if failed:
        raise HoldfastError(f"{', '.join(failed)} did not finish; the others are in {out}")
    over = [row["label"] for row in document["rows"] if not row["within_budget"]]
    if over:
        raise OverBudget(f"{', '.join(over)} held more than planned; see the table")
