"""What the names of a C program mean: variables, their types, and how expressions refer to them."""

import copy
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from pycparser import c_ast

from holdfast.longterm.c.source import Skipped, Unit, walk


@dataclass
class Variable:
    """A name of the program: every declaration of it, and what its uses ask for."""

    key: str
    owner: str
    name: str
    type: c_ast.Node
    role: str
    order: int
    decls: list[c_ast.Decl] = field(default_factory=list)
    twice: bool = False
    moved: bool = False
    changes: list[float] = field(default_factory=list)
    start: int = 0
    followed: bool = False
    initial: c_ast.Node | None = None

    @property
    def levels(self) -> list[str]:
        """From the outside in: "*" a pointer, "[]" an array that holds its elements itself."""
        found, here = [], self.type
        while isinstance(here, c_ast.PtrDecl | c_ast.ArrayDecl):
            found.append("[]" if isinstance(here, c_ast.ArrayDecl) else "*")
            here = here.type
        if self.role == "param" and found and found[0] == "[]":
            found[0] = "*"
        return found

    @property
    def writable(self) -> bool:
        """Whether a pointer is declared here whose type this notation can say."""
        here = self.type
        while isinstance(here, c_ast.PtrDecl | c_ast.ArrayDecl):
            here = here.type
        return "*" in self.levels and isinstance(here, c_ast.TypeDecl)


class Names:
    """What the names of a program mean: its variables, functions, structs and types.

    Variables are keyed `function(0)` for a parameter, `function()` for a result, `function/name`
    for a local, `struct tag.name` for a field, and by name alone for a global.
    """

    def __init__(self, units: Iterable[Unit]):
        self.units = list(units)
        self.functions: dict[str, c_ast.FuncDef] = {}
        self.parameters: dict[str, list[str]] = {}
        self.structs: dict[str, c_ast.Struct | c_ast.Union] = {}
        self.typedefs: dict[str, c_ast.Node] = {}
        self.constants: set[str] = set()
        self.variables: dict[str, Variable] = {}
        # Structs and globals by the function that uses them.
        self.mentions: dict[str, set[str]] = defaultdict(set)
        # The names of all parameters, by the identity of each declaration among them.
        self.formals: dict[int, list[str | None]] = {}
        self.wild: dict[str, str] = {}
        self._order = 0
        for unit in self.units:
            for item in unit.tree.ext:
                self._declare(item)
            for skipped in unit.skipped:
                self._set_aside(unit, skipped)

    def _variable(self, key, owner, decl, role) -> Variable:
        old = self.variables.get(key)
        self._order += 1
        if old is None:
            old = Variable(key, owner, decl.name, decl.type, role, self._order)
            old.initial = getattr(decl, "init", None)
            self.variables[key] = old
        elif role in ("local", "field"):
            old.twice = True
        old.decls.append(decl)
        return old

    def _declare(self, item: c_ast.Node) -> None:
        for node in walk(item):
            if isinstance(node, c_ast.Struct | c_ast.Union) and node.decls:
                tag = self.tag(node)
                for one in node.decls:
                    key = f"{tag}.{one.name}"
                    known = self.variables.get(key)
                    if known is None or str(known.decls[0].coord) != str(one.coord):
                        self._variable(key, tag, one, "field")
                    if isinstance(node, c_ast.Union):
                        self.wild[key] = "a member of a union"
                self.structs[tag] = node
            elif isinstance(node, c_ast.Enumerator):
                self.constants.add(node.name)
        if isinstance(item, c_ast.Typedef):
            self.typedefs[item.name] = item.type
        elif isinstance(item, c_ast.FuncDef):
            known = self.functions.setdefault(item.decl.name, item)
            if str(known.coord) == str(item.coord):
                self._signature(item.decl)
            else:
                for key in [*self.parameters[item.decl.name], f"{item.decl.name}()"]:
                    self.wild[key] = f"{item.decl.name} is defined twice, also at {place(item)}"
        elif isinstance(item, c_ast.Decl) and isinstance(item.type, c_ast.FuncDecl):
            self._signature(item)
        elif isinstance(item, c_ast.Decl) and item.name:
            self._variable(item.name, item.name, item, "global")

    def _signature(self, decl: c_ast.Decl) -> None:
        name, function = decl.name, decl.type
        params = function.args.params if function.args else []
        formals = [getattr(one, "name", None) for one in params]
        self.formals[id(decl)] = formals
        names = []
        for index, one in enumerate(params):
            if isinstance(one, c_ast.Decl | c_ast.Typename):
                key = f"{name}({index})"
                self._variable(key, name, one, "param")
                self.formals[id(one)] = formals
                # The definition's names are the ones that bodies and bounds use.
                if name in self.functions:
                    self.variables[key].name = (
                        self.functions[name].decl.type.args.params[index].name
                    )
                names.append(key)
        self.parameters[name] = names
        result = copy.copy(decl)
        result.type = function.type
        self.formals[id(result)] = formals
        self._variable(f"{name}()", name, result, "return")

    def _set_aside(self, unit: Unit, skipped: Skipped) -> None:
        """A function whose body was not read: nothing is known of how it uses its pointers."""
        before = [
            item for item in unit.tree.ext
            if isinstance(item, c_ast.Decl) and isinstance(item.type, c_ast.FuncDecl)
            and item.coord and item.coord.file == skipped.file and item.coord.line <= skipped.line
        ]  # fmt: skip
        if before:
            name = max(before, key=lambda item: item.coord.line).name
            for key in [*self.parameters[name], f"{name}()"]:
                self.wild[key] = f"declared by {name}, {skipped}"

    @staticmethod
    def tag(node: c_ast.Node) -> str:
        return f"struct {node.name or f'at {node.coord.file}:{node.coord.line}'}"

    def scope(self, name: str, owner: str) -> Variable | None:
        """The variable that a name means inside a function, a struct or the file."""
        for key in (f"{owner}/{name}", f"{owner}.{name}"):
            if key in self.variables:
                return self.variables[key]
        for key in self.parameters.get(owner, ()):
            if self.variables[key].name == name:
                return self.variables[key]
        found = self.variables.get(name)
        if found is None or found.role != "global":
            return None
        self.mentions[owner].add(name)
        return found

    def resolve(self, node):
        while (
            isinstance(node, c_ast.TypeDecl)
            and isinstance(node.type, c_ast.IdentifierType)
            and node.type.names[-1] in self.typedefs
        ):
            node = self.typedefs[node.type.names[-1]]
        return node

    def type_of(self, e: c_ast.Node, owner: str):
        """The declared type of an expression, typedefs resolved; None where it is not known."""
        if isinstance(e, c_ast.ID):
            found = self.scope(e.name, owner)
            return self.resolve(found.type) if found else None
        if isinstance(e, c_ast.ArrayRef) or (isinstance(e, c_ast.UnaryOp) and e.op == "*"):
            inner = self.type_of(e.name if isinstance(e, c_ast.ArrayRef) else e.expr, owner)
            return (
                self.resolve(inner.type)
                if isinstance(inner, c_ast.PtrDecl | c_ast.ArrayDecl)
                else None
            )
        if isinstance(e, c_ast.UnaryOp):
            inner = self.type_of(e.expr, owner)
            return c_ast.PtrDecl([], inner) if e.op == "&" and inner is not None else inner
        if isinstance(e, c_ast.StructRef):
            found = self.field_of(e, owner)
            return self.resolve(found.type) if found else None
        if isinstance(e, c_ast.Cast):
            return self.resolve(e.to_type.type)
        if isinstance(e, c_ast.FuncCall):
            found = self.variables.get(f"{getattr(e.name, 'name', '')}()")
            return self.resolve(found.type) if found else None
        if isinstance(e, c_ast.BinaryOp) and e.op in "+-":
            left = self.type_of(e.left, owner)
            if isinstance(left, c_ast.PtrDecl | c_ast.ArrayDecl):
                return left
            return self.type_of(e.right, owner)
        if isinstance(e, c_ast.Assignment):
            return self.type_of(e.lvalue, owner)
        if isinstance(e, c_ast.TernaryOp):
            return self.type_of(e.iftrue, owner) or self.type_of(e.iffalse, owner)
        return None

    def field_of(self, e: c_ast.StructRef, owner: str) -> Variable | None:
        base = self.type_of(e.name, owner)
        if isinstance(base, c_ast.PtrDecl | c_ast.ArrayDecl):
            base = self.resolve(base.type)
        inner = getattr(base, "type", None)
        if not isinstance(inner, c_ast.Struct | c_ast.Union):
            return None
        self.mentions[owner].add(self.tag(inner))
        return self.variables.get(f"{self.tag(inner)}.{e.field.name}")

    def ref(self, e: c_ast.Node, owner: str) -> tuple[str, int] | None:
        """The variable and level of indirection that an expression reads, if it is a pointer."""
        found = None
        if isinstance(e, c_ast.ID):
            variable = self.scope(e.name, owner)
            found = (variable.key, 0) if variable else None
        elif isinstance(e, c_ast.StructRef):
            variable = self.field_of(e, owner)
            found = (variable.key, 0) if variable else None
        elif isinstance(e, c_ast.ArrayRef) or (isinstance(e, c_ast.UnaryOp) and e.op == "*"):
            inner = self.ref(e.name if isinstance(e, c_ast.ArrayRef) else e.expr, owner)
            found = (inner[0], inner[1] + 1) if inner else None
        elif isinstance(e, c_ast.UnaryOp) and e.op in ("p++", "p--", "++", "--"):
            found = self.ref(e.expr, owner)
        elif isinstance(e, c_ast.BinaryOp) and e.op in ("+", "-"):
            found = self.ref(e.left, owner) or self.ref(e.right, owner)
        elif isinstance(e, c_ast.Cast):
            same = self.shape(e.to_type.type) == self.shape(self.type_of(e.expr, owner))
            found = self.ref(e.expr, owner) if same else None
        elif isinstance(e, c_ast.FuncCall):
            key = f"{getattr(e.name, 'name', '')}()"
            found = (key, 0) if key in self.variables else None
        elif isinstance(e, c_ast.Assignment):
            found = self.ref(e.lvalue, owner)
        if found and found[1] < len(self.variables[found[0]].levels):
            return found
        return None

    def at(self, pointer: tuple[str, int]) -> str:
        """The type at a level of a variable, as text, typedefs resolved."""
        node = self.variables[pointer[0]].type
        for _ in range(pointer[1]):
            node = node.type
        return self.shape(node)

    def shape(self, node) -> str:
        """A type as text, typedefs resolved and qualifiers left out; "" where it is not known."""
        stars, node = "", self.resolve(node)
        while isinstance(node, c_ast.PtrDecl | c_ast.ArrayDecl):
            stars += "*"
            node = self.resolve(node.type)
        inner = getattr(node, "type", None)
        if isinstance(inner, c_ast.IdentifierType):
            return " ".join(inner.names) + stars
        if isinstance(inner, c_ast.Struct | c_ast.Union | c_ast.Enum):
            return f"{type(inner).__name__} {inner.name or inner.coord}{stars}"
        return stars and f"?{stars}"

    def beside(self, variable: Variable) -> list[Variable]:
        """The other parameters of its function, or fields of its struct."""
        if variable.role == "field":
            struct = self.structs[variable.owner]
            keys = [f"{variable.owner}.{one.name}" for one in struct.decls]
        else:
            keys = self.parameters.get(variable.owner, [])
        return [self.variables[key] for key in keys if key != variable.key]

    def steady(self, other: Variable, variable: Variable) -> bool:
        """Whether bounds of `variable` may name `other`: in scope, and never changed after it."""
        if variable.role == "field":
            return other.role == "field"
        if variable.role == "local" and other.role in ("local", "param"):
            return other.order < variable.order and all(c < variable.start for c in other.changes)
        if variable.role in ("param", "return"):
            return other.role == "param" and not other.changes
        return other.role == "global" and not other.changes


def place(node: c_ast.Node) -> str:
    return f"{node.coord.file}:{node.coord.line}" if node.coord else "?"
