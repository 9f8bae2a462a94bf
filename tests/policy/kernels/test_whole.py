"""All kernels together in Triton's interpreter: decode steps and an update of the tiny model, against torch's path."""

import dataclasses
from contextlib import ExitStack, contextmanager
from unittest import mock

import numpy as np
import pytest

from megatron_avatar.config.schema import ModelConfig, ParallelConfig, SamplingConfig
from megatron_avatar.policy import cache as caches
from megatron_avatar.policy import generate as generation
from megatron_avatar.policy.build import build_policy
from megatron_avatar.policy.generate import generate
from megatron_avatar.policy.groups import pack_groups
from megatron_avatar.policy.kernels import attend, draw, head, merge, norm, rope, swiglu
from megatron_avatar.policy.weights import load_hf
from tests.policy.kernels.where import interpreted
from tests.policy.tiny import tiny_config, tiny_prompts, tiny_thinker

SAMPLING = SamplingConfig(max_new_tokens=3)
TOLERANCE = {"float32": 2e-5, "float16": 2e-2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("thinker")
    config = tiny_config(layers=2)
    config.eos_token_id = 7
    tiny_thinker(config).save_pretrained(path)
    return path


@contextmanager
def kernels(*, decoding: bool):
    """The path of a GPU; for an update without the decode step's cache."""
    ran: list[str] = []
    with ExitStack() as patches:
        for module in (attend, draw, head, merge, norm, rope, swiglu):
            def runs(tensor, name=module.__name__):
                ran.append(name.rpartition(".")[2])
                return True

            patches.enter_context(mock.patch.object(module, "runs_triton", runs))
        if decoding:
            def static(*arguments, **_):
                return caches.KeyValueCache(*arguments, static=True)

            patches.enter_context(mock.patch.object(generation, "KeyValueCache", static))
            patches.enter_context(mock.patch.multiple(attend, KEYS=16, MOST_QUERIES=16))
        yield ran


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_decode_steps_and_an_update_are_torchs(folder, backend, dtype):
    """The same tokens, log-probabilities within rounding; loss and gradients too."""
    policy = build_policy(folder, backend, ModelConfig(dtype=dtype), ParallelConfig())
    load_hf(policy, folder)
    text = tiny_prompts(policy.hf_config)["text"]
    short = dataclasses.replace(text, token_ids=text.token_ids[-5:], positions=np.tile(np.arange(5), (3, 1)))
    with kernels(decoding=True) as ran:
        ours = generate(policy, [text, short], 2, SAMPLING, ["a", "b"])
    assert set(ran) >= {"attend", "draw", "norm", "rope", "swiglu"}
    rows = [[c.token_ids for c in group] for group in ours]
    batch, found = pack_groups([text, short], rows), []
    recorded = np.concatenate([c.logprobs for group in ours for c in group])
    scores = policy(batch, temperature=SAMPLING.temperature)[0].detach().numpy()
    np.testing.assert_allclose(scores, recorded, atol=TOLERANCE[dtype])
    if dtype == "float32":  # in half precision a number near the border of two tokens may fall on either side
        theirs = generate(policy, [text, short], 2, SAMPLING, ["a", "b"])
        assert [[c.token_ids.tolist() for c in group] for group in theirs] == [[r.tolist() for r in x] for x in rows]
    for by_kernels in (True, False):
        policy.zero_grad()
        with kernels(decoding=False) if by_kernels else ExitStack():
            scores = policy(batch)[0]
            scores.sum().backward()
        found.append([scores.detach(), *(p.grad.clone() for p in policy.language_model.parameters())])
    for one, other in zip(*found, strict=True):
        size = max(1e-3, float(other.abs().max()))
        assert float((one - other).abs().max()) <= TOLERANCE[dtype] * max(1.0, size)
