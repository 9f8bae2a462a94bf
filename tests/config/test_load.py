"""From overrides to a typed, validated configuration; every mistake is named with its remedy."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from megatron_avatar.config import Config, StageConfig, check_world, differences, load_config, save_config
from megatron_avatar.config.load import CONFIG_DIR, apply, readable

INPUTS = ["model.path=models/omni", "data.manifest=data/manifest.jsonl"]


def load(*overrides: str, recipe: str = "avatar_7b") -> Config:
    return load_config([f"recipe={recipe}", *INPUTS, *overrides])


def names(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml"))


@pytest.mark.parametrize("recipe", names("recipe"))
def test_every_recipe_gives_a_typed_tree(recipe):
    config = load(recipe=recipe)
    assert type(config) is Config and all(type(stage) is StageConfig for stage in config.stages.values())
    assert (config.name, config.output_dir) == (recipe, f"runs/{recipe}")


def test_the_published_settings():
    rl, optim, stages = load().rl, load().optim, load().stages
    assert (rl.n_on, rl.n_off, rl.alpha, rl.beta, rl.clip_low, rl.vcrs_window) == (4, 4, 1.0, 0.1, 0.2, 20)
    assert (rl.shaping.shape, rl.shaping.lam, rl.replay.capacity) == ("parabolic", 0.3, 10000)
    assert rl.replay.capacity_share == rl.replay.draw_share == [0.25, 0.35, 0.4]
    assert (rl.sampling.temperature, rl.sampling.max_new_tokens) == (1.0, 2048)
    assert (optim.lr, optim.warmup_fraction, load().model.context) == (1e-6, 0.05, 16384)
    assert load(recipe="avatar_7b_lora").optim.lr == 5e-7, "the released rate is the adapters'"
    asks = {name: bool(load(recipe=name).data.instruction) for name in ("sft_7b", "avatar_7b", "vl_7b", "tiny_sft")}
    assert asks == {"sft_7b": True, "avatar_7b": True, "vl_7b": True, "tiny_sft": False}
    assert load(recipe="tiny_grpo").data.instruction == load(recipe="tiny_avatar").data.instruction == ""
    assert stages["visual"].rewards == {"format": 0.5, "accuracy": 0.5}
    assert stages["audio_visual"].rewards == {"format": 0.2, "accuracy": 0.4, "self": 0.4}
    assert stages["localisation"].rewards == {"format": 0.2, "accuracy": 0.3, "self": 0.2, "judge": 0.3}
    assert list(stages) == ["visual", "audio_visual", "localisation"]
    for recipe, iterations, completions in (("avatar_7b", 1000, 4000), ("grpo_7b", 1000, 8000), ("vl_7b", 1000, 4000)):
        config = load(recipe=recipe)
        assert sum(s.steps for s in config.stages.values()) == iterations
        assert sum(s.steps * s.prompts_per_step for s in config.stages.values()) * config.rl.n_on == completions


PUBLISHED = {
    "rl.dual_clip": None, "rl.std_floor": 0.0, "rl.self_reward": "majority", "rl.replay.live": False,
    "rl.replay.order": "priority", "rl.replay.sigma": "batch", "rl.replay.max_age": 0,
}  # fmt: skip


def test_every_recipe_bounds_what_it_replays_and_can_go_back_to_what_is_published():
    for recipe in names("recipe"):
        config = load(recipe=recipe)
        if all(stage.kind == "sft" for stage in config.stages.values()):
            continue
        assert config.rl.dual_clip == 3 and config.rl.replay.max_age > 0 and config.rl.replay.live, recipe
        published = dict(_leaves(asdict(load("ablation=published", recipe=recipe))))
        assert {key: published[key] for key in PUBLISHED} == PUBLISHED, recipe


def test_a_cluster_has_a_prompt_for_every_replica():
    for recipe in ("avatar_7b_cluster", "grpo_7b_cluster"):
        config = load(recipe=recipe)
        assert {stage.prompts_per_step for stage in config.stages.values()} == {32}
        assert check_world(config, 2 * 8) == 4 and check_world(config, 16 * 8) == 32
    assert load(recipe="grpo_7b_cluster").rl.n_off == 0


def changed(override: str) -> dict[str, object]:
    """The keys that differ from the avatar_7b recipe, without name and folder."""
    base = dict(_leaves(asdict(load())))
    return {
        key: value
        for key, value in _leaves(asdict(load(override)))
        if key not in ("name", "output_dir") and base.get(key) != value
    }


def _leaves(tree: dict, prefix: str = ""):
    for key, value in tree.items():
        yield from _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]


GRPO = {
    "rl.n_on": 8,
    "rl.n_off": 0,
    "rl.revisit_share": 0.0,
    "rl.vcrs": False,
    "rl.shaping.shape": "uniform",
    "rl.hints.enabled": False,
}
ABLATIONS = {
    "grpo": GRPO,
    "grpo_revisits": {k: v for k, v in GRPO.items() if k != "rl.revisit_share"},
    "tas_only": {k: v for k, v in GRPO.items() if k != "rl.shaping.shape"},
    "uniform_credit": {"rl.shaping.shape": "uniform", "rl.hints.enabled": False},
    "wo_off_policy": {"rl.n_on": 8, "rl.n_off": 0},
    "wo_tas": {"rl.shaping.shape": "uniform"},
    "wo_hints": {"rl.hints.enabled": False},
    "wo_vcrs": {"rl.vcrs": False},
    "published": PUBLISHED,
    "grpo_beta_matched": {**GRPO, "rl.beta": 0.05},
    "grpo_two_updates": {**GRPO, "rl.updates_per_rollout": 2},
    "tas_between_tags": {"rl.shaping.span": "between_tags"},
}


@pytest.mark.parametrize("ablation", names("ablation"))
def test_an_ablation_changes_what_its_row_says_and_nothing_else(ablation):
    assert changed(f"ablation={ablation}") == ABLATIONS[ablation]
    assert load(f"ablation={ablation}").output_dir == f"runs/avatar_7b-{ablation}"


def test_no_ablation_can_be_said():
    assert load("ablation=null") == load()


def test_grpo_recipes_are_avatar_with_the_ablation():
    grpo, avatar = load(recipe="grpo_7b"), load("ablation=grpo")
    assert grpo.rl == avatar.rl and grpo.optim == avatar.optim and grpo.data == avatar.data
    assert load(recipe="grpo_3b").rl == grpo.rl and load(recipe="grpo_3b").parallel.tp == 2


def test_qwen3_vls_recipes_have_avatars_parts_without_sound():
    avatar, ours = load(), load(recipe="vl3_8b")
    assert ours.rl == avatar.rl and ours.optim == avatar.optim and ours.data.mute and not ours.model.cold_start
    assert [stage.steps for stage in ours.stages.values()] == [1000] and not load(recipe="vl3_4b").data.blind
    assert replace(ours.model, shape="qwen3_vl_4b") == load(recipe="vl3_4b").model
    for size in ("4b", "8b"):
        grpo, ablated = load(recipe=f"grpo_vl3_{size}"), load("ablation=grpo", recipe=f"vl3_{size}")
        assert grpo.rl == ablated.rl and grpo.data == ablated.data and grpo.model == ablated.model
    assert ours.data.frame_max_pixels // 32**2 == avatar.data.frame_max_pixels // 28**2 == 64, "tokens a pair of frames"


def test_qwen3_omnis_recipes_are_avatars_on_attention_or_in_full():
    avatar, ours, whole = load(), load(recipe="omni3_lora"), load(recipe="omni3")
    assert ours.rl == avatar.rl and ours.stages == avatar.stages and not ours.model.cold_start and not ours.data.mute
    assert ours.model.lora.rank and set(ours.model.lora.targets) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert not whole.model.lora.rank and whole.rl == ours.rl and whole.data == ours.data
    assert whole.parallel.tp * whole.parallel.pp == 16 and whole.parallel.sequence_parallel
    grpo, ablated = load(recipe="grpo_omni3_lora"), load("ablation=grpo", recipe="omni3_lora")
    assert grpo.rl == ablated.rl and grpo.data == ablated.data and grpo.model == ablated.model
    assert ours.data.frame_max_pixels // 32**2 == avatar.data.frame_max_pixels // 28**2 == 64, "tokens a pair of frames"


@pytest.mark.parametrize(
    ("recipe", "layout", "sizes"),
    [
        ("avatar_7b", None, (4, 1)),
        ("avatar_3b", None, (2, 1)),
        ("grpo_vl_7b", None, (4, 1)),
        ("grpo_7b", "a100_40g", (4, 2)),
        ("grpo_3b", "a100_40g", (4, 1)),
        ("sft_3b", "h100_80g", (2, 1)),
        ("vl3_8b", None, (4, 1)),
        ("grpo_vl3_4b", "h100_80g", (2, 1)),
        ("vl3_8b_lora", "a100_40g", (4, 2)),
        ("vl3_4b", "a100_40g", (4, 1)),
        ("omni3_lora", None, (4, 1)),
        ("omni3", None, (8, 2)),
        ("avatar_7b", "single", (1, 1)),
    ],
)
def test_a_layout_depends_on_gpu_and_model(recipe, layout, sizes):
    config = load(*([f"parallel={layout}"] if layout else []), recipe=recipe)
    assert (config.parallel.tp, config.parallel.pp) == sizes
    assert load("parallel=a100_40g", "parallel.pp=7", recipe=recipe).parallel.pp == 7


def test_overrides_reach_every_depth():
    config = load(
        "rl.shaping.lam=0.1", "stages.visual.steps=7", "+stages.visual.rewards.judge=0.3", "~stages.localisation",
        "rl.dual_clip=3", "stages.visual.lr=1e-6", "name=mine",
    )  # fmt: skip
    assert (config.rl.shaping.lam, config.rl.dual_clip) == (0.1, 3.0)
    assert (config.name, config.output_dir) == ("mine", "runs/mine")
    assert list(config.stages) == ["visual", "audio_visual"]
    stage = config.stages["visual"]
    assert (stage.steps, stage.lr, stage.rewards) == (7, 1e-6, {"format": 0.5, "accuracy": 0.5, "judge": 0.3})


ADDED = "+stages.ladder={kind: rl, data: [a], steps: 100, prompts_per_step: 8, rewards: {accuracy: 1}}"


def with_ladder(*overrides: str) -> Config:
    return load_config(["recipe=tiny_avatar", "~stages.visual", ADDED, *overrides, "model.path=m", "data.manifest=d"])


def test_a_stage_can_be_added_as_the_error_says():
    config = with_ladder()
    assert list(config.stages) == ["audio_visual", "localisation", "ladder"]
    stage = config.stages["ladder"]
    assert (stage.kind, stage.data, stage.steps, stage.rewards) == ("rl", ["a"], 100, {"accuracy": 1.0})
    changed = with_ladder("stages.ladder.steps=7", "stages.ladder.data=[b, c]", "+stages.ladder.rewards.self=0.5")
    assert changed.stages["ladder"].steps == 7 and changed.stages["ladder"].data == ["b", "c"]
    assert changed.stages["ladder"].rewards == {"accuracy": 1.0, "self": 0.5}


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("rl.n_onn=3", "unknown key 'rl.n_onn'. The nearest valid name is 'rl.n_on'"),
        ("stages.ladder.stepz=7", "unknown key 'stages.ladder.stepz'. The nearest valid name is 'stages.ladder.steps'"),
        ("stages.ladder.steps=x", "stages.ladder.steps: expected int, got 'x'"),
        ("+stages.more={stepz: 3}", "unknown key 'stages.more.stepz'. The nearest valid name is 'stages.more.steps'"),
        ("+stages.ladder={steps: 3}", "has a stage ladder already; write stages.ladder.KEY=VALUE"),
        ("+stages.localisation={steps: 3}", "has a stage localisation already"),
        ("~stages.ladder", "+stages.ladder of this command line adds it; leave it out there"),
    ],
)
def test_what_is_wrong_beside_an_added_stage_is_told(override, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        with_ladder(override)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("rl.n_onn=3", "unknown key 'rl.n_onn'. The nearest valid name is 'rl.n_on'"),
        ("learning_rate=1", "unknown key 'learning_rate'. What others call learning_rate is 'optim.lr' here"),
        ("batch_size=8", "What others call batch_size is 'stages.visual.prompts_per_step' here"),
        ("rl.group_size=8", "What others call group_size is 'rl.n_on' here"),
        ("xyzzy=1", "Nothing is like it; all settings: python -m megatron_avatar.config.reference"),
        ("optim.frobnicate=1", "Nothing in optim is like it; it has beta1, beta2, clip_grad"),
        ("stages.visual.foo=1", "Nothing in stages.visual is like it; it has data, kind, lr"),
        ("stages.visul.steps=3", "stages.visul: the recipe has no such stage. The nearest is 'stages.visual'"),
        ("+stages.visul.steps=3", "stages.visul: the recipe has no such stage. The nearest is 'stages.visual'"),
        ("stages.wholly_other.steps=3", "no such stage; it has visual, audio_visual, localisation. To add one write"),
        ("n_on=3", "unknown key 'n_on'. The nearest valid name is 'rl.n_on'"),
        ("modle.path=x", "unknown key 'modle'. The nearest valid name is 'model'"),
        ("+rl.shaping.lamda=1", "unknown key 'rl.shaping.lamda'. The nearest valid name is 'rl.shaping.lam'"),
        ("~stages.localization", "~stages.localization: the recipe has no such entry to leave out; check its spelling"),
        ("stages.visual.stepz=3", "unknown key 'stages.visual.stepz'. The nearest valid name is 'stages.visual.steps'"),
        ("rl.n_on=four", "rl.n_on: expected int, got 'four'"),
        ("rl.n_on=null", "rl.n_on: expected int, got 'null'"),
        ("rl.n_on=true", "rl.n_on: expected int, got 'true'"),
        ("stages.visual.steps=1.5", "stages.visual.steps: expected int, got '1.5'"),
        ("rl.dual_clip=high", "rl.dual_clip: expected float | None, got 'high'"),
        ("rl.replay.draw_share=[a,b,c]", "rl.replay.draw_share[0]: expected list[float]"),
        ("stages.visual.rewards.format=good", "stages.visual.rewards.format: expected float, got 'good'"),
        ("rl.shaping=parabolic", "rl.shaping: expected a group of settings (shape, lam, span), got 'parabolic'"),
        ("stages.first.steps=3", "stages.first: the recipe has no such stage; it has visual"),
        ("ablation=wo_tass", "there is no such ablation. Choose one of: grpo, grpo_beta_matched, grpo_revisits,"),
        ("parallel=h300_80g", "parallel=h300_80g: there is no such parallel. Choose one of: a100_40g, a100_80g,"),
        ("model.shape=omni_7b", "model.shape='omni_7b' is none of parallel=NAME's (qwen2_5_omni_7b, "),
        ("~stages.visual.rewards", "stages.visual.rewards can't be removed"),
        ("~stages", "stages is empty"),
        ("rl.n_on", "'rl.n_on' is not a key=value"),
        ("rl.n_on=a=b", "'rl.n_on=a=b': = can't stand in this value without quotes"),
        ("rl.n_on=八", "rl.n_on: expected int, got"),
        ("rl.n_on=3,4", "rl.n_on=3,4: one value is wanted; a list is written key=[a,b]"),
        ("rl.shaping.lam=inf", "rl.shaping.lam=inf: write a finite number"),
        ("optim.lr=nan", "optim.lr=nan: write a finite number"),
        ("stages.visual.steps=100000000000000000000000", "000: write a number below 9223372036854775808"),
        ("stages.visual.rewards.format=-inf", "stages.visual.rewards.format=-inf: write a finite number"),
        ("rl.replay.draw_share=[inf,0.1,0.1]", "rl.replay.draw_share[0]=inf: write a finite number"),
    ],
)
def test_a_mistake_is_named_with_its_remedy(override, says):
    with pytest.raises(ValueError) as error:
        load(override)
    assert says in str(error.value)


@pytest.mark.parametrize("overrides", [["recipe=avatar_8b"], []])
def test_an_unknown_or_missing_recipe_lists_the_recipes(overrides):
    with pytest.raises(ValueError, match="avatar_3b, avatar_7b, .*grpo_3b, grpo_7b, .*sft_7b, tiny_avatar"):
        load_config(overrides)


def test_a_mistake_in_a_recipe_names_its_file(tmp_path, monkeypatch):
    (tmp_path / "recipe").mkdir()
    for group in ("parallel", "cluster"):
        shutil.copytree(CONFIG_DIR / group, tmp_path / group)
    (tmp_path / "config.yaml").write_text((CONFIG_DIR / "config.yaml").read_text())
    (tmp_path / "recipe" / "mine.yaml").write_text("# @package _global_\nrl: {n_onn: 3}\n")
    monkeypatch.setattr("megatron_avatar.config.load.CONFIG_DIR", tmp_path)
    with pytest.raises(ValueError, match="recipe/mine.yaml: unknown key 'rl.n_onn'.* 'rl.n_on'"):
        load_config(["recipe=mine"])


TEXTS = ["1e3", "007", "1_000", "true", "0x10", "runs/a,b", "runs/实验", "a=b", "a b", "[x", "{y}", "(z)", "it's",
         'say "so"', "back\\slash\\", "#1", "1.0", "inf", "on", "-"]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_what_was_typed(text):
    config = load(f"output_dir={text}", f"name={text}", f"+cluster.env.X={text}", f"model.path={text}")
    assert (config.output_dir, config.name, config.cluster.env["X"], config.model.path) == (text,) * 4
    tree = OmegaConf.structured(Config)
    apply(tree, [f"output_dir={text}", "rl.n_on=3", 'name="quoted, too"'])
    assert (tree.output_dir, tree.rl.n_on, tree.name) == (text, 3, "quoted, too")


def test_of_several_for_one_key_the_last_counts():
    for first, last in (("a", "b c"), ("b c", "a"), ("[x]", "a"), ("a", "[x]")):
        assert load(f"output_dir={first}", f"output_dir={last}").output_dir == last
    assert load("rl.shaping={lam:0.4}", "rl.shaping.lam=0.3").rl.shaping.lam == 0.3
    assert load("rl.shaping.lam=0.3", "rl.shaping={lam:0.4}").rl.shaping.lam == 0.4


@settings(max_examples=60)
@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Zl", "Zp"]), min_size=1, max_size=12))
def test_any_text_is_what_was_typed(text):
    if text != "null" and "${" not in text and not text.startswith(("'", '"', "~")) and text == text.strip():
        tree = OmegaConf.structured(Config)
        apply(tree, [f"output_dir={text}"])
        assert tree.output_dir == text


@settings(max_examples=15)
@given(st.integers(min_value=0, max_value=100), st.floats(min_value=1e-9, max_value=1e3), st.booleans())
def test_values_come_through_unchanged(seed, rate, flag):
    config = load(f"seed={seed}", f"optim.lr={rate!r}", f"rl.vcrs={flag}")
    assert (config.seed, config.optim.lr, config.rl.vcrs) == (seed, rate, flag)


def test_what_is_saved_is_the_whole_configuration(tmp_path):
    config = load("rl.dual_clip=3", "ablation=wo_tas")
    save_config(config, tmp_path / "config.yaml")
    read = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(tmp_path / "config.yaml"))
    assert OmegaConf.to_object(read) == config


def test_differences_name_what_is_computed_differently(tmp_path):
    path = tmp_path / "config.yaml"
    save_config(load(), path)
    same = load(
        "output_dir=elsewhere", "checkpoint.every=3", "log.wandb=offline", "parallel=a100_40g", "cluster.gpus=8"
    )
    assert differences(path, same) == {}
    after_out_of_memory = load("rl.tokens_per_micro_batch=4096", "parallel.recompute=full", "parallel.tp=2")
    assert differences(path, after_out_of_memory) == {}
    assert differences(path, load("model.shape=qwen2_5_omni_3b")) == {}
    assert differences(path, load("seed=1", "rl.shaping.lam=0.2")) == {"rl.shaping.lam": (0.3, 0.2), "seed": (0, 1)}
    assert list(differences(path, load("stages.visual.steps=1"))) == ["stages.visual.steps"]
    assert all(key.startswith("stages.visual.") for key in differences(path, load("~stages.visual")))


def test_configuration_needs_neither_torch_nor_megatron():
    program = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(['torch', 'megatron', 'transformers', 'numpy']))\n"  # None: import fails
        "from megatron_avatar.config import load_config\n"
        f"print(load_config(['recipe=avatar_7b', *{INPUTS!r}]).rl.n_on)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "4"


# ---- what needs no Hydra -------------------------------------------------------------------------------------------

EQUAL = [
    ["rl.n_on=3", "seed=7"], ["rl.shaping.lam=1e-1", "model.path=/a-b/c.d"], ["dry_run=true", "rl.vcrs=False"],
    ["ablation=wo_tas", "rl.shaping.shape=parabolic"], ["~stages.localisation", "stages.visual.steps=9"],
    ["+stages.visual.rewards.judge=0.3", "stages.visual.rewards.judge=0.2"], ["rl.dual_clip=null", "rl.beta=2"],
    ["output_dir=1e3", "name=007", "model.path=a,b"],
    ["name=other", "output_dir=runs/x"], ["rl.replay.draw_share=[0.2,0.3,0.5]"], ["stages.visual.lr=1e-6"],
    ["parallel=a100_40g", "parallel.tp=8", "cluster=local", "cluster.gpus=8"], ["rl.n_on=3", "rl.n_on=5"],
]  # fmt: skip


@pytest.mark.parametrize("overrides", EQUAL, ids=" ".join)
def test_values_set_without_hydra_are_hydras(overrides, monkeypatch):
    quick = load(*overrides)
    monkeypatch.setattr("megatron_avatar.config.load._PLAIN", re.compile("(?!)"))
    assert load(*overrides) == quick


@pytest.mark.parametrize("override", ["rl.n_onn=3", "stages.visul.steps=3", "rl.n_on=three", "rl.vcrs=2.5",
                                      "stages.visual.rewards.taste=0.3", "rl.sampling=3", "rl.n_on.x=3"])
def test_mistakes_in_them_are_hydras(override, monkeypatch):
    with pytest.raises(ValueError) as quick:
        load(override)
    monkeypatch.setattr("megatron_avatar.config.load._PLAIN", re.compile("(?!)"))
    with pytest.raises(ValueError) as slow:
        load(override)
    assert str(quick.value) == str(slow.value)


def test_paths_need_no_quotes_for_their_letters(monkeypatch):
    monkeypatch.setenv("HOME", "/people/me")
    config = load_config(["recipe=tiny_avatar", "model.path=~/größe/x#1", "data.manifest=/my set/ü;1.jsonl", "name=ß"])
    assert (config.model.path, config.data.manifest) == ("/people/me/größe/x#1", "/my set/ü;1.jsonl")
    assert config.name == "ß"
    for meant in ("~stages.visual", "stages.visual.data=[ü]", "seed=0,1", "name='ü'", "name=${oc.env:HOME}"):
        assert readable(meant) == meant
    assert readable("+cluster.env.X=ü") == '+cluster.env.X="ü"'


def test_every_alias_leads_to_a_setting_and_names_none():
    from megatron_avatar.config.load import _schema
    from megatron_avatar.config.nearest import ALIASES

    keys = {key.replace("*", "NAME") for key in _schema()}
    assert set(ALIASES) <= keys
    names = [name for names in ALIASES.values() for name in names]
    assert len(names) == len(set(names))
