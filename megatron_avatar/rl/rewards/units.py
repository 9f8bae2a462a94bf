"""Units behind a number: what belongs to one, and what one side's value is in the other side's unit."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

_PERCENT = re.compile(r"\s?(?:%|percent(?:age)?(?:\s+points?)?\b|per\s?cent\b|pct\b)", re.IGNORECASE)
_DEGREES = re.compile(r"\s?(?:°|deg(?:ree)?s?\b\.?)\s?(celsius|centigrade|fahrenheit|kelvin|[CFK])?(?![a-z])", re.I)
_SCALES = {"celsius": "degC", "centigrade": "degC", "c": "degC", "fahrenheit": "degF", "f": "degF", "kelvin": "K",
           "k": "K"}  # fmt: skip
_CHINESE = {
    "平方米": "m**2", "立方米": "m**3", "摄氏度": "degC", "公里": "km", "千米": "km", "厘米": "cm", "毫米": "mm",
    "千克": "kg", "公斤": "kg", "毫升": "ml", "分钟": "min", "分鐘": "min", "小时": "hour", "小時": "hour", "米": "m",
    "克": "g", "升": "l", "秒": "s", "天": "day", "度": "deg", "歳": "year", "岁": "year",
}  # fmt: skip
_FACTOR = re.compile(
    r"(?P<join>\s?[/·*]\s?|\s?x(?=\s)\s|\s(?:per|an?)\s|\s?(?![\s]))"
    r"(?P<before>(?:sq(?:uare)?|cubic|cu)\b\.?\s)?(?P<name>[A-Za-zµμΩ]{1,24})"
    r"(?P<power>\s?(?:\^|\*\*)\s?\{?\s?[-+]?\d\s?\}?(?!\d)|-?\d(?![\d.,])|\s(?:squared|cubed)\b)?",
    re.IGNORECASE,
)
_FACTORS = 5
MAX_UNIT = 48  # characters
# Words behind a number that are no unit, though pint knows some of them.
_NO_UNIT = {"x", "e", "and", "or", "to", "of", "in", "is", "as", "per", "times", "a", "an", "the", "at", "on", "by",
            "points", "point", "circles", "circle", "shots", "shot", "count", "counts", "fps"}  # fmt: skip
_ALIASES = {"kgs": "kg", "kms": "km", "cms": "cm", "mms": "mm", "kmh": "km/hour", "kmph": "km/hour", "hz": "Hz",
            "khz": "kHz", "mhz": "MHz"}  # fmt: skip
_LARGE = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}  # or kelvin, molar, byte, tesla
_TEMPERATURES = {"degC", "degF", "K", "kelvin"}


def read_unit(text: str) -> tuple[str, int]:
    """The unit at the head of what stands behind a number, and the characters it takes; ('', 0) for none.

    '%' for percent, else as pint writes it where pint knows it whole, else the words as they stand.
    """
    text = text[:MAX_UNIT]
    if found := _PERCENT.match(text):
        return "%", found.end()
    if found := _DEGREES.match(text):
        return _SCALES[found[1].casefold()] if found[1] else "deg", found.end()
    head = text.lstrip()
    if written := next((name for name in _CHINESE if head.startswith(name)), None):
        return _CHINESE[written], len(text) - len(head) + len(written)
    factors = _factors(text)
    for count in range(len(factors), 0, -1):
        unit = "".join(factor for factor, _ in factors[:count]).lstrip("*")
        if known(unit) is not None:
            end = factors[count - 1][1]
            beyond = re.match(r"\s?/\s?|\sper\s", text[end:])  # metres per lap are no metres
            return (text[:end].strip() + " per", end) if beyond else (unit, end)
    found = re.match(r"\s?([A-Za-zµμΩ]+)", text)
    if found is None or found[1].casefold() in _NO_UNIT:
        return "", 0
    return found[1], found.end()


def _factors(text: str) -> list[tuple[str, int]]:
    """Factors of a unit as pint reads them, each with its sign of operation, and where it ends."""
    factors: list[tuple[str, int]] = []
    end = 0
    while len(factors) < _FACTORS and (found := _FACTOR.match(text, end)) and found.end() > end:
        name = found["name"]
        if name.casefold() in _NO_UNIT or (not factors and found["join"].strip()):
            break
        by = "/" if found["join"].strip().casefold() in ("/", "per", "a", "an") else "*"
        power = (found["power"] or "").strip(" ^*{}")
        exponent = {"squared": "2", "cubed": "3"}.get(power.casefold(), power)
        if found["before"]:
            exponent = "2" if found["before"][0] in "sS" else "3"
        factors.append((by + _name(name) + (f"**{exponent}" if exponent else ""), found.end()))
        end = found.end()
    return factors


def _name(name: str) -> str:
    return _ALIASES.get(name.casefold(), name)


@lru_cache(maxsize=1)
def _registry() -> Any:
    import pint  # half a second to import, and only numbers with units need it

    return pint.UnitRegistry(case_sensitive=True)


@lru_cache(maxsize=4096)
def known(unit: str) -> Any:
    """pint's unit, or None. Names are short and their exponents one digit, so that parsing is cheap."""
    if not unit or len(unit) > MAX_UNIT:
        return None
    registry = _registry()
    for spelling in (unit, unit.casefold()):
        try:
            found = registry.Unit(spelling)
        except Exception:  # pint raises whatever its parser meets
            continue
        return found if all(map(_is_unit, re.findall(r"[^\W\d_]+", spelling))) else None
    return None


def _is_unit(name: str) -> bool:
    """Not a symbol with a prefix and a plural: `cats` are no hundredths of technical atmospheres."""
    try:
        readings = _registry().parse_unit_name(name)
    except Exception:
        return True
    return any(not suffix or not prefix or unit in name.casefold() for prefix, unit, suffix in readings) or not readings


def in_unit(value: float, unit: str, target: str) -> list[float]:
    """The values that a number in `unit` may mean in the unit `target`; none where the units exclude each other.

    A unit that one side leaves out is the other's, and one that isn't understood excludes nothing. A percentage beside
    a bare number may mean its hundredth too, and a bare K, M, B or T behind a number a thousand, a million and so on.
    """
    if unit == target:
        return [value]
    if unit == "%" or target == "%":
        if unit and target:
            return []
        return [value, value / 100 if unit else value * 100]
    if not unit or not target:
        factor = _LARGE.get(unit, 1.0) / _LARGE.get(target, 1.0)
        return [value] if factor == 1 else [value, value * factor]
    if target in _TEMPERATURES or unit in _TEMPERATURES:
        letters = {"C": "degC", "F": "degF"}
        unit, target = letters.get(unit, unit), letters.get(target, target)
        if "deg" in (unit, target) or unit == target:  # `20 degrees` of a temperature
            return [value]
    have, want = known(unit), known(target)
    if have is None or want is None:  # `4 beeps` against `4 tones`: words, not units
        return [value]
    try:
        return [float(_registry().Quantity(value, have).to(want).magnitude)]
    except Exception:  # units of other dimensions, as pint raises it
        return []
