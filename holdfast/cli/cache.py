"""`holdfast cache`: what a model keeps of its context, and what that costs in quality."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from holdfast import cli
from holdfast.cli.cache_lengthen import lengthen

if TYPE_CHECKING:
    from holdfast.context.cache.policy import CachePolicy

app = typer.Typer(
    help="Bounded caches: policies, quality per byte, longer inputs.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.command("lengthen")(lengthen)


@app.command("policies")
def policies(
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """List what may decide which tokens stay, with options and their defaults.

    Example: holdfast cache policies
    """
    import inspect

    from holdfast.context.cache.policies import policies as known

    rows = []
    for name, cls in known().items():
        options = {
            option: None if parameter.default is parameter.empty else parameter.default
            for option, parameter in inspect.signature(cls).parameters.items()
        }
        rows.append({
            "name": name, "options": {o: _plain(v) for o, v in options.items()},
            "what": inspect.cleandoc(cls.__doc__ or "").splitlines()[0],
        })  # fmt: skip
    if json:
        cli.print_json(rows)
        return
    for row in rows:
        given = ", ".join(f"{option}={value}" for option, value in row["options"].items())
        print(f"{row['name']:<20} {row['what']}")
        if given:
            print(f"{'':<20} {given}")


@app.command("compare")
def compare(
    model: Annotated[str, typer.Argument(help="Model directory, or hub id in the local cache.")],
    data: Annotated[list[str], typer.Option(help="Text file, directory or JSONL; repeatable.")],
    budgets: Annotated[
        str, typer.Option(help="Budgets in bytes, comma-separated, e.g. 64KiB,256KiB.")
    ],
    policy: Annotated[
        list[str] | None,
        typer.Option(
            "--policy", help="Only these; repeatable [default: all that need no training]."
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of each text that is read.")] = 2048,
    texts: Annotated[int, typer.Option(help="Texts that are read.")] = 4,
    form: Annotated[
        str, typer.Option(help="How entries are stored: dense, int8, int4; comma-separated.")
    ] = "dense",
    seed: Annotated[int, typer.Option(help="Of the places where texts begin.")] = 0,
    tokenizer: Annotated[
        str | None, typer.Option(help="bytes, a directory or a cached hub id.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda [default: cuda if any].")] = None,
    dtype: Annotated[str | None, typer.Option(help="[default: that of the weights].")] = None,
    out: Annotated[Path, typer.Option(help="Directory for table, plot and JSON.")] = Path(
        "runs/cache"
    ),
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Quality per byte of every policy, on your own model and text.

    Perplexity of text read through the cache, and recall: of phrases that were said far back and
    come again, how many tokens the model predicts. All bytes count, choosing what to drop included.
    The same command again continues what was cut off.

    Example: holdfast cache compare runs/small --data corpus.txt --budgets 64KiB,256KiB
    """
    from holdfast.context import compare as comparison
    from holdfast.context.loading import load
    from holdfast.units import parse_bytes

    sizes = [parse_bytes(size) for size in budgets.split(",")]
    with cli.stdout_is_json(json):
        net, words = load(model, tokenizer=tokenizer, device=device, dtype=dtype)
        document = comparison.run(
            net, words, data, sizes, policies=policy, forms=form.split(","), tokens=tokens,
            texts=texts, seed=seed, out=out,
        )  # fmt: skip
    if json:
        cli.print_json(document)
    else:
        comparison.show(document, out)


def make_policy(name: str, options: list[str] | None = None) -> "CachePolicy":
    """A policy by its name and options such as ["sinks=8"]; numbers become numbers."""
    from holdfast.context.cache.policies import find
    from holdfast.errors import UsageError

    given: dict[str, Any] = {}
    for text in options or ():
        option, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"--option {text}: write name=value, for example sinks=8")
        given[option.strip().replace("-", "_")] = _value(value.strip())
    return find(name, **given)


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return {"true": True, "false": False, "none": None}.get(text.lower(), text)


def _plain(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | str | None) else repr(value)
