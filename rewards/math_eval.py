"""Bounded values of answer trees: exact rationals where possible, else 50-digit numbers at fixed sample points.

In: a `Node`. Out: `exact_value` gives a Fraction or None; `sample_values` gives numbers with the variables replaced by
reproducible pseudo-random points, so that two expressions are equal when they agree at every point where both are
defined. Powers, factorials and arguments have limits (`TooLarge`), so a tower of powers costs microseconds.
Everything is thread-safe: each thread has its own mpmath context.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from mpmath.ctx_mp import MPContext  # type: ignore[import-untyped]

from rewards.math_nodes import Node
from rewards.math_tokens import name_set

MAX_EXACT_BITS = 20_000
MAX_MAGNITUDE_BITS = 1_000_000
MAX_FACTORIAL = 2_000
MAX_SUM_TERMS = 500
MAX_OPERATIONS = 20_000
DIGITS = 50
_EQUAL = Fraction(1, 10**30)


class TooLarge(ValueError):
    """The value is too large to be computed within the limits."""


class Undefined(ValueError):
    """The expression has no value here (division by zero, a kind of node that is no number, ...)."""


_local = threading.local()


def context() -> Any:
    """This thread's mpmath context with DIGITS significant digits."""
    ctx = getattr(_local, "context", None)
    if ctx is None:
        ctx = _local.context = MPContext()
        ctx.dps = DIGITS
    return ctx


def exact_value(node: Node) -> Fraction | None:
    """The value as an exact rational, or None when it is irrational, symbolic or beyond MAX_EXACT_BITS.

    >>> from rewards.math_parse import parse_math
    >>> exact_value(parse_math(r"1\\frac{1}{2} + 25\\%"))
    Fraction(7, 4)
    """
    kind = node.kind
    if kind == "number":
        return node.number
    if kind in ("unit", "degree"):
        return exact_value(node.args[0])
    if kind == "based":
        return based_value(node)
    if kind == "factorial":
        return _exact_factorial(exact_value(node.args[0]))
    if kind == "function":
        return _exact_function(node)
    if kind not in ("add", "mul", "div", "neg", "pow", "percent", "abs", "floor", "ceil"):
        return None
    values: list[Fraction] = []
    for arg in node.args:
        value = exact_value(arg)
        if value is None:
            return None
        values.append(value)
    return _bounded(_exact_operation(kind, values))


def _bounded(value: Fraction | None) -> Fraction | None:
    if value is None or max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_EXACT_BITS:
        return None
    return value


def _exact_operation(kind: str, values: list[Fraction]) -> Fraction | None:
    first = values[0]
    if kind == "add":
        return sum(values[1:], first)
    if kind == "mul":
        return math.prod(values, start=Fraction(1))
    if kind == "div":
        return first / values[1] if values[1] else None
    if kind == "neg":
        return -first
    if kind == "percent":
        return first / 100
    if kind == "abs":
        return abs(first)
    if kind == "floor":
        return Fraction(math.floor(first))
    if kind == "ceil":
        return Fraction(math.ceil(first))
    return _exact_power(first, values[1])


def _exact_power(base: Fraction, exponent: Fraction) -> Fraction | None:
    if base in (0, 1) and (exponent > 0 or base == 1):
        return base
    if exponent.denominator != 1 or (base == 0 and exponent <= 0):
        return None
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if abs(exponent) * bits > MAX_EXACT_BITS:
        return None
    return base ** int(exponent)


def _exact_factorial(value: Fraction | None) -> Fraction | None:
    if value is None or value.denominator != 1 or not 0 <= value <= MAX_FACTORIAL:
        return None
    return _bounded(Fraction(math.factorial(int(value))))


def _exact_function(node: Node) -> Fraction | None:
    values = [exact_value(arg) for arg in node.args]
    whole = [int(value) for value in values if value is not None and value.denominator == 1]
    if len(whole) != len(values):
        return None
    if node.text in ("binom", "binomial") and len(whole) == 2 and 0 <= whole[0] <= MAX_FACTORIAL and whole[1] >= 0:
        return _bounded(Fraction(math.comb(*whole)))
    if node.text in ("gcd", "lcm") and whole:
        return _bounded(Fraction((math.gcd if node.text == "gcd" else math.lcm)(*whole)))
    if node.text in ("max", "min") and whole:
        return Fraction((max if node.text == "max" else min)(whole))
    if node.text in ("factorial", "abs") and len(whole) == 1:
        return _exact_factorial(Fraction(whole[0])) if node.text == "factorial" else Fraction(abs(whole[0]))
    return None


def based_value(node: Node) -> Fraction | None:
    """The value of `1101_4` (digits 0-9 only); None when a digit does not exist in the base."""
    digits, _, base_text = node.text.partition("_")
    base = int(base_text) if base_text else 0
    whole, _, fraction = digits.partition(".")
    if not 2 <= base <= 36 or any(int(digit) >= base for digit in whole + fraction):
        return None
    value = Fraction(int(whole or "0", base))
    return value + (Fraction(int(fraction, base), base ** len(fraction)) if fraction else 0)


def free_symbols(node: Node) -> frozenset[str]:
    """Names of the variables; i and e count as numbers."""
    if node.kind == "symbol":
        return frozenset() if node.text in ("i", "e") else frozenset((node.text,))
    return frozenset().union(*map(free_symbols, node.args)) if node.args else frozenset()


def canonical(node: Node) -> str:
    """A string that is equal for trees that differ only in the order of summands and factors."""
    inner = [canonical(arg) for arg in node.args]
    if node.kind in ("add", "mul", "set", "union"):
        inner.sort()
    label = str(node.number) if node.kind == "number" else node.text
    return f"{node.kind}:{label}({','.join(inner)})" if inner else f"{node.kind}:{label}"


def sample_points(names: frozenset[str], count: int = 5) -> list[dict[str, Any]]:
    """`count` reproducible points: the first three positive, the others of mixed sign."""
    ctx = context()
    points: list[dict[str, Any]] = []
    for index in range(count):
        point: dict[str, Any] = {}
        for name in names:
            value = 0.3 + 2.4 * _fraction_of(f"{index}/{name}")
            negative = index >= 3 and _fraction_of(f"sign/{index}/{name}") < 0.7
            point[name] = ctx.mpf(-value if negative else value)
        points.append(point)
    return points


def _fraction_of(text: str) -> float:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "replace")).digest()[:6], "big") / 2**48


def evaluate(node: Node, point: dict[str, Any]) -> Any:
    """The value (mpf or mpc) of `node` with variables from `point`. Raises Undefined or TooLarge."""
    ctx = context()
    ctx.operations = 0
    try:
        value = _evaluate(node, point, ctx)
    except (ZeroDivisionError, OverflowError, ValueError) as error:
        if isinstance(error, (TooLarge, Undefined)):
            raise
        raise Undefined(str(error)) from error
    if ctx.isnan(value):
        raise Undefined("not a number")
    return value


def _evaluate(node: Node, point: dict[str, Any], ctx: Any) -> Any:
    kind = node.kind
    ctx.operations += 1
    if ctx.operations > MAX_OPERATIONS:
        raise TooLarge("more operations than the limit")
    if kind == "number":
        return ctx.mpf(node.number.numerator) / node.number.denominator
    if kind in ("symbol", "constant"):
        return _named(node, point, ctx)
    handler = _HANDLERS.get(kind)
    if handler is not None:
        return handler(node, point, ctx)
    if kind == "based" and (value := based_value(node)) is not None:
        return ctx.mpf(value.numerator) / value.denominator
    raise Undefined(f"{kind} is no number")


def _named(node: Node, point: dict[str, Any], ctx: Any) -> Any:
    if node.kind == "constant":
        values = {"pi": ctx.pi, "e": ctx.e, "infinity": ctx.inf}
        if node.text not in values:
            raise Undefined(node.text)
        return +values[node.text]
    if node.text in point:
        return point[node.text]
    if node.text == "i":
        return ctx.mpc(0, 1)
    if node.text == "e":
        return +ctx.e
    raise Undefined(f"no value for {node.text}")


def _power(base: Any, exponent: Any, ctx: Any) -> Any:
    if base == 0:
        if ctx.re(exponent) > 0:
            return base
        raise Undefined("zero to a power that is not positive")
    if ctx.isinf(base) or ctx.isinf(exponent):
        raise Undefined("infinite power")
    size = abs(exponent) * max(abs(ctx.log(abs(base), 2)), 1e-6)
    if size > MAX_MAGNITUDE_BITS:
        raise TooLarge("power beyond the limit")
    return ctx.power(base, exponent)


def _eval_add(node: Node, point: dict[str, Any], ctx: Any) -> Any:
    return ctx.fsum(_evaluate(arg, point, ctx) for arg in node.args)


def _eval_mul(node: Node, point: dict[str, Any], ctx: Any) -> Any:
    return ctx.fprod(_evaluate(arg, point, ctx) for arg in node.args)


def _eval_factorial(node: Node, point: dict[str, Any], ctx: Any) -> Any:
    value = _evaluate(node.args[0], point, ctx)
    if abs(value) > MAX_FACTORIAL:
        raise TooLarge("factorial beyond the limit")
    return ctx.gamma(value + 1)


def _eval_root(node: Node, point: dict[str, Any], ctx: Any) -> Any:
    value = _evaluate(node.args[0], point, ctx)
    if len(node.args) == 1:
        return ctx.sqrt(value)
    index = _evaluate(node.args[1], point, ctx)
    if index == 3 and ctx.im(value) == 0 and ctx.re(value) < 0 and node.args[0].kind in ("neg", "number"):
        return -ctx.cbrt(-ctx.re(value))
    return _power(value, 1 / index, ctx)


_UNARY: dict[str, str] = {
    "sin": "sin", "cos": "cos", "tan": "tan", "cot": "cot", "sec": "sec", "csc": "csc", "arcsin": "asin",
    "arccos": "acos", "arctan": "atan", "arccot": "acot", "arcsec": "asec", "arccsc": "acsc", "asin": "asin",
    "acos": "acos", "atan": "atan", "sinh": "sinh", "cosh": "cosh", "tanh": "tanh",
    "coth": "coth", "ln": "log", "log": "log",
    "lg": "log10", "cis": "expj", "sqrt": "sqrt", "cbrt": "cbrt", "abs": "fabs", "floor": "floor", "ceil": "ceil",
    "arg": "arg",
}  # fmt: skip
_CIRCULAR = name_set("sin cos tan cot sec csc cis")


def _eval_function(node: Node, point: dict[str, Any], ctx: Any) -> Any:
    values = [_evaluate(arg, point, ctx) for arg in node.args]
    name = node.text
    if any(ctx.isinf(value) or abs(value) > 1e60 for value in values):
        raise TooLarge("argument beyond the limit")
    if name in _CIRCULAR and node.args[0].kind == "degree":
        values[0] = values[0] * ctx.pi / 180
    if name == "log_" and len(values) == 2:
        return ctx.log(values[0]) / ctx.log(values[1])
    if name == "exp" and len(values) == 1:
        return _power(+ctx.e, values[0], ctx)
    if name in ("max", "min") and values:
        return (max if name == "max" else min)(values, key=ctx.re)
    if name in ("binom", "binomial") and len(values) == 2:
        if max(abs(value) for value in values) > MAX_FACTORIAL:
            raise TooLarge("binomial beyond the limit")
        return ctx.binomial(*values)
    if name in _UNARY and len(values) == 1:
        if name in ("ln", "log", "lg") and values[0] == 0:
            raise Undefined("logarithm of zero")
        return getattr(ctx, _UNARY[name])(values[0])
    return _hashed(node.text, values, ctx)


def _hashed(name: str, values: list[Any], ctx: Any) -> Any:
    """A value for an unknown function: equal arguments give equal values, anything else does not."""
    key = name + "|".join(ctx.nstr(value, 25) for value in values)
    return ctx.mpf(0.3 + 2.4 * _fraction_of(key))


def _eval_opaque(node: Node, point: dict[str, Any], ctx: Any) -> Any:
    name = node.text
    if name in ("sum", "prod"):
        return _eval_series(node, point, ctx)
    if name in ("f", "g", "h", "F", "G", "prime"):
        return _hashed(name, [_evaluate(arg, point, ctx) for arg in node.args], ctx)
    if name == "mod":
        left, right = (exact_value(arg) for arg in node.args)
        if left is None or not right:
            raise Undefined("remainder of something that is no number")
        return ctx.mpf((left % right).numerator) / (left % right).denominator
    if name == "det":
        return _determinant([[_evaluate(entry, point, ctx) for entry in row.args] for row in node.args], ctx)
    if name == "lim" or not node.args:
        raise Undefined(name)
    return ctx.mpf(0.3 + 2.4 * _fraction_of(canonical(node)))


def _eval_series(node: Node, point: dict[str, Any], ctx: Any) -> Any:
    """A sum or product with few whole-numbered terms; else an unknown quantity named by its canonical form."""
    lower = next((arg.args[0] for arg in node.args[:-1] if arg.text == "_"), None)
    upper = next((arg.args[0] for arg in node.args[:-1] if arg.text == "^"), None)
    if lower is not None and upper is not None and lower.kind == "relation" and lower.args[0].kind == "symbol":
        first, last = exact_value(lower.args[1]), exact_value(upper)
        if first is not None and last is not None and 0 <= last - first <= MAX_SUM_TERMS:
            index = lower.args[0].text
            terms = [
                _evaluate(node.args[-1], {**point, index: ctx.mpf(value)}, ctx)
                for value in range(math.ceil(first), math.floor(last) + 1)
            ]
            return ctx.fsum(terms) if node.text == "sum" else ctx.fprod(terms)
    return ctx.mpf(0.3 + 2.4 * _fraction_of(canonical(node)))


def _determinant(rows: list[list[Any]], ctx: Any) -> Any:
    if len(rows) != len(rows[0]) or len(rows) > 8:
        raise Undefined("determinant")
    return ctx.det(ctx.matrix(rows))


def _eval_div(node: Node, point: dict[str, Any], ctx: Any) -> Any:
    bottom = _evaluate(node.args[1], point, ctx)
    if bottom == 0:
        raise Undefined("division by zero")
    return _evaluate(node.args[0], point, ctx) / bottom


_HANDLERS: dict[str, Callable[[Node, dict[str, Any], Any], Any]] = {
    "add": _eval_add,
    "mul": _eval_mul,
    "div": _eval_div,
    "neg": lambda node, point, ctx: -_evaluate(node.args[0], point, ctx),
    "pow": lambda node, point, ctx: _power(
        _evaluate(node.args[0], point, ctx), _evaluate(node.args[1], point, ctx), ctx
    ),
    "root": _eval_root,
    "function": _eval_function,
    "factorial": _eval_factorial,
    "opaque": _eval_opaque,
    "percent": lambda node, point, ctx: _evaluate(node.args[0], point, ctx) / 100,
    "degree": lambda node, point, ctx: _evaluate(node.args[0], point, ctx),
    "unit": lambda node, point, ctx: _evaluate(node.args[0], point, ctx),
    "abs": lambda node, point, ctx: abs(_evaluate(node.args[0], point, ctx)),
    "floor": lambda node, point, ctx: ctx.floor(_evaluate(node.args[0], point, ctx)),
    "ceil": lambda node, point, ctx: ctx.ceil(_evaluate(node.args[0], point, ctx)),
}


def nearly(left: Any, right: Any, tolerance: Any = _EQUAL) -> bool:
    """Relative agreement within `tolerance` (absolute near zero); infinities agree with themselves."""
    ctx = context()
    if ctx.isinf(left) or ctx.isinf(right):
        return bool(left == right)
    limit = ctx.mpf(tolerance.numerator) / tolerance.denominator
    size = max(abs(left), abs(right))
    return bool(abs(left - right) <= limit * size) or bool(size < ctx.mpf(10) ** -40)
