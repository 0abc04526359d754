"""Arithmetic from strangers: the expressions of LambdaLR.

A whitelist over Python's own syntax tree. All arithmetic is done in floats, where every operation
takes constant time and memory, and an expression has no loops; so a bound on its length bounds its
cost. No library fits: those for policies have no power operator, and the Python evaluators either
compute ``9**4000000`` or have been escaped from.
"""

from __future__ import annotations

import ast
import math
import operator
import threading
from collections.abc import Callable

from optserve_server.core.errors import InvalidExpressionError

_BINARY: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: math.pow,  # As float ** float, but never a complex number.
}
_UNARY: dict[type[ast.unaryop], Callable[[float], float]] = {
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
    ast.Not: operator.not_,
}
_COMPARE: dict[type[ast.cmpop], Callable[[float, float], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
_FUNCTIONS: dict[str, Callable[..., float]] = {
    "abs": abs,
    "ceil": math.ceil,
    "cos": math.cos,
    "exp": math.exp,
    "floor": math.floor,
    "log": math.log,
    "max": max,
    "min": min,
    "sin": math.sin,
    "sqrt": math.sqrt,
}
_CONSTANTS = {"pi": math.pi, "e": math.e}
# CPython 3.11 counts the depth of syntax trees for all threads together, and raises a SystemError
# when two of them build one at the same time (python/cpython#106905).
_PARSING = threading.Lock()
_VARIABLE = "epoch"  # torch's name for the count, whatever is counted.

_Node = Callable[[float], float]


class Expression:
    """A function of the count, such as ``0.95 ** epoch``.

    Equal to the Python lambda of the same text, bit for bit.
    """

    def __init__(self, text: str, *, chars_max: int, nodes_max: int, field: str) -> None:
        """Compile ``text``.

        Args:
            text: The expression.
            chars_max: How long it may be.
            nodes_max: How many numbers, names and operations it may hold.
            field: Path of the field that it came in, for errors.

        Raises:
            InvalidExpressionError: It is too long, or anything but arithmetic.
        """
        self.text = text
        self._field = field
        if len(text) > chars_max:
            raise self._error(f"has {len(text)} characters; at most {chars_max} are allowed")
        try:
            with _PARSING:
                tree = ast.parse(text.strip(), mode="eval")
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            raise self._error("is not an expression") from None
        nodes = sum(isinstance(node, ast.expr) for node in ast.walk(tree))
        if nodes > nodes_max:
            raise self._error(
                f"has {nodes} numbers, names and operations; at most {nodes_max} are allowed"
            )
        self._evaluate = self._compile(tree.body)

    def __call__(self, count: int) -> float:
        """Return the value for ``count``.

        Raises:
            InvalidExpressionError: It has none, or one that is negative or not finite.
        """
        try:
            value = float(self._evaluate(float(count)))
        except (ArithmeticError, ValueError):
            raise self._error(f"has no value for {_VARIABLE} = {count}") from None
        if not (math.isfinite(value) and value >= 0):
            raise self._error(
                f"is {value} for {_VARIABLE} = {count};"
                " a factor of the rate is finite and not negative"
            )
        return value

    def _error(self, what: str) -> InvalidExpressionError:
        shown = self.text if len(self.text) <= 80 else self.text[:77] + "..."
        return InvalidExpressionError(
            f"the expression {shown!r} {what}",
            field=self._field,
            expected=f"arithmetic over {_VARIABLE}, such as '0.95 ** {_VARIABLE}'",
            actual=shown,
        )

    def _compile(self, node: ast.expr) -> _Node:  # noqa: PLR0911 - one for each kind of node.
        """Turn a node into a function of the count, or refuse it."""
        match node:
            case ast.Constant(value=bool() | int() | float() as value):
                return self._constant(value)
            case ast.Name(id=name) if name == _VARIABLE:
                return lambda count: count
            case ast.Name(id=name) if name in _CONSTANTS:
                return self._constant(_CONSTANTS[name])
            case ast.Name(id=name):
                raise self._error(
                    f"uses {name!r}; only {_VARIABLE}, {', '.join(_CONSTANTS)} are there"
                )
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
                return _binary(_BINARY[type(op)], self._compile(left), self._compile(right))
            case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
                return _unary(_UNARY[type(op)], self._compile(operand))
            case ast.BoolOp(op=op, values=values):
                return _boolean(isinstance(op, ast.And), [self._compile(value) for value in values])
            case ast.Compare(left=left, ops=ops, comparators=rights) if all(
                type(op) in _COMPARE for op in ops
            ):
                operands = [self._compile(operand) for operand in (left, *rights)]
                return _comparison([_COMPARE[type(op)] for op in ops], operands)
            case ast.IfExp(test=test, body=body, orelse=orelse):
                return _conditional(self._compile(test), self._compile(body), self._compile(orelse))
            case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if (
                name in _FUNCTIONS
            ):
                return _call(_FUNCTIONS[name], self._checked_arguments(name, arguments))
            case ast.Call(func=ast.Name(id=name)):
                raise self._error(f"calls {name!r}; only {', '.join(_FUNCTIONS)} are there")
            case _:
                raise self._error("is more than arithmetic")

    def _constant(self, value: float) -> _Node:
        try:
            number = float(value)
        except OverflowError:
            raise self._error("holds a number that is too large") from None
        return lambda _: number

    def _checked_arguments(self, name: str, arguments: list[ast.expr]) -> list[_Node]:
        wanted = "two or more arguments" if name in ("min", "max") else "one argument"
        if (len(arguments) >= 2) != (name in ("min", "max")) or not arguments:
            raise self._error(f"calls {name!r} with {len(arguments)} arguments; it takes {wanted}")
        return [self._compile(argument) for argument in arguments]


def _binary(function: Callable[[float, float], float], left: _Node, right: _Node) -> _Node:
    return lambda count: function(left(count), right(count))


def _unary(function: Callable[[float], float], operand: _Node) -> _Node:
    return lambda count: float(function(operand(count)))


def _boolean(every: bool, operands: list[_Node]) -> _Node:
    def evaluate(count: float) -> float:
        value = 0.0
        for operand in operands:
            value = operand(count)
            # `and` ends at the first false value, `or` at the first true one, as in Python.
            if bool(value) != every:
                break
        return value

    return evaluate


def _comparison(functions: list[Callable[[float, float], bool]], operands: list[_Node]) -> _Node:
    def evaluate(count: float) -> float:
        left = operands[0](count)
        for function, operand in zip(functions, operands[1:], strict=True):
            right = operand(count)
            if not function(left, right):
                return 0.0
            left = right
        return 1.0

    return evaluate


def _conditional(test: _Node, body: _Node, orelse: _Node) -> _Node:
    return lambda count: body(count) if test(count) else orelse(count)


def _call(function: Callable[..., float], arguments: list[_Node]) -> _Node:
    return lambda count: float(function(*(argument(count) for argument in arguments)))
