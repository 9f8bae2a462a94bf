"""What a container has to see: links followed, nothing twice."""

from __future__ import annotations

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
