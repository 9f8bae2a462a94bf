"""Owners' files -> records: the rows of a benchmark, whatever format its owners publish them in."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data_tools.prepare.cells import columns_of
from data_tools.prepare.damage import Refused
from data_tools.prepare.rows import FIRST, find_input, is_list, read_rows
from data_tools.prepare.rows import READERS as ROWS
from eval.asking.benchmark import Benchmark

Row = dict[str, Any]
csv.field_size_limit(2**30)  # a picture in base64 is one field


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


def read_records(benchmark: Benchmark, data: str, revision: str = "") -> Iterator[tuple[str, Row | Refused]]:
    """(where it stands, row) of all questions; `data` is a folder or file, or the hub's OWNER/NAME with its revision.

    A record that is none is Refused. Raises ValueError for a file that can't be read, and where the first rows all lack
    a column that the benchmark maps, with the columns that there are.
    """
    strangers: list[str] | None = []
    for origin, row in _rows(benchmark, data, revision):
        for place, question in _unfold(benchmark, row):
            where = f"{origin}{place}"
            if strangers is not None and not isinstance(question, Refused):
                lacking = _lacking_columns(benchmark, question, where)
                strangers = [*strangers, lacking] if lacking else None
            if strangers and len(strangers) == FIRST:
                break
            yield where, question
    if strangers:
        raise ValueError(strangers[0])


def _rows(benchmark: Benchmark, data: str, revision: str) -> Iterator[tuple[str, Row | Refused]]:
    if not Path(data).exists():
        source = find_input(data, split=benchmark.source.split, media="", name="", revision=revision)
        for number, row in enumerate(read_rows(source, 1, 0, 0)):
            yield row.origin, row.refused or {"_row": str(number), **(row.values or {})}
        return
    if (Path(data) / "items.jsonl").is_file() and (Path(data) / "dataset.json").is_file():
        raise ValueError(f"{data} holds a benchmark that is prepared: write prepared={data}, and data=FOLDER with the "
                         "owners' files")
    for path in record_files(benchmark, Path(data)):
        if (reader := READERS.get(path.suffix)) is None:
            raise ValueError(f"{path}: write the records as JSON, JSONL, parquet, TSV or CSV")
        place = {"_file": path.stem, "_folder": path.parent.name}
        for number, row in enumerate(reader(path)):
            if not isinstance(row, dict | Refused):
                row = Refused("not_json", f"{str(row)[:80]!r} is no object")
            yield f"{path.name} {number}", row if isinstance(row, Refused) else {**place, "_row": str(number), **row}


def _as_rows(path: Path) -> Iterator[Any]:
    """As a dataset's rows are read: one at a time, one that is damaged refused alone."""
    return (values for _, values in ROWS[path.suffix](path, lambda _: True))


def _json(path: Path) -> Iterator[Any]:
    """A list of rows (in an object of its own or not), an object of rows by key, or an object of columns."""
    with open(path, "rb") as file:
        if is_list(file):
            yield from _as_rows(path)
            return
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error}); download it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds {str(content)[:80]!r} and no records; download it again")
    if len(content) == 1 and isinstance(rows := next(iter(content.values())), list):
        yield from rows
    elif all(isinstance(value, list) for value in content.values()):
        if len({len(values) for values in content.values()}) > 1:
            raise ValueError(f"{path}: its columns differ in length; download it again")
        for values in zip(*content.values(), strict=True):
            yield dict(zip(content, values, strict=True))
    else:
        for key, row in content.items():
            yield {"_key": key, **row} if isinstance(row, dict) else row


def _table(path: Path) -> Iterator[Any]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        try:
            for row in csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","):
                yield Refused("not_read", "has more cells than there are columns") if None in row else row
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: no table in UTF-8 ({error}); download it again") from None


READERS: dict[str, Callable[[Path], Iterator[Any]]] = {
    ".parquet": _as_rows, ".jsonl": _as_rows, ".json": _json, ".tsv": _table, ".csv": _table,
}  # fmt: skip


def _unfold(benchmark: Benchmark, row: Row | Refused) -> Iterator[tuple[str, Row | Refused]]:
    """The questions of a row: itself, one an element of a list, or one a column that matches /REGEX/."""
    unfold = benchmark.records.unfold
    if not unfold or isinstance(row, Refused):
        yield "", row
        return
    if unfold.startswith("/"):
        parts = {name: value for name, value in row.items() if re.fullmatch(unfold.strip("/"), name)}
    elif isinstance(questions := row.get(unfold), list | tuple):
        parts = {f"{unfold} {number}": part for number, part in enumerate(questions)}
    else:
        other = f"holds no list of questions in {unfold}" if unfold in row else f"has {_own(row)}, and lacks {unfold}"
        yield "", Refused("form", other)
        return
    rest = {name: value for name, value in row.items() if name not in (*parts, unfold)}
    for name, part in parts.items():
        odd = None if isinstance(part, dict) else Refused("form", f"{name} is no object")
        yield f" {name}", odd or {**rest, "_part": name.rpartition(" ")[2], **part}


def _lacking_columns(benchmark: Benchmark, row: Row, where: str) -> str:
    """What a row lacks of what the benchmark maps; empty for one that has all."""
    records = benchmark.records
    kind = [records.kind["column"]] if isinstance(records.kind, dict) else []
    named = [records.id, records.question, records.answer, records.options, records.asked, *kind]
    named += records.groups.values()
    named += [value for medium in records.media for key, value in medium.items() if key != "fps"]
    named += [made["column"] for made in records.columns.values()]
    wanted = {name for value in named if value and not value.endswith("?") for name in columns_of(value)}
    if not (lacking := wanted - row.keys() - records.columns.keys()):
        return ""
    return (
        f"{benchmark.name}, {where}: has the columns {_own(row)}, and lacks {', '.join(sorted(lacking))}; "
        f"data= must hold {benchmark.source.dataset}, or a revision of it in that form"
    )


def _own(row: Row) -> str:
    return ", ".join(sorted(name for name in row if not name.startswith("_")))
