import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from holdfast import cli
from holdfast.checks.longterm._checkedc_suite import CASES, program
from holdfast.errors import UsageError
from holdfast.longterm.c.annotate import erase
from holdfast.longterm.c.bounds import Bounds
from holdfast.longterm.c.guard import guarded
from holdfast.longterm.c.source import parse_text, read_unit, same_tree
from holdfast.longterm.checkedc import port
from holdfast.longterm.language.llm import Scripted
from holdfast.longterm.tasks import FactStore, TaskGraph

needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
OPEN = "int {}(int *m, int w, int r) {{ return m[r * w + r]; }}\n"


@pytest.fixture
def ported(tmp_path):
    def run(text, name="a.c", **options):
        path = tmp_path / name
        path.write_text(text)
        done = port([path], **options)
        erased = tmp_path / "erased.c"
        erased.write_text(erase(done.files[str(path)]))
        if not done.skipped:
            assert same_tree(read_unit(erased).tree, read_unit(path).tree)
        run.text, run.path = done.files[str(path)], path
        return done

    return run


def says(bounds):
    """A model that gives each pointer its bounds, whatever else it is asked."""
    return Scripted(
        lambda messages, schema: {
            "bounds": [{"pointer": name, "bounds": said} for name, said in bounds.items()]
        }
    )


@pytest.mark.parametrize(
    "plain, want",
    [
        ("void f(int *a) { *a = 1; }", "void f(_Ptr<int> a) { *a = 1; }"),
        (
            "int f(const int *a, int n) { int s = 0; for (int i = 0; i < n; i++) s += a[i];"
            " return s; }",
            "int f(_Array_ptr<const int> a : count(n), int n)",
        ),
        ("int f(int a[], int k) { return a[k]; }", "int f(int a _Checked[], int k)"),
        ("int f(char *s) { return strlen(s); }", "int f(_Nt_array_ptr<char> s : count(0))"),
        (
            "int f(char **v, int n) { int s = 0; for (int i = 0; i < n; i++) s += strlen(v[i]);"
            " return s; }",
            "int f(_Array_ptr<_Nt_array_ptr<char>> v : count(n), int n)",
        ),
        (
            "static int *const f(int n) { int *p = malloc(n * sizeof(int)); p[0] = 1; return p; }",
            "static _Array_ptr<int> const f(int n) : count(n) { _Array_ptr<int> p : count(n) =",
        ),
        (
            "int f(int *a) { int *p = a, q = 2, *r; r = p; return *r + q; }",
            "{ _Ptr<int> p = a; int q = 2; _Ptr<int> r; r = p;",
        ),
        ("int f(int *p, int *e) { int s = 0; while (p < e) s += *p++; return s; }",
         "int f(_Array_ptr<int> p : bounds(p, e), _Array_ptr<int> e)"),
        ("int f(void *p) { return *(int *)p; }", "int f(void *p)"),
    ],
)  # fmt: skip
def test_annotations_by_hand(ported, plain, want):
    ported(plain, llm=says({"f:a": "count(k + 1)"}) if "int k" in plain else None)
    if "int k" in plain:
        want = "int f(int a _Checked[] : count(k + 1), int k)"
    assert want in ported.text


def test_comments_macros_and_layout_stay(ported):
    plain = (
        "#define  N 4\n/* one */ int f(int   *a /* two */, int n) {\n"
        "\tint s = N; // three\n\tfor (int i = 0; i < n; i++)  s += a[i];\n\treturn s;\n}\n"
    )
    if shutil.which("gcc") is None:
        pytest.skip("macros need a preprocessor; gcc is not here")
    ported(plain)
    assert ported.text == plain.replace("int   *a", "_Array_ptr<int> a : count(n)")


@needs_gcc
def test_headers_that_are_no_sources_stay_where_they_are(tmp_path):
    (tmp_path / "k.h").write_text("#define K 3\nint other(int *p);\n")
    (tmp_path / "k.c").write_text('#include "k.h"\nint k(int *q) { return *q + K; }\n')
    done = port([tmp_path / "k.c"])
    assert not done.skipped
    assert done.files == {
        str(tmp_path / "k.c"): '#include "k.h"\nint k(_Ptr<int> q) { return *q + K; }\n'
    }


def test_prototypes_and_headers_follow_the_definition(tmp_path):
    if shutil.which("gcc") is None:
        pytest.skip("a local header needs a preprocessor; gcc is not here")
    (tmp_path / "f.h").write_text("int f(int *xs, int k);\n")
    (tmp_path / "f.c").write_text(
        '#include "f.h"\nint f(int *a, int n) { int s = 0; for (int i = 0; i < n; i++) s += a[i];'
        " return s; }\n"
    )
    done = port([tmp_path / "f.c", tmp_path / "f.h"], include=[tmp_path])
    assert done.files[str(tmp_path / "f.h")] == "int f(_Array_ptr<int> xs : count(k), int k);\n"
    assert "f(_Array_ptr<int> a : count(n)" in done.files[str(tmp_path / "f.c")]


def test_the_unsafe_takes_along_what_exchanges_values_with_it(ported):
    done = ported(
        "int g(int *p) { return *(char *)p; }\nint f(int *q) { return g(q); }\n"
        "int h(int *r) { return *r; }\n"
    )
    assert done.facts["g(0)"].status == done.facts["f(0)"].status == "unsafe"
    assert "cast to char* at" in done.facts["f(0)"].reason
    assert done.facts["h(0)"].status == "checked"


def test_bounds_name_nothing_that_changes(ported):
    done = ported(
        "int f(int *a, int n) { int s = 0; while (n > 0) { n--; s += a[n]; } return s; }\n"
        "int g(int *a, int n) { int m = n / 2; for (int i = 0; i < m; i++) a[i] = 0; return m; }\n"
        "int h(int *a, int n) { a[0] = 1; a[n - 1 - a[0]] = 1; for (int i = 0; i < n / 2; i++)"
        " a[i] = 0; return 0; }\n"
    )
    assert done.facts["f(0)"].status == "unsafe"
    assert done.facts["g(0)"].bounds == "count(n / 2)"
    # One index may be anything, so the loop's limit is no bound; the length beside it is.
    assert done.facts["h(0)"].bounds == "count(n)"


@pytest.mark.parametrize(
    "said, message",
    [
        ("count(x)", "x is not in scope where m is declared"),
        ("count(w++)", "holds a UnaryOp"),
        ("count(f())", "holds a FuncCall"),
        ("count(w); int y = (1)", "is more than one expression|is not a C expression"),
        ("roughly w", "is not count"),
        ("count(m)", "m is a pointer, not a length"),
        ("bounds(m)", "has 1 arguments"),
        ("count(2)", r"m\[3\] is used, beyond count\(2\)"),
        ("count(w * w)", r"a call in g gives a\[4\], bounds ask for 9"),
    ],
)
def test_bounds_of_a_model_are_refused_with_the_reason(ported, said, message):
    llm = says({"f:m": said})
    done = ported(
        "int f(int *m, int w, int r) { return m[r * w] + m[3]; }\n"
        "int g(void) { int a[4] = {0}; return f(a, 3, 0); }\n",
        llm=llm,
    )
    fact = done.facts["f(0)"]
    assert fact.status == "unsafe" and fact.bounds is None
    assert re.search(message, fact.reason), fact.reason
    # The first question, and three with the reason.
    assert done.calls == 4 and "Refused:\nf:m: " in llm.requests[-1][1]["content"]


def test_a_corrected_answer_counts(ported):
    replies = [{"bounds": [{"pointer": "f:m", "bounds": b}]} for b in ("count(z)", "count(w * w)")]
    done = ported(OPEN.format("f"), llm=Scripted(replies))
    assert done.facts["f(0)"].bounds == "count(w * w)" and done.facts["f(0)"].source == "model"


def test_output_does_not_depend_on_the_order_of_ready_tasks(ported):
    text = "".join(OPEN.format(f"f{k}") for k in range(6))
    text += "int g(int *a, int u) { return f1(a, u, 0) + f2(a, u, 1) + a[u * u]; }\n"

    def answer(messages, schema):
        asked = messages[1]["content"].split("wanted for: ")[1].split(", ")
        # What is known of callees is in the question, and callees come first.
        known = "count(w * w)" in messages[1]["content"].split("Bounds are")[0]
        assert known == ("g:a" in asked)
        one = {"g:a": "count(u * u)"}
        return {"bounds": [{"pointer": a, "bounds": one.get(a, "count(w * w)")} for a in asked]}

    outputs = set()
    for seed in range(5):
        draw = random.Random(seed)
        ported(text, llm=Scripted(answer), priority=lambda task, draw=draw: (draw.random(), task))
        outputs.add(ported.text)
    assert len(outputs) == 1 and "g(_Array_ptr<int> a : count(u * u), int u)" in outputs.pop()


def test_questions_hold_the_signatures_of_what_is_used_and_no_bodies(ported):
    llm = says({})
    ported(
        "struct s { int *d; int n; };\n"
        "int g(struct s *s, int *a, int n) { int secret = 0; for (int i = 0; i < n; i++)"
        " secret += a[i] + s->d[i]; return secret; }\n"
        "int f(struct s *s, int *m, int w) { return g(s, s->d, s->n) + m[w * w]; }\n",
        llm=llm,
    )
    (request,) = llm.requests
    text = request[1]["content"]
    assert "g: s _Ptr<Struct s>, a _Array_ptr<int> : count(n), n int, result int" in text
    assert "struct s: d _Array_ptr<int> : count(n), n int" in text
    assert "secret" not in text and "return g(s, s->d, s->n)" in text


def test_task_order_is_dependencies_first_and_cycles_together():
    draw = random.Random(0)
    for _ in range(30):
        needs = {str(k): {str(draw.randrange(12)) for _ in range(2)} for k in range(12)}
        order = TaskGraph(needs).order(lambda task: (draw.random(), task))
        assert sorted(t for group in order for t in group) == sorted(needs)
        reach = {k: {k} for k in needs}
        for _ in needs:
            reach = {k: v.union(*(reach[x] | needs[x] for x in v)) for k, v in reach.items()}
        for group in order:
            one = group[0]
            assert set(group) == {k for k in needs if k in reach[one] and one in reach[k]}
        place = {t: i for i, group in enumerate(order) for t in group}
        assert all(place[w] <= place[t] for t, wanted in needs.items() for w in wanted)


def test_prompts_stay_within_the_budget(ported):
    long = "int f(int *m, int w, int r) {\n" + "  r = r + 1;\n" * 200 + "  return m[r * w]; }\n"
    short = OPEN.format("g")
    callers = "".join(f"int c{k}(int n) {{ return n; }}\n" for k in range(80))
    many = "int h(int *a, int u) { return a[u * u]" + "".join(
        f" + c{k}(u)" for k in range(80)
    ) + "; }\n"  # fmt: skip
    llm = says({"f:m": "count(w)", "g:m": "count(w * w)", "h:a": "count(u * u + 1)"})
    done = ported(long + short + callers + many, llm=llm, budget=2000)
    sizes = [sum(len(m["content"].encode()) for m in request) for request in llm.requests]
    assert max(sizes) == done.prompt <= 2000 and done.prompt > 1900
    assert "does not fit a prompt of 2000" in done.facts["f(0)"].reason
    assert done.facts["g(0)"].bounds == "count(w * w)"
    with pytest.raises(UsageError, match=r"a budget of 100 holds no question.*give .* or more"):
        ported(short, budget=100)


CHILD = """
import os, sys
from holdfast.longterm.checkedc import port
from holdfast.longterm.language.llm import Scripted
from holdfast.longterm.tasks import FactStore
asked = 0
def answer(messages, schema):
    global asked
    asked += 1
    if asked == int(sys.argv[3]):
        os.kill(os.getpid(), 9)
    name = messages[1]["content"].split("wanted for: ")[1]
    open(sys.argv[4], "a").write(name + "\\n")
    return {"bounds": [{"pointer": name, "bounds": "count(w * w)"}]}
done = port([sys.argv[1]], llm=Scripted(answer), store=FactStore(sys.argv[2]))
print(done.files[sys.argv[1]])
"""


def test_after_a_kill_no_finished_task_is_asked_again(tmp_path):
    source, log = tmp_path / "a.c", tmp_path / "log"
    source.write_text("".join(OPEN.format(f"f{k}") for k in range(6)))

    def run(store, kill):
        return subprocess.run(
            [sys.executable, "-c", CHILD, source, tmp_path / store, str(kill), log],
            capture_output=True, text=True, cwd=Path(__file__).parents[2],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    assert run("store", 4).returncode == -9
    assert len(log.read_text().splitlines()) == 3
    second = run("store", 99)
    assert second.returncode == 0, second.stderr
    asked = log.read_text().splitlines()
    assert sorted(asked) == [f"f{k}:m" for k in range(6)]
    assert second.stdout.count("m : count(w * w)") == 6
    # A task whose text changed is another task.
    source.write_text(source.read_text().replace("m[r * w + r]", "m[w * r + r]", 1))
    run("store", 99)
    assert log.read_text().splitlines()[6:] == ["f0:m"]


def test_a_store_that_is_none_says_so(tmp_path):
    (tmp_path / "x").write_text("no database, and long enough to be seen as none" * 9)
    with pytest.raises(UsageError, match=r"does not open as a store of tasks.*name a new file"):
        FactStore(tmp_path / "x")


def test_unsupported_syntax_is_named_and_left_untouched(ported):
    text = (
        "int f(int *a) { return *a; }\n"
        "int g(int *b) {\n  @here;\n  return *b;\n}\n"
        "int h(int *c) { return g(c); }\n"
    )
    done = ported(text)
    (skipped,) = done.skipped
    assert str(skipped).startswith(f"{ported.path}:3: unsupported syntax")
    assert ported.text == text.replace("int *a", "_Ptr<int> a")
    # Nothing is known of what g does with its pointer.
    assert done.facts["h(0)"].status == "unsafe" and ":3:" in done.facts["h(0)"].reason


def test_bad_sources_say_what_to_do(tmp_path):
    with pytest.raises(UsageError, match=r"cannot read .*none\.c.*give C files in UTF-8"):
        port([tmp_path / "none.c"])
    with pytest.raises(UsageError, match="no C file to port: name one or more"):
        port([])
    (tmp_path / "a.c").write_text("int x;\n_Ptr<int> y;\n")
    with pytest.raises(UsageError, match=r"a\.c:2: has Checked C, or a name of it, already"):
        port([tmp_path / "a.c"])


def test_erasure_by_hand():
    text = (
        "static _Array_ptr<const _Ptr<char>> const a : count(n * (m + 1)) = f(x ? y : z);\n"
        "int g(int p _Checked[] : byte_count(n), _Nt_array_ptr<_Ptr<int>> q);"
    )
    want = "static const char * * const a = f(x ? y : z);\nint g(int p[], int * * q);"
    assert "".join(erase(text).split()) == "".join(want.split())
    parse_text("int f(int), x, y, z;" + erase(text).replace("a =", "a, *b ="))


@needs_gcc
def test_the_tested_build_traps_and_the_plain_one_does_not(tmp_path):
    cases = [CASES[k] for k in (0, 4, 5, 7)]  # they only read, so that a plain build goes on
    source = tmp_path / "s.c"
    source.write_text(program(cases))
    done = port([source])
    tested = tmp_path / "t.c"
    tested.write_text(guarded(done.program, done.bounds, source.read_text()))
    for text, wrong in ((source, 0), (tested, -6)):
        binary = tmp_path / text.stem
        subprocess.run(["gcc", "-w", "-o", binary, text], check=True)
        for k in range(len(cases)):
            right = subprocess.run([binary, str(2 * k)], capture_output=True)
            bad = subprocess.run([binary, str(2 * k + 1)], capture_output=True, text=True)
            assert (right.returncode, bad.returncode) == (0, wrong)
            assert not wrong or f"{source}:" in bad.stderr


FORMS = r"""#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#define EACH(i, n) for (int i = 0; i < (n); i++)
typedef struct node { struct node *next; char *key; int value; } node_t;
typedef struct { node_t **slots; size_t n_slots; } table;
union either { int *p; long l; };
enum { ROWS = 2, COLS = 2 };
static int grid[ROWS][COLS] = {{1, 2}, {3, 4}};
typedef int (*order)(const void *, const void *);
static const char *const words[] = {"a", "bc", NULL};

static unsigned hash(const char *s) { unsigned h = 1; for (; *s; s++) h = h * 33 + *s; return h; }
table *made(size_t n) {
    table *t = malloc(sizeof *t);
    t->slots = calloc(n, sizeof(node_t *)); t->n_slots = n; return t;
}
node_t *found(table *t, const char *key) {
    for (node_t *e = t->slots[hash(key) % t->n_slots]; e; e = e->next)
        if (!strcmp(e->key, key)) return e;
    return NULL;
}
void put(table *t, const char *key, int value) {
    node_t *e = found(t, key), **slot;
    if (e) { e->value = value; return; }
    slot = &t->slots[hash(key) % t->n_slots];
    e = malloc(sizeof(*e)); e->key = strdup(key); e->value = value; e->next = *slot; *slot = e;
}
int smaller(const void *a, const void *b) { return *(const int *)a - *(const int *)b; }
void sorted(int *v, size_t n, order f) { qsort(v, n, sizeof *v, f); }
int through(int *x, int **y) { *x = 3; *y = x; return 0; }
int best(const int *v, int n) { int m = v[0]; EACH(i, n) m = m > v[i] ? m : v[i]; return m; }
int trace(int m[ROWS][COLS]) { int s = 0; EACH(i, COLS) s += m[i][i]; return s; }
int one(int *p, int k) { switch (k) { case 0: return *p; default: goto end; } end: return 0; }
struct { int a : 3; int *r; } bits;
int *pick(int *a, int *b, int c) { return c ? a : b; }
int main(int argc, char *argv[]) {
    table *t = made(2); int v[5] = {5, 4, 3, 2, 1}, x, *y;
    EACH(i, argc - 1) put(t, argv[i + 1], i);
    for (int i = 0, *p = v; i < 5; i++, p++) x = *p;
    sorted(v, 5, smaller); through(&x, &y); bits.r = pick(v, &x, 1);
    do { x--; } while (x > 0);
    printf("%d %d %s %d %d %d\n", best(v, 5), found(t, "w")->value, words[1], trace(grid),
           one(v, 0), *bits.r);
    return 0;
}
"""


@needs_gcc
def test_a_program_of_many_forms_is_ported_and_runs_as_before(ported, tmp_path):
    done = ported(FORMS)
    assert not done.skipped
    unsafe = {key for key, fact in done.facts.items() if fact.status == "unsafe"}
    assert unsafe == {"struct either.p", "smaller(0)", "smaller(1)", "sorted(0)", "main/p"}
    for line in (
        "typedef struct { _Array_ptr<_Ptr<node_t>> slots : count(n_slots); size_t n_slots; } table",
        "static _Nt_array_ptr<const char> const words[] = {",
        "    _Ptr<node_t> e = found(t, key); _Ptr<_Ptr<node_t>> slot;",
        "int best(_Array_ptr<const int> v : count(n), int n)",
        "int trace(int m _Checked[ROWS][COLS] : count(ROWS))",
        "int main(int argc, _Nt_array_ptr<char> argv _Checked[] : count(argc)) {",
        "int v[5] = {5, 4, 3, 2, 1}; int x; _Ptr<int> y;",
    ):
        assert line in ported.text
    tested = tmp_path / "t.c"
    tested.write_text(guarded(done.program, done.bounds, FORMS))
    for source in (ported.path, tested):
        subprocess.run(["gcc", "-w", "-o", tmp_path / "run", source], check=True)
        got = subprocess.run([tmp_path / "run", "q", "w"], capture_output=True, text=True)
        assert (got.returncode, got.stdout) == (0, "5 1 bc 5 1 1\n")


@needs_gcc
def test_units_share_headers_and_keep_what_is_static_apart(tmp_path):
    (tmp_path / "h.h").write_text("static inline int get(int *p) { int *q = p; return *q; }\n")
    for name in "ab":
        (tmp_path / f"{name}.c").write_text(
            f'#include "h.h"\nstatic int own(int *x) {{ return *x; }}\n'
            f"int {name}(int *y) {{ return own(y); }}\nint {name}2(int *z) {{ return get(z); }}\n"
        )
    done = port(sorted(tmp_path.glob("*.[ch]")))
    assert "get(_Ptr<int> p) { _Ptr<int> q = p" in done.files[str(tmp_path / "h.h")]
    # Two functions of one name: neither is touched, nor what they are given.
    for name in "ab":
        text = done.files[str(tmp_path / f"{name}.c")]
        assert (
            "own(int *x)" in text and f"{name}(int *y)" in text and f"{name}2(_Ptr<int> z)" in text
        )
    assert "own is defined twice, also at" in done.facts["own(0)"].reason


def test_annotations_that_do_not_erase_are_taken_back(ported, monkeypatch):
    from holdfast.longterm import checkedc

    plain = checkedc.erase
    monkeypatch.setattr(checkedc, "erase", lambda text: plain(text).replace("*", "", "_P" in text))
    done = ported("int f(int *a) { return *a; }\n")
    assert ported.text == ported.path.read_text() and "do not erase" in str(done.skipped[0])
    assert done.facts["f(0)"].status == "unsafe"


@needs_gcc
def test_bounds_that_are_too_small_are_trapped_too(tmp_path):
    """The tested build does not trust the port: wrong bounds fail right uses."""
    source = tmp_path / "s.c"
    source.write_text(program(CASES[:1]))
    done = port([source])
    wrong = done.bounds | {"sum(0)": Bounds("count", ("n - 1",), "model")}
    (tmp_path / "t.c").write_text(guarded(done.program, wrong, source.read_text()))
    subprocess.run(["gcc", "-w", "-o", tmp_path / "t", tmp_path / "t.c"], check=True)
    assert subprocess.run([tmp_path / "t", "0"], capture_output=True).returncode == -6


def command(*args):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["port-c", *map(str, args)])
    return exit_.value.code


def test_the_command_writes_beside_the_sources(tmp_path, capsys):
    source = tmp_path / "src" / "a.c"
    source.parent.mkdir()
    source.write_text("int f(int *a) { return *a; }\nlong g(int *b) { return *(long *)b; }\n")
    assert command(source.parent, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["pointers"], report["checked"], report["calls"]) == (2, 1, 0)
    assert (tmp_path / "src.checkedc" / "a.c").read_text().startswith("int f(_Ptr<int> a)")
    assert source.read_text().startswith("int f(int *a)")
    assert command(source, "--out", tmp_path / "two") == 0
    out = capsys.readouterr().out
    assert "left plain: g(0): cast to long* at" in out and "no Checked C compiler was run" in out


def test_the_command_refuses_what_it_cannot_do(tmp_path, capsys):
    source = tmp_path / "a.c"
    source.write_text("int x;\n")
    for args, message in (
        ([source, "--to", "rust"], "unknown dialect 'rust'; nearest known: checkedc"),
        ([source, "--llm", "http://localhost:1"], "--llm and --model go together"),
        ([source, "--out", tmp_path], "would replace the sources"),
        ([tmp_path / "no.c"], "cannot read"),
    ):
        assert command(*args) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "no.c.checkedc").exists()
