"""What `python -m eval.run --benchmarks` prints: every benchmark, and commands that are one word's copy away."""

from __future__ import annotations

import re

import pytest

from eval import run, sources
from eval.asking.benchmark import load_benchmark, names


def test_every_benchmark_has_a_title_a_size_and_a_command(capsys):
    assert run.main(["--benchmarks"]) == 0
    said = capsys.readouterr().out
    for name in names():
        if name == "held_out":
            continue
        source = load_benchmark(name).source
        assert source.items > 0, name
        assert re.search(rf"^{name}: .+, {source.items:,} questions", said, re.MULTILINE), name
        command = f".venv/bin/hf download {source.dataset} --repo-type dataset --local-dir benchmarks/{name}"
        assert f"  {command}\n" in said, name
    assert f"bash slurm/eval.sh model=FOLDER data={sources.FOLDER}" in said and "held_out" not in said


def test_some_are_shown_by_name(capsys):
    assert sources.show(["worldsense", "held_out"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("worldsense: ") and "omnibench" not in said
    assert "held_out: what a manifest of your own holds out" in said and "benchmark=held_out data=MANIFEST" in said


def test_one_that_there_is_not_is_refused_with_those_that_there_are(capsys):
    with pytest.raises(ValueError, match="worldsense"):
        sources.show(["worldsence"])
    assert run.main(["--benchmarks", "worldsence"]) == 2
    assert "error: " in capsys.readouterr().err
