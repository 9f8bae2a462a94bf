import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_avatar.config.schema import ReplayConfig
from megatron_avatar.config.validate import REPLAY_ORDERS
from megatron_avatar.records import Completion, Trajectory
from megatron_avatar.rl.replay.buffer import ReplayBuffer
from megatron_avatar.rl.tracker import TIERS, RewardTracker


def trajectory(sample_id: str, step: int = 0, *, k: int = 0, reward: float = 0.5, kl: float = 0.0,
               variant: str = "plain") -> Trajectory:
    """`k` tells completions of one visit apart."""
    completion = Completion(np.array([k, 7]), np.array([-0.5, -k], np.float32), True)
    return Trajectory(sample_id, variant, completion, reward, {"accuracy": reward}, kl, "ref", "stage", step, step, "t")


def buffer(**config) -> ReplayBuffer:
    """The paper's draw unless told otherwise."""
    return ReplayBuffer(ReplayConfig(**{"min_fill": 1, "live": False, "order": "priority", "max_age": 0, **config}))


def draw(b: ReplayBuffer, tiers: dict, *, n: int = 8, n_off: int = 4, step: int = 1000, key: str = "k",
         baseline: float | None = 0.5, sigma: float = 0.5) -> list[list[Trajectory]]:
    return b.draw(n, n_off, step, tiers, lambda *_: baseline, sigma, key)


def content(t: Trajectory) -> tuple:
    return t.sample_id, t.variant, t.step, tuple(t.completion.token_ids.tolist())


def contents(groups: list[list[Trajectory]]) -> list[list[tuple]]:
    return [[content(t) for t in group] for group in groups]


prompts = [f"p{k}" for k in range(9)]
tier_maps = st.fixed_dictionaries({p: st.sampled_from(TIERS) for p in prompts})
# Steps of visits: (prompt, variant) with a few completions each.
histories = st.lists(
    st.lists(st.tuples(st.sampled_from(prompts), st.sampled_from(["plain", "hinted"]), st.integers(1, 4)), max_size=5,
             unique_by=lambda visit: visit[:2]),
    max_size=7,
)


def steps_of(history: list) -> list[list[Trajectory]]:
    return [
        [trajectory(p, step, k=k, reward=0.1 * k, variant=v) for p, v, n in visits for k in range(n)]
        for step, visits in enumerate(history)
    ]


# ---- keeping ---------------------------------------------------------------------------------


@settings(deadline=None)
@given(histories, st.lists(tier_maps, min_size=7, max_size=7), st.integers(1, 25))
def test_each_tier_is_cut_to_its_capacity_its_oldest_first(history: list, tier_maps: list, capacity: int) -> None:
    """Against a model that appends to one list and cuts it tier by tier, as tiers stand at each step."""
    b = buffer(capacity=capacity)
    edges = [round(capacity * share) for share in (0, 0.25, 0.60, 1)]
    room = {tier: edges[k + 1] - edges[k] for k, tier in enumerate(TIERS)}
    assert sum(room.values()) == capacity
    for rows, tiers in zip(steps_of(history), tier_maps, strict=False):
        before = [content(t) for t in b.trajectories.values()]
        b.append(rows, tiers)
        after = [content(t) for t in b.trajectories.values()]
        assert set(after) <= set(before) | {content(t) for t in rows}
        for tier in TIERS:
            old = [c for c in before if tiers[c[0]] == tier]
            kept = [c for c in after if tiers[c[0]] == tier]
            arrived = sum(tiers[t.sample_id] == tier for t in rows)
            assert len(kept) == min(room[tier], len(old) + arrived) == b.tier_sizes(tiers)[tier]
            survivors = [c for c in kept if c in set(old)]
            assert survivors == old[len(old) - len(survivors) :]  # the newest of the old ones
            assert len(survivors) == max(0, min(len(old), room[tier] - arrived))
    assert [t.step for t in b.trajectories.values()] == sorted(t.step for t in b.trajectories.values())


@settings(deadline=None)
@given(histories, tier_maps, st.randoms(), st.sampled_from(REPLAY_ORDERS))
def test_ranks_that_gather_in_another_order_agree(
    history: list, tiers: dict, shuffle: random.Random, order: str
) -> None:
    ours, theirs = buffer(order=order, capacity=20), buffer(order=order, capacity=20)
    for rows in steps_of(history):
        ours.append(rows, tiers)
        shuffle.shuffle(rows)
        theirs.append(rows, dict(reversed(tiers.items())))
    assert contents(draw(ours, tiers)) == contents(draw(theirs, tiers))
    assert [content(t) for t in ours.trajectories.values()] == [content(t) for t in theirs.trajectories.values()]


def test_restored_continues_alike_and_tiers_move_with_prompts() -> None:
    tiers = dict.fromkeys(prompts, "easy")
    b = buffer(capacity=40)
    for step in range(4):
        b.append([trajectory(p, step, k=k) for p in prompts[:3] for k in range(2)], tiers)
    assert b.tier_sizes(tiers) == {"easy": 10, "medium": 0, "hard": 0}
    assert b.tier_sizes({**tiers, "p0": "hard"})["hard"] > 0  # derived now, not stored
    restored = buffer(capacity=40)
    restored.restore(dict(reversed(b.trajectories.items())))
    for each in (b, restored):
        each.append([trajectory("p5", 4, k=k) for k in range(4)], tiers)
    assert list(restored.trajectories) == list(b.trajectories)
    assert contents(draw(restored, tiers)) == contents(draw(b, tiers))
    b.reset()
    assert len(b) == 0 and draw(b, tiers) == []


def test_texts_are_dropped_and_rescoring_renames() -> None:
    b = buffer()
    original = trajectory("p0", reward=0.25)
    b.append([original], {})
    (serial,), (kept,) = b.trajectories, b.trajectories.values()
    assert kept == replace(original, text="", completion=kept.completion) and original.text == "t"
    b.rescore(lambda parts: 2 * parts["accuracy"])
    (new_serial,), (rescored,) = b.trajectories, b.trajectories.values()
    assert rescored.reward == 0.5 and kept.reward == 0.25 and new_serial != serial


# ---- drawing ---------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    histories, tier_maps, st.integers(1, 20), st.integers(1, 5), st.integers(0, 8), st.integers(0, 4),
    st.sampled_from(REPLAY_ORDERS), st.text(max_size=5),
)
def test_a_draw_keeps_its_promises(
    history: list, tiers: dict, n: int, n_off: int, step: int, max_age: int, order: str, key: str
) -> None:
    b = buffer(order=order, max_age=max_age)
    for rows in steps_of(history):
        b.append(rows, tiers)
    held = list(b.trajectories.values())
    groups = draw(b, tiers, n=n, n_off=n_off, step=step, key=key)
    flat = [content(t) for group in groups for t in group]
    eligible = [t for t in held if t.step < step and (not max_age or step - t.step <= max_age)]
    by_prompt = Counter((t.sample_id, t.variant) for t in eligible)

    assert len(flat) == len(set(flat)) and set(flat) <= {content(t) for t in eligible}  # earlier, no replacement
    names = [{(t.sample_id, t.variant) for t in group} for group in groups]
    assert all(len(name) == 1 for name in names) and len(groups) == len({*map(tuple, names)})
    assert all(1 <= len(group) <= n_off for group in groups)
    # Until enough are drawn or nothing is left; only the last group may be cut.
    assert len(flat) == min(n, sum(min(n_off, count) for count in by_prompt.values()))
    for name, group in list(zip(names, groups, strict=True))[:-1]:
        assert len(group) == min(n_off, by_prompt[next(iter(name))])
    assert contents(draw(b, tiers, n=n, n_off=n_off, step=step, key=key)) == contents(groups)  # repeatable
    assert list(b.trajectories.values()) == held  # changes nothing


def test_nothing_below_the_minimum_fill() -> None:
    b = buffer(min_fill=10)
    b.append([trajectory(f"p{k}") for k in range(9)], {})
    assert draw(b, {}) == []
    b.append([trajectory("p9", step=1)], {})
    assert draw(b, {}, step=1) == []  # the tenth is of this very step
    assert sum(map(len, draw(b, {}, step=2))) == 8


def full(per_tier: dict[str, int], **config) -> tuple[ReplayBuffer, dict[str, str]]:
    """A buffer with that many prompts of two trajectories a tier."""
    tiers = {f"{tier}{k}": tier for tier, count in per_tier.items() for k in range(count)}
    b = buffer(**config)
    b.append([trajectory(p, k=k) for p in tiers for k in range(2)], tiers)
    return b, tiers


def tier_counts(b: ReplayBuffer, tiers: dict, groups: int, key: str) -> list[int]:
    drawn = Counter(tiers[g[0].sample_id] for g in draw(b, tiers, n=2 * groups, n_off=2, key=key))
    return [drawn[tier] for tier in TIERS]


@pytest.mark.parametrize("groups", [1, 3, 8])
def test_tiers_are_drawn_in_proportion(groups: int) -> None:
    b, tiers = full(dict.fromkeys(TIERS, 20))
    counts = np.array([tier_counts(b, tiers, groups, f"k{k}") for k in range(600)])
    exact = groups * np.array([0.25, 0.35, 0.40])
    assert (np.abs(counts - exact) < 1).all()  # every single draw is stratified
    np.testing.assert_allclose(counts.mean(0), exact, atol=0.08)


@pytest.mark.parametrize(
    ("per_tier", "expected"),
    [
        ({"easy": 0, "medium": 20, "hard": 20}, [0, 20 * 0.35 / 0.75, 20 * 0.40 / 0.75]),
        ({"easy": 40, "medium": 1, "hard": 40}, [19 * 0.25 / 0.65, 1, 19 * 0.40 / 0.65]),
        ({"easy": 2, "medium": 30, "hard": 3}, [2, 15, 3]),
        ({"easy": 1, "medium": 2, "hard": 3}, [1, 2, 3]),
    ],
)
def test_a_short_tier_lends_its_share_in_proportion(per_tier: dict, expected: list[float]) -> None:
    b, tiers = full(per_tier)
    counts = np.array([tier_counts(b, tiers, 20, f"k{k}") for k in range(60)])
    assert (np.abs(counts - expected) < 1).all()
    np.testing.assert_allclose(counts.mean(0), expected, atol=0.25)


def test_short_groups_are_made_up_by_further_ones() -> None:
    b, tiers = full(dict.fromkeys(TIERS, 20))
    groups = draw(b, tiers, n=16, n_off=4)  # no prompt has more than two
    assert [len(g) for g in groups] == [2] * 8


def test_priority_is_successive_sampling_by_weight() -> None:
    """First draws are proportional to exp(score / T), score = A - 0.1 KL under today's R-bar."""
    rows = [("a", 1.0, 0.0), ("b", 0.5, 0.0), ("c", 0.5, 20.0), ("d", 0.0, 0.0)]
    b = buffer(temperature=2.0)
    b.append([trajectory(p, reward=r, kl=kl) for p, r, kl in rows], {})
    score = np.array([(r - 0.5) / 0.5 - 0.1 * kl for _, r, kl in rows])
    weight = np.exp(score / 2.0)
    n = 4000
    drawn = [[g[0].sample_id for g in draw(b, {}, n=2, n_off=1, key=f"k{k}")] for k in range(n)]
    first = Counter(pair[0] for pair in drawn)
    p = dict(zip("abcd", weight / weight.sum(), strict=True))
    both = Counter(frozenset(pair) for pair in drawn)
    tolerance = 4 * 0.5 / np.sqrt(n)
    pair_ab = p["a"] * p["b"] / (1 - p["a"]) + p["b"] * p["a"] / (1 - p["b"])
    assert abs(both[frozenset("ab")] / n - pair_ab) < tolerance
    assert all(abs(first[x] / n - p[x]) < tolerance for x in "abcd")
    assert abs(p["a"] - 0.25) > 2 * tolerance  # uniform drawing would fail


def test_a_groups_weight_is_the_sum_of_its_trajectories() -> None:
    b = buffer(order="uniform")
    b.append([trajectory("many", k=k) for k in range(9)] + [trajectory("one")], {})
    first = Counter(draw(b, {}, n=1, n_off=1, key=f"k{k}")[0][0].sample_id for k in range(1000))
    assert abs(first["many"] / 1000 - 0.9) < 0.04


def test_uniform_ignores_scores_and_fifo_takes_the_oldest() -> None:
    b = buffer(order="uniform")
    b.append([trajectory("good", reward=1.0), trajectory("bad", reward=0.0)], {})
    first = Counter(draw(b, {}, n=1, n_off=1, key=f"k{k}")[0][0].sample_id for k in range(1000))
    assert abs(first["good"] / 1000 - 0.5) < 0.07
    b = buffer(order="fifo")
    for step in (0, 1, 2):
        b.append([trajectory(p, step, k=k) for p in ("x", f"y{step}") for k in range(2)], {})
    groups = {g[0].sample_id: [t.step for t in g] for g in draw(b, {}, n=6, n_off=3)}
    assert groups == {"x": [0, 0, 1], "y0": [0, 0], "y1": [1]}


def test_scores_follow_todays_baseline_and_unknown_ones_are_neutral() -> None:
    b = buffer(temperature=0.01)  # nearly an argmax
    b.append([trajectory("a", reward=0.6), trajectory("b", reward=0.9), trajectory("c", reward=0.1)], {})

    def first(baselines: dict) -> str:
        return b.draw(1, 1, 9, {}, lambda i, _: baselines.get(i), 0.2, "k")[0][0].sample_id

    assert first({"a": 0.5, "b": 0.95, "c": 0.5}) == "a"
    assert first({"a": 0.7, "b": 0.95, "c": 0.0}) == "c"
    assert first({"a": 0.7, "b": 0.95}) == "c"  # no history: advantage 0 beats negative ones


def test_advantages_are_clipped_in_scores() -> None:
    b = buffer()
    b.append([trajectory("a", reward=1.0), trajectory("b", reward=0.5)], {})
    first = Counter(draw(b, {}, n=1, n_off=1, key=f"k{k}", baseline=0.0, sigma=0.0)[0][0].sample_id for k in range(400))
    assert abs(first["a"] / 400 - 0.5) < 0.1  # both 5 after floor and clip; 10 would always win


def test_the_clip_is_the_runs_own() -> None:
    """Rewards 0.6 and 1.0 are 1 and 5 deviations above the baseline: alike at a clip of 1, far apart at 5."""
    shares = []
    for clip in (1.0, 5.0):
        b = ReplayBuffer(ReplayConfig(min_fill=1, order="priority", max_age=0), advantage_clip=clip)
        b.append([trajectory("p0", reward=0.6), trajectory("p1", reward=1.0)], {})
        drawn = [draw(b, {}, n=1, n_off=1, sigma=0.1, key=str(k))[0][0].sample_id for k in range(300)]
        shares.append(drawn.count("p1") / 300)
    assert abs(shares[0] - 0.5) < 0.1 and shares[1] > 0.95


# ---- what has an advantage --------------------------------------------------------------------


@settings(deadline=None)
@given(
    histories, tier_maps, st.lists(st.sampled_from([None, 0.0, 0.1, 0.2, 0.3]), min_size=18, max_size=18),
    st.integers(1, 20), st.integers(1, 5), st.sampled_from(REPLAY_ORDERS),
)
def test_live_draws_are_those_of_a_buffer_without_the_dead(
    history: list, tiers: dict, means: list, n: int, n_off: int, order: str
) -> None:
    """Against the draw's promises over a buffer that never held what has no advantage under today's R-bar."""
    rbar = dict(zip([(p, v) for p in prompts for v in ("plain", "hinted")], means, strict=True))
    b = buffer(order=order, live=True)
    for rows in steps_of(history):
        b.append(rows, tiers)
    groups = b.draw(n, n_off, 1000, tiers, lambda *name: rbar[name], 0.5, "k")
    alive = [t for t in b.trajectories.values()
             if (mean := rbar[t.sample_id, t.variant]) is None or abs(t.reward - mean) > 1e-9]  # fmt: skip
    flat = [content(t) for group in groups for t in group]
    assert len(flat) == len(set(flat)) and set(flat) <= {content(t) for t in alive}
    by_prompt = Counter((t.sample_id, t.variant) for t in alive)
    assert len(flat) == min(n, sum(min(n_off, count) for count in by_prompt.values()))


def test_a_group_that_failed_alike_is_dead_until_its_baseline_moves() -> None:
    """The case of a prompt that is met once: R-bar is what each of its completions has."""
    tracker, b = RewardTracker(), buffer(live=True)
    rows = [trajectory("p0", k=k, reward=0.2) for k in range(4)]
    tracker.update("p0", "plain", [0.2] * 4, solved=False)
    b.append(rows, {})
    assert b.draw(4, 4, 9, {}, tracker.mean, b.reward_std, "k") == []
    tracker.update("p0", "plain", [0.2, 0.2, 0.2, 1.0], solved=True)
    assert [len(group) for group in b.draw(4, 4, 9, {}, tracker.mean, b.reward_std, "k")] == [4]


def test_the_largest_advantages_come_first_of_either_sign() -> None:
    """First draws are proportional to |A|^(1/T), A under today's R-bar, clipped."""
    rewards = {"a": 1.0, "b": 0.0, "c": 0.6, "d": 0.45}
    for temperature in (1.0, 2.0):
        b = buffer(order="advantage", temperature=temperature)
        b.append([trajectory(p, reward=r) for p, r in rewards.items()], {})
        weight = np.array([abs(r - 0.5) for r in rewards.values()]) ** (1 / temperature)
        n = 3000
        first = Counter(draw(b, {}, n=1, n_off=1, key=f"k{k}")[0][0].sample_id for k in range(n))
        assert all(abs(first[p] / n - w) < 4 * 0.5 / np.sqrt(n)
                   for p, w in zip(rewards, weight / weight.sum(), strict=True))  # fmt: skip
    b.append([trajectory("dead", step, reward=0.5) for step in range(9)], {})
    assert draw(b, {}, n=13, n_off=1)[-1][0].sample_id == "dead", "without an advantage it comes last, if at all"


def test_no_tier_always_comes_last() -> None:
    """Where a step's completions end in the middle of a group, each tier's turn is cut now and then."""
    b, tiers = full(dict.fromkeys(TIERS, 20))
    last = Counter(tiers[draw(b, tiers, n=15, n_off=2, key=f"k{k}")[-1][0].sample_id] for k in range(300))
    for tier, share in zip(TIERS, (0.25, 0.35, 0.40), strict=True):
        assert abs(last[tier] / 300 - share) < 0.12, last


@given(st.lists(st.floats(0, 1), max_size=20))
def test_the_spread_of_what_is_held(rewards: list[float]) -> None:
    b = buffer()
    b.append([trajectory("p0", k, reward=r) for k, r in enumerate(rewards)], {})
    assert b.reward_std == pytest.approx(np.std(rewards) if rewards else 0.0)
