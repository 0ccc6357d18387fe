"""A small part of Python, interpreted: for programs that a model wrote.

Nothing is compiled or executed by Python itself. A program has names, numbers, text, arithmetic,
comparisons, `if`, `for ... in range(...)`, `while` and calls of the functions it is given; there
are no attributes, imports, definitions with arguments, or ways to reach anything else. Steps, time
and the size of numbers and lists are limited.
"""

import ast
import operator
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from holdfast.errors import HoldfastError

STEPS, LARGEST, LONGEST = 20_000, 10**15, 10_000

_BINARY: dict[type, Callable] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
}  # fmt: skip
_COMPARE: dict[type, Callable] = {
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
    ast.Eq: operator.eq, ast.NotEq: operator.ne,
}  # fmt: skip
_UNARY: dict[type, Callable] = {
    ast.USub: operator.neg, ast.UAdd: operator.pos, ast.Not: operator.not_,
    ast.Invert: operator.invert,
}  # fmt: skip


class Stopped(HoldfastError):
    """A program was stopped: what it did, and where."""


class _Return(Exception):
    pass


class _Break(Exception):
    pass


class _Continue(Exception):
    pass


def run(
    code: str, functions: Mapping[str, Callable], *, steps: int = STEPS, seconds: float = 5.0
) -> Any:
    """What a program returns: a function without arguments, or statements with a `return`.

    Raises:
        Stopped: it does not parse, uses what is not there, fails, returns nothing, or takes more
            than `steps` steps or `seconds`.
    """
    if len(code) > LONGEST:
        raise Stopped(f"the program has {len(code)} characters, at most {LONGEST} are read")
    try:
        body = ast.parse(code).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise Stopped(f"line {getattr(error, 'lineno', 1)}: does not parse: {error}") from error
    if len(body) == 1 and isinstance(body[0], ast.FunctionDef):
        function = body[0]
        if ast.unparse(function.args) or function.decorator_list:
            raise Stopped("line 1: the function must have no arguments and no decorators")
        body = function.body
    machine = _Machine(functions, steps, seconds)
    try:
        machine.block(body)
    except _Return as value:
        return value.args[0]
    except (_Break, _Continue) as error:
        raise Stopped("break or continue outside of a loop") from error
    except RecursionError as error:
        raise Stopped(f"line {machine.line}: nested too deeply") from error
    raise Stopped("the program returns nothing; end it with return")


class _Machine:
    def __init__(self, functions: Mapping[str, Callable], steps: int, seconds: float):
        self.functions = functions
        self.names: dict[str, Any] = {}
        self.steps, self.limit = 0, steps
        self.seconds, self.end = seconds, time.monotonic() + seconds
        self.line = 1

    def _step(self, node: ast.AST) -> None:
        self.line = getattr(node, "lineno", self.line)
        self.steps += 1
        if self.steps > self.limit:
            raise Stopped(f"line {self.line}: more than {self.limit} steps; is a loop endless?")
        if time.monotonic() > self.end:
            raise Stopped(f"line {self.line}: more than {self.seconds:g} seconds")

    def _no(self, what: str) -> Stopped:
        return Stopped(f"line {self.line}: {what} is not part of the language of these programs")

    def block(self, body: list[ast.stmt]) -> None:
        for statement in body:
            self._step(statement)
            self._statement(statement)

    def _statement(self, node: ast.stmt) -> None:
        if isinstance(node, ast.Assign | ast.AugAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if not isinstance(target, ast.Name) or len(getattr(node, "targets", [0])) != 1:
                raise self._no("assigning to anything but one name")
            value = self.value(node.value)
            if isinstance(node, ast.AugAssign):
                value = self._binary(node.op, self._name(target.id), value)
            self.names[target.id] = value
        elif isinstance(node, ast.Return):
            raise _Return(None if node.value is None else self.value(node.value))
        elif isinstance(node, ast.Expr):
            self.value(node.value)
        elif isinstance(node, ast.If):
            self.block(node.body if self._truth(node.test) else node.orelse)
        elif isinstance(node, ast.While) and not node.orelse:
            while self._truth(node.test):
                if self._once(node.body):
                    break
        elif isinstance(node, ast.For) and isinstance(node.target, ast.Name) and not node.orelse:
            for item in self._items(node.iter):
                self._step(node)
                self.names[node.target.id] = item
                if self._once(node.body):
                    break
        elif isinstance(node, ast.Break):
            raise _Break
        elif isinstance(node, ast.Continue):
            raise _Continue
        elif not isinstance(node, ast.Pass):
            raise self._no(type(node).__name__)

    def _once(self, body: list[ast.stmt]) -> bool:
        """One turn of a loop; True where it is left."""
        try:
            self.block(body)
        except _Break:
            return True
        except _Continue:
            pass
        return False

    def _items(self, node: ast.expr) -> Any:
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id == "range"
            and not node.keywords
        ):
            bounds = [self.value(arg) for arg in node.args]
            if bounds and all(isinstance(b, int) for b in bounds) and len(bounds) <= 2:
                return range(*bounds)
        found = self.value(node)
        if not isinstance(found, list):
            raise self._no("a loop over anything but range(...) and lists")
        return found

    def _truth(self, node: ast.expr) -> bool:
        found = self.value(node)
        if isinstance(found, np.ndarray):
            raise Stopped(f"line {self.line}: an array is neither true nor false; use any(...)")
        return bool(found)

    def _name(self, name: str) -> Any:
        if name not in self.names:
            raise Stopped(f"line {self.line}: {name} is not defined")
        return self.names[name]

    def value(self, node: ast.expr) -> Any:
        self._step(node)
        if isinstance(node, ast.Constant):
            if isinstance(node.value, bool | int | float | str | None):
                return self._small(node.value)
            raise self._no(f"the constant {node.value!r}")
        if isinstance(node, ast.Name):
            return self._name(node.id)
        if isinstance(node, ast.List | ast.Tuple):
            return self._small([self.value(item) for item in node.elts])
        if isinstance(node, ast.UnaryOp):
            return self._checked(_UNARY[type(node.op)], self.value(node.operand))
        if isinstance(node, ast.BinOp):
            return self._binary(node.op, self.value(node.left), self.value(node.right))
        if isinstance(node, ast.BoolOp):
            wanted = isinstance(node.op, ast.Or)
            return next((True for v in node.values if self._truth(v) == wanted), False) == wanted
        if isinstance(node, ast.Compare):
            left = self.value(node.left)
            if len(node.ops) != 1 or type(node.ops[0]) not in _COMPARE:
                raise self._no("a chained comparison, `in` or `is`")
            return self._checked(_COMPARE[type(node.ops[0])], left, self.value(node.comparators[0]))
        if isinstance(node, ast.Call):
            return self._call(node)
        raise self._no(type(node).__name__)

    def _binary(self, op: ast.operator, left: Any, right: Any) -> Any:
        if type(op) not in _BINARY:
            raise self._no(type(op).__name__)
        for side in (left, right):
            # Text and lists could grow without end.
            if not isinstance(side, bool | int | float | np.ndarray):
                raise self._no(f"arithmetic with {type(side).__name__}")
        return self._checked(_BINARY[type(op)], left, right)

    def _call(self, node: ast.Call) -> Any:
        if not isinstance(node.func, ast.Name):
            raise self._no("calling anything but a name")
        name = node.func.id
        if name not in self.functions:
            raise Stopped(
                f"line {self.line}: there is no function {name}; there are "
                + ", ".join(sorted(self.functions))
            )
        if any(isinstance(arg, ast.Starred) for arg in node.args):
            raise self._no("*arguments")
        if any(keyword.arg is None for keyword in node.keywords):
            raise self._no("**arguments")
        args = [self.value(arg) for arg in node.args]
        named = {str(keyword.arg): self.value(keyword.value) for keyword in node.keywords}
        return self._checked(self.functions[name], *args, **named)

    def _checked(self, function: Callable, *args: Any, **named: Any) -> Any:
        try:
            with np.errstate(all="ignore"):
                return self._small(function(*args, **named))
        except (TypeError, ValueError, ArithmeticError) as error:
            raise Stopped(f"line {self.line}: {error}") from error

    def _small(self, value: Any) -> Any:
        if isinstance(value, int) and abs(value) > LARGEST:
            raise Stopped(f"line {self.line}: a number is beyond {LARGEST}")
        if isinstance(value, list | str) and len(value) > LONGEST:
            raise Stopped(f"line {self.line}: a list or text is longer than {LONGEST}")
        return value
