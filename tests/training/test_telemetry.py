"""Telemetry: no gaps, no repeats, no secrets; progress that suits the output; signals that become a flag."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_avatar.config.schema import Config
from megatron_avatar.planning.seconds import Peaks, peaks_of
from megatron_avatar.resilience.stopping import StopSignal
from megatron_avatar.training import telemetry
from megatron_avatar.training.telemetry import Telemetry, Timer, replay_told

ROOT = Path(__file__).parents[2]
KEY = "0123456789abcdef" * 2 + "fedcba98"


def open_telemetry(run, *, wandb="disabled", rank=0) -> Telemetry:
    config = Config(name="recipe")
    config.log.wandb = wandb
    return Telemetry(run, config, SimpleNamespace(rank=rank, world=1, device=torch.device("cpu")))


def records(run) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# ---- metrics.jsonl -----------------------------------------------------------------------------


class Clock:
    """In place of the module `time`: it goes on where it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.time = self.monotonic = self.perf_counter = lambda: self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(telemetry, "time", clock)
    return clock


def test_records_are_the_loops_own_and_plain_json(tmp_path, clock):
    log = open_telemetry(tmp_path)
    with log.timer("generate"):
        clock.now += 0.25
    log.log({
        "step": 1, "stage": "visual", "reward": np.float32(0.5), "ess": None, "skipped": False, "n": np.int64(3),
        "masked": float("nan"), "inner": {"hist": np.array([1, 2]), "ratio": torch.tensor(float("inf"))},
    })
    log.log({"step": 2})
    first, second = records(tmp_path)
    assert (first.pop("time/generate"), first.pop("time")) == (0.25, 1000.25)
    assert 10 < first.pop("peak_rss_mib") < 100_000
    assert first == {
        "step": 1, "stage": "visual", "reward": 0.5, "ess": None, "skipped": False, "n": 3, "masked": None,
        "inner": {"hist": [1, 2], "ratio": None},
    }
    assert set(second) == {"step", "time", "peak_rss_mib"}  # phases start anew after each record


def test_utilisation_is_of_all_gpus_peak_while_updating(tmp_path, clock):
    log = open_telemetry(tmp_path)
    log._peaks, log._world = Peaks(1e12, 1, 1, 1), 2
    with log.timer("update"):
        clock.now += 2
    log.log({"step": 1, "flops": 1e12, "flops/done": 1.5e12})
    log.log({"step": 2, "flops": 1e12, "flops/done": 1.5e12})  # whose update took no time: nothing is said
    first, second = records(tmp_path)
    assert (first["mfu"], first["hfu"]) == (0.25, 0.375) and "mfu" not in second
    assert peaks_of("NVIDIA H100 80GB HBM3").flops == 989e12 and peaks_of("cpu") is peaks_of("GeForce") is None


def test_rewind_leaves_no_gap_and_no_repeat(tmp_path):
    for first, last, checkpoint in ((1, 8, 0), (5, 9, 4), (9, 12, 8)):
        log = open_telemetry(tmp_path)
        log.rewind(checkpoint)
        for step in range(first, last):
            log.log({"step": step, "attempt": first})
        with open(tmp_path / "metrics.jsonl", "a") as file:
            file.write('{"step": 3, "rew')  # killed while writing
    log = open_telemetry(tmp_path)
    log.rewind(10)
    log.log({"step": 11, "attempt": 11})
    assert [(r["step"], r["attempt"]) for r in records(tmp_path)] == [
        *((step, 1) for step in range(1, 5)), *((step, 5) for step in range(5, 9)), (9, 9), (10, 9), (11, 11),
    ]
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_rewind_within_a_run_that_goes_on(tmp_path):
    log = open_telemetry(tmp_path)
    for step in (1, 2, 3):
        log.log({"step": step})
    log.rewind(1)
    log.log({"step": 2})
    assert [r["step"] for r in records(tmp_path)] == [1, 2]


def test_other_ranks_write_nothing(tmp_path, capfd):
    log = open_telemetry(tmp_path / "run", rank=1, wandb="offline")
    log.rewind(0)
    with log.progress("visual", 0, 1) as bar:
        log.log({"step": 1, "reward": 1.0})
        bar.update({"reward": 1.0})
    log.close()
    assert not (tmp_path / "run").exists()
    assert capfd.readouterr() == ("", "")


def test_a_line_says_what_was_replayed():
    record = {"replay/completions": 8, "replay/dead": 0.25, "replay/age_max": 40, "replay/ratio_max": 2.34}
    assert replay_told(record) == "; replayed 8: 25% without an advantage, up to 40 steps old, ratio at most 2.3"
    assert replay_told({"replay/completions": 0, "replay/dead": None}) == replay_told({"loss": 1.0}) == ""


def test_timer_adds_up_by_phase(clock):
    timer = Timer()
    with timer("step"):
        for seconds in (0.5, 0.25):
            with timer("decode"):
                clock.now += seconds
        clock.now += 2
    with pytest.raises(RuntimeError), timer("reward"):
        clock.now += 1
        raise RuntimeError
    assert timer.changed == clock.now and timer.active == ["reward"], "for the last words"
    assert timer.take() == {"step": 2.75, "decode": 0.75, "reward": 1.0} and timer.take() == {}


# ---- wandb -------------------------------------------------------------------------------------


def test_wandb_offline_continues_under_its_id_and_keeps_the_secret(tmp_path, monkeypatch, capfd):
    import openai  # noqa: F401  (the judge's client: wandb notices it and would advertise a tool)

    monkeypatch.setenv("WANDB_API_KEY", KEY)
    for step in (1, 2):
        log = open_telemetry(tmp_path, wandb="offline")
        log.log({"step": step, "reward": 0.5})
        log.close()
    name = (tmp_path / "wandb_id").read_text()
    runs = list((tmp_path / "wandb").glob(f"offline-run-*-{name}"))
    assert runs and all(list(run.glob("*.wandb")) for run in runs)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 3
    assert not [path for path in files if KEY.encode() in path.read_bytes()]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("setting", "key", "reachable", "modes"),
    [("auto", None, True, ["offline"]), ("auto", KEY, True, ["online"]), ("auto", KEY, False, ["online", "offline"]),
     ("offline", KEY, True, ["offline"]), ("disabled", KEY, True, [])],
)  # fmt: skip
def test_wandb_is_online_only_with_a_key(tmp_path, monkeypatch, capfd, setting, key, reachable, modes):
    import wandb

    used, logged = [], []

    def init(*, mode, config, **_):
        used.append(mode)
        assert KEY not in str(config)
        if mode == "online" and not reachable:
            raise wandb.Error(f"cannot log in with {KEY}")
        return SimpleNamespace(define_metric=lambda *_, **__: None, log=logged.append, finish=lambda: None)

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    if key:
        monkeypatch.setenv("WANDB_API_KEY", key)
    log = open_telemetry(tmp_path, wandb=setting)
    log.log({"step": 1, "reward": float("nan"), "kl": 0.25, "hist": [1]})
    log.close()
    assert used == modes
    assert [(r["step"], r["kl"], "hist" in r, "reward" in r) for r in logged] == [(1, 0.25, False, False)] * bool(modes)
    output = "".join(capfd.readouterr())
    assert KEY not in output and ("wandb sync" in output) == (not reachable)


@pytest.mark.parametrize("fails", ["init", "log", "finish"])
def test_nothing_that_wandb_does_ends_a_run(tmp_path, monkeypatch, capsys, fails):
    import wandb

    def step(name: str):
        def act(*_, **__) -> None:
            if name == fails:
                raise SystemExit(1) if name == "finish" else RuntimeError(KEY)

        return act

    def init(**_):
        step("init")()
        return SimpleNamespace(define_metric=step("define"), log=step("log"), finish=step("finish"))

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    log = open_telemetry(tmp_path, wandb="auto")
    log.log({"step": 1})
    log.log({"step": 2})
    log.close()
    assert [r["step"] for r in records(tmp_path)] == [1, 2]
    said = capsys.readouterr().err
    assert said.count("metrics go to metrics.jsonl") == 1 and KEY not in said


OFFLINE = """
import os, sys
from pathlib import Path
from tests.training.test_telemetry import open_telemetry
for name in ("with_key", "without"):
    log = open_telemetry(Path(sys.argv[1]) / name, wandb="auto")
    log.log({"step": 1, "loss": 1.0})
    log.log({"step": 2, "loss": 1.0})
    log.close()
    os.environ.pop("WANDB_API_KEY", None)
"""


@pytest.mark.slow
@pytest.mark.skipif(subprocess.run(["unshare", "-rn", "true"]).returncode != 0, reason="may not leave the network")
def test_on_nodes_without_a_way_out_wandb_stays_on_the_disk(tmp_path):
    environment = {**os.environ, "WANDB_API_KEY": KEY, "WANDB_INIT_TIMEOUT": "2"}
    done = subprocess.run(["unshare", "-rn", sys.executable, "-c", OFFLINE, tmp_path], cwd=ROOT, env=environment,
                          capture_output=True, text=True, timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "wandb is out of reach" in done.stderr and KEY not in done.stdout + done.stderr
    for name in ("with_key", "without"):
        assert [r["step"] for r in records(tmp_path / name)] == [1, 2]
        assert len(list((tmp_path / name / "wandb").glob("offline-run-*/*.wandb"))) == 1, name


def test_without_wandb_the_run_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    log = open_telemetry(tmp_path, wandb="auto")
    log.log({"step": 1})
    assert len(records(tmp_path)) == 1 and "wandb is not installed" in capsys.readouterr().err


def test_unknown_wandb_mode_is_refused(tmp_path):
    with pytest.raises(ValueError, match="log.wandb='onlin'.*auto"):
        open_telemetry(tmp_path, wandb="onlin")


# ---- progress ----------------------------------------------------------------------------------


def run_stage(tmp_path) -> None:
    log = open_telemetry(tmp_path)
    with log.progress("localisation", 2, 6) as bar:
        for reward in (0.1, None, 0.3, 0.4):
            bar.update({"reward": reward, "loss": 7.0})


def test_progress_as_lines_without_a_terminal(tmp_path, monkeypatch, capsys):
    run_stage(tmp_path)
    (line,) = capsys.readouterr().err.splitlines()  # quick steps: only the end is worth a line
    assert line.startswith("localisation 6/6 reward 0.400") and line.endswith("0:00:00 left")
    monkeypatch.setattr(telemetry, "PLAIN_INTERVAL_S", 0.0)
    run_stage(tmp_path)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ["3/6", "4/6", "5/6", "6/6"]
    assert all("s/step" in line and "loss" not in line for line in lines)


def test_progress_as_a_bar_on_a_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    run_stage(tmp_path)
    shown = capsys.readouterr().err
    assert "localisation" in shown and "6/6" in shown and "reward 0.400" in shown and "s/step" not in shown


# ---- signals -----------------------------------------------------------------------------------


@pytest.fixture
def stop():
    before = {number: signal.getsignal(number) for number in StopSignal.SIGNALS}
    yield StopSignal()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", StopSignal.SIGNALS)
def test_a_signal_becomes_a_flag(stop, number, capfd):
    assert not stop()
    os.kill(os.getpid(), number)
    assert stop()
    assert number.name in capfd.readouterr().err
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


@pytest.mark.parametrize("told", [0, 1, None])
def test_ranks_agree(stop, told):
    backend = SimpleNamespace(all_gather_object=lambda mine: [mine or told == 0, told == 1])
    assert stop.agree(backend) == (told is not None) == stop()


def test_a_signal_that_comes_while_ranks_agree_is_not_lost(stop):
    def gather(mine: bool) -> list[bool]:
        os.kill(os.getpid(), signal.SIGUSR1)
        return [mine, False]  # what the others were told was asked before

    assert not stop.agree(SimpleNamespace(all_gather_object=gather))
    assert stop() and stop.agree(SimpleNamespace(all_gather_object=lambda mine: [mine]))


def test_a_forked_worker_still_dies_of_a_signal(stop):
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(tell, b".")
        time.sleep(30)
        os._exit(0)
    os.read(ready, 1)  # Python drops signals that reach a child in the middle of the fork
    os.kill(child, signal.SIGTERM)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGTERM
    assert not stop()
