"""MSA (173): port a whole C program to Checked C with prompts that stay small.

Keeps    per pointer declaration its kinds, its bounds, whether they are checked, and where they
         come from; and which tasks of the port are finished, in one SQLite file.
Form     a task per function, struct or global with pointers whose bounds no rule finds; its prompt
         is its own text and the annotated signatures and structs that it uses, never their bodies.
Bytes    of a prompt: at most `budget`, counted as UTF-8 bytes, which no byte-level tokenizer
         exceeds in tokens; of the store: the UTF-8 of keys, bounds and reasons.
Source   Mohammed, Lal, Rastogi, Roy, Sharma, "Enabling Memory Safety of C
         Programs using LLMs", 2024.
Departs  a model answers with bounds only, as data: code is never rewritten, so a pointer that would
         need it stays plain C, with the reason, and with it all that exchange values with it (no
         interface types are used). Every answer is read as an expression, tested for names in
         scope that do not change, and against sizes known where its function is called. Arrays of
         fixed size and pointers to functions are left as they are. A Checked C compiler is never
         run; what is promised is that erasure gives the original program, and what
         `c.guard` tests at run time.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.errors import UsageError
from holdfast.longterm.c.annotate import KINDS, Annotation, Texts, erase, looks_annotated
from holdfast.longterm.c.bounds import Bounds, Inference
from holdfast.longterm.c.facts import ARRAY, Program
from holdfast.longterm.c.names import Variable
from holdfast.longterm.c.source import Skipped, Unit, read_unit, same_tree
from holdfast.longterm.c.valid import valid
from holdfast.longterm.tasks import FactStore, TaskGraph

if TYPE_CHECKING:
    from holdfast.longterm.language.llm import LLM

REPAIRS = 3
SCHEMA = {
    "type": "object",
    "properties": {
        "bounds": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"pointer": {"type": "string"}, "bounds": {"type": "string"}},
                "required": ["pointer", "bounds"],
                "additionalProperties": False,
            },
        }
    },
    "required": ["bounds"],
    "additionalProperties": False,
}
_SYSTEM = (
    "Give the bounds of C pointers in Checked C: count(e), byte_count(e) or bounds(low, high). "
    "Use only names in scope where the pointer is declared, whose values do not change, numbers, "
    "sizeof and + - * /. Leave out a pointer that no such bounds fit."
)


@dataclass(frozen=True)
class Fact:
    """What is known of one pointer: `status` is "checked", or "unsafe" for a `reason`.

    Keys read `function(0)` for a parameter, `function()` for a result, `function/name` for a local,
    `struct tag.name` for a field and the name alone for a global.
    """

    key: str
    kinds: tuple[str, ...]
    bounds: str | None
    status: str
    source: str
    reason: str = ""


@dataclass(frozen=True)
class Port:
    """A ported program: its `files`, the `facts` of all its pointers, and what it took.

    `calls` are those of this run, `prompt` is the largest of them; `skipped` stayed as it was.
    """

    files: dict[str, str]
    facts: dict[str, Fact]
    skipped: list[Skipped]
    tasks: int
    calls: int
    prompt: int
    program: Program
    bounds: dict[str, Bounds]


def port(
    sources: Iterable[str | Path],
    *,
    llm: "LLM | None" = None,
    budget: int = 8192,
    count: Callable[[str], int] | None = None,
    store: FactStore | None = None,
    include: Iterable[str | Path] = (),
    priority: Callable[[str], Any] = str,
) -> Port:
    """Annotate all C files of one program; nothing is written to them.

    Args:
        sources: `.c` files, and the headers of the program that may change with them.
        budget: the most that a prompt may take, in `count` of its text, UTF-8 bytes by default.
        store: where finished tasks are kept; the same call with it goes on after a kill.

    Raises:
        UsageError: no C file, one that cannot be read, or a budget that holds no question.
    """
    measure = count or (lambda text: len(text.encode()))
    if budget < measure(_SYSTEM) + 256:
        raise UsageError(
            f"a budget of {budget} holds no question: the instructions alone take "
            f"{measure(_SYSTEM)}; give {measure(_SYSTEM) + 256} or more"
        )
    files, units, skipped = _read(sources, include)
    program = Program(units)
    skipped += [one for unit in units for one in unit.skipped]
    texts = Texts(program, files)
    _lose(program, texts.lost)
    work = _Work(program, texts, Inference(program).found, llm, budget, measure, store)
    for group in work.graph().order(priority):
        work.do(group)
    while True:
        facts = work.facts()
        annotated = texts.annotated(work.notes(facts))
        differing = _differing(annotated, units, include)
        if not differing:
            break
        for path in differing:
            skipped.append(Skipped(path, 1, "its annotations do not erase to the original"))
            here = {key for key, sites in texts.sites.items() if path in [s[0] for s in sites]}
            # If its own declarations are not at fault, those that it includes are.
            here = here - program.wild.keys() or texts.sites.keys()
            _lose(program, dict.fromkeys(here, f"in {path}, which is left untouched"))
    return Port(
        annotated, facts, skipped, work.tasks, work.calls, work.largest, program, work.bounds
    )


def _read(
    sources: Iterable[str | Path], include: Iterable[str | Path]
) -> tuple[dict[str, str], list[Unit], list[Skipped]]:
    files, units, skipped = {}, [], []
    for path in map(Path, sources):
        try:
            text = path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot read {path}: {error}; give C files in UTF-8") from error
        if line := looks_annotated(text):
            skipped.append(Skipped(str(path), line, "has Checked C, or a name of it, already"))
            continue
        files[str(path)] = text
        if path.suffix != ".h":
            units.append(read_unit(path, [Path(one) for one in include]))
    if not units:
        raise UsageError(
            "no C file to port: " + ("; ".join(map(str, skipped)) or "name one or more .c files")
        )
    return files, units, skipped


def _lose(program: Program, reasons: Mapping[str, str]) -> None:
    for key, reason in reasons.items():
        program.wild.setdefault(key, reason)
    program.spread(program.wild)


def _differing(
    annotated: Mapping[str, str], units: list[Unit], include: Iterable[str | Path]
) -> list[str]:
    """Units whose erased text does not parse to the tree of the original."""
    with tempfile.TemporaryDirectory() as folder:
        moved = {path: Path(folder, *Path(path).absolute().parts[1:]) for path in annotated}
        for path, text in annotated.items():
            moved[path].parent.mkdir(parents=True, exist_ok=True)
            moved[path].write_text(erase(text))
        places = [Path(folder, *Path(one).absolute().parts[1:]) for one in include]
        # Headers that are no part of the sources stay where they are.
        places += [*map(Path, include), *(Path(unit.path).absolute().parent for unit in units)]
        return [
            unit.path
            for unit in units
            if not same_tree(read_unit(moved[unit.path], places).tree, unit.tree)
        ]


class _Work:
    """The tasks of one port, and what is known so far."""

    def __init__(self, program, texts, bounds, llm, budget, measure, store):
        self.program, self.texts, self.bounds = program, texts, dict(bounds)
        self.llm, self.budget, self.measure = llm, budget, measure
        self.store = store or FactStore()
        self.reasons: dict[str, str] = {}
        self.tasks = self.calls = self.largest = 0
        self.owned: dict[str, list[Variable]] = {}
        for variable in program.variables.values():
            if variable.writable:
                self.owned.setdefault(variable.owner, []).append(variable)

    def graph(self) -> TaskGraph:
        program = self.program
        return TaskGraph(
            {
                owner: {*program.calls.get(owner, ()), *program.mentions.get(owner, ())} - {owner}
                for owner in {*self.owned, *program.functions}
            }
        )

    def open(self, owner: str) -> list[Variable]:
        """Pointers that are followed as arrays and have no bounds."""
        program = self.program
        return [
            v for v in self.owned.get(owner, ())
            if v.key not in program.wild and v.key not in self.bounds
            and v.levels[0] == "*" and program.need.get((v.key, 0)) == ARRAY
            and not (v.role == "param" and not v.followed and self._marks(v))
        ]  # fmt: skip

    def _marks(self, variable: Variable) -> bool:
        """Whether a pointer only marks another one's end, and needs no bounds of its own."""
        return any(
            variable.name in self.program.ends.get(v.key, ()) for v in self.owned[variable.owner]
        )

    def facts(self) -> dict[str, Fact]:
        """Of all pointers; what has no bounds by now is unsafe, with all that it exchanges."""
        program = self.program
        unbound = {
            v.key: self.reasons.get(v.key, "no rule finds its bounds and no model was asked")
            for owner in self.owned
            for v in self.open(owner)
        }
        _lose(program, unbound)
        found = {}
        for variables in self.owned.values():
            for v in variables:
                kinds = tuple(
                    KINDS[program.need.get((v.key, i), 0)]
                    for i, level in enumerate(v.levels)
                    if level == "*"
                )
                bounds = self.bounds.get(v.key)
                unsafe = program.wild.get(v.key)
                found[v.key] = Fact(
                    v.key,
                    kinds,
                    str(bounds) if bounds and not unsafe else None,
                    "unsafe" if unsafe else "checked",
                    bounds.source if bounds else "uses",
                    unsafe or "",
                )
        return found

    def notes(self, facts: Mapping[str, Fact]) -> dict[str, Annotation]:
        """What the declarations of checked pointers shall say."""
        need, variables = self.program.need, self.program.variables
        return {
            key: Annotation(
                tuple(need.get((key, i), 0) for i in range(len(variables[key].levels))),
                self.bounds.get(key),
            )
            for key, fact in facts.items()
            if fact.status == "checked"
        }

    def do(self, group: tuple[str, ...]) -> None:
        """Ask for the missing bounds of one group of tasks, or take them from the store."""
        wanted = [v for owner in group for v in self.open(owner)]
        if not wanted or self.llm is None:
            return
        self.tasks += 1
        messages = self._question(group, wanted)
        if messages is None:
            for v in wanted:
                self.reasons[v.key] = f"its function does not fit a prompt of {self.budget}"
            return
        name = " ".join(group)
        digest = hashlib.sha256(json.dumps(messages).encode()).hexdigest()
        result = self.store.get(name, digest)
        if result is None:
            result = self._ask(messages, wanted)
            self.store.put(name, digest, result)
        for key, (form, args, reason) in result.items():
            if form:
                self.bounds[key] = Bounds(form, tuple(args), "model")
            else:
                self.reasons[key] = reason

    def _ask(self, messages: list[dict[str, str]], wanted: list[Variable]) -> dict[str, Any]:
        """Up to `REPAIRS` corrections; what is still refused then is unsafe, with the reason."""
        missing = {self._said(v): v for v in wanted}
        result: dict[str, Any] = {}
        question, refused = messages, {}
        for _ in range(1 + REPAIRS):
            size = sum(self.measure(m["content"]) for m in question)
            self.calls, self.largest = self.calls + 1, max(self.largest, size)
            answer, refused = self.llm.complete(question, SCHEMA), {}
            for item in answer["bounds"]:
                name = item["pointer"]
                if name not in missing:
                    continue
                try:
                    bounds = valid(self.program, missing[name], item["bounds"])
                except ValueError as error:
                    refused[name] = str(error)
                else:
                    result[missing.pop(name).key] = (bounds.form, bounds.args, "")
            if not refused:
                break
            note = "\nRefused:\n" + "\n".join(f"{name}: {why}" for name, why in refused.items())
            room = self.budget - sum(self.measure(m["content"]) for m in messages)
            while note and self.measure(note) > room:
                note = note[: len(note) * 3 // 4]
            question = [messages[0], {"role": "user", "content": messages[1]["content"] + note}]
        for name, variable in missing.items():
            reason = f"the model's bounds were refused: {refused[name]}" if name in refused else (
                "neither a rule nor the model gives its bounds")  # fmt: skip
            result[variable.key] = ("", (), reason)
        return result

    def _said(self, variable: Variable) -> str:
        if variable.role == "return":
            return f"{variable.owner}()"
        own = variable.name or variable.key
        return own if variable.role == "global" else f"{variable.owner}:{own}"

    def _question(self, group: tuple[str, ...], wanted: list[Variable]):
        """The prompt of a group, its summary cut to the budget; None if the text does not fit."""
        program = self.program
        bodies = [
            self.texts.function(owner) if owner in program.functions else self._struct(owner)
            for owner in group
        ]
        ask = "Bounds are wanted for: " + ", ".join(self._said(v) for v in wanted)
        content = "\n".join([*bodies, ask])
        room = self.budget - self.measure(_SYSTEM)
        if self.measure(content) + 64 > room:
            return None
        used = {
            other
            for owner in group
            for other in {*program.calls.get(owner, ()), *program.mentions.get(owner, ())}
        }
        summary = ""
        for other in sorted(used - set(group)):
            line = self._summary(other) + "\n"
            if self.measure(summary + line + content) + 1 <= room:
                summary += line
        content = f"{summary}\n{content}"
        return [
            {"role": "system", "content": _SYSTEM},
            {"role": "user", "content": content},
        ]

    def _struct(self, owner: str) -> str:
        if owner not in self.program.structs:
            return self._declared(owner, [self.program.variables[owner]])
        fields = self.program.structs[owner].decls
        return self._declared(owner, [self.program.variables[f"{owner}.{f.name}"] for f in fields])

    def _summary(self, owner: str) -> str:
        """A signature or a struct as it is known by now, without a body."""
        program = self.program
        if owner in program.parameters:
            keys = [*program.parameters[owner], f"{owner}()"]
            return self._declared(owner, [program.variables[key] for key in keys])
        return self._struct(owner)

    def _declared(self, owner: str, variables: list[Variable]) -> str:
        parts = []
        for v in variables:
            kind = self.program.shape(v.type)
            if v.levels[:1] == ["*"]:
                kind = f"{KINDS[self.program.need.get((v.key, 0), 0)]}<{kind[:-1]}>"
            bounds = f" : {self.bounds[v.key]}" if v.key in self.bounds else ""
            parts.append(f"{'result' if v.role == 'return' else v.name} {kind}{bounds}")
        return f"{owner}: " + ", ".join(parts)
