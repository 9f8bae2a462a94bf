"""The simulation of trainings: its policy against closed forms, its worlds against what they are made for, its file."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from bench import dynamics, tabular
from bench.dynamics_journal import CODE, ROOT, Journal
from bench.dynamics_tables import tables
from bench.tabular import Kind, Tabular, World
from bench.timing import RESULTS
from megatron_avatar.planning import dynamics as planned
from megatron_avatar.planning.dynamics import Tally, go_through
from megatron_avatar.records import Group, Prompt
from megatron_avatar.rl.step import Visit

HARD = Kind(1.0, 3, success=0.0005, hinted=0.3)


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Few steps and seeds, two worlds, two systems, two recipes; nothing is written beside `tmp_path`."""
    threads = torch.get_num_threads()
    (tmp_path / "recipe").mkdir()
    for recipe in ("avatar_7b", "grpo_7b"):
        (tmp_path / "recipe" / f"{recipe}.yaml").touch()
    for module, name, value in (
        (dynamics, "STEPS", 8), (dynamics, "CONFIG_DIR", tmp_path), (dynamics, "RESULTS", tmp_path),
        (dynamics, "JOURNAL", tmp_path / "journal.jsonl"), (dynamics, "_OUTLOOKS", {}),
        (dynamics, "WORLDS", {name: dynamics.WORLDS[name] for name in ("gap", "gap, low learning rate")}),
        (dynamics, "SYSTEMS", {name: dynamics.SYSTEMS[name] for name in ("GRPO", "AVATAR", "AVATAR w/o TAS")}),
        (dynamics, "carried", lambda stages: {"carried": 1.0}),
        (planned, "MOST_VISITS", 40), (planned, "ENOUGH_VISITS", 40),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)
    yield tmp_path
    torch.set_num_threads(threads)


def policy(world: World, *overrides: str, pool: int = 40, seed: int = 0) -> Tabular:
    return Tabular(world, dynamics.settings(overrides).rl, [f"p{k}" for k in range(pool)], 50, seed)


def test_successes_are_the_worlds(monkeypatch):
    monkeypatch.setattr(tabular, "SPREAD", 0.0)
    world = World((Kind(0.5, 1, 0.5, 0.7), Kind(0.5, 3, 0.05, 0.3)), lr=1.0, lure=1.5)
    made = policy(world, pool=4)
    assert made.success() == pytest.approx(0.275)
    for sample, kind in (("p0", world.kinds[0]), ("p3", world.kinds[1])):
        for variant, success in (("plain", kind.success), ("hinted", kind.hinted)):
            rows, answers = made.complete(Visit(sample, variant, f"{sample}/{variant}", False), 4000, 0)
            right = [row.parts["correct"] for row in rows]
            assert np.mean(right) == pytest.approx(success, abs=0.035)
            zeros = "-".join(["0"] * kind.decisions)
            assert [answer == zeros for answer in answers] == [bool(r) for r in right]


def test_an_update_is_the_policy_gradient_in_closed_form():
    """Fresh completions, no KL: each decision moves by lr A (1[chosen] - p) / (decisions * completions)."""
    made = policy(World((HARD,), lr=0.5), "ablation=grpo", "rl.beta=0")
    before = made.tables.detach().numpy().copy()
    rows, _ = made.complete(Visit("p0", "plain", "k", False), 6, 0)
    advantages = np.array([1.0, -0.5, 2.0, 0.0, -1.5, 0.25], np.float32)
    prompt = Prompt("p0", "plain", np.zeros(1, np.int64), np.zeros((3, 1), np.int64))
    made.learn([Group(prompt, rows, advantages, np.ones(6, bool))], [])
    logits = before[0, 0].copy()
    logits[:, 0] += made._prompts["p0"][1]
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    wanted = before.copy()
    for row, advantage in zip(rows, advantages, strict=True):
        for decision, chosen in enumerate(row.completion.token_ids):
            wanted[0, 0, decision] += 0.5 * advantage * (np.eye(tabular.OPTIONS)[chosen] - p[decision]) / (3 * 6)
    moved = made.tables.detach().numpy()
    np.testing.assert_allclose(moved, wanted, atol=1e-6)
    assert np.abs(moved - before).max() > 0.01


def trained(world: World, *overrides: str) -> tuple[float, float]:
    """Held-out success after a short training on hard prompts, and the share of hinted visits."""
    config = dynamics.settings(overrides)
    config.stages = {"world": dynamics.StageConfig(steps=50, prompts_per_step=8, rewards=dict(world.rewards))}
    ids, tally = [f"p{k}" for k in range(24)], Tally()
    made = Tabular(world, config.rl, ids, 50, 0)
    go_through(config, "world", ids, set(ids), made, tally, steps=50)
    return made.success(), tally.outlook(1).hinted


def test_hints_help_where_what_they_teach_carries_over_and_nowhere_else():
    found = {
        (transfer, hints): trained(World((HARD,), lr=2.0, transfer=transfer), f"rl.hints.enabled={hints}")
        for transfer in (True, False) for hints in ("true", "false")
    }  # fmt: skip
    assert found[True, "true"][1] > 0.2 and found[False, "true"][1] > 0.2 and found[True, "false"][1] == 0
    assert found[True, "true"][0] > found[True, "false"][0] + 0.3
    assert found[False, "true"][0] <= found[False, "false"][0] + 0.02
    assert found[False, "false"] == found[True, "false"], "without hints there is nothing to carry over"


def test_the_file_has_its_keys_and_a_stopped_command_goes_on(small, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["dynamics", "--seeds", "2", "--json"])
    real, made = dynamics.train, []

    def train(world, overrides, share, seed):
        if len(made) == 3:
            made.append("stopped")
            raise KeyboardInterrupt
        made.append(seed)
        return real(world, overrides, share, seed)

    monkeypatch.setattr(dynamics, "train", train)
    with pytest.raises(KeyboardInterrupt):
        dynamics.main()
    kept = (small / "journal.jsonl").read_text().splitlines()
    assert len(kept) == 3
    (small / "journal.jsonl").write_text("\n".join([*kept, '{"key": "cut o']))
    dynamics.main()
    total = 2 * (3 + 2 + 2 * len(dynamics.AGREEMENT))
    assert made.count("stopped") == 1 and len(made) == total + 1, "what was kept isn't made again"
    assert not (small / "journal.jsonl").exists() and not (small / "dynamics.json").exists(), "two seeds aren't kept"

    said = capsys.readouterr()
    found = json.loads(said.out)
    assert found.keys() == {"recipes", "before", "worlds", "agreement", "carried", "machine", "date"}
    figures = {"hinted", "vanished", "dead", "visits_per_prompt", "mean_off_advantage"}
    assert {name: row.keys() for name, row in found["recipes"].items()} == {"avatar_7b": figures, "grpo_7b": figures}
    assert found["before"].keys() == found["recipes"].keys()
    assert found["recipes"]["grpo_7b"]["dead"] is None and found["recipes"]["avatar_7b"]["dead"] == 0
    assert {name: list(world) for name, world in found["worlds"].items()} == {
        "gap": ["GRPO", "AVATAR", "AVATAR w/o TAS"], "gap, low learning rate": ["GRPO", "AVATAR"],
    }  # fmt: skip
    gap = found["worlds"]["gap"]
    assert gap["GRPO"]["completions"] == 2 * gap["AVATAR"]["completions"] == 8 * 8 * 8
    low, high = gap["AVATAR"]["interval"]
    assert gap["AVATAR"].keys() == {"final", "interval", "completions", "by_seed"}
    assert low <= gap["AVATAR"]["final"] <= high and len(gap["AVATAR"]["by_seed"]) == 2
    assert {"drift", "early", "final", "interval"} <= found["agreement"]["majority (published)"].keys()
    assert "trainings" in said.err and "AVATAR w/o TAS" in said.err


def test_results_of_other_code_are_not_gone_on_with(tmp_path):
    path = tmp_path / "j.jsonl"
    path.write_text(json.dumps({"key": "a", "code": "another", "result": [0.1, 1]}) + "\n")
    with Journal(path, 1) as journal:
        assert journal.result("a", lambda: (0.9, 2)) == (0.9, 2)
        assert journal.result("a", lambda: (0.0, 0)) == (0.9, 2)
    assert not path.exists()


def test_results_behind_a_cut_line_are_kept(tmp_path):
    path = tmp_path / "j.jsonl"

    def stopped():
        raise KeyboardInterrupt

    for key in "ab":  # stopped twice, the first time in the middle of a line
        with pytest.raises(KeyboardInterrupt), Journal(path, 3) as journal:
            journal.result(key, lambda: (0.5, 1))
            journal.result("c", stopped)
        if key == "a":
            path.write_text(path.read_text() + '{"key": "cut o')
    assert {"a", "b"} <= set(Journal(path, 3)._known)


def test_the_code_of_a_result_is_all_that_it_comes_from():
    code = {path for pattern in CODE for path in ROOT.glob(pattern)}
    for name in ("bench/dynamics.py", "megatron_avatar/config/schema.py", "megatron_avatar/config/load.py",
                 "megatron_avatar/config/recipe/avatar_7b.yaml", "megatron_avatar/rl/step.py"):  # fmt: skip
        assert ROOT / name in code
    assert all(list(ROOT.glob(pattern)) for pattern in CODE)


def test_a_rule_under_which_a_wrong_majority_cancels_a_right_answer_pulls_less():
    paper = dynamics.drift(dict(dynamics.SELF), "majority", groups=1500)
    ours = dynamics.drift(dict(dynamics.SELF), "right", groups=1500)
    assert ours > 3 * max(paper, 0.0), (ours, paper)


def test_the_kept_results_are_of_all_worlds_systems_and_recipes():
    kept = json.loads((RESULTS / "dynamics.json").read_text())
    assert {name: list(found) for name, found in kept["worlds"].items()} == {
        name: dynamics.systems_of(name) for name in dynamics.WORLDS
    }
    page = (ROOT / "docs" / "dynamics.md").read_text()
    for name, table in tables(kept).items():
        assert table in page, f"docs/dynamics.md: {name}: python -m bench.dynamics_tables"
    assert list(kept["agreement"]) == list(dynamics.AGREEMENT) and kept["carried"] == 1
    assert set(kept["recipes"]) >= {"avatar_7b", "vl_7b", "avatar_7b_cluster", "grpo_7b", "tiny_avatar"}
    assert all(0.1 <= kept["recipes"][name]["hinted"] <= 0.3 for name in ("avatar_7b", "vl_7b", "avatar_7b_cluster"))
