"""Owners' records -> items: questions with their media, as the benchmark's YAML maps them."""

from __future__ import annotations

import ast
import base64
import binascii
import contextlib
import csv
import json
import re
import string
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

import pyarrow.parquet as pq

from data_tools.prepare.cells import bare_answer, bare_choices, columns_of, media_of, text_of
from data_tools.prepare.damage import Refused
from data_tools.prepare.rows import find_input, read_rows
from data_tools.prepare.store import Source
from eval.asking.benchmark import MEDIA, Benchmark, Records
from megatron_avatar.records import Media, ProblemType, Sample

Row = dict[str, Any]
# The type by which an answer of each kind is read and compared.
PROBLEM_TYPES: dict[str, ProblemType] = {
    "choice": "multiple_choice", "letters": "other", "yes_no": "other", "number": "numerical", "math": "math",
    "text": "other",
}  # fmt: skip
_FIRST_LETTER = re.compile(r"\(?([A-Z])\b")
_NUMBERED = re.compile(r"\A\(?[A-Z]\s*[.):]\s*")
_BASE64 = re.compile(r"[A-Za-z0-9+/]{64,}={0,2}")  # a path has a full stop
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
    checked = False
    for origin, row in _rows(benchmark, data, revision):
        for place, question in _unfold(benchmark, row, origin):
            where = f"{origin}{place}"
            if not checked:
                _check_columns(benchmark, question, where)
                checked = True
            yield where, question


def _rows(benchmark: Benchmark, data: str, revision: str) -> Iterator[tuple[str, Row]]:
    if not Path(data).exists():
        source = find_input(data, split=benchmark.source.split, media="", name="", revision=revision)
        for number, row in enumerate(read_rows(source, 1, 0, 0)):
            yield row.origin, {"_row": str(number), **(row.values or {})}
        return
    for path in record_files(benchmark, Path(data)):
        if (reader := READERS.get(path.suffix)) is None:
            raise ValueError(f"{path}: write the records as JSON, JSONL, parquet, TSV or CSV")
        for number, row in enumerate(reader(path)):
            if not isinstance(row, dict):
                raise ValueError(f"{path}: record {number} is {str(row)[:80]!r}, no object; download it again")
            place = {"_file": path.stem, "_folder": path.parent.name, "_row": str(number)}
            yield f"{path.name} {number}", {**place, **row}


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


def _json(path: Path) -> Iterator[Any]:
    """A list of rows (in an object of its own or not), an object of rows by key, or an object of columns."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); download it again") from None
    if isinstance(content, dict) and len(content) == 1 and isinstance(rows := next(iter(content.values())), list):
        content = rows
    if isinstance(content, list):
        yield from content
    elif all(isinstance(value, list) for value in content.values()):
        if len({len(values) for values in content.values()}) > 1:
            raise ValueError(f"{path}: its columns differ in length; download it again")
        for values in zip(*content.values(), strict=True):
            yield dict(zip(content, values, strict=True))
    else:
        for key, row in content.items():
            yield {"_key": key, **row} if isinstance(row, dict) else row


def _table(path: Path) -> Iterator[Row]:
    with open(path, encoding="utf-8", newline="") as file:
        yield from csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")


READERS: dict[str, Callable[[Path], Iterator[Any]]] = {
    ".parquet": _parquet, ".jsonl": _jsonl, ".json": _json, ".tsv": _table, ".csv": _table,
}  # fmt: skip


def _unfold(benchmark: Benchmark, row: Row, where: str) -> Iterator[tuple[str, Row]]:
    """The questions of a row: itself, one an element of a list, or one a column that matches /REGEX/."""
    unfold = benchmark.records.unfold
    if not unfold:
        yield "", row
        return
    if unfold.startswith("/"):
        parts = {name: value for name, value in row.items() if re.fullmatch(unfold.strip("/"), name)}
    else:
        _lacks(benchmark, {unfold} - row.keys(), row, where)
        parts = {f"{unfold} {number}": part for number, part in enumerate(row[unfold])}
    rest = {name: value for name, value in row.items() if name not in (*parts, unfold)}
    for name, part in parts.items():
        yield f" {name}", {**rest, "_part": name.rpartition(" ")[2], **part}


def _check_columns(benchmark: Benchmark, row: Row, where: str) -> None:
    records = benchmark.records
    kind = [records.kind["column"]] if isinstance(records.kind, dict) else []
    named = [records.id, records.question, records.answer, records.options, records.asked, *kind]
    named += records.groups.values()
    named += [value for medium in records.media for key, value in medium.items() if key != "fps"]
    named += [made["column"] for made in records.columns.values()]
    wanted = {name for value in named if value and not value.endswith("?") for name in columns_of(value)}
    _lacks(benchmark, wanted - row.keys() - records.columns.keys(), row, where)


def _lacks(benchmark: Benchmark, lacking: Collection[str], row: Row, where: str) -> None:
    if lacking:
        own = sorted(name for name in row if not name.startswith("_"))
        raise ValueError(
            f"{benchmark.name}, {where}: has the columns {', '.join(own)}, and lacks {', '.join(sorted(lacking))}; "
            f"data= must hold {benchmark.source.dataset}, or a revision of it in that form"
        )


# ---- items -----------------------------------------------------------------------------------------------------


def make_item(benchmark: Benchmark, row: Row, where: str) -> tuple[Item, list[Wanted]]:
    """The item of a row, its media still to be found. ValueError naming the row for a question without a gold."""
    records = benchmark.records
    try:
        row = {**row, **{name: _made(row, name, made) for name, made in records.columns.items()}}
        kind = _kind(records, row)
        optionless = not records.options or kind in ("number", "text", "yes_no")
        choices = () if optionless else bare_choices(_listed(row, records.options))
        letters = string.ascii_uppercase[: len(choices)] if choices else records.letters
        question = _text(row, records.question)
        places, wanted = _media(records, row, "\n".join([question, *choices]))
        item = Item(
            id=_text(row, records.id),
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
        return item, wanted
    except (Refused, ValueError, KeyError, TypeError, IndexError) as error:
        detail = error.detail if isinstance(error, Refused) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{benchmark.name}, {where}: {detail}; correct the record, or download it again") from None


def _made(row: Row, name: str, made: dict[str, Any]) -> str:
    """A column that the benchmark's file makes of another one."""
    theirs = _text(row, made["column"])
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


def _text(row: Row, value: str) -> str:
    return value.format_map(row).strip() if "{" in value else text_of(row, value)


def _kind(records: Records, row: Row) -> str:
    return _made(row, "kind", records.kind) if isinstance(records.kind, dict) else records.kind


def _asked(records: Records, row: Row) -> Row:
    return {"asked": _text(row, records.asked)} if records.asked else {}


def _listed(row: Row, column: str) -> Any:
    """A list or object of options, which some owners write as text; options that are empty in a table are none."""
    value = row.get(column)
    if isinstance(value, str) and value.strip()[:1] in ("[", "{"):
        value = _read(value)
    if isinstance(value, dict):
        value = [value[key] for key in sorted(value)]
    if not isinstance(value, list | tuple):
        return value
    while value and value[-1] is None:
        value = value[:-1]
    if None in value:
        raise ValueError(f"{column} has an empty option before others, whose letters would move")
    return value


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
    value = row.get(records.answer) if "{" not in records.answer else _text(row, records.answer)
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
    found = _text(row, value) if "{" in value else row.get(value.rstrip("?"))
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
        return (Source(kind, _text(row, value)),)
    content = row.get(value)
    if isinstance(content, str) and (len(content) > 1024 or (kind == "image" and _BASE64.fullmatch(content))):
        try:
            return (Source(kind, "", base64.b64decode(content, validate=True)),)
        except binascii.Error as error:
            raise ValueError(f"{value} is neither a path nor base64 ({error})") from None
    return media_of(content, kind)
