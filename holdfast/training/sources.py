"""Where training text comes from: files, directories and JSONL, read one document at a time."""

import glob
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from holdfast.errors import UsageError

# What a directory gives without a glob.
_TEXT = """
    .txt .text .md .markdown .rst .tex .org .adoc .csv .tsv .json .jsonl .xml .html .htm .css
    .yaml .yml .toml .ini .cfg .conf .py .pyi .pyx .ipynb .c .h .cc .cpp .cxx .hpp .hh .cu .cuh
    .rs .go .java .kt .scala .swift .m .cs .js .jsx .mjs .ts .tsx .rb .php .pl .lua .r .jl .hs
    .ml .ex .exs .erl .clj .el .lisp .sh .bash .zsh .ps1 .sql .proto .cmake .make .f90 .zig .vue
    .svelte .log
"""
SUFFIXES = frozenset(_TEXT.split())


@dataclass(frozen=True)
class DataSource:
    """What a plan records about its data.

    Args:
        paths: files, directories, or patterns such as "books/*.txt".
        glob: which files of a directory, such as "**/*.py"; default: common text and code files.
        text_field: the JSONL field that holds a text, or a chat as a list of messages; a line
            without it may hold a chat in `messages`.
        validation: fraction of the tokens held out.
        seed: of the split and of the order of sequences.
    """

    paths: tuple[str, ...]
    glob: str | None = None
    text_field: str = "text"
    validation: float = 0.05
    seed: int = 0

    def __post_init__(self):
        paths = (self.paths,) if isinstance(self.paths, str | Path) else self.paths
        object.__setattr__(self, "paths", tuple(map(str, paths)))
        if not 0 <= self.validation < 1:
            raise UsageError(
                f"validation={self.validation} is not a fraction of the data; "
                "give a number from 0 (none) to below 1"
            )


@dataclass(frozen=True)
class Document:
    """A text, or the messages of a chat; `where` is its file, and line in JSONL."""

    content: str | list[Any]
    where: str


@dataclass
class Reading:
    """Counts kept while reading; `skipped` says what was left out and why."""

    files: int = 0
    bytes_read: int = 0
    bytes_total: int = 0
    skipped: Counter[str] = field(default_factory=Counter)


def documents(source: DataSource, reading: Reading) -> Iterator[Document]:
    """The documents of `source` in a fixed order, counted in `reading`.

    Files named outright must be text; in directories others are skipped and counted.

    Raises:
        UsageError: a path that does not exist, a named file that is not text, a malformed line.
    """
    files = _files(source, reading)
    sizes = [path.stat().st_size for path, _ in files]
    reading.bytes_total = sum(sizes)
    for (path, named), size in zip(files, sizes, strict=True):
        before = reading.bytes_read
        if path.suffix.lower() == ".jsonl":
            yield from _read_jsonl(path, source.text_field, reading)
        else:
            text = _read_text(path, named, reading)
            if text:
                yield Document(text, str(path))
        reading.bytes_read = before + size


def _files(source: DataSource, reading: Reading) -> list[tuple[Path, bool]]:
    """Each file once, and whether it was named outright: a path's files are sorted by name."""
    found: dict[Path, tuple[Path, bool]] = {}

    def add(path: Path, named: bool) -> None:
        if found.setdefault(path.resolve(), (path, named))[0] is not path:
            reading.skipped["files given twice"] += 1

    for name in source.paths:
        path = Path(name).expanduser()
        if path.is_dir():
            for inner in _inside(path, source.glob, reading):
                add(inner, False)
        elif path.exists():
            add(path, True)
        else:
            matches = sorted(glob.glob(str(path), recursive=True))
            if not matches:
                raise UsageError(
                    f"data path {name!r} does not exist and matches nothing "
                    f"(working directory: {os.getcwd()}); give a file, a directory or a pattern"
                )
            for match in matches:
                if os.path.isfile(match):
                    add(Path(match), False)
    return list(found.values())


def _inside(root: Path, pattern: str | None, reading: Reading) -> list[Path]:
    try:
        matches = list(root.glob(pattern or "**/*"))
    except (ValueError, NotImplementedError) as error:
        raise UsageError(
            f"glob {pattern!r} is malformed ({error}); it is relative to each directory, "
            'for example "**/*.py"'
        ) from error
    files = []
    for path in sorted(matches, key=lambda path: path.relative_to(root).as_posix()):
        if not path.is_file():
            continue
        if any(part.startswith(".") for part in path.relative_to(root).parts):
            reading.skipped["hidden files"] += 1
        elif pattern is None and path.suffix.lower() not in SUFFIXES:
            reading.skipped["files of other types (name them with a glob)"] += 1
        else:
            files.append(path)
    return files


def _read_text(path: Path, named: bool, reading: Reading) -> str:
    raw = _read(path)
    text, fault = None, "binary files"
    if b"\0" not in raw[:8192]:
        try:
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            fault = "files that are not UTF-8"
            if named:
                raise UsageError(
                    f"{path} is not UTF-8 (byte {error.start}); convert it, "
                    f"for example: iconv -f latin1 -t utf-8 {path.name}"
                ) from error
    if text is None:
        if named:
            raise UsageError(f"{path} is a binary file; expected UTF-8 text or .jsonl")
        reading.skipped[fault] += 1
        return ""
    if not text:
        reading.skipped["empty files"] += 1
        return ""
    reading.files += 1
    return text


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error


def _read_jsonl(path: Path, text_field: str, reading: Reading) -> Iterator[Document]:
    reading.files += 1
    try:
        lines = path.open("rb")
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    with lines:
        for number, line in enumerate(lines, start=1):
            reading.bytes_read += len(line)
            if not line.strip():
                continue
            content = _content(line, text_field, f"{path}:{number}")
            if content:
                yield Document(content, f"{path}:{number}")
            else:
                reading.skipped["empty texts"] += 1


def _content(line: bytes, text_field: str, where: str) -> str | list[Any]:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except ValueError as error:
        raise UsageError(
            f"{where}: malformed JSON ({error}); expected one object a line"
        ) from error
    if not isinstance(row, dict):
        raise UsageError(f"{where}: {type(row).__name__}, expected an object with fields")
    key = text_field if text_field in row else "messages"
    if key not in row:
        raise UsageError(
            f"{where}: no field {text_field!r} and no 'messages'; the fields are "
            f"{', '.join(sorted(row)) or 'none'}. Name the one that holds the text"
        )
    content = row[key]
    if not isinstance(content, str | list):
        raise UsageError(
            f"{where}: field {key!r} is {type(content).__name__}, "
            "expected a text or a list of messages"
        )
    # JSON can spell half of a surrogate pair, which is no character and has no bytes.
    try:
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{where}: field {key!r} holds a lone surrogate, which is not text; remove the line"
        ) from error
    return content
