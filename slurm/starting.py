"""A job's start: settings checked, the run taken, code copied, and what the batch shell needs to know.

common.sh calls this and evaluates what it prints:

    python slurm/starting.py [key=value ...]

Needs hydra-core, neither torch nor Megatron. Exit status 2 with one line for a mistake, 1 where the machine fails.
"""

from __future__ import annotations

import math
import os
import shlex
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

from megatron_avatar.config import Config, load_config  # noqa: E402
from megatron_avatar.config.paths import home  # noqa: E402
from megatron_avatar.files import step_folders  # noqa: E402
from megatron_avatar.planning import outline  # noqa: E402
from megatron_avatar.planning.outline import GIB  # noqa: E402
from megatron_avatar.resilience import attempts, ended, lock, queue  # noqa: E402
from slurm import launch  # noqa: E402
from slurm.ending import LINKS  # noqa: E402
from slurm.page import page  # noqa: E402
from slurm.snapshot import snapshot  # noqa: E402

ASK_S = 20.0  # for the time limit, while the job's nodes wait
EARLY_S = 120.0  # Slurm sends its notice up to a minute before its time, and the run takes some to end


def batch_shell(arguments: list[str]) -> str:
    """Shell text for common.sh: refuses what is wrong, and takes the job's snapshot at its first start."""
    config = load_config(arguments)
    nodes, tasks = int(os.environ["SLURM_JOB_NUM_NODES"]), queue.tasks_per_node()
    changed = launch.check(config, nodes=nodes, tasks_per_node=tasks)
    if config.cluster.gpu != "cpu":
        check_gpus(tasks)
    memory = granted_memory()
    check_memory(config, nodes, tasks, memory)
    run = Path(config.output_dir).absolute()
    lock.take(run, lock.job_owner(), predecessor=os.environ.get("AVATAR_AFTER", ""))
    job, code = os.environ["SLURM_JOB_ID"], ROOT  # a requeued or resubmitted job: this file is the snapshot's
    if not (ROOT / "snapshot.json").exists():
        code = snapshot(run / "snapshots" / job, config, arguments)
        remember(job, code)
        print(page(config, nodes, tasks, memory=memory / GIB), file=sys.stderr)
    logs = run / "logs" / f"{job}.{os.environ.get('SLURM_RESTART_COUNT', '0')}.log"
    logs.parent.mkdir(parents=True, exist_ok=True)
    saved = max(step_folders(run / "checkpoints"), default=0)
    told = str(run / f".ended-{job}")  # the tasks' words; there still, where the last attempt's end was sudden
    if (when := ended.noticed(told)) is not None:
        attempts.excuse(run, when)
    ended.forget(told)
    attempts.begin(run, saved, config.checkpoint.restarts, changed,
                   _until(config.cluster.signal_s))  # before what may fail at once  # fmt: skip
    modules = config.cluster.modules
    lines = [f"module load {shlex.join(modules)}"] if modules else []
    lines += [f"export {name}={shlex.quote(value)}" for name, value in launch.environment(config, code).items()]
    lines += [
        f"set -- {shlex.join(map(home, arguments))}",  # inside of a container the home may be another
        "export AVATAR_ATTEMPT=noted",
        f"export AVATAR_SNAPSHOT={shlex.quote(str(code))}",
        f"export AVATAR_ENDED={shlex.quote(told)}",
        f"export SLURM_NTASKS_PER_NODE={tasks}",
        f"command=({shlex.join(launch.command(config, code))})",
        f"srun_options=({shlex.join(launch.srun_options(config, code))})",
        f"master={shlex.quote(config.cluster.master)}",
        f"run={shlex.quote(str(run))}",
        f"log={shlex.quote(str(logs))}",
        f"tmp_gib={config.cluster.tmp_gib}",
        f"gpus={0 if config.cluster.gpu == 'cpu' else tasks}",
    ]
    return "\n".join(lines)


def check_gpus(tasks: int) -> None:
    """ValueError where Slurm granted fewer GPUs than a node's `tasks`. Where a site keeps no account of them (no GRES),
    the pre-flight looks at what there is."""
    granted, asked = os.environ.get("SLURM_GPUS_ON_NODE"), os.environ.get("SLURM_GPUS_PER_NODE", "")
    if granted is None or int(granted) >= tasks:
        return
    both = (f" (--gpus-per-node={asked} beside the script's --gres: write --gres=gpu:{asked} alone)"
            if asked.rpartition(":")[2] not in ("", granted) else "")  # fmt: skip
    raise ValueError(
        f"the job has {granted} GPUs on this node for {tasks} processes, one each{both}: submit with "
        f"--gres=gpu:{tasks} (of a type: --gres=gpu:a100:{tasks}), or with fewer --ntasks-per-node (cluster.gpu=cpu "
        "trains without)"
    )


def granted_memory() -> int:
    """Bytes of this node's memory that the job has: what Slurm granted, or the machine has."""
    most = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    told = {name: int(os.environ.get(f"SLURM_MEM_PER_{name}") or 0) << 20 for name in ("NODE", "CPU", "GPU")}
    counts = {name: int(os.environ.get(f"SLURM_{name}S_ON_NODE") or 1) for name in ("CPU", "GPU")}
    granted = told["NODE"] or told["CPU"] * counts["CPU"] or told["GPU"] * counts["GPU"]
    return min(most, granted) if granted else most


def check_memory(config: Config, nodes: int, tasks: int, memory: int) -> None:
    """ValueError where the node's memory isn't enough even for checkpoints that are written in pieces."""
    planned = outline.host_memory(config, outline.of(config, nodes, tasks))
    if memory < planned.least:
        whole, least = (math.ceil(size / GIB) for size in (planned.whole, planned.least))
        raise ValueError(
            f"the job has {memory / GIB:.0f} GiB of a node's memory, and {tasks} processes take {least} at least: "
            f"submit with --mem={whole}G (from --mem={least}G on it runs, and waits while a checkpoint is written), "
            "with fewer --ntasks-per-node, or lower data.workers"
        )


def remember(job: str, code: Path) -> None:
    """Leave a link by which the requeued job finds its snapshot; where the folder can't be written it runs the
    checkout's scripts again. Links of jobs that are over are removed."""
    try:
        LINKS.mkdir(exist_ok=True)
        for link in LINKS.iterdir():
            if link.is_symlink() and (link.name == job or not link.exists() or (link / "../../done.json").exists()):
                link.unlink(missing_ok=True)
        (LINKS / job).symlink_to(code)
    except OSError as error:
        print(f"warning: {Path.cwd()} can't be written ({error.strerror}): should this job be requeued, its first "
              "checks are those of the checkout as it is then", file=sys.stderr)  # fmt: skip


def _until(signal_s: int) -> float:
    """The moment, in Unix seconds, from which a stop may be the time limit's; 0 where Slurm doesn't say."""
    left = queue.seconds_left(queue.own_job(), patience_s=ASK_S)
    return 0.0 if left is None else time.time() + left - signal_s - EARLY_S


if __name__ == "__main__":
    try:
        print(batch_shell(sys.argv[1:]))
    except (ValueError, OSError, attempts.NoProgress) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(ended.FAILED if isinstance(error, OSError) else ended.REFUSED)  # a sweep's member tries again, or not
