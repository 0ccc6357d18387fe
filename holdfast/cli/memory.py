"""`holdfast memory`: what agents remember, in one file."""

import typer

from holdfast.cli import (
    memory_compare,
    memory_file,
    memory_mcp,
    memory_read,
    memory_table,
    memory_write,
)

app = typer.Typer(
    help="Long-term memory of agents: add, search, correct, forget, serve.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)

_VERBS = {
    "add": memory_write.add,
    "search": memory_read.search,
    "context": memory_read.context,
    "ask": memory_read.ask,
    "show": memory_read.show,
    "history": memory_read.history,
    "update": memory_write.update,
    "delete": memory_write.delete,
    "forget": memory_write.forget,
    "purge": memory_write.purge,
    "export": memory_file.export,
    "import": memory_file.import_,
    "backup": memory_file.backup,
    "verify": memory_file.verify,
    "reembed": memory_file.reembed,
    "stats": memory_file.stats,
    "spaces": memory_file.spaces,
    "policies": memory_read.policies,
    "table": memory_table.table,
    "compare": memory_compare.compare,
    "serve": memory_file.serve,
    "mcp": memory_mcp.mcp,
}
for _name, _verb in _VERBS.items():
    app.command(_name)(_verb)
