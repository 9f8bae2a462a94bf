"""The sbatch scripts, run with a fake Slurm on PATH: what srun would start, with which environment."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_avatar.config import check_world, load_config

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path for path in (ROOT / "slurm").glob("*.sh") if path.name != "common.sh")
FAKE_SRUN = """#!/bin/bash
{ printf '%s\\n' "$@"; echo "cwd=$PWD"; env | grep -E '^(MASTER_|SRUN_|HDF5_)'; } > "$RECORD"
exit "${SRUN_STATUS:-0}"
"""


def directives(script: Path) -> dict[str, str]:
    found = re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", script.read_text(), re.MULTILINE)
    return {key: value for key, value in found}


@pytest.fixture
def submit(tmp_path):
    """Runs a script as Slurm does: a spooled copy, from another folder, with a job's environment."""
    programs, spool, record = tmp_path / "bin", tmp_path / "spool", tmp_path / "record"
    programs.mkdir()
    spool.mkdir()
    for name, text in {"srun": FAKE_SRUN, "scontrol": "#!/bin/bash\necho localhost\necho node2\n"}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)

    def run(script: Path, *arguments: str, **environment: str) -> tuple[subprocess.CompletedProcess, list[str]]:
        copy = shutil.copy(script, spool / "slurm_script")
        job = {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "PYTHON": sys.executable,
            "RECORD": str(record),
            "SLURM_CPUS_PER_TASK": directives(script)["cpus-per-task"],
            "SLURM_JOB_ID": "123456",
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_NTASKS_PER_NODE": directives(script)["ntasks-per-node"],
            "SLURM_SUBMIT_DIR": str(ROOT),
            **environment,
        }
        command = ["bash", copy, *arguments]
        done = subprocess.run(command, cwd=spool, env=job, capture_output=True, text=True, timeout=60)
        return done, record.read_text().splitlines() if record.exists() else []

    return run


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_starts_one_process_a_task(submit, script):
    options = directives(script)
    done, seen = submit(script, "model.path=a folder", "seed=3")
    assert done.returncode == 0, done.stderr
    recipe = options["job-name"]
    assert seen[:8] == [
        "--kill-on-bad-exit=1", f"--ntasks-per-node={options['ntasks-per-node']}", sys.executable, "-m",
        "megatron_avatar.train", f"recipe={recipe}", "model.path=a folder", "seed=3",
    ]  # fmt: skip
    assert f"cwd={ROOT}" in seen and "MASTER_ADDR=localhost" in seen and "HDF5_USE_FILE_LOCKING=FALSE" in seen
    assert f"SRUN_CPUS_PER_TASK={options['cpus-per-task']}" in seen
    (port,) = (int(line.partition("=")[2]) for line in seen if line.startswith("MASTER_PORT="))
    assert 1024 < port < 32768, "below Linux's range for outgoing connections"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_asks_for_what_the_recipe_needs(script):
    options = directives(script)
    config = load_config([f"recipe={options['job-name']}", "model.path=m", "data.manifest=d"])
    assert check_world(config, int(options["nodes"]) * int(options["ntasks-per-node"])) >= 1
    assert options.get("gpus-per-node", options["ntasks-per-node"]) == options["ntasks-per-node"]
    assert options["open-mode"] == "append" and {"requeue", "signal"} <= options.keys()


def test_two_jobs_take_different_ports(submit):
    ports = {line for job in ("7", "8") for line in submit(SCRIPTS[0], SLURM_JOB_ID=job)[1] if "MASTER_PORT" in line}
    assert len(ports) == 2


def test_failures_end_the_job_with_a_reason(submit):
    assert submit(SCRIPTS[0], SRUN_STATUS="3")[0].returncode == 3
    done, _ = submit(SCRIPTS[0], PYTHON="missing/python")
    assert done.returncode == 2 and "missing/python is missing" in done.stderr


def test_an_unknown_master_is_found_before_torch_hangs(submit, tmp_path):
    (tmp_path / "bin" / "scontrol").write_text("#!/bin/bash\necho no-such-node.invalid\n")
    done, seen = submit(SCRIPTS[0])
    assert done.returncode == 2 and "can't resolve the first node, no-such-node.invalid" in done.stderr
    assert not seen
