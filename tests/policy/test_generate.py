"""Generation against the training forward, transformers' generate, and itself on other layouts."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch
from megatron.core import tensor_parallel
from transformers import (
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen3OmniMoeThinkerForConditionalGeneration,
    Qwen3VLForConditionalGeneration,
)

from megatron_avatar.config.schema import ModelConfig, ParallelConfig, SamplingConfig
from megatron_avatar.policy import backend as backends
from megatron_avatar.policy import cache as caches
from megatron_avatar.policy import decode, kept, lanes
from megatron_avatar.policy import generate as generation
from megatron_avatar.policy.build import build_policy
from megatron_avatar.policy.cache import KeyValueCache
from megatron_avatar.policy.generate import GenerationStopped, generate
from megatron_avatar.policy.groups import pack_groups
from megatron_avatar.policy.routes import Routes
from megatron_avatar.policy.weights import load_hf
from megatron_avatar.records import Prompt
from tests.policy import generation_world, tiny
from tests.policy.generation_world import KEYS, LAYOUTS, ROWS, SAMPLING, STOP_IDS, make_folder, open_policy
from tests.ranks import launch

BANNED = {
    tiny.AUDIO, tiny.IMAGE, tiny.VIDEO, tiny.VISION_START, tiny.VISION_END, tiny.AUDIO_START, tiny.AUDIO_END
}  # fmt: skip


GREEDY = dict(max_new_tokens=24, do_sample=False, eos_token_id=STOP_IDS, suppress_tokens=list(BANNED))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("models"), "omni")


@pytest.fixture(scope="module")
def policy(folder):
    yield open_policy(folder, ParallelConfig())
    backends.stop()


@pytest.fixture(scope="module")
def prompts(policy):
    return list(tiny.tiny_prompts(policy.hf_config).values())


@pytest.fixture(scope="module")
def generated(policy, prompts):
    return generate(policy, prompts, ROWS, SAMPLING, KEYS)


def train_scores(policy, prompts, generated, temperature=SAMPLING.temperature, shift=0):
    """Log-probabilities of the training forward, one array a completion; positions of completions moved by `shift`."""
    batch = pack_groups(prompts, [[c.token_ids for c in rows] for rows in generated])
    if shift:
        moved = batch.positions.clone()
        moved[:, :, batch.prompt_ids < 0] += shift
        batch = dataclasses.replace(batch, positions=moved)
    scores, _ = policy(batch, policy.embed_media(prompts), temperature)
    return scores.detach().split(batch.lengths)


def same(first, second, atol=1e-5):
    for ours, theirs in zip(first, second, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert a.token_ids.tolist() == b.token_ids.tolist() and a.finished == b.finished
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=atol)


def error(recorded, scores):
    """The run's gate: mean exp|log-probability difference| over all tokens."""
    return np.exp(np.abs(np.concatenate(recorded) - np.concatenate(scores))).mean()


def test_completions_are_well_formed(generated):
    rows = [row for group in generated for row in group]
    assert {row.finished for row in rows} == {True, False}, "the case should show both"
    ends = [max(len(row) for row in group) for group in generated]
    assert min(ends) < max(ends), "a prompt should leave the batch before the others"
    for row in rows:
        assert len(row) <= SAMPLING.max_new_tokens and row.logprobs.dtype == np.float32
        assert not set(row.token_ids.tolist()) & BANNED
        stops = np.isin(row.token_ids, STOP_IDS)
        assert not stops[:-1].any() and stops[-1] == row.finished
        assert row.finished or len(row) == SAMPLING.max_new_tokens
    assert len({tuple(row.token_ids.tolist()) for row in rows}) == len(rows), "completions differ"


def test_logprobs_equal_the_training_forward(policy, prompts, generated):
    recorded = [row.logprobs for group in generated for row in group]
    scores = train_scores(policy, prompts, generated)
    for ours, theirs in zip(recorded, scores, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert error(recorded, scores) < 1 + 1e-5


def test_the_gate_sees_a_shift_by_one(policy, prompts, generated):
    """Negative controls: positions or tokens off by one, and a forgotten temperature, trip the limit of 1.05."""
    recorded = [row.logprobs for group in generated for row in group]
    assert error(recorded, train_scores(policy, prompts, generated, shift=1)) > 1.05
    assert error(recorded, train_scores(policy, prompts, generated, temperature=1.0)) > 1.05
    scores = train_scores(policy, prompts, generated)
    assert error([r[1:] for r in recorded], [s[:-1] for s in scores]) > 1.05


def test_greedy_equals_transformers(policy, prompts, folder):
    model = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(folder).eval()
    ours = generate(policy, prompts, 1, SamplingConfig(max_new_tokens=24), KEYS, greedy=True)
    for prompt, (row,) in zip(prompts, ours, strict=True):
        theirs = model.generate(**heard(prompt, 1.0), **GREEDY)
        assert row.token_ids.tolist() == theirs[0, len(prompt) :].tolist()
    assert max(len(row) for (row,) in ours) > 4


def heard(prompt, seconds):
    """What transformers' Thinkers are given, where a pair of frames takes so long."""
    ids = torch.from_numpy(prompt.token_ids)[None]
    return dict(
        input_ids=ids, attention_mask=torch.ones_like(ids), video_second_per_grid=torch.tensor([seconds]),
        use_audio_in_video=prompt.sample_id == "audio_in_video", **tiny.thinker_media(prompt),
    )  # fmt: skip


def test_tokens_do_not_depend_on_the_batch(policy, prompts, generated):
    for i in (0, 2):
        alone = generate(policy, [prompts[i]], 2, SAMPLING, [KEYS[i]])
        same(alone, [generated[i][:2]])
    backwards = generate(policy, prompts[::-1], 3, SAMPLING, KEYS[::-1], media=policy.embed_media(prompts[::-1]))
    same(backwards[::-1], generated)
    other_key = generate(policy, prompts[:1], 1, SAMPLING, ["seed/step/a/1"])
    assert other_key[0][0].token_ids.tolist() != generated[0][0].token_ids.tolist()
    # A longer limit continues the same completion
    longer = dataclasses.replace(SAMPLING, max_new_tokens=SAMPLING.max_new_tokens + 5)
    cut = next((i, j) for i, group in enumerate(generated) for j, row in enumerate(group) if not row.finished)
    whole = generate(policy, [prompts[cut[0]]], cut[1] + 1, longer, [KEYS[cut[0]]])[0][cut[1]]
    assert whole.token_ids[: SAMPLING.max_new_tokens].tolist() == generated[cut[0]][cut[1]].token_ids.tolist()


def test_prompts_wait_for_room(policy, prompts, generated, monkeypatch):
    """With memory for two prompts and four rows, and one prompt read at a time, the same completions come out."""
    rooms = []

    def cache(room, *args, **options):
        rooms.append(room)
        return KeyValueCache(room, *args, **options)

    token_bytes = 2 * 4 * 2 * 16 * 4  # keys and values of 4 layers with 2 heads of 16 in float32
    monkeypatch.setattr(generation, "KeyValueCache", cache)
    monkeypatch.setattr(generation, "CACHE_BYTES", (2 * 144 + 4 * SAMPLING.max_new_tokens) * token_bytes)
    monkeypatch.setattr(lanes, "READ_TOKENS", 1)
    same(generate(policy, prompts, ROWS, SAMPLING, KEYS), generated)
    (room,) = rooms
    assert len(prompts) * ROWS == 12 and room.rows == 3 and room.pages == 2
    monkeypatch.setattr(generation, "CACHE_BYTES", (144 + 39) * token_bytes)
    with pytest.raises(ValueError, match="don't fit in the memory left for keys and values"):
        generate(policy, prompts, ROWS, SAMPLING, KEYS)


def test_steps_of_fixed_shape_and_their_replay(policy, prompts, generated, monkeypatch):
    """What a CUDA graph needs, without one: a "graph" repeats the step on the tensors that it was captured with."""
    captured, replays, handles = [], [], itertools.count()

    class Graph:
        def __init__(self, step, shape, inputs, received, output):
            self.arguments, self.output, self.step = (shape, inputs, received), output, step

        def replay(self):
            replays.append(1)
            self.output.copy_(self.step(*self.arguments))

    def capture(self, shape, inputs, received):
        inputs = inputs.clone()
        output = self.step(shape, inputs, received)
        captured.append((shape, self._pool))
        return Graph(self.step, shape, inputs, received, output), inputs, received, output

    def static_cache(*args, static):
        return KeyValueCache(*args, static=True)

    def graphs(self, *args):
        plain(self, *args)
        self._uses_graphs = True

    plain = decode.Decoder.__init__
    monkeypatch.setattr(generation, "KeyValueCache", static_cache)
    same(generate(policy, prompts, ROWS, SAMPLING, KEYS), generated)
    monkeypatch.setattr(kept, "memory_of", lambda device: 1 << 40)
    monkeypatch.setattr(decode.Decoder, "__init__", graphs)
    monkeypatch.setattr(decode.Decoder, "_capture", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(handles))
    monkeypatch.setattr(caches, "FIRST_ROOM", 16)
    same(generate(policy, prompts, ROWS, SAMPLING, KEYS), generated)
    longest = max(len(row) for group in generated for row in group)
    shapes = [shape for shape, _ in captured]
    assert 1 < len(set(shapes)) == len(shapes) < longest / 3 and len(replays) > longest / 2, "few graphs, many steps"
    assert len({pool for _, pool in captured}) == 1
    # The next call, and one of fewer prompts, captures no shape again; weights that have moved, all of them.
    replays.clear()
    same(generate(policy, prompts, ROWS, SAMPLING, KEYS), generated)
    same(generate(policy, prompts[:2], ROWS, SAMPLING, KEYS[:2]), generated[:2])
    shapes = [shape for shape, _ in captured]
    assert len(set(shapes)) == len(shapes) and len(replays) > longest
    with torch.no_grad():
        for parameter in policy.language_model.parameters():
            parameter.data = parameter.data.clone()
    same(generate(policy, prompts, ROWS, SAMPLING, KEYS), generated)
    again = [shape for shape, _ in captured[len(shapes) :]]
    assert again and set(again) <= set(shapes)
    policy.kept_generation = None


def test_smallest_cases(policy, prompts):
    """A prompt of one token, with and without company; one completion; one token."""
    one = Prompt("one", "plain", np.array([5]), np.zeros((3, 1), np.int64))
    sampling = dataclasses.replace(SAMPLING, max_new_tokens=1)
    keys = ["one", *KEYS]
    together = generate(policy, [one, *prompts], 1, sampling, keys)
    assert [len(row) for (row,) in together] == [1] * 5
    for prompt, key, rows in zip([one, *prompts], keys, together, strict=True):
        same(generate(policy, [prompt], 1, sampling, [key]), [rows])
    scores = train_scores(policy, [one, *prompts], together)
    for (row,), theirs in zip(together, scores, strict=True):
        np.testing.assert_allclose(row.logprobs, theirs, atol=1e-5)
    longer = generate(policy, [one], 3, SAMPLING, ["one"])
    np.testing.assert_allclose(longer[0][0].logprobs[:1], together[0][0].logprobs, atol=1e-5)
    for row, theirs in zip(longer[0], train_scores(policy, [one], longer), strict=True):
        np.testing.assert_allclose(row.logprobs, theirs, atol=1e-5)
    assert generate(policy, [], 2, SAMPLING, []) == []


@pytest.mark.gpu
def test_graphs_equal_steps_without(policy, prompts, monkeypatch):
    replayed = generate(policy, prompts, ROWS, SAMPLING, KEYS)
    monkeypatch.setattr(decode.Decoder, "_replay", decode.Decoder.step)
    same(generate(policy, prompts, ROWS, SAMPLING, KEYS), replayed)


def score(policy, batches):
    """Log-probabilities of (prompts, completions, media) batches, and the parameters' gradients of their mean."""
    policy.zero_grad()
    scores = torch.cat([policy(pack_groups(*groups), media, 0.8)[0] for *groups, media in batches])
    scores.mean().backward()
    gradients = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad()
    return scores.detach(), gradients


def same_training(first, second):
    (scores, gradients), (other_scores, other_gradients) = first, second
    torch.testing.assert_close(scores, other_scores, atol=1e-5, rtol=0)
    assert gradients.keys() == other_gradients.keys() and len(gradients) == 31  # 7 a layer, embedding, norm, output
    for name, gradient in gradients.items():
        assert (gradient - other_gradients[name]).abs().max() <= 1e-5 * other_gradients[name].abs().max(), name


def test_packed_groups_train_like_their_rows(policy, prompts, generated):
    """Losses and gradients of several groups in one batch equal those of one batch a completion."""
    completions = [[row.token_ids for row in group] for group in generated]
    media = policy.embed_media(prompts)
    rows = [
        ([prompt], [[row]], [embedding])
        for prompt, group, embedding in zip(prompts, completions, media, strict=True)
        for row in group
    ]
    same_training(score(policy, [(prompts, completions, media)]), score(policy, rows))


def test_recomputation_gives_the_same_gradients(policy, prompts, generated, folder):
    """Layers that run again in the backward pass still find the segment table."""
    again = build_policy(folder, policy.backend, ModelConfig(path=str(folder)), ParallelConfig(recompute="full"))
    load_hf(again, folder)
    batch = (prompts, [[row.token_ids for row in group] for group in generated], policy.embed_media(prompts))
    same_training(score(again.train(), [batch]), score(policy, [batch]))


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_generation_recomputes_nothing(policy, prompts, folder, monkeypatch, recompute):
    """Fresh and after a training pass, which still recomputes: a checkpoint can't be in a CUDA graph."""
    calls, plain = [], tensor_parallel.checkpoint

    def checkpoint(*args):
        calls.append(1)
        return plain(*args)

    monkeypatch.setattr(tensor_parallel, "checkpoint", checkpoint)
    again = build_policy(folder, policy.backend, ModelConfig(path=str(folder)), ParallelConfig(recompute=recompute))
    load_hf(again, folder)
    few, layers = dataclasses.replace(SAMPLING, max_new_tokens=3), len(again.language_model.decoder.layers)
    for mode in (again.train, again.eval, again.train):
        mode()
        rows = generate(again, prompts[:1], 1, few, KEYS[:1])
        assert not calls
        score(again, [(prompts[:1], [[row.token_ids for row in rows[0]]], again.embed_media(prompts[:1]))])
        assert len(calls) == layers
        calls.clear()


QWEN3 = ("vl3", "omni3")


@pytest.fixture(scope="module")
def qwen3(policy, folder):
    """Of each of the newer families the policy, its prompts, and what it generates of them."""
    found = {}
    for name in QWEN3:
        source = make_folder(folder.parent, name)
        other = build_policy(source, policy.backend, ModelConfig(path=str(source)), ParallelConfig())
        load_hf(other, source)
        prompts = list(tiny.FAMILIES[name].prompts(other.hf_config).values())
        found[name] = other, prompts, generate(other, prompts, ROWS, SAMPLING, KEYS)
    return found


@pytest.mark.parametrize("name", QWEN3)
def test_qwen3_generates_what_it_scores(qwen3, name):
    """Features that go to several layers when the prompt is read, norms of queries and keys at every token; of Omni
    fractional positions, and experts."""
    policy, prompts, generated = qwen3[name]
    recorded = [row.logprobs for group in generated for row in group]
    for ours, theirs in zip(recorded, train_scores(policy, prompts, generated), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    own = torch.arange(policy.towers.width) < policy.config.hidden_size
    media = [rows * own for rows in policy.embed_media(prompts[:3])]
    poor = generate(policy, prompts[:3], ROWS, SAMPLING, KEYS[:3], media=media)
    recorded = [row.logprobs for group in poor for row in group]
    assert error(recorded, train_scores(policy, prompts[:3], poor)) > 1.05, "without deepstack the gate trips"


@pytest.mark.parametrize("name", QWEN3)
def test_qwen3_greedy_equals_transformers(qwen3, folder, name):
    policy, prompts, _ = qwen3[name]
    cls = Qwen3VLForConditionalGeneration if name == "vl3" else Qwen3OmniMoeThinkerForConditionalGeneration
    model = cls.from_pretrained(folder.parent / name).eval()
    ours = generate(policy, prompts, 1, SamplingConfig(max_new_tokens=24), KEYS, greedy=True)
    for prompt, (row,) in zip(prompts, ours, strict=True):
        inputs = tiny.vl_inputs(model, prompt) if name == "vl3" else heard(prompt, 2 / 3)
        theirs = model.generate(**inputs, **GREEDY)
        assert row.token_ids.tolist() == theirs[0, len(prompt) :].tolist()
    assert max(len(row) for (row,) in ours) > 4


@pytest.fixture(scope="module")
def by_layout(folder, qwen3):
    launch(generation_world.main, 4, folder.parent)
    return json.loads((folder.parent / "results.json").read_text())


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "-".join(map(str, layout)))
@pytest.mark.slow
def test_layouts_generate_alike(by_layout, generated, qwen3, layout):
    rows = by_layout["-".join(map(str, layout))]
    expected = [row for group in (generated if layout[0] == "omni" else qwen3[layout[0]][2])[:3] for row in group]
    for (ids, logprobs, finished), row in zip(rows, expected, strict=True):
        assert ids == row.token_ids.tolist() and finished == row.finished
        np.testing.assert_allclose(logprobs, row.logprobs, atol=1e-5)


def test_logits_that_are_not_finite_end_generation(policy, prompts, monkeypatch):
    def head(hidden):
        heads.append(1)
        logits = plain(hidden)
        return logits * float("nan") if len(heads) == 3 else logits

    heads, plain = [], policy.head
    monkeypatch.setattr(policy, "head", head)
    with pytest.raises(FloatingPointError, match=f"not finite at token 2 of a completion of sample '{tiny.KINDS[0]}'"):
        generate(policy, prompts, 2, SAMPLING, KEYS)


def test_stop_and_what_is_left_behind(policy, prompts):
    polls = iter([False, False, True])
    policy.train()
    with pytest.raises(GenerationStopped):
        generate(policy, prompts, 2, SAMPLING, KEYS, stop=lambda: next(polls))
    assert policy.training and next(polls, None) is None
    assert all(layer.self_attention.core_attention.cache is None for layer in policy.language_model.decoder.layers)


@pytest.mark.parametrize("wrong", [dict(temperature=0.0), dict(max_new_tokens=0), dict(top_p=0.0), dict(top_k=-1)])
def test_settings_out_of_range_are_refused(policy, prompts, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        generate(policy, prompts, 1, SamplingConfig(**wrong), KEYS)


# ---- the host a step behind ----------------------------------------------------------------------------------------


@pytest.fixture
def behind(monkeypatch):
    """As on a GPU: (reads for which the device idles, all reads)."""
    reads, sent, plain, plain_send = [0, 0], [0], generation.Drawn.read, generation.send

    def send(*arguments):
        sent[0] += 1
        return plain_send(*arguments)

    def read(self):
        reads[1] += 1
        reads[0] += sent[0] == reads[1]
        return plain(self)

    monkeypatch.setattr(generation, "may_run_behind", lambda _: True)
    monkeypatch.setattr(generation, "send", send)
    monkeypatch.setattr(generation.Drawn, "read", read)
    return reads


@pytest.mark.parametrize("most_rows", [256, 3])
def test_a_host_that_runs_behind_gets_the_same_tokens(policy, prompts, generated, behind, monkeypatch, most_rows):
    """Rows leave at stop tokens and at the limit, and with little room others take their places."""
    monkeypatch.setattr(lanes, "MAX_ROWS", most_rows)
    same(generate(policy, prompts, ROWS, SAMPLING, KEYS), generated)
    assert behind[0] == 1 < behind[1], "it waits for the last tokens alone"


def test_a_host_that_runs_behind_sees_a_stop_signal_and_bad_numbers_in_time(policy, prompts, behind, monkeypatch):
    begun, asked, forward = [], [], generation.Generation._forward
    monkeypatch.setattr(generation.Generation, "_forward", lambda *args: begun.append(1) or forward(*args))

    def stop() -> bool:
        asked.append(1)
        return len(asked) >= 4

    with pytest.raises(GenerationStopped):
        generate(policy, prompts, ROWS, SAMPLING, KEYS, stop=stop)
    assert len(begun) == 5, "the step after the signal is the last"
    head = type(policy).head
    monkeypatch.setattr(type(policy), "head", lambda self, hidden: head(self, hidden) * float("nan"))
    with pytest.raises(FloatingPointError, match="not finite at token 0"):
        generate(policy, prompts[:1], 2, SAMPLING, KEYS[:1])
    monkeypatch.undo()
    assert len(generate(policy, prompts[:1], 1, SamplingConfig(max_new_tokens=1), KEYS[:1])[0][0]) == 1


# ---- routes --------------------------------------------------------------------------------------------------------


def test_routes_are_kept_whatever_the_host_does(qwen3, behind, monkeypatch):
    """A step behind, and where rows wait for each other's places; in float32 training takes the same ones."""
    policy, prompts, generated = qwen3["omni3"]
    plain: list = []
    with monkeypatch.context() as patch:
        patch.setattr(generation, "may_run_behind", lambda _: False)
        same(generate(policy, prompts, ROWS, SAMPLING, KEYS, routes=plain), generated)
    late: list = []
    monkeypatch.setattr(lanes, "MAX_ROWS", 3)
    same(generate(policy, prompts, ROWS, SAMPLING, KEYS, routes=late), generated)
    for one, other, rows in zip(plain, late, generated, strict=True):
        for a, b, row in zip(one, other, rows, strict=True):
            assert a.shape == (len(row), 6, 2) and np.array_equal(np.sort(a), np.sort(b))
    batch = pack_groups(prompts, [[row.token_ids for row in rows] for rows in generated])
    recorded = torch.from_numpy(np.concatenate([row for rows in plain for row in rows]))
    media = policy.embed_media(prompts)
    kept, moved = (Routes(routes, batch.target_index, 1, replay=True) for routes in (recorded, 7 - recorded))
    scores = [policy(batch, media, SAMPLING.temperature, routes)[0].detach() for routes in (None, kept, moved)]
    assert kept.counts.tolist() == [0, recorded.shape[0] * 6] and moved.counts[0] > 0.5 * moved.counts[1]
    torch.testing.assert_close(scores[0], scores[1], atol=1e-5, rtol=0)
    assert (scores[0] - scores[2]).abs().mean() > 0.1, "other experts are taken"
