"""Trainings of bench/dynamics.py, each kept in a file as it ends: a stopped command goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

ROOT = Path(__file__).parent.parent
# What a training's result depends on; results of other code are not gone on with.
CODE = ("bench/dynamics.py", "bench/tabular.py", "megatron_avatar/keyed.py", "megatron_avatar/records.py",
        "megatron_avatar/planning/dynamics.py", "megatron_avatar/data/loader.py", "megatron_avatar/config/*.py",
        "megatron_avatar/config/**/*.yaml", "megatron_avatar/rl/**/*.py")  # fmt: skip


class Journal:
    """Results by key in the JSON lines of `path` (None: not kept), with a progress bar of `total` results."""

    def __init__(self, path: Path | None, total: int) -> None:
        self._path, self._code = path, _digest(CODE)
        self._known: dict[str, list] = {}
        self._cut = False  # whether the file ends in the middle of a line
        if path is not None and path.exists():
            text = path.read_text()
            self._cut = bool(text) and not text.endswith("\n")
            for line in text.splitlines():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:  # the last line of a command that was stopped in the middle of it
                    continue
                if record["code"] == self._code:
                    self._known[record["key"]] = record["result"]
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            console=Console(stderr=True),
        )  # fmt: skip
        self._task = self._progress.add_task("trainings", total=total)

    def __enter__(self) -> Journal:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        if kind is None and self._path is not None:
            self._path.unlink(missing_ok=True)

    def say(self, text: str) -> None:
        self._progress.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def result(self, key: str, work: Callable[[], tuple[float, int]]) -> tuple[float, int]:
        """What `work` gives, or gave before under this key."""
        if key not in self._known:
            self._known[key] = list(work())
            if self._path is not None:
                self._path.parent.mkdir(exist_ok=True)
                with self._path.open("a") as file:
                    line = json.dumps({"key": key, "code": self._code, "result": self._known[key]})
                    file.write(("\n" if self._cut else "") + line + "\n")
                self._cut = False
        self._progress.advance(self._task)
        value, count = self._known[key]
        return value, count


def _digest(patterns: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for pattern in patterns for path in ROOT.glob(pattern)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
