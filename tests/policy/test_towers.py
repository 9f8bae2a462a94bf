"""The encoders against transformers' own calls: attention in windows, media taken apart, the VL families.

Shares of tensor-parallel ranks: test_parity's layouts, with trained and frozen encoders.
"""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_avatar.config.schema import ModelConfig, ParallelConfig
from megatron_avatar.policy import flash, tower_attention, towers
from megatron_avatar.policy.build import build_policy
from megatron_avatar.policy.weights import load_hf
from megatron_avatar.records import Prompt
from tests.policy.mistakes import logits_error, qwen3_mistakes
from tests.policy.tiny import (
    AUDIO,
    FAMILIES,
    VIDEO,
    tiny_config,
    tiny_omni3,
    tiny_omni3_config,
    tiny_prompts,
    tiny_thinker,
)

TOLERANCE = 1e-5


def load(model, folder, backend):
    model.save_pretrained(folder)
    policy = build_policy(folder, backend, ModelConfig(), ParallelConfig())
    load_hf(policy, folder)
    return policy


@pytest.fixture(scope="module")
def omni(backend, tmp_path_factory):
    """transformers' Thinker with its plainest attention, and the policy with the same weights."""
    model = tiny_thinker(tiny_config())
    policy = load(model, tmp_path_factory.mktemp("omni"), backend)
    model.set_attn_implementation("eager")
    return model, policy


@pytest.fixture(scope="module", params=["vl", "vl3"])
def vl(request, backend, tmp_path_factory):
    family = FAMILIES[request.param]
    model = family.model(family.config())
    return family, model, load(model, tmp_path_factory.mktemp("vl"), backend)


# --------------------------------------------------------------------------------------------------------------------
# Attention in windows


def window_by_window(query, key, value, bounds, scaling):
    """[1, S, heads, D]: softmax written out for each window."""
    outputs = []
    for start, stop in itertools.pairwise(bounds):
        q, k, v = (x[0, :, start:stop] for x in (query, key, value))
        outputs.append((q @ k.mT * scaling).softmax(-1) @ v)
    return torch.cat(outputs, dim=1).transpose(0, 1)[None]


def attend(query, key, value, bounds, scaling, device="cpu"):
    bounds = torch.tensor(bounds, dtype=torch.int32, device=device)
    longest = int(bounds.diff().max())
    output, _ = tower_attention.window_attention(
        None, query, key, value, None, scaling=scaling, cu_seq_lens_q=bounds, max_length_q=longest
    )
    return output


def random_qkv(length, size, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(3, 1, 2, length, size, generator=generator, dtype=torch.float64)
    return [x.to(device, dtype).requires_grad_() for x in qkv]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=8))
@example([4, 4, 4])
def test_windows_of_any_lengths_equal_one_after_the_other(lengths):
    bounds = [0, *itertools.accumulate(lengths)]
    qkv = random_qkv(bounds[-1], 4)
    results = []
    for function in (attend, window_by_window):
        output = function(*qkv, bounds, 0.3)
        results.append([output, *torch.autograd.grad(output.sin().sum(), qkv)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


def test_flash_kernels_get_all_windows_at_once(monkeypatch):
    """Which kernel a device gets is test_attention's; here: what it is given, with a stand-in that reads it."""
    bounds, qkv = [0, 3, 4, 9], random_qkv(9, 8)

    def kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale):
        assert cu_seq_q is cu_seq_k and cu_seq_q.dtype == torch.int32 and (max_q, max_k) == (5, 5)
        assert query.shape == (9, 2, 8) and query.is_contiguous() is False
        rows = (x.transpose(0, 1)[None] for x in (query, key, value))
        return window_by_window(*rows, cu_seq_q.tolist(), scale)[0]

    monkeypatch.setattr(tower_attention, "varlen_attn", kernel)
    monkeypatch.setattr(flash, "kernel_for", lambda device, dtype, size: flash.FLASH_VARLEN)
    assert torch.equal(attend(*qkv, bounds, 0.3), window_by_window(*qkv, bounds, 0.3))


@pytest.mark.gpu
def test_flash_kernels_on_a_gpu():
    """bfloat16 at the 7B's head sizes: value and gradient as near to float64 as rounding lets them be."""
    for size in (64, 80):
        bounds = [0, 64, 128, 160, 161, 1000]
        qkv = random_qkv(bounds[-1], size, torch.bfloat16, "cuda")
        exact = [x.detach().double().requires_grad_() for x in qkv]
        ours, theirs = attend(*qkv, bounds, size**-0.5, "cuda"), window_by_window(*exact, bounds, size**-0.5)
        torch.testing.assert_close(ours.double(), theirs, atol=2e-2, rtol=0)
        gradients = (torch.autograd.grad(output.sin().sum(), x) for output, x in ((ours, qkv), (theirs, exact)))
        for mine, his in zip(*gradients, strict=True):
            torch.testing.assert_close(mine.double(), his, atol=3e-2, rtol=0)


# --------------------------------------------------------------------------------------------------------------------
# Media taken apart


def ragged_prompt(prompts):
    """Two pictures of different size and a video between them; sounds of 0, 1, 50 and 132 tokens."""
    grid, lengths = torch.tensor([[1, 6, 10], [3, 4, 6], [1, 4, 18]]), torch.tensor([2, 5, 201, 530])
    tokens = [VIDEO] * (int(grid.prod(1).sum()) // 4) + [AUDIO] * (0 + 1 + 50 + 132)
    generator = torch.Generator().manual_seed(0)
    return dataclasses.replace(
        prompts["audio_in_video"],
        token_ids=torch.tensor(tokens).numpy(),
        pixels=torch.randn(int(grid.prod(1).sum()), 1176, generator=generator),
        grid_thw=grid,
        mel=torch.randn(128, int(lengths.sum()), generator=generator),
        mel_lengths=lengths,
    )


@pytest.mark.parametrize("budget", [1, 150, 32_768])
def test_pieces_of_any_size_equal_transformers_single_call(omni, monkeypatch, budget):
    model, policy = omni
    monkeypatch.setattr(towers, "ROWS_PER_CALL", budget)
    prompt = ragged_prompt(tiny_prompts(model.config))
    calls = count_rows(policy.towers)
    (media,) = policy.embed_media([prompt])
    with torch.no_grad():
        visual = model.model.visual(prompt.pixels, prompt.grid_thw).pooler_output
        audio = model.model.audio_tower(prompt.mel, prompt.mel_lengths).last_hidden_state
    torch.testing.assert_close(media, torch.cat([visual, audio]), atol=TOLERANCE, rtol=0)
    assert calls == {
        1: [60, 24, 24, 24, 72, 2, 5, 200, 1, 200, 200, 130],
        150: [132, 72, 7, 200, 1, 200, 200, 130],
    }.get(budget, [204, 738])


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.data())
def test_rows_of_parts_are_those_of_all_of_them(lengths, data):
    whole = torch.arange(sum(lengths))[:, None]
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, len(whole)))
    found = towers.take(whole.split(lengths), start, stop)
    assert torch.equal(torch.cat([whole[:0], *found]), whole[start:stop]) and all(len(rows) for rows in found)


def test_encoders_cast_on_their_device(omni, monkeypatch):
    """A move and then a cast: torch casts a copy from the host before it is sent, in one thread."""
    encoders, calls, plain = omni[1].towers, [], torch.Tensor.to

    def moved(self, *arguments):
        calls.append(arguments)
        return plain(self, *arguments)

    monkeypatch.setattr(torch.Tensor, "to", moved)
    rows = encoders._moved([torch.ones(2, 3), torch.zeros(1, 3)])
    assert calls == [(encoders.device,), (encoders.dtype,)] * 2 and rows.tolist() == [[1] * 3, [1] * 3, [0] * 3]
    one = torch.ones(2, 3, dtype=encoders.dtype)
    assert encoders._moved([one]) is one, "one part is not copied"


def count_rows(encoders):
    """Rows of each coming encoder call, in a list that grows."""
    rows = []
    encoders.visual.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    encoders.audio_tower.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[1]))
    return rows


def test_training_encoders_run_once_whatever_the_prompts(omni, monkeypatch):
    """With gradient: one call each, on a dummy without media; gradients as transformers' single call gives them."""
    model, policy = omni
    monkeypatch.setattr(towers, "ROWS_PER_CALL", 1)
    policy.set_train_towers(True)
    calls, prompts = count_rows(policy.towers), tiny_prompts(model.config)
    try:
        (media,) = policy.embed_media([ragged_prompt(prompts)], grad=True)
        (nothing,) = policy.embed_media([prompts["text"]], grad=True)
        assert calls == [204, 738, 4, 4] and nothing.shape == (0, 64)
        calls.clear()
        with torch.no_grad():  # a reference is scored: pieces of bounded size, and no dummies
            embedded, none = policy.embed_media([ragged_prompt(prompts), prompts["text"]], grad=True)
        assert calls == [60, 24, 24, 24, 72, 2, 5, 200, 1, 200, 200, 130] and none is None
        torch.testing.assert_close(embedded, media.detach(), atol=TOLERANCE, rtol=0)
        (media.sin().sum() + nothing.sum()).backward()
        ours = {name: value.grad for name, value in policy.towers.named_parameters() if value.requires_grad}
    finally:
        policy.set_train_towers(False)
        policy.zero_grad()
    prompt = ragged_prompt(prompts)
    model.zero_grad()
    visual = model.model.visual(prompt.pixels, prompt.grid_thw).pooler_output
    audio = model.model.audio_tower(prompt.mel, prompt.mel_lengths).last_hidden_state
    (visual.sin().sum() + audio.sin().sum()).backward()
    theirs = dict(model.model.named_parameters())
    for name, gradient in ours.items():
        scale = theirs[name].grad.abs().max().clamp_min(1e-6)
        assert float((gradient - theirs[name].grad).abs().max() / scale) < TOLERANCE, name


@given(st.lists(st.integers(1, 100), max_size=30), st.integers(1, 8))
def test_shares_are_balanced_up_to_one_unit(sizes, ranks):
    borders = towers.share_out(sizes, ranks)
    assert (borders[0], borders[-1]) == (0, len(sizes)) and borders == sorted(borders) and len(borders) == ranks + 1
    shares = [sum(sizes[start:stop]) for start, stop in itertools.pairwise(borders)]
    assert all(abs(share - sum(sizes) / ranks) <= max(sizes, default=0) for share in shares)


@given(st.lists(st.integers(1, 100), max_size=30), st.integers(1, 200))
def test_pieces_keep_the_budget_and_waste_none(sizes, budget):
    pieces = towers.pack(sizes, budget)
    assert [index for start, stop in pieces for index in range(start, stop)] == list(range(len(sizes)))
    rows = [sum(sizes[start:stop]) for start, stop in pieces]
    assert all(row <= budget or stop - start == 1 for row, (start, stop) in zip(rows, pieces, strict=True))
    assert all(row + sizes[stop] > budget for row, (_, stop) in zip(rows[:-1], pieces[:-1], strict=True))
    assert towers.pack(sizes, None) == ([(0, len(sizes))] if sizes else [])


# --------------------------------------------------------------------------------------------------------------------
# Qwen3-Omni's sounds

# Chunks have 100 frames, windows two of them: sounds below a chunk, whole chunks, and last windows below a chunk.
SOUNDS = [70, 270, 530, 100, 30, 30, 203, 400, 1]
TOKENS = [9, 35, 69, 13, 4, 4, 27, 52, 1]


@pytest.fixture(scope="module")
def omni3(backend):
    """transformers' Thinker with its plainest attention, and encoders with the same weights."""
    model = tiny_omni3(tiny_omni3_config())
    encoders = towers.Towers(model.config, torch.float32)
    for name, encoder in encoders.named_children():
        encoder.load_state_dict(getattr(model.model, name).state_dict())
    model.set_attn_implementation("eager")
    return model, encoders


def sounds_and_a_video(lengths=SOUNDS, tokens=TOKENS):
    """A picture token between any two sounds."""
    generator = torch.Generator().manual_seed(0)
    ids = [token for count in tokens for token in [*[AUDIO] * count, VIDEO]]
    return Prompt(
        "sounds", "plain", torch.tensor(ids).numpy(), torch.arange(len(ids)).expand(3, -1).float().numpy(),
        torch.randn(4 * len(tokens), 1536, generator=generator), torch.tensor([[len(tokens), 2, 2]]),
        torch.randn(128, sum(lengths), generator=generator), torch.tensor(lengths),
    )  # fmt: skip


def each_sound(model, prompt):
    """transformers' embeddings of each sound, encoded by itself."""
    parts = prompt.mel.split(prompt.mel_lengths.tolist(), dim=1)
    return [model.model.audio_tower(part, torch.tensor([part.shape[1]])).last_hidden_state for part in parts]


@pytest.mark.parametrize("budget", [1, 150, 32_768])
def test_a_sound_is_what_it_is_alone_however_it_is_cut_and_with_whatever_it_is_called(omni3, monkeypatch, budget):
    """A budget of one row cuts all windows apart, as ranks may; transformers' single call leaks into short chunks."""
    model, encoders = omni3
    monkeypatch.setattr(towers, "ROWS_PER_CALL", budget)
    prompt = sounds_and_a_video()
    (media,) = encoders([prompt])
    is_audio = torch.from_numpy(prompt.token_ids) == AUDIO
    with torch.no_grad():
        alone = each_sound(model, prompt)
        together = model.model.audio_tower(prompt.mel, prompt.mel_lengths).last_hidden_state
        seen = model.model.visual(prompt.pixels, prompt.grid_thw)
    assert [len(part) for part in alone] == TOKENS
    heard, hidden = torch.cat(alone), model.config.text_config.hidden_size
    torch.testing.assert_close(media[is_audio, :hidden], heard, atol=TOLERANCE, rtol=0)
    assert not media[is_audio, hidden:].any(), "sound has no features for deepstack"
    wide = torch.cat([seen.pooler_output, *seen.deepstack_features], dim=1)
    torch.testing.assert_close(media[~is_audio], wide, atol=TOLERANCE, rtol=0)
    difference = (together - heard).abs().amax(1) / heard.std()
    assert difference.max() > 0.05 and difference[TOKENS[0] :][: TOKENS[1]].max() < TOLERANCE, "the trap, and where"


def test_training_qwen3_omnis_encoders(omni3):
    """Gradients as those of each sound by itself, with and without media; all is encoded at once."""
    model, encoders = omni3
    encoders.set_train(True)
    calls, both = [], [encoders.visual, encoders.audio_tower]
    hooks = [encoder.register_forward_hook(lambda module, args, out: calls.append(module)) for encoder in both]
    prompt = sounds_and_a_video()
    nothing = dataclasses.replace(prompt, token_ids=prompt.token_ids[:0], pixels=None, grid_thw=None, mel=None)
    try:
        (media,) = encoders([prompt], grad=True)
        widths = len(list(itertools.groupby(min(100, length) for length in SOUNDS)))
        assert [calls.count(encoder) for encoder in both] == [1, widths]
        (none,) = encoders([nothing], grad=True)
        assert none.shape == (0, encoders.width) and len(calls) == widths + 3, "once each, on dummies"
        (media.sin().sum() + none.sum()).backward()
        ours = {name: value.grad for name, value in encoders.named_parameters()}
    finally:
        encoders.set_train(False)
        encoders.zero_grad()
        for hook in hooks:
            hook.remove()
    model.zero_grad()
    seen = model.model.visual(prompt.pixels, prompt.grid_thw)
    outputs = [*each_sound(model, prompt), seen.pooler_output, *seen.deepstack_features]
    sum(output.sin().sum() for output in outputs).backward()
    theirs = dict(model.model.named_parameters())
    for name, gradient in ours.items():
        if not name.endswith("k_proj.bias"):  # whose gradient is nothing but rounding: it moves all scores alike
            scale = theirs[name].grad.abs().max().clamp_min(1e-6)
            assert float((gradient - theirs[name].grad).abs().max() / scale) < TOLERANCE, name


# --------------------------------------------------------------------------------------------------------------------
# Families that don't hear


def test_vl_equals_transformers_and_mistakes_show(vl, monkeypatch):
    family, model, policy = vl
    prompts = family.prompts(model.config)
    assert policy.towers.audio_tower is None
    with torch.no_grad():
        references = {kind: family.logits(model, prompts[kind]) for kind in family.kinds}
    errors = {kind: logits_error(policy, prompts[kind], references[kind]) for kind in family.kinds}
    assert {kind: error for kind, error in errors.items() if error > TOLERANCE} == {}
    prompt, reference = prompts["video"], references["video"]
    wrong = {
        "time": dataclasses.replace(prompt, positions=prompt.positions[[1, 1, 2]]),
        "other pictures": dataclasses.replace(prompt, pixels=prompt.pixels.flip(0)),
    }
    mistakes = {name: logits_error(policy, other, reference) for name, other in wrong.items()}
    if family is FAMILIES["vl3"]:
        mistakes |= qwen3_mistakes(policy, prompt, reference, monkeypatch)
    assert {name: error for name, error in mistakes.items() if error < 0.1} == {}
    assert logits_error(policy, prompt, reference) <= TOLERANCE, "nothing of the mistakes stays"


def test_an_encoder_that_gives_other_features_than_are_added_is_seen(vl, monkeypatch):
    family, _, policy = vl
    seen, prompt = policy.towers._see, next(iter(family.prompts(policy.hf_config).values()))
    rows, shapes = prompt.pixels, [(h, w) for t, h, w in prompt.grid_thw.tolist() for _ in range(t)]
    assert seen(rows, shapes).shape[1] == policy.towers.width
    monkeypatch.setattr(policy.towers, "width", policy.towers.width + 64)  # as if one more layer wanted some
    with pytest.raises(AssertionError, match="columns instead of"):
        seen(rows, shapes)


def test_training_vls_encoder_without_media(vl):
    family, _, policy = vl
    policy.set_train_towers(True)
    try:
        (media,) = policy.embed_media([family.prompts(policy.hf_config)["text"]], grad=True)
        media.sum().backward()
        assert all(float(p.grad.abs().max()) == 0 for p in policy.towers.parameters())
    finally:
        policy.set_train_towers(False)
        policy.zero_grad()
