"""Numbers that are kept: what counts as equal, as worse, and as another machine's."""

from __future__ import annotations

import io
import json
import math
import subprocess

import pytest
from rich.console import Console

from bench import compare, reference

CURVES = {"sft": [{"loss": 2.0, "tokens": 8}, {"loss": 1.5, "tokens": 8}]}
KEPT = {"curves": CURVES, "machine": {"cpu": "a", "torch": "1"}}


def judged(now, here=KEPT["machine"]):  # noqa: B006
    said = io.StringIO()
    return reference.judge(KEPT, now, dict(here), Console(file=said, width=200)), said.getvalue()


def moved(loss: float):
    return {"sft": [KEPT["curves"]["sft"][0], {"loss": loss, "tokens": 8}]}


def test_losses_are_identical_or_said_to_differ():
    assert judged(KEPT["curves"]) == (0, "identical in 4 numbers\n")
    status, said = judged(moved(1.5 + 1e-9))
    assert status == 1 and "sft: step 2: loss" in said and "bench.reference --write" in said
    status, said = judged({"sft": KEPT["curves"]["sft"][:1]})
    assert status == 1 and "sft: steps" in said
    assert judged({**KEPT["curves"], "grpo": [{"loss": 1.0}]})[0] == 1


def test_another_machine_may_differ_in_the_last_digits_alone():
    there = {"cpu": "b", "torch": "1"}
    status, said = judged(moved(1.5 + 2.0 * 5e-4), there)
    assert status == 0 and "cpu a -> b" in said
    assert judged(moved(1.5 + 2.0 * 2e-3), there)[0] == 1, "in units of the largest loss, 2"
    assert reference.relative(None, 1.0, 2.0) == math.inf and reference.relative(0, 0.25, 0.0) == 0.25


def test_a_token_that_is_drawn_otherwise_makes_another_run_of_it():
    there, steps = {"cpu": "b", "torch": "1"}, CURVES["sft"]
    kept = {"curves": {name: steps for name in ("sft", "grpo", "avatar")}, "machine": KEPT["machine"]}

    def status(here=there, **runs) -> tuple[int, str]:
        said = io.StringIO()
        return reference.judge(kept, kept["curves"] | runs, here, Console(file=said, width=200)), said.getvalue()

    late, at_once = [steps[0], {"loss": 0.1, "tokens": 7}], [{"loss": 9.0, "tokens": 7}, steps[1]]
    assert status(grpo=late)[0] == 0 and "grpo is compared up to step 2" in status(grpo=late)[1]
    assert status(kept["machine"], grpo=late)[0] == 1
    assert status(grpo=[steps[0] | {"loss": 1.0}, late[1]])[0] == 1, "what came before is compared"
    assert status(sft=late)[0] == 1, "nothing is drawn in supervised fine-tuning"
    assert status(grpo=at_once)[0] == 0 and status(grpo=at_once, avatar=at_once)[0] == 1, "not both by chance"


def test_figures_get_worse_in_their_own_direction():
    kept = {"ours_s": 2.0, "ours_tok_s": 100.0, "peak_mib": 50.0, "sweep": {"8": {"a_s": 1.0}},
            "largest_difference": 1e-6, "machine": {"cores": 2}, "tokens": 5}  # fmt: skip
    now = {"ours_s": 2.2, "ours_tok_s": 90.0, "peak_mib": 40.0, "sweep": {"8": {"a_s": 1.01}},
           "largest_difference": 1.0, "machine": {"cores": 4}, "tokens": 6}  # fmt: skip
    rows = {name: worse for name, _, _, worse in compare.compare(kept, now)}
    assert rows == {"ours_s": pytest.approx(0.1), "ours_tok_s": pytest.approx(0.1), "sweep.8.a_s": pytest.approx(0.01),
                    "peak_mib": pytest.approx(-0.2)}  # fmt: skip


def test_results_are_compared_with_those_of_the_same_machine(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "RESULTS", tmp_path)
    results = iter([1.0, 1.0, 1.04, 1.2])

    def run(command, **_):
        line = json.dumps({"ours_s": next(results), "machine": {"cpu": "here"}})
        (tmp_path / "x.json").write_text(line)  # as a benchmark does that keeps its own
        return subprocess.CompletedProcess(command, 0, f"{line}\n", "")

    monkeypatch.setattr(subprocess, "run", run)
    (tmp_path / "x.json").write_text(json.dumps({"ours_s": 0.5, "machine": {"cpu": "there"}}))
    for arguments, status in ((["x"], 2), (["--keep", "x"], 0), (["x"], 0), (["x"], 1)):
        monkeypatch.setattr("sys.argv", ["compare", *arguments])
        assert compare.main() == status
    assert "no result of such a machine" in capsys.readouterr().out
    assert json.loads((tmp_path / "x.json").read_text())["machine"] == {"cpu": "there"}, "left as it was"
