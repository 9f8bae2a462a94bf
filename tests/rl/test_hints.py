import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_avatar.config.schema import HintConfig
from megatron_avatar.rl.hints import HintPolicy
from megatron_avatar.rl.tracker import RewardTracker


def crowd(below: int = 0) -> RewardTracker:
    """Twenty other prompts, `below` of them worse than the prompt under test will be at reward 0.5."""
    tracker = RewardTracker(window=1)
    for k in range(20):
        tracker.update(f"other{k}", "plain", [0.1 if k < below else 0.9], solved=False)
    return tracker


def visit(policy: HintPolicy, tracker: RewardTracker, reward: float = 0.0, solved: bool = False, **kl) -> str:
    """One visit of prompt `q` as a step makes it; the variant that was shown."""
    variant = policy.variant("q", has_hint=True)
    tracker.update("q", variant, [reward], solved=solved)
    policy.update("q", variant, **kl)
    return variant


def test_injected_after_patience_and_every_fourth_visit_plain() -> None:
    tracker = crowd()
    policy = HintPolicy(HintConfig(), tracker)
    shown = [visit(policy, tracker) for _ in range(11)]
    assert shown == ["plain"] * 3 + ["hinted"] * 3 + ["plain"] + ["hinted"] * 3 + ["plain"]
    assert policy.in_use == 1
    assert policy.variant("q", has_hint=False) == "plain" and policy.variant("other0", has_hint=True) == "plain"


def test_visits_of_one_step_count_one_by_one() -> None:
    """Two visits a step see the same variants in turn as single ones do."""
    tracker = crowd()
    policy = HintPolicy(HintConfig(), tracker)
    shown = []
    for _ in range(7):
        variants = [policy.variant("q", has_hint=True, ahead=k) for k in range(2)]
        for variant in variants:
            tracker.update("q", variant, [0.0], solved=False)
        for variant in variants:
            policy.update("q", variant)
        shown += variants
    # The third visit brings the hint; the fourth, of the same step and still plain, is the first of four from then on.
    assert shown == ["plain"] * 4 + ["hinted"] * 2 + ["plain"] + ["hinted"] * 3 + ["plain"] + ["hinted"] * 3


def test_a_solved_completion_restarts_the_streak() -> None:
    tracker = crowd()
    policy = HintPolicy(HintConfig(patience=3), tracker)
    shown = [visit(policy, tracker, solved=k == 2) for k in range(7)]
    assert shown == ["plain"] * 6 + ["hinted"]


@pytest.mark.parametrize(("below", "hinted"), [(7, True), (8, False), (15, False)])
def test_only_hard_prompts_are_hinted(below: int, hinted: bool) -> None:
    """Of 21 prompts the lowest eight are hard."""
    tracker = crowd(below)
    policy = HintPolicy(HintConfig(), tracker)
    assert ("hinted" in [visit(policy, tracker, reward=0.5) for _ in range(6)]) == hinted == policy.in_use


@pytest.mark.parametrize(("below", "stays"), [(8, True), (9, False)])
def test_withdrawn_beyond_the_hysteresis(below: int, stays: bool) -> None:
    """Of 21 prompts, rank (8 + 0.5) / 21 = 0.405 is above the hard tier but within 0.05 of it; 0.452 is not."""
    tracker = crowd(below)
    policy = HintPolicy(HintConfig(plain_every=2), tracker)
    for _ in range(3):
        visit(policy, tracker)
    assert visit(policy, tracker) == "hinted"
    assert visit(policy, tracker, reward=0.5) == "plain"
    assert tracker.tier("q") == "medium" and policy.in_use == stays
    assert visit(policy, tracker) == ("hinted" if stays else "plain")


def test_a_prompt_that_others_fell_below_is_shown_plain_at_once() -> None:
    tracker = crowd()
    policy = HintPolicy(HintConfig(), tracker)
    for _ in range(3):
        visit(policy, tracker, reward=0.5)
    assert policy.variant("q", True) == "hinted"
    for k in range(15):
        tracker.update(f"other{k}", "plain", [0.1], solved=False)
    assert policy.variant("q", True) == "plain"
    visit(policy, tracker, reward=0.5)
    assert policy.in_use == 0


def test_hinted_visits_do_not_move_plain_history() -> None:
    """Hinted successes neither end the streak nor raise the tier."""
    tracker = crowd()
    policy = HintPolicy(HintConfig(), tracker)
    for _ in range(3):
        visit(policy, tracker)
    assert [visit(policy, tracker, reward=1.0, solved=True) for _ in range(3)] == ["hinted"] * 3
    assert tracker.streak("q") == 3 and tracker.tier("q") == "hard" and policy.in_use == 1


def test_the_kl_threshold_replaces_the_streak() -> None:
    tracker = crowd()
    policy = HintPolicy(HintConfig(kl_threshold=0.01), tracker)
    assert [visit(policy, tracker, kl=0.5) for _ in range(5)] == ["plain"] * 5
    assert [visit(policy, tracker, kl=0.001) for _ in range(2)] == ["plain", "hinted"]


def test_switched_off() -> None:
    tracker = crowd()
    policy = HintPolicy(HintConfig(enabled=False), tracker)
    assert {visit(policy, tracker) for _ in range(8)} == {"plain"}


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), max_size=25), st.integers(0, 25), st.integers(1, 4))
def test_resumed_anywhere_it_continues_alike(outcomes: list, cut: int, plain_every: int) -> None:
    shown = []
    for interrupted in (False, True):
        tracker = crowd(6)
        policy = HintPolicy(HintConfig(plain_every=plain_every, patience=2), tracker)
        row = []
        for k, (reward, solved) in enumerate(outcomes):
            if interrupted and k == cut:
                state = json.dumps([tracker.state_dict(), policy.state_dict()])
                tracker = RewardTracker(window=1)
                policy = HintPolicy(HintConfig(plain_every=plain_every, patience=2), tracker)
                for part, saved in zip((tracker, policy), json.loads(state), strict=True):
                    part.load_state_dict(saved)
            row.append(visit(policy, tracker, reward, solved))
        shown.append(row)
    assert shown[0] == shown[1]
    assert plain_every > 1 or "hinted" not in shown[0]
