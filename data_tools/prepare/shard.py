"""One shard of the rows: read, media handed to killable workers, every row's outcome appended to the shard's journal.

The journal holds the rows in order, so that its complete lines say where to continue; its last line counts all rows.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import TimeoutError as Late
from io import FileIO
from pathlib import Path
from typing import Any

from pebble import ProcessExpired, ProcessFuture, ProcessPool

from data_tools.prepare.damage import Refused, shown
from data_tools.prepare.judge_row import RowJudge, row_key
from data_tools.prepare.rows import FIRST, Input, Row, read_rows
from data_tools.prepare.sources import Dataset, Draft
from data_tools.prepare.store import Handling, Source, ignore_signals, store
from megatron_avatar.data.manifest import sample_to_dict
from megatron_avatar.files import append
from megatron_avatar.locks import held

# Faults of this machine, of its packages and workers, and of this program.
NO_ROWS = (OSError, MemoryError, ImportError, AssertionError, RuntimeError)
AHEAD = 8  # rows a worker that wait in memory
REMEMBERED = 4096  # paths whose content is known


def journal_path(out: Path, shard: int, shards: int) -> Path:
    return out / "shards" / f"{shard}-of-{shards}.jsonl"


def lines_of(path: Path) -> Iterator[dict[str, Any]]:
    """Complete lines of a journal; a torn last one is left out."""
    if path.exists():
        with open(path, "rb") as file:
            yield from (json.loads(line) for line in file if line.endswith(b"\n"))


def is_done(path: Path) -> bool:
    """Whether the last line counts the rows."""
    if not path.exists():
        return False
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 64))
        last = file.read().splitlines(keepends=True)[-1:]
    return bool(last) and last[0].startswith(b'{"rows"') and last[0].endswith(b"\n")


def _continue(path: Path) -> int:
    """Cuts a torn line off and returns the row after the last complete one."""
    start = end = 0
    if path.exists():
        with open(path, "r+b") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                start, end = json.loads(line)["row"] + 1, end + len(line)
            file.truncate(end)
    return start


class Shard:
    """The work on one shard; `run` returns when the journal is complete."""

    def __init__(self, dataset: Dataset, rows: Input, judge: RowJudge, handling: Handling, *, stage: str,
                 processes: int, deadline_s: float, shards: int, shard: int):  # fmt: skip
        self.dataset, self.rows, self.judge, self.handling, self.stage = dataset, rows, judge, handling, stage
        self.processes, self.deadline_s, self.shards, self.number = processes, deadline_s, shards, shard
        self.path = journal_path(Path(handling.out), shard, shards)
        self._stored: OrderedDict[Source, ProcessFuture] = OrderedDict()

    def run(self, progress: Callable[[bool], None]) -> None:
        """`progress` is told of each row whether it was kept. Raises ValueError for rows of another dataset, and where
        another process works on this shard."""
        with held(self.path.with_suffix(".lock"), f"the preparation of shard {self.number}"):
            if not is_done(self.path):  # by whoever held it
                self._run(progress)

    def _run(self, progress: Callable[[bool], None]) -> None:
        scratch = Path(self.handling.scratch)
        shutil.rmtree(scratch, ignore_errors=True)  # what a killed attempt left
        scratch.mkdir(parents=True)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["data_tools.prepare.store"])
        pool = ProcessPool(self.processes, initializer=ignore_signals, context=context)
        try:
            start = _continue(self.path)
            with open(self.path, "ab", buffering=0) as journal:
                total = self._all(pool, journal, start, progress)
                os.fsync(journal.fileno())  # the rows are on the disk before their number
                append(journal, f'{{"rows": {total}}}\n')
            pool.close()
        except BaseException:
            pool.stop()
            raise
        finally:
            pool.join()
            shutil.rmtree(scratch, ignore_errors=True)

    def _all(self, pool: ProcessPool, journal: FileIO, start: int, progress: Callable[[bool], None]) -> int:
        total, waiting = 0, deque()
        strangers: list[str] | None = None if start else []  # the first rows, while all are another dataset's

        def write() -> None:
            entry = self._outcome(*waiting.popleft())
            append(journal, json.dumps(entry, ensure_ascii=False) + "\n")
            progress("sample" in entry)

        for row in read_rows(self.rows, self.shards, self.number, start):
            total = row.index + 1
            if row.values is None and not row.refused:
                continue  # another shard's, or done
            draft = self._draft(row)
            if strangers is not None and row.values is not None:
                stageless = isinstance(draft, Refused) and draft.kind == "stage"
                strange = self.dataset.lacks(row.values) or (draft.detail if stageless else "")
                strangers = [*strangers, f"{row.origin}: {strange}"] if strange else None
                if strangers and len(strangers) == FIRST:
                    raise ValueError(strangers[0])
            media = () if isinstance(draft, Refused) else draft.media
            waiting.append((row, draft, [self._store(pool, source) for source in media]))
            while not strangers and (
                len(waiting) > AHEAD * self.processes or (waiting and all(f.done() for f in waiting[0][2]))
            ):
                write()
        if strangers:
            raise ValueError(strangers[0])
        while waiting:
            write()
        return total

    def _draft(self, row: Row) -> Draft | Refused:
        if row.refused:
            return row.refused
        try:
            return self.dataset.read(row.values, row.origin, self.stage)
        except Refused as refused:
            return refused

    def _store(self, pool: ProcessPool, source: Source) -> ProcessFuture:
        """A path that comes again soon is handled once; embedded bytes are known by their content alone."""
        if source.data is None and source in self._stored:
            self._stored.move_to_end(source)
            return self._stored[source]
        future = pool.schedule(store, args=(source, self.handling), timeout=self.deadline_s)
        if source.data is None:
            self._stored[source] = future
            if len(self._stored) > REMEMBERED:
                self._stored.popitem(last=False)
        return future

    def _outcome(self, row: Row, draft: Draft | Refused, futures: list[ProcessFuture]) -> dict[str, Any]:
        """The journal's line for a row."""
        entry: dict[str, Any] = {"row": row.index, "origin": row.origin}
        try:
            if isinstance(draft, Refused):
                raise draft
            entry["id"] = shown(draft.id)
            contents = tuple(
                self._content(source, future) for source, future in zip(draft.media, futures, strict=True)
            )
            judged = self.judge.judge(draft, contents)
        except Refused as refused:
            return entry | {"refused": refused.kind, "detail": refused.detail}
        except Exception as error:
            if isinstance(error, NO_ROWS) and not isinstance(error, RecursionError):
                raise
            # Foreign parsers on foreign texts: no row ends the work on millions of others.
            return entry | {"refused": "fault", "detail": shown(f"{type(error).__name__}: {error}")}
        facts = list(judged.facts)
        return entry | {"key": row_key(draft, contents), "tokens": judged.tokens, "contents": list(contents),
                        "facts": facts, "sample": sample_to_dict(judged.sample)}  # fmt: skip

    def _content(self, source: Source, future: ProcessFuture) -> str:
        what = source.path or f"embedded {source.kind}"
        try:
            return future.result()
        except Refused as refused:
            raise Refused(refused.kind, f"{what}: {refused.detail}") from None
        except Late:
            raise Refused("deadline", f"{what}: took longer than deadline_s={self.deadline_s:g}") from None
        except ProcessExpired:
            raise Refused("crash", f"{what}: the decoder crashed on it") from None
