import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_avatar.rl.shaping import between_tags, temporal_weights, token_places

lengths, lams = st.integers(1, 400), st.floats(0, 2)
SHAPES = ["parabolic", "uniform", "linear_decay", "linear_incline", "inverse_parabolic", "uniform_matched"]


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("parabolic", [1.3, 1.075, 1.0, 1.075, 1.3]),
        ("uniform", [1.0] * 5),
        ("linear_decay", [1.3, 1.225, 1.15, 1.075, 1.0]),
        ("linear_incline", [1.0, 1.075, 1.15, 1.225, 1.3]),
        ("inverse_parabolic", [1.0, 1.225, 1.3, 1.225, 1.0]),
        ("uniform_matched", [1.15] * 5),
    ],
)
def test_values_of_five_tokens(shape: str, expected: list[float]) -> None:
    torch.testing.assert_close(temporal_weights(5, shape, 0.3), torch.tensor(expected))


@given(lengths, lams)
def test_the_control_has_the_parabolas_mean(length: int, lam: float) -> None:
    parabola, control = (temporal_weights(length, s, lam).double() for s in ("parabolic", "uniform_matched"))
    closed_form = 1 + lam * ((length + 1) / (3 * (length - 1)) if length > 1 else 1)
    assert float(control[0]) == pytest.approx(float(parabola.mean()), rel=1e-5) == pytest.approx(closed_form, rel=1e-5)
    assert len(set(control.tolist())) == 1


@given(lengths, lams)
def test_relations_between_shapes(length: int, lam: float) -> None:
    w = {shape: temporal_weights(length, shape, lam) for shape in SHAPES}
    for weights in w.values():
        assert weights.shape == (length,) and weights.dtype == torch.float32
        assert weights.min() >= 1 and weights.max() <= 1 + lam + 1e-6
    torch.testing.assert_close(w["parabolic"], w["parabolic"].flip(0))
    torch.testing.assert_close(w["parabolic"] + w["inverse_parabolic"], torch.full((length,), 2 + lam))
    torch.testing.assert_close(w["linear_decay"] + w["linear_incline"], torch.full((length,), 2 + lam))
    assert float(w["parabolic"][0]) == pytest.approx(1 + lam) == float(w["linear_decay"][0])


@pytest.mark.parametrize("shape", SHAPES)
def test_no_height_is_no_shaping(shape: str) -> None:
    assert (temporal_weights(9, shape, 0.0) == 1).all()


def test_an_unknown_shape_names_the_setting() -> None:
    with pytest.raises(ValueError, match="rl.shaping.shape is 'cubic'.*parabolic"):
        temporal_weights(3, "cubic", 0.3)


# Tokens of any cut: Qwen's own, for one, join a tag's end with the line break behind it.
cuts = st.lists(st.integers(1, 9), min_size=60, max_size=60)
words = st.text("ab <>\n.", min_size=1, max_size=30)


def cut(text: str, sizes: list[int]) -> list[str]:
    pieces = []
    for size in sizes:
        pieces, text = [*pieces, text[:size]], text[size:]
    return [piece for piece in [*pieces, text] if piece]


@given(words.filter(str.strip), words.filter(str.strip), cuts)
def test_between_the_tags_are_the_tokens_that_touch_none(think: str, answer: str, sizes: list[int]) -> None:
    text = f"<think>{think}</think>\n<answer>{answer}</answer>"
    pieces = [*cut(text, sizes), "<|im_end|>"]
    inside = between_tags(pieces)
    found, start = [], 0
    # Oracle: a character belongs to the reasoning or the answer, by a regular expression; a token by all of its own.
    match = re.fullmatch(r"<think>(.*)</think>\n<answer>(.*)</answer>", text, re.DOTALL)
    content = {place for block in (1, 2) for place in range(*match.span(block))}
    for piece in pieces:
        found.append(set(range(start, start + len(piece))) <= content)
        start += len(piece)
    assert inside.tolist() == (found if any(found) else [True] * len(pieces))


@pytest.mark.parametrize("text", ["no tags", "<think>a</think>", "<think>a</think><answer></answer>",
                                  "<answer>a</answer>", "<think>a</think><answer>b</answer><answer>c</answer>"])
def test_without_the_format_the_whole_completion_counts(text: str) -> None:
    assert between_tags(list(text)).all()


@given(st.lists(st.booleans(), min_size=1, max_size=50).filter(any), lams, st.sampled_from(SHAPES))
def test_the_weighting_runs_over_what_is_inside(mask: list[bool], lam: float, shape: str) -> None:
    inside = torch.tensor(mask)
    weights = temporal_weights(len(mask), shape, lam, inside)
    torch.testing.assert_close(weights[inside], temporal_weights(sum(mask), shape, lam), atol=0, rtol=0)
    assert (weights[~inside] == 1).all()
    places = token_places(len(mask), inside)
    assert places[~inside].isnan().all() and places[inside].tolist() == token_places(sum(mask)).tolist()
