"""Checked C annotations in a program's own text, and their erasure.

Only declarations are rewritten, where they stand; comments, macros and layout remain.
"""

from collections import defaultdict
from collections.abc import Mapping
from itertools import pairwise
from typing import NamedTuple

from pycparser import c_ast

from holdfast.longterm.c.bounds import Bounds
from holdfast.longterm.c.expressions import expression, substitute, text
from holdfast.longterm.c.facts import ARRAY, PTR, TEXT, Program
from holdfast.longterm.c.names import Variable
from holdfast.longterm.c.source import Token, tokens

KINDS = {PTR: "_Ptr", ARRAY: "_Array_ptr", TEXT: "_Nt_array_ptr"}
_BRACKETS = {ARRAY: "_Checked", TEXT: "_Nt_checked"}
_BOUNDS = ("count", "byte_count", "bounds")
_QUALIFIERS = {"const", "volatile", "restrict"}
_STORAGE = {"static", "extern", "register", "inline", "auto", "_Thread_local", "_Noreturn"}
_OPEN, _CLOSE = {"(": ")", "[": "]", "{": "}"}, {")", "]", "}"}


class Annotation(NamedTuple):
    """What a declaration shall say: kinds from the outermost level in, and bounds if any."""

    kinds: tuple[int, ...]
    bounds: Bounds | None


class _Site(NamedTuple):
    """One declarator: where its declaration begins and ends, its stars and its name, as indices."""

    start: int
    stars: int
    name: int
    end: int
    stop: int


class Texts:
    """The files of a program, and where in them each of its pointers is declared.

    `lost` gives the reason for every pointer whose declarations cannot be rewritten.
    """

    def __init__(self, program: Program, files: Mapping[str, str]):
        self.program, self.files = program, dict(files)
        self.tokens = {path: tokens(source) for path, source in files.items()}
        self._rows: dict[str, dict[int, list[int]]] = {}
        for path, found in self.tokens.items():
            rows = self._rows[path] = defaultdict(list)
            for index, token in enumerate(found):
                rows[token.line].append(index)
        self._pairs = {path: _pairs(found) for path, found in self.tokens.items()}
        self._lines = {}
        for unit in program.units:
            self._lines.update(unit.lines)
        self.lost: dict[str, str] = {}
        self.sites: dict[str, list[tuple[str, _Site, c_ast.Decl]]] = defaultdict(list)
        for variable in program.variables.values():
            if "*" in variable.levels:
                for decl in variable.decls:
                    self._locate(variable, decl)

    def _locate(self, variable: Variable, decl: c_ast.Decl) -> None:
        inner = decl.type
        while isinstance(inner, c_ast.PtrDecl | c_ast.ArrayDecl):
            inner = inner.type
        path, line = (inner.coord.file, inner.coord.line) if inner.coord else ("?", 0)
        where = f"{path}:{line}"
        if not isinstance(inner, c_ast.TypeDecl):
            self.lost[variable.key] = f"a pointer to a function, {where}"
        elif decl.name is None:
            self.lost[variable.key] = f"a prototype names no parameter, {where}"
        elif path not in self.files:
            self.lost[variable.key] = f"declared in {where}, which is not among the sources"
        else:
            index = self._token(path, line, inner.coord.column, decl.name)
            site = self._site(path, index, variable.role) if index is not None else "by a macro"
            if isinstance(site, str):
                self.lost[variable.key] = f"declared {site}, {where}"
            elif all((path, site) != known[:2] for known in self.sites[variable.key]):
                self.sites[variable.key].append((path, site, decl))

    def _token(self, path: str, line: int, column: int, name: str) -> int | None:
        """The token of a name, found again behind what the preprocessor did to its line."""
        row = self._rows[path][line]
        here = [self.tokens[path][index].text for index in row]
        seen = tokens(self._lines.get((path, line), ""))
        for position, token in enumerate(seen):
            if position >= len(here) or token.text != here[position]:
                break
            if token.start == column - 1 and token.text == name:
                return row[position]
        return row[here.index(name)] if here.count(name) == 1 else None

    def _site(self, path: str, name: int, role: str) -> _Site | str:
        found = self.tokens[path]
        start = self._start(path, name, role)
        if start is None:
            return "behind a struct's body"
        before = found[start - 1].text if start else ";"
        end, depth = name + 1, 0
        while end < len(found) and (depth or found[end].text not in (";", ",", "=", ")", "{")):
            depth += (found[end].text in _OPEN) - (found[end].text in _CLOSE)
            end += 1
        stop, depth = end, 0
        while stop < len(found) and (
            depth or found[stop].text not in (";", ")", "{" if role == "return" else ";")
        ):
            depth += (found[stop].text in _OPEN) - (found[stop].text in _CLOSE)
            stop += 1
        several = role not in ("param", "return") and self._comma(found, start, stop)
        if several and before == "(":
            return "together with others in one loop head"
        parts = ("*", ",", "=", "[", ";")
        first = next((i for i in range(start, name) if found[i].text in parts), name)
        words = {token.text for token in found[start:first]}
        stars = {token.text for token in found[first:name]} - _QUALIFIERS - {"*"}
        if first == start or words & {"(", "{"} or (stars and not several):
            return "in a form that cannot be said"
        return _Site(start, first, name, end, stop)

    def _start(self, path: str, name: int, role: str) -> int | None:
        """Where the declaration of a name begins; None behind the body of a struct."""
        found, match = self.tokens[path], self._pairs[path]
        start = name
        while start:
            text = found[start - 1].text
            if text in (";", "{", "(", ":") or (role == "param" and text == ","):
                break
            if text in _CLOSE and start - 1 in match:
                opening = match[start - 1]
                head = [token.text for token in found[max(opening - 2, 0) : opening]]
                if text == "}" and head[-1:] != ["="]:
                    if {"struct", "union", "enum"} & set(head):
                        return None
                    break
                start = opening
            else:
                start -= 1
        return start

    @staticmethod
    def _comma(found: list[Token], first: int, stop: int) -> bool:
        depth = 0
        for token in found[first:stop]:
            depth += (token.text in _OPEN) - (token.text in _CLOSE)
            if token.text == "," and not depth:
                return True
        return False

    def source(self, path: str, start: int, end: int) -> str:
        """The text of tokens start to end, the last left out."""
        found = self.tokens[path]
        return self.files[path][found[start].start : found[end - 1].end] if end > start else ""

    def function(self, name: str) -> str:
        """A function's text, from its type to its closing brace."""
        decl = self.program.functions[name].decl
        inner = decl.type
        while not isinstance(inner, c_ast.TypeDecl):
            inner = inner.type
        index = self._token(inner.coord.file, inner.coord.line, inner.coord.column, name)
        if index is None:
            return ""
        path, found = inner.coord.file, self.tokens[inner.coord.file]
        start = index
        while start and found[start - 1].text not in (";", "}"):
            start -= 1
        end, depth = index, 0
        while end < len(found):
            depth += (found[end].text == "{") - (found[end].text == "}")
            end += 1
            if found[end - 1].text == "}" and not depth:
                break
        return self.source(path, start, end)

    def annotated(self, notes: Mapping[str, Annotation]) -> dict[str, str]:
        """The files, with the pointers of `notes` declared as they say; others stay."""
        groups: dict[tuple[str, int], list[tuple[_Site, c_ast.Decl, Variable, Annotation]]]
        groups = defaultdict(list)
        for key, note in notes.items():
            variable = self.program.variables[key]
            for path, site, decl in self.sites[key]:
                groups[path, site.start].append((site, decl, variable, note))
        edits: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
        for (path, start), group in groups.items():
            found = self.tokens[path]
            stop = max(site.stop for site, *_ in group)
            if group[0][2].role not in ("param", "return") and self._comma(found, start, stop):
                edits[path].append(self._split(path, start, stop, group))
                continue
            site, decl, variable, note = group[0]
            head, tail = self._said(path, start, site, decl, variable, note)
            edits[path].append((found[start].start, found[site.name].start, head))
            last = site.end
            if tail:
                edits[path].append((found[last - 1].end, found[last - 1].end, tail))
            if isinstance(decl.type, c_ast.ArrayDecl) and variable.role == "param":
                at = found[site.name].end
                edits[path].append((at, at, f" {_BRACKETS[max(note.kinds[0], ARRAY)]}"))
        changed = dict(self.files)
        for path, some in edits.items():
            for start, end, new in sorted(some, reverse=True):
                changed[path] = changed[path][:start] + new + changed[path][end:]
        return changed

    def _said(self, path, start, site, decl, variable, note, words=None) -> tuple[str, str]:
        """What stands before the name, and after the declarator."""
        found = self.tokens[path]
        words = words or [token.text for token in found[start : site.stars]]
        kinds = [
            kind for kind, level in zip(note.kinds, variable.levels, strict=True) if level == "*"
        ]
        if variable.role == "param" and isinstance(decl.type, c_ast.ArrayDecl):
            kinds = kinds[1:]
        said = " ".join(word for word in words if word not in _STORAGE)
        for token in found[site.stars : site.name]:
            if token.text == "*":
                said = f"{KINDS[kinds.pop()]}<{said}>"
            else:
                said += f" {token.text}"
        storage = "".join(f"{word} " for word in words if word in _STORAGE)
        tail = ""
        if note.bounds is not None:
            bounds = note.bounds
            there = self.program.formals.get(id(decl))
            if there is not None:
                ours = [self.program.variables[k].name
                        for k in self.program.parameters[variable.owner]]  # fmt: skip
                values = {a: c_ast.ID(b) for a, b in zip(ours, there, strict=False) if a and b}
                args = tuple(text(substitute(expression(a), values)) for a in bounds.args)
                bounds = bounds._replace(args=args)
            tail = f" : {bounds}"
        return f"{storage}{said} ", tail

    def _split(self, path, start, stop, group) -> tuple[int, int, str]:
        """`int *a, *b;` as two declarations."""
        found = self.tokens[path]
        first = min(
            next(i for i in range(start, stop) if found[i].text == "*"),
            next(i for i in range(start, stop) if found[i + 1].text in (",", "=", "[", ";")),
        )
        words = [token.text for token in found[start:first]]
        pieces, depth, begin = [], 0, first
        for index in range(first, stop + 1):
            token = found[index].text
            if index == stop or (token == "," and not depth):
                pieces.append((begin, index))
                begin = index + 1
            depth += (token in _OPEN) - (token in _CLOSE)
        by_name = {site.name: rest for site, *rest in group}
        declarations = []
        for begin, end in pieces:
            name = next((i for i in range(begin, end) if i in by_name), None)
            if name is None:
                declarations.append(f"{' '.join(words)} {self.source(path, begin, end)}")
                continue
            close = next((i for i in range(name, end) if found[i].text == "="), end)
            site = _Site(begin, begin, name, close, end)
            head, tail = self._said(path, begin, site, *by_name[name], words)
            rest = f" {self.source(path, close, end)}" if close < end else ""
            declarations.append(f"{head}{self.source(path, name, close)}{tail}{rest}")
        return found[start].start, found[stop - 1].end, "; ".join(declarations)


def _pairs(found: list[Token]) -> dict[int, int]:
    """The opening bracket of every closing one, as indices."""
    stack, match = [], {}
    for index, token in enumerate(found):
        if token.text in _OPEN:
            stack.append(index)
        elif token.text in _CLOSE and stack:
            match[index] = stack.pop()
    return match


def erase(source: str) -> str:
    """Checked C as plain C: pointers get their stars back, bounds go."""
    found, cuts, index = tokens(source), [], 0
    while index < len(found):
        word = found[index].text
        following = found[index + 1].text if index + 1 < len(found) else ""
        if word in KINDS.values() and following == "<":
            depth, end = 0, index + 1
            while end < len(found):
                depth += {"<": 1, ">": -1, ">>": -2}.get(found[end].text, 0)
                if depth <= 0:
                    break
                end += 1
            cuts.append((found[index].start, found[index + 1].end, ""))
            if found[end].text == ">":
                cuts.append((found[end].start, found[end].end, " *"))
            else:
                # The outer of two pointers that end together put its half here before.
                cuts.append((found[end].start, found[end].end, " * *"))
        elif word in _BRACKETS.values():
            cuts.append((found[index].start, found[index].end, ""))
        elif word == ":" and following in _BOUNDS and found[index + 2].text == "(":
            depth, end = 0, index + 2
            while True:
                depth += (found[end].text == "(") - (found[end].text == ")")
                if not depth:
                    break
                end += 1
            cuts.append((found[index].start, found[end].end, ""))
        index += 1
    for start, end, new in sorted(set(cuts), reverse=True):
        source = source[:start] + new + source[end:]
    return source


def looks_annotated(source: str) -> int | None:
    """The line of what erasure would mistake for an annotation, if a plain source has any."""
    found = tokens(source)
    for one, two in pairwise(found):
        if one.text in (*KINDS.values(), *_BRACKETS.values()) or (
            one.text == ":" and two.text in _BOUNDS
        ):
            return one.line
    return None
