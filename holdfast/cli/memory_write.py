"""Verbs of `holdfast memory` that change what is remembered."""

import json as json_
import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from holdfast import cli
from holdfast.cli.memory_options import DryRun, Id, Json, Metadata, moment, opens, pairs, safe
from holdfast.cli.progress import bar
from holdfast.errors import UsageError

if TYPE_CHECKING:
    from holdfast.longterm.memory import Memory

_BATCH = 64  # messages of --jsonl in one transaction
_Ids = Annotated[list[str], typer.Argument(help="Ids of memories.")]
_Why = Annotated[str, typer.Option(help="Noted in the history.")]


@opens(creates=True)
def add(
    memory: "Memory",
    text: Annotated[str | None, typer.Argument(help="What to remember; - reads it.")] = None,
    jsonl: Annotated[
        str | None,
        typer.Option(help="Messages, one JSON object with role and content a line; - reads them."),
    ] = None,
    session: Annotated[str | None, typer.Option(help="The conversation it belongs to.")] = None,
    speaker: Annotated[str | None, typer.Option(help="Who said it.")] = None,
    when: Annotated[
        str | None, typer.Option(help="When it held or was said, ISO 8601 [default: now].")
    ] = None,
    kind: Annotated[
        str | None, typer.Option(help="turn, fact or another [default: by what it is].")
    ] = None,
    metadata: Metadata = None,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Remember a text, a fact, or the messages of a conversation.

    What is known already is not stored twice, so that a command that was cut off can be given
    again.

    Example: holdfast memory add notes.memory "Ann moved to Bern in May." --user ann
    """
    from holdfast.longterm.store.maintain import rehearsal

    if (text is None) == (jsonl is None):
        raise UsageError("give a TEXT, - to read it from standard input, or --jsonl FILE")
    told = {
        "when": moment(when, "--when"), "session": session, "kind": kind,
        "metadata": pairs(metadata, "--metadata"),
    }  # fmt: skip
    ids: list[str] = []
    with rehearsal(memory) if dry_run else nullcontext() as would:
        if jsonl is not None:
            with bar("adding", None) as advance:
                lines = _messages(jsonl)
                while messages := list(islice(lines, _BATCH)):
                    try:
                        ids += memory.add(messages, **told)
                    except UsageError as error:
                        raise UsageError(
                            f"{jsonl}: {error} (in the {_BATCH} lines after {len(ids)} memories, "
                            "which are stored)"
                        ) from error
                    advance(len(messages))
        else:
            said = sys.stdin.read() if text == "-" else text
            ids = memory.add({"content": said, "speaker": speaker, "kind": kind or "fact"}
                             if speaker else said, **told)  # fmt: skip
    if would is not None:
        _say_would(would, json)
    elif json:
        cli.print_json({"ids": ids, "llm": memory.stats()["llm"]})
    else:
        print("\n".join(ids))
        _say_cost(memory)


def _messages(file: str) -> Iterator[Any]:
    source = nullcontext(sys.stdin) if file == "-" else _open(Path(file))
    with source as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                message = json_.loads(line)
            except ValueError as error:
                raise UsageError(f"{file}, line {number} is not JSON: {error}") from None
            if not isinstance(message, dict | str):
                raise UsageError(
                    f"{file}, line {number} is a {type(message).__name__}; write an object with "
                    "role and content, or a text"
                )
            yield message


def _open(file: Path) -> Any:
    try:
        return file.open(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error.strerror}") from None


def _say_would(would: list[dict[str, Any]], json: bool) -> None:
    if json:
        cli.print_json({"would": would})
        return
    for entry in would:
        print(f"would {entry['op']} {entry['id']}  {safe(entry['text'] or '', '    ')}".rstrip())
    print(f"would log {len(would)} changes; nothing was done", file=sys.stderr)


def _say_cost(memory: "Memory") -> None:
    if memory.llm is not None and (usage := memory.llm.usage).calls:
        print(
            f"{usage.calls} model calls, {usage.prompt_tokens} + {usage.completion_tokens} tokens, "
            f"cost {usage.cost:.4f}",
            file=sys.stderr,
        )


@opens
def update(
    memory: "Memory",
    id: Id,
    text: Annotated[str, typer.Argument(help="What it should say; - reads it.")],
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Correct a memory; what it said before stays in its history.

    Example: holdfast memory update notes.memory m0123456789abcdef0123 "Ann moved to Basel."
    """
    from holdfast.longterm.store.maintain import rehearsal

    with rehearsal(memory) if dry_run else nullcontext() as would:
        memory.update(id, sys.stdin.read() if text == "-" else text)
    _say_done(would, {"updated": [id]}, json)


def _say_done(would: list[dict[str, Any]] | None, done: dict[str, list[str]], json: bool) -> None:
    if would is not None:
        _say_would(would, json)
    elif json:
        cli.print_json(done)
    else:
        for what, ids in done.items():
            print("\n".join(f"{what} {id}" for id in ids) or f"{what} nothing")


@opens
def delete(
    memory: "Memory",
    ids: _Ids,
    why: _Why = "deleted",
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Retire memories; they stay in the history.

    They are no longer found; `purge` erases.

    Example: holdfast memory delete notes.memory m0123456789abcdef0123 --user ann
    """
    _retire(memory, ids, why, dry_run, json)


def _retire(memory: "Memory", ids: Iterable[str], why: str, dry_run: bool, json: bool) -> None:
    from holdfast.longterm.records import Retire
    from holdfast.longterm.store.maintain import rehearsal

    with rehearsal(memory) if dry_run else nullcontext() as would:
        done = memory.transact(lambda _: [Retire(id, why) for id in dict.fromkeys(ids)])
    _say_done(would, {"retired": done}, json)


@opens
def forget(
    memory: "Memory",
    ids: Annotated[
        list[str] | None, typer.Argument(help="These [default: those that the policy forgets].")
    ] = None,
    at: Annotated[
        str | None, typer.Option(help="As if it were this time, ISO 8601 [default: now].")
    ] = None,
    why: _Why = "forgotten",
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Retire what the policy forgets, or what is named.

    Example: holdfast memory forget notes.memory --user ann --dry-run
    """
    from holdfast.longterm.records import Retire
    from holdfast.longterm.store.maintain import rehearsal

    if ids:
        _retire(memory, ids, why, dry_run, json)
        return
    with rehearsal(memory) if dry_run else nullcontext() as would:
        changes = memory.forget(moment(at, "--at"))
    retired = [change.id for change in changes if isinstance(change, Retire)]
    _say_done(would, {"retired": retired}, json)


@opens
def purge(
    memory: "Memory",
    id: Id,
    why: _Why = "",
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Erase a memory and all that was made from it.

    Nothing of its text stays in the log or in the file.

    Example: holdfast memory purge notes.memory m0123456789abcdef0123 --user ann
    """
    from holdfast.longterm.store.maintain import rehearsal

    with rehearsal(memory) if dry_run else nullcontext() as would:
        gone = memory.purge(id, why=why)
    _say_done(would, {"purged": gone}, json)
