"""The entry point's exit status and words: a known failure is one line that starts with `error:`, never a traceback."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_avatar.resilience.attempts import NoProgress
from megatron_avatar.resilience.checkpoint import CheckpointError
from megatron_avatar.resilience.ended import INTERRUPTED, told
from megatron_avatar.train import main
from megatron_avatar.training import loop

ROOT = Path(__file__).parents[2]
MANIFEST = ROOT / "LICENSE"  # any file: nothing reads it here
ARGUMENTS = ["recipe=tiny_avatar", f"model.path={ROOT / 'assets/tiny_base'}", f"data.manifest={MANIFEST}",
             "output_dir=z"]  # fmt: skip


@pytest.mark.parametrize(
    ("failure", "status"),
    [(CheckpointError("no room"), 1), (OSError("no room"), 1), (ValueError("no room"), 2), (NoProgress("no room"), 2),
     (loop.Interrupted(), 75)],
)
def test_known_failures_have_words_and_a_status(failure, status, monkeypatch, capsys, tmp_path):
    def fail(config, backend):
        raise failure

    monkeypatch.setattr(loop, "train", fail)
    assert main(ARGUMENTS) == status
    said = capsys.readouterr().err
    assert not list(tmp_path.iterdir()), "nobody looks"
    assert "same command continues" in said if status == INTERRUPTED else said.endswith(" ...\nerror: no room\n")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["recipe=avatar_7b"], "parallel.tp=4 and parallel.pp=1 take a multiple of 4 processes"),
        (["recipe=tiny_avatar", "parallel.tp=2"], "torchrun --nproc-per-node 2 -m megatron_avatar.train recipe=tiny"),
        (["recipe=avatar_7b", "model.path=Qwen/Qwen2.5-Omni-7B", "data.manifest=/no.jsonl"],
         "2 things are missing or wrong:\n  model.path=Qwen/Qwen2.5-Omni-7B is no folder here: models are read from "
         "disk alone. To fetch it: .venv/bin/hf download Qwen/Qwen2.5-Omni-7B --local-dir models/Qwen2.5-Omni-7B"),
        (["recipe=avatar_7b", "model.path=weights/Qwen2.5-Omni-7B", "data.manifest=/no.jsonl"],
         "To fetch it: .venv/bin/hf download Qwen/Qwen2.5-Omni-7B --local-dir weights/Qwen2.5-Omni-7B, then "
         "model.path=weights/Qwen2.5-Omni-7B"),
    ],
)  # fmt: skip
def test_what_would_not_start_is_said_before_torch_is_imported(arguments, says):
    """In a process that can't import torch."""
    inputs = [item for item in ARGUMENTS[1:] if item.split("=")[0] not in {a.split("=")[0] for a in arguments}]
    script = ("import sys; sys.modules['torch'] = None; from megatron_avatar.train import main; "
              "sys.exit(main(sys.argv[1:]))")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", script, *arguments, *inputs], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and says in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("failure", "means"),
    [(ValueError("a mistake"), 2), (OSError("no room"), 137), (RuntimeError("our fault"), 137),
     (loop.Interrupted(), 75)],
)
def test_a_launcher_that_loses_statuses_reads_them_from_files(failure, means, monkeypatch, tmp_path):
    """Another rank, on its way, was ended by the launcher, which then said 137."""
    prefix = str(tmp_path / ".ended-7")
    (tmp_path / ".ended-7-74").touch()
    assert told(prefix, 137) == 75, "stopped before there was anything to save"

    def fail(config, backend):
        raise failure

    monkeypatch.setenv("AVATAR_ENDED", prefix)
    monkeypatch.setattr(loop, "train", fail)
    try:
        main(ARGUMENTS)
    except RuntimeError:
        assert isinstance(failure, RuntimeError)
    assert told(prefix, 137) == means
