"""What stands in a cell of a foreign row: texts, choices, media. Refused with its name is what is none of these."""

from __future__ import annotations

import math
import re
import string
import unicodedata
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from data_tools.prepare.damage import Refused
from data_tools.prepare.store import Source

Row = Mapping[str, Any]
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_PLACEHOLDER = re.compile(r"<(?:video|image|audio)>\s?")
# A choice's letter as datasets write it: (A) [A] 【A】, A. A) A: A、 **A.**, A - ; full-width forms as well.
_LETTERED = re.compile(
    r"\s*(?:[(（\[【<]\s*([A-ZＡ-Ｚ])\s*[)）\]】>]\s*[.．:：、。]?|\**([A-ZＡ-Ｚ])\s*[.．)）:：、。,，](?:\*\*)?|([A-ZＡ-Ｚ])\s+[-–—]\s)\s*",
    re.IGNORECASE,
)


def text_of(row: Row, *names: str) -> str:
    """The first of the columns that holds anything, as text; "" without one."""
    return next((text for name in names if (text := as_text(row.get(name), name))), "")


def as_text(value: Any, name: str) -> str:
    """A cell as text: a number, a truth value, the text parts of a message; "" for an empty one."""
    if isinstance(value, str):
        return value.strip()
    if _empty(value):
        return ""
    if isinstance(value, bool | int) or (isinstance(value, float | Decimal) and math.isfinite(value)):
        return str(value)
    if isinstance(value, Mapping) and "type" in value:
        return _part(value, name).strip()
    if isinstance(value, list | tuple):
        if len(value) == 1 and not isinstance(value[0], Mapping | list | tuple):
            return as_text(value[0], name)
        if all(isinstance(part, str) or (isinstance(part, Mapping) and "type" in part) for part in value) and not all(
            isinstance(part, str) for part in value
        ):
            return "".join(part if isinstance(part, str) else _part(part, name) for part in value).strip()
    raise Refused("column", f"{name} holds {_kind(value)} and no text: {str(value)[:200]}")


def _part(part: Mapping[str, Any], name: str) -> str:
    """The text of a message's part; "" for the place of a medium, whose file another column names."""
    if isinstance(part.get("text"), str) and part["type"] in ("text", "input_text", "output_text"):
        return part["text"]
    if more := [key for key, value in part.items() if key not in ("type", "index") and value not in (None, "")]:
        raise Refused("column", f"{name} has a part of type {part['type']!r} with {', '.join(map(str, more))}, "
                                "which is no text: name media in columns of their own")  # fmt: skip
    return ""


def _empty(value: Any) -> bool:
    """Whether nothing stands there: null, or NaN in its place, as tables write it."""
    return value is None or (isinstance(value, float | Decimal) and math.isnan(value))


def _kind(value: Any) -> str:
    words = {str: "a text", list: "a list", tuple: "a list", dict: "an object"}
    return words.get(type(value), type(value).__name__)


class _Template(string.Formatter):
    """Columns in braces, each read as a cell of its own would be."""

    def format_field(self, value: Any, form: str) -> str:
        return super().format_field(value, form) if form else as_text(value, "a column of the template")


def filled(row: Row, value: str) -> str:
    """The column that `value` names, or the template that it is, as text."""
    if "{" not in value:
        return text_of(row, value)
    try:
        return _Template().vformat(value, (), row).strip()
    except (LookupError, AttributeError, TypeError, ValueError) as error:
        raise Refused("column", f"the template {value!r} can't be filled ({type(error).__name__}: {error})") from None


def cell(row: Row, value: str) -> Any:
    """What stands in the column that `value` names, or in the part of a column that a template of one field does."""
    if "{" not in value:
        return row.get(value)
    alone = re.fullmatch(r"\{([^{}!:]+)\}", value)
    return string.Formatter().get_field(alone[1], (), row)[0] if alone else filled(row, value)


def columns_of(value: str) -> list[str]:
    """The columns that a template names, or the one that `value` is."""
    names = [name for _, name, _, _ in string.Formatter().parse(value) if name is not None] if "{" in value else [value]
    return [name.partition("[")[0].partition(".")[0] for name in names]


def bare_answer(text: str) -> str:
    """What stands between the last answer tags, or the text itself."""
    found = _ANSWER.findall(text)
    return (found[-1] if found else text).strip()


def without_placeholders(text: str) -> str:
    return _PLACEHOLDER.sub("", text).strip()


def bare_choices(options: Any) -> tuple[str, ...]:
    """Choices without their letters, where they bring the right ones: the prompt puts them in front.

    Empty ones at the end are none, as tables of a fixed width have them; one before others would move their letters.
    """
    if isinstance(options, Mapping):
        options = [options[key] for key in sorted(options)]
    if _empty(options) or options == "":
        return ()
    if not isinstance(options, list | tuple):
        raise Refused("choices", f"the choices are {_kind(options)} and not a list: {str(options)[:80]!r}")
    texts = [as_text(option, "a choice") for option in options]
    while texts and not texts[-1]:
        texts.pop()
    if not all(texts):
        place = string.ascii_uppercase[texts.index("") % 26]
        raise Refused("choices", f"choice {place} is empty and others follow, whose letters would move")
    found = [_LETTERED.match(text) for text in texts]
    letters = [unicodedata.normalize("NFKC", next(filter(None, m.groups()))) if m else "" for m in found]
    bare = [text[match.end() :] for text, match in zip(texts, found, strict=True) if match]
    own = "".join(letters) in (string.ascii_uppercase[: len(texts)], string.ascii_lowercase[: len(texts)])
    return tuple(bare if own and all(bare) else texts)


def media_of(value: Any, kind: str) -> tuple[Source, ...]:
    """Media of a column: a path, {"bytes", "path"}, or a list of these."""
    if _empty(value) or value == "":
        return ()
    if isinstance(value, list | tuple):
        return tuple(source for item in value for source in media_of(item, kind))
    if isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes) and value["bytes"]:
        return (Source(kind, str(value.get("path") or ""), value["bytes"]),)
    path = value.get("path") if isinstance(value, Mapping) else value
    if not isinstance(path, str) or not path:
        raise Refused("media_column", f"a {kind} is {str(value)[:80]!r}, not a path or bytes")
    return (Source(kind, path),)
