"""Lengths of a program's arrays, read off what the program does with them."""

import re
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

from pycparser import c_ast

from holdfast.longterm.c.expressions import (
    constant,
    names,
    number,
    plus,
    split,
    substitute,
    text,
)
from holdfast.longterm.c.facts import ARRAY, TEXT, Program
from holdfast.longterm.c.library import ALLOCATES
from holdfast.longterm.c.names import Variable
from holdfast.longterm.tasks import TaskGraph

_LENGTH = re.compile(
    r"(?:\w+_)?(?:n|len|length|size|count|num|cnt|cap|capacity)|[nk]_\w+|num_\w+", re.I
)
_INTEGER = re.compile(r"int|long|short|unsigned")
_BYTES = {"char", "signed char", "unsigned char", "void"}


class Bounds(NamedTuple):
    """`count(e)`, `byte_count(e)` or `bounds(l, u)`, and the rule or model it comes from."""

    form: str
    args: tuple[str, ...]
    source: str

    def __str__(self) -> str:
        return f"{self.form}({', '.join(self.args)})"


class Inference:
    """Bounds of all pointers of a program that are indexed or moved; `found` holds them by key."""

    def __init__(self, program: Program):
        self.program = program
        self.found: dict[str, Bounds] = {}
        self._trees: dict[str, c_ast.Node] = {}
        self._sized = defaultdict(list)
        for key, owner, size in program.sized:
            self._sized[key].append((owner, size))
        self._passed = defaultdict(list)
        for name, sites in program.sites.items():
            for owner, call in sites:
                for key, arg in zip(program.parameters[name], call.args.exprs, strict=False):
                    if (source := program.ref(arg, owner)) and isinstance(arg, c_ast.ID):
                        self._passed[source[0]].append((name, key, call))
        self._copied = defaultdict(list)
        for key, values in program.values.items():
            for owner, value in values:
                source = program.ref(value, owner) if isinstance(value, c_ast.ID) else None
                if source and program.variables[key].owner == owner:
                    self._copied[source[0]].append(key)
        owned = defaultdict(list)
        for variable in program.variables.values():
            owned[variable.owner].append(variable)
        structs = [v for v in program.variables.values() if v.role in ("field", "global")]
        functions = TaskGraph({name: program.calls[name] for name in program.functions})
        callees_first = [name for group in functions.order() for name in group]
        # Fields first, as functions read them; again at the end for what functions allocate.
        for group in (structs, *map(owned.__getitem__, callees_first), structs):
            for _ in range(2):
                for variable in group:
                    self._find(variable)

    def _find(self, variable: Variable) -> None:
        key, program = variable.key, self.program
        kind = program.need.get((key, 0), 0)
        if variable.role == "return" and not kind and key not in self.found:
            # An array that is made and given away stays one, if its length can be said.
            if self._one(variable, [c for c in self._values(variable) if c is not None]) is None:
                return
            sources = [program.ref(value, variable.owner) for _, value in program.values[key]]
            if any(s and program.need.get(s) == ARRAY for s in sources):
                kind = program.need[key, 0] = ARRAY
        if key in self.found or key in program.wild or variable.levels[:1] != ["*"] or not kind:
            return
        if variable.moved:
            ends = [
                end for end in program.ends[key]
                if (one := program.scope(end, variable.owner)) and one.levels[:1] == ["*"]
                and self._fits(variable, c_ast.ID(end)) is not None
            ]  # fmt: skip
            if kind == ARRAY and len(ends) == 1:
                self.found[key] = Bounds("bounds", (variable.name, ends[0]), "end")
            elif kind == TEXT:
                self.found[key] = Bounds("count", ("0",), "text")
            return
        rules = (
            [("value", self._values)]
            if kind == TEXT
            else [
                ("value", self._values), ("loop", self._indexed), ("library", self._library),
                ("callee", self._callees), ("name", self._beside), ("index", self._constants),
            ]
        )  # fmt: skip
        for source, rule in rules:
            candidates = [c for c in rule(variable) if c is not None]
            tree = self._one(variable, candidates)
            if tree is not None:
                if kind == TEXT:
                    tree = plus(tree, -1)
                self._trees[key] = tree
                self.found[key] = Bounds("count", (text(tree),), source)
                return
        if kind == TEXT:
            # A terminated array of unknown length may be read up to its terminator.
            self.found[key] = Bounds("count", ("0",), "text")

    def _one(self, variable: Variable, candidates: list[c_ast.Node]) -> c_ast.Node | None:
        """What all candidates agree on, the largest of those that differ by a number."""
        bases = {}
        for candidate in candidates:
            here = self._fits(variable, candidate)
            if here is None:
                continue
            base, offset = split(here)
            name = text(base) if base is not None else ""
            bases[name] = max(bases.get(name, (offset, here)), (offset, here), key=lambda x: x[0])
        if len(bases) > 1:
            bases.pop("", None)
        return next(iter(bases.values()))[1] if len(bases) == 1 else None

    # Rules: each gives candidates as trees in the scope of the variable's owner.

    def _values(self, variable: Variable) -> Iterator[c_ast.Node | None]:
        if variable.role == "param":
            if variable.name == "argv" and variable.owner == "main":
                yield c_ast.ID(self.program.variables["main(0)"].name)
            elif isinstance(variable.type, c_ast.ArrayDecl) and variable.type.dim is not None:
                yield variable.type.dim
            return
        lengths = []
        for owner, value in self.program.values[variable.key]:
            length = self.length(value, owner)
            if length is None and not self._nothing(value):
                return
            if length is not None:
                lengths.append(self._local(variable, length, owner))
        if all(length is not None for length in lengths):
            distinct = {text(length) for length in lengths}
            # One place's number says nothing of the other structs of this type.
            if len(distinct) == 1 and (variable.role != "field" or number(lengths[0]) is None):
                yield lengths[0]

    @staticmethod
    def _nothing(value: c_ast.Node) -> bool:
        return text(value) in ("0", "NULL", "(void *) 0")

    def _indexed(self, variable: Variable) -> Iterator[c_ast.Node | None]:
        reaches = [
            (use, _reach(use.index, use.limits)) for use in self.program.uses.get(variable.key, ())
        ]
        # Where one index may be anything, the limits of the others do not bound the array.
        if all(reach is not None for _, reach in reaches):
            for use, reach in reaches:
                if not isinstance(use.index, c_ast.Constant):
                    yield self._local(variable, reach, use.owner)

    def _library(self, variable: Variable) -> Iterator[c_ast.Node | None]:
        for owner, size in self._sized[variable.key]:
            count = _elements(size, self.program.at((variable.key, 1)))
            if count is not None:
                yield self._local(variable, count, owner)

    def _callees(self, variable: Variable) -> Iterator[c_ast.Node | None]:
        for name, key, call in self._passed[variable.key]:
            tree = self._trees.get(key)
            if tree is not None:
                args = dict(zip(self._formals(name), call.args.exprs, strict=False))
                yield self._local(variable, substitute(tree, args), variable.owner)
        for key in self._copied[variable.key]:
            yield self._trees.get(key)

    def _beside(self, variable: Variable) -> Iterator[c_ast.Node | None]:
        if variable.role not in ("param", "field"):
            return
        beside = [
            other.name
            for other in self.program.beside(variable)
            if not other.levels
            and _LENGTH.fullmatch(other.name or "")
            and _INTEGER.search(self.program.shape(other.type))
        ]
        own = [n for n in beside if n.startswith((f"{variable.name}_", f"n_{variable.name}"))]
        if len(own) == 1 or len(beside) == 1:
            yield c_ast.ID((own or beside)[0])

    def _constants(self, variable: Variable) -> Iterator[c_ast.Node | None]:
        indices = [number(use.index) for use in self.program.uses.get(variable.key, ())]
        if indices and None not in indices:
            yield constant(max(indices) + 1)

    # Lengths of values, and their way into another scope.

    def length(self, e: c_ast.Node, owner: str) -> c_ast.Node | None:
        """How many elements an expression points to, in the scope of `owner`, where it is known."""
        program = self.program
        if isinstance(e, c_ast.Cast):
            return self.length(e.expr, owner)
        if isinstance(e, c_ast.Constant) and e.type == "string":
            return constant(len(re.sub(r"\\(x[0-9a-fA-F]+|[0-7]{1,3}|.)", "x", e.value[1:-1])) + 1)
        if isinstance(e, c_ast.UnaryOp) and e.op == "&" and not isinstance(e.expr, c_ast.ArrayRef):
            return constant(1)
        if isinstance(e, c_ast.FuncCall) and isinstance(e.name, c_ast.ID):
            args = e.args.exprs if e.args else []
            if e.name.name in ALLOCATES:
                if e.name.name == "calloc":
                    return args[0]
                return _elements(args[-1], None)
            tree = self._trees.get(f"{e.name.name}()")
            if tree is not None:
                extra = program.need.get((f"{e.name.name}()", 0)) == TEXT
                return plus(
                    substitute(tree, dict(zip(self._formals(e.name.name), args, strict=False))),
                    int(extra),
                )
            return None
        found = program.ref(e, owner)
        if found is None or found[1] or not isinstance(e, c_ast.ID | c_ast.StructRef):
            return None
        variable = program.variables[found[0]]
        if variable.levels[0] == "[]":
            return variable.type.dim
        tree = self._trees.get(variable.key)
        if tree is None:
            return None
        if isinstance(e, c_ast.StructRef):
            inside = {n: c_ast.StructRef(e.name, e.type, c_ast.ID(n)) for n in names(tree)}
            tree = substitute(tree, inside)
        return plus(tree, int(program.need.get((variable.key, 0)) == TEXT))

    def _formals(self, name: str) -> list[str]:
        variables = self.program.variables
        return [variables[key].name for key in self.program.parameters[name]]

    def _local(self, variable: Variable, e: c_ast.Node, owner: str) -> c_ast.Node | None:
        """An expression of a function, said with the fields that stand beside a field."""
        if variable.role != "field":
            return e if variable.role == "global" or owner == variable.owner else None
        program, siblings = self.program, {}
        for other in program.beside(variable):
            for where, value in program.values[other.key]:
                if where == owner and not isinstance(value, c_ast.Constant):
                    siblings[text(value)] = other.name

        def rewrite(node: c_ast.Node) -> c_ast.Node:
            if isinstance(node, c_ast.StructRef):
                found = program.field_of(node, owner)
                if found and found.owner == variable.owner:
                    return c_ast.ID(found.name)
            if text(node) in siblings:
                return c_ast.ID(siblings[text(node)])
            if isinstance(node, c_ast.BinaryOp):
                return c_ast.BinaryOp(node.op, rewrite(node.left), rewrite(node.right))
            return node

        return rewrite(e)

    def _fits(self, variable: Variable, e: c_ast.Node, depth: int = 0) -> c_ast.Node | None:
        """The expression if it can stand in the declaration, copies of other names undone."""
        program, values = self.program, {}
        if depth > 3 or any(
            isinstance(node, c_ast.FuncCall | c_ast.StructRef | c_ast.ArrayRef | c_ast.Assignment)
            for node in _below(e)
        ):
            return None
        for name in names(e) - program.constants:
            other = program.scope(name, variable.owner)
            if other is None or other.twice:
                return None
            if program.steady(other, variable):
                continue
            if other.role != "local" or other.initial is None or other.changes:
                return None
            values[name] = other.initial
        return self._fits(variable, substitute(e, values), depth + 1) if values else e


def _below(e: c_ast.Node) -> Iterator[c_ast.Node]:
    yield e
    for _, child in e.children():
        yield from _below(child)


def _elements(size: c_ast.Node, element: str | None) -> c_ast.Node | None:
    """A number of bytes as a number of elements: `n * sizeof(T)` is n."""
    if isinstance(size, c_ast.BinaryOp) and size.op == "*":
        for one, other in ((size.left, size.right), (size.right, size.left)):
            if isinstance(one, c_ast.UnaryOp) and one.op == "sizeof":
                return other
            inner = _elements(one, "struct")
            if inner is not None:
                return c_ast.BinaryOp("*", inner, other)
    if isinstance(size, c_ast.UnaryOp) and size.op == "sizeof":
        return constant(1)
    return size if element is None or element in _BYTES else None


def _reach(index: c_ast.Node, limits: dict[str, c_ast.Node]) -> c_ast.Node | None:
    """One more than the highest value of an index under these limits."""
    if (value := number(index)) is not None:
        return constant(value + 1) if value >= 0 else None
    base, offset = split(index)
    if isinstance(base, c_ast.ID) and base.name in limits:
        return plus(limits[base.name], max(offset, 0))
    # Rows of a matrix: i * columns + j with j below columns.
    if isinstance(index, c_ast.BinaryOp) and index.op == "+":
        for row, column in ((index.left, index.right), (index.right, index.left)):
            if isinstance(row, c_ast.BinaryOp) and row.op == "*":
                width = limits.get(getattr(column, "name", None))
                for i, w in ((row.left, row.right), (row.right, row.left)):
                    rows = limits.get(getattr(i, "name", None))
                    if width is not None and rows is not None and text(w) == text(width):
                        return c_ast.BinaryOp("*", rows, width)
    return None
