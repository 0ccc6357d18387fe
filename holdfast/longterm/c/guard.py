"""A build of a ported program that tests its bounds at run time, for a compiler without Checked C.

Every index and every `*p` of a pointer or array with known bounds is tested, and every array handed
to a parameter or pointer that asks for more than it has; a test that fails says where, and aborts.
The text is for gcc or clang, which know statement expressions.
"""

import re
from collections.abc import Iterator, Mapping

from pycparser import c_ast, c_generator

from holdfast.longterm.c.bounds import Bounds
from holdfast.longterm.c.expressions import expression, names, number, substitute, text
from holdfast.longterm.c.facts import TEXT, Program
from holdfast.longterm.c.names import Variable, place
from holdfast.longterm.c.source import walk

RUNTIME = r"""
#include <stdio.h>
#include <stdlib.h>
static inline long hf_at(long i, long low, long high, const char *where) {
    if (i < low || i >= high) {
        fprintf(stderr, "%s: index %ld is outside [%ld, %ld)\n", where, i, low, high);
        abort();
    }
    return i;
}
static inline long hf_text(const char *s, long i, long count, const char *where) {
    for (long k = count; k < i; k++)
        if (!s[k]) hf_at(i, 0, k + 1, where);
    return hf_at(i, 0, i + 1, where);
}
static inline void hf_need(long needed, long given, const char *where) {
    if (needed > given) {
        fprintf(stderr, "%s: %ld elements are asked for, %ld are given\n", where, needed, given);
        abort();
    }
}
"""
_IMPURE = (c_ast.FuncCall, c_ast.Assignment)


def guarded(program: Program, bounds: Mapping[str, Bounds], source: str) -> str:
    """One unit as C with tests; `source` is its text, for the headers that it includes."""
    headers = re.findall(r"^[ \t]*#[ \t]*include[ \t]*<.*$", source, re.M)
    writer = _Guarded(program, bounds)
    parts = [
        writer.visit(item) + ("" if isinstance(item, c_ast.FuncDef) else ";")
        for unit in program.units
        for item in unit.tree.ext
        if item.coord is None or item.coord.file != "<prelude>"
    ]
    return "\n".join([*headers, RUNTIME, *parts, ""])


class _Guarded(c_generator.CGenerator):
    def __init__(self, program: Program, bounds: Mapping[str, Bounds]):
        super().__init__()
        self.program, self.here = program, ""
        self.bounds = {
            key: (bound.form, [expression(arg, program.typedefs) for arg in bound.args])
            for key, bound in bounds.items()
            if key not in program.wild
        }

    def visit_FuncDef(self, n: c_ast.FuncDef) -> str:
        self.here = n.decl.name
        return super().visit_FuncDef(n)

    def visit_ArrayRef(self, n: c_ast.ArrayRef) -> str:
        return self._indexed(n.name, n.subscript, n) or super().visit_ArrayRef(n)

    def visit_UnaryOp(self, n: c_ast.UnaryOp) -> str:
        if n.op == "&" and isinstance(n.expr, c_ast.ArrayRef):
            # An address may lie one past the end; what it is used for is tested there.
            return f"({self.visit(n.expr.name)} + ({self.visit(n.expr.subscript)}))"
        if n.op == "sizeof":
            return c_generator.CGenerator().visit(n)
        if n.op == "*":
            e = n.expr
            if isinstance(e, c_ast.UnaryOp) and e.op == "p++":
                test = self._test(e.expr, "0", n)
                found = f"(*({{ {test}; {self.visit(e)}; }}))" if test else None
            elif isinstance(e, c_ast.BinaryOp) and e.op == "+":
                found = self._indexed(e.left, e.right, n)
            else:
                found = self._indexed(e, c_ast.Constant("int", "0"), n)
            if found:
                return found
        return super().visit_UnaryOp(n)

    def visit_FuncCall(self, n: c_ast.FuncCall) -> str:
        plain = super().visit_FuncCall(n)
        tests = list(self._handed(n))
        return f"({{ {' '.join(tests)} {plain}; }})" if tests else plain

    def visit_Assignment(self, n: c_ast.Assignment) -> str:
        found = self.program.ref(n.lvalue, self.here)
        test = None
        if n.op == "=" and found and found[1] == 0:
            test = self._given(self.program.variables[found[0]], n.lvalue, n.rvalue)
        plain = super().visit_Assignment(n)
        return f"({{ {test} {plain}; }})" if test else plain

    def _indexed(self, base: c_ast.Node, index: c_ast.Node, n: c_ast.Node) -> str | None:
        test = self._test(base, self.visit(index), n)
        return f"{self._parenthesize_unless_simple(base)}[{test}]" if test else None

    def _test(self, base: c_ast.Node, index: str, n: c_ast.Node) -> str | None:
        found = self.limits(base)
        if found is None:
            return None
        low, high, terminated = found
        if terminated:
            return f'hf_text({self._plain(base)}, {index}, {high}, "{place(n)}")'
        return f'hf_at({index}, {low}, {high}, "{place(n)}")'

    def limits(self, e: c_ast.Node) -> tuple[str, str, bool] | None:
        """First index, one past the last, and whether text goes on until its terminator."""
        found = self.program.ref(e, self.here)
        if found is None or found[1] or not isinstance(e, c_ast.ID | c_ast.StructRef):
            return None
        if any(isinstance(node, _IMPURE) or _steps(node) for node in walk(e)):
            return None
        variable = self.program.variables[found[0]]
        if variable.levels[0] == "[]":
            return ("0", self._plain(variable.type.dim), False) if variable.type.dim else None
        if variable.key not in self.bounds:
            return None
        form, args = self.bounds[variable.key]
        if isinstance(e, c_ast.StructRef):
            args = [
                substitute(a, {x: c_ast.StructRef(e.name, e.type, c_ast.ID(x)) for x in names(a)})
                for a in args
            ]
        here = self._plain(e)
        said = [f"({self._plain(a)})" for a in args]
        if form == "bounds":
            return f"({said[0]} - {here})", f"({said[1]} - {here})", False
        if form == "byte_count":
            return "0", f"(long)({said[0]} / sizeof(*{here}))", False
        return "0", said[0], self.program.need.get((variable.key, 0)) == TEXT

    def _handed(self, n: c_ast.FuncCall) -> Iterator[str]:
        name = getattr(n.name, "name", None)
        keys = self.program.parameters.get(name, ())
        args = n.args.exprs if n.args else []
        values = {
            self.program.variables[key].name: arg for key, arg in zip(keys, args, strict=False)
        }
        for key, arg in zip(keys, args, strict=False):
            form, wanted = self.bounds.get(key, ("", []))
            given = self._size(arg)
            if form != "count" or given is None or self.program.need.get((key, 0)) == TEXT:
                continue
            needed = substitute(wanted[0], values)
            if any(isinstance(node, _IMPURE) or _steps(node) for node in walk(needed)):
                continue
            yield f'hf_need({self._plain(needed)}, {given}, "{place(n)}");'

    def _given(self, variable: Variable, target: c_ast.Node, value: c_ast.Node) -> str | None:
        form, wanted = self.bounds.get(variable.key, ("", []))
        given = self._size(value)
        if form != "count" or given is None or self.program.need.get((variable.key, 0)) == TEXT:
            return None
        if isinstance(target, c_ast.StructRef):
            # The fields that say the length may be written after the pointer.
            return None
        return f'hf_need({self._plain(wanted[0])}, {given}, "{place(target)}");'

    def _size(self, e: c_ast.Node) -> str | None:
        """Elements that an argument has from where it points on."""
        if isinstance(e, c_ast.UnaryOp) and e.op == "&" and not isinstance(e.expr, c_ast.ArrayRef):
            return "1"
        if isinstance(e, c_ast.BinaryOp) and e.op == "+" and number(e.right) is not None:
            inner = self._size(e.left)
            return inner and f"({inner} - {number(e.right)})"
        found = self.limits(e)
        return found[1] if found and not found[2] else None

    @staticmethod
    def _plain(e: c_ast.Node) -> str:
        return text(e)


def _steps(node: c_ast.Node) -> bool:
    return isinstance(node, c_ast.UnaryOp) and node.op in ("++", "--", "p++", "p--")
