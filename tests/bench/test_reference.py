"""Whole trainings against numbers that are kept: other tests compare runs of one code with each other."""

import io
import json

import pytest
from rich.console import Console

from bench import reference
from bench.timing import machine
from tests.ranks import launch


def measure(path) -> None:
    path.write_text(json.dumps(reference.measure()))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_losses_are_those_that_were_kept(tmp_path):
    launch(measure, 1, tmp_path / "now.json", timeout=550)
    said = io.StringIO()
    here = {key: value for key, value in machine().items() if key not in ("cores", "threads")}
    kept, now = json.loads(reference.KEPT.read_text()), json.loads((tmp_path / "now.json").read_text())
    assert reference.judge(kept, now, here, Console(file=said, width=160)) == 0, said.getvalue()
    steps = [step for name in ("grpo", "avatar") for step in now[name]]
    assert sum(step["reward"] > 0 and step["grad_norm"] > 0 for step in steps) > 8 and now["avatar"][-1]["kl"] > 0
