"""`holdfast systems`: the catalogue as a table, or one system as a card."""

import ast
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from holdfast import catalogue, checks
from holdfast.catalogue import System
from holdfast.cli import print_json
from holdfast.errors import UsageError, unknown


def systems(
    key: Annotated[
        str | None, typer.Argument(metavar="KEY|NUMBER", help="Show this one as a card.")
    ] = None,
    room: Annotated[
        str | None, typer.Option("--room", help=f"One of {', '.join(catalogue.ROOMS)}.")
    ] = None,
    status: Annotated[str | None, typer.Option("--status", help="works or planned.")] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print rows, or with KEY one card, as JSON.")
    ] = False,
) -> None:
    """List the catalogued systems, or show one as a card.

    A card says what the system keeps, how to call it, where it was published, and what its check
    has measured.

    \b
    Example:
      holdfast systems --room training --status works
      holdfast systems qgalore
    """
    if key is not None:
        if room or status:
            raise UsageError("KEY already names one system; leave --room and --status out")
        card = describe(catalogue.find(key))
        print_json(card) if json else _print_card(card)
        return
    for what, value, known in (
        ("room", room, catalogue.ROOMS),
        ("status", status, catalogue.STATUSES),
    ):
        if value is not None and value not in known:
            raise unknown(what, value, known)
    rows = [
        system
        for system in catalogue.systems()
        if room in (None, system.room) and status in (None, system.status)
    ]
    print_json([row.row() for row in rows]) if json else _print_table(rows)


def describe(system: System) -> dict[str, Any]:
    """The row, its paper, what its module says (read, not imported) and its last record."""
    card = system.row() | {"paper": system.paper, "doc": None, "public": []}
    if system.module_path.exists():
        tree = ast.parse(system.module_path.read_text(encoding="utf-8"))
        card["doc"] = ast.get_docstring(tree)
        card["public"] = [signature for node in tree.body for signature in _signature(node)]
    return card | {"record": catalogue.read_record(system.key)}


def _signature(node: ast.stmt) -> list[str]:
    """How to call a module's public class or function, as source text."""
    if not isinstance(node, ast.ClassDef | ast.FunctionDef) or node.name.startswith("_"):
        return []
    if isinstance(node, ast.FunctionDef):
        returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        return [f"{node.name}({ast.unparse(node.args)}){returns}"]
    inits = [
        item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__"
    ]
    if inits:
        arguments = inits[0].args
        (arguments.posonlyargs or arguments.args).pop(0)
        return [f"{node.name}({ast.unparse(arguments)})"]
    # A dataclass's arguments are its annotated fields.
    fields = [ast.unparse(item) for item in node.body if isinstance(item, ast.AnnAssign)]
    return [f"{node.name}({', '.join(fields)})"]


def _print_table(rows: list[System]) -> None:
    table = Table("no.", "key", "name", "room", "kind", "status", box=None, pad_edge=False)
    for s in rows:
        table.add_row(f"{s.number:03d}", s.key, escape(s.title), s.room, s.kind, s.status)
    console = Console(soft_wrap=False)
    console.print(table)
    works = sum(row.status == "works" for row in rows)
    console.print(f"{len(rows)} systems: {works} work, {len(rows) - works} planned", style="dim")


def _print_card(card: dict[str, Any]) -> None:
    lines = [f"{card['number']:03d} {card['title']} ({card['key']})"]
    lines += [f"{card['kind']} of the room {card['room']}; paper: {card['paper']}", ""]
    if card["status"] == "planned":
        lines += [f"Planned: not part of this version. It will live in {card['module']}.", ""]
    if card["doc"]:
        lines += [card["doc"], ""]
    if card["public"]:
        lines += [f"from {card['module']} import ...", *(f"  {s}" for s in card["public"]), ""]
    record = card["record"]
    if record:
        verdict = "passed" if record["passed"] else "FAILED"
        lines += [
            f"Check {verdict}: {record['claim']}",
            f"  measured   {checks.figures(record['measured'])}",
            f"  baseline   {checks.figures(record['baseline'])}",
            f"  threshold  {record['threshold']}",
            f"  {record['seconds']:.1f} s on {record['machine']['cpu']}, seed {record['seed']}",
        ]
    elif card["status"] == "works":
        lines += [f"No recorded check; run `holdfast check {card['key']} --write`."]
    print("\n".join(lines).rstrip())
