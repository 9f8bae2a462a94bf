"""The sbatch scripts, run with a fake Slurm on PATH: what srun would start, with which environment."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from megatron_avatar.config import Config, check_world, load_config
from megatron_avatar.config.load import CONFIG_DIR

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path for path in (ROOT / "slurm").glob("*.sh") if "/common.sh" in path.read_text())
FAKE_SRUN = """#!/bin/bash
{ printf '%s\\n' "$@"; echo "cwd=$PWD"; env | grep -E '^(MASTER_|SRUN_|HDF5_|AVATAR_|NCCL_|PYTHON)'; } >> "$RECORD"
[[ "$*" == *preflight* ]] && exit "${PREFLIGHT_STATUS:-0}"
exit "${SRUN_STATUS:-0}"
"""
FAKE_SCONTROL = "#!/bin/bash\n[[ $1 == show ]] && printf 'localhost\\nnode2\\n' || echo \"$*\" >> \"$RECORD\"\n"


def directives(script: Path) -> dict[str, str]:
    found = re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", script.read_text(), re.MULTILINE)
    return {key: value for key, value in found}


@pytest.fixture
def submit(tmp_path):
    """Runs a script as Slurm does: a spooled copy, from another folder, with a job's environment. Model and data are
    empty files of the right names: nothing is started."""
    programs, spool, record, folder = tmp_path / "bin", tmp_path / "spool", tmp_path / "record", tmp_path / "model"
    for path in (programs, spool, folder):
        path.mkdir()
    (tmp_path / "manifest.jsonl").write_text("{}\n")
    for name in ("model.safetensors", "tokenizer.json"):
        (folder / name).touch()
    for name, text in {"srun": FAKE_SRUN, "scontrol": FAKE_SCONTROL, "squeue": "#!/bin/sh\necho RUNNING\n"}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)

    def run(script: Path, *arguments: str, **environment: str) -> tuple[subprocess.CompletedProcess, list[str]]:
        copy = shutil.copy(script, spool / "slurm_script")
        shutil.copy(CONFIG_DIR / "shapes" / "qwen2_5_omni_7b" / "config.json", folder)
        options = directives(script)
        job = {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "PYTHON": sys.executable,
            "RECORD": str(record),
            "SLURM_CPUS_PER_TASK": options["cpus-per-task"],
            "SLURM_GPUS_ON_NODE": options.get("gpus-per-node", "0"),
            "SLURM_JOB_ID": "123456",
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_JOB_NUM_NODES": options["nodes"],
            "SLURM_NTASKS_PER_NODE": options["ntasks-per-node"],
            "SLURM_SUBMIT_DIR": str(ROOT),
            **environment,
        }
        settings = [f"model.path={folder}", f"data.manifest={tmp_path / 'manifest.jsonl'}",
                    f"output_dir={tmp_path / 'run'}"]
        done = subprocess.run(["bash", copy, *settings, *arguments], cwd=spool, env=job, capture_output=True, text=True,
                              timeout=60)
        return done, record.read_text().splitlines() if record.exists() else []

    yield run
    for link in (ROOT / ".jobs").glob("*"):
        if not link.exists() or str(tmp_path) in str(link.resolve()):
            link.unlink()


@pytest.mark.parametrize("script", SCRIPTS[::4], ids=lambda path: path.stem)
def test_starts_one_process_a_task_from_a_snapshot(submit, script, tmp_path):
    options = directives(script)
    done, seen = submit(script, "seed=3", 'name="a b"')
    assert done.returncode == 0, done.stderr
    srun = ["--label", "--kill-on-bad-exit=1", f"--ntasks-per-node={options['ntasks-per-node']}", sys.executable, "-m"]
    assert seen[:3] == srun[:3] and seen[3] == "bash" and seen[seen.index("slurm.preflight") - 2] == sys.executable
    train = seen.index("megatron_avatar.train")
    assert seen[train - 5 : train] == srun and seen[train + 1] == f"recipe={options['job-name']}"
    assert "seed=3" in seen[train:] and 'name="a b"' in seen[train:]
    snapshot = tmp_path / "run" / "snapshots" / "123456"
    for line in (f"cwd={ROOT}", "MASTER_ADDR=localhost", "HDF5_USE_FILE_LOCKING=FALSE", "PYTHONSAFEPATH=1",
                 f"PYTHONPATH={snapshot}", f"SRUN_CPUS_PER_TASK={options['cpus-per-task']}", "AVATAR_CHAIN=123456",
                 "AVATAR_NODES=localhost node2 ", "NCCL_DEBUG=WARN"):
        assert line in seen[train:]
    assert load_config([f"recipe={options['job-name']}", "model.path=m", "data.manifest=d"]).rl == OmegaConf.to_object(
        OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(snapshot / "config.yaml"))).rl
    assert (snapshot / "slurm" / "common.sh").read_bytes() == (ROOT / "slurm" / "common.sh").read_bytes()
    (port,) = {int(line.partition("=")[2]) for line in seen if line.startswith("MASTER_PORT=")}
    assert 1024 < port < 32768, "below Linux's range for outgoing connections"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_asks_for_what_the_recipe_needs(script):
    options = directives(script)
    config = load_config([f"recipe={options['job-name']}", "model.path=m", "data.manifest=d"])
    assert check_world(config, int(options["nodes"]) * int(options["ntasks-per-node"])) >= 1
    assert options.get("gpus-per-node", options["ntasks-per-node"]) == options["ntasks-per-node"]
    assert options["open-mode"] == "append" and {"requeue", "signal"} <= options.keys()


def test_two_jobs_take_different_ports(submit, tmp_path):
    _, seen = [submit(SCRIPTS[0], f"output_dir={tmp_path / job}", SLURM_JOB_ID=job) for job in ("7", "8")][-1]
    assert len({line for line in seen if "MASTER_PORT" in line}) == 2


def test_two_jobs_do_not_write_the_same_run(submit):
    assert submit(SCRIPTS[0], SLURM_JOB_ID="7")[0].returncode == 0
    assert submit(SCRIPTS[0], SLURM_JOB_ID="7", SLURM_RESTART_COUNT="1")[0].returncode == 0
    assert submit(SCRIPTS[0], SLURM_JOB_ID="8", AVATAR_CHAIN="7")[0].returncode == 0, "it takes the other's place"
    done, _ = submit(SCRIPTS[0], SLURM_JOB_ID="9")
    assert done.returncode == 2 and "job 7 works on this run" in done.stderr


def test_failures_end_the_job_with_a_reason(submit):
    assert submit(SCRIPTS[0], SRUN_STATUS="3")[0].returncode == 3
    done, _ = submit(SCRIPTS[0], PYTHON="missing/python")
    assert done.returncode == 2 and "missing/python is missing" in done.stderr


def test_training_does_not_start_where_the_pre_flight_fails(submit):
    done, seen = submit(SCRIPTS[0], PREFLIGHT_STATUS="2")
    assert done.returncode == 2 and "megatron_avatar.train" not in seen


@pytest.mark.parametrize(
    ("arguments", "environment", "says"),
    [
        (["rl.n_onn=3"], {}, "unknown key 'rl.n_onn'"),
        (["parallel.tp=8"], {}, "need a multiple of 8 processes, but 4 were started"),
        ([], {"SLURM_GPUS_ON_NODE": "2"}, "the job has 2 GPUs on this node for 4 processes"),
        (["data.manifest=/nowhere.jsonl"], {}, "data.manifest=/nowhere.jsonl doesn't exist"),
        (["cluster.container=/no/image.sif"], {}, "cluster.container=/no/image.sif doesn't exist"),
        (["cluster=nowhere"], {}, "cluster=nowhere: there is no such cluster"),
        (["output_dir=/proc/run"], {}, "nothing can be written into /proc"),
    ],
)  # fmt: skip
def test_mistakes_are_refused_before_anything_is_started(submit, arguments, environment, says):
    done, seen = submit(ROOT / "slurm" / "avatar_7b.sh", *arguments, **environment)
    assert done.returncode == 2 and says in done.stderr and not seen, done.stderr


def test_a_containers_and_modules_settings_reach_the_command(submit, tmp_path):
    (tmp_path / "bin" / "module").write_text('#!/bin/bash\necho "module $*" >> "$RECORD"\n')
    (tmp_path / "bin" / "module").chmod(0o755)
    image = tmp_path / "image.sif"
    image.touch()
    common = (f"cluster.container={image}", f"cluster.mounts=[{tmp_path}:/data]", "cluster.modules=[cuda/13.0,nccl]")
    done, seen = submit(SCRIPTS[0], *common, "cluster.runtime=apptainer", "+cluster.env.NCCL_IB_HCA=mlx5")
    assert done.returncode == 0, done.stderr
    assert seen[0] == "module load cuda/13.0 nccl" and "NCCL_IB_HCA=mlx5" in seen
    start, own = seen.index("apptainer"), [f"{p}:{p}" for p in (ROOT, tmp_path / "run", tmp_path / "model", tmp_path)]
    binds = [item for mount in (*own, f"{tmp_path}:/data") for item in ("--bind", mount)]
    command = ["apptainer", "exec", "--nv", "--pwd", str(ROOT), *binds, str(image), "python3"]
    assert seen[start : start + len(command)] == command
    done, seen = submit(SCRIPTS[0], *common, "cluster.python=python")
    assert f"--container-image={image}" in seen and f"--container-mounts={','.join(own)},{tmp_path}:/data" in seen
    assert "python" in seen


def test_a_requeued_job_runs_its_snapshot(submit, tmp_path):
    submit(SCRIPTS[0])
    snapshot = tmp_path / "run" / "snapshots" / "123456"
    marker = snapshot / "slurm" / "common.sh"
    marker.write_text(marker.read_text() + "\necho from the snapshot\n")
    done, seen = submit(SCRIPTS[0], SLURM_RESTART_COUNT="1")
    assert done.returncode == 0 and "from the snapshot" in done.stdout, done.stderr
    assert sorted(path.name for path in (tmp_path / "run" / "logs").iterdir()) == ["123456.0.log", "123456.1.log"]


def test_a_stopped_job_goes_back_into_the_queue(submit, tmp_path):
    (tmp_path / "bin" / "srun").write_text('#!/bin/bash\n[[ "$*" == *preflight* ]] || touch "$AVATAR_STOPPED"\n')
    done, seen = submit(SCRIPTS[0])
    assert done.returncode == 0 and seen == ["requeue 123456"]


def test_where_requeueing_is_refused_the_script_is_submitted_again_with_its_options(submit, tmp_path):
    programs = {
        "srun": '#!/bin/bash\n[[ "$*" == *preflight* ]] || touch "$AVATAR_STOPPED"\n',
        "scontrol": "#!/bin/bash\n[[ $1 == show ]] && echo localhost\n[[ $1 != requeue ]]\n",
        "sbatch": '#!/bin/bash\n{ printf "%s\\n" "$@"; env | grep "^AVATAR_"; } > "$RECORD"; echo 77\n',
        "squeue": "#!/bin/bash\ncase $* in *%T*) echo RUNNING ;; *%l*) echo 2:00:00 ;; *) echo '(null)' ;; esac\n",
    }
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    job = {"SLURM_JOB_NAME": "avatar_3b", "SLURM_JOB_PARTITION": "gpu", "SLURM_JOB_ACCOUNT": "me",
           "SLURM_GPUS_PER_NODE": "4", "SLURM_MEM_PER_NODE": "9000"}  # fmt: skip
    done, seen = submit(SCRIPTS[0], "seed=3", **job)
    assert done.returncode == 0 and "job 123456 may not be requeued: job 77 continues it" in done.stdout, done.stderr
    for option in ("--partition=gpu", "--account=me", "--time=2:00:00", "--gpus-per-node=4", "--mem=9000", "seed=3",
                   "AVATAR_CHAIN=123456", f"AVATAR_SNAPSHOT={tmp_path / 'run' / 'snapshots' / '123456'}"):
        assert option in seen, option
    done, _ = submit(SCRIPTS[0], **job, SUBMITIT_EXECUTOR="slurm")
    assert done.returncode == 75 and "run sweep.py or reproduce.py again" in done.stderr
