"""Rooms for keys and values, and the turns that lanes take in them."""

import math
from collections import deque

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_avatar.policy.cache import PAGE
from megatron_avatar.policy.lanes import MAX_ROWS, READ_TOKENS, Lane, make_jobs, plan_room

lengths_of_prompts = st.lists(st.integers(0, 3000), min_size=1, max_size=12)


class HostCache:
    """What lanes use of a cache, checked against its room."""

    def __init__(self, room):
        self.room, self.prompts, self.pages = room, [], {}

    def fits(self, length):
        return sum(self.pages.values()) + math.ceil(length / self.room.page) <= self.room.pages

    def admit(self, prompt, length):
        assert self.fits(length)
        self.pages[prompt] = math.ceil(length / self.room.page)

    def drop(self, prompt):
        del self.pages[prompt]

    def add_rows(self, prompts):
        self.prompts += prompts
        assert len(self.prompts) <= self.room.rows and set(prompts) <= set(self.pages)

    def keep_rows(self, kept):
        order = kept.nonzero()[0][::-1]  # any order will do
        self.prompts = [self.prompts[i] for i in order]
        return order


@settings(max_examples=60, deadline=None)
@given(
    lengths=lengths_of_prompts,
    n=st.integers(1, 9),
    stages=st.sampled_from([1, 2, 4]),
    tokens=st.integers(25_000, 400_000),
    seed=st.integers(0, 99),
)
def test_every_row_gets_its_tokens(lengths, n, stages, tokens, seed):
    """Rows of random lengths through lanes in turn: each is read once, decodes to its end, and leaves room behind."""
    steps = 40
    rng = np.random.default_rng(seed)
    wanted = rng.integers(1, steps + 1, len(lengths) * n)
    counts = np.zeros(len(wanted), np.int64)
    queue = deque(make_jobs(lengths, n, stages))
    sizes = {job.rows: job.length for job in queue}
    assert sorted(row for job in queue for row in job.rows) == list(range(len(wanted)))
    room = plan_room(queue, steps, stages, tokens)
    assert stages * (room.pages * room.page + room.rows * steps) <= tokens and room.rows <= MAX_ROWS
    lanes = [Lane(HostCache(room)) for _ in range(stages)]
    read = []
    for tick in range(100_000):
        lane = lanes[tick % stages]
        turn = lane.plan(queue, sum(lane.empty for lane in lanes))
        if turn is None:
            if not queue and all(lane.empty for lane in lanes):
                break
            continue
        if turn.jobs:
            read += turn.jobs
            packed = sum(job.length for job in turn.jobs)
            assert not len(turn.rows) and (packed <= READ_TOKENS or len(turn.jobs) == 1)
        else:
            counts[turn.rows] += 1
            lane.leave(counts[turn.rows] == wanted[turn.rows])
    assert (counts == wanted).all() and not any(lane.cache.pages or lane.cache.prompts for lane in lanes)
    once = sorted(rows for rows, length in sizes.items() if length)  # a prompt of a single token needs no reading
    assert sorted(job.rows for job in read) == once


def test_a_row_that_leaves_makes_room_for_one_that_waits():
    jobs = deque(make_jobs([10, 20, 30], 2, 1))
    room = plan_room(jobs, 100, 1, 2 * 100 + 32)  # two rows, a prompt
    assert (room.rows, room.pages, room.page) == (2, 1, 32)
    lane = Lane(HostCache(room))
    assert [job.prompt for job in lane.plan(jobs, 1).jobs] == [0]
    assert lane.plan(jobs, 0).rows.tolist() == [0, 1]
    lane.leave(np.array([True, False]))
    assert lane.plan(jobs, 0).rows.tolist() == [1], "the next prompt has no pages yet"
    lane.leave(np.array([True]))
    assert [job.prompt for job in lane.plan(jobs, 1).jobs] == [1]


def test_rows_join_one_by_one():
    jobs = deque(make_jobs([10, 20], 3, 1))
    lane = Lane(HostCache(plan_room(jobs, 10, 1, 100)))
    assert lane.cache.room.rows == 3 and lane.cache.room.pages == 2
    assert lane.plan(jobs, 1).jobs and lane.plan(jobs, 0).rows.tolist() == [0, 1, 2]
    lane.leave(np.array([False, True, False]))
    assert [job.prompt for job in lane.plan(jobs, 0).jobs] == [1]
    assert sorted(lane.plan(jobs, 0).rows) == [0, 2, 3]
    lane.leave(np.array([True, True, False]))
    assert sorted(lane.plan(jobs, 0).rows) == [3, 4, 5]


def test_every_stage_has_a_lane_at_work():
    for prompts, n, stages in ((1, 8, 4), (3, 8, 4), (4, 2, 2), (9, 1, 4)):
        queue = deque(make_jobs([5] * prompts, n, stages))
        lanes = [Lane(HostCache(plan_room(queue, 8, stages, 10**6))) for _ in range(stages)]
        for lane in lanes:
            lane.plan(queue, sum(lane.empty for lane in lanes))
        rows = [len(lane.rows) for lane in lanes]
        assert min(rows) > 0 and sum(rows) == prompts * n and not queue, (prompts, n, stages)


def test_room_by_memory():
    jobs = make_jobs([1000] * 16, 4, 1)
    whole = plan_room(jobs, 200, 1, 10**6)
    assert (whole.rows, whole.pages, whole.page) == (64, 32, PAGE)
    half = plan_room(jobs, 200, 1, (whole.rows * 200 + whole.pages * PAGE) // 2)
    assert (half.rows, half.pages) == (32, 16)
    tight = plan_room(jobs, 200, 1, 2 * PAGE + 3 * 200)
    assert (tight.rows, tight.pages) == (3, 2), "not even one group: fewer rows at a time"
    with pytest.raises(ValueError, match="a prompt of 1001 tokens and 200 new tokens don't fit.*parallel.tp"):
        plan_room(jobs, 200, 1, 2 * PAGE + 199)
