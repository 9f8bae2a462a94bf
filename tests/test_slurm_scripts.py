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
from megatron_avatar.resilience import attempts
from slurm import starting

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path for path in (ROOT / "slurm").glob("*.sh") if "/common.sh" in path.read_text())
FAKE_SRUN = """#!/bin/bash
[[ "$*" != *' sees '* ]] || exec "${@:5}"
names='^(MASTER_|SRUN_|HDF5_|AVATAR_|NCCL_|PYTHON|SLURM_EXPORT|SLURM_WAIT)'
{ printf '%s\\n' "$@"; echo "cwd=$PWD"; env | grep -E "$names"; } >> "$RECORD"
[[ "$*" == *preflight* ]] && exit "${PREFLIGHT_STATUS:-0}"
[[ -n "${SRUN_STATUS:-}" ]] || touch "${AVATAR_ENDED%/*}/done.json"
exit "${SRUN_STATUS:-0}"
"""
STOPS = '#!/bin/bash\n[[ "$*" != *megatron_avatar.train* ]] || touch "$AVATAR_ENDED-75"\n'
FAKE_SCONTROL = """#!/bin/bash
case "$1 $2" in
  "show hostnames") printf 'localhost\\nnode2\\n' ;;
  "show job") echo "   Command=$SCRIPT a b" ;;
  *) echo "$*" >> "$RECORD" ;;
esac
"""


def directives(script: Path) -> dict[str, str]:
    found = re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", script.read_text(), re.MULTILINE)
    return {key: value for key, value in found}


def shape_of(script: Path) -> str:
    """The name of the model that the script's recipe is for."""
    return load_config([f"recipe={directives(script)['job-name']}", "model.path=m", "data.manifest=d"]).model.shape


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

    # A node on which a 7B run has room; read by every Python of the job before it sets a path of its own.
    (programs / "sitecustomize.py").write_text("import collections, os, shutil\n"
        "shutil.disk_usage = lambda path: collections.namedtuple('usage', 'total used free')(1 << 50, 0, 1 << 50)\n"
        "own = os.sysconf\nos.sysconf = lambda name: 1 << 40 if name == 'SC_PHYS_PAGES' else own(name)\n")

    def run(script: Path, *arguments: str, **environment: str) -> tuple[subprocess.CompletedProcess, list[str]]:
        copy = shutil.copy(script, spool / "slurm_script")
        if script in SCRIPTS:  # those that train
            shutil.copy(CONFIG_DIR / "shapes" / shape_of(script) / "config.json", folder)
        options = directives(script)
        job = {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "PYTHON": sys.executable,
            "PYTHONPATH": str(programs),
            "RECORD": str(record),
            "SLURM_CPUS_PER_TASK": options["cpus-per-task"],
            "SLURM_GPUS_ON_NODE": options.get("gres", "gpu:0").removeprefix("gpu:"),
            "SLURM_JOB_ID": "123456",
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_JOB_NUM_NODES": options["nodes"],
            "SLURM_NTASKS_PER_NODE": options.get("ntasks-per-node", "1"),
            "SLURM_SUBMIT_DIR": str(ROOT),
            "SCRIPT": str(script),
            **environment,
        }
        settings = [f"model.path={folder}", f"data.manifest={tmp_path / 'manifest.jsonl'}",
                    f"output_dir={tmp_path / 'run'}"]
        done = subprocess.run(["bash", copy, *settings, *arguments], cwd=spool, env=job, capture_output=True, text=True,
                              timeout=240)
        return done, record.read_text().splitlines() if record.exists() else []

    yield run
    for link in (ROOT / ".jobs").glob("*"):
        if not link.exists() or str(tmp_path) in str(link.resolve()):
            link.unlink()


@pytest.fixture
def stopping(tmp_path):
    """Training is told to stop, and saves its state."""
    (tmp_path / "bin" / "srun").write_text(STOPS)


def test_a_node_that_lacks_the_run_or_the_interpreter_refuses_before_any_python(submit, tmp_path):
    def refusal(hide: str, *arguments: str) -> str:
        (tmp_path / "bin" / "srun").write_text(f"#!/bin/bash\n{hide}\n{FAKE_SRUN}")
        done, seen = submit(ROOT / "slurm" / "tiny.sh", *arguments)
        assert done.returncode == 2 and not seen, done.stderr
        return done.stderr + done.stdout

    node = os.uname().nodename
    assert f"pre-flight on {node}: " in (said := refusal("export AVATAR_SNAPSHOT=/nowhere"))
    assert "/nowhere, written by the first node, is not there: output_dir must lie on a file system that all" in said
    said = refusal("", "cluster.python=/nowhere/python")
    assert f"pre-flight on {node}: /nowhere/python is not there: it must lie on a file system" in said


@pytest.mark.parametrize("script", SCRIPTS[::4], ids=lambda path: path.stem)
def test_starts_one_process_a_task_from_a_snapshot(submit, script, tmp_path):
    options = directives(script)
    done, seen = submit(script, "seed=3", 'name="a b"')
    assert done.returncode == 0, done.stderr
    srun = ["--label", "--kill-on-bad-exit=1", f"--ntasks-per-node={options['ntasks-per-node']}", sys.executable, "-m"]
    assert seen[:5] == srun and seen[5] == "slurm.preflight"
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
    assert options.get("gres", f"gpu:{options['ntasks-per-node']}") == f"gpu:{options['ntasks-per-node']}"
    assert options["open-mode"] == "append" and {"requeue", "signal"} <= options.keys()


def test_two_jobs_take_different_ports(submit, tmp_path):
    _, seen = [submit(SCRIPTS[0], f"output_dir={tmp_path / job}", SLURM_JOB_ID=job) for job in ("7", "8")][-1]
    assert len({line for line in seen if "MASTER_PORT" in line}) == 2


def test_two_jobs_do_not_write_the_same_run(submit, stopping):
    assert submit(SCRIPTS[0], SLURM_JOB_ID="7")[0].returncode == 75
    assert submit(SCRIPTS[0], SLURM_JOB_ID="7", SLURM_RESTART_COUNT="1")[0].returncode == 75
    assert submit(SCRIPTS[0], SLURM_JOB_ID="8", AVATAR_CHAIN="7", AVATAR_AFTER="7")[0].returncode == 75
    done, _ = submit(SCRIPTS[0], SLURM_JOB_ID="9")
    assert done.returncode == 2 and "job 8 works on this run" in done.stderr


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
    (tmp_path / "bin" / "apptainer").write_text("#!/bin/sh\n")
    for name in ("module", "apptainer"):
        (tmp_path / "bin" / name).chmod(0o755)
    image = tmp_path / "image.sif"
    image.touch()
    common = (f"cluster.container={image}", f"cluster.mounts=[{tmp_path}:/data]", "cluster.modules=[cuda/13.0,nccl]")
    done, seen = submit(SCRIPTS[0], *common, "cluster.runtime=apptainer", "+cluster.env.NCCL_IB_HCA=mlx5")
    assert done.returncode == 0, done.stderr
    assert seen[0] == "module load cuda/13.0 nccl" and "NCCL_IB_HCA=mlx5" in seen
    start, own = seen.index("apptainer"), [f"{p}:{p}" for p in (ROOT, tmp_path / "run", tmp_path / "model", tmp_path)]
    command = ["apptainer", "exec", "--nv", "--pwd", str(ROOT)]
    assert seen[start : start + len(command)] == command
    inside = seen[start + len(command) : seen.index(str(image))]
    pairs = list(zip(inside[::2], inside[1::2], strict=True))
    binds = [value for flag, value in pairs if flag == "--bind"]
    assert binds[: len(own)] == own and binds[-1] == f"{tmp_path}:/data"
    variables = dict(value.split("=", 1) for flag, value in pairs if flag == "--env")
    assert variables["PYTHONNOUSERSITE"] == "1" and variables["NCCL_IB_HCA"] == "mlx5"
    assert variables["PYTHONPATH"] == str(tmp_path / "run" / "snapshots" / "123456"), "against the image's own"
    done, seen = submit(SCRIPTS[0], *common, "cluster.python=python")
    assert done.returncode == 0, done.stderr
    assert f"--container-image={image}" in seen
    assert any(line.startswith(f"--container-mounts={','.join(own)},") for line in seen)
    (named,) = {line.partition("=")[2] for line in seen if line.startswith("--container-env=")}
    assert {"PYTHONPATH", "PYTHONNOUSERSITE", "NCCL_DEBUG", "MASTER_ADDR", "AVATAR_ENDED"} <= set(named.split(","))
    done, seen = submit(SCRIPTS[0], *common, "cluster.runtime=singularity")
    assert done.returncode == 2 and "there is no such program on" in done.stderr


def test_a_requeued_job_runs_its_snapshot(submit, stopping, tmp_path):
    done, seen = submit(SCRIPTS[0])
    assert done.returncode == 75 and seen == ["requeue 123456"], done.stderr
    snapshot = tmp_path / "run" / "snapshots" / "123456"
    marker = snapshot / "slurm" / "common.sh"
    marker.write_text(marker.read_text() + "\necho from the snapshot\n")
    (tmp_path / "bin" / "srun").write_text(FAKE_SRUN)
    done, _ = submit(SCRIPTS[0], SLURM_RESTART_COUNT="1")
    assert done.returncode == 0 and "from the snapshot" in done.stdout, done.stderr
    assert sorted(path.name for path in (tmp_path / "run" / "logs").iterdir()) == ["123456.0.log", "123456.1.log"]
    assert not (ROOT / ".jobs" / "123456").is_symlink(), "the job is over"


SHOWN = """JobId=123456 JobName=avatar_3b
   UserId=me(7) GroupId=me(7) MCS_label=N/A
   Priority=1 Nice=5 Account=me QOS=(null)
   JobState=RUNNING Reason=None Dependency=(null)
   Requeue=0 Restarts=0 BatchFlag=1 Reboot=0 ExitCode=0:0
   RunTime=00:00:00 TimeLimit=2:00:00 TimeMin=N/A
   Partition=gpu AllocNode:Sid=login:2882
   ReqNodeList=(null) ExcNodeList=nid[001-003]
   NumNodes=1 NumCPUs=2 NumTasks=2 CPUs/Task=1 ReqB:S:C:T=0:0:*:*
   Socks/Node=* NtasksPerN:B:S:C=2:0:*:* CoreSpec=*
   MinCPUsNode=2 MinMemoryNode=500M MinTmpDiskNode=0
   Features=a100-80&nvlink DelayBoot=00:00:00
   OverSubscribe=NO Contiguous=0 Licenses=(null) Network=(null)
   Command=/data/me/code/slurm/avatar_3b.sh a b
   WorkDir=/data/me
   Comment=the second, Nice=9 a=b
   StdErr=/runs/run 123456/50%/err-123456.txt
   StdIn=/dev/null
   StdOut=/runs/run 123456/50%/out-123456.txt
   Power=
   TresPerNode=gres:gpu:a100:4
   MailUser=me@x MailType=END,FAIL
"""


def test_where_requeueing_is_refused_the_script_is_submitted_again_with_its_options(submit, tmp_path):
    (tmp_path / "shown").write_text(SHOWN.replace("/data/me/code", str(ROOT)))
    line = "sbatch --signal=USR1@900 -x nid[001-003] slurm/avatar_3b.sh"
    waiting = "88|afterok:123456(unfulfilled),afterany:5(unfulfilled)\\n89_[0-3]|afterok:123456\\n90|afterok:1234567\\n"
    programs = {
        "srun": STOPS,
        "scontrol": f"""#!/bin/bash
case "$1 $2" in
  "show hostnames") echo localhost ;;
  "show job") cat {tmp_path}/shown ;;
  requeue*) echo "Requested operation is presently disabled" >&2; exit 1 ;;
  update*) echo "$*" >> "$RECORD" ;;
esac
""",
        "sbatch": '#!/bin/bash\n{ printf "%s\\n" "$@"; env | grep -E "^(AVATAR|SLURM)_"; } > "$RECORD"; echo 77\n',
        "squeue": f"#!/bin/bash\ncase $* in *%T*) echo RUNNING ;; *%E*) printf '{waiting}' ;; *) echo 9:00 ;; esac\n",
        "sacct": f"#!/bin/bash\necho '{line}'\n",
    }
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    job = {"SLURM_JOB_NAME": "avatar_3b", "SLURM_MEM_PER_NODE": "90000", "SLURM_OPEN_MODE": "a", "SBATCH_ACCOUNT": "me"}
    done, seen = submit(SCRIPTS[0], "seed=3", **job)
    assert done.returncode == 75 and "job 123456 may not be requeued: job 77 continues it" in done.stderr, done.stderr
    for option in (
        "--parsable", "--partition=gpu", "--account=me", "--time=2:00:00", "--gres=gpu:a100:4", "--mem=90000",
        "--nice=5", "--exclude=nid[001-003]", "--constraint=a100-80&nvlink", "--comment=the second, Nice=9 a=b",
        "--exclusive",
        "--output=/runs/run 123456/50%%/out-%j.txt", "--error=/runs/run 123456/50%%/err-%j.txt", "--no-requeue",
        "--signal=USR1@900", "--mail-user=me@x", "--mail-type=END,FAIL", "--open-mode=append", "--export=ALL",
        "--chdir=/data/me", "seed=3", "AVATAR_CHAIN=123456", "AVATAR_AFTER=123456",
        f"AVATAR_SNAPSHOT={tmp_path / 'run' / 'snapshots' / '123456'}",
        "update JobId=88 Dependency=afterok:77,afterany:5", "update JobId=89 Dependency=afterok:77",
    ):  # fmt: skip
        assert option in seen, option
    absent = ("SLURM_", "--qos", "--nodelist", "--input", "update JobId=90")
    assert not [line for line in seen if line.startswith(absent)]
    done, _ = submit(SCRIPTS[0], SLURM_JOB_ID="9")
    assert done.returncode == 2 and "job 77" in done.stderr, "the run is the new job's already"
    done, _ = submit(SCRIPTS[0], f"output_dir={tmp_path / 'other'}", **job, SUBMITIT_EXECUTOR="slurm")
    assert done.returncode == 75 and "run sweep.py or reproduce.py again" in done.stderr, done.stderr


@pytest.mark.parametrize("script", [*SCRIPTS[:1], ROOT / "slurm" / "prepare.sh"], ids=lambda path: path.stem)
def test_scripts_are_submitted_from_any_folder(submit, tmp_path, script):
    elsewhere = tmp_path / "ü elsewhere"
    elsewhere.mkdir()
    job = {"SLURM_SUBMIT_DIR": str(elsewhere), "SLURM_NTASKS_PER_NODE": "", "SLURM_TASKS_PER_NODE": "2(x1)"}
    python = job if script.stem == "prepare" else job | {"PYTHON": ""}  # the checkout's own .venv
    done, seen = submit(script, **python)
    assert done.returncode == 0, done.stderr
    assert f"cwd={elsewhere}" in seen
    if script.stem == "prepare":
        assert f"PYTHONPATH={ROOT}" in seen
        return
    assert "--ntasks-per-node=2" in seen
    done, _ = submit(script, **python | {"SLURM_TASKS_PER_NODE": "4,2"})
    assert done.returncode == 2 and "its nodes have 4,2 tasks" in done.stderr
    done, _ = submit(script, **job | {"SCRIPT": str(tmp_path / "copy.sh")})
    assert done.returncode == 2 and f"{elsewhere} is no checkout" in done.stderr


def test_paths_need_neither_quotes_nor_another_homes_meaning(submit, tmp_path):
    """A word's `~` is the submitting user's home, as inside of a container there may be another."""
    done, seen = submit(SCRIPTS[0], "output_dir=~/größe/lauf", HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "größe" / "lauf" / "done.json").exists()
    assert f"output_dir={tmp_path}/größe/lauf" in seen[seen.index("megatron_avatar.train"):]


def test_the_command_for_several_nodes(submit):
    """sbatch --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 slurm/avatar_7b_cluster.sh, as docs/cluster.md says."""
    script = ROOT / "slurm" / "avatar_7b_cluster.sh"
    assert "sbatch --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 slurm/avatar_7b_cluster.sh" in (
        ROOT / "docs" / "cluster.md").read_text()  # fmt: skip
    done, seen = submit(script, SLURM_JOB_NUM_NODES="2", SLURM_NTASKS_PER_NODE="8", SLURM_GPUS_PER_NODE="8",
                        SLURM_GPUS_ON_NODE="8", SLURM_MEM_PER_NODE=str(170 * 1024))  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "16 a100 GPUs" in done.stderr or "16 h100 GPUs" in done.stderr
    assert "recipe=avatar_7b_cluster" in seen and "--ntasks-per-node=8" in seen


def test_a_folder_that_cannot_be_written_is_one_to_submit_from(submit, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir()
    (locked / ".jobs").write_text("")  # in the way, for root too
    done, seen = submit(SCRIPTS[0], SLURM_SUBMIT_DIR=str(locked))
    assert done.returncode == 0 and f"warning: {locked} can't be written" in done.stderr, done.stderr


def test_a_preempted_attempt_is_excused_by_the_next_start(submit, stopping, tmp_path):
    """The batch shell was killed with the rest: what the ranks noted when they were told is still there."""
    (tmp_path / "bin" / "squeue").write_text("#!/bin/bash\n[[ $* == *%L* ]] && echo 24:00:00 || echo RUNNING\n")
    run = tmp_path / "run"
    done, _ = submit(SCRIPTS[0])
    assert done.returncode == 75 and [r["excused"] for r in attempts.read(run) if "excused" in r] == [1]
    (run / ".ended-123456-73").touch()
    assert submit(SCRIPTS[0], SLURM_RESTART_COUNT="1")[0].returncode == 75
    assert [r["excused"] for r in attempts.read(run) if "excused" in r] == [1, 1, 2]
    assert not list(run.glob(".ended-*"))


def test_links_of_jobs_that_are_over_are_removed(submit, stopping, tmp_path):
    links = tmp_path / "home" / ".jobs"
    gone, complete, other = links / "1", links / "2", links / "3"
    links.mkdir(parents=True)
    for path, run in ((gone, "gone"), (complete, "complete"), (other, "other")):
        path.symlink_to(tmp_path / run / "snapshots" / "1")
    for run in ("complete", "other"):
        (tmp_path / run / "snapshots" / "1").mkdir(parents=True)
    (tmp_path / "complete" / "done.json").touch()
    assert submit(SCRIPTS[0], SLURM_SUBMIT_DIR=str(links.parent))[0].returncode == 75
    assert sorted(path.name for path in links.iterdir()) == ["123456", "3"]


def test_status_0_means_that_the_run_is_done(submit, tmp_path):
    (tmp_path / "bin" / "srun").write_text("#!/bin/bash\n")
    done, _ = submit(SCRIPTS[0])
    assert done.returncode == 1 and "done.json is not there" in done.stderr
    (tmp_path / "bin" / "srun").write_text(FAKE_SRUN.replace("[[ -n", "false && [[ -n"))
    done, _ = submit(SCRIPTS[0], SRUN_STATUS="137")
    assert done.returncode == 0 and "on its way out something ended with status 137" in done.stderr


@pytest.mark.parametrize(("command", "fails"), [("squeue", 2), ("scontrol", 1)])
def test_a_controller_that_answers_late_loses_no_run(submit, stopping, tmp_path, command, fails):
    program = tmp_path / "bin" / command
    real = program.rename(tmp_path / f"real-{command}")
    program.write_text(f"""#!/bin/bash
[[ "$*" == *%L* || $1 == show ]] && exec {real} "$@"
echo . >> {tmp_path}/tries
(($(wc -l < {tmp_path}/tries) > {fails})) && exec {real} "$@"
echo "slurm_load_jobs error: Socket timed out on send/recv operation" >&2
exit 1
""")
    program.chmod(0o755)
    done, seen = submit(SCRIPTS[0])
    assert done.returncode == 75 and seen == ["requeue 123456"], done.stderr
    assert "asked again for up to 30 minutes" in done.stderr


def test_what_the_site_calls_the_first_node(submit):
    _, seen = submit(SCRIPTS[0], 'cluster.master="{node}i.site"')
    assert "MASTER_ADDR=localhosti.site" in seen and "SLURM_EXPORT_ENV=ALL" in seen and "SLURM_WAIT=300" in seen


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"SLURM_GPUS_ON_NODE": "4", "SLURM_GPUS_PER_TASK": "1"}, ""),
        ({"SLURM_GPUS_ON_NODE": "8"}, ""),
        ({}, ""),  # a site without GRES
        ({"SLURM_GPUS_ON_NODE": "2"}, "the job has 2 GPUs on this node for 4 processes"),
        ({"SLURM_GPUS_ON_NODE": "1", "SLURM_GPUS_PER_NODE": "a100:4"}, "write --gres=gpu:a100:4 alone"),
    ],
)  # fmt: skip
def test_gpus_however_they_are_asked_for(environment, says, monkeypatch):
    for name in ("SLURM_GPUS_ON_NODE", "SLURM_GPUS_PER_NODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if says:
        with pytest.raises(ValueError, match=re.escape(says)):
            starting.check_gpus(4)
    else:
        starting.check_gpus(4)


def test_a_job_says_what_it_will_do_in_its_first_lines_and_not_again(submit, tmp_path):
    done, _ = submit(SCRIPTS[1], SLURM_MEM_PER_NODE="102400")
    for words in ("avatar_7b\n", "/run: new", "tp 4 x pp 1 x dp 1", "by the plan", "it gets 100: checkpoints are"):
        assert words in done.stderr, words
    again = {"SLURM_RESTART_COUNT": "1", "AVATAR_SNAPSHOT": str(tmp_path / "run" / "snapshots" / "123456")}
    done, _ = submit(SCRIPTS[1], SLURM_MEM_PER_NODE="102400", **again)
    assert "tp 4" not in done.stderr


@pytest.mark.parametrize(
    ("environment", "granted"),
    [({"SLURM_MEM_PER_NODE": "20480"}, "20"), ({"SLURM_MEM_PER_CPU": "256", "SLURM_CPUS_ON_NODE": "48"}, "12"),
     ({"SLURM_MEM_PER_GPU": "10240", "SLURM_GPUS_ON_NODE": "4"}, "40")],
)  # fmt: skip
def test_a_node_without_memory_for_the_processes_is_refused_with_what_to_ask_for(submit, environment, granted):
    done, seen = submit(ROOT / "slurm" / "avatar_7b.sh", **environment)
    assert done.returncode == 2 and not seen
    assert f"the job has {granted} GiB of a node's memory" in done.stderr and "submit with --mem=164G" in done.stderr
