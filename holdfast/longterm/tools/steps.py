"""Steps of SQL: references to earlier results, and rules that make steps of a text.

`<step2.price>` stands for what step 2 returned in its column price, `<said.name>` for what a
template or intent found in the text. Both become bound values, so that no text ever becomes SQL.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from holdfast.errors import UsageError
from holdfast.longterm.tools.sqlguard import Refused, Rows, quoted

# String literals and comments are passed over as a whole: a reference is a value of its own.
_TOKEN = re.compile(
    r"""'(?:[^']|'')*'|"(?:[^"]|"")*"|--[^\n]*|/\*.*?\*/|<(?:step\d+|said)\.\w+>""", re.S
)
_REFERENCE = re.compile(r"""["']?<(?:step(\d+)|said)\.(\w+)>["']?""")
_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(\.\d+)?")

Values = Callable[[int | None, str], Sequence[Any]]


@dataclass(frozen=True)
class Step:
    """One statement, and what it is for."""

    description: str
    sql: str


@dataclass(frozen=True)
class Template:
    """Steps for texts that fit a regular expression as a whole, whatever their case.

    Its named groups are what `<said.name>` refers to.
    """

    pattern: str
    steps: tuple[Step, ...]

    def match(self, text: str) -> dict[str, Any] | None:
        """What a text says, numbers as numbers; None if it does not fit."""
        found = re.fullmatch(self.pattern, text.strip(), re.I | re.S)
        return None if found is None else {k: value(v) for k, v in found.groupdict().items()}


def value(text: str | None) -> Any:
    """A number if it is written as one is, else the text without quotes around it."""
    if text is None:
        return None
    if found := _NUMBER.fullmatch(text.strip()):
        return float(text) if found[1] else int(text)
    return text.strip().strip("\"'")


def bound(sql: str, values: Values) -> tuple[str, dict[str, Any]]:
    """A statement with named parameters in the place of its references, and their values.

    Raises:
        Refused: a reference that is part of a longer text.
    """
    args: dict[str, Any] = {}

    def parameter(match: re.Match) -> str:
        token = match[0]
        found = _REFERENCE.fullmatch(token)
        if found is None:
            if token[0] in "\"'" and _REFERENCE.search(token):
                raise Refused(f"{token} has a reference within a text; write it alone, or use ||")
            return token
        number, name = int(found[1]) if found[1] else None, found[2]
        names = []
        for i, one in enumerate(values(number, name)):
            names.append(f"from{number or ''}_{name}_{i}")
            args[names[-1]] = one
        return ", ".join(f":{name}" for name in names)

    return _TOKEN.sub(parameter, sql), args


def earlier(rows: Sequence[Rows], said: Mapping[str, Any]) -> Values:
    """The values of references, after the steps that returned `rows`."""

    def values(step: int | None, name: str) -> Sequence[Any]:
        if step is None:
            if name not in said:
                raise Refused(f"<said.{name}> is not known; known: {', '.join(said) or 'nothing'}")
            return [said[name]]
        if not 1 <= step <= len(rows):
            raise Refused(f"<step{step}.{name}> is not the result of an earlier step")
        columns = [column.lower() for column in rows[step - 1].columns]
        if name.lower() not in columns:
            raise Refused(f"step {step} returned {', '.join(columns) or 'no columns'}, no {name}")
        if not rows[step - 1].rows:
            raise Refused(f"step {step} found no row, so that there is no <step{step}.{name}>")
        place = columns.index(name.lower())
        return [row[place] for row in rows[step - 1].rows]

    return values


_OPERATORS = {
    "is not": "<>", "is": "=", "=": "=", "above": ">", "over": ">", "after": ">", ">": ">",
    "below": "<", "under": "<", "before": "<", "<": "<", "at least": ">=", "at most": "<=",
    "contains": "LIKE",
}  # fmt: skip
_CONDITION = re.compile(
    rf"(\w+) ({'|'.join(sorted(_OPERATORS, key=len, reverse=True))}) (\"[^\"]*\"|'[^']*'|\S+)", re.I
)
_AGGREGATES = {
    "total": "sum", "sum of": "sum", "average": "avg", "mean": "avg", "smallest": "min",
    "lowest": "min", "largest": "max", "highest": "max",
}  # fmt: skip
_WHERE = r"(?: where (?P<where>.+))?[.?]?"
_INTENTS = {
    "insert": r"(?:add|insert)(?: an?| to| into)? (?P<table>\w+)\s*:?\s+(?P<given>.+)",
    "update": r"(?:set|change) (?P<column>\w+) (?:of|in) (?P<table>\w+) to "
    r"(?P<value>\"[^\"]*\"|'[^']*'|\S+) where (?P<where>.+?)[.]?",
    "delete": r"(?:delete|remove)(?: from)? (?P<table>\w+) where (?P<where>.+?)[.]?",
    "count": rf"how many (?P<table>\w+)(?: are there)?{_WHERE}",
    "aggregate": rf"(?:what is the |the )?(?P<how>{'|'.join(_AGGREGATES)}) (?P<column>\w+) "
    rf"(?:of|in) (?P<table>\w+)(?: (?:per|by) (?P<per>\w+))?{_WHERE}",
    "return": rf"(?:list|show|return)(?: the)? (?P<columns>\w+(?:(?:,| and|, and) \w+)*) "
    rf"(?:of|in|from) (?P<table>\w+){_WHERE}",
}
_FORMS = (
    "add TABLE COLUMN=VALUE, ...; set COLUMN of TABLE to VALUE where ...; remove TABLE where ...; "
    "how many TABLE where ...; total|average|largest|smallest COLUMN of TABLE per COLUMN where "
    "...; list COLUMN, COLUMN of TABLE where COLUMN is|above|below|contains VALUE and ..."
)


def intent(text: str, tables: Mapping[str, Sequence[str]]) -> tuple[list[Step], dict[str, Any]]:
    """The step that a plain request is, and what it says.

    Args:
        tables: name -> columns; nothing else can be named.

    Raises:
        UsageError: no form fits, or it names what is not in the schema.
    """
    for kind, pattern in _INTENTS.items():
        found = re.fullmatch(pattern, text.strip(), re.I | re.S)
        if found is None:
            continue
        parts = found.groupdict()
        table = _known("table", parts["table"], tables)
        said: dict[str, Any] = {}
        sql = _statement(kind, parts, table, tables[table], said)
        where = _where(parts.get("where"), tables[table], said)
        group = (
            f" GROUP BY {_known('column', parts['per'], tables[table])}" if parts.get("per") else ""
        )
        return [Step(f"{kind} {table}", f"{sql}{where}{group}")], said
    raise UsageError(f"{text!r:.80} is not understood without a model. Forms: {_FORMS}")


def _statement(
    kind: str, parts: Mapping[str, str], table: str, columns: Sequence[str], said: dict[str, Any]
) -> str:
    name = quoted(table)
    if kind == "insert":
        pairs = re.findall(r"(\w+)\s*=\s*(\"[^\"]*\"|'[^']*'|[^,]+)(?:,|$)", parts["given"])
        if not pairs:
            raise UsageError(f"{parts['given']!r:.80} says no COLUMN=VALUE to add to {table}")
        named = [quoted(_known("column", column, columns)) for column, _ in pairs]
        marks = [_said(given, said) for _, given in pairs]
        return f"INSERT INTO {name} ({', '.join(named)}) VALUES ({', '.join(marks)})"
    if kind == "update":
        column = quoted(_known("column", parts["column"], columns))
        return f"UPDATE {name} SET {column} = {_said(parts['value'], said)}"
    if kind == "delete":
        return f"DELETE FROM {name}"
    if kind == "count":
        return f"SELECT count(*) AS count FROM {name}"
    if kind == "aggregate":
        column = quoted(_known("column", parts["column"], columns))
        per = f"{quoted(_known('column', parts['per'], columns))}, " if parts["per"] else ""
        return f"SELECT {per}{_AGGREGATES[parts['how'].lower()]}({column}) AS value FROM {name}"
    asked = re.split(r",? and |, ?", parts["columns"])
    return f"SELECT {', '.join(quoted(_known('column', c, columns)) for c in asked)} FROM {name}"


def _where(text: str | None, columns: Sequence[str], said: dict[str, Any]) -> str:
    if not text:
        return ""
    conditions = []
    at = 0
    text = text.strip().rstrip(".?")
    while True:
        found = _CONDITION.match(text, at)
        if found is None:
            raise UsageError(f"{text[at:]!r:.80} is no condition; write COLUMN is VALUE and ...")
        operator = _OPERATORS[found[2].lower()]
        given = _said(found[3], said)
        if operator == "LIKE":
            given = f"'%' || {given} || '%'"
        conditions.append(f"{quoted(_known('column', found[1], columns))} {operator} {given}")
        at = found.end()
        if at == len(text):
            return f" WHERE {' AND '.join(conditions)}"
        joint = re.compile(r" and ", re.I).match(text, at)
        if joint is None:
            raise UsageError(f"{text[at:]!r:.80} follows a condition; join conditions with and")
        at = joint.end()


def _said(text: str, said: dict[str, Any]) -> str:
    name = f"value{len(said)}"
    said[name] = value(text)
    return f"<said.{name}>"


def _known(what: str, name: str, known: "Mapping[str, Any] | Sequence[str]") -> str:
    for one in known:
        if one.lower() == name.lower():
            return one
    raise UsageError(f"there is no {what} {name}; there are: {', '.join(known)}")
