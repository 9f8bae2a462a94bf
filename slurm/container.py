"""How a job's processes start inside of a container: pyxis, Apptainer or Singularity.

What they have to see is mounted under the names that it has outside, and where a link leads (a Hugging Face cache's
files, `runs -> $SCRATCH`), that place too. The job's variables win over the image's, and a user's own packages in
~/.local, which containers see where home is mounted, are left out.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from megatron_avatar.config import Config

MOST_ENTRIES = 1000  # of a folder, looked through for links
# What a job's shell sets beside the site's variables: pyxis takes an image's values unless they are named.
PASSED = ("MASTER_ADDR", "MASTER_PORT", "AVATAR_NODES", "AVATAR_SNAPSHOT", "AVATAR_ATTEMPT", "AVATAR_CHAIN",
          "AVATAR_ENDED", "AVATAR_ENDPOINT_KEY", "WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_MODE",
          "HF_HOME", "HF_TOKEN", "TMPDIR")  # fmt: skip


def check(config: Config) -> None:
    """ValueError where image, mounts or the runtime's program can't be used from here."""
    cluster, image = config.cluster, config.cluster.container
    if not image:
        return
    if (image.startswith(("/", ".")) or image.endswith((".sif", ".sqsh"))) and not Path(image).exists():
        raise ValueError(f"cluster.container={image} doesn't exist: correct the path, or make the image "
                         "(slurm/containers)")  # fmt: skip
    for mount in cluster.mounts:
        if not Path(mount.split(":")[0]).exists():
            raise ValueError(f"cluster.mounts: {mount.split(':')[0]} doesn't exist")
    for path in mounts(config):
        if "," in path or path.count(":") > 2:
            raise ValueError(f"{path}: containers can't mount a path with a comma or a colon; rename it")
    if cluster.runtime != "pyxis" and "SLURM_JOB_ID" in os.environ and shutil.which(cluster.runtime) is None:
        raise ValueError(f"cluster.runtime={cluster.runtime}: there is no such program on {os.uname().nodename}: load "
                         "its module in cluster.modules, or choose another runtime")  # fmt: skip


def environment(config: Config) -> dict[str, str]:
    """Variables of processes in a container."""
    return {"PYTHONNOUSERSITE": "1"} if config.cluster.container else {}


def command(config: Config, variables: dict[str, str]) -> list[str]:
    """The interpreter, inside of the container. `variables` are the job's own, against the image's."""
    cluster, python = config.cluster, config.cluster.python or "python3"
    if cluster.runtime == "pyxis":
        return [python]
    binds = [item for mount in mounts(config) for item in ("--bind", mount)]
    values = [item for name, value in variables.items() for item in ("--env", f"{name}={value}")]
    gpu = [] if cluster.gpu == "cpu" else ["--nv"]
    return [cluster.runtime, "exec", *gpu, "--pwd", str(Path.cwd()), *binds, *values, cluster.container, python]


def srun_options(config: Config, variables: dict[str, str]) -> list[str]:
    """pyxis's options of srun; none for the others."""
    cluster = config.cluster
    if not cluster.container or cluster.runtime != "pyxis":
        return []
    names = [*variables, *(name for name in PASSED if name not in variables)]
    return [f"--container-image={cluster.container}", f"--container-mounts={','.join(mounts(config))}",
            f"--container-workdir={Path.cwd()}", f"--container-env={','.join(names)}"]  # fmt: skip


def mounts(config: Config) -> list[str]:
    """FROM:TO of what a container has to see: the working directory, run, model, data and judge's folder, what links
    in them lead to, and cluster.mounts."""
    wanted = [Path.cwd(), Path(config.output_dir), Path(config.model.path), Path(config.data.manifest).parent]
    if config.judge.endpoint and "://" not in config.judge.endpoint:
        wanted.append(Path(config.judge.endpoint))
    seen: list[Path] = []
    behind = [place for folder in wanted for place in _places(folder.absolute())]
    for path in [*wanted, *behind]:
        if not any(path.absolute().is_relative_to(other) for other in seen):
            seen.append(path.absolute())
    return [*(f"{path}:{path}" for path in seen), *config.cluster.mounts]


def _places(path: Path) -> Iterator[Path]:
    """Where a path and the links in it lead: of a file that is a link, its target's folder."""
    yield path.resolve()
    if path.is_dir():
        for entry in islice(path.iterdir(), MOST_ENTRIES):
            if entry.is_symlink():
                target = entry.resolve()
                yield target if target.is_dir() else target.parent
