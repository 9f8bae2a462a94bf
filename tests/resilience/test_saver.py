"""Writing in the background: training goes on, errors come back, one job at a time."""

from __future__ import annotations

import threading

import pytest

from megatron_avatar.resilience.saver import Saver


def test_the_caller_goes_on_while_a_job_runs_and_waits_before_the_next():
    saver, release, done = Saver(), threading.Event(), []
    saver.start(lambda: (release.wait(10), done.append(1)))
    assert done == [] and not saver.failed
    threading.Timer(0.1, release.set).start()
    saver.start(lambda: done.append(2))
    assert done[0] == 1, "the second job must not begin before the first has ended"
    saver.finish()
    assert done == [1, 2] and saver.seconds >= 0
    saver.finish()  # nothing to wait for


def test_an_error_is_seen_at_once_and_raised_where_the_caller_waits():
    def full() -> None:
        raise OSError("disk full")

    saver = Saver()
    saver.start(full)
    saver._thread.join()
    assert saver.failed
    with pytest.raises(OSError, match="disk full"):
        saver.finish()
    assert not saver.failed
    saver.start(lambda: None)
    saver.finish()


def test_a_failing_process_gives_its_job_some_time_and_no_more():
    saver, release, done = Saver(), threading.Event(), []
    saver.settle(1)
    saver.start(lambda: (release.wait(10), done.append(1)))
    saver.settle(0.05)
    assert done == []
    release.set()
    saver.settle(10)
    assert done == [1]
