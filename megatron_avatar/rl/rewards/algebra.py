"""Are two mathematical answers the same expression?

Equality is decided by evaluating both sides at fixed points of the complex plane: expressions that agree
there to ten digits are identical but for a set of measure zero. Foreign text is never executed (a
whitelist over Python's syntax tree), and the work is bounded by the length of the text instead of by a
clock, so that a reward cannot depend on how busy the machine is.
"""

from __future__ import annotations

import ast
import cmath
import operator
import random
import re
import warnings
from collections.abc import Callable

MAX_LENGTH = 400  # characters; a longer answer is no expression
_POINTS = 4
_TOLERANCE = 1e-10

_OPERATORS: dict[type, Callable] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}
_FUNCTIONS = {name: getattr(cmath, name) for name in ("sqrt", "exp", "sin", "cos", "tan", "asin", "acos", "atan")}
_FUNCTIONS |= {"ln": cmath.log, "log": cmath.log, "abs": lambda z: complex(abs(z))}
_CONSTANTS = {"pi": complex(cmath.pi), "e": complex(cmath.e), "i": 1j}

_BRACED = (  # innermost braces first, repeated until nothing changes
    (re.compile(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}"), r"((\1)/(\2))"),
    (re.compile(r"\\sqrt\[([^\[\]{}]*)\]\{([^{}]*)\}"), r"((\2)**(1/(\1)))"),
    (re.compile(r"\\sqrt\{([^{}]*)\}"), r"sqrt(\1)"),
    (re.compile(r"\^\{([^{}]*)\}"), r"**(\1)"),
    (re.compile(r"\\(?:boxed|text|mathrm|mathbf)\{([^{}]*)\}"), r"(\1)"),
)
_PLAIN = (
    (re.compile(r"\\(?:left|right|displaystyle|[,;!: ])|\$|\\?%|\^?\\circ|°"), ""),
    (re.compile(r"(?<=\d)(?:,|\{,\})(?=\d{3}(?!\d))"), ""),  # thousands
    (re.compile(r"\\cdot|\\times|×|·"), "*"),
    (re.compile(r"\\div|÷"), "/"),
    (re.compile(r"−"), "-"),
    (re.compile(r"π"), "pi"),
    (re.compile(r"(?:√|\\sqrt(?![a-z]))\s*(?=\{)"), r"\\sqrt"),
    (re.compile(r"√\s*(\d+\.?\d*|[A-Za-z]|\([^()]*\))|\\sqrt\s*([0-9A-Za-z])"), r"\\sqrt{\1\2}"),
)


def equal(left: str, right: str) -> bool:
    """True if both texts (LaTeX or plain notation) are one expression, or one tuple of expressions.

    Of an equation (`x = 3`) the last side counts. Text that is no expression equals nothing.
    """
    trees = _parse(left), _parse(right)
    if trees[0] is None or trees[1] is None or len(trees[0]) != len(trees[1]):
        return False
    return all(_identical(a, b) for a, b in zip(*trees, strict=True))


def key(text: str) -> str | None:
    """A text that equal expressions share (but for rounding at its last digit); None for what is no expression."""
    trees = _parse(text)
    if trees is None:
        return None
    try:
        values = [_evaluate(tree, 0) for tree in trees]
    except (ArithmeticError, ValueError, TypeError, RecursionError):
        return None
    return ";".join(f"{value.real + 0:.9g},{value.imag + 0:.9g}" for value in values)


def _identical(left: ast.expr, right: ast.expr) -> bool:
    compared = 0
    for point in range(_POINTS):
        try:
            a, b = _evaluate(left, point), _evaluate(right, point)
            distance, scale = abs(a - b), max(1.0, abs(a), abs(b))
        except (ArithmeticError, ValueError, TypeError, RecursionError):
            continue  # undefined or beyond a double here, or no expression anywhere
        if not distance <= _TOLERANCE * scale:
            return False
        compared += 1
    return compared > _POINTS // 2


def _parse(text: str) -> list[ast.expr] | None:
    """The expressions of a tuple, or the one expression; None if the text is neither."""
    if len(text) > MAX_LENGTH:
        return None
    text = text.strip().rstrip(".")
    for pattern, replacement in _PLAIN:
        text = pattern.sub(replacement, text)
    while True:
        simpler = text
        for pattern, replacement in _BRACED:
            simpler = pattern.sub(replacement, simpler)
        if simpler == text or len(simpler) > 4 * MAX_LENGTH:
            break
        text = simpler
    text = re.split(r"(?<![<>!=])=(?!=)", text)[-1].replace("\\", "").replace("^", "**").strip()
    text = re.sub(r"((?<!\w)\d+\.?\d*|\))\s*(?=[A-Za-z(])(?!e[+-]?\d)", r"\1*", text)  # 2x is a product,
    text = re.sub(r"(?<!\w)([A-Za-z])\s+(?=[A-Za-z(])", r"\1*", text)  # and so is x y
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            body = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None
    return list(body.elts) if isinstance(body, ast.Tuple) else [body]


def _evaluate(node: ast.expr, point: int) -> complex:
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return complex(value)
        case ast.Name(id=name):
            return _CONSTANTS[name] if name in _CONSTANTS else _value(name, point)
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_evaluate(operand, point))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_evaluate(left, point), _evaluate(right, point))
        case ast.Call(func=ast.Name(id=name), args=[argument], keywords=[]):
            if name in _FUNCTIONS:
                return _FUNCTIONS[name](_evaluate(argument, point))
            return _evaluate(node.func, point) * _evaluate(argument, point)  # x(x + 1) is a product
    raise TypeError(type(node).__name__)


def _value(symbol: str, point: int) -> complex:
    draw = random.Random(f"{symbol}:{point}")
    return complex(draw.uniform(-2, 2), draw.uniform(-2, 2))
