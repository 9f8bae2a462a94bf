"""Predictions on file: resuming, settings, failures, ranks."""

import pytest

from eval.run import main, predict, settings_hash
from eval.score import read_predictions, rescore
from eval.stats import estimates
from megatron_avatar.config import Config
from megatron_avatar.records import Sample
from megatron_avatar.rl.rewards import grade

SAMPLES = [Sample(f"s{i}", "visual", "eval", "count", "How many?", str(i), "numerical") for i in range(7)]


class System:
    """Answers 1 to everything and fails on the last sample; remembers what it was asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, samples):
        self.asked += [s.id for s in samples]
        return [
            {
                "id": s.id, "family": s.family, "stage": s.stage, "gold": s.answer, "problem_type": s.problem_type,
                "choices": [], **grade(s, "" if s.id == "s6" else "<think>t</think><answer>1</answer>"),
                "error": "damaged" if s.id == "s6" else None,
            }
            for s in samples
        ]  # fmt: skip


def test_every_sample_is_predicted_once_and_failures_count(tmp_path):
    out, system = tmp_path / "new" / "avatar.jsonl", System()
    predictions = predict(system, SAMPLES, out, settings="a", chunk=3)
    assert read_predictions(out) == predictions
    assert [p["id"] for p in predictions] == system.asked == [s.id for s in SAMPLES]
    assert estimates(predictions)["overall"].n == 7 and estimates(predictions)["overall"].value == pytest.approx(1 / 7)
    assert [rescore(p) for p in predictions] == predictions
    assert [p["error"] for p in predictions] == [None] * 6 + ["damaged"]


def test_a_second_run_answers_only_what_is_missing(tmp_path):
    out, first, second = tmp_path / "a.jsonl", System(), System()
    whole = predict(first, SAMPLES, out, settings="a", chunk=2)
    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:4]) + lines[4][:20])  # killed in the middle of the fifth line
    assert predict(second, SAMPLES, out, settings="a", chunk=2) == whole
    assert second.asked == ["s4", "s5", "s6"] and read_predictions(out) == whole
    third = System()
    assert predict(third, SAMPLES, out, settings="a", chunk=2) == whole and third.asked == []


def test_other_settings_are_never_mixed_in_and_nothing_is_lost(tmp_path):
    out, again = tmp_path / "a.jsonl", System()
    old = predict(System(), SAMPLES, out, settings="a", chunk=4)
    new = predict(again, SAMPLES, out, settings="b", chunk=4)
    assert len(again.asked) == 7 and read_predictions(out) == new
    assert read_predictions(tmp_path / "a.jsonl.old") == old


def test_a_file_that_holds_something_else_is_left_alone(tmp_path):
    out = tmp_path / "a.jsonl"
    out.write_text('{"id": "s1"}\n')
    with pytest.raises(ValueError, match="a.jsonl, line 1"):
        predict(System(), SAMPLES, out, settings="a", chunk=4)
    assert out.read_text() == '{"id": "s1"}\n'


def test_only_the_first_rank_writes_and_all_agree_on_what_is_done(tmp_path):
    out = tmp_path / "a.jsonl"
    done = predict(System(), SAMPLES[:5], out, settings="a", chunk=4)
    content, system = out.read_text(), System()
    known = {p["id"]: p for p in done}
    predictions = predict(system, SAMPLES, out, settings="a", chunk=4, rank=1, share=lambda value: [known, value])
    assert system.asked == ["s5", "s6"] and len(predictions) == 7 and out.read_text() == content


def test_the_settings_hash_follows_what_changes_a_prediction(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text("{}\n")
    config = Config()
    config.model.path, config.data.manifest = str(tmp_path), str(manifest)
    hashes = [settings_hash(config, "eval"), settings_hash(config, "eval")]
    assert hashes[0] == hashes[1]
    config.data.workers = 3
    assert settings_hash(config, "eval") == hashes[0]
    hashes.append(settings_hash(config, "train"))
    config.data.mute = True
    hashes.append(settings_hash(config, "eval"))
    config.rl.sampling.max_new_tokens = 7
    hashes.append(settings_hash(config, "eval"))
    manifest.write_text('{"id": "x"}\n')
    hashes.append(settings_hash(config, "eval"))
    (tmp_path / "model.safetensors").write_text("new weights")
    hashes.append(settings_hash(config, "eval"))
    assert len(set(hashes[1:])) == 6


def test_a_users_mistake_is_explained(tmp_path, capsys):
    common = ["--model", str(tmp_path), "--manifest", str(tmp_path / "m.jsonl"), "--out", str(tmp_path / "o.jsonl")]
    assert main([*common, "--recipe", "tiny_avatr"]) == 2
    assert "tiny_avatar" in capsys.readouterr().err
    assert not (tmp_path / "o.jsonl").exists()
