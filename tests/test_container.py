"""What a container has to see: links followed, nothing twice."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from megatron_avatar.config import load_config
from slurm import container


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A checkout whose runs lie in scratch, and a model in a Hugging Face cache."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    checkout, scratch, cache = (tmp_path / name for name in ("checkout", "scratch/me", "cache/models--Qwen--Omni"))
    for folder in (checkout, scratch / "runs", scratch / "data", cache / "blobs", cache / "snapshots/abc"):
        folder.mkdir(parents=True)
    (checkout / "runs").symlink_to(scratch / "runs")
    for name in ("config.json", "model.safetensors"):
        (cache / "blobs" / name).touch()
        (cache / "snapshots/abc" / name).symlink_to(f"../../blobs/{name}")
    (scratch / "data" / "manifest.jsonl").touch()
    (tmp_path / "archive/clips").mkdir(parents=True)
    (scratch / "data" / "media").symlink_to(tmp_path / "archive/clips")
    monkeypatch.chdir(checkout)
    return tmp_path


def configured(site, *more: str):
    return load_config(["recipe=avatar_7b", f"model.path={site}/cache/models--Qwen--Omni/snapshots/abc",
                        f"data.manifest={site}/scratch/me/data/manifest.jsonl", "cluster.container=docker://x", *more])


def test_places_behind_links_are_mounted_under_their_own_names(site):
    found = container.mounts(configured(site, f"cluster.mounts=[{site}:/data]"))
    wanted = [site / "checkout", site / "cache/models--Qwen--Omni/snapshots/abc", site / "scratch/me/data",
              site / "scratch/me/runs", site / "cache/models--Qwen--Omni/blobs", site / "archive/clips"]
    assert found == [*(f"{path}:{path}" for path in wanted), f"{site}:/data"]


def test_the_judges_folder_is_seen_and_a_url_is_none(site):
    assert any("judge" in mount for mount in container.mounts(configured(site, f"judge.endpoint={site}/judge")))
    assert not any("http" in mount for mount in container.mounts(configured(site, "judge.endpoint=http://h:1/v1")))


@pytest.mark.parametrize(
    ("more", "says"),
    [(["cluster.container=/no/image.sif"], "doesn't exist: correct the path, or make the image"),
     (["cluster.mounts=[/no/where:/data]"], "cluster.mounts: /no/where doesn't exist"),
     (['output_dir="/tmp/a,b/run"'], "can't mount a path with a comma or a colon")],
)  # fmt: skip
def test_what_cannot_be_mounted_is_refused(site, more, says):
    with pytest.raises(ValueError, match=says):
        container.check(configured(site, *more))


def test_the_runtimes_program_has_to_be_on_the_node(site, monkeypatch):
    config = configured(site, "cluster.runtime=singularity")
    container.check(config)
    assert container.command(config, {"A": "1"})[:2] == ["singularity", "exec"]
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(container.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="cluster.runtime=singularity: there is no such program on"):
        container.check(config)


RECIPES = Path(container.__file__).parent / "containers"


@pytest.mark.parametrize("brings_torch", [True, False])
def test_an_images_steps_leave_its_own_torch_alone(tmp_path, brings_torch):
    """The script that both recipes run, with fakes of the image's Python: which pins are installed, and how."""
    fake, record = tmp_path / "python3", tmp_path / "record"
    fake.write_text(f"""#!/bin/bash
echo "$*" >> {record}
echo "constraint=${{PIP_CONSTRAINT-none}}" >> {record}
case "$*" in
  *"import torch") exit {0 if brings_torch else 1} ;;
  *install*) cp "${{@: -1}}" {tmp_path}/wanted ;;
esac
""")
    fake.chmod(0o755)
    text = (RECIPES / "install.sh").read_text().replace("/avatar", str(tmp_path / "avatar"))
    (tmp_path / "avatar/bin").mkdir(parents=True)
    (tmp_path / "avatar/bin/python").symlink_to(fake)
    (tmp_path / "install.sh").write_text(text)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PIP_CONSTRAINT": "/etc/pip/constraint.txt"}
    pins = RECIPES.parents[1] / "requirements.txt"
    subprocess.run(["bash", str(tmp_path / "install.sh"), str(pins)], env=environment, check=True)
    told, wanted = record.read_text(), (tmp_path / "wanted").read_text()
    assert "venv --system-site-packages --without-pip" in told and "constraint=/etc" not in told
    assert ("\ntorch==" in wanted) == (not brings_torch) and ("\ntriton==" in wanted) == (not brings_torch)
    assert "\nmegatron-core==" in wanted


def test_the_recipes_run_that_script_and_copy_what_is_there():
    docker, apptainer = (RECIPES / "Dockerfile").read_text(), (RECIPES / "avatar.def").read_text()
    for name in ("requirements.txt", "slurm/containers/install.sh"):
        assert (RECIPES.parents[1] / name).is_file() and name in docker and f"\n    {name} /build/" in apptainer
        assert f"!{name}\n" in (RECIPES / "Dockerfile.dockerignore").read_text()
    for text in (docker, apptainer):
        assert "bash /build/install.sh /build/requirements.txt" in text and "nvcr.io/nvidia/pytorch" in text
        assert "PATH=/avatar/bin:$PATH PYTHONNOUSERSITE=1 NVIDIA_DRIVER_CAPABILITIES=" in text
