"""The tiny base: its folder, its packed descriptions against transformers' own forward, and what it perceives."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoTokenizer

from data_tools import pretrain
from data_tools.pretrain import BASES, accuracy, describing, description_logits
from data_tools.tokenizer import build_tokenizer
from megatron_avatar.data.prompt import PromptBuilder

ROOT = Path(__file__).parents[2]
BASE = ROOT / BASES["omni"].folder


@pytest.fixture(scope="module", params=BASES)
def base(request):
    torch.set_num_threads(1)
    return BASES[request.param]


@pytest.fixture(scope="module")
def model(base):
    return base.model.from_pretrained(ROOT / base.folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def examples(tmp_path_factory, base, model):
    folder = tmp_path_factory.mktemp("clips")
    (folder / "clips").mkdir()
    builder = PromptBuilder(AutoTokenizer.from_pretrained(ROOT / base.folder), model.config, base.view, context=512)
    return [describing(builder, folder, f"test-{i}") for i in range(32)]


def test_the_folder_is_small_bfloat16_and_todays_shape(base, model):
    file = ROOT / base.folder / "model.safetensors"
    assert file.stat().st_size < 8 * 2**20
    with safe_open(file, "pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"BF16"}  # noqa: SIM118
    tokenizer = build_tokenizer(base.family)
    assert AutoTokenizer.from_pretrained(ROOT / base.folder).get_vocab() == tokenizer.get_vocab()
    wanted = base.model(base.config(tokenizer))
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in wanted.named_parameters()}
    assert 2e6 <= sum(p.numel() for p in model.parameters()) <= 4e6


@torch.no_grad()
def test_packed_descriptions_equal_single_prompts_in_transformers(model, examples):
    """Positions are transformers' own."""
    prompts = [next(e for e in examples if (e[0].mel is None) == mute) for mute in (True, False)]
    packed, _ = description_logits(model, prompts)
    single = []
    for prompt, turns in prompts:
        media = {"pixel_values_videos": prompt.pixels, "video_grid_thw": prompt.grid_thw}
        media["video_second_per_grid"] = torch.tensor([0.5])
        if prompt.mel is not None:
            heard = torch.ones(1, prompt.mel.shape[1], dtype=torch.long)
            media |= {"input_features": prompt.mel[None], "feature_attention_mask": heard, "use_audio_in_video": True}
        for asked, told in turns:
            ids = torch.from_numpy(np.concatenate([prompt.token_ids, asked, told[:-1]]))[None]
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **media).logits
            single.append(logits[0, len(prompt) + len(asked) - 1 :])
    torch.testing.assert_close(packed, torch.cat(single), atol=2e-4, rtol=1e-4)


def test_the_base_perceives(base, model, examples):
    told = accuracy(model, AutoTokenizer.from_pretrained(ROOT / base.folder), examples)
    for name in ("shape", "color", "column", "act", "count", "when", "sound", "pattern"):
        assert told[name] > 0.8, told


@pytest.mark.slow
def test_a_training_goes_on_from_a_folder_and_moves_all_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "evaluate", lambda *_: {})
    pretrain.pretrain(BASES["omni"], tmp_path / "on", steps=2, batch_size=2, lr=1e-2, clips=3, on_ladder=0.5,
                      start=BASE, run="test", threads=1)  # fmt: skip
    before, after = (load_file(folder / "model.safetensors") for folder in (BASE, tmp_path / "on"))
    assert before.keys() == after.keys()
    for part in ("visual.", "audio_tower.", "model."):  # the encoders learn as well
        assert any(not torch.equal(before[n], after[n]) for n in before if n.startswith(part)), part
    AutoTokenizer.from_pretrained(tmp_path / "on")
