"""The rows of a dataset, one at a time and always in the same order: JSONL, JSON lists, parquet, or the hub."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ijson
import pyarrow as pa
import pyarrow.parquet as pq

from data_tools.prepare.damage import Refused

FORMATS = (".jsonl", ".json", ".parquet")
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
        reader = {".jsonl": _jsonl, ".json": _json, ".parquet": _parquet}[path.suffix]
        for place, values in reader(path, index, wanted):
            if isinstance(values, Refused):
                yield Row(index, f"{path.name} {place}", None, values if wanted(index) else None)
            else:
                yield Row(index, f"{path.name} {place}", values)
            index += 1


def _jsonl(path: Path, first: int, wanted: Any) -> Iterator[tuple[str, Any]]:
    with open(path, "rb") as file:
        index = first
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"line {number}", _parsed(line) if wanted(index) else None
                index += 1


def _parsed(line: bytes) -> dict[str, Any] | Refused:
    try:
        values = json.loads(line)
    except ValueError as error:
        return Refused("not_json", str(error))
    return values if isinstance(values, dict) else Refused("not_json", f"a {type(values).__name__}, not an object")


def _json(path: Path, first: int, wanted: Any) -> Iterator[tuple[str, Any]]:
    with open(path, "rb") as file:
        opening = file.read(256).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
        if opening != b"[":
            raise ValueError(f"{path}: holds no list of rows; write input=FILE for the file that does")
        file.seek(0)
        try:
            for number, values in enumerate(ijson.items(file, "item", use_float=True)):
                good = isinstance(values, dict)
                refused = None if good else Refused("not_json", f"a {type(values).__name__}, not an object")
                yield f"item {number}", refused or (values if wanted(first + number) else None)
        except ijson.JSONError as error:
            raise ValueError(f"{path}: breaks off after some rows ({error}); download it again") from None


def _parquet(path: Path, first: int, wanted: Any) -> Iterator[tuple[str, Any]]:
    try:
        file = pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: no parquet file, or a damaged one ({error}); download it again") from None
    with file:
        number = 0
        for batch in file.iter_batches(BATCH):
            chosen = [k for k in range(batch.num_rows) if wanted(first + number + k)]
            rows = dict(zip(chosen, batch.take(chosen).to_pylist(), strict=True)) if chosen else {}
            for k in range(batch.num_rows):
                yield f"row {number + k}", rows.get(k)
            number += batch.num_rows


def _hub_rows(name: str, configuration: str, split: str, revision: str) -> Iterator[dict[str, Any]]:
    from datasets import load_dataset  # a second, which local files need not wait for

    rows = load_dataset(name, configuration or None, split=split, revision=revision, streaming=True)
    yield from rows.decode(False)  # media stay paths or bytes
