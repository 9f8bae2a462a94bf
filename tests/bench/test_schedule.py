"""The forecast of the study's schedule: its probabilities are those of the traces, and they are what is drawn."""

import re

import numpy as np
import pytest

from bench.schedule import BATCH, GIVEN_LOOK, LadderPolicy, main, right
from data_tools.ladder import FULL, HINTED_FULL, LADDER, ask, write_trace
from data_tools.synthesize import SIZES
from megatron_avatar.config import load_config
from megatron_avatar.rl.step import Visit
from slurm.profile import read_profile


@pytest.mark.parametrize("name", LADDER)
def test_a_prompt_is_right_as_often_as_its_traces_are(name):
    rng, full = np.random.default_rng(3), 0.3
    hits = []
    for _ in range(4000):
        question = ask(name, rng)
        said = re.search("<answer>(.*)</answer>", write_trace(question, rng, full))
        hits.append(said[1] == question.answer)
    expected = right(name, full) + full * (1 - GIVEN_LOOK)  # a trace never errs in what it looks at
    assert abs(np.mean(hits) - expected) < 4 * (expected * (1 - expected) / len(hits)) ** 0.5 + 0.005


def test_what_is_drawn_follows_the_family_and_the_hint():
    pool = [f"p{k}" for k in range(180)]
    policy, names = LadderPolicy(pool, 0), list(LADDER)
    for family in ("hear_one", "see_three"):
        mine = [p for k, p in enumerate(pool) if names[k % len(names)] == family]
        for variant, full in (("plain", FULL[LADDER[family].rung]), ("hinted", HINTED_FULL)):
            drawn = [row.parts["accuracy"] for p in mine
                     for row in policy.complete(Visit(p, variant, f"{p}/{variant}", False), 100, 0)[0]]  # fmt: skip
            assert np.mean(drawn) == pytest.approx(right(family, full), abs=0.05), (family, variant)


def test_the_forecast_is_of_the_profiles_training(tmp_path, capsys):
    profile, *_ = read_profile("tiny", tmp_path, [])
    config = load_config([*profile["families"]["tiny"]["train"], "model.path=m", "data.manifest=d"])
    (stage,) = config.stages.values()
    assert stage.prompts_per_step == BATCH and stage.rewards == {"format": 0.5, "accuracy": 0.5}
    prompts = SIZES["study"]["train"] * len(LADDER)
    with pytest.raises(SystemExit):
        main(["--help"])
    assert f"[--prompts {prompts}] [--steps {stage.steps}]" in capsys.readouterr().out
