"""The shards' journals become one manifest: in the rows' order, each sample once, every refusal named."""

from __future__ import annotations

import heapq
import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from data_tools.prepare.report import Report
from data_tools.prepare.shard import is_done, journal_path, lines_of
from megatron_avatar.data.manifest import sample_from_dict, write_manifest
from megatron_avatar.files import replacing
from megatron_avatar.locks import held
from megatron_avatar.records import Sample


class Seen:
    """Which names have been met, on disk: memory doesn't grow with their number."""

    def __init__(self, path: Path):
        path.unlink(missing_ok=True)
        self._path, self._base = path, sqlite3.connect(path)
        self._base.execute("PRAGMA journal_mode=OFF")  # made anew for every merge
        self._base.execute("PRAGMA synchronous=OFF")
        self._base.execute("CREATE TABLE seen (name TEXT PRIMARY KEY, row INTEGER) WITHOUT ROWID")

    def first(self, space: str, name: str, row: int) -> int:
        """The row that brought this name first: `row` itself for a new one."""
        found = self._base.execute("SELECT row FROM seen WHERE name = ?", (space + name,)).fetchone()
        if found:
            return found[0]
        self._base.execute("INSERT INTO seen VALUES (?, ?)", (space + name, row))
        return row

    def close(self) -> None:
        self._base.close()
        self._path.unlink(missing_ok=True)


def missing_shards(out: Path, shards: int) -> list[int]:
    return [k for k in range(shards) if not is_done(journal_path(out, k, shards))]


def merge(out: Path, shards: int, context: int) -> Report | None:
    """Writes manifest.jsonl, rejected.jsonl and the report of complete shards; None where another task has done so.

    Two tasks of an array may finish at the same time: one waits for the other.
    """
    with held(out / "shards" / "merge.lock", "a merge", wait=True):
        if (out / "manifest.jsonl").exists():
            return None
        journals = [lines_of(journal_path(out, k, shards)) for k in range(shards)]
        entries = _all_once(heapq.merge(*map(_rows, journals), key=lambda entry: entry["row"]), out)
        report, rejected = Report(context), out / "shards" / "rejected.tmp"
        made, names = out / "shards" / "manifest.jsonl", out / "shards" / "seen.sqlite"
        try:
            with closing(Seen(names)) as seen, replacing(rejected) as file:
                write_manifest(made, _kept(entries, seen, report, file))
        except sqlite3.Error as error:
            raise OSError(f"{names}: {error}; make room, and run the same command again") from None
        if not report.samples:
            reasons = f"no row is left, mostly because of {report.worst()}"
            raise ValueError(f"{rejected}: {reasons}; correct that, and prepare into another out=")
        os.replace(rejected, out / "rejected.jsonl")
        report.write(out)
        os.replace(made, out / "manifest.jsonl")  # last: who sees it sees all
    return report


def _rows(lines: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    return (entry for entry in lines if "row" in entry)


def _all_once(entries: Iterator[dict[str, Any]], out: Path) -> Iterator[dict[str, Any]]:
    """The rows' entries; ValueError where one is there twice or not at all."""
    for row, entry in enumerate(entries):
        if entry["row"] != row:
            found = "is there twice" if entry["row"] < row else "is missing"
            row = min(row, entry["row"])
            raise ValueError(f"{out / 'shards'}: row {row} {found} in the journals, which something else has written "
                             "or cut; delete them, and run the same command again")  # fmt: skip
        yield entry


def _kept(entries: Iterator[dict[str, Any]], seen: Seen, report: Report, rejected: Any) -> Iterator[Sample]:
    for entry in entries:
        row = entry["row"]
        if "refused" not in entry:
            twin = seen.first("key ", entry["key"], row)
            if twin != row:
                entry |= {"refused": "duplicate", "detail": f"the same media, question and answer as row {twin}"}
        if "refused" in entry:
            named = {name: entry[name] for name in ("row", "origin", "id", "refused", "detail") if entry.get(name) != ""
                     and name in entry}  # fmt: skip
            rejected.write(json.dumps(named, ensure_ascii=False) + "\n")
            report.reject(entry["refused"])
            continue
        values = entry["sample"]
        if seen.first("id ", values["id"], row) != row:  # the dataset gives a name twice: its content tells them apart
            values["id"] = f"{values['id']}-{entry['key'][:12]}"
            seen.first("id ", values["id"], row)
        new = [seen.first("medium ", content, row) == row for content in dict.fromkeys(entry["contents"])]
        facts = dict(zip(entry["contents"], entry["facts"], strict=True)).values()
        sample = sample_from_dict(values)
        report.keep(sample, entry["tokens"], [fact for fact, fresh in zip(facts, new, strict=True) if fresh])
        yield sample
