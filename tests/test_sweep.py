"""Sweeps and graphs before anything is submitted: members, names, refusals; and a local sweep that is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_avatar.config import load_config
from slurm import launch, reproduce, sweep
from slurm.jobs import Board, slurm_parameters
from tests.training import small

ROOT = Path(__file__).parents[1]
NAMED = sorted(path.stem for path in sweep.SWEEPS.glob("*.yaml"))


def members(name: str, recipe: str) -> dict[str, list[str]]:
    given = ["model_3b=a", "model_7b=b"] if name == "model_size" else [f"recipe={recipe}", "model.path=m"]
    return sweep.members_of(name, [*given, "data.manifest=d"])


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["avatar_7b", "tiny_avatar"])
def test_every_named_sweep_composes_and_its_members_differ(recipe):
    assert set(NAMED) == {"tas_lambda", "on_off_ratio", "rewards", "shaping", "curriculum", "components", "model_size"}
    for name in NAMED:
        configs = [load_config(settings) for settings in members(name, recipe).values()]
        for config in configs:
            config.name = ""
        assert all(configs.count(config) == 1 for config in configs), name


@pytest.mark.slow
def test_rows_are_the_papers():
    lams = [load_config(s).rl.shaping.lam for s in members("tas_lambda", "avatar_7b").values()]
    assert lams == [0, 0.05, 0.1, 0.3, 0.5, 1.0, 2.0]
    ratios = [(c.rl.n_on, c.rl.n_off) for c in map(load_config, members("on_off_ratio", "avatar_7b").values())]
    assert ratios == [(n, 8 - n) for n in range(8, 0, -1)]
    stages = [list(load_config(s).stages) for s in members("curriculum", "avatar_7b").values()]
    assert stages == [["visual"], ["visual", "audio_visual"], ["visual", "audio_visual", "localisation"]]
    rewards = {n: load_config(s) for n, s in members("rewards", "avatar_7b").items()}
    used = {n: set().union(*(stage.rewards for stage in c.stages.values())) for n, c in rewards.items()}
    assert used == {"acc_format": {"accuracy", "format"}, "plus_self": {"accuracy", "format", "self"},
                    "plus_judge": {"accuracy", "format", "self", "judge"},
                    "plus_vcrs": {"accuracy", "format", "self", "judge"}}
    assert [c.rl.vcrs for c in rewards.values()] == [False, False, False, True]


def test_hydras_own_sweeps_are_named_by_what_differs():
    found = sweep.members_of("", ["recipe=avatar_7b", "rl.shaping.lam=0.1,0.3", "seed=range(0,2)"])
    assert found["lam_0.3-seed_1"] == ["recipe=avatar_7b", "rl.shaping.lam=0.3", "seed=1"] and len(found) == 4


def test_what_a_member_leaves_out_is_not_set():
    own = ["~stages.localisation", "~stages.visual.rewards.self"]
    given = ["stages.localisation.steps=3", "stages.visual.steps=3", "+stages.visual.rewards.self=0.2", "seed=1"]
    assert sweep.join(given, own) == ["stages.visual.steps=3", "seed=1", *own]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["sweep=lambda"], "choose one of components, curriculum"),
        (["recipe=avatar_7b"], "nothing to sweep"),
        (["sweep=model_size"], "needs model_3b=FOLDER model_7b=FOLDER"),
        (["sweep=shaping", "recipe=avatar_7b", "concurrency=0"], "concurrency=0"),
        (["sweep=shaping", "recipe=avatar_7b", "rl.n_onn=3"], "parabolic: unknown key 'rl.n_onn'"),
        (["sweep=shaping", "recipe=avatar_7b", "model.path=m", "data.manifest=/none"], "data.manifest=/none"),
        (["recipe=avatar_7b", "name='a b','a_b'"], "two members would be named name__a_b_"),
    ],
)  # fmt: skip
def test_mistakes_are_answered_before_anything_is_written(arguments, says, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sweep.main([*arguments, "cluster=local"]) == 2
    assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_sites_become_slurms_parameters(monkeypatch):
    monkeypatch.setenv("AVATAR_CLUSTER", "example")
    _, settings = sweep.split_options(["recipe=avatar_7b"], sweep.OPTIONS)
    assert settings[-1] == "cluster=example"
    config = load_config([*settings, "parallel=a100_40g", "model.path=m", "data.manifest=d"])
    assert slurm_parameters(config, launch.layout(config)) == {
        "nodes": 2, "ntasks_per_node": 4, "cpus_per_task": 12, "time": 1440, "partition": "gpu",
        "account": "my_project", "gpus_per_node": 4,
    }  # fmt: skip


# ---- the paper's graph ---------------------------------------------------------------------------------------------


def paper(tmp_path: Path) -> list[str]:
    (tmp_path / "model").mkdir(exist_ok=True)
    (tmp_path / "manifest.jsonl").touch()
    models = [f"{name}={tmp_path / 'model'}" for name in ("model_7b", "model_3b", "model_vl_7b")]
    return [*models, *(f"{name}={tmp_path / 'manifest.jsonl'}" for name in ("data_omni", "data_vl"))]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smoke", "tiny", "paper"])
def test_every_task_comes_behind_what_it_needs(name, tmp_path):
    given = paper(tmp_path) if name == "paper" else []
    profile, settings = reproduce.read_profile(name, tmp_path / "out", [*given, "seed=3"])
    tasks = reproduce.graph(profile, tmp_path / "out", [*settings, "cluster=local"], retries=1)
    names = [task.name for task in tasks]
    assert len(names) == len(set(names)) and names[-1] == "tables"
    for k, task in enumerate(tasks):
        assert set(task.needs) <= set(names[:k]), task.name
        assert task.module or task.config().seed == 3
    trained = {task.name for task in tasks if not task.module}
    assert {f"eval_{system}" for system in trained} <= set(tasks[-1].needs), "everything that is trained is evaluated"
    if name == "paper":
        by_name = {task.name: task for task in tasks}
        assert by_name["eval_omni_7b_avatar"].layout() == by_name["omni_7b_avatar"].layout() > (1, 1)
        assert by_name["tables"].layout() == (1, 1)
        assert {"omni_7b_avatar", "omni_7b_avatar_wo_sft", "vl_7b_wo_tas", "omni_7b_tas_lambda_lam_2.0"} <= trained


def test_a_dry_run_prints_the_graph_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert reproduce.main(["profile=smoke", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "grpo: to do, 1 x 1 processes, after sft" in text and "9 tasks, 0 done" in text
    assert "python -m megatron_avatar.train recipe=tiny_avatar" in text
    assert not list(tmp_path.iterdir())
    assert reproduce.main(["profile=paper", "--dry-run"]) == 2
    assert "profile=paper needs data_omni=PATH" in capsys.readouterr().err


# ---- this machine ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_local_sweep_outlives_its_command_and_makes_good_a_killed_training(tmp_path):
    small.make(tmp_path)
    out = tmp_path / "sweep"
    settings = [s for s in small.arguments(tmp_path, out, recipe="tiny_sft", steps=8) if not s.startswith("recipe=")]
    command = [sys.executable, "slurm/sweep.py", "recipe=tiny_sft", "seed=0,1", "cluster=local", "concurrency=1",
               "checkpoint.every=2", *settings]
    left = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        end = time.monotonic() + 120
        while not (found := [run for run in out.glob("seed_*") if (run / "metrics.jsonl").exists()]):
            assert time.monotonic() < end
            time.sleep(0.1)
        left.kill()
        assert len(found) == 1, "one at a time"
        for process in psutil.process_iter(["cmdline"]):
            line = process.info["cmdline"] or []
            if "megatron_avatar.train" in line and f"output_dir={found[0]}" in line:
                os.kill(process.pid, signal.SIGKILL)
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    finally:
        for job in Board(out, [], local=True).jobs.values():
            if psutil.pid_exists(int(job)):
                os.kill(int(job), signal.SIGTERM)
    assert done.returncode == 0 and "submitted" not in done.stdout, done.stdout
    assert len((found[0] / "failures-seed_0.jsonl").read_text().splitlines()) == 1
    attempts = [json.loads(line)["step"] for line in (found[0] / "attempts.jsonl").read_text().splitlines()]
    assert len(attempts) == 2
    for run in out.glob("seed_*"):
        steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert steps == list(range(1, 9))
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert again.returncode == 0 and "submitted" not in again.stdout
