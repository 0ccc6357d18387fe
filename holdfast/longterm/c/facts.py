"""What the uses of a C program's pointers ask of them: kinds, and what is unsafe.

A pointer starts as a pointer to one thing. Being indexed or moved makes it an array, being read as
text makes it a terminated array, and what flows into it must be at least that; a cast, a union or
code that is not here makes it, and all that exchange values with it, unsafe.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from pycparser import c_ast

from holdfast.longterm.c.expressions import (
    Limits,
    changed,
    descending,
    leaves,
    limits_of,
    zero,
)
from holdfast.longterm.c.library import BLIND, GIVES_TEXT, LIBRARY, SIZED, TEXT_AT
from holdfast.longterm.c.names import Names, place
from holdfast.longterm.c.source import Unit, walk

PTR, ARRAY, TEXT = 0, 1, 2


class Use(NamedTuple):
    """An index of a pointer in the function `owner`, and what names stay below there."""

    owner: str
    index: c_ast.Node
    limits: Limits


class Program(Names):
    """The names of all units, and the constraints that their uses put on pointers.

    `need` is the kind asked of (key, level); `wild` says why a variable is unsafe.
    """

    def __init__(self, units: Iterable[Unit]):
        super().__init__(units)
        self.need: dict[tuple[str, int], int] = defaultdict(int)
        self.flows: list[tuple[tuple[str, int], tuple[str, int]]] = []
        self.linked: dict[str, set[str]] = defaultdict(set)
        self.calls: dict[str, set[str]] = defaultdict(set)
        self.sites: dict[str, list[tuple[str, c_ast.FuncCall]]] = defaultdict(list)
        self.values: dict[str, list[tuple[str, c_ast.Node]]] = defaultdict(list)
        self.uses: dict[str, list[Use]] = defaultdict(list)
        self.sized: list[tuple[str, str, c_ast.Node]] = []
        self.ends: dict[str, set[str]] = defaultdict(set)
        self._here = ""
        for variable in self.variables.values():
            # Arrays given as parameters are pointers that somebody indexes.
            if variable.role == "param" and isinstance(variable.type, c_ast.ArrayDecl):
                self.need[variable.key, 0] = ARRAY
        for unit in self.units:
            for item in unit.tree.ext:
                if isinstance(item, c_ast.FuncDef):
                    # A header's function is in several units, and read once.
                    if self.functions[item.decl.name] is item:
                        self._enter(item)
                elif isinstance(item, c_ast.Decl) and item.init is not None:
                    self._here = item.name
                    self._flow((item.name, 0), item.init)
        self._solve()

    # Reading function bodies.

    def _enter(self, function: c_ast.FuncDef) -> None:
        self._here = function.decl.name
        for node in walk(function.body):
            if isinstance(node, c_ast.Decl) and node.name:
                if isinstance(node.type, c_ast.FuncDecl):
                    continue
                key = f"{self._here}/{node.name}"
                self._variable(key, self._here, node, "local")
                if any(self.variables[k].name == node.name for k in self.parameters[self._here]):
                    self.variables[key].twice = True
                if self.variables[key].twice and self.variables[key].writable:
                    self.wild[key] = "its name is declared twice in one function"
        self._order += 1
        self._statement(function.body, {})

    def _statement(self, node, limits: dict[str, c_ast.Node]) -> None:
        if node is None:
            return
        if isinstance(node, c_ast.Compound):
            limits = dict(limits)
            for item in node.block_items or ():
                self._statement(item, limits)
                for name in changed(item):
                    limits.pop(name, None)
                if isinstance(item, c_ast.If) and item.iffalse is None and leaves(item.iftrue):
                    limits |= limits_of(item.cond, holds=False)
            return
        if isinstance(node, c_ast.For | c_ast.While | c_ast.DoWhile):
            inner = dict(limits)
            if isinstance(node, c_ast.For):
                self._statement(node.init, limits)
                inner |= descending(node)
            if node.cond is not None and not isinstance(node, c_ast.DoWhile):
                self._expression(node.cond, inner, value=True)
                inner |= limits_of(node.cond)
            self._statement(node.stmt, inner)
            if isinstance(node, c_ast.DoWhile):
                self._expression(node.cond, limits, value=True)
            elif isinstance(node, c_ast.For):
                self._statement(node.next, inner)
            return
        if isinstance(node, c_ast.If):
            self._expression(node.cond, limits, value=True)
            self._statement(node.iftrue, limits | limits_of(node.cond))
            self._statement(node.iffalse, limits | limits_of(node.cond, holds=False))
            return
        if isinstance(node, c_ast.DeclList):
            for one in node.decls:
                self._statement(one, limits)
            return
        if isinstance(node, c_ast.Decl):
            if isinstance(node.type, c_ast.FuncDecl) or not node.name:
                return
            self._order += 1
            self.variables[f"{self._here}/{node.name}"].start = self._order
            if node.init is not None:
                self._expression(node.init, limits)
                self._flow((f"{self._here}/{node.name}", 0), node.init)
            return
        if isinstance(node, c_ast.Return):
            if node.expr is not None:
                self._expression(node.expr, limits)
                self._flow((f"{self._here}()", 0), node.expr)
            return
        if isinstance(node, c_ast.Case | c_ast.Default | c_ast.Label | c_ast.Switch):
            for _, child in node.children():
                self._statement(child, limits)
            return
        self._expression(node, limits)

    def _expression(self, e, limits, *, value: bool = False) -> None:
        """One expression; `value` where only its truth is used."""
        if isinstance(e, c_ast.BinaryOp) and e.op == "&&":
            self._expression(e.left, limits, value=True)
            self._expression(e.right, limits | limits_of(e.left), value=True)
            return
        if isinstance(e, c_ast.TernaryOp):
            self._expression(e.cond, limits, value=True)
            self._expression(e.iftrue, limits | limits_of(e.cond))
            self._expression(e.iffalse, limits | limits_of(e.cond, holds=False))
            return
        if isinstance(e, c_ast.ArrayRef) or (isinstance(e, c_ast.UnaryOp) and e.op == "*"):
            inner = self.ref(e.name if isinstance(e, c_ast.ArrayRef) else e.expr, self._here)
            if inner and inner[1] == 0:
                self.variables[inner[0]].followed = True
        if isinstance(e, c_ast.ArrayRef):
            self._indexed(e.name, e.subscript, limits)
        elif isinstance(e, c_ast.UnaryOp) and e.op == "*" and isinstance(e.expr, c_ast.BinaryOp):
            if e.expr.op == "+":
                self._indexed(e.expr.left, e.expr.right, limits)
        elif isinstance(e, c_ast.UnaryOp) and e.op in ("p++", "p--", "++", "--"):
            self._changed(e.expr)
        elif isinstance(e, c_ast.UnaryOp) and e.op == "&" and isinstance(e.expr, c_ast.ID):
            if (found := self.scope(e.expr.name, self._here)) and "[]" not in found.levels[:1]:
                # Whoever holds the address may write at any time.
                found.changes.append(math.inf)
        elif isinstance(e, c_ast.Assignment):
            self._changed(e.lvalue, whole=e.op == "=")
            if e.op == "=" and (target := self._target(e.lvalue)):
                self._flow(target, e.rvalue)
        elif isinstance(e, c_ast.BinaryOp) and e.op in ("+", "-"):
            for side in (e.left, e.right):
                if pointer := self.ref(side, self._here):
                    self._need(pointer, ARRAY)
        elif isinstance(e, c_ast.FuncCall):
            self._call(e)
        elif isinstance(e, c_ast.Cast):
            self._cast(e)
        elif (
            isinstance(e, c_ast.ID)
            and e.name in self.functions
            and (not value and self.scope(e.name, self._here) is None)
        ):
            for key in [*self.parameters[e.name], f"{e.name}()"]:
                self.wild.setdefault(key, f"{e.name} is used as a value")
        if isinstance(e, c_ast.BinaryOp) and e.op in ("<", "!="):
            self._walked(e)
        terminated = (
            (e.left if isinstance(e, c_ast.BinaryOp) and e.op in ("!=", "==") and zero(e.right)
             else e.expr if isinstance(e, c_ast.UnaryOp) and e.op == "!" else e)
            if value else None
        )  # fmt: skip
        if isinstance(terminated, c_ast.ArrayRef | c_ast.UnaryOp):
            self._terminated(terminated)
        for name, child in e.children():
            if isinstance(e, c_ast.FuncCall) and name == "name":
                continue
            if not isinstance(child, c_ast.Typename | c_ast.Decl):
                truth = isinstance(e, c_ast.BinaryOp) and e.op in ("||", "&&")
                self._expression(child, limits, value=truth and not isinstance(child, c_ast.ID))

    def _indexed(self, base, index, limits) -> None:
        if pointer := self.ref(base, self._here):
            self._need(pointer, ARRAY)
            if pointer[1] == 0:
                self.uses[pointer[0]].append(Use(self._here, index, limits))

    def _target(self, e) -> tuple[str, int] | None:
        found = self.ref(e, self._here)
        if found is None and isinstance(e, c_ast.StructRef):
            member = self.field_of(e, self._here)
            found = (member.key, 0) if member else None
        return found

    def _terminated(self, e) -> None:
        """`while (*p)`, `s[i] != 0`: only characters are read until a zero."""
        base = e.name if isinstance(e, c_ast.ArrayRef) else e.expr if e.op == "*" else None
        if base is None:
            return
        pointer = self.ref(base, self._here)
        target = self.type_of(e, self._here)
        if pointer and isinstance(target, c_ast.TypeDecl) and "char" in self.shape(target):
            self._need(pointer, TEXT)

    def _walked(self, e: c_ast.BinaryOp) -> None:
        """`p < end`, both pointers: the end bounds what moves towards it."""
        left, right = (self.ref(side, self._here) for side in (e.left, e.right))
        if left and right and isinstance(e.left, c_ast.ID) and isinstance(e.right, c_ast.ID):
            self.ends[left[0]].add(e.right.name)
            self._need(left, ARRAY)
            self._need(right, ARRAY)

    def _changed(self, target, *, whole: bool = False) -> None:
        self._order += 1
        found = None
        if isinstance(target, c_ast.ID):
            found = self.scope(target.name, self._here)
        if found:
            found.changes.append(self._order)
        pointer = self.ref(target, self._here)
        if pointer and not whole:
            self._need(pointer, ARRAY)
            if pointer[1] == 0:
                self.variables[pointer[0]].moved = True

    def _cast(self, e: c_ast.Cast) -> None:
        to = self.resolve(e.to_type.type)
        inner = self.ref(e.expr, self._here)
        if inner is None or not isinstance(to, c_ast.PtrDecl) or "void" in self.shape(to):
            return
        if self.shape(to) != self.shape(self.type_of(e.expr, self._here)):
            self.wild.setdefault(inner[0], f"cast to {self.shape(to)} at {place(e)}")

    def _call(self, e: c_ast.FuncCall) -> None:
        args = e.args.exprs if e.args else []
        name = getattr(e.name, "name", None) if isinstance(e.name, c_ast.ID) else None
        if name in self.parameters:
            self.calls[self._here].add(name)
            if args:
                self.sites[name].append((self._here, e))
            for key, arg in zip(self.parameters[name], args, strict=False):
                self._flow((key, 0), arg)
            args = args[len(self.parameters[name]) :]
            if name in self.functions and not args:
                return
        if name in self.parameters and name not in self.functions and name not in LIBRARY:
            for key in self.parameters[name]:
                self.wild.setdefault(key, f"{name} has no body in the program")
        if name in LIBRARY:
            blind = self.ref(args[0], self._here) if name in BLIND and args else None
            if blind and self.variables[blind[0]].levels[blind[1]] == "*":
                self.wild.setdefault(blind[0], f"{name} writes without a length, {place(e)}")
            for index in TEXT_AT.get(name, ()):
                if index < len(args) and (pointer := self.ref(args[index], self._here)):
                    self._need(pointer, TEXT)
            for index, size in SIZED.get(name, ()):
                if size < len(args) and (pointer := self.ref(args[index], self._here)):
                    self._need(pointer, ARRAY)
                    if pointer[1] == 0 and not isinstance(args[index], c_ast.BinaryOp):
                        self.sized.append((pointer[0], self._here, args[size]))
            return
        for arg in args:
            if pointer := self.ref(arg, self._here):
                taker = name or "a function pointer"
                self.wild.setdefault(pointer[0], f"passed to {taker} at {place(e)}")

    def _flow(self, target: tuple[str, int], e: c_ast.Node) -> None:
        """A value goes into a pointer."""
        key, level = target
        variable = self.variables.get(key)
        if variable is None:
            return
        if isinstance(e, c_ast.TernaryOp):
            self._flow(target, e.iftrue)
            self._flow(target, e.iffalse)
            return
        if isinstance(e, c_ast.InitList):
            self._initial(target, e)
            return
        if level == 0:
            self.values[key].append((self._here, e))
        if level >= len(variable.levels):
            return
        call = e.expr if isinstance(e, c_ast.Cast) else e
        if zero(e):
            return
        if isinstance(call, c_ast.FuncCall) and getattr(call.name, "name", "") in LIBRARY:
            if call.name.name in GIVES_TEXT:
                self._need(target, TEXT)
            return
        if isinstance(e, c_ast.Constant) and e.type == "string":
            if variable.role != "param":
                self._need(target, TEXT)
            return
        if isinstance(e, c_ast.UnaryOp) and e.op == "&":
            inner = self.ref(e.expr, self._here)
            if isinstance(e.expr, c_ast.ArrayRef):
                source = self.ref(e.expr.name, self._here)
                if source:
                    self.flows.append((target, source))
            elif inner:
                self.flows += [((key, level + 1), inner), (inner, (key, level + 1))]
            return
        source = self.ref(e, self._here)
        if isinstance(e, c_ast.Cast | c_ast.FuncCall) and source is None:
            self.wild.setdefault(key, f"given a value of another type at {place(e)}")
        elif source is None:
            self.wild.setdefault(key, f"given a value that cannot be followed at {place(e)}")
        else:
            if self.at(source) != self.at(target):
                for one in (key, source[0]):
                    self.wild.setdefault(one, f"its type changes at {place(e)}")
            self.flows.append((target, source))

    def _initial(self, target: tuple[str, int], e: c_ast.InitList) -> None:
        key, level = target
        node = self.variables[key].type
        for _ in range(level):
            node = node.type
        node = self.resolve(node)
        struct = getattr(node, "type", None)
        if isinstance(node, c_ast.ArrayDecl):
            for one in e.exprs:
                self._flow((key, level + 1), one)
        elif isinstance(struct, c_ast.Struct) and self.tag(struct) in self.structs:
            tag = self.tag(struct)
            for member, one in zip(self.structs[tag].decls, e.exprs, strict=False):
                if isinstance(one, c_ast.NamedInitializer):
                    self._flow((f"{tag}.{getattr(one.name[0], 'name', '')}", 0), one.expr)
                else:
                    self._flow((f"{tag}.{member.name}", 0), one)

    def _need(self, pointer: tuple[str, int], kind: int) -> None:
        self.need[pointer] = max(self.need[pointer], kind)

    def _solve(self) -> None:
        """What flows into a pointer is at least what is asked of it; below it, both are equal."""
        edges = []
        for (key, level), (other, depth) in self.flows:
            edges.append(((key, level), (other, depth)))
            lower = min(len(self.variables[key].levels) - level,
                        len(self.variables[other].levels) - depth)  # fmt: skip
            for step in range(1, lower):
                one, two = (key, level + step), (other, depth + step)
                edges += [(one, two), (two, one)]
        while True:
            before = len(edges), sum(self.need.values())
            for target, source in edges:
                self._need(source, self.need[target])
            if (len(edges), sum(self.need.values())) == before:
                break
        # Text that is returned stays text, whoever reads it.
        given = defaultdict(list)
        for target, source in self.flows:
            given[target].append(source)
        for variable in self.variables.values():
            sources = given[variable.key, 0] if variable.role == "return" else []
            if sources and all(self.need.get(source) == TEXT for source in sources):
                self._need((variable.key, 0), TEXT)
        for (key, _), (other, _) in self.flows:
            if self.variables[other].levels != ["[]"]:
                self.linked[key].add(other)
                self.linked[other].add(key)
        for variable in self.variables.values():
            for level, sort in enumerate(variable.levels):
                if level and sort == "*" and self.need[variable.key, level] == ARRAY:
                    self.wild.setdefault(variable.key, "an inner array has no place for its bounds")
        self.spread(self.wild)

    def spread(self, wild: dict[str, str]) -> None:
        """Extend reasons for being unsafe to all that exchange values with the unsafe."""
        stack = list(wild)
        while stack:
            key = stack.pop()
            for other in self.linked[key]:
                if other not in wild:
                    wild[other] = f"exchanges values with {key}, {wild[key].split(';')[0]}"[:200]
                    stack.append(other)
