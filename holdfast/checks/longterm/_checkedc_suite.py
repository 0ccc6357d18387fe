"""Small C functions with known bounds: for each a use that is right, and one that overflows.

A case is its C text, the bounds that its pointers have, statements that must pass, and statements
that must be trapped. Text that is read up to its terminator is bounded by count(0). Where only a
model knows the bounds the overflow comes from a variable: a constant would refute right bounds.
"""

from typing import NamedTuple


class Case(NamedTuple):
    code: str
    bounds: dict[str, str]
    good: str
    bad: str


_A4 = "int a[4] = {1, 2, 3, 4}; "
CASES = [
    Case("int sum(int *a, int n) { int s = 0; for (int i = 0; i < n; i++) s += a[i]; return s; }",
         {"sum(0)": "count(n)"}, _A4 + "want(sum(a, 4) == 10);", _A4 + "sum(a, 5);"),
    Case("void fill(int *dst, int n, int x) { for (int i = 0; i < n; i++) dst[i] = x; }",
         {"fill(0)": "count(n)"}, _A4 + "fill(a, 4, 7); want(a[3] == 7);", _A4 + "fill(a, 9, 7);"),
    Case("int dot(int *a, int *b, int n) { int s = 0; for (int i = 0; i < n; i++) s += a[i] * b[i];"
         " return s; }",
         {"dot(0)": "count(n)", "dot(1)": "count(n)"},
         _A4 + "want(dot(a, a, 4) == 30);", _A4 + "int b[3] = {1, 1, 1}; dot(a, b, 4);"),
    Case("int last(int *a, int n) { int x = 0; for (int i = n - 1; i >= 0; i--) x = x * 2 + a[i];"
         " return x; }",
         {"last(0)": "count(n)"}, _A4 + "want(last(a, 4) == 49);", _A4 + "last(a, 5);"),
    Case("int get(int *a, int n, int i) { if (i < 0 || i >= n) return -1; return a[i]; }",
         {"get(0)": "count(n)"}, _A4 + "want(get(a, 4, 9) == -1);", _A4 + "get(a, 6, 1);"),
    Case("int peek(int *a, int n, int i) { return a[i]; }",
         {"peek(0)": "count(n)"}, _A4 + "want(peek(a, 4, 3) == 4);", _A4 + "peek(a, 4, 4);"),
    Case("int under(int *a, int n, int i) { return a[i - 1]; }",
         {"under(0)": "count(n)"}, _A4 + "want(under(a, 4, 1) == 1);", _A4 + "under(a, 4, 0);"),
    Case("int largest(int *v, int count) { int m = v[0]; for (int i = 1; i < count; i++)"
         " if (v[i] > m) m = v[i]; return m; }",
         {"largest(0)": "count(count)"}, _A4 + "want(largest(a, 4) == 4);",
         _A4 + "largest(a, 5);"),
    Case("void rise(int *a, int n) { for (int i = 0; i + 1 < n; i++) a[i + 1] += a[i]; }",
         {"rise(0)": "count(n)"}, _A4 + "rise(a, 4); want(a[3] == 10);", _A4 + "rise(a, 5);"),
    Case("void scale(double *x, unsigned len, double f) { unsigned i = 0; while (i < len) {"
         " x[i] *= f; i++; } }",
         {"scale(0)": "count(len)"}, "double x[2] = {1, 2}; scale(x, 2, 3); want(x[1] == 6);",
         "double x[2] = {1, 2}; scale(x, 3, 3);"),
    Case("int total(int *m, int rows, int cols) { int s = 0; for (int i = 0; i < rows; i++)"
         " for (int j = 0; j < cols; j++) s += m[i * cols + j]; return s; }",
         {"total(0)": "count(rows * cols)"}, _A4 + "want(total(a, 2, 2) == 10);",
         _A4 + "total(a, 2, 3);"),
    Case("int third(int *v) { return v[0] + v[2]; }",
         {"third(0)": "count(3)"}, _A4 + "want(third(a) == 4);", "int b[2] = {1, 2}; third(b);"),
    Case("void wipe(char *b, int size) { memset(b, 0, size); }",
         {"wipe(0)": "count(size)"}, 'char b[4] = "abc"; wipe(b, 4); want(b[0] == 0);',
         'char b[4] = "abc"; wipe(b, 5);'),
    Case("void duplicate(int *to, const int *from, int n) { memcpy(to, from, n * sizeof(int)); }",
         {"duplicate(0)": "count(n)", "duplicate(1)": "count(n)"},
         _A4 + "int b[4]; duplicate(b, a, 4); want(b[2] == 3);",
         _A4 + "int b[3]; duplicate(b, a, 4);"),
    Case("int twice(int *a, int m) { return 2 * sum(a, m); }",
         {"twice(0)": "count(m)"}, _A4 + "want(twice(a, 4) == 20);", _A4 + "twice(a, 5);"),
    Case("int *numbers(int n) { int *p = malloc(n * sizeof(int)); for (int i = 0; i < n; i++)"
         " p[i] = i; return p; }",
         {"numbers()": "count(n)", "numbers/p": "count(n)"},
         "int *q = numbers(5); want(q[4] == 4); free(q);", "int *q = numbers(5); q[5] = 1;"),
    Case("int *zeros(int n) { int *p = calloc(n, sizeof(int)); p[0] = 0; return p; }",
         {"zeros()": "count(n)", "zeros/p": "count(n)"},
         "int *z = zeros(3); want(z[2] == 0); free(z);", "int *z = zeros(3); want(z[3] == 0);"),
    Case("struct vec { int *data; int len; int cap; };\n"
         "void vec_init(struct vec *v, int cap) { v->data = calloc(cap, sizeof(int));"
         " v->cap = cap; v->len = 0; }",
         {"struct vec.data": "count(cap)"},
         "struct vec v; vec_init(&v, 2); v.data[1] = 3; want(v.data[1] == 3); free(v.data);",
         "struct vec v; vec_init(&v, 2); v.data[2] = 3;"),
    Case("int vec_get(struct vec *v, int i) { return v->data[i]; }", {},
         "struct vec v; vec_init(&v, 2); want(vec_get(&v, 1) == 0); free(v.data);",
         "struct vec v; vec_init(&v, 2); vec_get(&v, 2);"),
    Case("void vec_push(struct vec *v, int x) { v->data[v->len] = x; v->len = v->len + 1; }", {},
         "struct vec v; vec_init(&v, 2); vec_push(&v, 4); want(v.len == 1); free(v.data);",
         "struct vec v; vec_init(&v, 1); vec_push(&v, 4); vec_push(&v, 4);"),
    Case("struct poly { double *terms; int degree; };\n"
         "double at(struct poly *p, double x) { double s = 0; for (int i = 0; i < p->degree; i++)"
         " s = s * x + p->terms[i]; return s; }",
         {"struct poly.terms": "count(degree)"},
         "double t[2] = {1, 2}; struct poly p = {t, 2}; want(at(&p, 2) == 4);",
         "double t[2] = {1, 2}; struct poly p = {t, 2}; want(p.terms[2] == 0);"),
    Case("int search(int *a, int n, int x) { int lo = 0, hi = n; while (lo < hi) {"
         " int mid = (lo + hi) / 2; if (a[mid] < x) lo = mid + 1; else hi = mid; } return lo; }",
         {"search(0)": "count(n)"}, _A4 + "want(search(a, 4, 3) == 2);", _A4 + "search(a, 7, 9);"),
    Case("void reverse(int *a, int n) { for (int i = 0; i < n / 2; i++) { int t = a[i];"
         " a[i] = a[n - 1 - i]; a[n - 1 - i] = t; } }",
         {"reverse(0)": "count(n)"}, _A4 + "reverse(a, 4); want(a[0] == 4);",
         _A4 + "reverse(a, 6);"),
    Case("int between(int *p, int *end) { int s = 0; while (p < end) s += *p++; return s; }",
         {"between(0)": "bounds(p, end)"}, _A4 + "want(between(a, a + 4) == 10);",
         _A4 + "int *p = a; p[4] = 1;"),
    Case("int ends(const char *s) { int n = 0; while (s[n]) n++; return n; }",
         {"ends(0)": "count(0)"}, 'want(ends("four") == 4);',
         'char c[4] = "abc"; c[4] = 1; want(ends(c) == 3);'),
    Case("const char *skip(const char *s) { while (*s == ' ' && *s) s++; return s; }",
         {"skip(0)": "count(0)", "skip()": "count(0)"}, 'want(*skip("  x") == 120);',
         'const char *s = skip("x"); want(s[2] == 0); puts(s);'),
    Case("int same(const char *a, const char *b) { return strcmp(a, b) == 0; }",
         {"same(0)": "count(0)", "same(1)": "count(0)"}, 'want(same("x", "x"));',
         'char *t = strdup("x"); want(same(t, "x")); t[3] = 0;'),
    Case("void shout(char *s) { for (int i = 0; s[i] != 0; i++) s[i] = toupper(s[i]); }",
         {"shout(0)": "count(0)"}, 'char b[4] = "abc"; shout(b); want(b[0] == 65);',
         'char b[4] = "abc"; shout(b); b[4] = 1;'),
    Case("int vowels(char text[], int n) { int s = 0; for (int i = 0; i < n; i++)"
         " if (text[i] == 'a') s++; return s; }",
         {"vowels(0)": "count(n)"}, 'char b[4] = "abc"; want(vowels(b, 3) == 1);',
         'char b[4] = "abc"; vowels(b, 5);'),
    Case("unsigned check(const unsigned char *bytes, int k) { unsigned s = 0;"
         " for (int i = 0; i < k; i++) s = s * 31 + bytes[i]; return s; }",
         {"check(0)": "count(k)"}, "unsigned char b[2] = {1, 2}; want(check(b, 2) == 33);",
         "unsigned char b[2] = {1, 2}; check(b, 3);"),
    Case("int inner(int *a, int n) { int half = n / 2, s = 0; for (int i = 0; i < half; i++)"
         " s += a[i]; return s; }",
         {"inner(0)": "count(n / 2)"}, _A4 + "want(inner(a, 4) == 3);", _A4 + "inner(a, 10);"),
    Case("int upto(int *a, int n) { int s = 0; for (int i = 0; i <= n; i++) s += a[i]; return s; }",
         {"upto(0)": "count(n + 1)"}, _A4 + "want(upto(a, 3) == 10);", _A4 + "upto(a, 4);"),
    # From here on no rule applies: the bounds are in what the functions mean.
    Case("int square(int *m, int w, int r) { return m[r * w + r]; }",
         {"square(0)": "count(w * w)"}, _A4 + "want(square(a, 2, 1) == 4);",
         _A4 + "int w = 3; square(a, w, 0);"),
    Case("int half(int *m, int w, int r, int c) { return m[r * (r + 1) / 2 + c]; }",
         {"half(0)": "count(w * (w + 1) / 2)"},
         "int t[3] = {1, 2, 3}; want(half(t, 2, 1, 1) == 3);",
         "int t[3] = {1, 2, 3}; half(t, 3, 0, 0);"),
    Case("int hashed(int *slots, int bits, unsigned key) {"
         " return slots[key & ((1u << bits) - 1)]; }",
         {"hashed(0)": "count(1 << bits)"}, _A4 + "want(hashed(a, 2, 7) == 4);",
         _A4 + "hashed(a, 3, 0);"),
    Case("int ring(int *q, int room, int head) { return q[head % room]; }",
         {"ring(0)": "count(room)"}, _A4 + "want(ring(a, 4, 5) == 2);",
         _A4 + "int room = 8; ring(a, room, 5);"),
    Case("int pixel(unsigned char *rgb, int width, int height, int x, int y) {"
         " return rgb[3 * (y * width + x)]; }",
         {"pixel(0)": "count(3 * width * height)"},
         "unsigned char p[12] = {0}; p[9] = 5; want(pixel(p, 2, 2, 1, 1) == 5);",
         "unsigned char p[9] = {0}; int w = 2; pixel(p, w, 2, 0, 0);"),
    Case("int child(int *heap, int items, int i) { int c = 2 * i + 1;"
         " return c < items ? heap[c] : -1; }",
         {"child(0)": "count(items)"}, _A4 + "want(child(a, 4, 1) == 4);", _A4 + "child(a, 5, 0);"),
    Case("void permute(int *out, int *in, int *perm, int k) { for (int i = 0; i < k; i++)"
         " out[perm[i]] = in[i]; }",
         {"permute(0)": "count(k)", "permute(1)": "count(k)", "permute(2)": "count(k)"},
         _A4 + "int o[4], p[4] = {3, 2, 1, 0}; permute(o, a, p, 4); want(o[0] == 4);",
         _A4 + "int k = 4, o[3], p[4] = {3, 2, 1, 0}; permute(o, a, p, k);"),
    Case("int bit(unsigned *words, int bits, int i) { return words[i / 32] >> (i % 32) & 1; }",
         {"bit(0)": "count((bits + 31) / 32)"}, "unsigned w[2] = {0, 1}; want(bit(w, 64, 32));",
         "unsigned w[2] = {0, 1}; bit(w, 65, 0);"),
    Case("int digit(const char *table, int base, int d) { return table[d % base]; }",
         {"digit(0)": "count(base)"}, 'char t[2] = {48, 49}; want(digit(t, 2, 3) == 49);',
         'char t[2] = {48, 49}; int b = 3; digit(t, b, 3);'),
    Case("struct grid { int *cells; int wide; int high; };\n"
         "int cell(struct grid *g, int x, int y) { return g->cells[y * g->wide + x]; }",
         {"struct grid.cells": "count(wide * high)"},
         _A4 + "struct grid g = {a, 2, 2}; want(cell(&g, 1, 1) == 4);",
         _A4 + "struct grid g = {a, 2, 2}; cell(&g, 0, 2);"),
]  # fmt: skip


def program(cases: list[Case] = CASES) -> str:
    """All cases as one program: `prog 2k` runs the right use of case k, `prog 2k+1` the wrong."""
    parts = ["#include <stdlib.h>", "#include <string.h>", "#include <ctype.h>",
             "#include <stdio.h>", "static void want(int ok) { if (!ok) exit(3); }"]  # fmt: skip
    parts += [case.code for case in cases]
    for index, case in enumerate(cases):
        parts.append(f"static void good{index}(void) {{ {case.good} }}")
        parts.append(f"static void bad{index}(void) {{ {case.bad} }}")
    parts.append("int main(int argc, char **argv) {\n  int c = argc > 1 ? atoi(argv[1]) : -1;")
    for index in range(len(cases)):
        parts.append(f"  if (c == {2 * index}) good{index}();")
        parts.append(f"  if (c == {2 * index + 1}) bad{index}();")
    return "\n".join([*parts, "  return 0;\n}", ""])
