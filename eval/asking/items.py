"""Owners' records -> items: questions with their media, as the benchmark's YAML maps them."""

from __future__ import annotations

import ast
import base64
import binascii
import contextlib
import json
import re
import string
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from data_tools.prepare.cells import bare_answer, bare_choices, cell, filled, media_of
from data_tools.prepare.damage import Refused, shown
from data_tools.prepare.store import Source
from eval.asking.benchmark import MEDIA, Benchmark, Records
from eval.asking.records import Row, read_records
from megatron_avatar.files import repaired, unwritable
from megatron_avatar.records import Media, ProblemType, Sample

# The type by which an answer of each kind is read and compared.
PROBLEM_TYPES: dict[str, ProblemType] = {
    "choice": "multiple_choice", "letters": "other", "yes_no": "other", "number": "numerical", "math": "math",
    "text": "other",
}  # fmt: skip
_FIRST_LETTER = re.compile(r"\(?([A-Z])\b")
_NUMBERED = re.compile(r"\A\(?[A-Z]\s*[.):]\s*")
_BASE64 = re.compile(r"[A-Za-z0-9+/]{64,}={0,2}")  # a path has a full stop


@dataclass(frozen=True)
class Wanted:
    """A medium as the record names it; start and end in seconds, fps of a folder of frames."""

    source: Source
    start: float | None = None
    end: float | None = None
    fps: float | None = None


@dataclass(frozen=True)
class Item:
    """One question. `letters`: what may be answered; `places`: each medium's mark in question and options, if these
    have any ("": it comes first); `media` are measured and below the prepared folder; `trouble` says why one of them
    can't be used; `keep` holds owners' columns that scoring needs."""

    id: str
    kind: str
    question: str
    gold: str
    letters: str = ""
    choices: tuple[str, ...] = ()
    groups: dict[str, tuple[str, ...]] = field(default_factory=dict)
    keep: dict[str, Any] = field(default_factory=dict)
    places: tuple[str, ...] = ()
    media: tuple[Media, ...] = ()
    trouble: str = ""


def item_to_dict(item: Item) -> Row:
    return asdict(item)


def item_from_dict(entry: Row) -> Item:
    media = tuple(Media(**{**m, "pts": tuple(m["pts"]) if m["pts"] else None}) for m in entry["media"])
    groups = {name: tuple(values) for name, values in entry["groups"].items()}
    sequences = {name: tuple(entry[name]) for name in ("choices", "places")}
    return Item(**{**entry, **sequences, "media": media, "groups": groups})


def problem_type(kind: str, keep: dict) -> ProblemType:
    """A manifest's samples name theirs; every other item's follows from its kind."""
    named = keep.get("problem_type")
    return named if named in get_args(ProblemType) else PROBLEM_TYPES[kind]


def sample_of(line: Row) -> Sample:
    """The sample whose rules of reading and comparing answers hold for a line."""
    return Sample(
        id=str(line["id"]), stage="", split="", family="", question="", answer=line["gold"],
        problem_type=problem_type(line["kind"], line["keep"]), choices=tuple(line["choices"]),
    )  # fmt: skip


@dataclass(frozen=True)
class Prepared:
    """Items of a benchmark, below `root` their media. `dataset`: name, revision, fingerprint, items, expected."""

    root: Path
    items: list[Item]
    dataset: dict[str, Any]


def read_prepared(folder: Path) -> Prepared:
    with open(folder / "items.jsonl", encoding="utf-8") as lines:
        items = [item_from_dict(json.loads(line)) for line in lines]
    return Prepared(folder, items, json.loads((folder / "dataset.json").read_text()))


def make_items(
    benchmark: Benchmark, data: str, revision: str = ""
) -> tuple[list[tuple[Item, list[Wanted]]], list[str]]:
    """The items of all records with their media still to be found, and why some records make none: these have no gold
    that an answer could be scored by. Raises ValueError as `read_records` does, and where there is no other record."""
    made, odd = [], []
    for where, row in read_records(benchmark, data, revision):
        try:
            made.append(make_item(benchmark, row, where))
        except ValueError as error:
            odd.append(str(error))
    if odd and not made:
        raise ValueError(odd[0])
    return made, odd


def make_item(benchmark: Benchmark, row: Row | Refused, where: str) -> tuple[Item, list[Wanted]]:
    """The item of a row, its media still to be found. ValueError naming the row for a question without a gold."""
    records = benchmark.records
    try:
        if isinstance(row, Refused):
            raise row
        row = {**row, **{name: _made(row, name, made) for name, made in records.columns.items()}}
        kind = _kind(records, row)
        optionless = not records.options or kind in ("number", "text", "yes_no")
        choices = () if optionless else bare_choices(_listed(row, records.options))
        letters = string.ascii_uppercase[: len(choices)] if choices else records.letters
        question = filled(row, records.question)
        places, wanted = _media(records, row, "\n".join([question, *choices]))
        item = Item(
            id=filled(row, records.id),
            kind=kind,
            question=question,
            gold=_gold(records, row, kind, choices),
            letters=letters if kind in ("choice", "letters") else "",
            choices=choices,
            groups={name: _values(row, value) for name, value in records.groups.items()},
            keep={name: row.get(name) for name in records.keep} | _asked(records, row),
            places=places,
            trouble=_lacking(records, row),
        )
        if not item.id or not item.question:
            raise Refused("empty", "its id or question is empty")
        if kind == "choice" and item.gold not in tuple(letters):
            raise ValueError(f"its answer {item.gold!r} is none of {', '.join(letters)}")
        if kind == "number":
            float(item.gold)  # as metrics read it
        return _writable(item), wanted
    except (Refused, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        detail = error.detail if isinstance(error, Refused) else shown(f"{type(error).__name__}: {error}")
        remedy = "correct the record, or download it again"
        raise ValueError(f"{benchmark.name}, {shown(where)}: {detail}; {remedy}") from None


def _writable(item: Item) -> Item:
    """The item; one with a text that no file can hold can't be asked, and has U+FFFD in that place."""
    written = json.dumps(item_to_dict(item), ensure_ascii=False)
    if not (reason := unwritable(written)):
        return item
    return replace(item_from_dict(json.loads(repaired(written))), trouble=f"of its texts {reason}")


def _made(row: Row, name: str, made: dict[str, Any]) -> str:
    """A column that the benchmark's file makes of another one."""
    theirs = filled(row, made["column"])
    if "values" in made:
        for written, ours in made["values"].items():
            regex = re.fullmatch("/(.*)/", written)
            if theirs == written or (regex and re.fullmatch(regex[1], theirs, re.DOTALL)):
                return ours
        raise ValueError(f"{made['column']} is {theirs!r}, none of {', '.join(made['values'])}")
    found = re.search(made["take"], theirs)
    if found is None:
        raise ValueError(f"{made['column']} is {theirs!r}: no {name} in the form {made['take']}")
    return found[1]


def _kind(records: Records, row: Row) -> str:
    return _made(row, "kind", records.kind) if isinstance(records.kind, dict) else records.kind


def _asked(records: Records, row: Row) -> Row:
    return {"asked": filled(row, records.asked)} if records.asked else {}


def _listed(row: Row, column: str) -> Any:
    """A list or object of options, which some owners write as text."""
    value = row.get(column)
    return _read(value) if isinstance(value, str) and value.strip()[:1] in ("[", "{") else value


def _read(text: str) -> Any:
    """JSON, or as Python writes it; ValueError for what is neither."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(text)
    except (SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(f"{text[:80]!r} is no list ({type(error).__name__})") from None


def _gold(records: Records, row: Row, kind: str, choices: tuple[str, ...]) -> str:
    value = row.get(records.answer) if "{" not in records.answer else filled(row, records.answer)
    if kind != "choice" or records.answer_is == "as_is":
        value = ", ".join(map(str, value)) if isinstance(value, list) else value
        text = "" if value is None else bare_answer(str(value))
        if not text:
            raise ValueError(f"its answer {records.answer!r} is empty")
        return text
    if records.answer_is == "index":
        return string.ascii_uppercase[int(value)]
    text = bare_answer(str(value))
    if records.answer_is == "text":
        bare = text if text in choices else _NUMBERED.sub("", text)
        if bare not in choices:
            raise ValueError(f"its answer {text!r} is none of its options")
        return string.ascii_uppercase[choices.index(bare)]
    letter = _FIRST_LETTER.match(text)
    if letter is None:
        raise ValueError(f"its answer {text!r} is no letter")
    return letter[1]


def _values(row: Row, value: str) -> tuple[str, ...]:
    """A breakdown's values; an item may belong to several: those of a list, or the keys of an object that are set."""
    found = cell(row, value.rstrip("?"))
    if isinstance(found, str) and found[:1] in ("[", "{"):
        with contextlib.suppress(ValueError):  # a text that begins with a bracket
            found = _read(found)
    if isinstance(found, dict):
        found = [key for key, chosen in found.items() if chosen]
    parts = found if isinstance(found, list | tuple) else [found]
    return tuple(str(part) for part in parts if part not in (None, ""))


def _media(records: Records, row: Row, text: str) -> tuple[tuple[str, ...], list[Wanted]]:
    """Each medium's mark in the text ([img2]: the second picture) and the media, in the order in which the text names
    them; those that it doesn't name come first, in the order of their entries. No marks at all: ()."""
    found: list[Wanted] = []
    for entry in records.media:
        ((kind, value),) = ((k, v) for k, v in entry.items() if k in MEDIA)
        times = {key: _seconds(row.get(entry[key].rstrip("?"))) for key in ("start", "end") if key in entry}
        fps = float(entry["fps"]) if "fps" in entry else None
        found += [Wanted(source, fps=fps, **times) for source in _sources(row, value.rstrip("?"), kind)]
    marks = list(dict.fromkeys(match[0] for match in re.finditer(records.marks, text))) if records.marks else []
    if not marks:
        return (), found
    named = []
    for mark in marks:
        own = [wanted for wanted in found if wanted.source.kind[:2] in mark.lower()]  # img1, image 1, video1, audio1
        number = re.search(r"\d+", mark)
        if number is None or not 0 < int(number[0]) <= len(own):
            raise ValueError(f"{mark} stands in the question, but the record has {len(own)} of that kind")
        named.append(own[int(number[0]) - 1])
    others = [wanted for wanted in found if not any(wanted is one for one in named)]
    return ("",) * len(others) + tuple(marks), [*others, *named]


def _lacking(records: Records, row: Row) -> str:
    """Why the question can't be asked: a column of media is empty that isn't marked with `?`."""
    columns = [value for entry in records.media for kind, value in entry.items() if kind in MEDIA]
    empty = [name for name in columns if not name.endswith("?") and "{" not in name and not row.get(name)]
    return f"its {empty[0]} is empty" if empty else ""


def _seconds(value: Any) -> float | None:
    return None if value in (None, "") else float(value)


def _sources(row: Row, value: str, kind: str) -> tuple[Source, ...]:
    if "{" in value:
        return (Source(kind, filled(row, value)),)
    content = row.get(value)
    if isinstance(content, str) and (len(content) > 1024 or (kind == "image" and _BASE64.fullmatch(content))):
        try:
            return (Source(kind, "", base64.b64decode(content, validate=True)),)
        except binascii.Error as error:
            raise ValueError(f"{value} is neither a path nor base64 ({error})") from None
    return media_of(content, kind)
