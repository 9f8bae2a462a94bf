"""Every recipe that ships has a plan that fits, on every layout that ships."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_avatar.config.load import CONFIG_DIR, load_config
from megatron_avatar.planning.plan import make_plan
from tests.planning.models import plan

SHIPPED = sorted(path.stem for path in (CONFIG_DIR / "recipe").glob("*.yaml") if not path.stem.startswith("tiny"))
ALIKE = ("grpo_3b", "grpo_vl_7b", "grpo_vl3_4b", "grpo_vl3_8b", "grpo_omni3_lora", "sft_3b")  # as others vary others
NODES = ("omni3",)  # of which a replica is larger than a node


@pytest.mark.parametrize(("layout", "gib"), [("a100_40g", 39.5), ("a100_80g", 79)])  # a little less than on the label
@pytest.mark.parametrize("recipe", [pytest.param(name, marks=pytest.mark.slow) if name.startswith("omni3") else name
                                    for name in SHIPPED if name not in ALIKE + NODES])  # fmt: skip
def test_every_recipe_fits_every_layout(recipe, layout, gib):
    # Encoders that train keep 19 GiB for a prompt of 10,000 visual tokens, beside 27 GiB of weights and optimizer.
    full = "parallel.recompute=full"
    given = {"avatar_7b_lora": ["model.context=4096", full], "vl3_8b_lora": [full]}
    context = given.get(recipe, []) if layout == "a100_40g" else []
    config = load_config([f"recipe={recipe}", f"parallel={layout}", "dry_run=true", "cluster.gpus=1",
                          f"cluster.gpu_memory_gib={gib}", *context])  # fmt: skip
    replica = config.parallel.tp * config.parallel.pp
    assert replica <= 8, "a node"
    found = make_plan(replace(config, cluster=replace(config.cluster, gpus=replica)))
    assert found.problems == []


@pytest.mark.slow
def test_all_of_qwen3_omni_fits_two_nodes():
    found = plan("cluster.gpus=16", "cluster.gpu_memory_gib=79", recipe="omni3")
    assert found.problems == [] and found.dp == 1


def test_h100s_have_the_layouts_of_a100s():
    a100, h100 = ((CONFIG_DIR / "parallel" / f"{name}_80g.yaml").read_text() for name in ("a100", "h100"))
    assert h100 == a100.replace("A100", "H100")


@pytest.mark.parametrize("recipe", ["tiny_sft", "tiny_grpo", "tiny_avatar"])
def test_tiny_recipes_have_a_plan(recipe):
    assert plan(recipe=recipe).problems == []
