"""Verbs of `holdfast memory` that read."""

import json as json_
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from holdfast import cli
from holdfast.cli.memory_options import (
    Filter,
    Id,
    Json,
    Kind,
    Limit,
    Recorded,
    Valid,
    moment,
    opens,
    pairs,
    safe,
)
from holdfast.errors import UsageError

if TYPE_CHECKING:
    from holdfast.longterm.memory import Memory
    from holdfast.longterm.records import Item


@opens
def search(
    memory: "Memory",
    query: Annotated[str, typer.Argument(help="A question, or words.")],
    limit: Limit = 10,
    filter: Filter = None,
    kind: Kind = None,
    valid: Valid = None,
    recorded: Recorded = None,
    explain: Annotated[bool, typer.Option(help="Show what each score is made of.")] = False,
    json: Json = False,
) -> None:
    """Find the memories that answer a question, best first.

    Example: holdfast memory search notes.memory "Where does Ann live?" --user ann
    """
    from holdfast.longterm.service.plain import plain

    hits = memory.search(
        query, limit=limit, filters=pairs(filter, "--filter") or None, kinds=kind,
        valid=moment(valid, "--valid"), recorded=moment(recorded, "--recorded"),
    )  # fmt: skip
    if json:
        cli.print_json(plain(hits))
        return
    for hit in hits:
        print(f"{hit.score:6.3f}  {hit.id}  {_said(hit.speaker, hit.text, hit.valid_from)}")
        if explain:
            for name, value in sorted(hit.terms.items(), key=lambda term: -abs(term[1])):
                if value:
                    print(f"{'':8}{name:<12} {value:+.3f} {'#' * round(20 * abs(value))}")


def _said(speaker: str | None, text: str, when: Any, until: Any = None) -> str:
    times = f"{when:%Y-%m-%d}" if when else ""
    times += f" to {until:%Y-%m-%d}" if until else ""
    who = f"{safe(speaker)}: " if speaker else ""
    return f"{times}  {who}{safe(text, ' ' * 8)}".strip()


@opens
def context(
    memory: "Memory",
    query: Annotated[str, typer.Argument(help="What the prompt is about.")],
    budget: Annotated[int, typer.Option(min=0, help="Tokens at most: words and marks.")] = 1000,
    json: Json = False,
) -> None:
    """Memories for a prompt, as one text within a budget.

    Example: holdfast memory context notes.memory "plan Ann's move" --budget 500 --user ann
    """
    from holdfast.longterm.service.plain import plain

    made = memory.context(query, budget)
    if json:
        cli.print_json(plain(made))
    else:
        print(safe(made.text))


@opens
def ask(
    memory: "Memory",
    question: Annotated[str, typer.Argument(help="What is to be answered.")],
    limit: Limit = 10,
    abstain: Annotated[
        bool, typer.Option(help="Say so where nothing found covers the question.")
    ] = True,
    json: Json = False,
) -> None:
    """Answer a question from memory and cite what supports the answer.

    With --llm a model answers from what was found; without, the best sentence does. Each claim of
    the answer is checked, and names the memory and the bytes that support it.

    Example: holdfast memory ask notes.memory "Where does Ann live?" --user ann
    """
    from holdfast.longterm.service.plain import plain

    answer = memory.ask(question, abstain=abstain, limit=limit)
    if json:
        cli.print_json(plain(answer))
        return
    print(safe(answer.text))
    for claim in answer.grounding.claims if answer.grounding is not None else ():
        for cited in claim.citations:
            print(f"    {cited.uri} bytes {cited.start}-{cited.end}")
        if not claim.supported:
            print(f"    unsupported: {safe(claim.text)} ({claim.reason})")


@opens
def show(
    memory: "Memory",
    id: Annotated[str | None, typer.Argument(help="One memory [default: a page of all].")] = None,
    limit: Limit = 100,
    after: Annotated[int, typer.Option(help="Go on after this position.")] = 0,
    newest: Annotated[bool, typer.Option(help="Newest first.")] = False,
    kind: Annotated[str | None, typer.Option(help="Only of this kind.")] = None,
    session: Annotated[str | None, typer.Option(help="Only of this conversation.")] = None,
    filter: Filter = None,
    valid: Valid = None,
    recorded: Recorded = None,
    json: Json = False,
) -> None:
    """Show one memory, or list them page by page.

    With --valid or --recorded: what held then, as this memory knew it then.

    Example: holdfast memory show notes.memory --user ann --newest --limit 20
    """
    from holdfast.longterm.service.plain import plain

    if id is not None:
        item = memory.get(id)
        if item is None:
            raise UsageError(
                f"there is no memory {id} now in space {str(memory.space)!r}; `holdfast memory "
                "history` shows what became of it, --user names another space"
            )
        _show(item, json)
        return
    page = {
        "kind": kind, "session": session, "filters": pairs(filter, "--filter") or None,
        "limit": limit, "after": after, "newest": newest,
    }  # fmt: skip
    if valid is not None or recorded is not None:
        items = memory.as_of(moment(valid, "--valid"), moment(recorded, "--recorded"), **page)
    else:
        items = memory.get_all(**page)
    following = items[-1].position if len(items) == limit else None
    if json:
        cli.print_json({"memories": plain(items), "next": following})
        return
    for item in items:
        print(f"{item.id}  {_said(item.speaker, item.text, item.valid_from, item.valid_to)}")
    if following is not None:
        print(f"more: --after {following}", file=sys.stderr)


def _show(item: "Item", json: bool) -> None:
    from holdfast.longterm.service.plain import plain

    document = plain(item)
    if json:
        cli.print_json(document)
        return
    for name, value in document.items():
        if value not in (None, {}, ""):
            text = value if isinstance(value, str) else json_.dumps(value, ensure_ascii=False)
            print(f"{name:<12} {safe(text, ' ' * 13)}")


@opens
def history(memory: "Memory", id: Id, json: Json = False) -> None:
    """All that happened to a memory, gone ones too.

    Example: holdfast memory history notes.memory m0123456789abcdef0123 --user ann
    """
    from holdfast.longterm.service.plain import plain

    events = memory.history(id)
    if not events:
        raise UsageError(
            f"there never was a memory {id} in space {str(memory.space)!r}; --user names another"
        )
    if json:
        cli.print_json(plain(events))
        return
    for event in events:
        text = (event.after or {}).get("text") or ""
        why = f" ({safe(event.why)})" if event.why else ""
        print(f"{event.time:%Y-%m-%d %H:%M:%S}  {event.op:<7} by {safe(event.actor)}{why}"
              f"  {safe(text, ' ' * 8)}".rstrip())  # fmt: skip


def policies(json: Json = False) -> None:
    """List what may decide what is kept and recalled.

    Example: holdfast memory policies
    """
    import inspect

    from holdfast.longterm.policy import policies as known
    from holdfast.longterm.service.plain import plain

    rows = []
    for name, cls in known().items():
        options = {
            option: None if parameter.default is parameter.empty else parameter.default
            for option, parameter in inspect.signature(cls).parameters.items()
        }
        rows.append({
            "name": name, "what": inspect.cleandoc(cls.__doc__ or "").splitlines()[0],
            "options": {o: _plain(v) for o, v in options.items()}, "traits": plain(cls.traits),
        })  # fmt: skip
    if json:
        cli.print_json(rows)
        return
    for row in rows:
        print(f"{row['name']:<16} {row['what']}")
        given = ", ".join(f"{option}={value}" for option, value in row["options"].items())
        if given:
            print(f"{'':<16} {given}")


def _plain(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | str | None) else repr(value)
