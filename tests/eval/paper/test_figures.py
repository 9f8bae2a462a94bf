"""Curves out of metrics, and the paper's figures: what is drawn is what was put in."""

import numpy as np
import pytest

from eval.paper.figures import paper
from eval.paper.figures.series import (
    Advantages,
    Band,
    Reach,
    advantage_counts,
    band,
    broken,
    completions_to_reach,
    group_position,
    mean_bins,
    position_band,
    stage_curve,
)
from eval.scoring.stats import Estimate


def flat(values, seeds=1):
    values = np.array(values, float)
    return Band(np.arange(len(values), dtype=float), values, values, values, seeds)


def steps(stage, rewards, start=0, before=0, each=4):
    return [
        {"step": start + i + 1, "stage": stage, "accuracy/turn": r, "completions_generated": before + each * (i + 1)}
        for i, r in enumerate(rewards)
    ]


# ---- series -----------------------------------------------------------------------------------------------------


def test_a_band_is_mean_and_range_where_all_seeds_are():
    first = (np.array([1.0, 2, 3]), np.array([0.1, 0.2, 0.3]))
    second = (np.array([1.0, 2, 4]), np.array([0.3, 0.6, 0.9]))
    found = band([first, second])
    np.testing.assert_allclose(found.x, [1, 2])
    np.testing.assert_allclose(found.mean, [0.2, 0.4])
    np.testing.assert_allclose(found.low, [0.1, 0.2])
    np.testing.assert_allclose(found.high, [0.3, 0.6])
    assert found.seeds == 2
    assert band([(np.array([]), np.array([]))]) is None and band([first, (np.array([9.0]), np.array([1.0]))]) is None


def test_a_curve_is_interrupted_where_a_stage_begins():
    found = broken(flat([1, 2, 3, 4]), [0, 2, 9])
    np.testing.assert_array_equal(found.mean, [1, 2, np.nan, 3, 4])
    np.testing.assert_array_equal(found.x, [0, 1, np.nan, 2, 3])


def test_bins_without_tokens_are_gaps():
    np.testing.assert_array_equal(mean_bins([[1, None, None], [3, None, 4], None]), [2, np.nan, 4])
    assert mean_bins([None, []]) is None and mean_bins([[None, None]]) is None


def test_completions_to_reach_count_from_the_stages_start():
    grpo = steps("a", [0.2, 0.4, 0.4], each=8) + steps("b", [0.5, 0.9, 0.9], 3, 24, each=8)
    avatar = steps("a", [0.1, 0.3, 0.5, 0.9]) + steps("b", [0.9, 0.1, 0.1], 4, 16)
    first, second = completions_to_reach(avatar, grpo, window=2)
    # Means of two: 0.2 0.4 (step 3, of 12 completions) 0.7 against (0.4 + 0.4) / 2.
    assert first == Reach("a", pytest.approx(0.3), pytest.approx(0.4), 24, 12, 8, 16) and first.share == 0.5
    # The single 0.9 of step 1 is no mean of two: never reached.
    assert second == Reach("b", pytest.approx(0.7), pytest.approx(0.9), 24, None, 8, 12) and second.share is None
    np.testing.assert_array_equal(stage_curve(avatar, "b", "accuracy/turn", 2).completions, [4, 8, 12])
    assert first.rose and second.rose
    fallen, = completions_to_reach(avatar, steps("a", [0.6, 0.4, 0.2], each=8), window=2)
    assert not fallen.rose, "below its own beginning: nothing to reach"
    assert completions_to_reach(avatar, grpo[:1], window=2) == []  # shorter than the window: no final reward


def test_sampled_groups_have_the_weightings_shape():
    rewards, length, size = [0.0, 0.0, 1.0, 1.0], 2001, 0.5 / (np.sqrt(1 / 3) + 1e-4)  # |A| by hand
    groups = [(rewards, [length] * 4), ([1.0] * 4, [length] * 4)]  # the second has no signal: half of the tokens are 0
    np.testing.assert_allclose(group_position(groups, ("uniform", 0.3)), size / 2, rtol=1e-5)
    place = np.linspace(0, 1, length)
    inside = np.minimum((place * 20).astype(int), 19)
    parabola = [np.mean(1 + 0.3 * (2 * place[inside == b] - 1) ** 2) for b in range(20)]
    np.testing.assert_allclose(group_position(groups, ("parabolic", 0.3)), size / 2 * np.array(parabola), rtol=1e-4)
    assert group_position([], ("uniform", 0.3)) is None
    assert np.isnan(group_position([(rewards, [1] * 4)], ("uniform", 0.3))[1:]).all()  # one token: it is the first


def test_vanished_groups_are_counted_over_steps_and_seeds():
    edges = [-1.0, 0.0, 1.0]
    one = [{"advantages": {"edges": edges, "on": [2, 8], "off": [1, 0]}, "vanished": 0.5}]
    two = [{"advantages": {"edges": edges, "on": [10, 20], "off": [0, 3]}, "vanished": 0.1}, {"step": 2}]
    found = advantage_counts([one, two])
    np.testing.assert_array_equal(found.on, [12, 28])
    np.testing.assert_array_equal(found.off, [1, 3])
    assert found.vanished == pytest.approx(0.5 * 10 + 0.1 * 30) and found.vanished_share == pytest.approx(8 / 40)
    assert advantage_counts([[{"step": 1}]]) is None


# ---- figures ----------------------------------------------------------------------------------------------------


def labelled(axes):
    return {line.get_label(): line for line in axes.lines}


def test_figure_1_lies_on_the_weighting():
    place = (np.arange(20) + 0.5) / 20
    logged = [{"surrogate_position": (0.7 * (1 + 0.3 * (2 * place - 1) ** 2)).tolist()}]
    curve = position_band([logged, logged])
    figure = paper.position({"training": {"avatar": curve, "grpo": flat([0.5] * 3)}}, {"avatar": ("parabolic", 0.3)})
    lines = labelled(figure.axes[0])
    np.testing.assert_allclose(lines["AVATAR"].get_xdata(), place)
    np.testing.assert_allclose(lines["AVATAR"].get_ydata(), logged[0]["surrogate_position"])
    x, y = lines["AVATAR, weighting"].get_data()
    np.testing.assert_allclose(y, 0.7 * (1 + 0.3 * (2 * x - 1) ** 2), rtol=1e-4)
    assert "GRPO, weighting" not in lines and lines["GRPO"].get_linestyle() == "--"
    assert paper.position({"training": {}}, {}) is None


def test_a_sweep_shows_values_and_intervals_in_order():
    cells = {"0.3": Estimate(0.6, 0.5, 0.65, 9), "0": Estimate(0.4, 0.35, 0.5, 9)}
    figure = paper.sweep({"video": {"MMVU": cells}, "sound": {"MMVU": {}}}, ["0", "0.1", "0.3"], "λ", "0.3")
    assert [axes.get_title("left") for axes in figure.axes] == ["video"]
    line, _, (bars,) = figure.axes[0].containers[0]
    assert np.array(line.get_data(), float).tolist() == [[0, 2], [0.4, 0.6]]  # no value where nothing was measured
    np.testing.assert_allclose([s[:, 1] for s in bars.get_segments()], [[0.35, 0.5], [0.5, 0.65]])
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["0", "0.1", "0.3"]
    assert paper.sweep({"video": {"MMVU": {}}}, ["0"], "λ", "0") is None


def test_lines_of_one_panel_do_not_lie_on_each_other():
    cells = {"0": Estimate(0.4, 0.3, 0.5, 9)}
    figure = paper.sweep({"video": {name: cells for name in "ABCDEF"}}, ["0"], "λ", "0")
    lines = [container[0] for container in figure.axes[0].containers]
    assert len({float(line.get_xdata()[0]) for line in lines}) == 6
    assert len({line.get_marker() for line in lines}) == len({line.get_color() for line in lines}) == 6
    assert [t.get_text() for t in figure.legends[0].get_texts()] == list("ABCDEF")


def test_bands_over_training():
    curve = Band(np.array([1.0, 2.0]), np.array([0.2, 0.3]), np.array([0.1, 0.3]), np.array([0.3, 0.4]), 3)
    panels = {"left": {"avatar": curve, "grpo": flat([0.1, 0.2])}, "right": {}}
    figure = paper.over_training(panels, "solved", stages={"a": 1, "b": 2})
    axes = figure.axes[0]
    np.testing.assert_allclose(labelled(axes)["AVATAR"].get_ydata(), [0.2, 0.3])
    assert len(figure.axes) == 1 and len(axes.collections) == 1  # a single seed has no band
    corners = axes.collections[0].get_paths()[0].vertices
    assert {(1.0, 0.1), (1.0, 0.3), (2.0, 0.3), (2.0, 0.4)} <= {tuple(c.round(6)) for c in corners}
    assert [t.get_text() for t in axes.texts] == ["a", "b"]
    assert paper.over_training({"left": {}}, "solved") is None


def test_vanished_groups_stand_out_at_zero():
    found = Advantages(np.array([-1.0, 0.0, 1.0]), np.array([4.0, 6.0]), np.array([5.0, 5.0]), 5.0)
    figure = paper.advantages({"avatar": found})
    bars = [(p.get_x(), p.get_height(), p.get_y()) for p in figure.axes[0].patches if p.get_height() > 0]
    np.testing.assert_allclose(bars, [
        (0, 0.25, 0), (-1, 0.2, 0), (0, 0.05, 0.25), (-1, 0.25, 0.2), (0, 0.25, 0.3),
    ])  # fmt: skip
    assert "50 % of the fresh without" in figure.axes[0].get_title("left") and paper.advantages({}) is None


def test_gains_are_in_points():
    bins = {"to 9": Estimate(0.1, -0.05, 0.2, 8), "over 9": Estimate(0, 0, 0, 4)}
    figure = paper.gain_by_length({"A": bins}, "tokens")
    axes = figure.axes[0]
    assert [p.get_height() for p in axes.patches] == pytest.approx([10, 0])
    segment, _ = axes.containers[1][2][0].get_segments()
    np.testing.assert_allclose(segment[:, 1], [-5, 20])
    assert [t.get_text() for t in axes.get_xticklabels()] == ["to 9\nn = 8", "over 9\nn = 4"]
    assert paper.gain_by_length({"A": {}}, "tokens") is None


def test_the_target_and_the_passage_are_marked():
    found = (("a", 0.4, 30), ("a", 0.6, None), ("b", 0.9, 10))
    reached = [Reach(stage, 0.1, target, 80, at, 5, 40) for stage, target, at in found]
    figure = paper.sample_efficiency({"a": {"avatar": flat([0.1, 0.5])}, "c": {"grpo": flat([0.1])}}, reached)
    lines = labelled(figure.axes[0])
    np.testing.assert_allclose(lines["GRPO's final accuracy"].get_ydata(), 0.5)  # mean of the seeds' targets
    np.testing.assert_allclose(lines["AVATAR first there, each seed"].get_data(), [[30], [0.5]])
    assert "GRPO's final accuracy" not in labelled(figure.axes[1]) and paper.sample_efficiency({}, reached) is None
