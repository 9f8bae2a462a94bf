"""The demo's ledger: what is reused, and what must not be; and its parts, which fit two cores."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from data_tools import pretrain
from eval import demo
from eval.demo import Growing, Ledger
from eval.forked import ENVIRONMENT, LIBRARIES
from eval.jobs import startable
from eval.paper.figures import training
from megatron_avatar.config import load_config
from tests.eval.made_up import write_lines, write_run

ROOT = Path(__file__).parents[2]


def test_a_demo_is_continued_but_never_mixed_with_another(tmp_path):
    path, settings = tmp_path / "phases.json", {"seed": 0, "smoke": False}
    first = Ledger(path, settings)
    first.add({"sft": 2.0}, 100.0, done="sft")
    again = Ledger(path, settings)
    again.add({"sft": 1.0, "grpo": 4.0}, 50.0)
    assert again.state["done"] == ["sft"] and again.state["wall_s"] == {"sft": 3.0, "grpo": 4.0}
    assert again.state["peak_rss_mib"] == 100.0
    for other in ({"seed": 1, "smoke": False}, {"seed": 0, "smoke": True}):
        with pytest.raises(ValueError, match="remove that folder"):
            Ledger(path, other)


def test_both_cores_have_work_from_the_data_to_the_last_evaluation(tmp_path):
    """Parts end in the order in which they began: until the last evaluation two processes run."""
    waiting, have, running, most = demo.parts(tmp_path, 0, False), {"data"}, [], []
    waiting = [job for job in waiting if job.name != "data"]
    while waiting or running:
        started = startable(waiting, have, demo.PROCESSES - sum(n for _, n in running))
        waiting = [job for job in waiting if job not in [job for job, _ in started]]
        running += started
        most.append(sum(n for _, n in running))
        have.add(running.pop(0)[0].name)
    assert set(most[:-1]) == {demo.PROCESSES}


def test_the_report_is_there_while_the_run_goes_on(tmp_path):
    grow = Growing(tmp_path, 3)
    grow()
    assert not (tmp_path / "report.html").exists(), "nothing to show yet"
    write_run(tmp_path, items=12, steps=3)
    (tmp_path / "results.json").unlink()
    grow()
    page = (tmp_path / "report.html").read_text()
    assert 'http-equiv="refresh"' in page and "The run goes on" in page and "<svg" in page
    assert demo.right_so_far(demo.predictions_file(tmp_path, "avatar")).startswith("right ")
    grow.stop()
    page = (tmp_path / "report.html").read_text()
    assert "refresh" not in page and "The run was stopped; the same command continues it" in page
    assert "Still to come: what the run took." in page, "all else is there"
    assert "<title>Megatron-AVATAR, seed 3</title>" in page


def test_the_first_curve_is_there_with_the_second_step_of_the_first_training(tmp_path):
    """The cold start is what begins behind the clips; nothing else has to be there for its curve."""
    behind = [job.name for job in demo.parts(tmp_path, 0, False) if job.needs == ("data",)]
    assert behind == ["sft"]
    write_lines(tmp_path / "sft" / "metrics.jsonl", [{"step": s, "stage": "sft", "stage_step": s, "loss": 9.0 - s}
                                                     for s in (1, 2)])  # fmt: skip
    Growing(tmp_path, 3)()
    page = (tmp_path / "report.html").read_text()
    assert 'aria-label="Loss of the cold start."' in page and (tmp_path / "figures" / "sft_loss.svg").exists()
    assert "not measured" not in page and "<h2>Accuracy" not in page and "<h2>Clips" not in page, "what there is, alone"
    told = ("Still to come: the accuracy of base, SFT, GRPO, AVATAR; AVATAR against GRPO; clips to see and hear; "
            "9 more figures; what the run took.")  # fmt: skip
    assert page.count(told) == 1 and "not measured" not in (tmp_path / "report.md").read_text()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_short_demo_from_clips_to_report(tmp_path, monkeypatch, capsys):
    out = tmp_path / "demo"
    monkeypatch.setattr("sys.argv", ["demo", "--out", str(out), "--smoke"])
    demo.main()
    results = json.loads((out / "results.json").read_text())
    assert set(results["systems"]) == set(demo.SYSTEMS) and results["steps"] == 6
    assert results["completions_generated"] == {"grpo": 6 * 16 * 8, "avatar": 6 * 16 * 4}
    assert results["processor_s"] > 0 and results["avatar_minus_grpo"]["n"] == results["systems"]["grpo"]["n"]
    page = (out / "report.html").read_text()
    assert page.count("<audio controls") >= 3 and "refresh" not in page
    assert not list(out.glob("*/wandb")), "no service beside two busy cores"
    assert "data: begins" in capsys.readouterr().out
    assert demo.right_so_far(demo.predictions_file(out, "avatar")).startswith("right ")
    demo.main()
    said = " ".join(capsys.readouterr().out.split())  # lines are as wide as the terminal
    assert "done before, reused: data, sft" in said and "held-out accuracy" in said
    assert f"{out}/report.html" in said.replace(" ", "")


def test_the_report_grows_while_one_system_has_answered_half(tmp_path, monkeypatch):
    write_run(tmp_path, items=12, steps=3)
    file = demo.predictions_file(tmp_path, "avatar")
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[: len(lines) // 2]))
    monkeypatch.setattr(training, "draw", lambda *_: {})
    Growing(tmp_path, 3)()
    page = (tmp_path / "report.html").read_text()
    assert f"AVATAR {len(lines) // 2} of {len(lines)} samples" in page
    assert "GRPO − SFT" in page and "AVATAR − GRPO" not in page


def test_a_report_that_fails_isnt_tried_again_at_once(tmp_path, monkeypatch):
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "metrics.jsonl").touch()
    times, used = iter((100.0, 200.0)), iter((5.0, 15.0))
    clocks = SimpleNamespace(monotonic=lambda: next(times), process_time=lambda: next(used))
    monkeypatch.setattr(demo, "time", clocks)
    grow = Growing(tmp_path, 3)
    monkeypatch.setattr("eval.report.render", lambda *_, **__: open(tmp_path / "absent"))
    grow()
    assert grow._next == 200 + 29 * 10


def test_time_in_all_counts_stopped_attempts_and_none_that_ran_nothing(tmp_path, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("sys.argv", ["demo", "--out", str(tmp_path)])
    monkeypatch.setattr(demo, "run_all", stopped)
    with pytest.raises(SystemExit):
        demo.main()
    state = json.loads((tmp_path / "phases.json").read_text())
    assert "in all" in state["wall_s"]
    state["done"], state["wall_s"] = [job.name for job in demo.parts(tmp_path, 0, False)], {"in all": 5.0}
    (tmp_path / "phases.json").write_text(json.dumps(state))
    with pytest.raises(SystemExit):
        demo.main()
    assert json.loads((tmp_path / "phases.json").read_text())["wall_s"] == {"in all": 5.0}


def test_commands_name_their_progress(tmp_path):
    data = tmp_path / "data"
    (data / "clips").mkdir(parents=True)
    (data / "clips" / "a.webm").touch()
    command = demo.synthesis(tmp_path, 0, True)
    assert command.done() == 1 < command.total
    (data / "manifest.jsonl").write_text(json.dumps({"split": "eval"}) + "\n")
    both = demo.training(tmp_path, "sft", "tiny_sft", 0, smoke=True, processes=2)
    assert both.module == "megatron_avatar.train"
    assert both.total == 2 and "parallel.threads=1" in both.arguments
    assert demo.evaluation(tmp_path, "base", "omni").total == 1


def test_what_is_read_ahead_can_be_forked():
    """No thread runs and no GPU is awake once the libraries are read: a forked copy of either would hang or fail.
    pyarrow's allocator has a thread of its own, and begins it again where it was forked."""
    code = ("import sys, importlib; from pathlib import Path; [*map(importlib.import_module, sys.argv[1:])]; "
            "import torch; print(torch.cuda.is_initialized(), *[file.read_text().strip() for file in "
            "Path('/proc/self/task').glob('*/comm')])")  # fmt: skip
    environment = {**os.environ, **ENVIRONMENT, "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code, *LIBRARIES], cwd=ROOT, capture_output=True, text=True,
                          env=environment, timeout=600, check=True)  # fmt: skip
    awake, *threads = done.stdout.split()
    assert awake == "False" and len([name for name in threads if name != "jemalloc_bg_thd"]) == 1, threads


@pytest.mark.parametrize("base", demo.BASES)
def test_a_base_goes_through_all_parts_by_its_familys_settings(tmp_path, base, monkeypatch):
    """Every part loads a folder of this base or of what came of it, and shows it pictures of the size it knows."""
    folder, settings = demo.BASES[base]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "manifest.jsonl").write_text(json.dumps({"split": "eval"}) + "\n")
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    (tmp_path / folder).mkdir(parents=True)
    commands = {job.name: job.prepare(1) for job in demo.parts(tmp_path, 0, False, base) if job.name != "data"}
    assert all({*settings} <= {*command.arguments} for command in commands.values())
    assert f"model.path={folder}" in commands["sft"].arguments and f"model={folder}" in commands["eval base"].arguments
    assert f"model.path={tmp_path / 'sft' / 'export' / 'sft'}" in commands["grpo"].arguments
    config = load_config(commands["avatar"].arguments)
    assert (config.model.shape, config.data.frame_max_pixels) == (Path(folder).name, pretrain.BASES[base].pixels)
    assert pretrain.BASES[base].folder == folder

    (tmp_path / folder).rmdir()
    data, made, sft, *_ = demo.parts(tmp_path, 0, False, base)
    assert (made.name, made.processes, sft.needs) == ("base", 1, ("data", "base")), "made first, by threads"
    command = made.prepare(2)
    assert command.module == "data_tools.pretrain"
    assert command.arguments[:4] == ["--family", base, "--out", f"{tmp_path / 'base'}"]
    assert f"model.path={tmp_path / 'base'}" in sft.prepare(1).arguments
