"""The demo's parts side by side: needs, slots, what grows, what fails."""

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from eval import jobs
from eval.jobs import Command, Job, last_value, run_all, startable

ROOT = Path(__file__).parents[2]


def job(name, *needs, processes=1, grows=False, code="pass", root=None, start_by="forkserver"):
    """A job that runs `code`, by a module of its arguments' kind."""
    command = Command("tests.eval.one_line", [code], root and root / f"{name}.log", 1, lambda: 0)
    return Job(name, lambda n: command, needs, processes, grows, start_by)


def names(found):
    return [(job.name, processes) for job, processes in found]


def test_what_begins_depends_on_needs_and_on_free_slots():
    waiting = [job("sft", "data", processes=2), job("grpo", "sft"), job("avatar", "sft"), job("eval", "sft")]
    assert names(startable(waiting, [], 2)) == []
    assert names(startable(waiting, ["data"], 1)) == [] and names(startable(waiting, ["data"], 2)) == [("sft", 2)]
    assert names(startable(waiting[1:], ["sft"], 2)) == [("grpo", 1), ("avatar", 1)]


def test_one_that_grows_takes_what_nobody_else_waits_for():
    assert names(startable([job("last", grows=True)], [], 2)) == [("last", 2)]
    assert names(startable([job("last", grows=True), job("other")], [], 2)) == [("last", 1), ("other", 1)]


def test_jobs_run_in_order_and_what_is_done_is_left_alone(tmp_path):
    write = f"open({str(tmp_path / 'order')!r}, 'a').write(__import__('os').environ.get('RANK', '-'))"
    told = []
    run_all([job("a", code="raise SystemExit(1)", root=tmp_path), job("b", "a", code=write, root=tmp_path),
             job("c", "b", processes=2, code=write, root=tmp_path)], {"a"}, 2, Console(quiet=True),
            ended=lambda job, seconds, done: told.append((job.name, done)))  # fmt: skip
    assert told == [("b", True), ("c", True)] and sorted((tmp_path / "order").read_text()[1:]) == ["0", "1"]


def test_a_failure_ends_the_others_and_shows_the_end_of_its_log(tmp_path):
    slow = job("slow", code="import time; time.sleep(60)", root=tmp_path)
    with pytest.raises(SystemExit, match="bad failed with status 3; the end of .*bad.log:\nwhy it failed"):
        run_all([slow, job("bad", code="print('why it failed'); raise SystemExit(3)", root=tmp_path)], (), 2,
                Console(quiet=True), ended=lambda *_: None)  # fmt: skip
    assert slow.running[0].exitcode == -signal.SIGTERM


@pytest.mark.parametrize("start_by", ["forkserver", "spawn"])
def test_a_command_is_run_as_the_shell_would(tmp_path, start_by):
    """Its arguments, its place, its exit status, its words in its log; and a line that says that it has begun."""
    code = ("import os, sys; print(__name__, sys.argv[1:] == [__doc__], os.environ['COLUMNS']); "
            "print('err', file=sys.stderr)")  # fmt: skip
    said = Console(file=io.StringIO(), width=100)
    run_all([job("a", code=code, root=tmp_path, start_by=start_by)], (), 1, said, ended=lambda *_: None)
    assert (tmp_path / "a.log").read_text().split("\n")[:2] == ["__main__ True 120", "err"]
    assert said.file.getvalue().splitlines()[0] == "a: begins" and "a: done" in said.file.getvalue()


def test_what_is_read_ahead_is_there_when_a_job_begins(tmp_path):
    """In a process of its own, as a fork server is begun once."""
    code = f"""if __name__ == "__main__":
    from pathlib import Path
    from rich.console import Console
    from eval.forked import read_ahead
    from eval.jobs import run_all
    from tests.eval.test_jobs import job
    read_ahead(modules=["wave"])
    run_all([job("a", code="import sys, os; print('wave' in sys.modules, os.environ['OMP_WAIT_POLICY'])",
                 root=Path({str(tmp_path)!r}))], (), 1, Console(quiet=True), ended=lambda *_: None)
"""
    script = tmp_path / "script.py"
    script.write_text(code)
    subprocess.run([sys.executable, script], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, timeout=120)
    assert (tmp_path / "a.log").read_text() == "True PASSIVE\n"


def test_jobs_end_with_who_started_them_however_that_ends(tmp_path):
    code = f"""if __name__ == "__main__":
    from pathlib import Path
    from rich.console import Console
    from eval.jobs import run_all
    from tests.eval.test_jobs import job
    code = "import os, time; open('{tmp_path}/pid', 'w').write(str(os.getpid())); time.sleep(300)"
    run_all([job("a", code=code, root=Path({str(tmp_path)!r}))], (), 1, Console(quiet=True), ended=lambda *_: None)
"""
    script, file = tmp_path / "script.py", tmp_path / "pid"
    script.write_text(code)
    parent = subprocess.Popen([sys.executable, script], env={**os.environ, "PYTHONPATH": str(ROOT)})
    while not (file.exists() and file.read_text()):
        assert parent.poll() is None
        time.sleep(0.05)
    child = psutil.Process(int(file.read_text()))
    parent.kill()
    parent.wait()
    child.wait(timeout=60)


def test_the_latest_value_is_read_from_a_file_that_grows(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert last_value(path, "loss") == ""
    path.write_text('{"loss": 2}\n{"reward": null, "loss": 1.25}\n')
    assert last_value(path, "reward", "loss") == "loss 1.250"
    path.write_text('{"loss": 2}\n{"rew')
    assert last_value(path, "loss") == "" and jobs.lines_of(path) == 2
