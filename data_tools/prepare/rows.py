"""The rows of a dataset, one at a time and always in the same order: JSONL, JSON lists, parquet, or the hub."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from data_tools.prepare.damage import Refused, shown
from megatron_avatar.files import is_machines

Values = dict[str, Any] | Refused | None  # None: not asked for
Wanted = Callable[[int], bool]  # whether the row of this number in its file is
FORMATS = (".jsonl", ".json", ".parquet")
BLANK = b"\xef\xbb\xbf \t\r\n"  # and the mark of byte order
_IN_TEXT, _OUTSIDE = re.compile(rb'["\\]'), re.compile(rb'["\[\]{},]')
FIRST = 8  # rows of another form at the beginning: it's another dataset
BATCH = 16  # parquet rows at a time: they may hold pictures
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Input:
    """Where rows come from: `files` below `root`, or `hub` (name, configuration, split, revision)."""

    root: str  # media paths are relative to it
    files: tuple[Path, ...] = ()
    hub: tuple[str, str, str, str] | None = None

    def fingerprint(self) -> str:
        """Changes with the input; files are known by name, size and time of change."""
        facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in self.files]
        return hashlib.sha256(json.dumps([self.hub, facts]).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Row:
    index: int
    origin: str  # file and line, to find it again
    values: dict[str, Any] | None  # None: it is not of this shard
    refused: Refused | None = None


def find_input(location: str, *, split: str, media: str, name: str, revision: str) -> Input:
    """A file, the data files of a folder (those of `split` where their names tell), or a dataset of the hub."""
    path = Path(location)
    if path.is_file():
        if path.suffix not in FORMATS:
            raise ValueError(f"input={location}: write a file of {', '.join(FORMATS)}, a folder, or a hub's OWNER/NAME")
        return Input(media or str(path.parent), (path,))
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.suffix in FORMATS and p.is_file())
        told = re.compile(rf"(?<![a-z]){re.escape(split)}(?![a-z])")
        own = [p for p in found if told.search(p.relative_to(path).as_posix())]
        if not found:
            raise ValueError(f"input={location}: holds no {', '.join(FORMATS)}; write the folder of the dataset's rows")
        return Input(media or str(path), tuple(own or found))
    if not HUB_NAME.fullmatch(location):
        raise ValueError(f"input={location}: there is no such file or folder; a dataset of the hub is OWNER/NAME")
    if not revision:
        raise ValueError(f"input={location}: pin the hub's dataset with revision=COMMIT, or download it to a folder")
    return Input(media or f"hf://datasets/{location}@{revision}", hub=(location, name, split, revision))


def read_rows(source: Input, shards: int, shard: int, start: int) -> Iterator[Row]:
    """All rows in order; those with index % shards == shard and index >= start hold values, the others are only
    counted. Memory is that of a few rows."""

    def wanted(index: int) -> bool:
        return index >= start and index % shards == shard

    index = 0
    if source.hub:
        for values in _hub_rows(*source.hub):
            yield Row(index, f"{source.hub[0]} row {index}", values if wanted(index) else None)
            index += 1
    for path in source.files:
        first = index
        for place, values in READERS[path.suffix](path, lambda number, first=first: wanted(first + number)):
            origin = shown(f"{path.name} {place}")
            refused = isinstance(values, Refused)
            yield Row(index, origin, None, values) if refused else Row(index, origin, values)
            index += 1


def _jsonl(path: Path, wanted: Wanted) -> Iterator[tuple[str, Values]]:
    with open(path, "rb") as file:
        lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
        for index, (number, line) in enumerate(lines):
            yield f"line {number}", _parsed(line) if wanted(index) else None


def _parsed(text: bytes) -> dict[str, Any] | Refused:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        return Refused("not_json", f"not JSON ({error if isinstance(error, ValueError) else 'nested too deep'})")
    return values if isinstance(values, dict) else Refused("not_json", f"a {type(values).__name__}, not an object")


def _json(path: Path, wanted: Wanted) -> Iterator[tuple[str, Values]]:
    """The elements of one list, each read as a line of JSONL would be."""
    with open(path, "rb") as file:
        if not is_list(file):
            raise ValueError(f"{path}: holds no list of rows; write input=FILE for the file that does")
        for index, text in enumerate(_elements(file, path)):
            yield f"item {index}", _parsed(text) if wanted(index) else None


def is_list(file: BinaryIO) -> bool:
    """Whether a JSON file that was just opened holds a list; it is at its start again."""
    first = file.read(256).lstrip(BLANK)[:1]
    file.seek(0)
    return first == b"["


def _elements(file: BinaryIO, path: Path) -> Iterator[bytes]:
    """The texts between the commas of a JSON list, which may be larger than memory."""
    depth, quoted, found, parts = 0, False, 0, []
    while chunk := file.read(1 << 16):
        start, place = 0, 0
        while match := (_IN_TEXT if quoted else _OUTSIDE).search(chunk, place):
            sign, place = match[0], match.end()
            if sign == b"\\":
                if place == len(chunk):  # what it escapes is in the next
                    chunk += file.read(1)
                place += 1
            elif sign == b'"':
                quoted = not quoted
            elif sign in b"[{":
                depth += 1
                start = place if depth == 1 else start
            elif depth == 1:  # a comma, or the end of the list
                parts.append(chunk[start : match.start()])
                text, parts, start = b"".join(parts).strip(), [], place
                if text or sign == b"," or found:
                    found += 1
                    yield text
                if sign == b"]":
                    return
            elif sign in b"]}":
                depth -= 1
        parts.append(chunk[start:])
    raise ValueError(f"{path}: breaks off after {found} rows; download it again")


def _parquet(path: Path, wanted: Wanted) -> Iterator[tuple[str, Values]]:
    number = 0
    try:
        with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            for batch in file.iter_batches(BATCH):
                chosen = [k for k in range(batch.num_rows) if wanted(number + k)]
                rows = dict(zip(chosen, _pylist(batch.take(chosen)), strict=True)) if chosen else {}
                for k in range(batch.num_rows):
                    yield f"row {number + k}", rows.get(k)
                number += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        if is_machines(error):
            raise
        what = f"a damaged one after row {number}" if number else "a damaged one"
        raise ValueError(f"{path}: no parquet file, or {what} ({error}); download it again") from None


def _pylist(batch: pa.RecordBatch) -> list[Values]:
    """Rows as Python's values; one that has none (a date beyond all calendars, bytes that are no text) is refused."""
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError) as error:
        if batch.num_rows == 1:
            return [Refused("not_read", f"{type(error).__name__}: {error}")]
    return [row for k in range(batch.num_rows) for row in _pylist(batch.slice(k, 1))]


READERS: dict[str, Callable[[Path, Wanted], Iterator[tuple[str, Values]]]] = {
    ".jsonl": _jsonl, ".json": _json, ".parquet": _parquet,
}  # fmt: skip


def _hub_rows(name: str, configuration: str, split: str, revision: str) -> Iterator[dict[str, Any]]:
    from datasets import load_dataset  # a second, which local files need not wait for

    rows = load_dataset(name, configuration or None, split=split, revision=revision, streaming=True)
    yield from rows.decode(False)  # media stay paths or bytes
