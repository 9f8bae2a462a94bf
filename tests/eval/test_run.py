"""Predictions on file: resuming, settings, failures, ranks, several completions."""

import json
import resource
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest

from eval import score
from eval.asking.benchmark import load_benchmark
from eval.asking.items import Item
from eval.asking.prompts import as_sample
from eval.engine import _score_anew, settings_hash
from eval.predict import predict
from eval.request import Request, parse
from eval.run import main
from eval.score import rescore
from eval.scoring.predictions import correct, lock_of, read_predictions
from megatron_avatar.config import Config
from megatron_avatar.config.load import CONFIG_DIR
from megatron_avatar.locks import held
from megatron_avatar.training.evaluate import Answer

HELD_OUT = load_benchmark("held_out")
ITEMS = [Item(f"s{i}", "number", "How many?", str(i), groups={"stage": ("visual",)}) for i in range(7)]
ITEMS[3] = replace(ITEMS[3], trouble="clip.mp4: there is no such file")
SAMPLES = [as_sample(item, HELD_OUT.protocols["ours"], "held_out") for item in ITEMS]


class System:
    """Answers 1 to everything, n times, and fails on the last item; remembers what it was asked."""

    def __init__(self, n=1):
        self.asked, self.n = [], n

    def __call__(self, samples):
        self.asked += [s.id for s in samples]
        answer = Answer("<think>t</think><answer>1</answer>", 7, True)
        return [[Answer(error="damaged") if s.id == "s6" else answer] * self.n for s in samples]


def ask(system, out, settings="a", items=ITEMS, **more):
    return predict(system, HELD_OUT, items, SAMPLES[: len(items)], out, protocol="ours", settings=settings, **more)


def test_every_item_is_predicted_once_and_failures_count(tmp_path):
    out, system = tmp_path / "new" / "held_out.ours.jsonl", System()
    predictions = ask(system, out, chunk=3)
    assert read_predictions(out) == predictions
    assert [p["id"] for p in predictions] == [i.id for i in ITEMS]
    assert system.asked == ["s0", "s1", "s2", "s4", "s5", "s6"]  # nobody is asked about a clip that isn't there
    assert [correct(p) for p in predictions] == [0, 1, 0, 0, 0, 0, 0]
    assert [p["error"] for p in predictions] == [None] * 3 + [ITEMS[3].trouble] + [None] * 2 + ["damaged"]
    assert [p["format"] for p in predictions] == [1, 1, 1, 0, 1, 1, 0] and predictions[1]["tokens"] == 7
    assert rescore(out) == predictions


def test_a_second_run_answers_only_what_is_missing(tmp_path):
    out, first, second = tmp_path / "a.jsonl", System(), System()
    whole = ask(first, out, chunk=2)
    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:4]) + lines[4][:20])  # killed in the middle of the fifth line
    assert ask(second, out, chunk=2) == whole
    assert second.asked == ["s4", "s5", "s6"] and read_predictions(out) == whole
    third = System()
    assert ask(third, out, chunk=2) == whole and third.asked == []


def test_an_item_that_was_cut_between_its_completions_is_answered_again(tmp_path):
    out, second = tmp_path / "a.jsonl", System(n=4)
    whole = ask(System(n=4), out, chunk=2, n=4)
    assert [(p["id"], p["k"]) for p in whole[:5]] == [("s0", 0), ("s0", 1), ("s0", 2), ("s0", 3), ("s1", 0)]
    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:6]))  # all of s0 and half of s1
    assert ask(second, out, chunk=2, n=4) == whole
    assert second.asked == ["s1", "s2", "s4", "s5", "s6"] and read_predictions(out) == whole


def test_other_settings_are_never_mixed_in_and_nothing_is_lost(tmp_path):
    out, again = tmp_path / "a.jsonl", System()
    old = ask(System(), out, chunk=4)
    new = ask(again, out, settings="b", chunk=4)
    assert len(again.asked) == 6 and read_predictions(out) == new
    assert read_predictions(tmp_path / "a.jsonl.old") == old


def test_a_file_that_holds_something_else_is_left_alone(tmp_path):
    out = tmp_path / "a.jsonl"
    out.write_text('{"id": "s1"}\n')
    with pytest.raises(ValueError, match="a.jsonl, line 1"):
        ask(System(), out, chunk=4)
    assert out.read_text() == '{"id": "s1"}\n'


def test_an_item_that_two_evaluations_wrote_is_named(tmp_path):
    out = tmp_path / "a.jsonl"
    ask(System(), out, chunk=4)
    content = out.read_text() + out.read_text().splitlines(keepends=True)[2]
    out.write_text(content)
    with pytest.raises(ValueError, match="line 8: 's2' is also on line 3"):
        ask(System(), out, chunk=4)
    assert out.read_text() == content


def test_only_the_first_rank_writes_and_all_agree_on_what_is_done(tmp_path):
    out = tmp_path / "a.jsonl"
    done = ask(System(), out, items=ITEMS[:5], chunk=4)
    content, system = out.read_text(), System()
    known = {p["id"]: [p] for p in done}
    predictions = ask(system, out, chunk=4, rank=1, share=lambda value: [(known, None), value])
    assert system.asked == ["s5", "s6"] and len(predictions) == 7 and out.read_text() == content


def test_after_room_was_made_the_predictions_are_as_if_there_had_been_room(tmp_path, capsys):
    whole, out = tmp_path / "whole.jsonl", tmp_path / "a.jsonl"
    ask(System(n=2), whole, chunk=3, n=2)
    before, size = resource.getrlimit(resource.RLIMIT_FSIZE), whole.stat().st_size
    for limit in (100, size // 3, size - 5):  # an item's completions are written together or not at all
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            with pytest.raises(OSError, match="make room, or raise the limit, and run the same command .*a.jsonl"):
                ask(System(n=2), out, chunk=3, n=2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert whole.read_bytes().startswith(out.read_bytes()) and out.read_bytes()[-1:] in (b"\n", b"")
    system = System(n=2)
    ask(system, out, chunk=3, n=2)
    assert out.read_bytes() == whole.read_bytes() and len(system.asked) < 6
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - 5, before[1]))
    try:
        with pytest.raises(OSError, match="make room"):
            rescore(out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert out.read_bytes() == whole.read_bytes() and rescore(out) == read_predictions(whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "whole.jsonl"]


def test_who_scores_while_others_write_is_refused(tmp_path, capsys):
    out = tmp_path / "a.jsonl"
    ask(System(), out, chunk=4)
    content = out.read_bytes()
    with held(lock_of(out), "eval.run"):
        assert score.main([str(out)]) == 2
    assert "held by eval.run (process" in capsys.readouterr().err and out.read_bytes() == content
    assert score.main([str(out)]) == 0


def test_the_settings_hash_follows_what_changes_a_completion(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    config, request, benchmark = Config(), Request(benchmark="held_out"), load_benchmark("held_out")

    def found(fingerprint="f", **changed):
        return settings_hash(config, replace(request, **changed), benchmark, tmp_path, fingerprint)

    first = found()
    config.data.workers = 3
    assert found() == found(batch=2) == found(seed=4) == found(system="grpo") == first
    others = [found("other"), found(n=4, temperature=1.0), found(n=4, temperature=1.0, seed=4)]
    config.rl.sampling.top_k = 50
    assert found() == first, "a greedy answer looks at no other token"
    others.append(found(n=4, temperature=1.0))
    config.data.mute = True
    others.append(found())
    config.rl.sampling.max_new_tokens = 7
    others.append(found())
    (tmp_path / "model.safetensors").write_text("new weights")
    others.append(found())
    assert len({first, *others}) == 8


def test_a_published_benchmark_has_no_training_prompts(tmp_path, capsys):
    assert main(["model=assets/tiny_base", "benchmark=worldsense", f"data={tmp_path}", f"out={tmp_path / 'o'}",
                 "recipe=tiny_avatar", "control=trained"]) == 2  # fmt: skip
    assert "write benchmark=held_out data=MANIFEST" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("recipe=tiny_avatr", "tiny_avatar"),
        ("benchmark=worldsens", "worldsense"),
        ("protocol=mine", "ours, released"),
        ("control=deaf", "mute, blind"),
        ("n=8", "temperature=1"),
        ("step=3", "no steps"),
        ("model=nowhere", "model=nowhere is no folder"),
        ("data=none.jsonl", "none.jsonl"),
        ("limit=few", "limit"),
        ("--mute", "not key=value"),
    ],
)
def test_a_users_mistake_is_explained(tmp_path, capsys, change, message):
    arguments = {
        "model": "assets/tiny_base", "benchmark": "held_out", "data": str(tmp_path / "m.jsonl"),
        "out": str(tmp_path / "o"), "recipe": "tiny_avatar",
    }  # fmt: skip
    key, _, value = change.partition("=")
    given = [f"{k}={v}" for k, v in {**arguments, key: value}.items() if k != "--mute"]
    assert main(given if "=" in change else [*given, change]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(("error", "status"), [(ValueError("write x"), 2), (OSError(28, "No space left"), 1)])
def test_a_launcher_is_told_whether_to_try_again(tmp_path, monkeypatch, capsys, error, status):
    def parse(_):
        raise error

    monkeypatch.setattr("eval.run.parse", parse)
    monkeypatch.setenv("AVATAR_ENDED", str(tmp_path / "ended"))
    assert main(["model=m"]) == status and str(error) in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [f"ended-{status}"]


@pytest.mark.parametrize("where", ["parse", "load_benchmark"])
def test_a_failure_of_any_kind_is_told_as_one(tmp_path, monkeypatch, where):
    """Before the answers, and behind them, where the others may still be told to leave."""

    def broken(*_):
        raise RuntimeError("CUDA error")

    fake = types.SimpleNamespace(run=lambda *_: [{"error": None}])
    monkeypatch.setitem(sys.modules, "eval.engine", fake)
    monkeypatch.setattr("eval.run.parse", lambda _: (Request("m", "held_out"), Config(), []))
    monkeypatch.setattr(f"eval.run.{where}", broken)
    monkeypatch.setenv("AVATAR_ENDED", str(tmp_path / "ended"))
    with pytest.raises(RuntimeError, match="CUDA error"):
        main(["model=m"])
    assert [path.name for path in tmp_path.iterdir()] == ["ended-1"]


WITHOUT_TORCH = """
import sys
sys.modules.update(torch=None, transformers=None)
from eval.run import main
sys.exit(main(["model=nowhere", "benchmark=held_out", "data=d", "out=o", "recipe=tiny_avatar"]))
"""


def test_a_mistake_is_named_before_torch_is_imported(tmp_path):
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], capture_output=True, text=True)
    assert done.returncode == 2 and "model=nowhere" in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_a_protocols_frames_hold_unless_the_user_says_otherwise():
    common = ["model=assets/tiny_base", "benchmark=worldsense", "data=x", "out=x", "recipe=tiny_avatar"]
    _, config, judge = parse([*common, "judge.endpoint=http://h/v1"])
    assert config.data.max_frames == 64 and config.rl.sampling.max_new_tokens == 2048 and config.model.context == 32768
    assert judge == ["judge.endpoint=http://h/v1"]
    _, config, _ = parse([*common, "data.max_frames=8", "control=mute"])
    assert config.data.max_frames == 8 and config.data.mute and not config.data.blind
    assert Path(config.model.path) == Path("assets/tiny_base")


def test_a_model_of_another_family_is_refused_with_the_way_out(tmp_path):
    (tmp_path / "config.json").write_text((CONFIG_DIR / "shapes" / "qwen3_vl_4b" / "config.json").read_text())
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text("{}")
    common = [f"model={tmp_path}", "benchmark=worldsense", "data=x", "out=x", "recipe=avatar_7b"]
    with pytest.raises(ValueError, match="is a Qwen3-VL, but the recipe .* for Qwen2.5-Omni: .* model.shape='' para"):
        parse(common)
    assert parse([*common, "model.shape=''", "parallel=single"])[1].model.path == str(tmp_path)


def test_a_runs_own_recipe_and_cluster_are_not_replaced(tmp_path):
    (tmp_path / "config.yaml").write_text("data: {mute: true}\n")
    common = [f"model={tmp_path}", "benchmark=held_out", "data=x", "out=x"]
    with pytest.raises(ValueError, match="cluster=local: .* is a run with its own"):
        parse([*common, "cluster=local"])
    _, config, _ = parse([*common, "data.blind=true"])
    assert config.data.mute and config.data.blind, "both were set elsewhere, and no control takes them back"


def test_a_runs_layout_holds_where_srun_starts_several_processes(tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text("parallel: {tp: 2}\n")
    arguments = [f"model={tmp_path}", "benchmark=held_out", "data=x", "out=x"]
    assert parse(arguments)[1].parallel.tp == 1, "one process has no partner"
    step = {"STEP_ID": "0", "PROCID": "1", "LOCALID": "1", "STEP_NUM_TASKS": "4", "STEP_NODELIST": "n1", "JOB_ID": "7"}
    for name, value in step.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "x")
    assert parse(arguments)[1].parallel.tp == 2


def test_a_mistake_of_the_first_rank_is_told_to_all(tmp_path):
    out, told = tmp_path / "a.jsonl", []
    out.write_text('{"id": "s1"}\n')
    with pytest.raises(ValueError, match="line 1"):
        ask(System(), out, chunk=4, share=lambda value: told.append(value) or [value])
    assert len(told) == 1, "the others were told before it was raised"
    with pytest.raises(ValueError, match="line 1"):
        ask(System(), out, chunk=4, rank=1, share=lambda value: told)


def test_a_continued_file_is_scored_by_todays_rules(tmp_path):
    out = tmp_path / "a.jsonl"
    predictions = ask(System(), out, chunk=4)
    lines = [{**p, "scores": {"accuracy": 1.0}} for p in predictions]  # as other rules had it
    out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert _score_anew(out, None, lines[:2]) == predictions[:2] and read_predictions(out) == predictions
