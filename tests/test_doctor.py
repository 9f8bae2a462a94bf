"""The doctor tells what is there, and lives through anything being absent."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from megatron_avatar.doctor import PACKAGES

ROOT = Path(__file__).parents[1]


def doctor(*arguments: str, python: tuple[str, ...] = (), **environment: str) -> str:
    command = [sys.executable, *python, "-m", "megatron_avatar.doctor", *arguments]
    run = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def here() -> dict[str, dict[str, str]]:
    return json.loads(doctor("--json"))


def test_reports_the_installed_versions(here):
    import torch

    assert here["packages"]["state"] == "ok"
    assert f"torch {torch.__version__.split('+')[0]}" in here["packages"]["found"]
    assert here["Python"]["found"] == ".".join(map(str, sys.version_info[:3]))
    assert ("gloo" in here["collectives"]["found"]) and (here["GPUs"]["state"] == "ok") == torch.cuda.is_available()


def test_dali_decodes_real_clips_and_leaves_the_rest_to_pyav(here):
    assert here["DALI"]["state"] == "ok"
    assert "VP9" in here["DALI"]["found"] and "H.264" not in here["DALI"]["found"]
    assert here["DALI"]["meaning"] == "H.264: PyAV decodes instead"


def test_only_what_the_product_imports_can_be_missing():
    files = [*(ROOT / "megatron_avatar").rglob("*.py"), *(ROOT / "slurm").rglob("*.py")]
    imported = set(re.findall(r"^\s*(?:import|from) (\w+)", "\n".join(f.read_text() for f in files), re.MULTILINE))
    owners = {owner for module, names in packages_distributions().items() if module in imported for owner in names}
    assert set(PACKAGES) - owners == set()


def test_without_any_package_every_line_is_still_there(here):
    bare = json.loads(doctor("--json", python=("-S",), PYTHONPATH=""))
    assert bare.keys() == here.keys()
    assert bare["packages"]["found"] == "none"
    assert bare["GPUs"]["found"].startswith("ModuleNotFoundError")
    assert "missing  DALI: not installed" in doctor(python=("-S",), PYTHONPATH="")


@pytest.mark.parametrize("nvidia", [False, True])
def test_apex_of_pypi_is_told_from_nvidias(tmp_path, nvidia):
    (tmp_path / "apex" / ("optimizers" if nvidia else "lib")).mkdir(parents=True)
    (tmp_path / "apex" / "__init__.py").write_text("")
    apex = json.loads(doctor("--json", python=("-S",), PYTHONPATH=str(tmp_path)))["Apex"]
    if nvidia:
        assert apex["state"] == "ok"
    else:
        assert apex["state"] == "missing" and apex["command"].endswith(" -m pip uninstall apex")


def test_a_partial_slurm_is_named(tmp_path):
    (tmp_path / "sbatch").write_text("#!/bin/sh\n")
    (tmp_path / "sbatch").chmod(0o755)
    slurm = json.loads(doctor("--json", python=("-S",), PYTHONPATH="", PATH=str(tmp_path)))["Slurm"]
    assert slurm["state"] == "missing" and "srun" in slurm["found"] and "sbatch" not in slurm["found"]


@pytest.mark.slow
def test_calibration_is_measured_on_all_ranks_and_read_by_the_plan(tmp_path):
    path = tmp_path / "runs" / "calibration.json"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "megatron_avatar.doctor", "--calibrate", str(path), "--json",
    ]  # fmt: skip
    run = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(path.read_text())
    assert json.loads(run.stdout.splitlines()[-1]) == found and found["world"] == 2
    assert 1e8 < found["train_flops"] < 1e13 and found["memory_ratio"] is None
    assert min(found[key] for key in ("forward_flops", "bandwidth", "network")) > 1e6
    assert 1e-5 < found["layer_gap_s"] < 1 and 1e-6 < found["graph_gap_s"] < 1

    from megatron_avatar.config import load_config
    from megatron_avatar.planning.seconds import read_rates

    config = load_config(["recipe=tiny_grpo", "dry_run=true", f"cluster.calibration={path}"])
    rates = read_rates(config)
    assert (rates.train, rates.network) == (found["train_flops"], found["network"])
    assert "measured on cpu" in rates.source


def test_shared_memory_that_cannot_be_written_is_missing(tmp_path):
    from megatron_avatar.doctor import _shared_memory

    assert _shared_memory(tmp_path).state in ("ok", "note")
    assert _shared_memory(tmp_path / "none").found == f"no {tmp_path / 'none'}"
    assert "shm-size" in _shared_memory(tmp_path / "none").command


def test_commands_stand_whole_below_the_table(capsys, monkeypatch):
    from megatron_avatar.doctor import Result, show

    monkeypatch.setenv("COLUMNS", "60")
    command = "/a/folder/of/a/long/name/.venv/bin/python -m pip install -r requirements.txt --no-cache-dir"
    show({"CPU": Result("ok", "2 cores"), "packages": Result("missing", "none", "not installed: torch", command)})
    *table, last = capsys.readouterr().out.splitlines()
    assert last == f"packages: {command}" and max(map(len, table)) <= 60 and "pip" not in "".join(table)


@pytest.mark.parametrize(("apart", "state", "words"), [
    (("fine", ""), "ok", "as PyTorch's operations"),
    (("RuntimeError: Failed to find C compiler", ""), "missing", "Failed to find C compiler"),
    (("", "Segmentation fault"), "missing", "Segmentation fault"),
])  # fmt: skip
def test_kernels_that_cannot_be_built_are_named(monkeypatch, apart, state, words):
    import torch

    from megatron_avatar import doctor

    assert doctor._own_kernels().found == "not run"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(doctor, "_apart", lambda function: apart)
    result = doctor._own_kernels()
    assert result.state == state and words in result.found
    assert ("python3-dev" in result.command) == ("compiler" in words), "a remedy where it is one"


def test_what_a_process_of_its_own_says_and_why_it_broke(monkeypatch, capsys):
    import torch

    from megatron_avatar import doctor
    from megatron_avatar.policy import fusions
    from megatron_avatar.policy.kernels import device

    assert "ImportError" in doctor._apart("no_such_function")[1]
    for reason, other, said in (("", "", "fine"), ("it is old", "", "it is old"), ("", "it differs", "it differs")):
        monkeypatch.setattr(device, "obstacle", lambda index, reason=reason: reason)
        monkeypatch.setattr(fusions, "tested", lambda part, dtype, other=other: other * (dtype is torch.bfloat16))
        doctor.print_own_kernels()
        assert capsys.readouterr().out.strip() == said
