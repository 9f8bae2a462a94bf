"""The code and settings that a job was started with, copied, so that a requeued job runs what was submitted."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from megatron_avatar.config import save_config
from megatron_avatar.config.schema import Config

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("megatron_avatar", "slurm", "data_tools", "eval", "bench")  # bench: the gate of a profile
FILES = ("requirements.txt", "pyproject.toml")


def snapshot(folder: Path, config: Config | None = None, arguments: list[str] | None = None) -> Path:
    """Copy this code, and the resolved configuration, to `folder`, once: a folder that is there stays as it is.

    It appears whole, by one rename. `snapshot.json` in it says which commit, and the command's arguments. Code that is
    a snapshot already is not copied again.
    """
    if (ROOT / "snapshot.json").exists():
        return ROOT
    folder = folder.absolute()
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        aside.chmod(0o755)
        for name in FOLDERS:
            shutil.copytree(ROOT / name, aside / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        for name in FILES:
            shutil.copy(ROOT / name, aside / name)
        if (ROOT / ".venv").exists():  # the interpreter of a requeued job's checks
            (aside / ".venv").symlink_to(ROOT / ".venv")
        if config is not None:
            save_config(config, aside / "config.yaml")
        about = {"commit": _git("rev-parse", "HEAD"), "changed": _git("status", "--porcelain"), "arguments": arguments}
        (aside / "snapshot.json").write_text(json.dumps(about, indent=1) + "\n")
        aside.rename(folder)
    except FileExistsError:
        pass  # another task of the job was first
    except OSError:
        if not folder.exists():
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def _git(*arguments: str) -> str | None:
    """Output of git, None where the code is no checkout."""
    command = ["git", "-C", os.fspath(ROOT), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
