"""Reading a number, and its unit, out of an answer: digits, words, fractions, percent, scientific notation."""

from __future__ import annotations

import math
import re
import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

_SUPERSCRIPT = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_SUPERSCRIPTS = re.compile(r"[⁻⁺]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+")
_PLAIN = (  # LaTeX and typography as plain text, in this order
    (re.compile(r"\\(?:text|mathrm|mathbf|boxed|operatorname)\s*\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\\(?:left|right|displaystyle|[,;!: ])|\$|\\?\{,\}"), ""),
    (re.compile(r"\\[dt]?frac\s*\{\s*([^{}]*?)\s*\}\s*\{\s*([^{}]*?)\s*\}"), r" \1/\2"),
    (re.compile(r"[−–‒](?=\s?[\d.])"), "-"),
    (re.compile(r"\\times|\\cdot|×|·"), "x"),
    (re.compile(r"(?<=\d),(?=\d{3}(?!\d))|(?<=\d)\s(?=\d{3}(?:\s\d{3})*(?![\d.]))"), ""),  # thousands
    (re.compile(r"\\%"), "%"),
    (re.compile(r"\\?\^?\s*\{?\\circ\}?"), "°"),
)
_DECIMAL = r"(?:\d++\.?\d*+|\.\d++)"  # without a way back, here and below: a long text costs no more than its length
_NUMBER = re.compile(
    rf"(?<![\w.])(?P<sign>[-+]?)\s?(?:(?P<whole>\d++)\s(?P<a>\d++)/(?P<b>\d++)"  # 1 1/2
    rf"|(?P<top>{_DECIMAL})\s?/\s?(?P<bottom>{_DECIMAL})"
    rf"|(?P<power>(?:(?P<mantissa>{_DECIMAL})\s?[x*]\s?)?10\s?(?:\^|\*\*)\s?\{{?\s?(?P<exponent>[-+]?\d++)\s?\}}?)"
    rf"|(?P<decimal>{_DECIMAL}(?:e[-+]?\d++)?))",
    re.IGNORECASE,
)
_UNIT = re.compile(r"\s?(?P<unit>%|°?\s?[A-Za-zµμΩ]+\d?(?:\s?[/x*]\s?[A-Za-zµμΩ]+(?:\^?-?\d)?)?|°|percent)(?![\w^])")
MAX_UNIT = 32  # characters
_NO_UNIT = {"x", "e", "and", "or", "to", "of", "in", "is", "as", "per", "times", "a", "the", "at", "on"}


@dataclass(frozen=True)
class Quantity:
    """A value as written, with its unit ('%' for percent, '' for none that is known)."""

    value: float
    unit: str = ""


_SCALES = {"hundred": 100, "thousand": 1000, "million": 1_000_000}
MAX_WORDS = 16  # of one number


@lru_cache(maxsize=1)
def _words() -> tuple[dict[str, int], re.Pattern[str]]:
    """The words of the numbers below 20 and of the tens, and a pattern of the words that may be one number."""
    values = {number_words(n): n for n in (*range(20), *range(20, 100, 10))}
    word = "|".join(map(re.escape, sorted([*values, *_SCALES], key=len, reverse=True)))
    joint = r"[\s-]|(?:(?<=hundred)|(?<=thousand)|(?<=million))\sand\s|(?:(?<=thousand)|(?<=million)),\s"
    scale = "|".join(_SCALES)
    return values, re.compile(rf"\b(?:a\s(?={scale}))?(?:{word})(?:(?:{joint})(?:{word})\b)*+\b", re.IGNORECASE)


def _in_digits(match: re.Match[str]) -> str:
    """The digits of words that spell one number, or each word's own: then they are several."""
    values, _ = _words()
    words = [word for word in re.split(r"[\s,-]+", match.group().casefold()) if word != "and"]
    words = ["one" if word == "a" else word for word in words]
    total = part = 0
    for word in words[:MAX_WORDS]:
        if word == "hundred":
            part *= 100
        elif word in _SCALES:
            total, part = total + part * _SCALES[word], 0
        else:
            part += values[word]
    spelt = [word for word in re.split(r"[\s,-]+", number_words(total + part)) if word != "and"]
    if spelt == words:
        return f" {total + part} "
    if _SCALES.keys() & words:
        return match.group()  # `nineteen hundred` is not 19
    return f" {' '.join(str(values.get(word, word)) for word in words)} "


def number_words(value: int) -> str:
    """The English words of a whole number: 21 is `twenty-one`."""
    from num2words import num2words

    return num2words(value)


def quantity(text: str) -> Quantity | None:
    """The only number in a text, or None: a text with two numbers is no answer, nor is one that isn't finite.

    Digits (thousands separated or not), fractions, mixed numbers, `3 x 10^5` and `3e5`, number words where there are no
    digits (`three hundred and five`); LaTeX's forms of these.
    """
    text = _SUPERSCRIPTS.sub(lambda match: "^" + match.group().translate(_SUPERSCRIPT), text)
    text = unicodedata.normalize("NFKC", text.replace("½", " 1/2").replace("¼", " 1/4").replace("¾", " 3/4"))
    text = " ".join(text.split())  # the patterns below would take days for a long blank
    for pattern, plain in _PLAIN:
        text = pattern.sub(plain, text)
    if not any(character.isdigit() for character in text):
        text = _words()[1].sub(_in_digits, text)
    found = _NUMBER.search(text)
    value = _value(found) if found else None
    if found is None or value is None or not math.isfinite(value):
        return None
    unit = _UNIT.match(text, found.end())  # its own digit, as in m/s^2, is no second number
    if re.search(r"\d", text[: found.start()] + text[(unit or found).end() :]):
        return None
    return Quantity(value, _unit(unit.group("unit")) if unit else "")


def _value(match: re.Match[str]) -> float | None:
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
    return -value if groups["sign"] == "-" else value


def _unit(text: str) -> str:
    text = text.replace(" ", "")
    if text.casefold() in ("%", "percent"):
        return "%"
    text = text.replace("°", "deg")
    return "" if text.casefold() in _NO_UNIT else text


@lru_cache(maxsize=1)
def _registry() -> Any:
    import pint  # half a second to import, and only numbers with units need it

    return pint.UnitRegistry(case_sensitive=True)


@lru_cache(maxsize=4096)
def _known(unit: str) -> Any:
    """pint's unit, or None. Names are short and their exponents one digit, so that parsing is cheap."""
    if len(unit) > MAX_UNIT:
        return None
    name = re.sub(r"(?<=[A-Za-zµμΩ])(\d)$", r"^\1", unit)  # cm3
    for spelling in (name, name.casefold()):
        try:
            return _registry().Unit(spelling)
        except Exception:  # pint raises whatever its parser meets
            continue
    return None


def readings(answer: Quantity, gold: Quantity) -> list[float]:
    """The values of an answer in the gold's unit; none where their units exclude each other.

    A unit that one side leaves out is the other's. A percentage beside a bare number may mean its hundredth too.
    """
    if answer.unit == gold.unit:
        return [answer.value]
    if answer.unit == "%" and not gold.unit:
        return [answer.value, answer.value / 100]
    if gold.unit == "%" and not answer.unit:
        return [answer.value, answer.value * 100]
    if not answer.unit or not gold.unit:
        return [answer.value]
    have, want = (_known(unit) if unit != "%" else None for unit in (answer.unit, gold.unit))
    if have is None or want is None:  # `4 beeps` against `4 tones`: words, not units
        return [answer.value] if "%" not in (answer.unit, gold.unit) else []
    try:
        return [float(_registry().Quantity(answer.value, have).to(want).magnitude)]
    except Exception:  # units of other dimensions, as pint raises it
        return []
