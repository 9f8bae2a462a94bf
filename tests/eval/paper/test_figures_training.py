"""The figures of a run: what is drawn is what was measured."""

import numpy as np
import pytest

from eval.paper.figures import series, training
from eval.paper.figures.style import LOOKS, to_svg
from eval.scoring.stats import Estimate
from tests.eval.made_up import rl_step, write_lines


@pytest.fixture(scope="module")
def metrics():
    return {name: [rl_step(name, s, 30) for s in range(30)] for name in ("grpo", "avatar")}


def test_all_figures_of_a_run(metrics):
    drawn = training.draw(metrics, {}, {})
    assert set(drawn) == {"curves", "solvability", "advantages", "surrogate_position", "tiers", "replay", "health",
                          "step_time"}  # fmt: skip
    assert drawn["replay"].axes[0].get_title(loc="left") == "Replayed completions without an advantage"
    lines = drawn["solvability"].axes[0].lines
    np.testing.assert_allclose(lines[0].get_ydata(), [r["solvability"] for r in metrics["grpo"]])
    assert training.step_time({"grpo": metrics["grpo"]}).axes[0].patches[-1].get_width() == pytest.approx(2.0 - 1.75)
    assert len(training.tiers(metrics["avatar"]).axes[0].collections) == 3


def test_what_no_run_measured_is_not_drawn():
    sft = [{"step": 1, "stage": "sft", "loss": 1.0}]
    assert training.tiers(sft) is None and training.curves({"sft": sft}, {"kl": "KL"}) is None
    assert training.draw({}, {}, {}) == {} and set(training.draw({"sft": sft}, {}, {})) == {"sft_loss"}


def test_a_familys_name_is_no_formula():
    figure = training.family_bars({"base": {r"$\frac{$": Estimate(0.5, 0.4, 0.6, 9)}}, {})
    assert "<svg" in to_svg(figure, "x")


def test_metrics_are_read_up_to_a_cut_line_and_gaps_are_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_lines(path, [{"step": 1, "kl": 0.5}, {"step": 2, "kl": None}, {"step": 3}, {"step": 4, "kl": 0.7}])
    path.write_text(path.read_text() + '{"step": 5, "k')
    steps, values = series.series(series.read_metrics(path), "kl")
    assert steps.tolist() == [1, 4] and values.tolist() == [0.5, 0.7]
    assert series.read_metrics(tmp_path / "none.jsonl") == []
    assert series.running_mean(np.array([1.0, 3.0, 5.0, 7.0]), window=2).tolist() == [1.0, 2.0, 4.0, 6.0]


def test_systems_are_told_apart_in_grey():
    def luminance(color):
        red, green, blue = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
        return 0.299 * red + 0.587 * green + 0.114 * blue

    shades = [luminance(LOOKS[name].color) for name in ("base", "sft", "grpo", "avatar")]
    assert all(a > b for a, b in zip(shades, shades[1:], strict=False))
    for part in ("line", "marker", "name"):
        assert len({getattr(look, part) for look in LOOKS.values()}) == len(LOOKS)
    assert len({(look.hatch, luminance(look.color) > 0.5) for look in LOOKS.values()}) == len(LOOKS)
