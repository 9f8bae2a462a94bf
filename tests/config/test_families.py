"""The table of families against transformers' classes, and what it refuses."""

import subprocess
import sys
from operator import attrgetter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import Qwen2_5_VLConfig, Qwen2_5OmniThinkerConfig, Qwen3OmniMoeThinkerConfig, Qwen3VLConfig
from transformers.image_utils import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from megatron_avatar.config.families import FAMILIES, MERGE, OMNI, OMNI3, TEMPORAL_PATCH, VL, VL3, family_of

ROOT = Path(__file__).parents[2]
CONFIGS = {OMNI: Qwen2_5OmniThinkerConfig, VL: Qwen2_5_VLConfig, VL3: Qwen3VLConfig, OMNI3: Qwen3OmniMoeThinkerConfig}
TYPES = [name for family in FAMILIES for name in family.model_types]
KIN = [kind for family in FAMILIES for kind, _ in family.kin]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_row_is_what_the_familys_configuration_says(family):
    config = CONFIGS[family]()
    vision = config.vision_config
    assert (family.patch, MERGE, TEMPORAL_PATCH) == (
        vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
    )  # fmt: skip
    assert config.model_type in family.model_types and family_of(config.model_type) is family
    assert family.hears == hasattr(config, "audio_config")
    assert all(hasattr(vision, key) for key in family.vision_sizes)
    assert (len(family.vision_sizes) == 0) == (not hasattr(vision, "num_position_embeddings"))
    assert family.timestamps or attrgetter(family.position_rate)(config) > 0
    assert family.token_pixels == (family.patch * MERGE) ** 2 <= family.image_min_pixels
    if family.hears:
        assert family.audio_chunk in (0, 2 * config.audio_config.n_window)


def test_colours_are_those_of_the_processors():
    for family in (OMNI, VL):
        assert [*family.mean] == OPENAI_CLIP_MEAN and [*family.std] == OPENAI_CLIP_STD
    for family in (VL3, OMNI3):
        assert [*family.mean] == IMAGENET_STANDARD_MEAN and [*family.std] == IMAGENET_STANDARD_STD


def test_no_type_is_in_two_rows():
    assert len({*TYPES, *KIN}) == len(TYPES) + len(KIN)


@given(st.sampled_from(KIN) | st.text(max_size=12) | st.none() | st.integers() | st.lists(st.text(), max_size=1))
def test_all_others_are_refused_with_the_remedy(model_type):
    if model_type in TYPES:
        return
    with pytest.raises(ValueError) as error:
        family_of(model_type)
    assert "Hugging Face folder of Qwen2.5-Omni, Qwen2.5-VL, Qwen3-VL or Qwen3-Omni" in str(error.value)
    assert all(name in str(error.value) for name in TYPES)


def test_kin_is_refused_with_the_reason():
    says = r"'qwen3_vl_moe' \(its experts lie on disk in another layout .*; take a dense Qwen3-VL"
    with pytest.raises(ValueError, match=says):
        family_of("qwen3_vl_moe")
    with pytest.raises(ValueError, match="'qwen3_vl_text' .* without its vision encoder"):
        family_of("qwen3_vl_text")
    with pytest.raises(ValueError, match="'qwen3_5_moe' .*linear attention and a mixture of experts"):
        family_of("qwen3_5_moe")


def test_the_table_needs_nothing():
    script = ("import sys; sys.modules['torch'] = sys.modules['numpy'] = sys.modules['transformers'] = None\n"
              "import megatron_avatar.config.families")  # fmt: skip
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True)
