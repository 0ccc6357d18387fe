"""Programs whose tensors are placed in fast or slow memory: from files, traces, or a generator.

A file has one line per operand:

    instruction,compute,tensor,access,nbytes,alias
    layer0,1200,x,read,4096,
    layer0,1200,y,write,4096,

`compute` is the time in nanoseconds that an instruction needs with all operands at hand. Lines of
one instruction stand together, instructions in the order in which they run. Tensors of one `alias`
are the same memory: an update in place reads one of them and writes another. A tensor is written
at most once; one that is never written is there from the start.
"""

import csv
import graphlib
import io
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from holdfast.errors import UsageError

if TYPE_CHECKING:
    from holdfast.plan.models import ModelSource

COLUMNS = ("instruction", "compute", "tensor", "access", "nbytes", "alias")


@dataclass(frozen=True)
class Tensor:
    """`alias` names the memory that it shares; empty where it has its own."""

    name: str
    nbytes: int
    alias: str = ""


@dataclass(frozen=True)
class Instruction:
    """What runs for at least `compute` nanoseconds on the tensors that it names."""

    name: str
    compute: int
    reads: tuple[str, ...]
    writes: tuple[str, ...]


@dataclass(frozen=True)
class Use:
    """One instruction's access to one storage: `nbytes` moved by reads and writes together.

    `before` and `after` are the uses of that storage next to it, by index in `Program.uses`.
    """

    index: int
    instruction: int
    storage: int
    nbytes: int
    reads: bool
    writes: bool
    before: int | None
    after: int | None


@dataclass(frozen=True)
class Storage:
    """Memory of one tensor or of one group of aliases.

    `given`: it is there from the start, in slow memory. `result`: its last use writes it, so that
    it has to be in slow memory at the end.
    """

    name: str
    nbytes: int
    uses: tuple[int, ...]
    given: bool
    result: bool


@dataclass(frozen=True)
class Program:
    """Instructions in the order in which they run, and the tensors that they name.

    Raises:
        UsageError: an unknown or a twice-written tensor, one read before it is written, a circle
            of instructions that wait for each other, or an alias read after it was overwritten.
    """

    tensors: tuple[Tensor, ...]
    instructions: tuple[Instruction, ...]

    def __post_init__(self) -> None:
        if not any(i.reads or i.writes for i in self.instructions):
            raise UsageError("a program without operands places nothing; list an instruction's")
        sizes = {t.name: t.nbytes for t in self.tensors}
        if len(sizes) < len(self.tensors):
            raise UsageError("two tensors have one name; names must differ")
        for t in self.tensors:
            if t.nbytes < 1:
                raise UsageError(f"tensor {t.name} has {t.nbytes} bytes; give 1 or more")
        writer: dict[str, int] = {}
        for i, instruction in enumerate(self.instructions):
            if instruction.compute < 0:
                raise UsageError(
                    f"{instruction.name} computes for {instruction.compute} ns; give 0 or more"
                )
            for name in (*instruction.reads, *instruction.writes):
                if name not in sizes:
                    raise UsageError(f"{instruction.name} names {name}, which is no tensor")
            for name in instruction.writes:
                if name in writer:
                    raise UsageError(
                        f"tensor {name} is written by {self.instructions[writer[name]].name} and "
                        f"by {instruction.name}; name the second an alias of the first"
                    )
                writer[name] = i
        self._check_order(writer)
        self._check_aliases()

    def _check_order(self, writer: dict[str, int]) -> None:
        needs = {
            i: {writer[name] for name in instruction.reads if name in writer}
            for i, instruction in enumerate(self.instructions)
        }
        try:
            list(graphlib.TopologicalSorter(needs).static_order())
        except graphlib.CycleError as error:
            names = " -> ".join(self.instructions[i].name for i in error.args[1])
            raise UsageError(
                f"instructions wait for each other in a circle: {names}; a program has none"
            ) from None
        for i, before in needs.items():
            late = next((j for j in before if j > i), None)
            if late is not None:
                early, later = self.instructions[i].name, self.instructions[late].name
                raise UsageError(
                    f"{early} reads what {later} writes later; list instructions as they run"
                )

    def _check_aliases(self) -> None:
        group = {t.name: t.alias for t in self.tensors if t.alias}
        current: dict[str, str] = {}
        for instruction in self.instructions:
            for name in instruction.reads:
                if name in group and current.setdefault(group[name], name) != name:
                    raise UsageError(
                        f"{instruction.name} reads {name}, whose memory {current[group[name]]} "
                        "has taken; read that one, or drop the alias"
                    )
            for name in instruction.writes:
                if name in group:
                    current[group[name]] = name

    @cached_property
    def storages(self) -> tuple[Storage, ...]:
        found = []
        for s, name in enumerate(self._names):
            uses = [u for u in self.uses if u.storage == s]
            nbytes = max(t.nbytes for t in self.tensors if _memory(t) == name)
            given, result = uses[0].reads, uses[-1].writes
            found.append(Storage(name, nbytes, tuple(u.index for u in uses), given, result))
        return tuple(found)

    @cached_property
    def _names(self) -> tuple[str, ...]:
        memory = {t.name: _memory(t) for t in self.tensors}
        named = [memory[n] for i in self.instructions for n in (*i.reads, *i.writes)]
        return tuple(dict.fromkeys(named))

    @cached_property
    def uses(self) -> tuple[Use, ...]:
        """Every use, in order of instructions, and within one of operands before outputs."""
        number = {name: s for s, name in enumerate(self._names)}
        tensors = {t.name: t for t in self.tensors}
        rows: list[list] = []
        last: dict[int, int] = {}
        for i, instruction in enumerate(self.instructions):
            moved: dict[int, list] = {}
            for writes, names in ((False, instruction.reads), (True, instruction.writes)):
                for name in names:
                    entry = moved.setdefault(number[_memory(tensors[name])], [0, False, False])
                    entry[0] += tensors[name].nbytes
                    entry[1 + writes] = True
            for s, (nbytes, reads, writes) in moved.items():
                before = last.get(s)
                if before is not None:
                    rows[before][-1] = len(rows)
                last[s] = len(rows)
                rows.append([len(rows), i, s, nbytes, reads, writes, before, None])
        return tuple(Use(*row) for row in rows)

    @property
    def nbytes(self) -> int:
        return sum(s.nbytes for s in self.storages)

    def to_csv(self) -> str:
        """The text that `parse` reads."""
        tensors = {t.name: t for t in self.tensors}
        rows = csv.writer(text := io.StringIO(), lineterminator="\n")
        rows.writerow(COLUMNS)
        for instruction in self.instructions:
            for access, names in (("read", instruction.reads), ("write", instruction.writes)):
                for name in names:
                    t = tensors[name]
                    timed = (instruction.name, instruction.compute)
                    rows.writerow((*timed, name, access, t.nbytes, t.alias))
        return text.getvalue()

    @classmethod
    def parse(cls, text: str, name: str = "CSV") -> "Program":
        """Read the format that the module describes.

        Raises:
            UsageError: what `Program` refuses, and lines that are malformed or contradict others.
        """
        rows = [row for row in csv.reader(io.StringIO(text)) if row]
        if not rows or tuple(cell.strip() for cell in rows[0]) != COLUMNS:
            raise UsageError(
                f"{name} has columns {','.join(rows[0]) if rows else 'none'}; "
                f"a program has {','.join(COLUMNS)}"
            )
        tensors: dict[str, Tensor] = {}
        instructions: list[Instruction] = []
        for at, row in enumerate(rows[1:], start=2):
            if len(row) != len(COLUMNS):
                raise UsageError(f"{name} line {at} has {len(row)} fields, not {len(COLUMNS)}")
            label, compute, tensor, access, nbytes, alias = (cell.strip() for cell in row)
            try:
                made = Tensor(tensor, int(nbytes), alias)
                begun = Instruction(label, int(compute), (), ())
            except ValueError as error:
                raise UsageError(
                    f"{name} line {at}: {error}; times and bytes are integers"
                ) from None
            if access not in ("read", "write"):
                raise UsageError(f"{name} line {at}: access {access!r} is neither read nor write")
            if tensors.setdefault(tensor, made) != made:
                raise UsageError(
                    f"{name} line {at} gives tensor {tensor} another size or alias than before"
                )
            if not instructions or instructions[-1].name != label:
                instructions.append(begun)
            one = instructions[-1]
            if one.compute != begun.compute:
                raise UsageError(f"{name} line {at} gives {label} another compute than before")
            if access == "read":
                instructions[-1] = replace(one, reads=(*one.reads, tensor))
            else:
                instructions[-1] = replace(one, writes=(*one.writes, tensor))
        return cls(tuple(tensors.values()), tuple(instructions))

    @classmethod
    def from_file(cls, path: Path | str) -> "Program":
        """`parse` of a file; UsageError also where it cannot be read."""
        try:
            return cls.parse(Path(path).read_text(), str(path))
        except OSError as error:
            raise UsageError(f"{path} cannot be read: {error.strerror}; name a CSV file") from None

    @classmethod
    def from_trace(
        cls,
        source: "ModelSource",
        batch: int,
        sequence: int,
        *,
        flops: float = 50e12,
        training: bool = True,
    ) -> "Program":
        """One step of a model, traced without weights or data; `flops` per second set `compute`.

        Views share the memory of what they view. Blocks are not repeated: trace a shallow model.
        """
        from holdfast.meter import fake_step
        from holdfast.plan.blocks import stacks_of, whole
        from holdfast.plan.models import loss_of
        from holdfast.plan.trace import record, to_fake_

        steps: list[tuple[str, int, list, list]] = []

        def observe(log, key, func, args, kwargs, result, count) -> None:
            name = func._schema.name.partition("::")[2]
            if name.startswith(("empty", "new_empty")):
                return
            given, made = _storages(log, (args, kwargs)), _storages(log, result)
            if not func._schema.is_mutable:
                made = {s: n for s, n in made.items() if s not in given}
            if made:
                overwrites = name in ("copy_", "zero_", "fill_")
                reads = [s for s in given if not (overwrites and s in made)]
                steps.append((name, round(count / flops * 1e9), reads, list(made)))
                sizes.update(given | made)

        sizes: dict[int, int] = {}
        model = source.build("meta")
        stacks = whole(stacks_of(model))
        with fake_step():
            model = to_fake_(model).train(training)
            inputs = source.example_inputs(batch, sequence, "cpu")

            def run() -> None:
                loss = loss_of(model(**inputs))
                if training:
                    loss.backward()

            record(model, stacks, run, inputs=inputs, op_seconds=lambda *_: 0.0, observe=observe)
        return cls._versioned(steps, sizes)

    @classmethod
    def _versioned(cls, steps: Sequence[tuple[str, int, list, list]], sizes: dict) -> "Program":
        """Number the contents of storages, so that each tensor is written once."""
        version: dict[int, int] = {}
        tensors: dict[str, Tensor] = {}
        instructions = []

        def named(s: int) -> str:
            name = f"t{s}.{version[s]}"
            tensors[name] = Tensor(name, sizes[s], f"t{s}")
            return name

        for at, (name, compute, reads, writes) in enumerate(steps):
            for s in reads:
                version.setdefault(s, 0)
            read = tuple(map(named, reads))
            for s in writes:
                version[s] = version.get(s, -1) + 1
            written = tuple(map(named, writes))
            instructions.append(Instruction(f"{at}.{name}", compute, read, written))
        return cls(tuple(tensors.values()), tuple(instructions))

    @classmethod
    def generate(cls, seed: int, layers: int | None = None) -> "Program":
        """A random network's forward pass, and for two of three seeds its backward pass.

        Layers differ in width; some add an earlier activation, some update theirs in place.
        """
        draw = random.Random(seed)
        count = layers or draw.randint(4, 7)
        tensors: dict[str, Tensor] = {}
        instructions: list[Instruction] = []

        def tensor(name: str, low: float, high: float, alias: str = "") -> str:
            nbytes = tensors[alias].nbytes if alias else 1024 * round(2 ** draw.uniform(low, high))
            if alias:
                tensors[alias] = Tensor(alias, nbytes, alias)
            tensors[name] = Tensor(name, nbytes, alias)
            return name

        def run(name: str, reads: Iterable[str], writes: Iterable[str]) -> None:
            reads, writes = tuple(dict.fromkeys(reads)), tuple(writes)
            moved = sum(tensors[t].nbytes for t in (*reads, *writes))
            # From bound by slow memory to hardly so: slow memory moves 100 bytes in a nanosecond.
            compute = round(moved / 100 * draw.choice((0.05, 0.2, 0.4, 0.8)))
            instructions.append(Instruction(name, compute, reads, writes))

        current = tensor("x", 5, 9)
        kept: list[tuple[str, str]] = []  # of each layer, what entered it and its weight
        for k in range(count):
            weight = tensor(f"w{k}", 4, 10)
            reads = [current, weight]
            if kept and draw.random() < 0.4:
                reads.append(draw.choice(kept)[0])
            made = tensor(f"a{k}", 5, 9)
            run(f"layer{k}", reads, [made])
            kept.append((current, weight))
            current = made
            if draw.random() < 0.3:
                current = tensor(f"b{k}", 0, 0, alias=made)
                run(f"act{k}", [made], [current])
        if draw.random() < 2 / 3:
            gradient = tensor("g", 5, 9)
            run("loss", [current], [gradient])
            for k in reversed(range(count)):
                entering, weight = kept[k]
                # An activation that was overwritten is read as what took its memory.
                run(f"dw{k}", [gradient, entering], [tensor(f"dw{k}", 4, 10)])
                if k:
                    below = tensor(f"g{k}", 5, 9)
                    run(f"dx{k}", [gradient, weight], [below])
                    gradient = below
        return cls(tuple(tensors.values()), tuple(instructions))


def _memory(tensor: Tensor) -> str:
    return tensor.alias or tensor.name


def _storages(log, value) -> dict[int, int]:
    """Bytes of the storages in a nested value, by their number in the log."""
    from holdfast.meter import open_storages

    numbered = ((log.id_of(storage), storage.nbytes()) for storage in open_storages(value))
    return {sid: nbytes for sid, nbytes in numbered if sid is not None and nbytes}
