"""The demo's parts side by side: needs, slots, what grows, what fails."""

import pytest
from rich.console import Console

from eval import jobs
from eval.jobs import Command, Job, last_value, run_all, startable


def job(name, *needs, processes=1, grows=False, code="pass", root=None):
    return Job(name, lambda n: Command(["-c", code], root / f"{name}.log", 1, lambda: 0), needs, processes, grows)


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
    assert slow.running[0].poll() is not None


def test_the_latest_value_is_read_from_a_file_that_grows(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert last_value(path, "loss") == ""
    path.write_text('{"loss": 2}\n{"reward": null, "loss": 1.25}\n')
    assert last_value(path, "reward", "loss") == "loss 1.250"
    path.write_text('{"loss": 2}\n{"rew')
    assert last_value(path, "loss") == "" and jobs.lines_of(path) == 2
