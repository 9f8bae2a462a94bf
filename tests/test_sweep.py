"""Sweeps and graphs before anything is submitted: members, names, refusals; and a local sweep that is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from eval.asking.benchmark import names
from eval.paper import spec
from megatron_avatar.config import load, load_config, save_config
from megatron_avatar.config.paths import NAMES, variable
from slurm import reproduce, sweep, totals
from slurm.graph import Graph, link
from slurm.jobs import Board, slurm_parameters
from slurm.pool import Pool
from slurm.profile import read_profile
from slurm.snapshot import FOLDERS
from slurm.tasks import Task, TaskFailed, composed
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
        (["sweep=shaping", "recipe=avatar_7b", "dry_run=true"], "that plans one training"),
        (["sweep=shaping", "recipe=avatar_7b", "++dry_run=true"], "that plans one training"),
        (["sweep=shaping", "recipe=avatar_7b", "--dry-run"], "that plans one training"),
        (["sweep=model_size"], "needs model_3b=FOLDER model_7b=FOLDER"),
        (["sweep=shaping", "recipe=avatar_7b", "concurrency=0"], "concurrency=0"),
        (["sweep=shaping", "recipe=avatar_7b", "rl.n_onn=3"], "linear_decay and 4 more: unknown key 'rl.n_onn'"),
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
    settings += ["parallel=a100_40g", 'cluster.sbatch=["--constraint=a100","--exclusive"]', "cluster.cpu_partition=cpu"]
    task = Task("a", Path("run"), settings, Path("run/done.json"))
    assert task.config().model.path == "/models/Qwen2.5-Omni-7B", "of the site"
    assert slurm_parameters(task.requests()[0]) == {
        "nodes": 2, "ntasks_per_node": 4, "cpus_per_task": 12, "time": 1440, "partition": "gpu",
        "account": "my_project", "gres": "gpu:4", "mem": "110G",
        "additional_parameters": {"requeue": True, "constraint": "a100", "exclusive": True},
    }  # fmt: skip
    for gres, option in (("gpu:a100:{n}", ["--gres=gpu:a100:4"]), ("", [])):
        task.settings = [*settings, f'cluster.gres="{gres}"']
        assert [o for o in task.requests()[0].line() if o.startswith("--g")] == option
    task = Task("b", Path("run"), settings, Path("run/done"), "eval.prepare", False, hours=9, memory=2**30)
    (asked,) = task.requests()
    assert (asked.tasks, asked.gres, dict(asked.named)["partition"], asked.minutes) == (1, "", "cpu", 1440)


# ---- the paper's graph ---------------------------------------------------------------------------------------------


def paper(tmp_path: Path) -> list[str]:
    (tmp_path / "model").mkdir(exist_ok=True)
    (tmp_path / "manifest.jsonl").touch()
    for name in set(names()) - {"held_out", "mmvu"}:
        (tmp_path / "benchmarks" / name).mkdir(parents=True, exist_ok=True)
    models = [f"{name}={tmp_path / 'model'}" for name in ("model_7b", "model_3b", "model_vl_7b", "vlaathinker_7b")]
    data = [f"{name}={tmp_path / 'manifest.jsonl'}" for name in ("data", "data_vl")]
    return [*models, *data, f"benchmarks={tmp_path / 'benchmarks'}"]


def test_a_path_may_hold_any_sign(tmp_path):
    odd = tmp_path / """it's "so": {out} #1, - [x] \\n ü"""
    odd.mkdir()
    profile, *_ = read_profile("paper", odd / "out", paper(odd))
    family = next(iter(profile["families"].values()))
    assert family["base"] == str(odd / "model") and profile["benchmarks"] == str(odd / "benchmarks")
    tiny, *_ = read_profile("tiny", odd / "out", [])
    assert repr(str(odd / "out"))[1:-1] in repr(tiny)


def built(name: str, tmp_path: Path) -> Graph:
    given = paper(tmp_path) if name == "paper" else []
    profile, settings, _ = read_profile(name, tmp_path / "out", [*given, "rl.beta=0.2"])
    return Graph(profile, tmp_path / "out", [*settings, "cluster=local"], retries="1").build()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["smoke", "tiny", "fresh", "paper"])
def test_every_task_comes_behind_what_it_needs(name, tmp_path):
    graph = built(name, tmp_path)
    tasks, by_name = graph.tasks, {task.name: task for task in graph.tasks}
    assert len(by_name) == len(tasks) and tasks[-1].name == "report" and tasks[-1].partial
    for k, task in enumerate(tasks):
        assert set(task.needs) <= {other.name for other in tasks[:k]}, task.name
        assert task.module or task.config().rl.beta == 0.2
    trained = {task.name for task in tasks if not task.module}
    evaluated = {need for task in tasks if task.module == "eval.run" for need in task.needs}
    assert trained <= evaluated, "everything that is trained is evaluated"
    assert {task.name for task in tasks if task.module == "eval.run"} == set(tasks[-1].needs)
    assert len({str(task.folder) for task in tasks if not task.module}) == len(trained)
    if name == "tiny":
        main = ("grpo", "avatar", "grpo_half")
        assert {f"tiny.{system}.{seed}" for system in main for seed in range(20, 36)} < trained
        assert [task for task in trained if ".sft." in task] == ["tiny.sft.20"], "one cold start for all seeds"
        assert by_name["tiny.avatar.35"].needs == ["tiny.sft.20"] and "gate" in by_name["tiny.sft.20"].needs
        start = by_name["tiny.sft.20"].folder
        assert by_name["tiny.avatar.35"].config().model.path == str(start / "export" / "sft")
        assert graph.links[start.parent / "seed_35"] == start and "eval.tiny.base.35.held_out" not in by_name
        assert "tiny.wo_revisits.24" in trained and "tiny.wo_revisits.25" not in trained
        assert "tiny.components_avatar.20" not in trained and "tiny.tas_lambda_lam_0.22" in trained
        full, half = by_name["tiny.grpo.20"].config(), by_name["tiny.grpo_half.20"].config()
        assert list(full.stages) == ["ladder"] and half.stages["ladder"].steps * 2 == full.stages["ladder"].steps
        step = next(task for task in tasks if task.name.startswith("eval.tiny.avatar.20.step_"))
        assert f"model={by_name['tiny.avatar.20'].folder}" in step.arguments and step.needs == ["tiny.avatar.20"]
    if name == "fresh":  # in the folder of "tiny" it goes on: whatever both have is the same
        settled = {task.name: task for task in built("tiny", tmp_path).tasks}
        for both in by_name.keys() & settled.keys() - {"report"}:
            ours, theirs = by_name[both], settled[both]
            assert ours.command == theirs.command if ours.module else ours.config() == theirs.config(), both
        assert "tiny.grpo_half.35" in by_name.keys() & settled.keys() and "tiny.grpo_half.22" not in by_name
        fresh, half = by_name["tiny.fresh.35"].config(), by_name["tiny.grpo_half.35"].config()
        assert (fresh.rl.n_on, fresh.rl.n_off) == (half.rl.n_on, half.rl.n_off) == (8, 0)
        assert fresh.rl.hints.enabled and fresh.rl.revisit_share == 0.5
        assert not half.rl.hints.enabled and half.rl.revisit_share == 0
    if name == "paper":
        assert by_name["eval.omni_7b.avatar.0.omnibench"].layout() == by_name["omni_7b.avatar.0"].layout() > (1, 1)
        assert by_name["report"].layout() == (1, 1) and graph.absent == {"mmvu"}
        lam, wo_sft = "omni_7b.tas_lambda_lam_2.0.0", "omni_7b.avatar_wo_sft.0"
        assert {"omni_7b.avatar.0", wo_sft, "vl_7b.wo_tas.0", lam} <= trained
        assert "prepare.worldsense" in by_name["eval.omni_7b.avatar.0.worldsense"].needs
        step = by_name["eval.omni_7b.avatar.0.step_400.tomato"]
        assert not any(a.startswith(("cluster=", "recipe=")) for a in step.arguments), "a run has its own"
        assert "eval.omni_7b.wo_tas.0.tomato" not in by_name
        assert "eval.vl_7b.vlaathinker_7b.0.mmk12" in by_name and "eval.vl_7b.openvlthinker_7b.0.mmk12" not in by_name
        # what computes the same is trained once
        links = {path.parent.name: target.parent.name for path, target in graph.links.items()}
        own = ("components_avatar", "tas_lambda_lam_0.3", "on_off_ratio_on4_off4", "rewards_plus_vcrs",
               "shaping_parabolic", "curriculum_stages_1_3")  # fmt: skip
        assert {links[twin] for twin in own} == {"avatar"}
        assert links["components_grpo"] == "grpo" and not {f"omni_7b.{twin}.0" for twin in links} & trained


@pytest.mark.parametrize("name", ["smoke", "tiny", "fresh"])
def test_what_a_profile_runs_is_in_a_jobs_snapshot(name, tmp_path):
    profile, *_ = read_profile(name, tmp_path, [])
    modules = [profile[key]["module"] for key in ("prepare", "gate") if key in profile]
    assert modules and {module.partition(".")[0] for module in modules} <= set(FOLDERS)


@pytest.mark.slow
def test_a_gate_stands_before_everything_and_is_asked_once(tmp_path):
    profile, settings, _ = read_profile("smoke", tmp_path / "out", [])
    profile["gate"] = {"module": "bench.world", "arguments": ["--limit", "8"]}
    profile["families"]["tiny"]["batch"] = 7
    graph = Graph(profile, tmp_path / "out", [*settings, "cluster=local"], "3").build()
    tasks = {task.name: task for task in graph.tasks}
    gate = tasks.pop("gate")
    assert (gate.retries, gate.needs, gate.partial) == (0, ["prepare"], False)

    def behind(name: str) -> bool:
        return name == "gate" or any(behind(need) for need in tasks[name].needs if need in tasks or need == "gate")

    assert {name for name in tasks if not behind(name)} == {"prepare"} and tasks["tiny.grpo.0"].retries == 3
    assert all(("batch=7" in task.arguments) is (task.module == "eval.run") for task in tasks.values())


@pytest.mark.slow
def test_the_papers_profile_evaluates_all_that_its_tables_show(tmp_path):
    graph = built("paper", tmp_path)
    evaluated = {(t.name.split(".")[1], a["system"], a["benchmark"]) for t in graph.tasks if t.module == "eval.run"
                 for a in [dict(item.split("=", 1) for item in t.arguments if "=" in item)]}
    evaluated |= {(f, twin.parent.name, b) for twin, other in graph.links.items() for f, s, b in evaluated
                  if twin.parts[-4] == "predictions" and (f, s) == (other.parts[-3], other.parent.name)}
    lacking = [
        (table, setting, benchmark) for table, plan in spec()["tables"].items() if plan["family"] != "tiny"
        for setting, systems in plan["rows"].items() if systems and systems != ["openvlthinker_7b"]
        for benchmark in plan["columns"].values() if benchmark != "mmvu"
        if not any((plan["family"], system, benchmark) in evaluated for system in systems)
    ]
    assert not lacking


def test_twins_are_links_and_nothing_that_is_there_is_touched(tmp_path):
    graph = Graph({}, tmp_path, [])
    twin, other = tmp_path / "runs/tiny/lam_0.3/seed_1", tmp_path / "runs/tiny/avatar/seed_1"
    graph.links[twin] = other
    other.mkdir(parents=True)
    (other / "done.json").touch()
    link(graph)
    link(graph)
    assert twin.is_symlink() and (twin / "done.json").exists() and twin.resolve() == other.resolve()
    graph.links[other] = twin
    with pytest.raises(ValueError, match="seed_1 isn't of this study"):
        link(graph)


def test_data_that_another_command_made_are_not_taken_for_done(tmp_path):
    task = Task("prepare", tmp_path, [], tmp_path / "prepare.done", "data_tools.synthesize", False, ["--seed", "0"])
    reproduce.check_done([task])
    task.mark_done()
    reproduce.check_done([task])
    task.arguments = ["--seed", "1"]
    with pytest.raises(ValueError, match="prepare was 'data_tools.synthesize --seed 0', not .* --seed 1"):
        reproduce.check_done([task])


def test_a_training_of_other_settings_is_not_taken_for_done(tmp_path):
    settings = ["recipe=tiny_sft", "model.path=assets/tiny_base", "data.manifest=-", "cluster=local"]
    run = tmp_path / "run"
    task = Task("sft", run, [*settings, f"output_dir={run}"], run / "done.json")
    run.mkdir()
    save_config(task.config(), run / "config.yaml")
    reproduce.check_done([task])
    task.settings.append("seed=5")
    with pytest.raises(ValueError, match="a run of other settings: seed was 0, now 5"):
        reproduce.check_done([task])


def test_a_dry_run_prints_the_graph_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    assert reproduce.main(["profile=smoke", "--dry-run=full"]) == 0
    text = capsys.readouterr().out
    assert "tiny.grpo.0: to do, 1 x 1 processes, after tiny.sft.0" in text and "26 tasks, 0 done" in text
    assert "python -m megatron_avatar.train recipe=tiny_avatar" in text
    assert reproduce.main(["profile=smoke", "--dry-run=full", "only=eval.tiny.grpo.1.held_out"]) == 0
    text = capsys.readouterr().out
    assert "5 tasks, 0 done" in text and "report: to do, 1 x 1 processes, after eval.tiny.grpo.1.held_out" in text
    assert reproduce.main(["profile=smoke", "--dry-run=full", "only=tiny.grpo.1"]) == 0
    assert "report: to do, 1 x 1 processes, after prepare, tiny.sft.1, tiny.grpo.1" in capsys.readouterr().out
    assert reproduce.main(["profile=smoke", "--dry-run", "only=none"]) == 2 and "only=none" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["assets"]


def test_the_papers_page_comes_in_seconds_without_any_folder(tmp_path, monkeypatch, capsys):
    """Jobs by kind, GPU hours, disk, and all that is missing with how to give it.

    Its time is that of composing configurations, a fifth of a second each: 495 tasks share a few dozen.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    for name in NAMES:
        monkeypatch.delenv(variable(name), raising=False)
    for known in (load._compose, composed):
        known.cache_clear()
    assert reproduce.main(["profile=paper", "--dry-run"]) == 0
    assert load._compose.cache_info().misses <= 30
    text = capsys.readouterr().out
    rows = {line.split("  ")[0]: line.split() for line in text.splitlines()}
    assert rows["trainings"][1:3] == ["42", "0"] and rows["evaluations"][1] == "430" and rows["all"][1] == "495"
    assert len(text.splitlines()) < 36 and "TiB are left at the end" in text
    others = [name for name in NAMES if name.startswith(("model_vl3", "model_omni3"))]  # no table has those
    wanted = [name for name in NAMES if name not in others]
    for name in wanted:
        assert f"{name} is not given" in text and f"export {variable(name)}=PATH" in text
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("COLUMNS", "80")
    assert reproduce.main(["profile=paper", "--dry-run"]) == 0
    wide = [line for line in capsys.readouterr().out.splitlines() if len(line) > 80]
    assert wide and all(line.startswith("    .venv/bin/") for line in wide), "commands alone, whole"
    assert reproduce.main(["profile=paper", "cluster=local"]) == 2
    said = capsys.readouterr().err
    assert "6 things are missing" in said and all(name in said for name in wanted)
    assert not any(name in text + said for name in others)


def test_a_run_of_the_graph_keeps_what_is_shown_of_it(tmp_path):
    graph = built("paper", tmp_path)
    kept = {task.name: task.config().checkpoint for task in graph.tasks if not task.module}
    assert kept["omni_7b.avatar.0"].milestones == [200, 400, 600, 800, 1000]
    assert not kept["omni_7b.tas_lambda_lam_2.0.0"].milestones and not kept["omni_3b.avatar.0"].milestones
    assert all(own.keep == 1 and not own.keep_finished for own in kept.values())
    by_name = {task.name: task for task in graph.tasks}
    without = by_name["omni_7b.avatar_wo_sft.0"]
    assert not without.needs and sum(s.startswith("model.path=") for s in without.settings) == 1, "no cold start"
    assert by_name["omni_7b.avatar.0"].needs == ["omni_7b.sft.0"]
    assert by_name["eval.omni_7b.avatar.0.lvbench"].hours > by_name["eval.omni_7b.avatar.0.dailyomni"].hours > 0
    drawn = by_name["eval.omni_7b.avatar.0.video_holmes-g8"]
    assert drawn.hours > by_name["eval.omni_7b.avatar.0.video_holmes"].hours, "eight completions an item"


def test_a_disk_that_cannot_hold_what_is_left_is_refused(tmp_path, monkeypatch):
    run = tmp_path / "run"
    settings = ["recipe=avatar_7b", "model.path=m", "data.manifest=d", f"output_dir={run}"]
    tasks = [Task(name, run, settings, run / "done.json") for name in "ab"]
    need = totals.disk(tasks, set())
    assert need.left == 2 * need.largest - 2 * totals.outline.checkpoint_bytes(
        tasks[0].config(), totals.outline.shape_of(tasks[0].config())), "without the one that is being written"
    for free, said in ((need.left - 1, "the trainings leave"), (need.most - 1, "lower concurrency"), (need.most, "")):
        usage = SimpleNamespace(free=free)
        monkeypatch.setattr(totals.shutil, "disk_usage", lambda _, usage=usage: usage)
        if said.startswith("the"):
            with pytest.raises(ValueError, match=said):
                totals.check_disk(tasks, set(), tmp_path)
        else:
            assert said in totals.check_disk(tasks, set(), tmp_path)


# ---- this machine ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.core
@pytest.mark.timeout(600)
def test_a_local_sweep_outlives_its_command_and_makes_good_a_killed_training(world, tmp_path):
    out = tmp_path / "sweep"
    settings = [s for s in small.arguments(world, out, recipe="tiny_sft", steps=8) if not s.startswith("recipe=")]
    command = [sys.executable, "slurm/sweep.py", "recipe=tiny_sft", "seed=0,1", "cluster=local", "concurrency=1",
               "checkpoint.every=2", *settings]
    left = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        while not (found := [run for run in out.glob("seed_*") if (run / "metrics.jsonl").exists()]):
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


def command(name: str, script: str, folder: Path, *, needs=(), partial=False, retries=0) -> Task:
    where = ["recipe=tiny_sft", "model.path=assets/tiny_base", "data.manifest=-", "cluster=local"]
    module = folder / f"{name.replace('.', '_')}_task.py"
    module.write_text(script)
    return Task(name, folder / "tasks", where, folder / "tasks" / f"{name}.done", module.stem, False, [], list(needs),
                partial, retries, str(folder))


def test_a_command_gets_its_cores_and_modules(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("slurm.tasks.subprocess.run", lambda command, env, **_: seen.append((command, env)) or SUCCESS)
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "7")
    task = command("a", "", tmp_path)
    task.settings.append("cluster.modules=[cuda/12,gcc]")
    assert task._run_on_slurm() == 0 and task.done.exists()
    (ran, environment), = seen
    assert ran[:3] == ["bash", "-c", 'module load cuda/12 gcc && exec "$@"'] and ran[4] == "srun"
    assert environment["SRUN_CPUS_PER_TASK"] == "7" and environment["PYTHONPATH"] == str(tmp_path)


SUCCESS = subprocess.CompletedProcess([], 0)


def test_a_pool_runs_what_is_ready_and_what_a_failure_leaves(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    order = f"open({str(tmp_path / 'order')!r}, 'a').write(__name__ and %r)"
    tasks = [
        command("a", order % "a", tmp_path),
        command("bad", "raise SystemExit(3)", tmp_path, needs=["a"], retries=2),
        command("behind", order % "behind", tmp_path, needs=["bad"]),
        command("report", order % "r", tmp_path, needs=["a", "behind"], partial=True),
    ]
    with pytest.raises(TaskFailed, match="ended without bad, behind"):
        Pool(tasks, [task.name for task in tasks], tmp_path, 2)()
    assert (tmp_path / "order").read_text() == "ar"
    assert len((tmp_path / "tasks" / "failures-bad.jsonl").read_text().splitlines()) == 3, "the first and two retries"
    assert {path.name for path in (tmp_path / "failed").iterdir()} == {"bad", "behind"}
    assert not list((tmp_path / "running").iterdir())


def test_a_stopped_or_hung_training_takes_nothing_from_the_retries_of_a_local_pool(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    script = f"import pathlib\nruns = pathlib.Path({str(tmp_path / 'runs')!r})\n"
    script += "runs.open('a').write('.')\nraise SystemExit([75, 76, 1, 76, 0][len(runs.read_text()) - 1])"
    task = command("a", script, tmp_path, retries=1)
    Pool([task], ["a"], tmp_path, 1)()
    assert task.done.exists() and (tmp_path / "runs").read_text() == "....."
    assert len((tmp_path / "tasks" / "failures-a.jsonl").read_text().splitlines()) == 1, "status 1 alone"
