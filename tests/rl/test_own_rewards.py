"""Rewards of one's own: found, checked before a run begins, bounded like the others, part of the sum."""

import hashlib
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_avatar.config import load_config
from megatron_avatar.records import Sample
from megatron_avatar.rl.rewards import bounded as workers
from megatron_avatar.rl.rewards import own, score_group
from megatron_avatar.training import provenance

HERE = "tests/rl/own_rewards.py"
SAMPLE = Sample("id7", "stage1", "train", "what", "?", "red", "free_form")
RECIPE = ["recipe=tiny_avatar", "model.path=models/tiny", "data.manifest=data/manifest.jsonl"]


@pytest.mark.parametrize("place", [f"{HERE}:half", "tests.rl.own_rewards:half"])
def test_a_function_of_a_module_or_a_file_is_a_reward(place):
    assert own.score("half", place, ["a", ""], SAMPLE) == [0.5, 0.5]


def test_truth_and_nan_are_verdicts():
    assert own.score("yes", f"{HERE}:yes", ["a", ""], SAMPLE) == [1.0, 0.0]
    assert all(map(math.isnan, own.score("n", f"{HERE}:no_verdict", ["a"], SAMPLE)))


@pytest.mark.parametrize(
    ("function", "says"),
    [("too_much", "returned 2.0 on sample id7, but a reward takes"), ("words", "returned 'good' on sample"),
     ("leaves", "raised SystemExit: enough"), ("no_number", "raised ValueError: could not convert string to float"),
     ("bug", r"raised KeyError: 'score' \(.*own_rewards.py, line \d+\)")],
)  # fmt: skip
def test_what_is_no_reward_is_named(function, says):
    with pytest.raises(own.OwnRewardFailed, match=rf"rl.rewards.mine: {HERE}:{function} {says}"):
        own.score("mine", f"{HERE}:{function}", ["a"], SAMPLE)
    with pytest.raises(ValueError, match="rl.rewards.mine"):
        own.try_on("mine", f"{HERE}:{function}", SAMPLE)


def test_one_without_any_verdict_is_warned_about(caplog):
    own.try_on("yes", f"{HERE}:yes", SAMPLE)
    assert not caplog.messages
    own.try_on("mine", f"{HERE}:no_verdict", SAMPLE)
    assert caplog.messages[0].startswith(f"rl.rewards.mine: {HERE}:no_verdict has no verdict (nan) on a right answer")


def test_one_that_never_ends_costs_its_text_the_reward(monkeypatch):
    monkeypatch.setattr(own, "bounded", lambda *a: workers.bounded(*a, deadline_s=0.5))
    assert own.score("endless", f"{HERE}:endless", ["a", ""], SAMPLE) == [0.0, 1.0]
    with pytest.raises(ValueError, match="rl.rewards.mine: .*:endless computes for more than .*a run would give such"):
        own.try_on("mine", f"{HERE}:endless", SAMPLE)


def test_the_import_costs_no_text_its_reward(monkeypatch, tmp_path):
    (tmp_path / "heavy.py").write_text("from time import process_time as t\nend = t() + 0.9\nwhile t() < end: pass\n"
                                       "def f(text, sample): return 1.0\n")  # fmt: skip
    monkeypatch.setattr(own, "bounded", lambda *a: workers.bounded(*a, deadline_s=0.5))
    monkeypatch.setattr(workers, "PATIENCE", 200)  # a busy machine
    assert own.score("heavy", f"{tmp_path}/heavy.py:f", ["a"], SAMPLE) == [1.0]


def test_two_files_of_one_name_are_two_modules(tmp_path):
    for folder, value in (("a", 0.25), ("b", 0.75)):
        (tmp_path / folder).mkdir()
        code = f"import sys\nVALUE = {value}\ndef f(text, sample): return sys.modules[f.__module__].VALUE\n"
        (tmp_path / folder / "mine.py").write_text(code)
    places = [f"{tmp_path}/{folder}/mine.py:f" for folder in "ab"]
    own.check(dict(zip("ab", places, strict=True)))
    assert [own.find(place)("", SAMPLE) for place in places] == [0.25, 0.75]


def test_a_runs_provenance_keeps_every_file_that_scored(tmp_path, caplog):
    file, config = tmp_path / "mine.py", load_config(RECIPE)
    config.rl.rewards = {"mine": f"{file}:f", "half": "tests.rl.own_rewards:half"}
    backend, digests = SimpleNamespace(rank=0, world=1, device=torch.device("cpu"), tp=1, pp=1, dp=1), []
    for body in ("return 1.0", "return 1.0", "return 0.5"):
        file.write_text(f"def f(text, sample): {body}\n")
        digests.append(hashlib.sha256(file.read_bytes()).hexdigest())
        provenance.record(tmp_path, config, backend)
    kept = json.loads((tmp_path / "provenance.json").read_text())["rewards"]
    assert kept["mine"] == {"place": f"{file}:f", "sha256": digests[1:]}
    assert kept["half"]["sha256"] == [hashlib.sha256(Path(HERE).read_bytes()).hexdigest()]
    (said,) = [entry.message for entry in caplog.records]
    assert said.startswith(f"rl.rewards.mine: {file}:f has changed since this run began")


def test_one_that_ends_its_process_stops_the_run():
    with pytest.raises(own.OwnRewardFailed, match=rf"rl.rewards.mine: {HERE}:killed on sample id7: .* code 5"):
        own.score("mine", f"{HERE}:killed", ["a"], SAMPLE)


@pytest.mark.parametrize(
    ("place", "says"),
    [("tests/rl/absent.py:f", "tests/rl/absent.py is no file, seen from .*: correct the path"),
     ("no_such_module:f", "there is no module no_such_module here: write FILE.py:f, or put its folder on PYTHONPATH"),
     (f"{HERE}:absent", "has no function absent; it has half, yes"),
     (f"{HERE}:one_argument", r"can't be called with two arguments .*a reward takes \(text, sample\)")],
)  # fmt: skip
def test_a_place_without_a_reward_is_refused_with_the_remedy(place, says):
    with pytest.raises(ValueError, match=f"rl.rewards.mine={place}: .*{says}"):
        own.check({"mine": place})


def test_a_file_that_does_not_import_is_told_with_its_line(tmp_path):
    (tmp_path / "broken.py").write_text("x = 1\nx.y\n")
    with pytest.raises(ValueError, match=r"can't be imported: AttributeError: .*broken.py, line 2"):
        own.check({"mine": f"{tmp_path}/broken.py:f"})
    (tmp_path / "leaves.py").write_text("raise SystemExit('usage')\n")
    with pytest.raises(ValueError, match="can't be imported: SystemExit: usage"):
        own.check({"mine": f"{tmp_path}/leaves.py:f"})
    (tmp_path / "needs.py").write_text("import no_such_package\n")
    with pytest.raises(ValueError, match="needs a package that is not installed here"):
        own.check({"mine": f"{tmp_path}/needs.py:f"})


def test_it_is_part_of_the_weighted_sum():
    weights = {"format": 0.5, "mine": 0.5}
    text = "<think>a</think><answer>red</answer>"
    (reward, parts), _ = score_group(SAMPLE, [text, "x"], weights, own={"mine": [0.2, 1.0]})
    assert reward == pytest.approx(0.6) and parts["mine"] == 0.2
    masked = score_group(SAMPLE, [text, "x"], weights, own={"mine": [math.nan, 1.0]})
    assert [r for r, _ in masked] == [1.0, 0.0], "one without a verdict: the whole group is weighed without it"


def test_settings_name_it_on_the_command_line():
    config = load_config([*RECIPE, f"+rl.rewards.mine={HERE}:half", "+stages.visual.rewards.mine=0.3"])
    assert config.rl.rewards == {"mine": f"{HERE}:half"} and config.stages["visual"].rewards["mine"] == 0.3


@pytest.mark.parametrize(
    ("settings", "says"),
    [(["+rl.rewards.judge=a:b", "+stages.visual.rewards.judge=1"], "a reward of one's own needs a name"),
     (["+rl.rewards.mine=a", "+stages.visual.rewards.mine=1"], "rl.rewards.mine=a: write module:function, or FILE.py"),
     (["+rl.rewards.mine=a:b"], r"no stage gives it a weight: write \+stages.visual.rewards.mine=0.3"),
     (["+stages.visual.rewards.mine=1"], r"'mine' is not one of format, .*\+rl.rewards.mine=FILE.py:FUNCTION")],
)  # fmt: skip
def test_settings_that_name_none_are_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        load_config([*RECIPE, *settings])
