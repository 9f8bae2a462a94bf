"""Sweeps and graphs as jobs, with a Slurm that answers late, refuses, or is asked from inside of a job."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from slurm import jobs, sweep, table, tasks
from slurm.jobs import Board
from slurm.pool import Pool
from slurm.tasks import Task, TaskFailed

ROOT = Path(__file__).parents[1]
SETTINGS = ["recipe=tiny_sft", "model.path=assets/tiny_base", "data.manifest=LICENSE"]


def training(name: str, folder: Path, **kwargs) -> Task:
    run = folder / name
    return Task(name, run, [*SETTINGS, "cluster=default", f"output_dir={run}"], run / "done.json", **kwargs)


@pytest.fixture
def board(tmp_path, fake_slurm, monkeypatch) -> Board:
    """Two trainings whose jobs are 40_0 and 40_1."""
    monkeypatch.setattr(jobs, "time", SimpleNamespace(monotonic=lambda: fake_slurm.now, sleep=fake_slurm.sleep))
    folder = tmp_path / "sweep"
    folder.mkdir()
    (folder / "jobs.json").write_text(json.dumps({"a": "40_0", "b": "40_1"}))
    return Board(folder, [training("a", folder), training("b", folder)], local=False)


def test_squeue_is_asked_once_a_minute_and_may_fall_silent(board, fake_slurm):
    count = fake_slurm.fake("squeue", says="40_0|RUNNING\n40_1|PENDING", fails=2)
    for _ in range(19):  # a minute of looking
        assert board.states() == {"a": "RUNNING", "b": "PENDING"}
        fake_slurm.sleep(3)
    assert int(count.read_text()) == 3, "twice without an answer, then once"
    fake_slurm.fake("squeue", fails=10**6)
    fake_slurm.sleep(60)
    for _ in range(100):  # five minutes of silence end nothing
        assert board.states() == {"a": "RUNNING", "b": "PENDING"} and "timed out" in board.silence
        fake_slurm.sleep(3)
    text = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    text.print(table.shown(board, board.states(), {"a": 1, "b": 1}))
    assert "no news from Slurm (squeue: slurm_load_jobs error: Socket timed out" in text.export_text()
    board.tasks["b"].done.parent.mkdir()
    board.tasks["b"].done.touch()
    fake_slurm.fake("squeue", says="40_1|RUNNING")
    fake_slurm.sleep(60)
    assert board.states() == {"a": "failed", "b": "done"} and not board.silence


def test_where_squeue_says_nothing_at_all_the_command_ends_in_words(tmp_path, fake_slurm, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "jobs.json").write_text('{"seed_0": "40_0"}')
    fake_slurm.fake("squeue", fails=10**6)
    fake_slurm.fake("sbatch")
    assert sweep.main([*SETTINGS, "seed=0,1", "cluster=default", f"output_dir={tmp_path / 'sweep'}"]) == 2
    assert "error: squeue: slurm_load_jobs error: Socket timed out" in capsys.readouterr().err
    assert jobs.PATIENCE_S - 30 <= fake_slurm.now <= jobs.PATIENCE_S


INTERACTIVE = {"SLURM_JOB_ID": "9", "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1", "SLURM_MEM_PER_CPU": "100",
               "SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_CONF": "/etc/s.conf",
               "SBATCH_ACCOUNT": "mine"}  # fmt: skip


def test_a_sweep_is_submitted_from_inside_of_a_job(tmp_path, fake_slurm, monkeypatch, capsys):
    """A notebook's job: its own sizes are nobody else's, and its GPUs are not the members'."""
    monkeypatch.chdir(ROOT)
    for name, value in INTERACTIVE.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(jobs, "time", SimpleNamespace(monotonic=lambda: fake_slurm.now, sleep=fake_slurm.sleep))
    fake_slurm.fake("squeue")
    count = fake_slurm.fake("sbatch", says="Submitted batch job 41", fails=2)
    out = tmp_path / "sweep"
    command = [*SETTINGS, "seed=0,1,2", "cluster=default", "cluster.gpu=h100", f"output_dir={out}", "watch=false"]
    assert sweep.main(command) == 0, capsys.readouterr().err
    assert json.loads((out / "jobs.json").read_text()) == {f"seed_{k}": f"41_{k}" for k in range(3)}
    assert int(count.read_text()) == 4, "tried before it is submitted, twice without an answer, and submitted"
    environment = fake_slurm.environment("sbatch")
    assert [name for name in environment if name.startswith("SLURM_")] == ["SLURM_CONF"]
    assert environment["SBATCH_ACCOUNT"] == "mine"


def test_what_slurm_refuses_is_said_without_a_traceback(tmp_path, fake_slurm, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    fake_slurm.fake("squeue")
    (fake_slurm.folder / "sbatch").write_text("""#!/bin/bash
[[ "$1" == --test-only ]] && exit 0
echo 'sbatch: error: Batch job submission failed: Job violates accounting/QOS policy' >&2; exit 1
""")
    (fake_slurm.folder / "sbatch").chmod(0o755)
    out = tmp_path / "sweep"
    assert sweep.main([*SETTINGS, "seed=0,1", "cluster=default", f"output_dir={out}"]) == 2
    said = capsys.readouterr().err
    assert "error: Slurm didn't queue seed_0, seed_1: sbatch: error: Batch job submission failed" in said, said
    assert fake_slurm.now == 0 and not (out / "jobs.json").exists()


# ---- inside of a job -------------------------------------------------------------------------------------------------


@pytest.fixture
def member(tmp_path, fake_slurm, monkeypatch):
    """Runs a task as a job of which the command returns `status`; what was requeued, and whether it waited for that."""
    monkeypatch.setenv("SLURM_JOB_ID", "40")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "40")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    monkeypatch.setattr(tasks.signal, "signal", lambda *_: None)

    def run(status: int, *, state: str = "RUNNING", **kwargs) -> tuple[list[str], int, bool]:
        waited = []
        monkeypatch.setattr(tasks, "_await_the_end", lambda: waited.append(True))
        monkeypatch.setattr(Task, "_run_on_slurm", lambda self: status)
        (fake_slurm.folder / "scontrol.calls").unlink(missing_ok=True)
        fake_slurm.fake("squeue", says=state, fails=1)
        fake_slurm.fake("scontrol", fails=1)
        task = training("a", tmp_path, **kwargs)
        try:
            task()
        except TaskFailed:
            assert status
        return fake_slurm.calls("scontrol"), tasks.failures(task), bool(waited)

    return run


def test_a_members_end(member):
    assert member(0) == ([], 0, False)
    assert member(2) == ([], 0, False), "a mistake is not made twice"
    assert member(75) == ([], 0, True), "common.sh has put it into the queue"
    assert member(1, state="COMPLETING") == ([], 0, False), "cancelled"
    assert member(1, retries=1) == (["requeue 40_1"] * 2, 1, True), "never the whole array"
    assert member(137, retries=1) == ([], 2, False), "no retry is left"


def test_a_stopped_command_uses_up_no_retry(member):
    assert member(75, module="eval.run", retries=0) == (["requeue 40_1"] * 2, 0, True)


# ---- this machine ----------------------------------------------------------------------------------------------------

STUB = """
import os, pathlib, sys
run = pathlib.Path(next(a for a in sys.argv if a.startswith("output_dir=")).partition("=")[2])
starts = len(list(run.glob("start-*")))
(run / f"start-{starts}").touch()
told = TOLD[starts]
if told:
    pathlib.Path(f"{os.environ['AVATAR_ENDED']}-{told}").touch()
else:
    (run / "done.json").touch()
assert not [name for name in os.environ if name.startswith("SLURM_") and name != "SLURM_CONF"]
sys.exit(1 if told else 0)  # as torchrun's always is
"""


@pytest.mark.parametrize(("told", "starts", "failed"), [([76, 75, 0], 3, 0), ([2, 0], 1, 0), ([1, 1, 0], 2, 2)])
def test_a_pool_reads_what_torchrun_does_not_return(tmp_path, monkeypatch, told, starts, failed):
    """Hung or stopped: again, and no retry is used up. A user's mistake: never again."""
    monkeypatch.chdir(ROOT)
    for name, value in INTERACTIVE.items():
        monkeypatch.setenv(name, value)
    code = tmp_path / "code" / "megatron_avatar"
    code.mkdir(parents=True)
    (code / "__init__.py").touch()
    (code / "train.py").write_text(STUB.replace("TOLD", str(told)))
    task = training("a", tmp_path, retries=1)
    task.settings = [*(s for s in task.settings if not s.startswith("cluster=")), "cluster=local"]
    task.code = str(code.parent)
    task.folder.mkdir()
    try:
        Pool([task], ["a"], tmp_path, 1)()
    except TaskFailed:
        assert told[-1] == 0 and not task.done.exists()
    assert len(list(task.folder.glob("start-*"))) == starts
    assert task.done.exists() == (failed == 0 and 2 not in told) and tasks.failures(task) == failed
    assert not list(task.folder.glob(".ended-*"))


def run_pool(out: Path, codes: dict[str, str], more: str = "") -> str:
    """What a pool of two says that runs these lines, forked where the wave module was read, in a process of its own: a
    fork server begins once."""
    script = f"""if __name__ == "__main__":
    import os, signal, threading, time
    from pathlib import Path
    from slurm import pool
    from slurm.tasks import Task, TaskFailed
    os.chdir({str(ROOT)!r})
    pool.FORKED, pool.AHEAD, pool.forked.answers = ("tests.eval.one_line",), ("wave",), lambda: True
    out, own, tasks = Path({str(out)!r}), os.getpid(), []
    for name, line in {codes!r}.items():
        settings = ["recipe=tiny_sft", "model.path=assets/tiny_base", "data.manifest=-", "cluster=local",
                    f"+cluster.env.WHAT={{int(name == 'other')}}"]
        tasks.append(Task(name, out, settings, out / f"{{name}}.done", "tests.eval.one_line", False,
                          [line.format(own=own, out=out)], retries=0, code=os.getcwd()))
    {more}
    try:
        pool.Pool(tasks, [task.name for task in tasks], out, 2)()
    except TaskFailed as error:
        print(error)
"""
    (out / "script.py").write_text(script)
    environment = {**os.environ, **INTERACTIVE, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, out / "script.py"], env=environment, capture_output=True, text=True,
                          check=True, timeout=120).stdout  # fmt: skip


TELL = (
    "import os, sys; print('wave' in sys.modules, os.getppid() == {own}, os.getsid(0) == os.getpid(), "
    "[n for n in os.environ if n.startswith('SLURM_JOB')], os.environ['WHAT'], os.environ['AVATAR_ENDED'][-2:])"
)


LONG = "import tempfile; tempfile.tempdir = str(out / ('x' * 100)); os.mkdir(tempfile.tempdir)"


def test_a_pool_forks_what_needs_the_libraries_and_can_stop_it(tmp_path):
    codes = {"a": TELL, "b": TELL, "other": TELL, "bad": "raise SystemExit(3)",
             "stop": "import time; open('{out}/began', 'w').close(); time.sleep(300)"}  # fmt: skip
    stop = """def stop():
        while not (out / "began").exists():
            time.sleep(0.05)
        os.kill(own, signal.SIGTERM)
    threading.Thread(target=stop, daemon=True).start()"""
    assert "was stopped; run the same command again to continue without bad, stop" in run_pool(tmp_path, codes, stop)
    said = {name: (tmp_path / f"{name}.log").read_text().splitlines() for name in ("a", "b", "other")}
    assert all(lines[0].startswith("$ ") for lines in said.values())
    assert [lines[1] for lines in said.values()] == [
        "True False True [] 0 -a", "True False True [] 0 -b", "False True True [] 1 er"]  # fmt: skip
    assert {path.name for path in (tmp_path / "failed").iterdir()} == {"bad"}


def test_what_a_pool_forks_from_is_out_of_reach_of_its_process_group():
    code = ("import os, sys, types; sys.modules['eval.ahead'] = types.ModuleType('eval.ahead'); import slurm.ahead; "
            "print(os.getsid(0) == os.getpgid(0) == os.getpid())")  # fmt: skip
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "True\n"


def test_a_pool_goes_on_when_the_process_that_it_forks_from_is_gone(tmp_path):
    """A task isn't begun again beside itself, and what comes later finds the same environment."""
    kill = (
        "import os, pathlib, sys, time; path = pathlib.Path('{out}/lived'); again = path.exists(); "
        "again or os.kill(os.getppid(), 9); again or time.sleep(1); path.open('a').write('x'); " + TELL
    )
    assert run_pool(tmp_path, {"a": kill}) == "", "no retry is used up"
    assert (tmp_path / "a.done").exists() and (tmp_path / "lived").read_text() == "xx"
    assert [line for line in (tmp_path / "a.log").read_text().splitlines() if line[0] != "$"] == [
        "True False True [] 0 -a"] * 2  # fmt: skip


@pytest.mark.parametrize("more", ["pool.forked.answers = lambda: False", "pool.AHEAD = ('tests.eval.ends',)", LONG])
def test_without_a_process_to_fork_from_tasks_begin_as_ever(tmp_path, more):
    """While it still reads, where it ended as it read, or can't begin as its socket's path would be too long."""
    assert run_pool(tmp_path, {"a": TELL}, more) == ""
    assert (tmp_path / "a.log").read_text().splitlines()[1] == "False True True [] 0 -a"


# ---- what is shown ---------------------------------------------------------------------------------------------------


def test_the_table_has_whole_names_and_says_where_the_logs_are(tmp_path):
    long = "omni_7b.on_off_ratio_on4_off4_without_the_hints_and_without_tas.0"
    board = Board(tmp_path, [training(long, tmp_path), training("b", tmp_path), training("c", tmp_path)], local=True)
    board.jobs = {long: "40_0", "b": "40_1", "c": "40_2"}
    logs = tmp_path / long / "logs"
    logs.mkdir(parents=True)
    (tmp_path / "submitit").mkdir()
    (logs / "40.0.log").touch()
    (tmp_path / "submitit" / "40_1_0_log.out").touch()
    states = {long: "failed", "b": "failed", "c": "failed"}
    for width in (80, 200):
        console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
        console.print(table.shown(board, states, dict.fromkeys(states, 3)))
        text = console.export_text()
        assert long in "".join(line.split("│")[1].strip() for line in text.splitlines() if line.startswith("│"))
        whole = text.replace("\n", "")
        assert f"{long} failed: {logs / '40.0.log'}" in whole, whole
        assert f"b failed: {tmp_path / 'submitit' / '40_1_0_log.out'}" in whole and "c failed: it left no log" in whole


SYSTEM = "eval.tiny.components_grpo_beta_matched.{:02}.held_out-trained"  # a name of the study's


def on_screen(board: Board, states: dict[str, str], width: int, height: int) -> list[str]:
    console = Console(width=width, height=height, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table.fitting(board, states, dict.fromkeys(states, 3), console))
    return console.export_text().splitlines()


@pytest.mark.parametrize("width", [80, 100, 200])
@pytest.mark.parametrize("height", [12, 24, 50])
def test_a_screen_shows_what_runs_fails_and_comes_next_of_many_tasks(tmp_path, width, height):
    state = {0: "done", 1: "failed", 2: "done", 40: "RUNNING", 90: "COMPLETING", 95: "REQUEUED"}
    states = {SYSTEM.format(number): state.get(number, "PENDING") for number in range(100)}
    board = Board(tmp_path, [training(name, tmp_path) for name in states], local=True)
    for name in states:
        log = board.tasks[name].log / "a_log_with_a_name_of_its_own.log"
        log.parent.mkdir(parents=True)
        log.touch()
    lines = on_screen(board, states, width, height)
    assert len(lines) <= height
    whole = "".join("".join(line.split("│")[1].split()) if line.startswith("│") else line for line in lines)
    rows = [number for number in range(100) if SYSTEM.format(number) in whole]
    assert 40 in rows and (height == 12 or {3, 90} <= {*rows}), "what comes next has the rest"
    assert 0 not in rows and 95 not in rows and f"{SYSTEM.format(1)} failed: " in whole
    assert "2 of 100 done, 1 completing, 1 failed, 94 pending, 1 requeued, 1 running" in lines
    assert height == 12 or len(rows) >= (height - 12) // 2, "the screen is used"


def test_many_failures_leave_room_for_what_runs(tmp_path):
    states = {f"task_{n:02}": "failed" if n < 60 else "RUNNING" if n < 70 else "PENDING" for n in range(100)}
    board = Board(tmp_path, [training(name, tmp_path) for name in states], local=True)
    rows = [line.split()[1] for line in on_screen(board, states, 100, 30) if line.startswith("│ task_")]
    assert sum(states[row] == "RUNNING" for row in rows) == 10 and sum(states[row] == "failed" for row in rows) >= 5
    every = dict.fromkeys(states, "failed")
    assert 10 < len(on_screen(board, every, 100, 24)) <= 24
    few = {name: states[name] for name in list(states)[55:65]}
    shown = on_screen(Board(tmp_path, [training(name, tmp_path) for name in few], local=True), few, 100, 60)
    assert all(any(name in line for line in shown) for name in few) and not any(" of 10 done" in line for line in shown)


def test_paths_of_logs_leave_half_of_the_screen_and_silence_is_told_first(tmp_path):
    states = {f"task_{n:02}": "failed" if n < 30 else "RUNNING" if n < 34 else "PENDING" for n in range(100)}
    board = Board(tmp_path, [training(name, tmp_path) for name in states], local=True)
    for name in states:
        log = board.tasks[name].log / f"{'a_long_name_' * 15}.log"
        log.parent.mkdir(parents=True)
        log.touch()
    board.silence = "it has no answer"
    for width, height in ((60, 24), (80, 16), (120, 24), (80, 40)):
        lines = on_screen(board, states, width, height)
        assert len(lines) <= height and any("no news from Slurm" in line for line in lines)
        rows = [line.split()[1] for line in lines if line.startswith("│ task_")]
        assert sum(states[row] == "RUNNING" for row in rows) >= (2 if height == 16 else 4)
    assert on_screen(board, states, 80, 5) == ["0 of 100 done, 30 failed, 66 pending, 4 running"]


def test_where_there_is_no_terminal_a_line_names_what_has_changed_alone(tmp_path, monkeypatch):
    board = Board(tmp_path, [training(name, tmp_path) for name in "abcd"], local=True)
    course = [{"a": "done", "b": "PENDING", "c": "PENDING", "d": "PENDING"},
              {"a": "done", "b": "PENDING", "c": "PENDING", "d": "PENDING"},
              {"a": "done", "b": "RUNNING", "c": "PENDING", "d": "PENDING"},
              {"a": "done", "b": "REQUEUED", "c": "PENDING", "d": "PENDING"},
              {"a": "done", "b": "RUNNING", "c": "PENDING", "d": "PENDING"},
              {"a": "done", "b": "done", "c": "failed", "d": "RUNNING"}, dict.fromkeys("abcd", "done")]  # fmt: skip
    turn = iter([0, 0, 1, 2, 3, 3, 4, 5, 6])
    monkeypatch.setattr(board, "states", lambda: course[next(turn)])
    monkeypatch.setattr(table, "_sleep_while_busy", lambda board: None)
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    assert table.watch(board, console) == 0
    assert console.export_text().splitlines() == [
        "1 of 4 done, 3 pending",
        "1 of 4 done, 2 pending, 1 running; b: RUNNING",
        "1 of 4 done, 2 pending, 1 requeued; b: REQUEUED",
        "1 of 4 done, 2 pending, 1 running; b: RUNNING",
        "2 of 4 done, 1 failed, 1 running; b: done; c: failed; d: RUNNING",
    ]  # fmt: skip
