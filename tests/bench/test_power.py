"""The power of a study: its draws against what they are drawn from, its test against the nominal level."""

from __future__ import annotations

import json

import numpy as np
import pytest

from bench import power


def test_answers_have_the_shares_that_are_asked_for():
    first, second = power.answers(20, 4000, 0.05, np.random.default_rng(0))
    assert first.mean() == pytest.approx(power.RIGHT, abs=0.03)
    assert (second - first).mean() == pytest.approx(0.05, abs=0.03)


def test_seeds_deviate_as_in_the_first_study():
    rng = np.random.default_rng(0)
    drawn = [np.subtract(*power.answers(5, 396, 0.0, rng)).mean(axis=1) for _ in range(60)]
    assert 100 * np.mean([d.var(ddof=1) for d in drawn]) ** 0.5 == pytest.approx(3.5, abs=0.4)


@pytest.mark.parametrize(("deviation", "items"), [(4.7, 630), (3.5, 630), (6.0, 150)])
def test_seeds_deviate_as_they_are_told_to(deviation, items):
    rng, seed = np.random.default_rng(1), power.seed_of(deviation / 100, items)
    drawn = [np.subtract(*power.answers(16, items, 0.0, rng, seed)).mean(axis=1) for _ in range(60)]
    assert 100 * np.mean([d.var(ddof=1) for d in drawn]) ** 0.5 == pytest.approx(deviation, rel=0.1)


def test_nothing_is_shown_one_time_in_twenty_and_much_always():
    assert power.power(5, 200, 0.0, questions=1, repetitions=200) < 0.12
    assert power.power(5, 200, 0.25, questions=1, repetitions=40) == 1
    small, large = (power.power(n, 200, 0.05, questions=1, repetitions=100) for n in (4, 16))
    assert large > small + 0.2


def test_the_command_says_what_is_enough(capsys, monkeypatch):
    monkeypatch.setattr(power, "REPETITIONS", 20)
    assert power.main(["--effect", "20", "--seeds", "2", "8", "--items", "60", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [cell["seeds"] for cell in told["cells"]] == [2, 8]
    assert told["first_enough"] == next(cell for cell in told["cells"] if cell["power"] >= 0.8)
    with pytest.raises(SystemExit):
        power.main(["--seeds", "1"])
    for few in ("1", "-9"):
        with pytest.raises(SystemExit):  # chance alone is more
            power.main(["--deviation", few, "--items", "60"])
    assert "over 60 items chance in single answers alone makes " in capsys.readouterr().err
