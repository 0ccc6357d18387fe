"""`holdfast plan`: look at plans, and at the table of recipes that a plan is made of."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from holdfast import cli
from holdfast.cli.place import place
from holdfast.cli.shortest_time import shortest_time
from holdfast.cli.sweep import sweep
from holdfast.cli.wall import wall
from holdfast.errors import DoesNotFit

if TYPE_CHECKING:
    from holdfast.plan.file import PlanFile
    from holdfast.training.recipes import Table

app = typer.Typer(
    help="Plans and recipes: what each would hold.", no_args_is_help=True, rich_markup_mode=None
)

for name, verb in (
    ("wall", wall),
    ("place", place),
    ("sweep", sweep),
    ("shortest-time", shortest_time),
):
    app.command(name)(verb)

# Categories with a column of their own; all others are summed under "other".
_COLUMNS = ("parameters", "gradients", "optimizer", "activations", "temporary")
_LIFE = {"step": "kept until the step", "backward": "consumed in backward"}


@app.command("train")
def train(
    model: Annotated[
        str,
        typer.Argument(
            help="Built-in name, config.json, directory, cached hub id, module:function."
        ),
    ],
    budget: Annotated[str, typer.Option(help="Bytes, for example 24GiB or device=24GiB,disk=1TB.")],
    batch: Annotated[int, typer.Option(help="Sequences in one optimizer step.")] = 1,
    sequence: Annotated[int, typer.Option(help="Tokens in a sequence.")] = 1024,
    hardware: Annotated[
        str | None, typer.Option(help="Preset or file that time is predicted for.")
    ] = None,
    reserve: Annotated[
        str | None, typer.Option(help="Device bytes kept free [default: 1GiB on CUDA].")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Predict what every recipe of memory-efficient training would hold, one change at a time.

    Example: holdfast plan train gpt2 --budget 16GiB
    """
    from holdfast.budget import Budget
    from holdfast.plan.skeletons import Request
    from holdfast.training import recipes
    from holdfast.units import parse_bytes

    with cli.stdout_is_json(json):
        request = Request(
            model,
            Budget.parse(budget),
            batch=batch,
            sequence=sequence,
            hardware=hardware,
            reserve=None if reserve is None else parse_bytes(reserve),
        )
        table = recipes.table(request)
    if json:
        cli.print_json(table.document())
    else:
        _show(table)
    if not table.fits:
        if json:
            raise typer.Exit(DoesNotFit.exit_code)
        raise table.does_not_fit()


def _show(table: "Table") -> None:
    from holdfast.units import format_bytes

    fitter = table.plain.fitter
    print(
        f"{fitter.source.name}: batch {table.request.batch}, sequence {table.request.sequence}, "
        f"budget {table.request.budget}; time for {fitter.hardware.name}"
    )
    if fitter.reserve:
        print(f"{format_bytes(fitter.reserve)} are reserved for context and fragmentation")
    heads = ["fits", "recipe", "trains", *_COLUMNS, "other", "total", "elsewhere", "s/step"]
    lines = [[*heads, "FLOPs", "quality"]]
    for row, entry in zip(table.rows, table.document()["rows"], strict=True):
        named = [row.cells[c] for c in _COLUMNS]
        sizes = [*named, row.peak - sum(named), row.peak, row.needs.host + row.needs.disk]
        quality = entry["quality"]["kind"]
        if entry["quality"]["estimate"]:
            quality += f", loss +{entry['quality']['estimate']:.2%} ({entry['quality']['source']})"
        lines.append(
            ["yes" if entry["fits"] else "no", row.recipe.label, entry["trains"]]
            + [format_bytes(n) if n else "-" for n in sizes]
            + [f"{row.seconds:.3g}", f"{entry['flops_ratio']:.2f}x", quality]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        # Words to the left, numbers to the right; the last column may be long.
        cells = [
            c.ljust(w) if i < 3 else c.rjust(w)
            for i, (c, w) in enumerate(zip(line[:-1], widths[:-1], strict=True))
        ]
        print("  ".join([*cells, line[-1]]))
    for label, reason in table.left_out.items():
        print(f"left out: {label}: {reason}")


@app.command("show")
def show(
    plan: Annotated[Path, typer.Argument(help="A plan file, as `holdfast fit` writes it.")],
    timeline: Annotated[
        Path | None, typer.Option(help="Draw the step over time: a .png or .svg file.")
    ] = None,
    chrome: Annotated[
        Path | None, typer.Option(help="Write it for chrome://tracing and Perfetto.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Print a plan: what it is for, its methods, its blocks and its predicted bytes.

    Example: holdfast plan show plan.yaml --timeline step.svg --chrome step.json
    """
    with cli.stdout_is_json(json):
        from holdfast.plan.plan import Plan
        from holdfast.units import format_bytes

        found = Plan.load(plan)
        if timeline is not None or chrome is not None:
            from holdfast.plan import draw
            from holdfast.plan.timeline import trace_of

            trace = trace_of(found)
            if timeline is not None:
                draw.timeline(
                    trace,
                    timeline,
                    title=f"{found.spec.model}: one step, predicted, without temporary bytes",
                )
            if chrome is not None:
                draw.write_chrome(trace, chrome)
    spec = found.spec
    if json:
        cli.print_json(spec.model_dump(mode="json"))
        return
    methods = spec.methods
    rows = [
        ("model", f"{spec.model}, {spec.task}"),
        ("step", f"{spec.accumulation} x {spec.micro_batch} sequences of {spec.sequence}"),
        ("budget", str(found.budget)),
        ("hardware", spec.hardware),
        ("parameters", methods.dtype),
        ("weights", _named(methods.weights)),
        ("adapter", _named(methods.adapter)),
        ("optimizer", _named(methods.optimizer)),
        ("gradients", _LIFE[methods.gradients]),
        ("saved", ", ".join(map(_named, methods.saved)) or "-"),
        ("loss", f"chunks of {methods.loss_chunk} tokens" if methods.loss_chunk else "the model's"),
        *methods.blocks.items(),
        ("ranks", _shared(spec)),
    ]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
    if not spec.predicted.get("ledger"):
        print("no prediction is in this plan; `holdfast fit` writes one")
        return
    if spec.parallel is None:
        print(f"predicted on the device, {found.step_seconds:.3g} s per step:")
        print(found.table())
        return
    print(f"predicted on each rank's device, {found.step_seconds:.3g} s per step:")
    for rank in range(spec.parallel.ranks):
        print(f"rank {rank}  {format_bytes(found.predicted.peak('device', rank=rank))}")


def _shared(spec: "PlanFile") -> str:
    parallel = spec.parallel
    if parallel is None:
        return "-"
    if parallel.pipeline == 1:
        return f"{parallel.data} replicas, ZeRO {parallel.zero}"
    return (
        f"{parallel.data} x pipeline of {parallel.pipeline}, {parallel.chunks} chunks on each, "
        f"{parallel.order}, {parallel.offload} offloaded"
    )


def _named(choice: dict | None) -> str:
    if not choice:
        return "-"
    ((key, knobs),) = choice.items()
    settings = ", ".join(f"{name} {value}" for name, value in (knobs or {}).items())
    return f"{key} ({settings})" if settings else key


@app.command("rules")
def rules(
    method: Annotated[str | None, typer.Argument(help="Only pairs with this method.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """List which methods exclude each other in one plan, and why.

    Example: holdfast plan rules lora
    """
    from holdfast.errors import unknown
    from holdfast.plan.records import BACKWARD
    from holdfast.plan.records import rules as all_rules
    from holdfast.plan.registry import methods

    with cli.stdout_is_json(json):
        if method is not None and method not in (*methods(), BACKWARD):
            raise unknown("method", method, [*methods(), BACKWARD])
        found = {p: reason for p, reason in all_rules().items() if method is None or method in p}
    if json:
        cli.print_json([{"methods": list(p), "reason": reason} for p, reason in found.items()])
        return
    for (one, two), reason in found.items():
        print(f"{one} + {two}: {reason}")
    count = len(methods())
    print(
        f"{len(found)} pairs of {count} methods exclude each other; others compose where they apply"
    )
