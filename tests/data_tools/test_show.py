"""`show replay` tells what a buffer on disk holds, damaged or not, and changes nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from data_tools import show
from megatron_avatar.records import Completion, Trajectory
from megatron_avatar.rl.replay.store import write_shards
from megatron_avatar.rl.tracker import RewardTracker


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of two shards, in which prompt p0 is easy and p4 hard; two trajectories are dead."""
    tracker, rows = RewardTracker(), {}
    for serial in range(10):
        reward = 1 - serial % 5 / 4
        tracker.update(f"p{serial % 5}", "plain", [reward], solved=reward == 1)
        completion = Completion(np.arange(7), np.zeros(7, np.float32), True)
        rows[serial] = Trajectory(f"p{serial % 5}", "plain", completion, reward, {"accuracy": 1.0}, 0.0, "s", "s",
                                  serial, serial)
    first = write_shards(tmp_path / "replay", {k: rows[k] for k in range(4)}, known={})
    index = write_shards(tmp_path / "replay", {k: rows[k] for k in range(2, 10)}, known=first)
    folder = tmp_path / "checkpoints" / "step_00000012"
    folder.mkdir(parents=True)
    state = {"step": 12, "stage": "visual", "replay": index, "tracker": tracker.state_dict()}
    (folder / "state.json").write_text(json.dumps(state))
    return tmp_path


def shown(monkeypatch, capsys, *arguments: object) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["show", "replay", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "120")
    status = show.main()
    captured = capsys.readouterr()
    return status, captured.out + captured.err


def lines_of(text: str) -> dict[str, list[str]]:
    cells = [[c.strip() for c in line.strip("│").split("│")] for line in text.splitlines() if line.startswith("│")]
    return {row[0]: row[1:] for row in cells}


def test_tiers_ages_rewards_and_sizes(run, monkeypatch, capsys):
    status, text = shown(monkeypatch, capsys, run)
    assert status == 0 and "8 trajectories of 5 prompts, 56 tokens" in text.replace("\n", " ")
    table = lines_of(text)
    assert table["easy"][:2] + table["easy"][3:4] == ["1", "1", "1.000"]  # of p0 only serial 5 is alive
    assert table["hard"][:2] == ["4", "2"] and table["hard"][3] == "0.125"
    assert table["all"][5] == "3 to 10"
    assert [row[:2] for name, row in table.items() if name.startswith("shard-")] == [["2", "4"], ["6", "6"]]


def test_damage_is_shown_and_left_as_it_is(run, monkeypatch, capsys):
    victim = min((run / "replay").iterdir(), key=lambda path: path.stat().st_size)
    victim.write_bytes(b"torn")
    before = {path.name: path.read_bytes() for path in (run / "replay").iterdir()}
    status, text = shown(monkeypatch, capsys, run)
    assert status == 0 and "DAMAGED: its checksum is wrong" in text and "6 trajectories" in text
    assert {path.name: path.read_bytes() for path in (run / "replay").iterdir()} == before
    status, text = shown(monkeypatch, capsys, run / "replay")  # without a checkpoint: by the name alone
    assert status == 0 and "DAMAGED" in text and "no checkpoint" in text


def test_a_wrong_folder_is_answered(tmp_path, monkeypatch, capsys):
    status, text = shown(monkeypatch, capsys, tmp_path)
    assert status == 2 and f"{tmp_path} holds neither checkpoints nor replay shards" in text
