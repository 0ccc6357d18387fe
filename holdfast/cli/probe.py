"""`holdfast probe`: measure what a way of keeping less does to data or a model.

A probe is one function and one line of `PROBES`.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from holdfast import cli
from holdfast.errors import UsageError


def data_pruning(
    keep: Annotated[str, typer.Option(help="Fractions of the examples that are kept.")] = (
        "0.05,0.2,0.5"
    ),
    examples: Annotated[int, typer.Option(help="Examples before pruning.")] = 20_000,
    seeds: Annotated[int, typer.Option(help="Runs whose mean is shown.")] = 5,
    seed: Annotated[int, typer.Option(help="The first of the seeds.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Show where pruning by score fails, what calibration repairs.

    Logistic regression on logistic data, whose best model is known: hardest and easiest examples,
    random ones, and mixtures of both with and without weights.

    Example: holdfast probe data-pruning --keep 0.05,0.5
    """
    from statistics import mean

    from holdfast.training.reduction.prune import WAYS, limits

    fractions = _numbers("--keep", keep, float)
    if examples < 1 or seeds < 1:
        raise UsageError(f"--examples {examples} and --seeds {seeds} must be at least 1")
    rows: list[dict[str, Any]] = []
    with cli.stdout_is_json(json), _bar("data-pruning", len(fractions) * seeds) as advance:
        for fraction in fractions:
            runs = []
            for s in range(seed, seed + seeds):
                runs.append(limits(examples, fraction, list(WAYS), s))
                advance()
            for way in WAYS:
                accuracy, loss = (mean(run[way][i] for run in runs) for i in (0, 1))
                rows.append({"keep": fraction, "way": way, "accuracy": accuracy, "loss": loss})
    if json:
        cli.print_json(
            {"probe": "data-pruning", "examples": examples, "seeds": seeds, "rows": rows}
        )
        return
    print(f"{examples:,} examples, mean of {seeds} seeds")
    _table(
        ["keep", "way", "accuracy", "loss"],
        [[f"{r['keep']:g}", r["way"], f"{r['accuracy']:.3f}", f"{r['loss']:.3f}"] for r in rows],
    )


def shrink(
    data: Annotated[Path, typer.Option(help="Folder with one folder of text files per class.")],
    lengths: Annotated[str, typer.Option(help="Numbers of words that the model sees.")] = (
        "512,256,128"
    ),
    stopwords: Annotated[str, typer.Option(help="en, id, or a file of stop words.")] = "en",
    held_out: Annotated[float, typer.Option(help="Fraction of the texts for the test.")] = 0.25,
    epochs: Annotated[int, typer.Option(help="Passes over the training texts.")] = 4,
    search: Annotated[
        Path | None,
        typer.Option(help="Also search rate, batch, epochs, length, transform; log to this file."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the split and of the model.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Compare texts cut short with shortened ones.

    A small transformer learns from scratch, once for each line; all lines have the same number of
    epochs, but see different shares of the texts. A search that was cut off goes on from its log.

    Example: holdfast probe shrink --data news --lengths 256,128
    """
    from holdfast.training.reduction import classify
    from holdfast.training.reduction.classify import Setting
    from holdfast.training.reduction.shrink import Shrink
    from holdfast.units import format_bytes

    sizes = _numbers("--lengths", lengths, int)
    if not 0 < held_out < 1 or epochs < 1:
        raise UsageError(f"--held-out {held_out} must be in (0, 1) and --epochs {epochs} >= 1")
    train, test = classify.read_folders(data).split(held_out, seed)
    shortener = Shrink(stopwords).fit(train.texts)
    pairs = {"as it is": (train, test), "shortened": _shortened(shortener, train, test)}
    rows: list[dict[str, Any]] = []
    total = len(sizes) * 2 * classify.steps(len(train.texts), Setting(epochs=epochs))
    with cli.stdout_is_json(json):
        with _bar("shrink", total) as advance:
            for length in sizes:
                for text, (learn, judge) in pairs.items():
                    setting = Setting(length=length, epochs=epochs)
                    right = classify.accuracy(learn, judge, setting, seed, advance)
                    share = classify.evidence(judge.texts, length)
                    kept = classify.batch_bytes(length, setting.batch, len(train.names))
                    rows.append(
                        {"length": length, "text": text, "accuracy": right}
                        | {"words_seen": share, "saved_bytes": kept}
                    )
        found = None if search is None else _search(search, sizes, stopwords, train, test, seed)
    if json:
        counts = {"train": len(train.texts), "test": len(test.texts), "classes": train.names}
        cli.print_json({"probe": "shrink", **counts, "rows": rows, "search": found})
        return
    print(
        f"{len(train.texts):,} training and {len(test.texts):,} test texts of {len(train.names)} "
        f"classes, {epochs} epochs; words seen: the share of what is left of a text"
    )
    lines = [
        [str(r["length"]), r["text"], f"{r['accuracy']:.3f}", f"{r['words_seen']:.0%}"]
        + [format_bytes(r["saved_bytes"])]
        for r in rows
    ]
    _table(["length", "text", "accuracy", "words seen", "saved for backward"], lines)
    if found is not None:
        print(f"best of {found['runs']} searched runs: {found['best']}")
        print(f"its accuracy: {found['score']:.3f} in the search, {found['test']:.3f} in the test")


def _shortened(shortener: Any, *parts: Any) -> tuple[Any, ...]:
    return tuple(type(p)(shortener.transform(p.texts), p.labels, p.names) for p in parts)


def _search(log: Path, lengths: list, stopwords: str, train, test, seed: int) -> dict[str, Any]:
    """The best settings on a part of the training texts, and their accuracy in the test."""
    from holdfast.training.reduction import classify
    from holdfast.training.reduction.classify import Setting
    from holdfast.training.reduction.shrink import Shrink, combinations, search

    space: dict[str, list] = {
        "lr": [2e-3, 5e-3, 1e-3],
        "batch": [32, 16],
        "epochs": [4, 2],
        "length": lengths,
        "transform": combinations(stopwords),
    }

    def score(settings: dict[str, Any], learn, judge) -> float:
        transform = settings.pop("transform")
        shortener = Shrink(**transform).fit(learn.texts)
        short_learn, short_judge = _shortened(shortener, learn, judge)
        return classify.accuracy(short_learn, short_judge, Setting(**settings), seed)

    inner = train.split(0.25, seed)
    with _bar("search", 1 + sum(len(values) - 1 for values in space.values())) as advance:

        def evaluate(settings: dict[str, Any]) -> float:
            found = score(settings, *inner)
            advance()
            return found

        result = search(evaluate, space, log)
    return {**result, "test": score(dict(result["best"]), train, test)}


# Name -> what `holdfast probe NAME` runs.
PROBES: dict[str, Callable[..., None]] = {"data-pruning": data_pruning, "shrink": shrink}

app = typer.Typer(
    help="Measure what keeping less does to data or a model.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
for _name, _probe in PROBES.items():
    app.command(_name)(_probe)


def _numbers(option: str, text: str, kind: type) -> list:
    try:
        found = [kind(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) <= 0:
        what = "whole numbers" if kind is int else "numbers"
        raise UsageError(f"{option} {text!r}: expected positive {what} with commas between them")
    return found


@contextlib.contextmanager
def _bar(name: str, total: int) -> Iterator[Callable[[], None]]:
    """A progress bar on stderr with rate and time left; nothing where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich import progress
    from rich.console import Console

    bar = progress.Progress(
        progress.TextColumn(name),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[rate]}"),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    with bar:
        key = bar.add_task(name, total=total, rate="")

        def advance() -> None:
            task = bar.tasks[0]
            rate = (task.completed + 1) / max(task.elapsed or 0.0, 1e-3)
            bar.update(key, advance=1, rate=f"{rate:.1f}/s")

        yield advance


def _table(heads: list[str], rows: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    for row in (heads, *rows):
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )
