"""The table of large recipes: only what could be started, and what has to be there for the cold start."""

from data_tools.prepare.sources import STAGES
from megatron_avatar.config import load_config
from megatron_avatar.planning import recipes


def test_layouts_that_could_not_start_are_left_out_and_told(capsys):
    assert recipes.main(["cluster.gpus=8"]) == 0
    said = capsys.readouterr()
    assert "`avatar_7b_cluster` | 8 | tp 4, dp 2" in said.out and "`omni3` |" not in said.out
    assert "left out: omni3: parallel.tp=8 and parallel.pp=2 need a multiple of 16 processes" in said.err
    assert recipes.main(["cluster.gpus=3"]) == 2 and "left out: avatar_7b" in capsys.readouterr().err
    assert recipes.main(["--help"]) == 0 and "planning.recipes" in capsys.readouterr().out


def test_cold_starts_train_on_every_stage_that_avatars_data_has():
    for recipe in ("sft_7b", "sft_3b"):
        config = load_config([f"recipe={recipe}", "model.path=m", "data.manifest=d"])
        assert {*STAGES} <= {*config.stages["sft"].data}, "its stage 0, or traces that were made of the others"
