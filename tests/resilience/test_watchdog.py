"""Hung runs end with their last words, live ones don't; a stop signal of one rank is all ranks'."""

from __future__ import annotations

import re

import pytest

from megatron_avatar.data.manifest import load_manifest
from megatron_avatar.resilience.ended import told
from tests.training.small import arguments, train


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_hung_rank_ends_all_with_stacks_and_last_words(world, tmp_path, ranks):
    out = tmp_path / "run"
    settings = arguments(world, out, "data.decode_deadline_s=5", "log.watchdog_s=12", steps=1)
    done = train(*settings, disturbed="hang", ranks=ranks, timeout=120, AVATAR_ENDED=str(tmp_path / "stopped"))
    texts = done.said
    assert done.codes == [76] * ranks, texts
    assert told(str(tmp_path / "stopped"), 1) == 76, "whatever status a launcher makes of it"
    stacks = sorted((out / "stacks").iterdir())
    assert [path.name.rpartition("-")[2] for path in stacks] == [f"rank_{rank:05d}.txt" for rank in range(ranks)]
    assert "in hang" in stacks[0].read_text() and "hang" in stacks[0].read_text()
    said = re.search(r"HUNG: rank 0 on \S+: step, step 1, stage visual, samples ([^ ,;]+)", texts[0])
    assert said and said[1] in {sample.id for sample in load_manifest(world / "data" / "manifest.jsonl")}, texts[0]
    if ranks == 2:
        assert "HUNG: rank 1" in texts[1] and "all_gather_object" in stacks[1].read_text()


@pytest.mark.slow
def test_a_stop_signal_of_one_rank_ends_the_others_generation(world, tmp_path):
    """Rank 0 would generate for minutes: twelve tokens, half a second each, in nine steps."""
    settings = arguments(world, tmp_path / "run", "rl.sampling.max_new_tokens=300", "model.context=1024", steps=3)
    done = train(*settings, disturbed="terminate_rank_1", ranks=2, timeout=120,
                 AVATAR_ENDED=str(tmp_path / "stopped"))  # fmt: skip
    assert done.codes == [0, 0] and told(str(tmp_path / "stopped"), 0) == 75, done.said
    assert not (tmp_path / "run" / "metrics.jsonl").exists(), "the step was dropped"
