import time

import numpy as np
import pytest

from holdfast.longterm.tools.restricted import Stopped, run

FUNCTIONS = {"double": lambda x: 2 * x, "wave": lambda: np.arange(4.0)}


@pytest.mark.parametrize(
    "code, want",
    [
        ("return 1 + 2 * 3 - 4 // 3", 6),
        ("def task():\n    return double(x=4)", 8),
        ("x = 0\nfor i in range(5):\n    if i == 3:\n        break\n    x += i\nreturn x", 3),
        ("x = 9\nwhile x > 4 and not x == 6:\n    x -= 1\nreturn x", 6),
        ("x = 0\nfor y in [1, 2, 3]:\n    if y == 2:\n        continue\n    x += y\nreturn x", 4),
        ("if False or 1 < 2:\n    return 'a'\nelse:\n    return 'b'", "a"),
        ("pass\nreturn -3 % 2", 1),
        ("return None", None),
    ],
)
def test_programs(code, want):
    assert run(code, FUNCTIONS) == want


def test_arrays():
    assert run("w = wave()\nreturn (w > 0) & ~(w > 2)", FUNCTIONS).tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize(
    "code, message",
    [
        ("while True:\n    pass", "line 2: more than 20000 steps; is a loop endless"),
        ("for i in range(10**9):\n    x = i", "Pow is not part|steps"),
        ("for i in range(1000000000):\n    x = i", "more than 20000 steps"),
        ("open('/etc/passwd')", "there is no function open; there are double, wave"),
        ("import os", "Import is not part of the language"),
        ("return ().__class__", "Attribute is not part"),
        ("return wave().tofile('x')", "calling anything but a name"),
        ("return (lambda: 1)()", "calling anything but a name"),
        ("return [x for x in [1]]", "ListComp is not part"),
        ("return f'{1}'", "JoinedStr is not part"),
        ("return __import__('os')", "there is no function __import__"),
        ("return eval('1')", "there is no function eval"),
        ("return double(*[1])", r"\*arguments is not part"),
        ("return double(**{})", r"\*\*arguments is not part|Dict"),
        ("double = 3\nreturn double(1) + range(3)", "there is no function range"),
        ("return 'a' * 1000000000", "arithmetic with str is not part"),
        ("return [1] + [1]", "arithmetic with list"),
        ("x = 2\nwhile True:\n    x = x * x", "a number is beyond"),
        ("return 1 / 0", "line 1: division by zero"),
        ("return double()", "missing 1 required positional argument"),
        ("if wave():\n    pass", "an array is neither true nor false"),
        ("x, y = 1, 2", "assigning to anything but one name"),
        ("def f(x):\n    return x", "must have no arguments"),
        ("def f():\n    pass\ndef g():\n    pass", "FunctionDef is not part"),
        ("x = 1", "returns nothing; end it with return"),
        ("return y", "line 1: y is not defined"),
        ("return 1 <", "line 1: does not parse"),
        ("return 1 < 2 < 3", "a chained comparison"),
        ("return b'x'", "the constant b'x'"),
        ("break", "break or continue outside of a loop"),
        ("return " + "-" * 9000 + "1", "nested too deeply|does not parse"),
        ("x" * 20000, "has 20000 characters"),
        ("try:\n    pass\nexcept:\n    pass", "Try is not part"),
        ("global x", "Global is not part"),
    ],
)
def test_what_is_stopped_and_why(code, message):
    with pytest.raises(Stopped, match=message):
        run(code, FUNCTIONS)


def test_time_is_limited():
    slow = {"slow": lambda: time.sleep(0.02)}
    start = time.monotonic()
    with pytest.raises(Stopped, match=r"line [12]: more than 0\.1 seconds"):
        run("while True:\n    slow()", slow, seconds=0.1)
    assert time.monotonic() - start < 2
