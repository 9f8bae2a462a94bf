"""Scripts typed at a prompt: what they check, say and submit, with fakes of Slurm's commands."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_avatar.config import load_config
from megatron_avatar.config.load import CONFIG_DIR
from megatron_avatar.config.paths import NAMES, variable
from slurm import request, submit

ROOT = Path(__file__).parents[1]
# Takes jobs, but none that asks for more than $MOST_GIB; numbers count up.
SBATCH = """#!/bin/bash
echo "$*" >> "$RECORD"
for option; do
  [[ $option == --mem=*G && -n $MOST_GIB ]] || continue
  gib=${option#--mem=}; (( ${gib%G} <= MOST_GIB )) || {
    echo "allocation failure: Requested node configuration is not available" >&2; exit 1; }
done
[[ $* == *--test-only* ]] || wc -l < "$RECORD"
"""
LARGE = ("import shutil, collections\n"
         "shutil.disk_usage = lambda p: collections.namedtuple('usage', 'total used free')(1 << 50, 0, 1 << 50)\n")


@pytest.fixture
def prompt(tmp_path):
    """Types a line into a shell of an empty folder, beside a Slurm that takes everything: (process, sbatch's lines)."""
    programs, record = tmp_path / "bin", tmp_path / "record"
    programs.mkdir()
    for name, text in {"sbatch": SBATCH, "squeue": "#!/bin/sh\n", "scancel": '#!/bin/sh\necho cancel $* >> "$RECORD"\n',
                       "vllm": "#!/bin/sh\n"}.items():  # fmt: skip
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    (programs / "sitecustomize.py").write_text(LARGE)
    folder = tmp_path / "omni"
    shutil.copytree(CONFIG_DIR / "shapes" / "qwen2_5_omni_7b", folder)
    for name in ("model.safetensors", "tokenizer.json"):
        (folder / name).touch()
    (tmp_path / "manifest.jsonl").write_text("{}\n")
    (tmp_path / "work").mkdir()

    def type_in(*words: str, **environment: str) -> tuple[subprocess.CompletedProcess, list[str]]:
        record.unlink(missing_ok=True)
        shell = {k: v for k, v in os.environ.items() if not k.startswith(("AVATAR_", "SLURM", "SBATCH"))}
        shell |= {"PATH": f"{programs}:{os.environ['PATH']}", "PYTHON": sys.executable, "PYTHONPATH": str(programs),
                  "RECORD": str(record), **environment}  # fmt: skip
        done = subprocess.run(["bash", *words], cwd=tmp_path / "work", env=shell, capture_output=True, text=True,
                              timeout=60)
        return done, record.read_text().splitlines() if record.exists() else []

    type_in.given = {"AVATAR_MODEL_7B": str(folder), "AVATAR_DATA": str(tmp_path / "manifest.jsonl")}
    type_in.work = tmp_path / "work"
    return type_in


AVATAR = str(ROOT / "slurm" / "avatar_7b.sh")


def test_without_arguments_all_that_is_missing_is_said_and_nothing_submitted(prompt):
    done, lines = prompt(AVATAR)
    assert done.returncode == 2 and not lines and not list(prompt.work.iterdir())
    assert "2 things are missing" in done.stderr and all(
        words in done.stderr for words in ("AVATAR_MODEL_7B", "AVATAR_DATA", "hf download", "prepare --sources"))


def test_it_says_what_the_job_will_do_and_submits_it_once_slurm_would_take_it(prompt):
    done, lines = prompt(AVATAR, "seed=3", "-p", "gpu", "--comment", "x y", "~stages.localisation", **prompt.given)
    assert done.returncode == 0, done.stderr
    for words in ("(AVATAR_MODEL_7B, without a cold start)", "runs/avatar_7b: new", "tp 4 x pp 1 x dp 1", "by the plan",
                  "time limit 8:50 h", "164 GiB a node by the plan, it gets 170", "no cold start", "--with-sft trains",
                  "job 2: avatar_7b", "slurm-avatar_7b-2.out"):  # fmt: skip
        assert words in done.stdout, words
    asked, sent = lines
    options = ("--nodes=1 --ntasks-per-node=4 --cpus-per-task=12 --time=530 --gres=gpu:4 --mem=170G --signal=USR1@300 "
               "--partition=gpu --comment=x y")  # fmt: skip
    assert asked == f"--test-only {options}"
    assert sent == (f"--parsable {options} {AVATAR} seed=3 ~stages.localisation "
                    f"model.path={prompt.given['AVATAR_MODEL_7B']} data.manifest={prompt.given['AVATAR_DATA']}")
    done, lines = prompt(AVATAR, "--check", **prompt.given)
    assert done.returncode == 0 and len(lines) == 1 and lines[0].startswith("--test-only")


def test_the_cold_start_goes_first_and_the_job_behind_it(prompt):
    done, lines = prompt(AVATAR, "--with-sft", "rl.n_on=8", "parallel=h100_80g", "--job-name=mine", **prompt.given)
    assert done.returncode == 0, done.stderr
    first, second = lines[2:]
    assert f"{ROOT}/slurm/sft_7b.sh parallel=h100_80g model.path={prompt.given['AVATAR_MODEL_7B']}" in first
    assert "rl.n_on" not in first and "--job-name" not in first
    assert "--dependency=afterok:3 --kill-on-invalid-dep=yes" in second and "--job-name=mine" in second
    assert "rl.n_on=8 parallel=h100_80g model.path=runs/sft_7b/export/sft" in second
    export = prompt.work / "runs/sft_7b/export/sft"
    shutil.copytree(prompt.given["AVATAR_MODEL_7B"], export)
    done, lines = prompt(AVATAR, "--with-sft", **prompt.given)
    assert len(lines) == 2 and "the cold start's export of sft_7b" in done.stdout, "it is there already"
    done, lines = prompt(AVATAR, "--with-sft", "model.path=x", **prompt.given)
    assert done.returncode == 2 and "leave out model.path=" in done.stderr and not lines
    done, _ = prompt(str(ROOT / "slurm/vl_7b.sh"), "--with-sft", **prompt.given)
    assert "vl_7b has no cold start" in done.stderr


def test_the_judge_is_submitted_with_the_training_that_it_releases(prompt):
    done, lines = prompt(AVATAR, "--with-judge", "-A", "me", "--time=3:00:00", **prompt.given)
    assert done.returncode == 0, done.stderr
    training, judge = (line for line in lines if "--test-only" not in line)
    folder = "runs/avatar_7b/judge_server"
    assert " --hold " in training and f"judge.endpoint={folder}" in training
    assert judge.endswith(f"{ROOT}/slurm/judge.sh {folder} OpenGVLab/InternVL3-2B") and "--gres=gpu:1" in judge
    assert "--account=me" in judge and "--time=3:00:00" in judge and "--hold" not in judge
    assert (prompt.work / folder / ".for").read_text() == "2\n", "whom it releases, and ends with"
    done, lines = prompt(AVATAR, "--with-judge", **prompt.given, VLLM="/no/vllm")
    assert done.returncode == 2 and "--with-judge needs vLLM" in done.stderr and len(lines) == 1
    done, lines = prompt(AVATAR, "--with-judge", "~stages.localisation", **prompt.given)
    assert "no stage of avatar_7b has a judge reward" in done.stderr
    done, lines = prompt(AVATAR, "--with-judge", "--with-sft", "output_dir=x", **prompt.given)
    queued = [line for line in lines if "--test-only" not in line]
    assert [("--dependency=afterok:3" in line) for line in queued] == [False, True, True], "both wait"


def test_where_no_node_has_the_memory_checkpoints_are_written_in_pieces(prompt):
    done, lines = prompt(AVATAR, **prompt.given, MOST_GIB="128")
    assert done.returncode == 0, done.stderr
    assert "--mem=170G" in lines[0] and "--mem=60G" in lines[1] and "--mem=60G" in lines[2]
    assert "it gets 60: checkpoints are written in pieces" in done.stdout
    done, lines = prompt(AVATAR, **prompt.given, MOST_GIB="32")
    assert done.returncode == 2 and len(lines) == 2 and "Slurm refuses such a job" in done.stderr
    done, lines = prompt(AVATAR, "--mem=40G", **prompt.given)
    assert lines[0].count("--mem") == 1, "the user's word"


def test_what_the_user_asks_for_wins(prompt):
    done, lines = prompt(AVATAR, "--gpus-per-node=a100:4", **prompt.given, SBATCH_TIMELIMIT="9", SBATCH_PARTITION="p")
    assert "--gres=none" in lines[-1] and "--gpus-per-node=a100:4" in lines[-1]
    assert "--time" not in lines[-1] and "--partition" not in lines[-1], "the variables' words"
    assert "time limit" not in done.stdout
    done, lines = prompt(AVATAR, **prompt.given, SBATCH_GPUS_PER_NODE="a100:4", SBATCH_MEM_PER_CPU="4G")
    assert "--gres=none" in lines[-1] and "--mem" not in lines[-1], "GPUs and memory by variables of other names"
    done, lines = prompt(AVATAR, "cluster.partition=q", "cluster.minutes=100", **prompt.given)
    assert "--time=100" in lines[-1] and "--partition=q" in lines[-1] and "time limit 1:40 h" in done.stdout
    done, lines = prompt(AVATAR, "-t", "50", "cluster.gres=", **prompt.given)
    assert lines[-1].count("--time") == 1 and "--time=50" in lines[-1]
    assert "--gres=none" in lines[-1], "a site without GRES: the script's own line asks for GPUs"
    done, lines = prompt(AVATAR, "--nodes=2", "--ntasks-per-node=8", **prompt.given)
    assert done.returncode == 2 and "leaves some of 4 data-parallel ranks idle" in done.stderr and not lines
    for words, says in ((["-Q", "x"], "in its long form"), (["model"], "neither an option nor key=value"),
                        (["--nodes=two"], "--nodes=two: write a whole number"),
                        (["model.path=/no/where"], "model.path=/no/where is no folder"),
                        (["cluster.gpu_memory_gib=40"], " GiB of a GPU, which has cluster")):  # fmt: skip
        done, lines = prompt(AVATAR, *words, **prompt.given)
        assert done.returncode == 2 and says in done.stderr and not lines, done.stderr


def test_one_node_of_eight_as_the_readme_says(prompt):
    options = ["--nodes=1", "--ntasks-per-node=8"]
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"`bash slurm/avatar_7b_cluster.sh {' '.join(options)}`" in readme
    done, lines = prompt(str(ROOT / "slurm" / "avatar_7b_cluster.sh"), *options, **prompt.given)
    assert done.returncode == 0, done.stderr
    assert "--nodes=1" in lines[-1] and "--ntasks-per-node=8" in lines[-1] and "--gres=gpu:8" in lines[-1]
    assert "tp 4 x pp 1 x dp 2" in done.stdout


def test_without_slurm_it_says_what_to_type_instead(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    config = load_config(["recipe=avatar_7b", "model.path=m", "data.manifest=d"])
    with pytest.raises(ValueError, match="run this on a login node, or type it"):
        request.first_accepted(request.trainings(config, 1, 4), otherwise="type it")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(submit.launch, "check", lambda *a, **k: {})
    with pytest.raises(ValueError, match="torchrun --nproc-per-node 4 -m megatron_avatar.train recipe=avatar_7b model"):
        submit.plan(Path(AVATAR), submit.split(["model.path=m", "data.manifest=d"]))


def test_a_plan_asks_for_neither_model_nor_data_and_submits_nothing(prompt):
    done, lines = prompt(AVATAR, "dry_run=true")
    assert done.returncode == 0 and "tp 4" in done.stdout and not lines, done.stderr
    done, lines = prompt(AVATAR, "dry_run=true", "cluster.gpus=6")
    assert done.returncode == 2 and "multiple of 4 processes" in done.stdout + done.stderr and not lines


def test_a_complete_run_is_not_submitted_again(prompt):
    (prompt.work / "runs/avatar_7b").mkdir(parents=True)
    (prompt.work / "runs/avatar_7b/done.json").write_text("{}")
    done, lines = prompt(AVATAR, **prompt.given)
    assert done.returncode == 0 and "complete: nothing to submit" in done.stdout and len(lines) == 1


@pytest.mark.parametrize("script", sorted((ROOT / "slurm").glob("*.sh")), ids=lambda path: path.stem)
def test_every_training_script_can_be_typed(script):
    text = script.read_text()
    if "/common.sh" not in text or script.name == "common.sh":
        with pytest.raises(ValueError, match="trains no recipe"):
            submit.recipe_of(script)
        return
    assert text.count("submit.sh") == 2 and submit.recipe_of(script) in (script.stem, "tiny_sft")
    config = load_config([f"recipe={submit.recipe_of(script)}", "model.path=m", "data.manifest=d"])
    asked = {line.partition("=")[0][10:]: line.strip().partition("=")[2] for line in text.splitlines()
             if line.startswith("#SBATCH --")}  # fmt: skip
    (first, *_) = request.trainings(config, int(asked["nodes"]), int(asked["ntasks-per-node"]))
    assert asked["mem"] == f"{first.memory}G", "as the plan says, where the script is submitted by itself"


def test_sites_that_are_short_of_memory(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(variable(name), raising=False)
    given = ["recipe=avatar_7b", "model.path=m", "data.manifest=d"]
    for gib, memories in {0: [170, 60], 500: [170, 60], 100: [60]}.items():
        config = load_config([*given, f"cluster.host_memory_gib={gib}"])
        assert [one.memory for one in request.trainings(config, 1, 4)] == memories
    with pytest.raises(ValueError, match="take 52 GiB of a node's memory at least, and cluster.host_memory_gib=40"):
        request.trainings(load_config([*given, "cluster.host_memory_gib=40"]), 1, 4)
    (first, _) = request.trainings(load_config([*given, "cluster.memory=all", "cluster.minutes=100"]), 1, 4) * 2
    assert "--mem=0" in first.line() and first.minutes == 100
