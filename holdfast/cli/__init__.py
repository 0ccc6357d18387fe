"""The `holdfast` command. One file per verb, imported only when the verb is used or listed.

A verb is one line of `COMMANDS`. Its target is a function, whose docstring is the help and ends
with an example, or a `typer.Typer` for a noun with verbs under it. Command files import torch
inside functions only, so that `holdfast --help` and `holdfast systems` answer at once.
"""

import contextlib
import importlib
import json
import sys
from collections.abc import Iterator
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from holdfast import __version__
from holdfast.errors import HoldfastError, unknown

COMMANDS = {
    "fit": "holdfast.cli.fit:fit",
    "train": "holdfast.cli.train:train",
    "compare": "holdfast.cli.compare:compare",
    "chat": "holdfast.cli.chat:chat",
    "serve": "holdfast.cli.serve:serve",
    "cache": "holdfast.cli.cache:app",
    "memory": "holdfast.cli.memory:app",
    "plan": "holdfast.cli.plan:app",
    "hw": "holdfast.cli.hw:app",
    "probe": "holdfast.cli.probe:app",
    "port-c": "holdfast.cli.port_c:port_c",
    "systems": "holdfast.cli.systems:systems",
    "check": "holdfast.cli.check:check",
    "doctor": "holdfast.cli.doctor:doctor",
}


class _Verbs(TyperGroup):
    """The verbs of `COMMANDS`, each imported at its first use."""

    def list_commands(self, ctx):
        return list(COMMANDS)

    def get_command(self, ctx, cmd_name):
        if cmd_name not in COMMANDS:
            raise unknown("command", cmd_name, COMMANDS)
        module, _, attribute = COMMANDS[cmd_name].partition(":")
        target = getattr(importlib.import_module(module), attribute)
        if not isinstance(target, typer.Typer):
            # Plain help: the rich one reads [--json] in a docstring as markup.
            app = typer.Typer(add_completion=False, rich_markup_mode=None)
            app.command(cmd_name)(target)
            target = app
        return typer.main.get_command(target)


app = typer.Typer(cls=_Verbs, add_completion=False, rich_markup_mode=None, no_args_is_help=True)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"holdfast {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Say what fits a memory budget, run it within the budget, prove it by measurement.

    Exit codes: 0 done; 1 failed; 2 bad usage or input; 3 does not fit; 4 ran but exceeded the plan.
    """


def group() -> TyperGroup:
    """The whole command line, as what typer runs."""
    return typer.main.get_group(app)


def main(args: list[str] | None = None) -> NoReturn:
    """Run the command line and exit; what a user can act on is one message, never a traceback."""
    try:
        group().main(args=args, prog_name="holdfast")
    except HoldfastError as error:
        print(f"holdfast: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    raise AssertionError("typer exits by itself")


def print_json(document: Any) -> None:
    """The one JSON document of a command under `--json`; refuses NaN, which is not JSON."""
    print(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False))


@contextlib.contextmanager
def stdout_is_json(wanted: bool) -> Iterator[None]:
    """While `wanted`, send what libraries print to stderr; stdout is for `print_json` alone."""
    with contextlib.redirect_stdout(sys.stderr) if wanted else contextlib.nullcontext():
        yield
