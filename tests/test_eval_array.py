"""slurm/eval.sh: what is submitted, what a task runs, and that a task which was stopped goes on; with a fake Slurm."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from slurm import eval_array

ROOT = Path(__file__).parents[1]
WORDS = ["recipe=tiny_avatar", f"model={ROOT / 'assets/tiny_base'}"]
PROGRAMS = {
    "srun": '#!/bin/bash\n{ printf "%s\\n" "$@"; env | grep ^SLURM_; } >> "$RECORD"\n'
            'for n in $TELLS; do touch "$AVATAR_ENDED-$n"; done\n'
            'exit "${SRUN_STATUS:-0}"\n',
    "scontrol": '#!/bin/bash\ncase "$1 $2" in\n  "show hostnames") echo n1 ;;\n'
                f'  "show job") echo "   Command={ROOT}/slurm/eval.sh a" ;;\n  *) echo "$*" >> "$RECORD" ;;\nesac\n',
    "squeue": '#!/bin/sh\necho RUNNING\n',
    "sbatch": '#!/bin/bash\necho "$*" >> "$RECORD"\n[[ $* == *--test-only* ]] || echo 7\n',
}  # fmt: skip


@pytest.fixture
def data(tmp_path) -> Path:
    for name in ("omnibench", "mmk12"):
        (tmp_path / "data" / name).mkdir(parents=True)
    return tmp_path / "data"


@pytest.fixture
def shell(tmp_path):
    """Runs eval.sh, typed or as Slurm runs its copy of it: (process, what Slurm's commands were told)."""
    (tmp_path / "bin").mkdir()
    for name, text in PROGRAMS.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)

    def run(
        *words: str, task: int | None = None, alone: bool = False, **more: str
    ) -> tuple[subprocess.CompletedProcess, list[str]]:
        script, record = ROOT / "slurm" / "eval.sh", tmp_path / "record"
        record.unlink(missing_ok=True)
        shell = {k: v for k, v in os.environ.items() if not k.startswith(("AVATAR_", "SLURM", "SBATCH"))}
        shell |= {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHON": sys.executable, "RECORD": str(record)}
        if task is not None:
            script = Path(shutil.copy(script, tmp_path / "slurm_script"))
            shell |= {"SLURM_JOB_ID": "50", "SLURM_ARRAY_JOB_ID": "49", "SLURM_ARRAY_TASK_ID": str(task),
                      "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_NODELIST": "n1", "SLURM_NTASKS_PER_NODE": "2"}
        words = (*([] if alone else WORDS), f"data={tmp_path / 'data'}", *words)
        done = subprocess.run(["bash", script, *words], cwd=tmp_path, env=shell | more, capture_output=True, text=True,
                              timeout=60)  # fmt: skip
        return done, record.read_text().splitlines() if record.exists() else []

    return run


def test_typed_it_submits_a_task_for_each_benchmark_that_is_there(shell, data):
    done, (asked, sent) = shell("-p", "gpu", "out=o")
    assert done.returncode == 0, done.stderr
    assert "2 benchmarks: mmk12, omnibench" in done.stdout and "h at most, into o" in done.stdout
    assert "--test-only" in asked and "--array=0-1" in sent and "--partition=gpu" in sent and "--gres=none" in sent
    assert f"data={data} benchmarks=mmk12,omnibench" in sent, "what is there may change until the tasks start"
    done, (_, sent) = shell("--array=1%1", "benchmarks=omnibench,mmk12", SBATCH_TIMELIMIT="30")
    assert "--array=1%1" in sent and "--time" not in sent and "at most" not in done.stdout
    done, sent = shell("--with-sft")
    assert done.returncode == 2 and "--with-sft: of a training" in done.stderr and not sent
    done, sent = shell("--check")
    assert done.returncode == 0 and len(sent) == 1 and "--test-only" in sent[0]


def test_without_slurm_it_says_what_to_type_instead(data, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="torchrun --nproc-per-node 1 -m eval.run benchmark=mmk12 data=") as found:
        eval_array.submit(ROOT / "slurm" / "eval.sh", [*WORDS, f"data={data}"])
    assert "cluster=local" not in str(found.value)


@pytest.mark.parametrize(("words", "says"), [
    (["benchmarks=lvbench"], "has no folder lvbench: python -m eval.run --benchmarks lvbench"),
    (["benchmarks=nothing"], "nothing"),
    (["--ntasks-per-node=3", "parallel.tp=2"], "take a multiple of 2"),
    (["data=/no/where"], "data=/no/where is no folder"),
])  # fmt: skip
def test_what_is_wrong_is_said_before_anything_is_submitted(shell, data, words, says):
    done, sent = shell(*words)
    assert done.returncode == 2 and says in done.stderr and not sent


def test_a_task_runs_its_benchmark(shell, data, tmp_path):
    done, seen = shell("out=o", task=1)
    assert done.returncode == 0, done.stderr
    assert seen[:2] == ["--kill-on-bad-exit=1", "--ntasks-per-node=2"] and seen[seen.index("-m") + 1] == "eval.run"
    assert {"benchmark=omnibench", f"data={data / 'omnibench'}", "out=o"} <= set(seen)
    assert {"SLURM_WAIT=300", "SLURM_EXPORT_ENV=ALL"} <= set(seen), "as of trainings"
    done, seen = shell("out=o", task=1, SLURM_NTASKS_PER_NODE="", SLURM_TASKS_PER_NODE="3(x1)")
    assert "--ntasks-per-node=3" in seen
    done, _ = shell("out=o", task=1, PYTHON="/no/python")
    assert done.returncode == 2 and "/no/python is missing" in done.stderr
    done, seen = shell("out=o", task=2)
    assert done.returncode == 2 and "write --array=0-1" in done.stderr and not seen


@pytest.mark.parametrize(("status", "tells", "means"), [
    (137, "75", 75),  # srun names the rank that it killed; one had told that its answers are kept
    (143, "74 1", 1 + 142),  # a failure, and the others were told to leave
    (138, "", 75),  # Slurm's notice, before Python could answer
    (75, "", 75),
    (137, "", 137),
    (2, "2 74", 2),
])  # fmt: skip
def test_a_task_that_was_stopped_goes_back_into_the_queue(shell, data, tmp_path, status, tells, means):
    done, seen = shell("out=o", task=0, SRUN_STATUS=str(status), TELLS=tells)
    assert done.returncode == means, done.stderr
    assert ("requeue 49_0" in seen) == (means == 75)
    assert not list((tmp_path / "o").glob(".ended-*"))


def test_a_task_that_may_not_be_requeued_says_so(shell, data, tmp_path):
    (tmp_path / "bin" / "scontrol").write_text(PROGRAMS["scontrol"].replace(
        '*) echo "$*" >> "$RECORD" ;;', '*) echo "Requested operation is presently disabled" >&2; exit 1 ;;'))
    done, _ = shell("out=o", task=0, SRUN_STATUS="75")
    assert done.returncode == 75 and "can't be queued again (Requested operation is presently disabled)" in done.stderr


def test_a_container_sees_where_answers_go(data, tmp_path, monkeypatch):
    (tmp_path / "image.sif").touch()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(f"model:\n  path: {ROOT / 'assets/tiny_base'}\n"
                                                  f"output_dir: {tmp_path / 'run'}\n")
    for name, value in {"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_JOB_ID": "4", "SLURM_NTASKS_PER_NODE": "1"}.items():
        monkeypatch.setenv(name, value)
    words = [f"data={data}", f"model={tmp_path / 'run'}", f"out={tmp_path / 'out'}", "cluster.runtime=pyxis",
             f"cluster.container={tmp_path / 'image.sif'}"]
    monkeypatch.chdir(ROOT)
    text = eval_array.task(words)
    for folder in ("run", "out", "data/mmk12"):
        assert f"{tmp_path / folder}:{tmp_path / folder}" in text, folder


def test_a_run_is_evaluated_with_its_own_configuration(data, tmp_path, monkeypatch):
    monkeypatch.delenv("AVATAR_BENCHMARKS", raising=False)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(f"model:\n  path: {ROOT / 'assets/tiny_base'}\n")
    found = eval_array.evaluations([f"data={data}", f"model={tmp_path / 'run'}", "benchmarks=mmk12"])
    assert [one.request.benchmark for one in found] == ["mmk12"]
    assert not any("recipe=" in word for word in found[0].words)
    with pytest.raises(ValueError, match="export AVATAR_BENCHMARKS=FOLDER"):
        eval_array.evaluations(WORDS)
    monkeypatch.setenv("AVATAR_BENCHMARKS", str(data))
    assert [one.request.benchmark for one in eval_array.evaluations(WORDS)] == ["mmk12", "omnibench"]


def test_what_is_sent_is_what_was_checked_of_a_run_and_of_a_folder(data, tmp_path, monkeypatch):
    monkeypatch.setenv("AVATAR_CLUSTER", "local")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(f"model:\n  path: {ROOT / 'assets/tiny_base'}\n")
    for model, site in ((["model=~/run"], []), (WORDS, ["cluster=local"]), ([*WORDS, "cluster=example"], [])):
        tasks = eval_array.evaluations([f"data={data}", *model])
        sent = eval_array.with_names(model, tasks)
        assert sent == [f"data={data}", "benchmarks=mmk12,omnibench", *model, *site]
        again = eval_array.evaluations(sent)
        assert [(one.request, one.config.cluster) for one in again] == [(t.request, t.config.cluster) for t in tasks]


def test_a_run_is_submitted_where_a_site_is_set(shell, data, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(f"model:\n  path: {ROOT / 'assets/tiny_base'}\n")
    done, (_, sent) = shell(f"model={tmp_path / 'run'}", alone=True, AVATAR_CLUSTER="local")
    assert done.returncode == 0 and "cluster=" not in sent, done.stderr


def test_an_end_that_cant_be_read_is_no_mistake_of_the_users(monkeypatch, capsys):
    def broken(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(eval_array.ended, "forget", broken)
    monkeypatch.setenv("AVATAR_ENDED", "/no/where")
    assert [eval_array.main(["end", status]) for status in ("0", "143")] == [1, 143]
    assert "Input/output error" in capsys.readouterr().err
