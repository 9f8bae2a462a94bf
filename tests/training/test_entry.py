"""The entry point's exit status and words: a known failure is one line that starts with `error:`, never a traceback."""

import pytest

from megatron_avatar.resilience.checkpoint import CheckpointError
from megatron_avatar.train import INTERRUPTED, main
from megatron_avatar.training import loop

ARGUMENTS = ["recipe=tiny_avatar", "model.path=x", "data.manifest=y", "output_dir=z"]


@pytest.mark.parametrize(
    ("failure", "status"),
    [(CheckpointError("no room"), 1), (OSError("no room"), 1), (ValueError("no room"), 1), (loop.Interrupted(), 75)],
)
def test_known_failures_have_words_and_a_status(failure, status, monkeypatch, capsys):
    def fail(config, backend):
        raise failure

    monkeypatch.setattr(loop, "train", fail)
    assert main(ARGUMENTS) == status
    said = capsys.readouterr().err
    assert "same command continues" in said if status == INTERRUPTED else said == "error: no room\n"


def test_a_layout_that_does_not_fit_is_refused_in_words(capsys):
    assert main([*ARGUMENTS, "parallel.tp=2"]) == 2
    assert "parallel.tp=2" in capsys.readouterr().err
