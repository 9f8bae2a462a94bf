"""The draw in two passes: Triton's kernels against torch's formula."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_avatar.policy.kernels import draw
from megatron_avatar.policy.kernels.draw import BLOCK, torch_draw, triton_draw
from tests.policy.kernels.where import DEVICE


@settings(deadline=None, max_examples=8)
@given(rows=st.integers(1, 6), width=st.sampled_from([3, BLOCK - 1, BLOCK, 2 * BLOCK + 77]), greedy=st.booleans(),
       temperature=st.sampled_from([0.7, 1.0, 2.0]), spread=st.sampled_from([0.1, 3.0]))  # fmt: skip
def test_the_draw_is_torchs(rows, width, greedy, temperature, spread):
    generator = torch.Generator().manual_seed(rows * width)
    logits = spread * torch.randn(rows, width, generator=generator).to(DEVICE)
    banned = (torch.rand(width, generator=generator) < 0.3).to(DEVICE)
    banned[0] = False
    uniforms = torch.rand(rows, generator=generator, dtype=torch.float64).to(DEVICE)
    ours = triton_draw(logits, uniforms, temperature, banned, greedy)
    theirs = torch_draw(logits, uniforms, temperature, banned, greedy)
    assert torch.equal(ours[0], theirs[0]) and not banned[ours[0]].any()
    torch.testing.assert_close(ours[1], theirs[1], atol=2e-6, rtol=0)


def test_the_ends_of_the_uniform_numbers_draw_allowed_tokens():
    logits = torch.full((4, 2 * BLOCK), -40.0, device=DEVICE)
    logits[:, 5] = logits[:, BLOCK + 7] = 0.0
    banned = torch.zeros(2 * BLOCK, dtype=torch.bool, device=DEVICE)
    banned[[0, 2 * BLOCK - 1]] = True
    uniforms = torch.tensor([0.0, 0.4, 0.6, 1 - 2**-53], dtype=torch.float64, device=DEVICE)
    ids, logprobs = triton_draw(logits, uniforms, 1.0, banned, False)
    assert not banned[ids].any() and ids[1:3].tolist() == [5, BLOCK + 7] and logprobs.isfinite().all()


def test_logits_that_are_no_numbers_give_a_token_in_range_and_no_number():
    for value in (float("nan"), float("inf")):
        logits = torch.zeros(1, 100, device=DEVICE)
        logits[0, 3] = value
        half, banned = torch.tensor([0.5], dtype=torch.float64, device=DEVICE), torch.zeros(100, device=DEVICE).bool()
        ids, logprobs = triton_draw(logits, half, 1.0, banned, False)
        assert 0 <= int(ids) < 100 and logprobs.isnan().all()


def test_everyone_calls_one_function():
    logits, banned = torch.randn(2, 50, generator=torch.Generator().manual_seed(0)), torch.zeros(50).bool()
    ids, logprobs = draw.draw_tokens(logits, None, 1.0, banned)
    assert torch.equal(ids, logits.argmax(-1)) and torch.equal(logprobs, logits.log_softmax(-1).amax(-1))
