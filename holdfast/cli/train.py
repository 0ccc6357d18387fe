"""`holdfast train`: run a plan on data, within its budget."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from holdfast import cli
from holdfast.errors import OverBudget

if TYPE_CHECKING:
    from holdfast.plan.plan import Plan
    from holdfast.training.run import Settings


def train(
    plan: Annotated[Path, typer.Argument(help="A plan.yaml that `holdfast fit` wrote.")],
    data: Annotated[
        list[str], typer.Option(help="Text file, directory or JSONL; may be repeated.")
    ],
    out: Annotated[Path, typer.Option(help="Directory for the model, log and checkpoints.")] = Path(
        "runs/train"
    ),
    model: Annotated[
        str | None, typer.Option(help="Directory with the weights, where the plan names a shape.")
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="bytes, a directory or a cached hub id [default: the model's]."),
    ] = None,
    glob: Annotated[str | None, typer.Option(help='Files of a directory, e.g. "**/*.py".')] = None,
    text_field: Annotated[str, typer.Option(help="Field of JSONL lines.")] = "text",
    validation: Annotated[float, typer.Option(help="Fraction of the data held out.")] = 0.05,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps [default: one epoch].")] = None,
    validate_every: Annotated[int, typer.Option(help="Steps; 0 at the end only.")] = 0,
    checkpoint_every: Annotated[int, typer.Option(help="Steps; 0 at the end only.")] = 0,
    merge: Annotated[bool, typer.Option("--merge", help="Write dense merged weights.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start over.")] = False,
    local: Annotated[
        bool, typer.Option("--local", help="Start a plan's 2 to 4 ranks on this machine.")
    ] = False,
    timeout: Annotated[
        float, typer.Option(help="Seconds that a rank waits for another one.")
    ] = 600.0,
    device: Annotated[str | None, typer.Option(help="cpu or cuda [default: cuda if any].")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Run a plan on data; the same command again resumes.

    Example: holdfast train plan.yaml --data corpus.txt --steps 100

    Example: torchrun --nproc-per-node 4 -m holdfast train plan.yaml --data corpus.txt
    """
    from holdfast.plan.plan import Plan
    from holdfast.training import show
    from holdfast.training.data import DataSource
    from holdfast.training.run import Run, Settings

    with cli.stdout_is_json(json):
        source = DataSource(tuple(data), glob=glob, text_field=text_field, validation=validation)
        settings = Settings(
            source,
            tokenizer=tokenizer,
            model=model,
            steps=steps,
            validate_every=validate_every,
            checkpoint_every=checkpoint_every,
            merge=merge,
        )
        loaded = Plan.load(plan)
        parallel = loaded.spec.parallel is not None or local
        if parallel:
            report = _train_ranks(loaded, settings, out, local, overwrite, timeout)
            if not report:
                return  # another rank reports
        else:
            with show.progress() as on_step:
                run = Run(
                    loaded, settings, out, device=device, overwrite=overwrite, on_step=on_step
                )
                report = run.run()
    if json:
        cli.print_json(report)
    elif parallel:
        show.ranks(report, out)
    else:
        show.report(report, loaded, out)
    if not report["within_budget"]:
        raise OverBudget(show.excess(report, loaded))


def _train_ranks(
    plan: "Plan",
    settings: "Settings",
    out: Path,
    local: bool,
    overwrite: bool,
    timeout: float,
) -> dict:
    """The report; empty on a rank that another one reports for."""
    from holdfast.errors import UsageError
    from holdfast.training import run_ranks

    if settings.merge:
        raise UsageError("--merge is for plans of one device")
    if local:
        return run_ranks.train_locally(plan, settings, out, overwrite=overwrite, timeout=timeout)
    if run_ranks.under_torchrun():
        return run_ranks.train_under_torchrun(
            plan, settings, out, overwrite=overwrite, timeout=timeout
        )
    assert plan.spec.parallel is not None
    ranks = plan.spec.parallel.ranks
    raise UsageError(
        f"the plan is for {ranks} ranks: start it with torchrun --nproc-per-node {ranks} "
        "-m holdfast train ..., or add --local to run them on this machine"
    )
