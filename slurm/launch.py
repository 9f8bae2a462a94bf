"""From settings to a job's command: what is checked first, and how training starts on a node.

common.sh calls this in a job's batch shell and evaluates what it prints:

    python slurm/launch.py [key=value ...]

Needs hydra-core, neither torch nor Megatron. Exit status 2 with one line where something is wrong.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

from megatron_avatar.config import Config, check_world, load_config  # noqa: E402
from megatron_avatar.config.checks import check_folder, check_same_model, check_same_run, check_space  # noqa: E402
from megatron_avatar.config.paths import check_inputs, refuse  # noqa: E402
from megatron_avatar.resilience import attempts  # noqa: E402
from slurm.snapshot import snapshot  # noqa: E402

REFUSAL_S = 60


def layout(config: Config) -> tuple[int, int]:
    """(nodes, tasks a node) that cluster.gpus, or one replica of the model, takes; ValueError if it doesn't divide."""
    tasks = config.cluster.gpus or config.parallel.tp * config.parallel.pp
    nodes = -(-tasks // config.cluster.gpus_per_node)
    if tasks % nodes:
        raise ValueError(
            f"{tasks} processes don't spread evenly over {nodes} nodes of cluster.gpus_per_node="
            f"{config.cluster.gpus_per_node}: choose cluster.gpus as a multiple of it"
        )
    return nodes, tasks // nodes


def check(config: Config, *, nodes: int, tasks_per_node: int, submit: list[str] | None = None) -> dict[str, Any]:
    """Refuse what can be refused without a GPU: ValueError naming the setting and the remedy. Returns the settings that
    differ from those of the run in output_dir, where they may.

    Partition, account and the node's size are Slurm's to judge, before anything is submitted: `submit` holds sbatch's
    options, which it tries without queueing anything.
    """
    cluster = config.cluster
    check_world(config, nodes * tasks_per_node)
    granted = os.environ.get("SLURM_GPUS_ON_NODE")
    if cluster.gpu != "cpu" and submit is None and int(granted or 0) < tasks_per_node and "SLURM_JOB_ID" in os.environ:
        raise ValueError(
            f"the job has {granted or 'no'} GPUs on this node for {tasks_per_node} processes, one each: submit with "
            f"--gpus-per-node={tasks_per_node}, or with fewer --ntasks-per-node (cluster.gpu=cpu trains without)"
        )
    refuse(check_inputs(config))
    image = cluster.container
    if image and (image.startswith(("/", ".")) or image.endswith((".sif", ".sqsh"))) and not Path(image).exists():
        raise ValueError(f"cluster.container={image} doesn't exist: correct the path, or pull the image first")
    for mount in cluster.mounts if image else ():
        if not Path(mount.split(":")[0]).exists():
            raise ValueError(f"cluster.mounts: {mount.split(':')[0]} doesn't exist")
    changed = check_same_run(config)
    check_same_model(config)
    check_folder(Path(config.output_dir))
    if warning := check_space(config):
        print(f"warning: {warning}", file=sys.stderr)
    if submit is not None:
        try_submission(submit)
    return changed


def try_submission(options: list[str]) -> None:
    """ValueError with sbatch's own reason where it would refuse such a job."""
    if shutil.which("sbatch") is None:
        raise ValueError("sbatch is not on this machine: run this on a login node, or write cluster=local")
    done = subprocess.run(["sbatch", "--test-only", *options], input="#!/bin/sh\n", capture_output=True, text=True,
                          timeout=REFUSAL_S)  # fmt: skip
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ValueError(
            f"Slurm refuses such a job ({shlex.join(options)}): {reason}. Correct cluster.partition, cluster.account, "
            "cluster.qos, cluster.gpus_per_node, cluster.cpus_per_task or cluster.minutes"
        )


def environment(config: Config, code: Path) -> dict[str, str]:
    """What every process of the job finds in its environment; `code` is the snapshot."""
    return {
        **config.cluster.env,
        "PYTHONPATH": str(code),  # before the working directory, which holds code that has changed since
        "PYTHONSAFEPATH": "1",
        "HDF5_USE_FILE_LOCKING": "FALSE",  # shared file systems often have no locks
    }


def command(config: Config) -> list[str]:
    """The interpreter of training, inside of Apptainer where the settings say so."""
    cluster = config.cluster
    if not cluster.container:
        return [cluster.python or sys.executable]
    python = cluster.python or "python3"
    if cluster.runtime == "pyxis":
        return [python]
    binds = [item for mount in _mounts(config) for item in ("--bind", mount)]
    gpu = [] if cluster.gpu == "cpu" else ["--nv"]
    return ["apptainer", "exec", *gpu, "--pwd", str(Path.cwd()), *binds, cluster.container, python]


def srun_options(config: Config) -> list[str]:
    """What srun needs beside the job's own options."""
    cluster = config.cluster
    if not cluster.container or cluster.runtime != "pyxis":
        return []
    return [f"--container-image={cluster.container}", f"--container-mounts={','.join(_mounts(config))}",
            f"--container-workdir={Path.cwd()}"]  # fmt: skip


def _mounts(config: Config) -> list[str]:
    """FROM:TO of what a container has to see: the working directory, run, model and data, and cluster.mounts."""
    seen: list[Path] = []
    for path in (Path.cwd(), *map(Path, (config.output_dir, config.model.path)), Path(config.data.manifest).parent):
        if not any(path.absolute().is_relative_to(other) for other in seen):
            seen.append(path.absolute())
    return [*(f"{path}:{path}" for path in seen), *config.cluster.mounts]


def _check_alone(run: Path, chain: str) -> None:
    """ValueError where another running job works on the same run: both would write its checkpoints."""
    path = run / "attempts.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    other = str(json.loads(lines[-1])["chain"]) if lines else chain
    if other == chain or not other.isdecimal():
        return
    state = ["squeue", "--noheader", f"--jobs={other}", "--format=%T"]
    if subprocess.run(state, capture_output=True, text=True).stdout.strip() == "RUNNING":
        raise ValueError(f"{run}: job {other} works on this run: wait for its end, or choose another output_dir")


def batch_shell(arguments: list[str]) -> str:
    """Shell text for common.sh: refuses what is wrong, and takes the job's snapshot at its first start."""
    config = load_config(arguments)
    job = os.environ["SLURM_JOB_ID"]
    nodes, tasks = (int(os.environ[name]) for name in ("SLURM_JOB_NUM_NODES", "SLURM_NTASKS_PER_NODE"))
    changed = check(config, nodes=nodes, tasks_per_node=tasks)
    run = Path(config.output_dir).absolute()
    _check_alone(run, os.environ.get("AVATAR_CHAIN", job))
    code = ROOT  # a requeued or resubmitted job: this file is the snapshot's
    if not (ROOT / "snapshot.json").exists():
        code = snapshot(run / "snapshots" / job, config, arguments)
        link = Path(".jobs") / job  # by which the requeued job finds it
        link.parent.mkdir(exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(code)
    logs = run / "logs" / f"{job}.{os.environ.get('SLURM_RESTART_COUNT', '0')}.log"
    logs.parent.mkdir(parents=True, exist_ok=True)
    saved = sorted(int(path.name.removeprefix("step_")) for path in run.glob("checkpoints/step_*"))
    attempts.begin(run, saved[-1] if saved else 0, config.checkpoint.restarts, changed)  # before what may fail at once
    modules = config.cluster.modules
    lines = [f"module load {shlex.join(modules)}"] if modules else []
    lines += [f"export {name}={shlex.quote(value)}" for name, value in environment(config, code).items()]
    lines += [
        "export AVATAR_ATTEMPT=noted",
        f"export AVATAR_SNAPSHOT={shlex.quote(str(code))}",
        f"command=({shlex.join(command(config))})",
        f"srun_options=({shlex.join(srun_options(config))})",
        f"run={shlex.quote(str(run))}",
        f"log={shlex.quote(str(logs))}",
        f"gpus={0 if config.cluster.gpu == 'cpu' else os.environ['SLURM_NTASKS_PER_NODE']}",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        print(batch_shell(sys.argv[1:]))
    except (ValueError, OSError, attempts.NoProgress) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
