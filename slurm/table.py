"""The live table of sweep.py and reproduce.py: a line for each task that has room, from its files and its job's state.

Files are read every few seconds, squeue is asked once a minute (jobs.py).
"""

from __future__ import annotations

import json
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from slurm.jobs import Board
from slurm.tasks import Task, failures

INTERVAL_S = 3.0
PLAIN_INTERVAL_S = 30.0  # between lines where there is no terminal
PLAIN_WIDTH = 200  # a file has room for names as they are
MOST_LOGS = 20
COLORS = {"done": "green", "RUNNING": "cyan", "failed": "red"}
FRAME = 6  # lines of a table beside its tasks', and of what stands below it
WAITING = ("PENDING", "")


def watch(board: Board, console: Console) -> int:
    """Show the tasks until none is queued or running; 0 if all are done. Ctrl-C leaves the jobs alone."""
    steps = {name: _steps(task) for name, task in board.tasks.items()}
    try:
        if console.is_terminal:
            states = board.states()
            with Live(shown(board, states, steps, console.size.height), console=console, refresh_per_second=2) as live:
                while _busy(states := board.states()):
                    live.update(shown(board, states, steps, console.size.height))
                    time.sleep(INTERVAL_S)
                live.update(shown(board, states, steps))
        else:
            said = {n: progress(board.tasks[n], s, steps[n]) for n, s in board.states().items() if s == "done"}
            while _busy(states := board.states()):
                now = {n: progress(board.tasks[n], s, steps[n]) for n, s in states.items() if s not in WAITING}
                changed = "".join(f"; {n}: {text}" for n, text in now.items() if said.get(n) != text)
                if changed:
                    console.print(f"{counts(states)}{changed}", soft_wrap=True, highlight=False)
                    said = now
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
    """How many tasks are done, failed, or in another state: `3 of 9 done, 2 running, 4 pending`."""
    number = Counter(state.lower() or "not submitted" for state in states.values())
    others = (f", {many} {state}" for state, many in sorted(number.items()) if state != "done")
    return f"{number['done']} of {len(states)} done{''.join(others)}"


def in_view(states: dict[str, str], room: int) -> list[str]:
    """At most `room` tasks, in their order: failed ones first, then what runs, what waits next, what was done last."""
    failed = [name for name, state in states.items() if state == "failed"]
    running = [name for name, state in states.items() if state not in ("failed", "done", *WAITING)]
    waiting = [name for name, state in states.items() if state in WAITING]
    done = [name for name, state in reversed(states.items()) if state == "done"]
    chosen = {*[*failed, *running, *waiting, *done][: max(room, 1)]}
    return [name for name in states if name in chosen]


def shown(board: Board, states: dict[str, str], steps: dict[str, int], height: int | None = None) -> Group:
    """The table, and below it what has failed and why there may be nothing new; as far as `height` lines have room."""
    failed = [name for name, state in states.items() if state == "failed"]
    most = MOST_LOGS if height is None else max(1, height // 4)
    lines = [f"{name} failed: {log_of(board, name) or 'it left no log'}" for name in failed[:most]]
    lines += [f"and {len(failed) - most} more failed"] * (len(failed) > most)
    lines += [f"no news from Slurm ({board.silence}); asked again every minute"] * bool(board.silence)
    names = list(states) if height is None else in_view(states, height - FRAME - len(lines))
    lines = [counts(states)] * (len(names) < len(states)) + lines
    return Group(table(board, names, states, steps), *(Text(line, overflow="fold") for line in lines))


def table(board: Board, names: list[str], states: dict[str, str], steps: dict[str, int]) -> Table:
    table = Table()
    table.add_column("task", overflow="fold")  # a name is the only thing that may take a second line
    for title in ("job", "state", "step", "reward or loss", "s/step", "left", "failures"):
        table.add_column(title, no_wrap=True)
    for name in names:
        task = board.tasks[name]
        records = _records(task.folder / "metrics.jsonl") if not task.module else []
        last = records[-1] if records else {}
        value = last.get("reward", last.get("loss"))
        pace = _pace(records)
        left = timedelta(seconds=int(pace * (steps[name] - last["step"]))) if pace and states[name] != "done" else ""
        color = COLORS.get(states[name], "yellow")
        table.add_row(
            Text(name), board.jobs.get(name, ""), f"[{color}]{states[name] or 'not submitted'}[/]",
            f"{last.get('step', 0)}/{steps[name]}" if steps[name] else "", "" if value is None else f"{value:.3f}",
            f"{pace:.2f}" if pace else "", str(left), str(failures(task) or ""),
        )  # fmt: skip
    return table


def log_of(board: Board, name: str) -> Path | None:
    """The newest of what a task's processes and its job have said."""
    task = board.tasks[name]
    own = list(task.log.glob("*.log")) if task.log.is_dir() else [task.log]
    submitted = (board.folder / "submitit").glob(f"{board.jobs.get(name, 'none')}_0_log.out")
    there = [path for path in (*own, *submitted) if path.exists()]
    return max(there, key=lambda path: path.stat().st_mtime, default=None)


def progress(task: Task, state: str, steps: int) -> str:
    records = _records(task.folder / "metrics.jsonl") if not task.module else []
    return f"{state or 'not submitted'} {records[-1]['step']}/{steps}" if records else state or "not submitted"


def _steps(task: Task) -> int:
    return 0 if task.module else sum(stage.steps for stage in task.config().stages.values())


def _records(path: Path, last: int = 20) -> list[dict]:
    """The last records of a metrics file; a line that is being written is left out."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        file.seek(0, 2)
        file.seek(max(0, file.tell() - 200_000))
        lines = file.read().splitlines()[-last:]
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

