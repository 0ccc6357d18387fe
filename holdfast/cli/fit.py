"""`holdfast fit`: what fits in a budget, before anything is allocated."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from holdfast import cli
from holdfast.errors import DoesNotFit

if TYPE_CHECKING:
    from holdfast.plan.devices import Shared
    from holdfast.plan.file import Training
    from holdfast.plan.skeletons import Request


def fit(
    model: Annotated[
        str,
        typer.Argument(
            help="Built-in name, config.json, directory, cached hub id, module:function."
        ),
    ],
    budget: Annotated[str, typer.Option(help="Bytes, for example 24GiB or device=24GiB,disk=1TB.")],
    task: Annotated[str, typer.Option(help="finetune, pretrain or serve.")] = "finetune",
    batch: Annotated[
        int, typer.Option(help="Sequences in one optimizer step; to serve: requests at once.")
    ] = 1,
    sequence: Annotated[int, typer.Option(help="Tokens in a sequence.")] = 1024,
    tune: Annotated[
        str | None,
        typer.Option(help="full, adapter or any [default: any; full for pretrain]."),
    ] = None,
    allow: Annotated[str, typer.Option(help="Worst quality: exact, bounded or lossy.")] = "bounded",
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    optimizer: Annotated[str, typer.Option(help="A method's key, or any.")] = "any",
    adapter: Annotated[str, typer.Option(help="A method's key, or any.")] = "any",
    methods: Annotated[
        str | None,
        typer.Option(help="Exactly these, for example lora,int4,memsave; see holdfast systems."),
    ] = None,
    hardware: Annotated[
        str | None, typer.Option(help="Preset or file that time is predicted for.")
    ] = None,
    reserve: Annotated[
        str | None,
        typer.Option(help="Device bytes kept free [default: 1GiB on CUDA, some KiB on a CPU]."),
    ] = None,
    devices: Annotated[int, typer.Option(help="Devices, each with this budget.")] = 1,
    clip: Annotated[float | None, typer.Option(help="Clip the global gradient norm.")] = None,
    learning_rate: Annotated[float, typer.Option(help="Recorded in the plan.")] = 1e-3,
    policy: Annotated[
        list[str] | None,
        typer.Option(help="To serve: cache policies to choose from [default: all untrained ones]."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Where the plan is written.")] = Path("plan.yaml"),
    explain: Annotated[bool, typer.Option("--explain", help="What binds and what helps.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Find what fits a memory budget, exactly, in advance.

    Example: holdfast fit llama-3.1-8b --budget 24GiB --sequence 4096

    Example: holdfast fit llama-3.2-1b --devices 4 --budget 16GiB --batch 32 --task pretrain

    Example: holdfast fit llama-3.1-8b --task serve --budget 24GiB --batch 8 --sequence 8192
    """
    from holdfast.budget import Budget
    from holdfast.plan import fit as planner
    from holdfast.plan import report
    from holdfast.plan.file import training
    from holdfast.plan.fitter import Fitter
    from holdfast.plan.skeletons import Request
    from holdfast.units import parse_bytes

    if task == "serve":
        _fit_serve(
            json, model=model, budget=Budget.parse(budget), batch=batch, sequence=sequence,
            allow=allow, dtype=dtype, hardware=hardware, policies=tuple(policy or ()),
            reserve=None if reserve is None else parse_bytes(reserve),
        )  # fmt: skip
        return
    with cli.stdout_is_json(json):
        settings = training(learning_rate=learning_rate, clip=clip)
        request = Request(
            model,
            Budget.parse(budget),
            task=task,
            batch=batch,
            sequence=sequence,
            tune=tune,
            allow=allow,
            dtype=dtype,
            optimizer=optimizer,
            adapter=adapter,
            methods=tuple(methods.split(",")) if methods else (),
            hardware=hardware,
            reserve=None if reserve is None else parse_bytes(reserve),
            clip=clip,
        )
        if devices > 1:
            document, label = _fit_devices(request, devices, settings, out, json)
    if devices > 1:
        if not json:
            report.show_devices(document, label, out)
            return
        cli.print_json(document)
        if not document["fits"]:
            raise typer.Exit(DoesNotFit.exit_code)
        return
    with cli.stdout_is_json(json):
        fitter = Fitter(request)
        best = fitter.search(request.budget)
        if best is None:
            error = planner.does_not_fit(fitter)
            if not json:
                raise error
            document = error.details
        else:
            plan = planner.to_plan(fitter, best, settings)
            plan.save(out)
            front = planner.pareto(fitter, best)
            document = report.document(fitter, best, plan, front)
    if best is not None and not json:
        report.show(fitter, best, plan, front, out, explain=explain)
        return
    cli.print_json(document)
    if best is None:
        raise typer.Exit(DoesNotFit.exit_code)


def _fit_serve(json: bool, **asked: Any) -> None:
    from holdfast.plan import serve, serve_report

    with cli.stdout_is_json(json):
        server = serve.Server(serve.Serve(**asked))
        found = list(server.choices())
        best = server.best(found)
        if best is None:
            error = serve_report.does_not_fit(server)
            if not json:
                raise error
            document = error.details
        else:
            document = serve_report.document(server, best, found)
    if best is not None and not json:
        serve_report.show(server, best, found)
        return
    cli.print_json(document)
    if best is None:
        raise typer.Exit(DoesNotFit.exit_code)


def _fit_devices(
    request: "Request", devices: int, settings: "Training", out: Path, json: bool
) -> tuple[dict, str]:
    """Write the plan; its document and name."""
    from holdfast.plan import devices as planner
    from holdfast.units import format_bytes

    fitter = planner.DeviceFitter(request, devices, settings)

    def tell(tried: "Shared") -> None:
        print(f"{tried.label()}: {format_bytes(tried.peak)} on a device", file=sys.stderr)

    best = fitter.search(tell)
    if best is None:
        error = planner.does_not_fit(fitter)
        if not json:
            raise error
        return error.details, ""
    plan = planner.to_plan(fitter, best)
    plan.save(out)
    return planner.document(best, plan, fitter), best.label()
