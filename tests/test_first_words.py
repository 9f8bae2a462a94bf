"""Who starts a command hears something within two seconds, and reads at its end where everything is."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_avatar import first_words
from megatron_avatar.config import load_config
from megatron_avatar.train import last_words

ROOT = Path(__file__).parents[1]


def test_every_slow_command_is_one(capsys):
    for module in first_words.SLOW:
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module
    first_words.say()
    assert capsys.readouterr().err == "", "nothing where a package is only imported"


@pytest.mark.parametrize("rank", ["0", "1"])
def test_the_first_process_alone_speaks_before_the_imports(rank):
    """In processor time, as the machine may be busy: the line is there long before torch is."""
    environment = {**os.environ, "RANK": rank}
    began = time.monotonic()
    run = subprocess.Popen([sys.executable, "-m", "eval.report"], cwd=ROOT, env=environment, stderr=subprocess.PIPE,
                           text=True)  # fmt: skip
    line = run.stderr.readline()
    first = time.monotonic() - began
    run.communicate(timeout=200)
    whole = time.monotonic() - began
    assert run.returncode == 2
    assert line.startswith("usage" if rank == "1" else "eval.report: loading ...")
    assert rank == "1" or first < 0.7 * whole


SPEAKING = """
import runpy, sys
from megatron_avatar import first_words, train
def tell(line):
    sys.exit(line + " " + str({"omegaconf", "hydra", "torch", "numpy", "rich"} & {*sys.modules}))
first_words.tell = tell
"""


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("train.main(['dry_run=true'])", "reading the settings"),
        *[(f"sys.argv = ['', '--dry-run']; runpy.run_path('slurm/{name}.py', run_name='__main__')", says)
          for name, says in (("reproduce", "reading every task's settings, and planning it: up to a minute"),
                             ("sweep", "reading every member's settings"))],
    ],
)  # fmt: skip
def test_plans_speak_before_settings_and_libraries_are_read(code, says):
    """On a busy machine that takes half a minute."""
    command = [sys.executable, "-c", SPEAKING + code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert done.stderr == f"{says} ... set()\n"


def test_the_last_words_name_the_model_and_the_next_command():
    config = load_config(["recipe=tiny_avatar", "model.path=m", "data.manifest=d", "output_dir=runs/x"])
    said = last_words(config)
    assert "runs/x/export/localisation" in said and "runs/x/metrics.jsonl" in said and "eval.run model=runs/x" in said
