"""What answers cost: foreign code is given up in time, its machine's faults are raised, and long texts stay cheap."""

import sys
from concurrent.futures import Future
from functools import partial

import pytest

from megatron_avatar.records import Sample
from megatron_avatar.rl.rewards import accuracy, accuracy_reward, read_answer, units
from megatron_avatar.rl.rewards import bounded as rewards_bounded
from megatron_avatar.rl.rewards.accuracy import canonical
from megatron_avatar.rl.rewards.bounded import bounded
from megatron_avatar.rl.rewards.symbolic import latex_equal
from tests.costs import costs_its_length
from tests.rl import foreign
from tests.rl.reward_cases import CHOICES


def make(problem_type, answer, choices=()):
    return Sample("id", "stage1", "train", "what", "?", answer, problem_type, choices)


def test_an_answer_that_never_ends_is_given_up(caplog):
    assert bounded(latex_equal, "2^{2^{2^{2^{2^{2}}}}}", "65537", deadline_s=2.0) is None
    assert "latex_equal failed" in caplog.text and bounded(latex_equal, "1/2", "0.5", deadline_s=20.0) is True


def test_waiting_for_a_busy_machine_costs_no_answer(caplog, monkeypatch):
    monkeypatch.setattr(rewards_bounded, "PATIENCE", 10_000)
    assert bounded(foreign.sleepy, 0.5, deadline_s=0.2) == "awake"
    assert bounded(foreign.endless, deadline_s=0.2) is None
    assert "endless failed on (): ProcessExpired" in caplog.text, "by its own processor time, not by the clock"


def test_who_waits_without_computing_is_given_up_by_the_clock(caplog):
    assert bounded(foreign.sleepy, 1000, deadline_s=1 / rewards_bounded.PATIENCE) is None
    assert "sleepy failed on (1000,): TimeoutError" in caplog.text


def test_what_the_machine_lacks_costs_no_answer_its_reward(monkeypatch):
    with pytest.raises(RuntimeError, match="unpacked needs a package that can't be imported here .*pip install"):
        bounded(foreign.unpacked)
    with pytest.raises(RuntimeError, match="no worker process could run dismissed .*code 3"):
        bounded(foreign.dismissed)
    assert bounded(foreign.broken) is None  # whatever else foreign code raises is about the text
    monkeypatch.setattr(rewards_bounded, "_pool", None)
    monkeypatch.setattr(rewards_bounded, "_begin", foreign.broken)
    with pytest.raises(RuntimeError, match="no worker process could run sleepy .*ulimit"):
        bounded(foreign.sleepy, 0.0)


def test_a_pool_that_breaks_before_it_takes_a_task_is_replaced(monkeypatch):
    """pebble then never answers: the task is in neither of its lists."""
    looks = iter([True])
    broken = type("Broken", (), {"active": property(lambda _: next(looks, False)),
                                 "schedule": lambda *_, **__: Future()})()  # fmt: skip
    monkeypatch.setattr(rewards_bounded, "_pool", broken)
    monkeypatch.setattr(rewards_bounded, "LOOK_S", 0.01)
    assert bounded(foreign.sleepy, 0.0) == "awake" and rewards_bounded._pool is not broken


def test_a_missing_unit_library_is_no_unknown_unit(monkeypatch):
    monkeypatch.setitem(sys.modules, "pint", None)
    units._registry.cache_clear(), units.known.cache_clear()
    with pytest.raises(ImportError):
        accuracy_reward("36 km/h", make("numerical", "10 m/s"))


LONG = ["\\frac{", "\\boxed{", " ", "\n", "1", "1 ", "111 ", "1,", "½", "²", "km/", "```\n", "**", "- ", "(4)", "选",
"A ", "B, ",
        "the answer is ", "twenty one ", "half a ", "1 million ", "not ", "三百", "a\u2003", "<answer>"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["multiple_choice", "numerical", "math", "ocr", "free_form", "code", "other"])
def test_a_long_answer_costs_no_more_than_its_length(kind, monkeypatch):
    """Whoever answers \\frac{ and thousands of blanks must not stop the interpreter, and with it the GPU.
    """
    monkeypatch.setattr(accuracy, "bounded", lambda function, *args: function(*args))
    gold = {"multiple_choice": "B", "free_form": "a dog barks twice at the red car"}.get(kind, "3 km")
    sample = make(kind, gold, CHOICES if kind == "multiple_choice" else ())
    accuracy_reward("1 m", sample), read_answer("1 m", sample)  # imports
    for piece in LONG:
        for text in (piece * (20_000 // len(piece)), "The answer is 1" + piece * (19_985 // len(piece))):
            for read in (accuracy_reward, canonical, lambda text, sample: read_answer(text, sample)):
                assert costs_its_length(partial(read, sample=sample), text), (piece, read)
