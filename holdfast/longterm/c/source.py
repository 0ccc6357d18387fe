"""C sources as tokens and syntax trees, with the way back from a tree to the place in the text.

A program is read with the user's own preprocessor if it has macros or conditions, and without any
if it only includes standard headers. Declarations of the standard library come from here, so no
system header, with its compiler's private syntax, is ever parsed. A function that does not parse is
set aside with its file and line, and the rest of the file is read.
"""

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from pycparser import c_ast, c_parser

from holdfast.errors import UsageError

_HEADERS = (
    "assert complex ctype errno fenv float inttypes iso646 limits locale math setjmp signal "
    "stdalign stdarg stdatomic stdbool stddef stdint stdio stdlib stdnoreturn string tgmath "
    "threads time uchar wchar wctype strings unistd fcntl getopt pthread dirent "
    "sys/types sys/stat sys/time sys/mman sys/wait sys/socket netinet/in arpa/inet"
)
HEADERS = tuple(_HEADERS.split())
_INTEGERS = "".join(
    f"typedef {sign} {base} {u}int{width}_t; "
    for width, base in ((8, "char"), (16, "short"), (32, "int"), (64, "long"))
    for sign, u in (("signed", ""), ("unsigned", "u"))
)
PRELUDE = (
    "typedef unsigned long size_t; typedef long ssize_t; typedef long ptrdiff_t; "
    "typedef int wchar_t; typedef _Bool bool; typedef long intptr_t; typedef long intmax_t; "
    "typedef unsigned long uintptr_t; typedef unsigned long uintmax_t; typedef long time_t; "
    "typedef long off_t; typedef int pid_t; typedef struct _hf_file FILE; "
    "typedef struct _hf_va *va_list; typedef struct _hf_tm tm_t; " + _INTEGERS
)
# What compilers accept beyond the language, and library macros that are no expression.
_DEFINES = (
    "__attribute__(x)=", "__extension__=", "__inline=inline", "__inline__=inline",
    "__restrict=restrict", "__restrict__=restrict", "__const=const", "__volatile__=volatile",
    "va_arg(a,t)=(*(t*)0)", "va_start(a,b)=((void)0)", "va_end(a)=((void)0)",
    "offsetof(t,m)=((unsigned long)0)",
)  # fmt: skip

_TOKEN = re.compile(
    r"""(?P<space>\s+|//[^\n]*|/\*.*?\*/|\\\n)
    |(?P<directive>^[ \t]*\#(?:\\\n|[^\n])*)
    |(?P<name>[A-Za-z_]\w*)
    |(?P<number>\.?\d(?:[eEpP][+-]|[\w.])*)
    |(?P<string>"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')
    |(?P<op>\.\.\.|<<=|>>=|->|\+\+|--|<<|>>|&&|\|\||[-+*/%&|^=!<>]=|.)""",
    re.X | re.M | re.S,
)
_MARKER = re.compile(r'^# (\d+) "((?:\\.|[^"\\])*)"')


class Token(NamedTuple):
    text: str
    start: int
    line: int

    @property
    def end(self) -> int:
        return self.start + len(self.text)


class Skipped(NamedTuple):
    """What could not be read and stays as it is."""

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


def tokens(text: str) -> list[Token]:
    """Tokens of C text, without blanks, comments and directives; lines count from 1."""
    found, line = [], 1
    for match in _TOKEN.finditer(text):
        if match.lastgroup not in ("space", "directive"):
            found.append(Token(match[0], match.start(), line))
        line += match[0].count("\n")
    return found


@dataclass
class Unit:
    """One translation unit: its tree, and per file and line the text that the tree came from."""

    path: str
    tree: c_ast.FileAST
    lines: dict[tuple[str, int], str]
    skipped: list[Skipped] = field(default_factory=list)


def read_unit(path: Path, include: Iterable[Path] = ()) -> Unit:
    """Parse one C file.

    Raises:
        UsageError: not text, a directive that no preprocessor is here for, or one that it refuses.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {error}; give a C file in UTF-8") from error
    return parse_text(_preprocessed(path, text, include), str(path))


def parse_text(text: str, name: str = "<text>") -> Unit:
    """Parse C text that has no directives but includes of standard headers and line markers."""
    chunks = _uncommented(text).split("\n")
    lines, place, places = {}, (name, 0), []
    for chunk in chunks:
        if marker := _MARKER.match(chunk):
            place = (marker[2], int(marker[1]) - 1)
        else:
            place = (place[0], place[1] + 1)
            lines[place] = chunk
        places.append(place)
    skipped: list[Skipped] = []
    parser = c_parser.CParser()
    while True:
        source = f'{PRELUDE}\n# 1 "{name}"\n' + "\n".join(chunks)
        try:
            return Unit(name, parser.parse(source, "<prelude>"), lines, skipped)
        except (c_parser.ParseError, RecursionError) as error:
            where = re.match(r"(.*?):(\d+)(?::\d+)?: ?(.*)", str(error), re.S)
            at = (where[1], int(where[2])) if where else (name, len(chunks))
            reason = f"unsupported syntax ({where[3] if where else error})"
            row = places.index(at) if at in places else len(chunks) - 1
            if not _set_aside(chunks, row):
                raise UsageError(
                    f"{at[0]}:{at[1]}: {reason}; the file is left untouched, "
                    "move this line to a file of its own"
                ) from error
            skipped.append(Skipped(*at, reason))


def _set_aside(chunks: list[str], row: int) -> bool:
    """Blank the outermost definition that covers a row, a function down to its prototype first."""
    blanked = "\n".join("" if _MARKER.match(chunk) else chunk for chunk in chunks)
    depth, start, brace, spans = 0, None, None, []
    for token in tokens(blanked):
        start = token if start is None else start
        if token.text in "{([":
            if token.text == "{" and depth == 0:
                brace = token
            depth += 1
        elif token.text in "})]":
            depth = max(0, depth - 1)
        if depth == 0 and token.text in ("}", ";"):
            spans.append((start, brace, token))
            start = brace = None
    if start is not None:
        spans.append((start, brace, token))
    for start, brace, last in spans:
        if start.line - 1 <= row <= last.line - 1:
            head = tokens(blanked[start.start : (brace or last).start])
            # Of a function whose body is at fault, callers still need the prototype.
            keep = brace is not None and brace.line - 1 <= row and head and head[-1].text == ")"
            first = brace if keep else start
            cut = re.sub(r"[^\n]", " ", blanked[first.start : last.end])
            cut = (";" + cut[1:]) if keep else cut
            changed = blanked[: first.start] + cut + blanked[last.end :]
            for index, (old, new) in enumerate(zip(chunks, changed.split("\n"), strict=True)):
                chunks[index] = old if _MARKER.match(old) else new
            return changed != blanked
    return False


def _preprocessed(path: Path, text: str, include: Iterable[Path]) -> str:
    standard = re.compile(rf"\s*#\s*include\s*<({'|'.join(HEADERS)})\.h>\s*$")
    if all(standard.match(m[0]) for m in re.finditer(r"^[ \t]*#.*$", _uncommented(text), re.M)):
        return "\n".join(
            "" if standard.match(line) else line for line in _uncommented(text).split("\n")
        )
    compiler = shutil.which("gcc") or shutil.which("cc") or shutil.which("clang")
    if compiler is None:
        raise UsageError(
            f"{path} has macros or conditions and no C preprocessor is here; install gcc or clang, "
            "or give the output of one"
        )
    with tempfile.TemporaryDirectory() as folder:
        for header in HEADERS:
            stub = Path(folder, f"{header}.h")
            stub.parent.mkdir(parents=True, exist_ok=True)
            stub.touch()
        options = [f"-D{one}" for one in _DEFINES] + [f"-I{one}" for one in include]
        run = subprocess.run(
            [compiler, "-E", "-C", "-nostdinc", "-isystem", folder, *options, str(path)],
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
    if run.returncode:
        first = next((x for x in run.stderr.splitlines() if "error" in x), run.stderr.strip())
        raise UsageError(f"{path} does not pass the preprocessor: {first}")
    # Lines of the compiler itself carry only comments; pragmas are no part of the tree.
    return "\n".join(
        line if _MARKER.match(line) or not line.lstrip().startswith("#") else ""
        for line in _uncommented(run.stdout).split("\n")
    )


def _uncommented(text: str) -> str:
    """Comments as blanks, every other character where it was."""

    def blank(match: re.Match) -> str:
        if match.lastgroup == "space":
            return re.sub(r"[^\n]", " ", match[0])
        return match[0]

    return _TOKEN.sub(blank, text)


def same_tree(one: c_ast.Node, two: c_ast.Node) -> bool:
    """Whether two trees are equal but for positions."""
    stack = [(one, two)]
    while stack:
        a, b = stack.pop()
        if type(a) is not type(b):
            return False
        if any(getattr(a, n) != getattr(b, n) for n in a.attr_names):
            return False
        left, right = a.children(), b.children()
        if [name for name, _ in left] != [name for name, _ in right]:
            return False
        stack += [(x, y) for (_, x), (_, y) in zip(left, right, strict=True)]
    return True


def walk(node: c_ast.Node) -> Iterable[c_ast.Node]:
    """A node and all below it, in reading order, without recursion."""
    stack = [node]
    while stack:
        here = stack.pop()
        yield here
        stack += [child for _, child in reversed(here.children())]
