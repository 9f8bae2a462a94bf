"""The words of the small study and its provenance, from made-up runs whose effects are known."""

import json
import re
import shutil
from pathlib import Path

import pytest

from eval import tables
from eval.paper.results import Results
from eval.paper.study import PLANNED, PLANNED_SWEEP, QUESTIONS, SWEEPS, _points, _word, study
from eval.reproduction import _again, build, provenance
from eval.scoring.stats import Difference
from slurm.profile import read_profile
from tests.eval.made_up_reproduction import write_predictions, write_reproduction, write_training
from tests.eval.test_report import Page


def found(value, low, high, p):
    return {**_points(Difference(value, low, high, 10, 2, p)), "holm": p}


def test_a_word_needs_an_interval_without_zero_and_a_small_p():
    assert _word(found(0.1, 0.05, 0.2, 0.01), 2) == "shown"
    assert _word(found(-0.1, -0.2, -0.05, 0.01), 2) == "reversed"
    assert _word(found(0.1, 0.0, 0.2, 0.01), 2) == _word(found(0.1, 0.05, 0.2, 0.05), 2) == "not shown"
    assert _word({}, 2) == "not measured"


def test_one_seed_or_a_part_of_them_gets_no_word():
    assert _word(found(0.1, 0.05, 0.2, 0.001), 5) == "2 of 5 seeds so far"
    assert _word({**found(0.1, 0.05, 0.2, 0.001), "seeds": 1}, 5) == "one seed: no test"


def test_effects_are_paired_by_seed_and_adjusted_inside_their_family(tmp_path):
    for seed in (10, 11, 12, 13):
        write_predictions(tmp_path, "avatar", seed, 0.9, items=48)
        write_predictions(tmp_path, "grpo", seed, 0.2, items=48)
        write_predictions(tmp_path, "grpo_half", seed, 0.2, items=48)
    write_predictions(tmp_path, "sft", 11, 0.2, items=48)
    effects = {effect["text"]: effect for effect in study(tmp_path)["effects"]}
    main = effects["AVATAR against GRPO, equal updates"]
    assert main["word"] == "4 of 16 seeds so far" and main["seeds"] == [10, 11, 12, 13] and main["found"]["n"] == 192
    assert sum(main["by_seed"].values()) / 4 == pytest.approx(main["found"]["value"])
    assert main["found"]["holm"] == pytest.approx(2 * main["found"]["p"]), "two primary questions"
    start = effects["AVATAR against its cold start"]
    assert start["seeds"] == [11] and start["found"]["n"] == 48, "a seed of one system alone is no pair"
    assert start["word"] == "one seed: no test" and effects["hints: against w/o hints"]["word"] == "not measured"


def test_what_is_not_measured_counts_in_the_adjustment(tmp_path):
    for system, skill in (("avatar", 0.9), ("grpo", 0.2)):
        write_predictions(tmp_path, system, 10, skill)
    main = study(tmp_path)["effects"][0]
    assert main["found"]["holm"] == pytest.approx(2 * main["found"]["p"])


def test_systems_that_made_other_numbers_of_updates_are_not_compared(tmp_path):
    for system, updates in (("avatar", 60), ("grpo", 30), ("grpo_half", 60)):
        write_training(tmp_path, system, 10, updates)
        write_predictions(tmp_path, system, 10, 0.5)
    first, second, *_ = study(tmp_path)["effects"]
    assert first["word"] == "not comparable: 60 and 30 updates" and second["word"] == "one seed: no test"
    write_training(tmp_path, "grpo_half", 10, 30)
    assert study(tmp_path)["effects"][1]["word"] == "not comparable: 3840 and 1920 completions"


def test_one_cold_start_stands_beside_every_seed(tmp_path):
    """Its folder of each other seed is a link: paired with each seed, read once."""
    write_predictions(tmp_path, "sft", 10, 0.2, items=48)
    for seed in (10, 11, 12):
        write_predictions(tmp_path, "avatar", seed, 0.9, items=48)
        if seed > 10:
            (tmp_path / f"predictions/tiny/sft/seed_{seed}").symlink_to("../sft/seed_10")
    effects = {effect["text"]: effect for effect in study(tmp_path)["effects"]}
    start = effects["AVATAR against its cold start"]
    assert start["seeds"] == [10, 11, 12] and start["found"]["n"] == 144 and set(start["by_seed"]) == {10, 11, 12}
    assert start["word"] == "3 of 16 seeds so far"


def test_an_update_inside_of_a_training_is_a_system_of_its_own(tmp_path):
    for seed in (10, 11):
        write_predictions(tmp_path, "avatar", seed, 0.2, folder="step_70")
        write_predictions(tmp_path, "avatar", seed, 0.9)
        write_predictions(tmp_path, "grpo", seed, 0.9)
    effects = {effect["first"]: effect for effect in study(tmp_path)["effects"] if effect["second"] == "grpo"}
    assert effects["avatar@70"]["found"]["value"] < -30 < effects["avatar"]["found"]["value"]
    assert effects["avatar@70"]["updates"].keys() == {"avatar", "grpo"}


def test_evaluations_that_go_on_are_left_out_until_they_are_done(tmp_path, capsys):
    for system in ("avatar", "grpo"):
        for seed in (10, 11):
            write_predictions(tmp_path, system, seed, 0.5)
        write_predictions(tmp_path, system, 10, 0.5, folder="step_70")
    for path in ("avatar/seed_11", "avatar/seed_10/step_70"):
        meta = tmp_path / f"predictions/tiny/{path}/held_out.ours.meta.json"
        meta.unlink()
    effects = {effect["first"]: effect["seeds"] for effect in study(tmp_path)["effects"] if effect["second"] == "grpo"}
    assert effects["avatar"] == [10] and effects["avatar@70"] == []
    build(tmp_path)
    assert "avatar/seed_11/held_out.ours.jsonl, whose evaluation goes on" in capsys.readouterr().err
    assert "predictions/tiny/avatar/seed_11/held_out.ours.jsonl" in (tmp_path / "report.html").read_text()


def test_what_was_learned_of_the_prompts_themselves_stands_beside(tmp_path):
    for seed in (10, 11):
        for system, skill in (("avatar", 0.5), ("grpo", 0.5), ("sft", 0.1)):
            write_predictions(tmp_path, system, seed, skill)
        write_predictions(tmp_path, "avatar", seed, 0.9, control="-trained")
    write_predictions(tmp_path, "grpo", 11, 0.2, control="-trained")
    found = study(tmp_path)
    main, start = found["effects"][0], found["effects"][3]
    assert main["found"]["value"] == 0 and main["trained"]["value"] > 30 and main["trained"]["seeds"] == 1
    assert start["second"] == "sft" and start["trained"] == {}
    assert {name: system["seeds"] for name, system in found["trained"].items()} == {"grpo": 1, "avatar": 2}
    avatar = found["trained"]["avatar"]
    assert avatar["trained"]["value"] > 70 > avatar["held_out"]["value"]


def test_parts_are_the_data_s_own(tmp_path):
    write_predictions(tmp_path, "avatar", 10, 0.5)
    write_predictions(tmp_path, "grpo", 10, 0.5)
    assert study(tmp_path)["parts"] == ["visual", "audio_visual", "localisation"], "in the recipes' order"
    for system in ("avatar", "grpo"):
        path = tmp_path / f"predictions/tiny/{system}/seed_10/held_out.ours.jsonl"
        text = path.read_text().replace("audio_visual", "rung_1").replace("visual", "rung_3")
        path.write_text(text.replace("localisation", "rung_2"))
    found = study(tmp_path)
    assert found["parts"] == ["rung_1", "rung_2", "rung_3"]
    assert all(found["effects"][0]["by_stage"][part]["n"] == 16 for part in found["parts"])
    small = tables.build(Results(tmp_path), "av", "ours", small=True)
    assert [column["name"] for column in small["columns"]] == ["overall", "rung 1", "rung 2", "rung 3"]


def test_runs_of_two_kinds_make_no_effect(tmp_path):
    for system, folder in (("sft", ""), ("base", "")):
        write_predictions(tmp_path, system, 10, 0.5, folder=folder)
    path = tmp_path / "predictions/tiny/base/seed_10/held_out.ours.meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"new_tokens": 20}))
    with pytest.raises(ValueError, match="new_tokens None and 20"):
        study(tmp_path)


def test_a_sweep_speaks_of_its_best_and_worst_member(tmp_path):
    members = SWEEPS["tas_lambda"]
    for seed in range(PLANNED_SWEEP):
        for member, skill in zip(members, (0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9), strict=True):
            write_predictions(tmp_path, member, seed, skill)
        if seed == 0:
            early = study(tmp_path)["sweeps"]["tas_lambda"]
            assert early["word"] == "1 of 3 seeds so far" and early["measured"] == early["planned"] == 7
    sweep = study(tmp_path)["sweeps"]["tas_lambda"]
    assert (sweep["best"], sweep["worst"]) == ("tas_lambda_lam_2.0", "tas_lambda_lam_0") and sweep["monotone"] is True
    assert sweep["word"] == "best and worst differ"
    for seed in range(PLANNED_SWEEP):
        for member in members:
            write_predictions(tmp_path, member, seed, 0.5)
    assert study(tmp_path)["sweeps"]["tas_lambda"]["word"] == "no difference is shown"
    shutil.rmtree(tmp_path / "predictions/tiny" / members[2])
    assert study(tmp_path)["sweeps"]["tas_lambda"]["word"] == "members are missing"


def test_planned_seeds_are_the_profiles(tmp_path):
    profile, *_ = read_profile("tiny", tmp_path, [])
    parts, sweeps = profile["families"]["tiny"]["sweeps"]
    assert PLANNED["primary"] == PLANNED["secondary"] == len(profile["seeds"])
    assert PLANNED["controls"] == PLANNED["parts"] == len(parts["seeds"]) and len(sweeps["seeds"]) == PLANNED_SWEEP
    assert set(sweeps["names"]) == set(SWEEPS) and set(PLANNED) == {question.tests for question in QUESTIONS}


def test_copies_of_one_run_are_one_seed(tmp_path):
    for system in ("sft", "base"):
        write_predictions(tmp_path, system, 10, 0.5)
        for seed in (11, 12):
            (tmp_path / f"predictions/tiny/{system}/seed_{seed}").symlink_to(f"../{system}/seed_10")
    (effect,) = (e for e in study(tmp_path)["effects"] if e["first"] == "sft")
    assert effect["seeds"] == [10] and effect["word"] == "one seed: no test" and effect["found"]["n"] == 48


def test_the_course_of_trainings_is_told(tmp_path):
    for seed in (10, 11):
        write_training(tmp_path, "grpo", seed)
    course = study(tmp_path)["course"]
    assert course.keys() == {"grpo"} and course["grpo"]["seeds"] == 2 and course["grpo"]["hinted"] is None
    assert course["grpo"]["vanished"] == pytest.approx(0.4) and course["grpo"]["completions"] == [128 * 60]


def test_provenance_counts_what_ran_and_a_link_once(tmp_path):
    write_training(tmp_path, "avatar", 10, updates=6)
    run = tmp_path / "runs/tiny/avatar/seed_10"
    records = [json.loads(line) | {"time/step": 600.0} for line in (run / "metrics.jsonl").read_text().splitlines()]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    about = {"commit": "abc", "device": "Tesla V100", "processes": 4, "gpus": 4}
    (run / "provenance.json").write_text(json.dumps(about))
    write_predictions(tmp_path, "avatar", 10, 0.5)
    for kind in ("runs", "predictions"):
        twin = tmp_path / kind / "tiny/twin/seed_10"
        twin.parent.mkdir()
        twin.symlink_to(tmp_path / kind / "tiny/avatar/seed_10")
    origin = provenance(tmp_path)
    assert (origin["training_hours"], origin["gpu_hours"], origin["commits"]) == (1.0, 4.0, {"abc": 1})
    assert len(origin["trainings"]) == len(origin["predictions"]) == 1 and origin["linked"] == ["twin/seed_10"]


def test_a_report_of_half_a_reproduction_says_what_is_missing(tmp_path, monkeypatch):
    """Its folder named from where the command runs."""
    monkeypatch.chdir(tmp_path.parent)
    tmp_path = Path(tmp_path.name)
    with pytest.raises(ValueError, match="holds no runs/FAMILY"):
        build(tmp_path)
    write_predictions(tmp_path, "avatar", 10, 0.9)
    write_predictions(tmp_path, "<script>", 10, 0.9)
    text = build(tmp_path).read_text()
    assert "not measured" in text and "<script" not in text and "default-src 'none'" in text
    (tmp_path / "predictions/tiny/avatar/seed_10/held_out.ours.meta.json").unlink()
    assert "<p>Not in it" in build(tmp_path).read_text()


def test_the_head_counts_cells_of_the_papers_tables_alone():
    def cell(paper, measured=None, low=None, high=None):
        return {"paper": paper, "measured": measured, "low": low, "high": high}

    cells = [cell(50.0, 48.0, 46.0, 51.0), cell(50.0, 40.0, 38.0, 42.0), cell(None, 9.0, 8.0, 10.0), cell(50.0)]
    table = {"small": False, "rows": [{"cells": dict(enumerate(cells))}]}
    counts = {"cells": 4, "measured": 3, "published": 2, "inside": 1}
    assert _again([table, {**table, "small": True}]) == counts


@pytest.mark.slow
def test_a_whole_report(tmp_path):
    text = build(write_reproduction(tmp_path)).read_text()
    page = Page(text)
    assert all(source.startswith(("data:", "#")) for source in page.sources) and "script" not in page.tags
    ids = set(re.findall(r'id="([^"]+)"', text))
    assert {link[1:] for link in re.findall(r'<a href="(#[^"]+)"', text)} <= ids
    assert 'id="families"' in text[text.index('id="figures"') :] and "Shown above" in text
    assert text.index("In short") < text.index("<nav>") < text.index('id="tables"') < text.index('id="provenance"')
    assert text.count("<table") == text.count('<div class="wide"><table'), "whatever is wide scrolls by itself"
    small = text[text.index('id="table-small_av"') :].partition("</section>")[0]
    assert "<td>tiny base</td>" in small and "Qwen2.5-Omni<" not in small
    assert text.count("<summary>Intervals, seeds, tests") == text.count("<section id=")
    assert text.count("<figcaption") >= 7 and "&lt;b&gt;clip&lt;/b&gt;" in text and "<b>clip</b>" not in text
