"""`holdfast probe`: measure what a way of keeping less does to data or a model.

A probe is one function and one line of `PROBES`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from holdfast import cli
from holdfast.cli.progress import bar
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
    with cli.stdout_is_json(json), bar("data-pruning", len(fractions) * seeds) as advance:
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
        with bar("shrink", total) as advance:
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
    with bar("search", 1 + sum(len(values) - 1 for values in space.values())) as advance:

        def evaluate(settings: dict[str, Any]) -> float:
            found = score(settings, *inner)
            advance()
            return found

        result = search(evaluate, space, log)
    return {**result, "test": score(dict(result["best"]), train, test)}


def position_loss(
    model: Annotated[str, typer.Option(help="Directory or cached hub id of a causal model.")],
    data: Annotated[
        Path | None,
        typer.Option(help="File, or folder of files, each a document [default: Python's library]."),
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens of a document that are read.")] = 512,
    documents: Annotated[int, typer.Option(help="Documents at most.")] = 32,
    window: Annotated[
        int | None, typer.Option(help="Also with no more context than so many tokens.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="bytes, a directory or a hub id [default: the model's].")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda [default: CUDA if any].")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Show a language model's loss by the position after a document's start.

    A mean over all positions hides that more context leaves the first tokens as they are. With a
    window, the same model also reads every token with that much context: positions before it are
    equal, and what longer context is worth shows behind it.

    Example: holdfast probe position-loss --model my-model --window 128
    """
    with cli.stdout_is_json(json):
        import torch

        from holdfast.context.loading import load
        from holdfast.longterm.retrieval_need import octaves, position_losses, read_documents

        if length < 2 or documents < 1:
            raise UsageError(f"--length {length} must be at least 2, --documents {documents} 1")
        if window is not None and not 0 < window < length:
            raise UsageError(
                f"--window {window} is not smaller than the documents, --length {length}; what "
                f"longer context is worth shows behind the window: give 1 to {length - 1}"
            )
        network, words = load(model, tokenizer=tokenizer, device=device)
        rows = read_documents(words, data, length, documents).to(network.device)
        curves = {"full": None} if window is None else {"full": None, "window": window}
        losses: dict[str, torch.Tensor] = {}
        with bar("position-loss", len(curves)) as advance:
            for name, seen in curves.items():
                losses[name] = position_losses(
                    lambda ids: network(input_ids=ids, use_cache=False).logits, rows, window=seen
                )
                advance()
    bounds = octaves(length)
    table = [
        {"from": a, "to": b} | {k: v[a - 1 : b - 1].mean().item() for k, v in losses.items()}
        for a, b in bounds
    ]
    if json:
        found = {"probe": "position-loss", "documents": len(rows), "length": length}
        curve = {name: values.tolist() for name, values in losses.items()}
        cli.print_json(found | {"window": window, "rows": table, "losses": curve})
        return
    print(f"{len(rows)} documents of {length} tokens, mean loss in nats per token by position")
    heads = ["position", "loss"] + ([] if window is None else [f"last {window} tokens"])
    _table(
        heads,
        [[f"{r['from']}-{r['to'] - 1}", *(f"{r[k]:.3f}" for k in losses)] for r in table],
    )


def memory_structure(
    data: Annotated[Path, typer.Option(help="LoCoMo's, HotpotQA's or MuSiQue's file.")],
    budget: Annotated[str, typer.Option(help="Tokens of contexts, comma-separated.")] = (
        "250,500,1000,4000"
    ),
    noise: Annotated[str, typer.Option(help="Other conversations among which to search.")] = "0",
    structure: Annotated[
        list[str] | None, typer.Option(help="Only these; repeatable [default: all].")
    ] = None,
    retriever: Annotated[
        list[str] | None, typer.Option(help="Only these; repeatable [default: all].")
    ] = None,
    conversation: Annotated[
        list[str] | None, typer.Option(help="Ask only about these; repeatable [default: all].")
    ] = None,
    embedder: Annotated[
        str | None, typer.Option(help="minilm, hash or openai:MODEL@URL [default: minilm].")
    ] = None,
    llm: Annotated[
        str | None, typer.Option(help="OpenAI-compatible address of a model that ranks, thinks.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="The language model's name.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Compare units of memory and ways to retrieve them, at equal tokens of context.

    Units are chunks of turns, triples, facts, summaries of sessions, or all of them; the figures
    are the share of the evidence whose units are in the context, and that of the answer's words.
    A summary of a session counts for all its turns, so that its evidence flatters it.

    Example: holdfast probe memory-structure --data locomo5.json --budget 500,1000 --noise 0,4
    """
    import os

    from holdfast import host
    from holdfast.longterm import structure as structures
    from holdfast.longterm.evaluation.units import STRUCTURES, load
    from holdfast.longterm.language.llm import OpenAI, Prompted
    from holdfast.longterm.retrieval import embed
    from holdfast.longterm.retrieval.encodings import Kept

    if (llm is None) != (model is None):
        raise UsageError("--llm URL and --model NAME go together; give both")
    judgement = None
    if llm is not None and model is not None:
        judgement = Prompted(OpenAI(llm, model, os.environ.get("HOLDFAST_LLM_KEY")))
    sizes = _numbers("--budget", budget, int)
    others = _numbers("--noise", noise, int, least=0)
    kinds, ways = structure or STRUCTURES, retriever or structures.RETRIEVERS
    chosen = embed.find(embedder) if embedder is not None else embed.default()
    materials = load(data)
    asked = conversation or [one.conversation.id for one in materials]
    total = len(asked) * len(kinds) * len(others)
    with cli.stdout_is_json(json), bar("memory-structure", total * len(ways)) as advance:
        rows = structures.measure(
            materials, Kept(chosen, host.cache_dir() / "encodings.db"), report=asked,
            structures=kinds, retrievers=ways, budgets=sizes, noise=others, judgement=judgement,
            progress=advance,
        )  # fmt: skip
    if json:
        found = {"probe": "memory-structure", "conversations": asked, "embedder": chosen.id}
        cli.print_json(found | {"rows": rows})
        return
    print(f"{', '.join(asked)}: {rows[0]['questions']} questions, {chosen.id}; shares in percent")
    _table(
        ["structure", "retriever", "noise", "budget", "units", "bytes", "evidence", "answer"],
        [
            [r["structure"], r["retriever"], str(r["noise"]), str(r["budget"]), str(r["units"])]
            + [str(r["bytes"]), f"{r['evidence']:.1f}", f"{r['answer']:.1f}"]
            for r in rows
        ],
    )


def teafarm(
    policies: Annotated[
        str, typer.Option(help="Memory policies, with commas between them.")
    ] = "theanine,keep_updated,hybrid",
    budget: Annotated[int, typer.Option(help="Words of a context at most.")] = 150,
    worlds: Annotated[int, typer.Option(help="Invented conversations whose mean is shown.")] = 4,
    embedder: Annotated[str, typer.Option(help="hash, or minilm where it is installed.")] = "hash",
    seed: Annotated[int, typer.Option(help="Seed of the first conversation.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Ask a memory questions with a false premise about facts that changed.

    What counts is the share of questions whose context holds the memory that refutes the premise;
    no model answers.

    Example: holdfast probe teafarm --policies theanine,hybrid --budget 100
    """
    from statistics import mean

    from holdfast.longterm.evaluation import teafarm
    from holdfast.longterm.policy import find
    from holdfast.longterm.retrieval import embed

    names = [name.strip() for name in policies.split(",") if name.strip()]
    if not names or budget < 1 or worlds < 1:
        raise UsageError(
            f"--policies {policies!r} must name one, --budget {budget} and --worlds {worlds} be "
            "at least 1"
        )
    for name in names:
        find(name)
    rows: list[dict[str, Any]] = []
    made = [teafarm.world(number) for number in range(seed, seed + worlds)]
    reader = embed.find(embedder)
    total = len(names) * sum(len(one.questions) for one in made)
    with cli.stdout_is_json(json), bar("teafarm", total) as advance:
        for name in names:
            shares = []
            for one in made:
                with teafarm.lived(one, name, reader) as memory:
                    shares.append(teafarm.refuted(memory, one, budget, advance))
            rows.append({"policy": name, "refuted": mean(shares)})
    if json:
        found = {"probe": "teafarm", "questions": total // len(names), "budget": budget}
        cli.print_json(found | {"embedder": reader.id, "rows": rows})
        return
    print(f"{total // len(names)} questions with a false premise, contexts of {budget} words")
    _table(["policy", "refuted"], [[r["policy"], f"{r['refuted']:.0%}"] for r in rows])


# Name -> what `holdfast probe NAME` runs.
PROBES: dict[str, Callable[..., None]] = {
    "data-pruning": data_pruning,
    "memory-structure": memory_structure,
    "position-loss": position_loss,
    "shrink": shrink,
    "teafarm": teafarm,
}

app = typer.Typer(
    help="Measure what keeping less does to data or a model.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
for _name, _probe in PROBES.items():
    app.command(_name)(_probe)


def _numbers(option: str, text: str, kind: type, least: float | None = None) -> list:
    """Numbers above 0, or from `least` on."""
    try:
        found = [kind(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or (min(found) <= 0 if least is None else min(found) < least):
        what = "whole numbers" if kind is int else "numbers"
        what = f"positive {what}" if least is None else f"{what} from {least:g} on"
        raise UsageError(f"{option} {text!r}: expected {what} with commas between them")
    return found


def _table(heads: list[str], rows: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    for row in (heads, *rows):
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )
