"""Owners' records -> items: questions with their media, as the benchmark's YAML maps them."""

from __future__ import annotations

import ast
import base64
import binascii
import csv
import json
import re
import string
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from data_tools.prepare.damage import Refused
from data_tools.prepare.mapping import columns_of
from data_tools.prepare.rows import find_input, read_rows
from data_tools.prepare.sources import bare_answer, bare_choices, media_of, text_of
from data_tools.prepare.store import Source
from eval.benchmark import Benchmark, Records
from megatron_avatar.records import Media

Row = dict[str, Any]
_FIRST_LETTER = re.compile(r"\(?([A-Z])\b")
csv.field_size_limit(2**30)  # a picture in base64 is one field


@dataclass(frozen=True)
class Wanted:
    """A medium as the record names it; start and end in seconds, fps of a folder of frames."""

    source: Source
    start: float | None = None
    end: float | None = None
    fps: float | None = None


@dataclass(frozen=True)
class Item:
    """One question. `letters`: what may be answered; `media` are measured and below the prepared folder; `trouble` says
    why one of them can't be used; `keep` holds owners' columns that scoring needs."""

    id: str
    kind: str
    question: str
    gold: str
    letters: str = ""
    choices: tuple[str, ...] = ()
    groups: dict[str, tuple[str, ...]] = field(default_factory=dict)
    keep: dict[str, Any] = field(default_factory=dict)
    media: tuple[Media, ...] = ()
    trouble: str = ""


def item_to_dict(item: Item) -> Row:
    return asdict(item)


def item_from_dict(entry: Row) -> Item:
    media = tuple(Media(**{**m, "pts": tuple(m["pts"]) if m["pts"] else None}) for m in entry["media"])
    groups = {name: tuple(values) for name, values in entry["groups"].items()}
    return Item(**{**entry, "media": media, "groups": groups, "choices": tuple(entry["choices"])})


# ---- records ---------------------------------------------------------------------------------------------------


def record_files(benchmark: Benchmark, data: Path) -> list[Path]:
    """The owners' record files below `data`. ValueError naming folder, patterns and where to get them."""
    source = benchmark.source
    if data.is_file():
        return [data]
    for pattern in source.files:
        if found := sorted(path for path in data.glob(pattern) if path.is_file()):
            return found
    raise ValueError(
        f"data={data}: holds none of {', '.join(source.files)}; download {source.dataset} there"
        + (f" ({source.note})" if source.note else "")
    )


def read_records(benchmark: Benchmark, data: str, revision: str = "") -> Iterator[tuple[str, Row]]:
    """(where it stands, row) of all questions; `data` is a folder or file, or the hub's OWNER/NAME with its revision.

    Raises ValueError for rows that lack a column that the benchmark maps, with the columns that there are.
    """
    records, checked = benchmark.records, False
    for origin, row in _rows(benchmark, data, revision):
        for place, question in _unfold(row, records.unfold):
            where = f"{origin}{place}"
            if any(str(question.get(column)) not in values for column, values in records.where.items()):
                continue
            if not checked:
                _check_columns(benchmark, question, where)
                checked = True
            yield where, question


def _rows(benchmark: Benchmark, data: str, revision: str) -> Iterator[tuple[str, Row]]:
    if not Path(data).exists():
        source = find_input(data, split=benchmark.source.split, media="", name="", revision=revision)
        for row in read_rows(source, 1, 0, 0):
            yield row.origin, dict(row.values or {})
        return
    for path in record_files(benchmark, Path(data)):
        reader = {".parquet": _parquet, ".jsonl": _jsonl, ".json": _json, ".tsv": _table, ".csv": _table}.get(path.suffix)
        if reader is None:
            raise ValueError(f"{path}: write the records as JSON, JSONL, parquet, TSV or CSV")
        for number, row in enumerate(reader(path)):
            yield f"{path.name} {number}", {"_file": path.stem, **row}


def _parquet(path: Path) -> Iterator[Row]:
    for batch in pq.ParquetFile(path).iter_batches(16):  # rows may hold pictures
        yield from batch.to_pylist()


def _jsonl(path: Path) -> Iterator[Row]:
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{path}, line {number}: not JSON ({error}); download it again") from None


def _json(path: Path) -> Iterator[Row]:
    """A list of rows, an object of rows by key, or an object of columns."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); download it again") from None
    if isinstance(content, list):
        yield from content
    elif content and all(isinstance(value, list) for value in content.values()):
        for values in zip(*content.values(), strict=True):
            yield dict(zip(content, values, strict=True))
    else:
        for key, row in content.items():
            yield {"_key": key, **row}


def _table(path: Path) -> Iterator[Row]:
    with open(path, encoding="utf-8", newline="") as file:
        yield from csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")


def _unfold(row: Row, unfold: str) -> Iterator[tuple[str, Row]]:
    """The questions of a row: itself, one an element of a list, or one a column that matches /REGEX/."""
    if not unfold:
        yield "", row
    elif unfold.startswith("/"):
        names = [name for name in row if re.fullmatch(unfold.strip("/"), name)]
        rest = {name: value for name, value in row.items() if name not in names}
        for name in names:
            yield f" {name}", {**rest, "_part": name, **row[name]}
    else:
        rest = {name: value for name, value in row.items() if name != unfold}
        for number, part in enumerate(row[unfold]):
            yield f" {unfold} {number}", {**rest, "_part": str(number), **part}


def _check_columns(benchmark: Benchmark, row: Row, where: str) -> None:
    records = benchmark.records
    kind = [records.kind["column"]] if isinstance(records.kind, dict) else []
    named = [records.id, records.question, records.answer, records.options, *records.groups.values(), *kind]
    named += [value for medium in records.media for key, value in medium.items() if key != "fps"]
    wanted = {name for value in named if value and not value.endswith("?") for name in columns_of(value)}
    if lacking := sorted(wanted - row.keys()):
        raise ValueError(
            f"{benchmark.name}, {where}: has the columns {', '.join(sorted(row))}, and lacks {', '.join(lacking)}; "
            f"data= must hold {benchmark.source.dataset}, or a revision of it in that form"
        )


# ---- items -----------------------------------------------------------------------------------------------------


def make_item(benchmark: Benchmark, row: Row, where: str) -> tuple[Item, list[Wanted]]:
    """The item of a row, its media still to be found. ValueError naming the row for a question without a gold."""
    records = benchmark.records
    try:
        kind = _kind(records, row)
        choices = () if not records.options or kind in ("number", "text") else bare_choices(_listed(row, records.options))
        letters = string.ascii_uppercase[: len(choices)] if choices else records.letters
        question, order = _places(records, _text(row, records.question))
        item = Item(
            id=_text(row, records.id),
            kind=kind,
            question=question,
            gold=_gold(records, row, kind, choices),
            letters=letters if kind in ("choice", "letters") else "",
            choices=choices,
            groups={name: _values(row, value) for name, value in records.groups.items()},
            keep={name: row.get(name) for name in records.keep},
        )
        if not item.id or not item.question:
            raise Refused("empty", "its id or question is empty")
        return item, _media(records, row, order)
    except (Refused, ValueError, KeyError, TypeError) as error:
        detail = error.detail if isinstance(error, Refused) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{benchmark.name}, {where}: {detail}; correct the record, or download it again") from None


def _text(row: Row, value: str) -> str:
    return value.format_map(row).strip() if "{" in value else text_of(row, value)


def _kind(records: Records, row: Row) -> str:
    if not isinstance(records.kind, dict):
        return records.kind
    theirs = _text(row, records.kind["column"])
    if theirs not in records.kind["values"]:
        raise ValueError(f"{records.kind['column']} is {theirs!r}, none of {', '.join(records.kind['values'])}")
    return records.kind["values"][theirs]


def _listed(row: Row, column: str) -> Any:
    """A list or object of options, which some owners write as text."""
    value = row.get(column)
    if isinstance(value, str) and value.strip()[:1] in ("[", "{"):
        return ast.literal_eval(value)
    return value


def _gold(records: Records, row: Row, kind: str, choices: tuple[str, ...]) -> str:
    value = row.get(records.answer) if "{" not in records.answer else _text(row, records.answer)
    if kind != "choice" or records.answer_is == "as_is":
        text = ", ".join(map(str, value)) if isinstance(value, list) else bare_answer(str("" if value is None else value))
        if not text:
            raise ValueError(f"its answer {records.answer!r} is empty")
        return text
    if records.answer_is == "index":
        return string.ascii_uppercase[int(value)]
    text = bare_answer(str(value))
    if records.answer_is == "text":
        (bare,) = bare_choices([text])
        return string.ascii_uppercase[choices.index(bare)]  # ValueError where it is none of them
    letter = _FIRST_LETTER.match(text)
    if letter is None:
        raise ValueError(f"its answer {text!r} is no letter")
    return letter[1]


def _values(row: Row, value: str) -> tuple[str, ...]:
    """A breakdown's values; an item may belong to several."""
    found = _text(row, value) if "{" in value else row.get(value.rstrip("?"))
    found = ast.literal_eval(found) if isinstance(found, str) and found.startswith("[") else found
    return tuple(str(part) for part in (found if isinstance(found, list | tuple) else [found]) if part not in (None, ""))


def _places(records: Records, question: str) -> tuple[str, list[str]]:
    """The question with MEDIUM where its marks stand, and the marks in order."""
    if not records.marks:
        return question, []
    from megatron_avatar.data.prompt import MEDIUM

    marks = [match[0] for match in re.finditer(records.marks, question)]
    return re.sub(records.marks, MEDIUM, question), marks


def _media(records: Records, row: Row, order: list[str]) -> list[Wanted]:
    """Media in the order of their entries, or in that of the question's marks ([img2]: the second picture)."""
    found: dict[str, list[Wanted]] = {"video": [], "image": [], "audio": []}
    for entry in records.media:
        ((kind, value),) = ((k, v) for k, v in entry.items() if k in found)
        times = {k: None if row.get(v.rstrip("?")) is None else float(row[v.rstrip("?")])
                 for k, v in entry.items() if k in ("start", "end")}  # fmt: skip
        fps = float(entry["fps"]) if "fps" in entry else None
        found[kind] += [Wanted(source, fps=fps, **times) for source in _sources(row, value.rstrip("?"), kind)]
    if not order:
        return [wanted for kind in found for wanted in found[kind]]
    chosen = []
    for mark in order:
        kind = next(kind for kind, word in (("image", "im"), ("video", "vid"), ("audio", "aud")) if word in mark.lower())
        number = int(re.search(r"\d+", mark)[0]) - 1  # type: ignore[index]
        if number >= len(found[kind]):
            raise ValueError(f"{mark} stands in the question, but the record has {len(found[kind])} of that kind")
        chosen.append(found[kind][number])
    return chosen


def _sources(row: Row, value: str, kind: str) -> tuple[Source, ...]:
    if "{" in value:
        return (Source(kind, _text(row, value)),)
    content = row.get(value)
    if isinstance(content, str) and len(content) > 1024:
        try:
            return (Source(kind, "", base64.b64decode(content, validate=True)),)
        except binascii.Error as error:
            raise ValueError(f"{value} is neither a path nor base64 ({error})") from None
    return media_of(content, kind)
