"""Small C functions with known bounds, ported and run with their bounds tested; a large program."""

import random
import subprocess
import tempfile
from pathlib import Path
from shutil import which

from holdfast.checks import Result, check
from holdfast.checks.longterm._checkedc_suite import CASES, program
from holdfast.errors import HoldfastError
from holdfast.longterm.c.annotate import erase
from holdfast.longterm.c.guard import guarded
from holdfast.longterm.c.source import read_unit, same_tree
from holdfast.longterm.checkedc import Port, port
from holdfast.longterm.language.llm import Scripted
from holdfast.longterm.tasks import FactStore

BUDGET, LINES = 2048, 20_000
WANTED = "Bounds are wanted for: "


def knowing(bounds: dict[str, str], program) -> Scripted:
    """A model that knows all bounds, but at first names something that is not there."""

    def answer(messages, schema):
        text = messages[-1]["content"]
        line = next(x for x in text.splitlines() if x.startswith(WANTED))
        found = []
        for name in line[len(WANTED) :].split(", "):
            owner, _, pointer = name.partition(":")
            for key, bound in bounds.items():
                variable = program.variables[key]
                if (variable.owner, variable.name) == (owner, pointer):
                    first = "Refused:" not in text
                    found.append({"pointer": name, "bounds": "count(nowhere)" if first else bound})
        return {"bounds": found}

    return Scripted(answer)


def area(messages, schema):
    """What is right for every question of `large`."""
    line = next(x for x in messages[-1]["content"].splitlines() if x.startswith(WANTED))
    names = line[len(WANTED) :].split(", ")
    return {"bounds": [{"pointer": name, "bounds": "count(h * w)"} for name in names]}


def large(seed: int, lines: int = LINES) -> str:
    """A program of so many lines: structs and functions that call earlier ones."""
    draw, parts, kinds, made = random.Random(seed), [], [], 0
    while made < lines:
        k = len(parts)
        kind = draw.randrange(4)
        kinds.append(kind)
        call = f"f{draw.randrange(k)}" if k else None
        body = [
            ["int s = 0;", "for (int i = 0; i < n; i++) {", "    s += a[i];", "}"],
            ["int s = 0;", "if (n > 0) {", "    s = a[0] + n;", "}"],
            ["int s = 1;", "while (s < n) {", "    a[s] = s;", "    s++;", "}"],
            ["int s = a[(w * h + 1) / 2];", "if (s > h) {", "    s = s - h;", "}"],
        ][kind]
        sizes = "int h, int w" if kind == 3 else "int n, int unused"
        text = [f"int f{k}(int *a, {sizes})", "{", *("    " + x for x in body)]
        if call and kind == 3:
            # More is used than a prompt holds.
            used = draw.sample(range(k), min(k, 60))
            text += [f"    s += f{one}(0, 0, s);" for one in used if kinds[one] != 3]
        elif call:
            text.append(f"    s += {call}(a, n, s);")
        parts.append([*text, "    return s;", "}", ""])
        made += len(parts[-1])
    return "\n".join(line for part in parts for line in part)


def runs(folder: Path, done: Port, source: Path) -> tuple[list[int], list[int]]:
    """Exit codes of right and wrong uses, in one build with tested bounds and one without."""
    (folder / "tested.c").write_text(guarded(done.program, done.bounds, source.read_text()))
    codes = []
    for name in (source, folder / "tested.c"):
        binary = folder / name.stem
        subprocess.run(["gcc", "-O1", "-w", "-o", str(binary), str(name)], check=True, timeout=60)
        codes.append(
            [
                subprocess.run([binary, str(k)], capture_output=True, timeout=10).returncode
                for k in range(2 * len(CASES))
            ]
        )
    return codes[0], codes[1]


@check(
    "checkedc",
    claim="of the bounds of 42 small C functions rules find at least 60 % and a model's answers, "
    "validated, the rest; a build that tests them passes every right use and traps every planted "
    "overflow; prompts of a program of 20,000 lines stay within 2 KiB",
)
def run(seed: int) -> Result:
    if which("gcc") is None:
        raise HoldfastError("the check builds C programs: install gcc")
    want = {key: bound for case in CASES for key, bound in case.bounds.items()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = folder / "suite.c"
        source.write_text(program())
        rules = port([source])
        done = port([source], llm=knowing(want, rules.program), budget=BUDGET)
        plain, tested = runs(folder, done, source)
        whole = folder / "large.c"
        whole.write_text(large(seed))
        wide = FactStore(folder / "tasks")
        big = port([whole], llm=Scripted(area), budget=BUDGET, store=wide)
        again = port([whole], llm=Scripted([]), budget=BUDGET, store=wide)
        wide.close()
        erased = []
        for one, path in ((done, source), (big, whole)):
            back = folder / "erased.c"
            back.write_text(erase(one.files[str(path)]))
            erased.append(same_tree(read_unit(back).tree, read_unit(path).tree))
    share = [
        sum(one.facts[key].bounds == bound for key, bound in want.items()) / len(want)
        for one in (rules, done)
    ]
    ours = {
        "bounds_by_rules": share[0],
        "bounds_with_model": share[1],
        "right_uses_pass": sum(code == 0 for code in tested[::2]),
        "overflows_trapped": sum(code == -6 for code in tested[1::2]),
        "functions": len(CASES),
        "lines": whole_lines(big),
        "pointers_checked_of_large": sum(f.status == "checked" for f in big.facts.values()),
        "pointers_of_large": len(big.facts),
        "questions": big.calls,
        "largest_prompt_bytes": big.prompt,
        "questions_after_resume": again.calls,
        "erases_to_the_original": all(erased),
    }
    return Result(
        measured=ours,
        baseline={
            "overflows_trapped_by_plain_build": sum(code != 0 for code in plain[1::2]),
            "bytes_of_the_large_program": sum(map(len, big.files.values())),
        },
        threshold="rules >= 0.6 and rules + model = 1 of the bounds, every right use passes, every "
        f"overflow trapped, prompts <= {BUDGET} bytes, no question asked twice, erasure exact",
        passed=share[0] >= 0.6
        and share[1] == 1
        and ours["right_uses_pass"] == ours["overflows_trapped"] == len(CASES)
        and 0 < big.prompt <= BUDGET
        and big.calls >= 50
        and again.calls == 0
        and all(erased),
    )


def whole_lines(done: Port) -> int:
    return sum(text.count("\n") + 1 for text in done.files.values())
