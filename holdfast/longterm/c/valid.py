"""Tests of bounds that somebody proposes for a pointer, before anything relies on them."""

from pycparser import c_ast

from holdfast.longterm.c.bounds import Bounds
from holdfast.longterm.c.expressions import expression, names, number, substitute
from holdfast.longterm.c.facts import Program
from holdfast.longterm.c.names import Variable


def valid(program: Program, variable: Variable, said: str) -> Bounds:
    """Bounds that a model gave, if they can stand in the declaration.

    Raises:
        ValueError: not bounds, a name out of scope or that changes, or less than what is used.
    """
    form, _, rest = said.strip().partition("(")
    form = form.strip()
    if form not in ("count", "byte_count", "bounds") or not rest.endswith(")"):
        raise ValueError(f"{said!r} is not count(e), byte_count(e) or bounds(low, high)")
    args = _arguments(rest[:-1])
    if len(args) != (2 if form == "bounds" else 1):
        raise ValueError(f"{said!r} has {len(args)} arguments")
    trees = [expression(arg, program.typedefs) for arg in args]
    for name in set().union(*map(names, trees)) - program.constants:
        other = program.scope(name, variable.owner)
        if other is None:
            raise ValueError(f"{name} is not in scope where {variable.name} is declared")
        if other.twice or (other is not variable and not program.steady(other, variable)):
            raise ValueError(f"{name} changes, or is declared later, than {variable.name}")
        if other.levels and form != "bounds":
            raise ValueError(f"{name} is a pointer, not a length")
    if variable.moved and not (form == "bounds" and args[0] == variable.name):
        raise ValueError(f"{variable.name} moves; only bounds({variable.name}, end) can follow it")
    if form == "count":
        _consistent(program, variable, trees[0])
    return Bounds(form, tuple(args), "model")


def _consistent(program: Program, variable: Variable, tree: c_ast.Node) -> None:
    """Against constant indices in the body, and arrays of known size at the calls."""
    value = number(tree)
    if value is not None:
        for use in program.uses.get(variable.key, ()):
            index = number(use.index)
            if index is not None and index >= value:
                raise ValueError(f"{variable.name}[{index}] is used, beyond count({value})")
    if variable.role != "param":
        return
    at = program.parameters[variable.owner].index(variable.key)
    formals = [program.variables[key].name for key in program.parameters[variable.owner]]
    for owner, call in program.sites.get(variable.owner, ()):
        args = call.args.exprs
        wanted = number(substitute(tree, dict(zip(formals, args, strict=False))))
        given = program.ref(args[at], owner)
        other = program.variables[given[0]] if given and not given[1] else None
        if wanted is None or other is None or not isinstance(args[at], c_ast.ID):
            continue
        has = number(other.type.dim) if isinstance(other.type, c_ast.ArrayDecl) and (
            other.type.dim is not None) else None  # fmt: skip
        if has is not None and wanted > has:
            raise ValueError(
                f"a call in {owner} gives {other.name}[{has}], bounds ask for {wanted}"
            )


def _arguments(text: str) -> list[str]:
    parts, depth, start = [], 0, 0
    for index, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if letter == "," and not depth:
            parts.append(text[start:index].strip())
            start = index + 1
    return [*parts, text[start:].strip()]
