"""A reproduction's folder becomes figures: what compares, what is left out, what is written."""

import itertools
import json
import shutil
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread

from eval.asking.items import Item, item_to_dict
from eval.figures import main
from eval.paper.figures import comparison, completions, from_metrics, from_predictions, gain
from eval.paper.figures.build import FIGURES, build
from eval.paper.figures.entry import published
from eval.paper.figures.folder import Folder, comparable
from eval.paper.figures.gain import gain_bins
from eval.paper.figures.side_by_side import COLUMN, LINES, Clip, side_by_side
from eval.paper.figures.style import to_svg
from eval.scoring.predictions import read_predictions
from megatron_avatar.records import Sample
from tests.eval.made_up import write_clip, write_lines
from tests.eval.made_up_reproduction import (
    ITEMS,
    LAMBDA,
    ON_OFF,
    PACE,
    SEEDS,
    SKILL,
    UPDATES,
    write_predictions,
    write_reproduction,
    write_training,
)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return write_reproduction(tmp_path_factory.mktemp("reproduction"))


def accuracy(out, system, seed, folder=""):
    path = out / "predictions" / "tiny" / system / f"seed_{seed}" / folder / "held_out.ours.jsonl"
    return np.mean([p["scores"]["accuracy"] for p in read_predictions(path)])


def drawn(axes, name):
    line = next(line for line in axes.lines if line.get_label() == name)
    return np.array(line.get_xdata(), float), np.array(line.get_ydata(), float)


def panel(figure, title):
    return next(axes for axes in figure.axes if axes.get_title("left") == title)


# ---- what compares ----------------------------------------------------------------------------------------------


def test_only_trainings_of_equal_length_and_seeds_compare(tmp_path):
    for seed in (10, 11):
        write_training(tmp_path, "avatar", seed, updates=60)
    write_training(tmp_path, "tas_lambda_lam_0", 10, updates=30)
    write_training(tmp_path, "tas_lambda_lam_0.1", 10, updates=30)
    found = comparable(Folder(tmp_path, "tiny"), from_predictions.LAMBDA)
    assert set(found.trainings) == {"0", "0.1"} and found.updates == 30 and found.seeds == [10]
    assert found.notes == ["0.3 is left out: its runs made 60 updates, the others 30."]
    for seed in (10, 11):
        write_training(tmp_path, "tas_lambda_lam_0.3", seed, updates=30)
    found = comparable(Folder(tmp_path, "tiny"), from_predictions.LAMBDA)
    assert set(found.trainings) == {"0", "0.1", "0.3"} and found.seeds == [10] and found.notes == []
    assert found.system("0.3") == "tas_lambda_lam_0.3"
    assert comparable(Folder(tmp_path, "vl_7b"), from_predictions.LAMBDA).trainings == {}


def test_a_link_counts_as_the_system_that_it_leads_to(tmp_path):
    write_training(tmp_path, "components_avatar", 10, updates=30)
    write_training(tmp_path, "tas_lambda_lam_0.1", 10, updates=30)
    write_predictions(tmp_path, "components_avatar", 10, 0.9)
    write_predictions(tmp_path, "tas_lambda_lam_0.1", 10, 0.4)
    for kind in ("runs", "predictions"):
        link = tmp_path / kind / "tiny" / "tas_lambda_lam_0.3" / "seed_10"
        link.parent.mkdir()
        link.symlink_to("../components_avatar/seed_10")
    entry = from_predictions.tas_lambda(Folder(tmp_path, "tiny"))
    assert len(entry.figure.axes[0].containers[0][0].get_xdata()) == 2
    assert set(entry.sources["systems"]) == {"components_avatar", "tas_lambda_lam_0.1"}


def test_the_same_configuration_stands_in_where_a_sweep_left_it_out(out):
    found = comparable(Folder(out, "tiny"), from_predictions.ON_OFF)
    assert found.system("4") == "avatar" and found.system("0") == "on_off_ratio_on8_off0"
    assert found.seeds == [10] and len(found.trainings) == 8


# ---- figures ----------------------------------------------------------------------------------------------------


def test_figure_1_is_flat_for_grpo_and_parabolic_for_avatar(out):
    entry = from_predictions.position(Folder(out, "tiny"))
    place = (np.arange(20) + 0.5) / 20
    x, y = drawn(panel(entry.figure, "training"), "AVATAR")
    np.testing.assert_allclose(x, place)
    np.testing.assert_allclose(y, 0.51 * (1 + 0.3 * (2 * place - 1) ** 2))  # 0.5 and 0.52: mean of the seeds
    np.testing.assert_allclose(drawn(panel(entry.figure, "training"), "GRPO")[1], 0.51)
    sampled = panel(entry.figure, "sampled groups, held-out samples")
    _, grpo = drawn(sampled, "GRPO")
    assert np.ptp(grpo) < 0.03 * grpo.mean()
    _, avatar = drawn(sampled, "AVATAR")
    assert min(avatar[0], avatar[-1]) > 1.2 * avatar[8:12].mean()
    assert "by construction" in entry.caption and "Published shape: GRPO: flat" in entry.caption
    assert any(file.endswith("held_out.ours-g8.jsonl") for file in entry.sources["files"])


def test_figure_1_has_a_panel_for_what_is_weighted_between_the_tags(tmp_path):
    """A sweep's member has it where AVATAR is weighted over the whole completion; no system stands in both panels."""
    for system in ("grpo", "avatar", "shaping_between_tags"):
        write_training(tmp_path, system, 10)
    swept = tmp_path / "runs" / "tiny" / "shaping_between_tags" / "seed_10"
    (swept / "config.yaml").write_text(
        json.dumps({"rl": {"shaping": {"shape": "parabolic", "lam": 0.3, "span": "between_tags"}}})
    )
    lines = [json.loads(line) for line in (swept / "metrics.jsonl").read_text().splitlines()]
    write_lines(swept / "metrics.jsonl", [line | {"surrogate_position": [0.75] * 20} for line in lines])
    entry = from_predictions.position(Folder(tmp_path, "tiny"))
    np.testing.assert_allclose(drawn(panel(entry.figure, from_predictions.BETWEEN), "AVATAR")[1], 0.75)
    assert drawn(panel(entry.figure, "training"), "AVATAR")[1][0] < 0.7
    assert "Between the tags: places count over the reasoning and the answer alone." in entry.caption
    shutil.rmtree(swept)
    assert "Between the tags" not in from_predictions.position(Folder(tmp_path, "tiny")).caption


def test_figure_2_shows_the_headlines(out):
    entry = from_predictions.on_off_ratio(Folder(out, "tiny"))
    x, y = np.array(panel(entry.figure, "held-out samples").containers[0][0].get_data(), float)
    systems = [f"on_off_ratio_on{8 - off}_off{off}" for off in range(8)]
    expected = [accuracy(out, s if s in ON_OFF else "avatar", 10) for s in systems]
    np.testing.assert_allclose(x, range(8))
    np.testing.assert_allclose(y, expected)
    assert "Seed 10." in entry.caption and "peak at 4 on / 4 off" in entry.caption
    assert entry.sources["protocol"] == "ours" and entry.sources["systems"]["avatar"]["seeds"] == [10]


def test_figure_4_has_a_panel_for_each_stage(out):
    entry = from_predictions.tas_lambda(Folder(out, "tiny"))
    titles = [axes.get_title("left") for axes in entry.figure.axes]
    assert titles == ["held-out, visual", "held-out, audio-visual", "held-out, localisation"]
    assert all(len(axes.containers[0][0].get_xdata()) == 7 for axes in entry.figure.axes)


def test_figure_3_starts_anew_in_each_stage(out):
    entry = from_metrics.solvability(Folder(out, "tiny"))
    x, y = drawn(entry.figure.axes[0], "AVATAR w/o hints")
    assert np.isnan(y).sum() == 2 and np.nanmax(x) == 60
    np.testing.assert_allclose(y[[0, 21]], 0.75 * 0.2 + 0.005)  # mean of the seeds, at the start of two stages
    assert [line.get_label() for line in entry.figure.axes[0].lines[:3]] == ["GRPO", "AVATAR w/o hints", "AVATAR"]


def test_figure_5_goes_from_the_cold_start_to_the_end(out):
    entry = from_predictions.over_training(Folder(out, "tiny"))
    x, y = drawn(panel(entry.figure, "held-out samples"), "AVATAR")
    np.testing.assert_allclose(x, [0, 20, 40, 60])
    places = [("sft", ""), ("avatar", "step_20"), ("avatar", "step_40"), ("avatar", "")]
    np.testing.assert_allclose(y, [np.mean([accuracy(out, s, seed, f) for seed in SEEDS]) for s, f in places])
    x, y = drawn(panel(entry.figure, "held-out samples of the stage, in training"), "GRPO")
    np.testing.assert_allclose(y[~np.isnan(y)][0], 0.3 + 0.3 * 0.5 * 9 / 60)


def test_what_training_logs_is_drawn_for_both(out):
    entry = from_metrics.training(Folder(out, "tiny"))
    _, y = drawn(panel(entry.figure, "groups without a signal"), "GRPO")
    np.testing.assert_allclose(y[~np.isnan(y)], 0.4)


def test_families_stand_beside_each_other(out):
    entry = from_predictions.families(Folder(out, "tiny"))
    heights = [bar.get_height() for bars in entry.figure.axes[0].containers if hasattr(bars, "patches") for bar in bars]
    means = [np.mean([accuracy(out, system, seed) for seed in SEEDS]) for system in ("sft", "grpo", "avatar")]
    np.testing.assert_allclose(heights, means)  # all made-up samples are of one family


def test_completions_to_grpos_reward_are_told_for_each_stage(out):
    entry = from_metrics.sample_efficiency(Folder(out, "tiny"))
    reached = from_metrics.reach(Folder(out, "tiny"))
    assert [(s, r.stage) for s, r in reached[:3]] == [(10, "visual"), (10, "audio_visual"), (10, "localisation")]
    assert all(0 < r.share < 0.5 for _, r in reached)  # half the completions, and twice the pace
    took = np.mean([r.completions for _, r in reached if r.stage == "visual"])
    assert f"final accuracy with 2 of 2 seeds, on average after {took:,.0f} completions" in entry.caption


def test_gains_are_of_the_same_items_in_bins_of_both_systems_lengths():
    def line(item, right, tokens, error=None):
        return {"id": item, "k": 0, "scores": {"accuracy": right}, "tokens": tokens, "error": error, "groups": {}}

    first = {1: [line("a", 1, 100), line("b", 1, 300), line("c", 0, 900), line("d", 0, 0, "no media")]}
    second = {1: [line("a", 0, 290), line("b", 1, 301), line("c", 1, 400), line("d", 0, 0, "no media")]}
    found = gain_bins(first, second, (200, 400, 600))
    # Mean lengths 195, 300.5 and 650; d was never answered and has none.
    assert {name: (d.value, d.n) for name, d in found.items()} == {
        "to 200": (1, 1), "200–400": (0, 1), "over 600": (-1, 1),
    }  # fmt: skip
    quartiles = gain_bins(first, second, None)
    assert sum(d.n for d in quartiles.values()) == 3 and gain_bins({1: []}, {1: []}, None) == {}


def test_the_gain_of_tas_adds_up_to_the_difference_of_accuracies(out):
    entry = gain.tas_gain_by_length(Folder(out, "tiny"))
    heights = [p.get_height() for p in entry.figure.axes[0].patches]
    difference = np.mean([accuracy(out, "avatar", s) - accuracy(out, "components_wo_tas", s) for s in SEEDS])
    assert len(heights) == 4 and np.mean(heights) == pytest.approx(100 * difference)  # quartiles of equal size
    assert "binned by their mean completion length" in entry.caption


def test_figure_8_is_not_chosen_by_who_is_right(out, tmp_path):
    entry = comparison.comparison(Folder(out, "tiny"))
    assert entry.caption.startswith("s0, the first of held-out samples in their own order")
    assert "<b>clip" not in entry.page and "&lt;b&gt;clip" in entry.page
    assert entry.page.count("data:image/jpeg") == 8 and 'aria-label="waveform"' in entry.page
    again = tmp_path / "again"
    shutil.copytree(out / "data", again / "data")
    for system in ("grpo", "avatar"):
        write_predictions(again, system, 10, 1.0 - SKILL[system])
    assert "s0, the first of held-out samples" in comparison.comparison(Folder(again, "tiny")).caption
    shown = [text.get_text() for axes in entry.figure.axes for text in axes.texts]
    assert max(len(row) for text in shown for row in text.split("\n")) <= 118 and any("$at$" in text for text in shown)


def test_a_long_completion_is_wrapped_and_its_cut_is_told():
    text = "\n".join(["word " * 40] * 30) + "\x00" + "y" * 200
    answer = {"text": text, "error": None, "scores": {"accuracy": 1.0}}
    sample = Sample("s", "visual", "eval", "what", "Q?", "A", "other")
    figure = side_by_side(Clip(sample, [], None, ["no sound track"], [("GRPO", answer), ("AVATAR", None)]))
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    rows = texts[2].split("\n")
    assert len(rows) == LINES + 1 and max(map(len, rows)) <= COLUMN
    assert rows[-1] == "[63 more lines]"  # of 29 · 4 and, with the word that no line holds, 7
    assert texts[1] == "no sound track" and texts[3] == "not measured"
    assert "<svg" in to_svg(figure, "x")


def test_figure_8_of_a_benchmark_takes_its_first_item_with_sound(out, tmp_path):
    folder = tmp_path / "benchmarks" / "worldsense"
    media = write_clip(folder)
    items = [Item("mute", "choice", "Q?", "A", media=(replace(media, audio_path=None),)),
             Item("s3", "choice", "Who speaks?", "B", choices=("a", "b"), groups={"domain": ("Music",)},
                  media=(media,)),
             Item("s4", "choice", "Q?", "A", media=(media,))]  # fmt: skip
    write_lines(folder / "items.jsonl", [item_to_dict(item) for item in items])
    (folder / "dataset.json").write_text("{}")
    for system in ("grpo", "avatar"):
        write_predictions(tmp_path, system, 10, 0.5, benchmark="worldsense")
    entry = comparison.comparison(Folder(tmp_path, "tiny"))
    assert entry.caption.startswith("s3, the first of WorldSense")
    assert "Who speaks?" in entry.page and "WorldSense, Music: A. a, B. b" in " ".join(entry.page.split())


# ---- completions ------------------------------------------------------------------------------------------------


def test_systems_stand_by_what_they_generated_on_the_seeds_that_all_have(out, tmp_path):
    entry = completions.by_completions(Folder(out, "tiny"))
    assert "Seed 10." in entry.caption and "sft" not in entry.sources["systems"], "the sweeps have one seed"
    assert "left out" not in entry.caption
    lines = {line.get_label(): line for line in entry.figure.axes[0].lines}
    (x,), (y,) = lines[completions.KINDS[0]].get_data()
    assert x == 128 * UPDATES and y == pytest.approx(accuracy(out, "grpo", 10))
    assert len(lines[completions.KINDS[1]].get_xdata()) == 1, "8:0"
    assert len(lines[completions.KINDS[2]].get_xdata()) == len({*ON_OFF, *LAMBDA, *PACE}) - 2
    texts = {text.get_text() for text in entry.figure.axes[0].texts}
    assert {"grpo", "avatar", "wo_tas", "wo_hints", "5:3", "8:0", "λ 0.05"} <= texts


def test_what_lacks_the_seeds_of_most_runs_is_left_out(tmp_path):
    for seed in (10, 11, 12):
        for system in ("grpo", "avatar", "components_wo_tas"):
            write_training(tmp_path, system, seed, updates=60 if seed < 12 else 30)
            write_predictions(tmp_path, system, seed, 0.5)
    for system, seed in (("wo_revisits", 10), ("of_another_study", 77)):
        write_training(tmp_path, system, seed)
        write_predictions(tmp_path, system, seed, 0.5)
    entry = completions.by_completions(Folder(tmp_path, "tiny"))
    assert "Seeds 10, 11, 12." in entry.caption
    assert "Without these seeds or readable settings, so left out: of_another_study, wo_revisits." in entry.caption
    assert 64 * 50 in {x for line in entry.figure.axes[0].lines for x in line.get_xdata()}, "seeds' mean of completions"
    assert "fewer than 3" in completions.by_completions(Folder(tmp_path / "none", "tiny")).reason


@pytest.mark.parametrize(
    ("fresh", "kind", "settings"),
    [("grpo", 0, {}), ("grpo_revisits", 1, {"revisit_share": 0.5}), ("grpo_hints", 1, {"hints": {"enabled": True}})],
)
def test_fresh_completions_are_told_from_those_with_hints_or_revisits(tmp_path, fresh, kind, settings):
    for system in (fresh, "avatar", "components_wo_tas"):
        write_training(tmp_path, system, 10)
        write_predictions(tmp_path, system, 10, 0.5)
    path = tmp_path / "runs" / "tiny" / fresh / "seed_10" / "config.yaml"
    path.write_text(json.dumps({"rl": {"n_off": 0, "revisit_share": 0, "hints": {"enabled": False}} | settings}))
    for kind_of in ("runs", "predictions"):  # of the same settings, so it is the same run
        link = tmp_path / kind_of / "tiny" / "on_off_ratio_on4_off4" / "seed_10"
        link.parent.mkdir()
        link.symlink_to(tmp_path / kind_of / "tiny" / "avatar" / "seed_10")
    lines = completions.by_completions(Folder(tmp_path, "tiny")).figure.axes[0].lines
    found = {line.get_label(): len(line.get_xdata()) for line in lines if not line.get_label().startswith("_")}
    assert found == {completions.KINDS[kind]: 1, completions.KINDS[2]: 2}
    (tmp_path / "runs" / "tiny" / fresh / "seed_10" / "done.json").unlink()  # it goes on
    assert "fewer than 3" in completions.by_completions(Folder(tmp_path, "tiny")).reason


@given(st.dictionaries(st.integers(0, 7), st.sets(st.integers(0, 4), min_size=1), max_size=7))
def test_the_shared_seeds_give_the_most_runs_of_three_systems_or_more(seeds):
    every = itertools.chain.from_iterable(itertools.combinations(range(5), size) for size in range(1, 6))
    systems = {chosen: sum({*chosen} <= own for own in seeds.values()) for chosen in every}
    best = max((len(chosen) * number for chosen, number in systems.items() if number >= completions.FEWEST), default=0)
    found = completions._shared({str(name): own for name, own in seeds.items()})
    assert len(found) * sum({*found} <= own for own in seeds.values()) == best


DAMAGED = ["", "null", "[1]", "rl: null", "rl: {n_off: 0}", "{", "rl: ${nothing}", "rl:\n\t- x",
           "rl: {n_off: ???, revisit_share: 0, hints: {enabled: true}}",
           "rl: {n_off: 0, revisit_share: 0, hints: null}"]  # fmt: skip


@pytest.mark.parametrize("settings", [*DAMAGED, None])
def test_a_system_whose_settings_cannot_be_read_is_left_out_and_named(tmp_path, settings):
    for system in ("grpo", "avatar", "components_wo_tas", "odd"):
        write_training(tmp_path, system, 10)
        write_predictions(tmp_path, system, 10, 0.5)
    path = tmp_path / "runs" / "tiny" / "odd" / "seed_10" / "config.yaml"
    path.unlink() if settings is None else path.write_text(settings)
    assert completions.by_completions(Folder(tmp_path, "tiny")).caption.endswith("left out: odd.")


@given(st.lists(st.floats(0, 1), max_size=30).map(sorted), st.floats(0.001, 0.2))
def test_labels_keep_apart_and_close_to_their_points(values, gap):
    places = completions.spread(values, gap)
    assert len(places) == len(values) and np.isclose(sum(places), sum(values))
    assert all(b - a >= gap * (1 - 1e-6) for a, b in itertools.pairwise(places))
    for before, value, after, place in zip([-9, *values], values, [*values[1:], 9], places, strict=False):
        room = gap * len(values)  # of a block at the side of it, at most
        if value - before > room and after - value > room:
            assert np.isclose(place, value)


# ---- the folder -------------------------------------------------------------------------------------------------


def test_all_is_written_with_its_origin(out, capsys):
    assert main([str(out)]) == 0
    told = capsys.readouterr().out
    found = json.loads((out / "figures" / "figures.json").read_text())
    names = [entry["name"] for entry in found["figures"]]
    assert found["family"] == "tiny" and found["unmeasured"] == [] and len(names) == len(FIGURES) == 12
    for entry in found["figures"]:
        pixels = imread(out / entry["files"]["png"])[..., :3]
        assert pixels[0, 0].min() == 1.0 and pixels.std() > 0.05  # on white, and not empty
        assert ElementTree.parse(out / entry["files"]["svg"]).getroot().tag.endswith("svg")
        assert (out / entry["files"]["pdf"]).read_bytes().startswith(b"%PDF")
        assert entry["sources"]["files"] and all((out / file).exists() for file in entry["sources"]["files"])
        assert f"{entry['files']['svg']}: {entry['title']}" in told
    assert (out / "figures" / "figure8.html").exists()


def test_what_was_not_measured_is_listed_with_the_reason(tmp_path, capsys):
    write_training(tmp_path, "avatar", 10)
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "figure2.png").write_text("of an earlier time")
    found = build(tmp_path, "tiny")
    drawn_names = ["figure1", "figure3", "figure5", "training", "advantages", "sample_efficiency"]
    assert [e["name"] for e in found["figures"]] == drawn_names
    absent = {"figure2", "figure4", "families", "figure8", "tas_gain_by_length", "completions"}
    assert {e["name"] for e in found["unmeasured"]} == absent
    assert all(len(e["reason"]) > 20 for e in found["unmeasured"])
    assert not (tmp_path / "figures" / "figure2.png").exists()
    caption = next(e["caption"] for e in found["figures"] if e["name"] == "figure1")
    assert "no groups were sampled" in caption and "Seed 10." in caption


def test_partial_predictions_are_told(out, tmp_path):
    for system in ON_OFF:
        write_training(tmp_path, system, 10)
        write_predictions(tmp_path, system, 10, 0.5, items=ITEMS - 5 if system.endswith("off3") else ITEMS)
    caption = from_predictions.on_off_ratio(Folder(tmp_path, "tiny")).caption
    assert f"Partial: on_off_ratio_on5_off3, seed 10, held_out: {ITEMS - 5} of {ITEMS} items." in caption
    assert "Settings not measured: 4." in caption


def test_mistakes_are_told(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2 and "runs/FAMILY" in capsys.readouterr().err
    write_training(tmp_path, "avatar", 10)
    write_predictions(tmp_path, "avatar", 10, 0.5, folder="step_20")
    write_predictions(tmp_path, "avatar", 10, 0.5)
    (tmp_path / "predictions/tiny/avatar/seed_10/step_20/held_out.ours.meta.json").write_text("{")
    assert main([str(tmp_path)]) == 2 and "held_out.ours.meta.json" in capsys.readouterr().err


def test_the_papers_shapes_are_words():
    assert published("figure3").startswith("Published shape: GRPO: stalls near 40 %; AVATAR w/o hints")
    assert "1,600 completions with AVATAR" in published("sample_efficiency")
    assert "WorldSense + AV-Odyssey: 1.8, 3.2, 4.9, 5.5 points" in published("tas_gain_by_length")
    assert published("figure8") == "" and published("figure99") == ""
