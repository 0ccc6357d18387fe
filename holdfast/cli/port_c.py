"""`holdfast port-c`: a C program with checked pointers, its text otherwise as it was."""

import os
from pathlib import Path
from typing import Annotated

import typer

from holdfast import cli
from holdfast.errors import UsageError, unknown


def port_c(
    source: Annotated[Path, typer.Argument(help="A C file, or the directory of one program.")],
    to: Annotated[str, typer.Option(help="The dialect: checkedc.")] = "checkedc",
    out: Annotated[
        Path | None, typer.Option(help="Directory to write [default: SOURCE.checkedc].")
    ] = None,
    include: Annotated[
        list[Path] | None, typer.Option(help="Directory of headers; may be repeated.")
    ] = None,
    llm: Annotated[
        str | None,
        typer.Option(
            help="OpenAI-compatible address that bounds are asked of; key: $HOLDFAST_LLM_KEY."
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="The model's name there.")] = None,
    budget: Annotated[int, typer.Option(help="Most bytes of one prompt.")] = 8192,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Port a C program to Checked C, in its own text.

    The same command again asks a model only what it has not answered yet.

    Example: holdfast port-c src/ --to checkedc --out ported/
    """
    from holdfast.files import write_text
    from holdfast.longterm.language.llm import OpenAI
    from holdfast.longterm.tasks import FactStore

    try:
        from holdfast.longterm.checkedc import port
    except ImportError as error:
        raise UsageError(
            f"porting needs the package {error.name}; install it: pip install 'holdfast[memory]'"
        ) from error
    if to != "checkedc":
        raise unknown("dialect", to, ["checkedc"])
    if (llm is None) != (model is None):
        raise UsageError("--llm and --model go together: where a model is, and its name there")
    if source.is_dir():
        paths = sorted(p for suffix in ("*.c", "*.h") for p in source.rglob(suffix))
        root = source
    else:
        paths, root = [source], source.parent
    target = out or source.with_name(f"{source.name}.checkedc")
    if target.exists() and not target.is_dir():
        raise UsageError(f"{target} exists and is no directory; name another one with --out")
    if target.resolve() in (root.resolve(), *root.resolve().parents):
        raise UsageError(f"{target} would replace the sources; name another directory with --out")
    store = None
    if llm:
        # What a model answered is worth keeping; rules alone are quick.
        target.mkdir(parents=True, exist_ok=True)
        store = FactStore(target / ".tasks.sqlite")
    with cli.stdout_is_json(json):
        done = port(
            paths,
            llm=OpenAI(llm, model, os.environ.get("HOLDFAST_LLM_KEY")) if llm and model else None,
            budget=budget,
            store=store,
            include=[*([source] if source.is_dir() else []), *(include or [])],
        )
    for path, text in done.files.items():
        write_text(target / Path(path).relative_to(root), text)
    if store is not None:
        store.close()
    facts = list(done.facts.values())
    unsafe = [fact for fact in facts if fact.status == "unsafe"]
    if json:
        cli.print_json(
            {
                "out": str(target),
                "files": len(done.files),
                "pointers": len(facts),
                "checked": len(facts) - len(unsafe),
                "calls": done.calls,
                "largest_prompt_bytes": done.prompt,
                "facts": [vars(fact) for fact in facts],
                "skipped": [one._asdict() for one in done.skipped],
            }
        )
        return
    for one in done.skipped:
        print(f"left untouched: {one}")
    for fact in unsafe:
        print(f"left plain: {fact.key}: {fact.reason}")
    print(
        f"{target}: {len(facts) - len(unsafe)} of {len(facts)} pointers checked in "
        f"{len(done.files)} file(s), {done.calls} calls of a model; no Checked C compiler was run"
    )
