"""Expressions of C: their text, substitution, sums, and the limits that conditions put on names."""

import copy
from collections.abc import Iterable, Mapping

from pycparser import c_ast, c_generator, c_parser

from holdfast.longterm.c.source import PRELUDE, walk

Limits = dict[str, c_ast.Node]

_TURNED = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}
_NEGATED = {"<": ">=", ">": "<=", "<=": ">", ">=": "<"}
_PURE = (c_ast.ID, c_ast.Constant, c_ast.BinaryOp, c_ast.UnaryOp, c_ast.Typename, c_ast.TypeDecl,
         c_ast.IdentifierType, c_ast.PtrDecl, c_ast.Struct)  # fmt: skip


def text(e: c_ast.Node) -> str:
    return c_generator.CGenerator(reduce_parentheses=True).visit(e)


def expression(source: str, typedefs: Iterable[str] = ()) -> c_ast.Node:
    """The tree of an expression without effects: names, numbers, arithmetic, sizeof.

    Raises:
        ValueError: it does not parse or does something else.
    """
    known = " ".join(f"typedef int {name};" for name in typedefs)
    try:
        tree = c_parser.CParser().parse(f"{PRELUDE} {known} int hf = (\n{source}\n);")
    except (c_parser.ParseError, RecursionError) as error:
        raise ValueError(f"{source!r} is not a C expression: {error}") from error
    last = tree.ext[-1]
    if not isinstance(last, c_ast.Decl) or last.name != "hf" or len(tree.ext) != _BEFORE + len(
        list(typedefs)
    ):  # fmt: skip
        raise ValueError(f"{source!r} is more than one expression")
    for node in walk(last.init):
        if not isinstance(node, _PURE) or (
            isinstance(node, c_ast.UnaryOp) and node.op not in ("-", "+", "sizeof")
        ):
            raise ValueError(
                f"{source!r} holds a {type(node).__name__}; bounds are made of names, numbers, "
                "+ - * / and sizeof"
            )
    return last.init


_BEFORE = len(c_parser.CParser().parse(f"{PRELUDE} int hf = 0;").ext)


def names(e: c_ast.Node) -> set[str]:
    return {node.name for node in walk(e) if isinstance(node, c_ast.ID)}


def number(e: c_ast.Node) -> int | None:
    """The value of a constant integer expression."""
    if isinstance(e, c_ast.Constant) and e.type != "string":
        try:
            return int(e.value.rstrip("uUlL"), 0)
        except ValueError:
            return ord(e.value[1]) if e.type == "char" and len(e.value) == 3 else None
    if isinstance(e, c_ast.UnaryOp) and e.op in ("-", "+") and (n := number(e.expr)) is not None:
        return -n if e.op == "-" else n
    if isinstance(e, c_ast.BinaryOp):
        left, right = number(e.left), number(e.right)
        if left is not None and right is not None and e.op in "+-*":
            return {"+": left + right, "-": left - right, "*": left * right}[e.op]
    return None


def constant(value: int) -> c_ast.Constant:
    return c_ast.Constant("int", str(value))


def split(e: c_ast.Node) -> tuple[c_ast.Node | None, int]:
    """An expression as another one and a number to add: `n - 1` is `n` and -1."""
    if (value := number(e)) is not None:
        return None, value
    if isinstance(e, c_ast.BinaryOp) and e.op in ("+", "-"):
        right, left = number(e.right), number(e.left)
        if right is not None:
            base, offset = split(e.left)
            return base, offset + (right if e.op == "+" else -right)
        if left is not None and e.op == "+":
            base, offset = split(e.right)
            return base, offset + left
    return e, 0


def plus(e: c_ast.Node, more: int) -> c_ast.Node:
    base, offset = split(e)
    offset += more
    if base is None:
        return constant(offset)
    if not offset:
        return base
    return c_ast.BinaryOp("+" if offset > 0 else "-", base, constant(abs(offset)))


def substitute(e: c_ast.Node, values: Mapping[str, c_ast.Node]) -> c_ast.Node:
    """A copy with names replaced."""
    if isinstance(e, c_ast.ID) and e.name in values:
        return values[e.name]
    twin = copy.copy(e)
    for slot, child in e.children():
        if "[" not in slot:
            setattr(twin, slot, substitute(child, values))
    return twin


def zero(e: c_ast.Node) -> bool:
    """0, NULL, '\\0', and casts of them."""
    if isinstance(e, c_ast.Cast):
        return zero(e.expr)
    if isinstance(e, c_ast.ID):
        return e.name == "NULL"
    return isinstance(e, c_ast.Constant) and e.value in ("0", "'\\0'")


def limits_of(condition: c_ast.Node, *, holds: bool = True) -> Limits:
    """Names and the value that each stays below while a condition holds, or does not."""
    if not isinstance(condition, c_ast.BinaryOp):
        if isinstance(condition, c_ast.UnaryOp) and condition.op == "!":
            return limits_of(condition.expr, holds=not holds)
        return {}
    if condition.op == ("&&" if holds else "||"):
        return limits_of(condition.left, holds=holds) | limits_of(condition.right, holds=holds)
    op = condition.op if holds else _NEGATED.get(condition.op)
    found = {}
    for name, op_, other in (
        (condition.left, op, condition.right),
        (condition.right, _TURNED.get(op or ""), condition.left),
    ):
        if op_ in ("<", "<="):
            base, offset = split(name)
            if isinstance(base, c_ast.ID):
                found[base.name] = plus(other, (op_ == "<=") - offset)
    return found


def descending(loop: c_ast.For) -> Limits:
    """`for (i = n - 1; ...; i--)`: i stays below n."""
    step = loop.next
    if not (isinstance(step, c_ast.UnaryOp) and step.op in ("--", "p--")):
        return {}
    first = loop.init
    if isinstance(first, c_ast.DeclList) and len(first.decls) == 1:
        first = first.decls[0]
        name, value = first.name, first.init
    elif isinstance(first, c_ast.Assignment) and isinstance(first.lvalue, c_ast.ID):
        name, value = first.lvalue.name, first.rvalue
    else:
        return {}
    return {name: plus(value, 1)} if getattr(step.expr, "name", None) == name and value else {}


def leaves(node: c_ast.Node) -> bool:
    """Whether a statement never goes on to the next one."""
    if isinstance(node, c_ast.Compound):
        return bool(node.block_items) and leaves(node.block_items[-1])
    if isinstance(node, c_ast.FuncCall):
        return getattr(node.name, "name", None) in ("abort", "exit")
    return isinstance(node, c_ast.Return | c_ast.Break | c_ast.Continue | c_ast.Goto)


def changed(node: c_ast.Node) -> set[str]:
    """Names that a statement assigns to."""
    found = set()
    for one in walk(node):
        target = (
            one.lvalue if isinstance(one, c_ast.Assignment)
            else one.expr if isinstance(one, c_ast.UnaryOp) and one.op in ("++", "--", "p++", "p--")
            else None
        )  # fmt: skip
        if isinstance(target, c_ast.ID):
            found.add(target.name)
    return found
