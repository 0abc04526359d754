"""Expressions are Python's own arithmetic over floats, and nothing else."""

from __future__ import annotations

import math
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from optserve_server.core.errors import InvalidExpressionError
from optserve_server.core.expression import Expression

FUNCTIONS = ("abs", "ceil", "cos", "exp", "floor", "log", "sin", "sqrt")
IN_PYTHON = {
    "__builtins__": {},
    **{name: getattr(math, name) for name in FUNCTIONS if name != "abs"},
    # math.ceil and math.floor make integers, which Python computes without bounds.
    "ceil": lambda value: float(math.ceil(value)),
    "floor": lambda value: float(math.floor(value)),
    "abs": abs,
    "max": max,
    "min": min,
    "pi": math.pi,
    "e": math.e,
}

NUMBERS = st.one_of(
    st.floats(min_value=0, max_value=1e6, allow_nan=False).map(repr),
    st.sampled_from(["0.0", "0.5", "1.0", "2.0", "1e-300", "1e300", ".1", "5.", "True", "False"]),
)
NAMES = st.sampled_from(["epoch", "pi", "e"])


def _larger(parts: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    binary = st.sampled_from(["+", "-", "*", "/", "//", "%"])
    comparison = st.sampled_from(["<", "<=", ">", ">=", "==", "!="])
    return st.one_of(
        st.builds("({} {} {})".format, parts, binary, parts),
        # Of a negative base Python makes a complex number, where a rate ends.
        st.builds("(abs({}) ** {})".format, parts, parts),
        st.builds("({} {} {})".format, parts, comparison, parts),
        st.builds("({} {} {} {} {})".format, parts, comparison, parts, comparison, parts),
        st.builds("({} and {} and {})".format, parts, parts, parts),
        st.builds("({} or {})".format, parts, parts),
        st.builds("({}{})".format, st.sampled_from(["-", "+", "not "]), parts),
        st.builds("({} if {} else {})".format, parts, parts, parts),
        st.builds("{}({})".format, st.sampled_from(FUNCTIONS), parts),
        st.builds("{}({}, {})".format, st.sampled_from(["min", "max"]), parts, parts),
        st.builds("max({}, {}, {})".format, parts, parts, parts),
    )


TEXTS = st.recursive(st.one_of(NUMBERS, NAMES), _larger, max_leaves=12)


def expression(text: str, chars_max: int = 4096, nodes_max: int = 512) -> Expression:
    return Expression(text, chars_max=chars_max, nodes_max=nodes_max, field="lr_lambda")


@settings(max_examples=1_000, deadline=None)
@given(text=TEXTS, count=st.integers(min_value=0, max_value=2**40))
@example(text="(0.0 ** (-1.0))", count=0)
@example(text="(1e300 * 1e300 * 0.0)", count=0)
@example(text="(epoch % -3.0)", count=7)
@example(text="(2.0 ** -1074.0)", count=0)
def test_an_expression_is_the_lambda_of_the_same_text_bit_for_bit(text: str, count: int) -> None:
    try:
        wanted = float(eval(text, IN_PYTHON, {"epoch": float(count)}))
    except (ArithmeticError, ValueError):
        wanted = math.nan
    compiled = expression(text)
    if math.isfinite(wanted) and wanted >= 0:
        assert compiled(count) == wanted
    else:
        with pytest.raises(InvalidExpressionError):
            compiled(count)


@pytest.mark.parametrize(
    ("text", "count", "value"),
    [
        ("0.95 ** epoch", 3, 0.95**3),
        ("1", 0, 1.0),
        (" epoch ", 5, 5.0),
        ("1 / (epoch + 1)", 3, 0.25),
        ("0.5 * (1 + cos(pi * epoch / 10))", 10, 0.0),
        ("epoch // 2", 5, 2.0),
        ("0 or 7", 0, 7.0),
        ("0 < epoch < 3", 2, 1.0),
        ("3 if not epoch else 4", 0, 3.0),
        ("min(1, epoch / 4, 9)", 2, 0.5),
        ("1_000", 0, 1000.0),
        ("0x10", 0, 16.0),
    ],
)
def test_examples(text: str, count: int, value: float) -> None:
    assert expression(text)(count) == value


MORE_THAN_ARITHMETIC = {
    "a name": "x",
    "an attribute": "epoch.real",
    "an attribute of a number": "(1).__class__",
    "the way out": "().__class__.__bases__[0].__subclasses__()",
    "an import": "__import__('os')",
    "a function": "eval('1')",
    "a method": "epoch.hex()",
    "a function of math": "factorial(epoch)",
    "pow with a modulus": "pow(2, 3, 5)",
    "a lambda": "lambda: 1",
    "a called lambda": "(lambda: 1)()",
    "a comprehension": "[1 for _ in range(9)]",
    "a generator": "max(i for i in (1, 2))",
    "a walrus": "(x := 1)",
    "a text": "'a'",
    "a formatted text": "f'{epoch}'",
    "bytes": "b'a'",
    "a complex number": "1j",
    "nothing": "None",
    "an ellipsis": "...",
    "a tuple": "(1, 2)",
    "a list": "[1]",
    "a set": "{1}",
    "a dictionary": "{1: 2}",
    "an element": "(1, 2)[0]",
    "a slice": "epoch[1:2]",
    "stars": "max(*epoch)",
    "a keyword": "max(1, 2, key=epoch)",
    "double stars": "max(1, **epoch)",
    "an await": "await epoch",
    "a yield": "(yield 1)",
    "a bitwise and": "1 & 2",
    "a bitwise or": "1 | 2",
    "an exclusive or, which is no power": "2 ^ 3",
    "an inversion": "~1",
    "a shift": "1 << 9",
    "a matrix product": "1 @ 2",
    "membership": "1 in epoch",
    "identity": "epoch is epoch",
    "an assignment": "epoch = 1",
    "two statements": "1; 2",
    "two lines": "1\n2",
    "a statement": "import os",
    "a comment and a statement": "1 # \nimport os",
    "half an expression": "1 +",
    "no expression": "",
    "spaces": "   ",
    "a NUL": "1\x00",
    "a surrogate": "\ud800",
    "a function without arguments": "max()",
    "a maximum of one": "max(1)",
    "a sine of two": "sin(1, 2)",
    "a function that is not called": "sin",
    "a number that is too large": "9" * 400,
    "a number of too many digits": "9" * 4096,
}


@pytest.mark.parametrize("text", MORE_THAN_ARITHMETIC.values(), ids=MORE_THAN_ARITHMETIC)
def test_more_than_arithmetic_is_refused(text: str) -> None:
    with pytest.raises(InvalidExpressionError) as caught:
        expression(text)
    assert caught.value.field == "lr_lambda"


@given(st.text(max_size=40))
def test_whatever_text_comes_it_is_arithmetic_or_refused(text: str) -> None:
    try:
        value = expression(text)(1)
    except InvalidExpressionError:
        return
    assert math.isfinite(value)


@pytest.mark.parametrize(
    "text",
    [
        "9" + "**9" * 60,
        "9" * 300 + "**" + "9" * 300,
        "(" * 2000 + "1" + ")" * 2000,
        "(" * 90 + "1" + ")" * 90,
        "-" * 400 + "1",
        "-" * 4000 + "1",
        "not " * 400 + "1",
        "abs(" * 190 + "1" + ")" * 190,
        "+".join(["1"] * 250),
        "1" + "+1" * 2000,
        "1 if 1 else " * 150 + "1",
        "1<" * 250 + "1",
        "max(" + ",".join(["epoch"] * 250) + ")",
        "exp(" * 60 + "9" + ")" * 60,
        "1e308 * " * 60 + "1",
    ],
)
def test_an_expression_costs_little_however_it_is_built(text: str) -> None:
    started = time.perf_counter()
    for _ in range(3):
        try:
            expression(text)(3)
        except InvalidExpressionError:
            continue
    assert time.perf_counter() - started < 1


def test_length_and_nodes_are_bounded() -> None:
    assert expression("1+1", chars_max=3, nodes_max=3)(0) == 2
    with pytest.raises(InvalidExpressionError, match="3 characters; at most 2"):
        expression("1+1", chars_max=2)
    with pytest.raises(InvalidExpressionError, match="3 numbers, names and operations; at most 2"):
        expression("1+1", nodes_max=2)


@pytest.mark.parametrize(
    "text", ["-1", "0 - epoch", "1e308 * 10", "0 * (1e308 * 10)", "(-1) ** .5"]
)
def test_a_factor_is_finite_and_not_negative(text: str) -> None:
    with pytest.raises(InvalidExpressionError, match="epoch = 2"):
        expression(text)(2)
