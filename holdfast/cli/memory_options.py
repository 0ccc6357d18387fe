"""What verbs of `holdfast memory` have in common: which file, whose memories, how it is opened."""

import functools
import inspect
import json
import sqlite3
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from holdfast.errors import HoldfastError, UsageError

if TYPE_CHECKING:
    from holdfast.longterm.language.llm import LLM
    from holdfast.longterm.memory import Memory

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Id = Annotated[str, typer.Argument(help="Id of a memory, as `search` and `show` print it.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done; do nothing.")]
Limit = Annotated[int, typer.Option(min=1, help="At most so many.")]
Metadata = Annotated[
    list[str] | None,
    typer.Option("--metadata", help="name=value to keep with it; JSON values; repeatable."),
]
Filter = Annotated[
    list[str] | None,
    typer.Option("--filter", help="Only with this metadata, name=value; repeatable."),
]
Kind = Annotated[list[str] | None, typer.Option(help="Only of this kind; repeatable.")]
Valid = Annotated[
    str | None, typer.Option(help="What held at this time, e.g. 2024-05-08T13:56:00+00:00.")
]
Recorded = Annotated[str | None, typer.Option(help="What this memory knew at this time.")]

_FILE = Annotated[str, typer.Argument(help="Memory file, or postgresql://user@host/database.")]
_SHARED: dict[str, tuple[Any, Any]] = {
    "user": (Annotated[str, typer.Option(help="Whose memories.")], ""),
    "agent": (Annotated[str, typer.Option(help="Which agent's memories.")], ""),
    "run": (Annotated[str, typer.Option(help="Which run's memories.")], ""),
    "tenant": (Annotated[str, typer.Option(help="Which tenant's memories.")], ""),
    "policy": (
        Annotated[str, typer.Option(help="What is kept and recalled; `holdfast memory policies`.")],
        "hybrid",
    ),
    "option": (
        Annotated[
            list[str] | None, typer.Option(help="Option of the policy, name=value; repeatable.")
        ],
        None,
    ),
    "embedder": (
        Annotated[
            str | None,
            typer.Option(help="minilm, hash or openai:MODEL@URL [default: the file's own]."),
        ],
        None,
    ),
    "llm": (
        Annotated[
            str | None,
            typer.Option(help="OpenAI-compatible address of a model; key: $HOLDFAST_LLM_KEY."),
        ],
        None,
    ),
    "model": (Annotated[str | None, typer.Option(help="The language model's name.")], None),
    "durability": (
        Annotated[
            str, typer.Option(help="full survives power loss, process the death of the process.")
        ],
        "full",
    ),
}  # fmt: skip


def opens(run: Callable | None = None, *, creates: bool = False) -> Callable:
    """Turn a function of an open memory into a verb that takes the memory's file and options.

    The function's first argument is the `Memory`, opened in the space of --user, --agent, --run
    and --tenant; its others become the verb's own.

    Args:
        creates: the file may be absent.
    """
    if run is None:
        return functools.partial(opens, creates=creates)
    own = list(inspect.signature(run).parameters.values())[1:]
    keyword = inspect.Parameter.KEYWORD_ONLY
    file = inspect.Parameter("file", keyword, annotation=_FILE)
    shared = [
        inspect.Parameter(name, keyword, default=default, annotation=annotation)
        for name, (annotation, default) in _SHARED.items()
    ]
    own = [parameter.replace(kind=keyword) for parameter in own]

    @functools.wraps(run)
    def verb(file: str, **given: Any) -> None:
        how = {name: given.pop(name) for name in _SHARED}
        absent = "://" not in file and not Path(file).exists() and file != ":memory:"
        if absent and not creates:
            raise UsageError(
                f"there is no memory {file}; `holdfast memory add {file} TEXT` makes one"
            )
        if absent and given.get("dry_run"):
            file = ":memory:"
        with opened(file, **how) as memory:
            run(memory, **given)

    verb.__signature__ = inspect.Signature([file, *own, *shared])  # type: ignore[attr-defined]
    verb.__annotations__ = {p.name: p.annotation for p in (file, *own, *shared)}
    return verb


@contextmanager
def opened(
    file: str,
    *,
    user: str = "",
    agent: str = "",
    run: str = "",
    tenant: str = "",
    policy: str = "hybrid",
    option: list[str] | None = None,
    embedder: str | None = None,
    llm: str | None = None,
    model: str | None = None,
    durability: str = "full",
) -> Iterator["Memory"]:
    """A memory as the command line's options describe it."""
    from holdfast.longterm.memory import Memory
    from holdfast.longterm.policy import find
    from holdfast.longterm.records import Space

    with warnings.catch_warnings():
        warnings.showwarning = _said  # type: ignore[assignment]
        try:
            with Memory(
                file, policy=find(policy, **pairs(option, "--option")), embedder=embedder,
                llm=_llm(llm, model), durability=durability, space=Space(tenant, user, agent, run),
            ) as memory:  # fmt: skip
                yield memory
        except UnicodeError as error:
            raise UsageError(f"the input is not text in UTF-8: {error}") from error
        except sqlite3.Error as error:
            raise HoldfastError(
                f"{file} cannot be used ({error}); `holdfast memory verify {file}` says what is "
                "wrong with it"
            ) from error


def _said(message: Any, *_: Any) -> None:
    print(f"holdfast: {message}", file=sys.stderr)


def _llm(url: str | None, model: str | None) -> "LLM | None":
    import os

    if url is None and model is None:
        return None
    if url is None or model is None:
        raise UsageError("--llm URL and --model NAME go together; give both")
    from holdfast.longterm.language.llm import OpenAI

    return OpenAI(url, model, os.environ.get("HOLDFAST_LLM_KEY"))


def pairs(texts: list[str] | None, option: str) -> dict[str, Any]:
    """Values by name from texts such as ["sinks=8"]; what is JSON becomes what it says."""
    found: dict[str, Any] = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise UsageError(f"{option} {text}: write name=value")
        try:
            found[name.strip()] = json.loads(value)
        except ValueError:
            found[name.strip()] = value
    return found


def moment(text: str | None, option: str) -> datetime | None:
    """A time with a zone from ISO 8601.

    Raises:
        UsageError: it is none, or has no zone.
    """
    if text is None:
        return None
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        time = None
    if time is None or time.utcoffset() is None:
        why = "is no time" if time is None else "has no time zone"
        raise UsageError(f"{option} {text!r} {why}; write it as 2024-05-08T13:56:00+00:00")
    return time


def safe(text: str, indent: str = "") -> str:
    """Text for a terminal: what a memory says must not move the cursor or change colours."""
    shown = "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in text)
    return shown.replace("\n", f"\n{indent}")
