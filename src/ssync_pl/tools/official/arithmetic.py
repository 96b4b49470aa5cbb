"""Arithmetic from configuration files, computed without running anything of the file."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping

from ssync_pl.errors import ConfigError

__all__ = ["Number", "evaluate"]

Number = int | float

_LONGEST = 200
_LARGEST = 1e18
_BINARY: dict[type[ast.operator], Callable[[Number, Number], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_UNARY: dict[type[ast.unaryop], Callable[[Number], Number]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


def evaluate(expression: str, values: Mapping[str, Number] | None = None) -> Number:
    """Compute `+ - * / // % **` of numbers, parentheses and named values; everything else is refused.

    The text is parsed to a syntax tree and only its numbers and operators are looked at, so that no name of Python can
    be reached. Every result has to be finite and at most 1e18 in size, which is checked before a power is taken.

    Args:
        expression: For example `a / 32 * b`.
        values: Numbers by name.

    Returns:
        The number; an int where Python's arithmetic gives one.

    Raises:
        ConfigError: The text is no such expression, is too long, or a result is too large or undefined.

    Example:
        >>> evaluate("a / 32 * b", {"a": 128, "b": 0.0001})
        0.0004
        >>> evaluate("__import__('os')")
        Traceback (most recent call last):
            ...
        ssync_pl.errors.ConfigError: Expected arithmetic of numbers in '__import__('os')', but got a call. Write the \
number itself.
    """
    if not isinstance(expression, str) or len(expression) > _LONGEST:
        shown = f"{len(expression)} characters" if isinstance(expression, str) else repr(expression)
        raise ConfigError(f"Expected arithmetic of at most {_LONGEST} characters, but got {shown}. Write the number.")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ConfigError(
            f"Expected arithmetic such as 'a / 32 * b', but got {expression!r}. Write the number itself."
        ) from error
    return _value(tree.body, values or {}, expression)


def _value(node: ast.expr, values: Mapping[str, Number], expression: str) -> Number:
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)) and not isinstance(node.value, bool):
        return _bounded(node.value, expression)
    if isinstance(node, ast.Name) and node.id in values:
        value = values[node.id]
        if type(value) not in (int, float):
            raise ConfigError(f"Expected a number for {node.id!r} in {expression!r}, but got {value!r}. Correct it.")
        return _bounded(value, expression)
    if isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        return _UNARY[type(node.op)](_value(node.operand, values, expression))
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        left, right = _value(node.left, values, expression), _value(node.right, values, expression)
        if isinstance(node.op, ast.Pow):
            _check_power(left, right, expression)
        try:
            return _bounded(_BINARY[type(node.op)](left, right), expression)
        except (ZeroDivisionError, OverflowError) as error:
            raise ConfigError(f"Expected {expression!r} to be defined, but it is not ({error}). Correct it.") from error
    kinds = {ast.Call: "a call", ast.Name: "an unknown name", ast.Attribute: "an attribute", ast.Constant: "no number"}
    what = kinds.get(type(node), type(node).__name__)
    what = f"the unknown name {node.id!r}" if isinstance(node, ast.Name) else what
    raise ConfigError(f"Expected arithmetic of numbers in '{expression}', but got {what}. Write the number itself.")


def _check_power(base: Number, exponent: Number, expression: str) -> None:
    size = abs(base)
    if (base < 0 and exponent != int(exponent)) or (base == 0 and exponent < 0):
        raise ConfigError(f"Expected {expression!r} to be defined, but it is not. Correct it.")
    # The size is known before the power is computed: 9 ** 9 ** 9 would never end.
    if size not in (0, 1) and abs(exponent * math.log10(size)) > math.log10(_LARGEST):
        raise _too_large(expression)


def _bounded(value: Number, expression: str) -> Number:
    if isinstance(value, complex) or not abs(value) <= _LARGEST:
        raise _too_large(expression)
    return value


def _too_large(expression: str) -> ConfigError:
    return ConfigError(f"Expected numbers of at most {_LARGEST:.0e} in {expression!r}, but got larger. Correct it.")
