"""Are two mathematical answers the same?

Rational constants are compared exactly. Everything else is evaluated at fixed points of the complex plane: expressions
that agree there to ten digits are identical but for a set of measure zero. The work is bounded by the length of the
text instead of by a clock, so that a reward cannot depend on how busy the machine is.
"""

from __future__ import annotations

import cmath
import math
import operator
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from fractions import Fraction

from megatron_avatar.rl.rewards.notation import MAX_LENGTH, Item, Node, Unread, plain, read, states
from megatron_avatar.rl.rewards.numbers import Quantity, quantity, readings
from megatron_avatar.rl.rewards.units import known, read_unit

__all__ = ["MAX_LENGTH", "equal", "key", "verdict"]

_POINTS = 4
_TOLERANCE = 1e-10
_EPSILON = 2.0**-52
_CANCELLED = 64  # times the rounding of what cancels
_DIGITS = 6  # of a decimal that stands for a value it is rounded from
_MAX_BITS = 4096  # of an exact power
_ERRORS = (ArithmeticError, ValueError, TypeError, RecursionError)

_FUNCTIONS: dict[str, Callable[[complex], complex]] = {
    name: getattr(cmath, name)
    for name in ("exp", "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh")
}  # fmt: skip
_FUNCTIONS |= {
    "ln": cmath.log, "log": cmath.log, "lg": cmath.log10, "abs": lambda z: complex(abs(z)),
    "sec": lambda z: 1 / cmath.cos(z), "csc": lambda z: 1 / cmath.sin(z), "cot": lambda z: 1 / cmath.tan(z),
    "!": lambda z: _factorial(z),
}  # fmt: skip
_OPERATIONS: dict[str, Callable[..., Fraction]] = {"+": operator.add, "*": operator.mul, "/": operator.truediv}
_CONSTANTS = {"π": complex(cmath.pi), "e": complex(cmath.e), "i": 1j}


def equal(answer: str, gold: str) -> bool:
    """True if both texts (LaTeX or plain notation) say the same, see verdict; False where that isn't known."""
    return verdict(answer, gold) is True


def verdict(answer: str, gold: str) -> bool | None:
    """Whether both texts are one expression, statement, tuple or set; None for what isn't understood.

    `x = 3` is 3 too, while other equations and inequalities are compared as such, up to a factor. Several answers
    (`x = 1 or x = 2`, `2, 1`) are a set; units may be left out, but not exclude each other.
    """
    one, other = _read(answer), _read(gold)
    if one is not None and other is not None:
        same = _same(one, other) or _same(*_logarithms(one, other))
        if same is not False:
            return same
    measured = _measured(answer, gold, one, other)
    if measured is not None:
        return measured
    if one is not None and other is not None:
        return False
    return False if bool(states(answer)) != bool(states(gold)) else None


def key(text: str) -> str | None:
    """A text that equal answers share (but for rounding at its last digit); None for what isn't understood."""
    items = _read(text)
    found = _measure(text, items, True)
    if found is not None and (found[1] or items is None):
        value = found[0].value
        short = Fraction(value).limit_denominator(10**9)
        return str(short if math.isclose(short, value, rel_tol=1e-12) else Fraction(repr(value)))
    if items is None:
        return None
    try:
        if len(items) == 1 and items[0].label:
            return _key(items[0].sides[0])
        return ";".join(sorted(map(_item_key, items)))
    except _ERRORS:
        return None


def _read(text: str) -> tuple[Item, ...] | None:
    """The items of a text; of a computation (`10/2 = 5`) its result. None for what isn't understood."""
    try:
        items = read(text)
    except (Unread, RecursionError):
        return None
    computed = all(item.relation == "=" and not item.label and not any(map(_names, item.sides)) for item in items)
    if computed and all(_identical(*item.sides) for item in items):
        return (Item(items[-1].sides[-1:]),)
    return items


# ---- items -----------------------------------------------------------------------------------------------------


def _same(one: Sequence[Item], other: Sequence[Item]) -> bool | None:
    if len(one) == len(other) == 1:
        return _same_item(one[0], other[0])
    for few, many in ((one, other), (other, one)):
        if len(few) == 1 and not few[0].relation and few[0].sides[0].kind == "group":
            group = few[0].sides[0]
            if any(item.relation and item.relation in "<≤" for item in many):
                return None  # an interval, perhaps
            return _unordered(group.value == "{}", [Item((part,)) for part in group.parts], many)
    return _unordered(True, one, other)


def _logarithms(one: Sequence[Item], other: Sequence[Item]) -> tuple[Sequence[Item], Sequence[Item]]:
    """With common logarithms on the side that alone writes `log` without a base: natural ones are read first."""
    bare = [any(_has_log(side) for item in items for side in item.sides) for items in (one, other)]
    if bare[0] == bare[1]:
        return one, other
    return (_common(one), other) if bare[0] else (one, _common(other))


def _has_log(node: Node) -> bool:
    return (node.value == "log" and len(node.parts) == 1) or any(map(_has_log, node.parts))


def _common(items: Sequence[Item]) -> list[Item]:
    def swapped(node: Node) -> Node:
        value = "lg" if node.value == "log" and len(node.parts) == 1 else node.value
        return replace(node, value=value, parts=tuple(map(swapped, node.parts)))

    return [replace(item, sides=tuple(map(swapped, item.sides))) for item in items]


def _unordered(free: bool, one: Sequence[Item], other: Sequence[Item]) -> bool | None:
    """Item by item; in any order if `free`, unless one side names different things and the other leaves names out."""
    if len(one) != len(other):
        return False
    names = [{item.label for item in side} for side in (one, other)]
    if not free or ({""} in names and max(map(len, names)) > 1):
        return _all(_same_item(a, b) for a, b in zip(one, other, strict=True))
    left = list(other)
    unsure = False
    for item in one:
        verdicts = [_same_item(item, candidate) for candidate in left]
        if True not in verdicts:
            unsure |= None in verdicts
            if None not in verdicts:
                return False
            continue
        del left[verdicts.index(True)]
    return None if unsure else True


def _all(verdicts: Iterable[bool | None]) -> bool | None:
    found = list(verdicts)
    return False if False in found else None if None in found else True


def _same_item(one: Item, other: Item) -> bool | None:
    if one.label and other.label:
        return _identical(one.sides[0], other.sides[0]) if _same_name(one.label, other.label) else False
    if len(one.sides) == len(other.sides) == 1:
        return _identical(one.sides[0], other.sides[0])
    for statement, value in ((one, other), (other, one)):
        if statement.relation and not value.relation:  # a value is no statement, 0 isn't 3x - y = 0; x > 3 is a set
            return None if value.sides[0].kind == "group" and statement.relation in "<≤" else False
    if one.relation != other.relation:
        return False
    return _proportional(_two_sides(one), _two_sides(other), one.relation)


def _same_name(one: str, other: str) -> bool:
    """y is f(x), and x_1 is x; but x_1 isn't x_2, nor x y."""
    numbered = one.partition("_")[0] == other.partition("_")[0] and ("_" in one) != ("_" in other)
    return one == other or numbered or "(" in one + other


def _two_sides(item: Item) -> Node:
    """Left minus right of a statement."""
    if item.label:
        item = Item((Node("name", value=item.label), item.sides[0]), "=")
    return Node("+", (item.sides[0], Node("negative", (item.sides[1],))))


def _proportional(one: Node, other: Node, relation: str) -> bool | None:
    """Whether two differences are the same up to a factor; for an order the factor is above 0."""
    ratios = []
    for point in range(_POINTS):
        try:
            (a, noise_a), (b, noise_b) = _value(one, point), _value(other, point)
        except _ERRORS:
            continue
        if abs(a) <= _CANCELLED * noise_a or abs(b) <= _CANCELLED * noise_b:
            return None  # says nothing: 2 = 2
        ratios.append((a / b, abs(a / b) * (noise_a / abs(a) + noise_b / abs(b))))
    if len(ratios) <= _POINTS // 2:
        return None
    first, _ = ratios[0]
    if any(abs(ratio - first) > max(_TOLERANCE * abs(first), _CANCELLED * noise) for ratio, noise in ratios):
        return False
    return relation in "=≠" or (abs(first.imag) <= _TOLERANCE * abs(first) and first.real > 0)


# ---- expressions -----------------------------------------------------------------------------------------------


def _identical(one: Node, other: Node) -> bool | None:
    if "group" in (one.kind, other.kind):
        return _same_group(one, other)
    if "percent" in (one.kind, other.kind):
        if one.kind == other.kind:
            return _identical(one.parts[0], other.parts[0])
        share, bare = (one, other) if one.kind == "percent" else (other, one)
        hundredth = Node("/", (share.parts[0], Node("number", value=Fraction(100))))
        return _identical(share.parts[0], bare) or _identical(hundredth, bare)
    exact = _exact(one), _exact(other)
    if None not in exact:
        return exact[0] == exact[1] or _rounded(one, other) or _rounded(other, one)
    compared = 0
    for point in range(_POINTS):
        try:
            (a, noise_a), (b, noise_b) = _value(one, point), _value(other, point)
        except _ERRORS:
            continue  # undefined or beyond a double here, or no expression anywhere
        if not abs(a - b) <= max(_TOLERANCE * max(abs(a), abs(b)), _CANCELLED * (noise_a + noise_b)):
            return _rounded(one, other) or _rounded(other, one)
        compared += 1
    return True if compared > _POINTS // 2 else None


def _same_group(one: Node, other: Node) -> bool | None:
    for single, group in ((one, other), (other, one)):
        if single.kind != "group":  # {5} is the solution 5
            alone = group.value == "{}" and len(group.parts) == 1 and group.parts[0].value != "∅"
            return _identical(single, group.parts[0]) if alone else False
    if one.value != other.value:
        return False
    return _unordered(one.value == "{}", *[[Item((part,)) for part in node.parts] for node in (one, other)])


def _rounded(decimal: Node, other: Node) -> bool:
    """Whether a decimal of six digits and more is a value that isn't written as one, rounded at its last place."""
    sign, literal = 1, decimal
    if literal.kind == "negative":
        sign, literal = -1, literal.parts[0]
    if literal.kind != "number" or literal.places < 1 or _is_literal(other):
        return False
    digits = str(abs(literal.value * 10**literal.places).numerator)
    if len(digits) < _DIGITS:
        return False
    try:
        exact = _exact(other)
        value = exact if exact is not None else Fraction(_real(_value(other, 0)[0]))
    except _ERRORS:
        return False
    assert isinstance(literal.value, Fraction), literal
    return not _names(other) and abs(value - sign * literal.value) <= Fraction(1, 2 * 10**literal.places)


def _is_literal(node: Node) -> bool:
    return node.kind == "number" or (node.kind == "negative" and _is_literal(node.parts[0]))


def _real(value: complex) -> float:
    if abs(value.imag) > _TOLERANCE * abs(value):
        raise ValueError("not real")
    return value.real


def _names(node: Node) -> set[str]:
    if node.kind == "name":
        return set() if node.value in _CONSTANTS else {str(node.value)}
    return set().union(*map(_names, node.parts))


def _exact(node: Node) -> Fraction | None:
    """The value of a rational constant whose digits are few enough to be computed; None for everything else."""
    if node.kind == "number":
        return node.value  # type: ignore[return-value]
    parts = [exact for part in node.parts if (exact := _exact(part)) is not None]
    if len(parts) < len(node.parts) or not parts:
        return None
    try:
        match node.kind:
            case "negative":
                return -parts[0]
            case "degree":
                return parts[0]
            case "percent":
                return parts[0] / 100
            case "+" | "*" | "/":
                return _OPERATIONS[node.kind](*parts)
            case "call" if node.value == "!":
                return Fraction(round(_factorial(complex(parts[0])).real)) if parts[0] < 20 else None
            case "^" if parts[1].denominator == 1:
                bits = abs(parts[1]) * max(parts[0].numerator.bit_length(), parts[0].denominator.bit_length())
                return Fraction(parts[0] ** int(parts[1])) if bits <= _MAX_BITS else None
    except ArithmeticError:
        pass
    return None


def _value(node: Node, point: int) -> tuple[complex, float]:
    """A node's value at a point, and how far rounding may have taken it from the true one."""
    match node.kind:
        case "number":
            value, noise = complex(node.value), 0.0
        case "name":
            name = str(node.value)
            value, noise = _CONSTANTS.get(name) or _drawn(name, point), 0.0
        case _:
            values = [_value(part, point) for part in node.parts]
            value = _apply(node, [value for value, _ in values])
            noise = 0.0
            for place, (part, rounding) in enumerate(values):  # what each part's rounding does to the whole
                if rounding:
                    moved = [v for v, _ in values]
                    moved[place] = part + rounding
                    noise += abs(_apply(node, moved) - value)
    return value, noise + _EPSILON * abs(value)


def _apply(node: Node, values: list[complex]) -> complex:
    match node.kind:
        case "negative":
            return -values[0]
        case "+":
            return values[0] + values[1]
        case "*":
            return values[0] * values[1]
        case "/":
            return values[0] / values[1]
        case "^":
            return values[0] ** values[1]
        case "degree":
            return values[0]
        case "percent":
            return values[0] / 100
        case "call" if node.value == "root":
            return _root(*values)
        case "call" if len(values) == 2:
            return cmath.log(values[0]) / cmath.log(values[1])
        case "call":
            return _FUNCTIONS[str(node.value)](values[0])
    raise TypeError(node.kind)


def _root(radicand: complex, index: complex) -> complex:
    if radicand.imag == 0 > radicand.real and index.imag == 0 and index.real % 2 == 1:  # of -8 the cube root is -2
        return -((-radicand) ** (1 / index))
    return cmath.sqrt(radicand) if index == 2 else radicand ** (1 / index)


def _factorial(value: complex) -> complex:
    whole = round(value.real)
    if abs(value - whole) > _TOLERANCE * max(1, whole) or not 0 <= whole <= 170:
        raise ValueError("no factorial")
    return complex(math.factorial(whole))


def _drawn(symbol: str, point: int) -> complex:
    draw = random.Random(f"{symbol}:{point}")
    return complex(draw.uniform(-2, 2), draw.uniform(-2, 2))


# ---- numbers with a unit, or in words --------------------------------------------------------------------------

_OPERATORS = re.compile(r"[=<>≤≥+*^\\|{}()\[\]!]")
_UNIT_MAY_BEGIN = re.compile(r"(?<=[\d)}\s])(?=[A-Za-zµΩ°])")


def _measured(answer: str, gold: str, one: Sequence[Item] | None, other: Sequence[Item] | None) -> bool | None:
    """The verdict on two numbers of which one carries a unit, is written in words or with a decimal comma; None where
    they aren't two numbers, or plain ones."""
    found, wanted = _measure(answer, one, True), _measure(gold, other, False)
    if found is None or wanted is None or not (found[1] or wanted[1]):
        return None
    values = readings(found[0], wanted[0])
    return any(math.isclose(value, wanted[0].value, rel_tol=1e-12) for value in values)


def _measure(text: str, items: Sequence[Item] | None, is_answer: bool) -> tuple[Quantity, bool] | None:
    """The number that a text is, and whether more than a formula says so."""
    if items is not None and len(items) == 1 and (constant := _constant(items[0])):
        return constant, bool(constant.unit)
    text = plain(text)
    if len(text) > MAX_LENGTH:
        return None
    for place in [found.start() for found in _UNIT_MAY_BEGIN.finditer(text)][:4]:
        head, tail = text[:place], text[place:]
        if not is_answer and len(tail) == 1 and head[-1:].isdigit():
            break  # a gold of `3m` is a product
        unit, length = read_unit(" " + tail)
        whole = length > len(tail) and (unit in ("%", "deg") or known(unit) is not None)
        if whole and (number := _constant_of(head)):
            return Quantity(number.value, unit), True
    spelt = items is None or not any(character.isdigit() for character in text)
    comma = is_answer and items is not None and len(items) == 2  # a gold of `3,5` is two values
    found = quantity(text) if (spelt or comma) and not _OPERATORS.search(text) else None
    return None if found is None else (found, True)


def _constant_of(text: str) -> Quantity | None:
    items = _read(text)
    return _constant(items[0]) if items is not None and len(items) == 1 else None


def _constant(item: Item) -> Quantity | None:
    """The real number that an item is, or assigns; None for everything else."""
    node = item.sides[0]
    if len(item.sides) > 1 or node.kind == "group" or _names(node):
        return None
    unit = {"percent": "%", "degree": "deg"}.get(node.kind, "")
    try:
        return Quantity(_real(_value(node.parts[0] if unit else node, 0)[0]), unit)
    except _ERRORS:
        return None


# ---- keys ------------------------------------------------------------------------------------------------------


def _item_key(item: Item) -> str:
    if len(item.sides) == 1:
        return f"{item.label}{item.relation}{_key(item.sides[0])}"
    (first, _), (second, _) = (_value(_two_sides(item), point) for point in (0, 1))
    direction = "" if item.relation in "=≠" else _shown(first / abs(first), 6)
    return f"{item.relation}{_shown(second / first, 9)}{direction}"


def _key(node: Node) -> str:
    if node.kind == "group":
        parts = [_key(part) for part in node.parts]
        return str(node.value)[0] + ";".join(sorted(parts) if node.value == "{}" else parts) + str(node.value)[1]
    exact = _exact(node)
    return _shown(_value(node, 0)[0], 9) if exact is None else str(exact)


def _shown(value: complex, digits: int) -> str:
    return f"{value.real + 0:.{digits}g},{value.imag + 0:.{digits}g}"
