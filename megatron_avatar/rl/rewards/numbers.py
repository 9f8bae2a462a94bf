"""Reading a number, and its unit, out of an answer: digits, words, fractions, percent, scientific notation."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from megatron_avatar.rl.rewards.plain import CJK, compose, unwrap
from megatron_avatar.rl.rewards.units import in_unit, read_unit
from megatron_avatar.rl.rewards.words import in_digits, number_words

__all__ = ["Quantity", "number_words", "quantity", "readings", "values"]

_ARGUMENT = r"\s?(?:\{\s?([^{}]{1,40}?)\s?\}|(\d))"
_PLAIN = (  # LaTeX as plain text, in this order
    (re.compile(r"\\(?:left|right|[,;!: ])|\$|\\?\{,\}"), ""),
    (re.compile(rf"\\[dtc]?frac{_ARGUMENT}{_ARGUMENT}"), r" \1\2/\3\4 "),
    (re.compile(r"\\times|\\cdot|×|·(?=\s?10)"), "x"),
    (re.compile(r"\\%"), "%"),
    (re.compile(r"\\?\^?\s?\{?\\circ\}?"), "°"),
)
_SPACED = re.compile(r"(?<![\d.,])(?<!\d\s)(\d{1,3}(?:\s\d{3})++)(?![\d.]\d|\d|/)")  # 1 250
_SEPARATED = re.compile(r"(?<![\d.,'_])\d{1,15}+(?:[.,'_]\d{1,15}+)++")
_THOUSANDS = re.compile(r"[1-9]\d{0,2}(?:([,'_])\d{3})(?:\1\d{3})*(?:\.\d+)?")
_INDIAN = re.compile(r"[1-9]\d?(?:,\d{2})+,\d{3}(?:\.\d+)?")
_EUROPEAN = re.compile(r"[1-9]\d{0,2}(?:\.\d{3})+,\d+|[1-9]\d{0,2}(?:\.\d{3}){2,}")
_DECIMAL_COMMA = re.compile(r"\d+,\d+")

_DECIMAL = r"(?:\d++\.?\d*+|\.\d++)"  # without a way back, here and below: a long text costs no more than its length
_NUMBER = re.compile(
    rf"(?<![^\W{CJK}])(?<!\.)(?P<sign>[-+]?)\s?(?:(?P<whole>\d++)\s(?P<a>\d++)/(?P<b>\d++)"  # 1 1/2
    rf"|(?P<top>{_DECIMAL})\s?/\s?(?P<bottom>{_DECIMAL})"
    rf"|(?P<power>(?:(?P<mantissa>{_DECIMAL})\s?[x*]\s?)?10\s?(?:\^|\*\*)\s?\{{?\s?(?P<exponent>[-+]?\d++)\s?\}}?)"
    rf"|(?P<decimal>{_DECIMAL}(?:e[-+]?\d++)?))",
    re.IGNORECASE,
)
_NOT_IT = re.compile(  # a denied number, a bound, a part of an expression
    r"(?:[√^_]|\\(?:sqrt|log|ln|sin|cos|tan)\s?\{?\s?|(?:\bnot|n't|\bnever|\bno|\bcannot)\s(?:be\s|exactly\s|equals?\s(?:to\s)?)?|"
    r"\b(?:more|less|fewer|greater|larger|smaller|higher|lower|other)\sthan\s|\bat\s(?:least|most)\s|"
    r"\b(?:over|under|above|below|up\sto)\s|[<>≤≥≠±]=?\s?|\\(?:le|leq|ge|geq|neq?|pm|[lg]t)\s?|"
    r"(?:不是|没有|不到|不足|少于|多于|超过|至少|至多|大于|小于|不等于)\s?)\Z",
    re.IGNORECASE,
)
_NOT_THIS = re.compile(  # behind it
    r"\s?\+(?!\s?\d)|\s(?:or|and)\s(?:more|less|fewer|above|below|over)\b|\s?(?:π|\\?pi\b|√|\\sqrt|\^)",
    re.IGNORECASE,
)
_SAME_AGAIN = re.compile(r"[^\d(]*\(([^()]{1,80})\)\D*")


@dataclass(frozen=True)
class Quantity:
    """A value as written, with its unit ('%' for percent, '' for none that is known)."""

    value: float
    unit: str = ""


def quantity(text: str) -> Quantity | None:
    """The only number in a text, or None: a text with two numbers is no answer, nor is one that isn't finite, one that
    is denied (`not 7`) or a bound (`more than 7`).

    Digits (thousands separated or not, decimal point or comma), fractions, mixed numbers, `3 x 10^5` and `3e5`, words
    (`minus three hundred and five`, `two thirds`, `1.5 million`, `三个`); LaTeX's forms of these.
    """
    text = _in_digits(text)
    found = _NUMBER.search(text)
    value = _value(found, text) if found else None
    if found is None or value is None or not math.isfinite(value):
        return None
    unit, length = read_unit(text[found.end() : found.end() + 60])
    before, behind = text[: found.start()], text[found.end() + length :]
    if _NOT_IT.search(before[-24:]) or _NOT_THIS.match(behind) or re.search(r"\d", before):
        return None
    if re.search(r"\d", behind):  # `four (4)` is one number
        again = _SAME_AGAIN.fullmatch(behind)
        same = quantity(again[1]) if again else None
        if same is None or same.value != value:
            return None
    return Quantity(value, unit)


def values(text: str) -> set[float]:
    """Every number in a text, without units."""
    text = _in_digits(text)
    found = (_value(match, text) for match in _NUMBER.finditer(text))
    return {value for value in found if value is not None and math.isfinite(value)}


def _in_digits(text: str) -> str:
    """A text as plain ASCII, its numbers in digits with a decimal point and nothing between thousands."""
    text = " ".join(unwrap(compose(text)).split())  # the patterns would take days for a long blank
    for pattern, plain in _PLAIN:
        text = pattern.sub(plain, text)
    text = _SPACED.sub(lambda found: found[1].replace(" ", ""), " ".join(text.split()))
    text = _SEPARATED.sub(lambda found: _separated(found, text), text)
    return in_digits(text)


def _separated(found: re.Match[str], text: str) -> str:
    """`1,234,567`, `12,34,567`, `1'000` and `1.234.567` are whole, `1.234,5` and `3,5` have a decimal comma."""
    number = found[0]
    if (grouped := _THOUSANDS.fullmatch(number)) or _INDIAN.fullmatch(number):
        return number.replace(grouped[1] if grouped else ",", "")
    in_brackets = text[: found.start()].rstrip()[-1:] in ("(", "[", "{")  # (3,5) is a pair
    if _EUROPEAN.fullmatch(number) or (_DECIMAL_COMMA.fullmatch(number) and not in_brackets):
        return number.replace(".", "").replace(",", ".")
    return number.replace(",", " , ")


def _value(match: re.Match[str], text: str) -> float | None:
    groups = match.groupdict()
    try:
        if groups["whole"] is not None:
            value = int(groups["whole"]) + int(groups["a"]) / int(groups["b"])
        elif groups["top"] is not None:
            value = float(groups["top"]) / float(groups["bottom"])
        elif groups["power"] is not None:
            value = float(groups["mantissa"] or 1) * 10.0 ** int(groups["exponent"])
        else:
            value = float(groups["decimal"])
    except (ArithmeticError, ValueError):  # ValueError: more digits than Python converts
        return None
    dash = match.start() + 1 < len(text) and text[match.start() + 1] == " " and text[: match.start()].strip()[-1:]
    return -value if groups["sign"] == "-" and (not dash or dash in "=(:") else value  # `beeps - 5` has no sign


def readings(answer: Quantity, gold: Quantity) -> list[float]:
    """The values of an answer in the gold's unit, see in_unit; none where their units exclude each other."""
    return in_unit(answer.value, answer.unit, gold.unit)
