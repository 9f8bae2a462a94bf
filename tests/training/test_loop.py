"""Whole runs of the product's entry point: resume, layouts, the gate, refusals. Few launches, many checks in each."""

import hashlib
import json
import shutil
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron_avatar.config import StageConfig, load_config
from megatron_avatar.config.asked import read_asked
from megatron_avatar.config.checks import other_shape
from megatron_avatar.training import loop
from tests.training.small import arguments, start, train

TIMES = ("time", "peak_rss_mib")


@pytest.fixture(scope="module")
def whole(world):
    """An uninterrupted AVATAR run of three stages."""
    out = world / "whole"
    done = train(*arguments(world, out, "checkpoint.every=2", "checkpoint.milestones=[5]", steps=3))
    assert done.returncode == 0, done.stderr
    return out


def metrics(out):
    """Records of a run without what depends on the clock."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k.split("/")[0] not in TIMES} for r in records]


def weights(out, stage="localisation"):
    return load_file(out / "export" / stage / "model.safetensors")


def assert_equal_runs(one, two):
    assert metrics(one) == metrics(two)
    left, right = weights(one), weights(two)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.slow
@pytest.mark.core
def test_a_run_logs_what_it_did(world, whole):
    records = metrics(whole)
    assert [r["step"] for r in records] == list(range(1, 10))
    assert [r["stage_step"] for r in records] == [1, 2, 3] * 3
    assert records[-1]["completions_generated"] == 9 * 4 * 4 == json.loads((whole / "done.json").read_text())[
        "completions_generated"]
    assert all(abs(r["logprob_error"] - 1) < 1e-5 for r in records)
    assert [r["replay/completions"] for r in records[:3]] == [0, 16, 16]  # only completions of earlier steps
    assert records[3]["replay/completions"] == 0  # a new stage starts with an empty buffer
    assert all(r["ratio/max"] == pytest.approx(1, abs=1e-4) for r in records if r["replay/completions"] == 0)
    assert records[1]["replay/age"] == 1 and records[2]["replay/size"] == 48
    assert any(r["hints/visits"] > 0 for r in records) and max(r["hints"] for r in records) > 0
    assert records[0]["reward/judge"] is None and records[-1]["reward/judge"] is not None
    kept = sorted(path.name for path in (whole / "checkpoints").iterdir())
    assert kept == ["step_00000008", "step_00000009"] and len(list((whole / "milestones").iterdir())) == 1
    before = load_file(world / "base" / "model.safetensors")
    after = weights(whole)
    moved = {n for n in after if not torch.equal(before[n].float(), after[n].float())}
    assert moved and not any(n.startswith("towers") for n in moved)  # frozen towers
    again = train(*arguments(world, whole, "checkpoint.every=2", steps=3))
    assert again.returncode == 0 and "complete" in again.stderr


@pytest.mark.slow
@pytest.mark.core
def test_killed_and_interrupted_runs_continue_bit_for_bit(world, whole):
    """SIGKILL after the fourth step, then SIGINT later: the same command, here with a decode worker, ends in the same
    bits."""
    out = world / "killed"
    command = arguments(world, out, "data.workers=1", "checkpoint.every=2", steps=3)

    def start_and_signal(number, after_step):
        run, log = start(*command), out / "metrics.jsonl"
        while run.alive and not (log.exists() and len(log.read_text().splitlines()) >= after_step):
            time.sleep(0.01)
        run.signal(number)
        return run.wait(240)

    killed = start_and_signal(signal.SIGKILL, 5)
    assert killed.codes == [-signal.SIGKILL] and not (out / "done.json").exists()
    interrupted = start_and_signal(signal.SIGINT, 6)
    assert interrupted.codes == [75] and "The same command continues" in interrupted.stderr, interrupted.stderr
    done = train(*command)
    assert done.returncode == 0, done.stderr
    assert_equal_runs(whole, out)


@pytest.mark.slow
def test_a_stop_signal_ends_evaluation_reward_and_update_and_nothing_is_repeated_or_lost(world):
    settings = ("eval.every=2", "eval.samples=4", "checkpoint.every=9")
    assert train(*arguments(world, world / "evaluated", *settings, steps=1)).returncode == 0
    out = world / "stopped"
    command = arguments(world, out, *settings, steps=1)
    saved = []
    for what in ("reward", "update", "evaluation"):
        done = train(*command, disturbed=what)
        assert done.returncode == 75, done.stderr
        saved.append(json.loads((max((out / "checkpoints").iterdir()) / "state.json").read_text()))
    assert [s["step"] for s in saved] == [0, 0, 1], "what is not applied is dropped"
    assert saved[-1]["unlogged"]["step"] == 1 and not (out / "metrics.jsonl").exists()
    done = train(*command)
    assert done.returncode == 0, done.stderr
    assert_equal_runs(world / "evaluated", out)
    assert metrics(out)[0]["eval/overall"] is not None


@pytest.mark.slow
def test_training_goes_on_while_a_checkpoint_is_written(world, whole):
    out = world / "overlapped"
    settings = arguments(world, out, "checkpoint.every=2", "checkpoint.milestones=[5]", steps=3)
    done = train(*settings, disturbed="slow_write")
    assert done.returncode == 0, done.stderr
    assert_equal_runs(whole, out)
    logged = [json.loads(line)["time"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    writes = json.loads((out / "writes.json").read_text())
    assert any(began < moment < ended for began, ended in writes for moment in logged)


@pytest.mark.slow
def test_damage_is_named_and_survived(world, whole):
    """A damaged checkpoint and the shard it alone names: the one before it, same bits, both written anew.
    A damaged shard that is needed: the rest of the buffer, and a loud line."""
    out = world / "damaged"
    shutil.copytree(whole, out)
    (out / "done.json").unlink()
    newest = max((out / "checkpoints").iterdir())
    victim = max((f for f in newest.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:-7])
    last, before = (json.loads((path / "state.json").read_text())["replay"]
                    for path in sorted((out / "checkpoints").iterdir(), reverse=True)[:2])
    (name,) = last.keys() - before.keys()
    (out / "replay" / name).write_bytes(b"torn")
    command = arguments(world, out, "checkpoint.every=2", steps=3)
    done = train(*command)
    assert done.returncode == 0 and "DAMAGED CHECKPOINT" in done.stderr and victim.name in done.stderr, done.stderr
    assert_equal_runs(whole, out)
    for name, entry in json.loads((newest / "state.json").read_text())["replay"].items():
        assert hashlib.sha256((out / "replay" / name).read_bytes()).hexdigest() == entry["sha256"]

    (out / "done.json").unlink()
    shutil.rmtree(max((out / "checkpoints").iterdir()))
    shard = out / "replay" / min(before)  # named by the checkpoint that is left
    shard.write_bytes(b"not a shard")
    done = train(*command)
    assert done.returncode == 0 and shard.name in done.stderr and "no longer bit-equal" in done.stderr, done.stderr
    assert len(metrics(out)) == 9


@pytest.mark.slow
def test_a_damaged_clip_is_set_aside_and_listed(world):
    data = world / "dirty"
    shutil.copytree(world / "data", data)
    lines = [json.loads(line) for line in (data / "manifest.jsonl").read_text().splitlines()]
    victims = [line["id"] for line in lines if line["split"] == "train" and line["stage"] == "visual"][:2]
    for victim in victims:
        clip = data / "clips" / f"{victim}.webm"
        clip.write_bytes(clip.read_bytes()[:200])
    out = world / "dirty_run"
    visual = len([x for x in lines if x["split"] == "train" and x["stage"] == "visual"])
    settings = [f"data.manifest={data / 'manifest.jsonl'}", "~stages.audio_visual", "~stages.localisation",
                "data.workers=1", f"stages.visual.prompts_per_step={visual}"]
    stages = ("stages.audio_visual.", "stages.localisation.")
    done = train(*[a for a in arguments(world, out, *settings, steps=1) if not a.startswith(stages)])
    assert done.returncode == 0, done.stderr
    listed = json.loads((out / "done.json").read_text())["quarantined"]
    assert sorted(listed) == sorted(victims) and all(victim in listed[victim] for victim in victims)
    assert metrics(out)[0]["completions_generated"] == 4 * (visual - 2)


def test_a_folder_of_another_size_is_said(world):
    def config(recipe: str):
        return load_config([f"recipe={recipe}", f"model.path={world / 'base'}", "data.manifest=x"])

    assert "hidden_size 128 instead of 3584" in other_shape(config("avatar_7b"))
    assert other_shape(config("tiny_avatar")) == ""


@pytest.mark.slow
def test_settings_of_another_run_are_refused(world, whole):
    other = train(*arguments(world, whole, "checkpoint.every=2", "rl.shaping.lam=0.5", steps=3))
    assert other.returncode != 0 and "rl.shaping.lam" in other.stderr
    unknown = train(*arguments(world, world / "x", "rl.shaping.lamda=0.5"))
    assert unknown.returncode == 2 and "rl.shaping.lam" in unknown.stderr
    long = train(*arguments(world, world / "x", "model.context=100"))
    assert long.returncode != 0 and "model.context" in long.stderr and not (world / "x" / "metrics.jsonl").exists()


def test_missing_traces_and_held_out_samples_are_named_before_anything_is_built(world, monkeypatch):
    monkeypatch.setattr(loop, "StopSignal", object)  # the test's process keeps its own handlers
    lines = [json.loads(line) for line in (world / "data" / "manifest.jsonl").read_text().splitlines()]
    manifest = world / "data" / "poor.jsonl"
    poor = [{**line, "trace": None} for line in lines if line["split"] != "eval"]
    manifest.write_text("".join(json.dumps(line) + "\n" for line in poor))

    def refusal(recipe, *settings):
        with pytest.raises(ValueError) as error:
            settings = [f"data.manifest={manifest}", *settings]
            loop.Run(load_config(arguments(world, world / "x", *settings, recipe=recipe)), None)
        return str(error.value)

    assert "key 'trace' is empty" in refusal("tiny_sft")
    assert "write eval.every=0" in refusal("tiny_avatar", "eval.every=2")


@pytest.mark.parametrize("trained", [True, False])
def test_nothing_is_embedded_for_an_update_that_runs_the_encoders_itself(trained):
    run = SimpleNamespace(stage=StageConfig(train_towers=trained), embed=lambda prompts: [f"of {p}" for p in prompts])
    groups = [SimpleNamespace(prompt="a"), SimpleNamespace(prompt="b")]
    assert loop.Run.update_media(run, groups) == ([None, None] if trained else ["of a", "of b"])


@pytest.mark.slow
@pytest.mark.core
def test_a_run_goes_on_with_the_same_steps_on_other_layouts(world, whole):
    """Stopped in a step under tensor parallelism, then under pipeline parallelism, finished on two replicas: the
    prompts, tokens and rewards of one process, losses within 1e-4. (Fourteen steps a layout: test_layouts.py.)"""
    out = world / "resharded"
    for stop, layout in (("step_4", ("parallel.tp=2",)), ("step_6", ("parallel.pp=2",)), ("step_99", ())):
        done = train(*arguments(world, out, "checkpoint.every=5", *layout, steps=3), ranks=2, disturbed=stop)
        assert ("same command continues" in done.stderr) == (stop != "step_99"), done.stderr[-3000:]
    assert_same_steps(out, whole)
    starts = [json.loads(line)["step"] for line in (out / "attempts.jsonl").read_text().splitlines()]
    assert starts == [0, 3, 5], "nothing that was applied is repeated"


def assert_same_steps(out, whole):
    for ours, theirs in zip(metrics(out), metrics(whole), strict=True):
        for key in ("step", "reward", "vanished", "length", "replay/completions", "hints", "completions_generated"):
            assert ours[key] == pytest.approx(theirs[key]), key
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3, abs=1e-5)
    left, right = weights(out), weights(whole)
    assert max(float((left[n].float() - right[n].float()).abs().max()) for n in left) < 1e-3


@pytest.mark.slow
def test_supervised_fine_tuning_lowers_the_loss_and_trains_the_towers(world):
    out = world / "sft"
    settings = ("stages.sft.prompts_per_step=8", "stages.sft.train_towers=true", "parallel.threads=1")
    done = train(*arguments(world, out, *settings, recipe="tiny_sft", steps=12))
    assert done.returncode == 0, done.stderr
    losses = [r["loss"] for r in metrics(out)]
    assert np.mean(losses[-3:]) < 0.8 * losses[0]
    before, after = load_file(world / "base" / "model.safetensors"), weights(out, "sft")
    assert any(n.startswith("visual") and not torch.equal(before[n].float(), after[n].float()) for n in after)


@pytest.mark.slow
def test_buffer_and_baselines_go_into_the_next_stage_together(world):
    """Carried over, their rewards are those of the new stage's weights; an interrupted run goes on alike."""
    settings = ("rl.replay.carry_over_stages=true", "checkpoint.every=1", "~stages.localisation")
    args = [a for a in arguments(world, world / "carried", *settings, steps=2) if "localisation." not in a]
    assert train(*args).returncode == 0
    records = metrics(world / "carried")
    assert [r["replay/size"] for r in records] == [16, 32, 48, 64] and records[2]["replay/completions"] == 16
    at_boundary = world / "boundary"
    args = [a.replace(str(world / "carried"), str(at_boundary)) for a in args]
    stopped = train(*args, disturbed="step_3")
    assert stopped.returncode == 75 and len(metrics(at_boundary)) == 2
    state = json.loads((at_boundary / "checkpoints" / "step_00000002" / "state.json").read_text())
    assert state["stage"] == "visual"
    assert train(*args).returncode == 0
    assert metrics(at_boundary) == records
    first = json.loads((world / "carried" / "checkpoints" / "step_00000003" / "state.json").read_text())
    carried = [rewards for name, variant, rewards in first["tracker"]["windows"] if len(rewards) >= 4]
    assert len(carried) >= 8 and all(0 <= reward <= 1 for rewards in carried for reward in rewards)


@pytest.mark.slow
def test_a_float16_run_that_was_killed_comes_to_the_same_bits(world):
    """Its first update overflows: it is skipped, said and counted, and the scale that it left goes into checkpoints."""
    settings = ("model.dtype=float16", "optim.lr=1e-3", "~stages.audio_visual", "~stages.localisation",
                "stages.visual.train_towers=true", "checkpoint.every=2")  # fmt: skip
    whole, killed = world / "float16_whole", world / "float16_killed"
    command = [a for a in arguments(world, whole, *settings, steps=3) if "sual." not in a.split("=")[0]
               or a.startswith("stages.visual.")]  # fmt: skip
    done = train(*command, disturbed="overflow")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("beyond float16 at a loss scale of 65536") == 1
    command = [a.replace(str(whole), str(killed)) for a in command]
    assert train(*command, disturbed="overflow,killed_at_3").returncode not in (0, 75)
    done = train(*command)
    assert done.returncode == 0, done.stderr
    records = metrics(whole)
    assert records == metrics(killed) and [r["skipped"] for r in records] == [True, False, False]
    assert [(r["loss_scale"], r["overflows"]) for r in records] == [(32768, 1)] * 3
    left, right = weights(killed, "visual"), weights(whole, "visual")
    assert all(torch.equal(left[name], right[name]) for name in right)
    assert {value.dtype for value in right.values()} == {torch.float16}


@pytest.mark.slow
def test_a_bfloat16_run_that_ends_between_two_stages_continues_bit_for_bit(world):
    """Main weights come out of the first stage's last checkpoint; the encoders, which the second one trains too, have
    theirs from the start. What a stage moves, mostly by weight decay, is less than bfloat16 holds."""
    settings = ("model.dtype=bfloat16", "optim.lr=1e-3", "optim.weight_decay=1.5", "~stages.localisation",
                "stages.audio_visual.train_towers=true")  # fmt: skip
    whole, ended = world / "half_whole", world / "half_ended"
    command = [a for a in arguments(world, whole, *settings) if "localisation." not in a]
    done = train(*command)
    assert done.returncode == 0, done.stderr
    command = [a.replace(str(whole), str(ended)) for a in command]
    assert train(*command, disturbed="step_3").returncode == 75
    state = json.loads((ended / "checkpoints" / "step_00000002" / "state.json").read_text())
    assert state["stage"] == "visual" and state["stage_step"] == 2
    done = train(*command)
    assert done.returncode == 0, done.stderr
    assert metrics(ended) == metrics(whole) and len(metrics(whole)) == 4
    left, right = weights(ended, "audio_visual"), weights(whole, "audio_visual")
    assert all(torch.equal(left[name], right[name]) for name in right)
    before, between = load_file(world / "base" / "model.safetensors"), weights(whole, "visual")
    decoder = [name for name in between if ".layers." in name and "mlp" in name]
    shares = [float(torch.cat([(after[n] != before[n].bfloat16()).flatten() for n in decoder]).float().mean())
              for after in (between, right)]  # fmt: skip
    assert shares[0] < 0.05 and shares[1] > 0.3, "what the first stage moves shows in the second"
    for folder in (whole, ended):
        assert read_asked(folder / "export" / "audio_visual") == {"instruction": "", "system": ""}


@pytest.mark.slow
def test_a_run_short_of_memory_and_disk_comes_to_the_same_bits(world, whole):
    """Checkpoints in pieces after every step, by the clock alone; none is left once the run is done."""
    out = world / "short"
    settings = ("checkpoint.every=100", "checkpoint.minutes=1e-9", "checkpoint.milestones=[5]",
                "checkpoint.keep_finished=false")  # fmt: skip
    done = train(*arguments(world, out, *settings, steps=3), disturbed="short_memory")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("written in pieces") == 9
    assert_equal_runs(whole, out)
    assert not list((out / "checkpoints").iterdir()) and not list((out / "replay").iterdir())
    assert [path.name for path in (out / "milestones").iterdir()] == ["step_00000005"]
