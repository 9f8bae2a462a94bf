"""A run that never earns the format reward says so once, with the remedy that fits."""

import pytest

from megatron_avatar.config.schema import DataConfig
from megatron_avatar.records import Completion, Trajectory
from megatron_avatar.training.format_watch import STEPS, FormatWatch


def fresh(earned: float = 0.0, finished: bool = True) -> list[Trajectory]:
    parts = {"format": earned, "accuracy": 0.0}
    return [Trajectory("s", "plain", Completion([1], [0.0], finished), 0.0, parts, 0.0, "", "", 0, 0)] * 4


def said(watch: FormatWatch, steps: int, data: DataConfig, **kwargs) -> list[str]:
    return [words for _ in range(steps) if (words := watch.see(fresh(**kwargs), data))]


@pytest.mark.parametrize(
    ("data", "finished", "named", "unnamed"),
    [
        (DataConfig(instruction=""), True, "data.instruction is empty", "max_new_tokens"),
        (DataConfig(), True, "doesn't follow data.instruction", "is empty"),
        (DataConfig(), False, "100% of them were cut off: raise rl.sampling.max_new_tokens", "is empty"),
    ],
)
def test_fifty_steps_without_it_are_said_once(data, finished, named, unnamed):
    watch = FormatWatch()
    assert said(watch, STEPS - 1, data, finished=finished) == []
    continued = FormatWatch()
    continued.load_state_dict(watch.state_dict())  # a run that was stopped in between
    for own in (watch, continued):
        (words,) = said(own, STEPS, data, finished=finished)
        assert words.startswith(f"NO FORMAT REWARD IN {STEPS} STEPS: none of {4 * STEPS} completions")
        assert named in words and unnamed not in words and "recipe=sft_7b" in words


def test_one_completion_that_earns_it_is_enough():
    watch = FormatWatch()
    assert said(watch, 3, DataConfig()) + said(watch, 1, DataConfig(), earned=1.0) + said(watch, 99, DataConfig()) == []


def test_steps_whose_prompts_were_all_set_aside_say_nothing():
    watch = FormatWatch()
    assert [watch.see([], DataConfig()) for _ in range(STEPS + 1)] == [""] * (STEPS + 1)
