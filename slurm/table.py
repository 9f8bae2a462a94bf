"""The live table of sweep.py and reproduce.py: a line for each task that has room, from its files and its job's state.

Files are read every few seconds, squeue is asked once a minute (jobs.py).
"""

from __future__ import annotations

import json
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from functools import cache
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from megatron_avatar.resilience import queue
from slurm.jobs import Board
from slurm.tasks import Task, failures

INTERVAL_S = 3.0
PLAIN_INTERVAL_S = 30.0  # between lines where there is no terminal
PLAIN_WIDTH = 200  # a file has room for names as they are
MOST_LOGS = 20
COLORS = {"done": "green", "RUNNING": "cyan", "failed": "red"}
WAITING = (*queue.WAITING, "")
FEWEST_LINES = 8  # of a screen that has room for a table
COLUMNS_WIDTH = 90  # of all columns but the task's
COLUMNS = ("job", "state", "step", "reward or loss", "s/step", "left", "failures")
NARROW = ("state", "step", "left")


def watch(board: Board, console: Console) -> int:
    """Show the tasks until none is queued or running; 0 if all are done. Ctrl-C leaves the jobs alone."""
    steps = {name: _steps(task) for name, task in board.tasks.items()}
    try:
        if console.is_terminal:
            first = fitting(board, board.states(), steps, console)
            with Live(first, console=console, refresh_per_second=2) as live:
                while _busy(states := board.states()):
                    live.update(fitting(board, states, steps, console))
                    time.sleep(INTERVAL_S)
                live.update(shown(board, states, steps))
        else:
            said = {n: progress(board.tasks[n], s, steps[n]) for n, s in board.states().items() if s == "done"}
            news = True
            while _busy(states := board.states()):
                now = {n: progress(board.tasks[n], s, steps[n]) for n, s in states.items() if s not in WAITING}
                waits = {n: states[n] or "not submitted" for n in said if states[n] in WAITING}
                now |= waits  # it was stopped
                changed = "".join(f"; {n}: {text}" for n, text in now.items() if said.get(n) != text)
                if changed or news:
                    console.print(f"{counts(states)}{changed}", soft_wrap=True, highlight=False, markup=False)
                    said, news = now, False
                _sleep_while_busy(board)
            Console(file=console.file, width=PLAIN_WIDTH).print(shown(board, states, steps))
    except KeyboardInterrupt:
        console.print("the jobs go on; the same command shows them again")
        return 130
    return 0 if all(state == "done" for state in states.values()) else 1


def _sleep_while_busy(board: Board) -> None:
    end = time.monotonic() + PLAIN_INTERVAL_S
    while time.monotonic() < end and _busy(board.states()):
        time.sleep(INTERVAL_S)


def _busy(states: dict[str, str]) -> bool:
    return any(state not in ("done", "failed", "") for state in states.values())


def counts(states: dict[str, str]) -> str:
    """How many tasks are done, failed, or in another state: `3 of 9 done, 4 pending, 2 running`."""
    number = Counter(state.lower() or "not submitted" for state in states.values())
    others = (f", {many} {state}" for state, many in sorted(number.items()) if state != "done")
    return f"{number['done']} of {len(states)} done{''.join(others)}"


def in_view(states: dict[str, str], room: int) -> list[str]:
    """At most `room` tasks, in their order: what runs, what has failed in half of the room, what waits next, and what
    was done last."""
    failed = [name for name, state in states.items() if state == "failed"]
    running = [name for name, state in states.items() if state not in ("failed", "done", *WAITING)]
    waiting = [name for name, state in states.items() if state in WAITING]
    done = [name for name, state in reversed(states.items()) if state == "done"]
    half = room // 2
    order = [*running[: room - min(half, len(failed))], *failed[:half], *waiting, *done, *failed, *running]
    chosen = {*list(dict.fromkeys(order))[:room]}
    return [name for name in states if name in chosen]


def shown(board: Board, states: dict[str, str], steps: dict[str, int]) -> Group:
    """The table of all tasks, and below it what has failed and why there may be nothing new."""
    lines = _below(board, states, MOST_LOGS)
    rows = {name: _cells(board, name, state, steps[name]) for name, state in states.items()}
    return Group(table(rows), *(Text(line, overflow="fold") for line in lines))


def fitting(board: Board, states: dict[str, str], steps: dict[str, int], console: Console) -> Group:
    """The same for a screen: of more tasks than it has lines for, those of `in_view`, and how many there are."""
    width, height = console.size
    if height < FEWEST_LINES:
        return Group(Text(counts(states), overflow="fold"))
    columns = COLUMNS if width >= COLUMNS_WIDTH + max(map(len, states), default=0) else NARROW

    @cache  # its files are read once a look
    def row(name: str) -> dict[str, str]:
        return _cells(board, name, states[name], steps[name])

    def lines_of(part: RenderableType) -> int:
        return len(console.render_lines(part))

    def group(room: int) -> Group:
        rows = {name: row(name) for name in in_view(states, room)}
        said = [counts(states)] * (len(rows) < len(states)) + below
        return Group(table(rows, columns), *(Text(line, overflow="fold") for line in said))

    most = max(1, height // 8)
    while True:  # a log's path may take several lines
        below = _below(board, states, most)
        if most == 0 or lines_of(Group(*(Text(line, overflow="fold") for line in below))) <= height // 2:
            break
        most -= 1
    if len(states) <= height and lines_of(group(len(states))) <= height:
        return group(len(states))
    rooms = range(1, min(len(states), height) + 1)
    return group(max(1, bisect_right(rooms, height, key=lambda room: lines_of(group(room)))))  # and so may a name


def _below(board: Board, states: dict[str, str], most: int) -> list[str]:
    failed = [name for name, state in states.items() if state == "failed"]
    lines = [f"no news from Slurm ({board.silence}); asked again every minute"] * bool(board.silence)
    lines += [f"{name} failed: {log_of(board, name) or 'it left no log'}" for name in failed[:most]]
    return lines + [f"and {len(failed) - most} more failed"] * (len(failed) > most)


def table(rows: dict[str, dict[str, str]], columns: Sequence[str] = COLUMNS) -> Table:
    table = Table()
    table.add_column("task", overflow="fold")  # a name is the only thing that may take a second line
    for title in columns:
        table.add_column(title, no_wrap=True)
    for name, cells in rows.items():
        table.add_row(Text(name), *(cells[title] for title in columns))
    return table


def _cells(board: Board, name: str, state: str, steps: int) -> dict[str, str]:
    """What the columns say of a task."""
    task = board.tasks[name]
    records = _records(task.folder / "metrics.jsonl") if not task.module else []
    last = records[-1] if records else {}
    value = last.get("reward", last.get("loss"))
    pace = _pace(records)
    left = timedelta(seconds=int(pace * (steps - last["step"]))) if pace and state != "done" else ""
    color = COLORS.get(state, "yellow")
    return dict(zip(COLUMNS, (
        board.jobs.get(name, ""), f"[{color}]{state or 'not submitted'}[/]",
        f"{last.get('step', 0)}/{steps}" if steps else "", "" if value is None else f"{value:.3f}",
        f"{pace:.2f}" if pace else "", str(left), str(failures(task) or ""),
    ), strict=True))  # fmt: skip


def log_of(board: Board, name: str) -> Path | None:
    """The newest of what a task's processes and its job have said."""
    task = board.tasks[name]
    own = list(task.log.glob("*.log")) if task.log.is_dir() else [task.log]
    submitted = (board.folder / "submitit").glob(f"{board.jobs.get(name, 'none')}_0_log.out")
    there = [path for path in (*own, *submitted) if path.exists()]
    return max(there, key=lambda path: path.stat().st_mtime, default=None)


def progress(task: Task, state: str, steps: int) -> str:
    records = _records(task.folder / "metrics.jsonl") if not task.module else []
    return f"{state} {records[-1]['step']}/{steps}" if records else state


def _steps(task: Task) -> int:
    return 0 if task.module else sum(stage.steps for stage in task.config().stages.values())


def _records(path: Path, last: int = 20) -> list[dict]:
    """The last records of a metrics file; a line that is being written is left out."""
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - 200_000))
            lines = file.read().splitlines()[-last:]
    except OSError:  # it isn't there, or has just gone
        return []
    records = []
    for line in lines:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def _pace(records: list[dict]) -> float:
    """Seconds a step: the median of the last ones."""
    seconds = sorted(r["time/step"] for r in records if "time/step" in r)
    return seconds[len(seconds) // 2] if seconds else 0.0

