"""`holdfast memory compare`: every policy on the same conversations."""

from pathlib import Path
from typing import Annotated, Any

import typer

from holdfast import cli
from holdfast.cli.progress import bar


def compare(
    data: Annotated[Path, typer.Option(help="LoCoMo's file of conversations, or LongMemEval's.")],
    policy: Annotated[
        list[str] | None, typer.Option("--policy", help="Only these; repeatable [default: all].")
    ] = None,
    conversation: Annotated[
        list[str] | None, typer.Option("--conversation", help="Only these; repeatable.")
    ] = None,
    budgets: Annotated[str, typer.Option(help="Tokens of contexts, comma-separated.")] = (
        "500,1000,2000"
    ),
    embedder: Annotated[
        str | None, typer.Option(help="minilm, hash or openai:MODEL@URL [default: minilm].")
    ] = None,
    llm: Annotated[
        str | None, typer.Option(help="OpenAI-compatible address of a model for all policies.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="The language model's name.")] = None,
    out: Annotated[Path, typer.Option(help="Directory for plot and JSON.")] = Path("runs/memory"),
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Which policy finds the evidence for questions about long conversations, and at what cost.

    Recall of evidence among the first 5 to 50 turns and within contexts of so many tokens; bytes,
    milliseconds to add a turn and to search, calls of a language model. Encodings are kept for the
    next comparison, so that a command that was cut off soon catches up.

    Example: holdfast memory compare --data locomo5.json --policy hybrid --policy memorybank
    """
    import json as json_
    import os

    from holdfast import host
    from holdfast.errors import UsageError, unknown
    from holdfast.files import write_text
    from holdfast.longterm.evaluation import compare as comparison
    from holdfast.longterm.evaluation import locomo
    from holdfast.longterm.language.llm import OpenAI
    from holdfast.longterm.policy import policies
    from holdfast.longterm.retrieval import embed
    from holdfast.longterm.retrieval.encodings import Kept

    if (llm is None) != (model is None):
        raise UsageError("--llm URL and --model NAME go together; give both")
    known = policies()
    for name in policy or ():
        if name not in known:
            raise unknown("memory policy", name, known)
    try:
        sizes = [int(size) for size in budgets.split(",")]
    except ValueError:
        raise UsageError(f"--budgets {budgets}: write numbers such as 500,1000") from None
    conversations = locomo.load(data, conversation)
    names = {name: name for name in policy or known}
    chosen = embed.find(embedder) if embedder is not None else embed.default()
    kept = Kept(chosen, host.cache_dir() / "encodings.db")
    key = os.environ.get("HOLDFAST_LLM_KEY")
    with bar("conversations", len(names) * len(conversations)) as advance:
        rows = comparison.run(
            conversations, names, kept, budgets=sizes, progress=advance,
            llm=None if llm is None or model is None else lambda: OpenAI(llm, model, key),
        )  # fmt: skip
    document = {
        "conversations": [one.id for one in conversations], "embedder": chosen.id, "rows": rows,
    }  # fmt: skip
    write_text(out / "compare.json", json_.dumps(document, indent=2) + "\n")
    comparison.draw(rows, out / "compare.png")
    if json:
        cli.print_json(document)
    else:
        _show(rows, sizes)
        print(f"\n{out / 'compare.json'}, {out / 'compare.png'}")


def _show(rows: list[dict[str, Any]], sizes: list[int]) -> None:
    heads = {
        "recall@5": "@5", "recall@10": "@10", "recall@20": "@20",
        **{f"packed_{size}": f"{size}t" for size in sizes},
        "bytes_per_turn": "B/turn", "add_ms": "add ms", "search_ms": "find ms", "llm_calls": "LLM",
    }  # fmt: skip
    print(f"{'policy':<18}" + "".join(f"{head:>9}" for head in heads.values()))
    for row in rows:
        same = f"  same order as {row['identical_to']}" if row["identical_to"] else ""
        cells = "".join(f"{row[name]:>9.4g}" for name in heads)
        print(f"{row['policy']:<18}{cells}{same}")
