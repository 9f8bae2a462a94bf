"""Which rows decode together, and when: prompts wait for room, rows that finish leave it to others.

A lane is a set of rows that take their turns together. There are as many lanes as pipeline stages, so that every
stage has one to work on. All ranks of a model replica plan alike, from the same prompts and the same tokens.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_avatar.policy.cache import PAGE, KeyValueCache, Room
from megatron_avatar.policy.micro_batches import lanes_of

MAX_ROWS = 256  # in flight over all lanes
READ_TOKENS = 8192  # of prompts read in one turn; a longer prompt has a turn of its own


@dataclass(frozen=True)
class Job:
    """A prompt that a lane reads once, the tokens of it that are kept, and the rows (numbers) that continue it."""

    prompt: int
    length: int
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Turn:
    """One pass of a lane through the stages: either jobs whose prompts are read, or rows that get a token each."""

    jobs: list[Job]
    rows: np.ndarray


def make_jobs(lengths: Sequence[int], n: int, lanes: int) -> list[Job]:
    """One job a prompt of `lengths` kept tokens and n rows, numbered prompt by prompt; more where there are fewer
    prompts than lanes."""
    jobs = []
    for prompt, (length, parts) in enumerate(zip(lengths, lanes_of(len(lengths), n, lanes), strict=True)):
        for rows in np.array_split(np.arange(prompt * n, (prompt + 1) * n), parts):
            jobs.append(Job(prompt, length, tuple(rows.tolist())))
    return jobs


def plan_room(jobs: Sequence[Job], steps: int, lanes: int, tokens: int) -> Room:
    """A lane's room, where all lanes together may hold the keys and values of `tokens` tokens.

    As many jobs at a time as fit with all of their rows, each with `steps` tokens; what is left holds prompts whose
    rows wait for single places. Raises ValueError where not even the longest prompt fits with one row.
    """
    page = min(PAGE, max(16, -(-max(job.length for job in jobs) // 16) * 16))
    widest = max(len(job.rows) for job in jobs)
    sizes = sorted((-(-job.length // page) for job in jobs), reverse=True)
    share, most_rows = tokens // lanes, max(1, MAX_ROWS // lanes)
    if sizes[0] * page + steps > share:
        raise ValueError(
            f"a prompt of {max(job.length for job in jobs) + 1} tokens and {steps} new tokens don't fit in the memory "
            f"left for keys and values, which holds {share} tokens: lower the prompts' length or max_new_tokens, or "
            "raise parallel.tp or parallel.pp"
        )
    rows = min(most_rows, widest, (share - sizes[0] * page) // steps)
    used = list(itertools.accumulate(sizes[: -(-len(jobs) // lanes)]))
    for count, pages in enumerate(used, 1):
        if min(count * widest, most_rows) * steps + pages * page <= share:
            rows = min(count * widest, most_rows)
    return Room(min(used[-1], (share - rows * steps) // page), page, rows, steps, widest, sizes[0])


class Lane:
    """Rows that decode together, and their cache. `rows` are their numbers, in the cache's order."""

    def __init__(self, cache: KeyValueCache) -> None:
        self.cache = cache
        self.rows = np.zeros(0, np.int64)
        self._jobs: dict[int, Job] = {}  # by the number of their first row, which names them in the cache
        self._waiting: deque[tuple[int, int]] = deque()  # rows of admitted jobs, and those, without room yet

    @property
    def empty(self) -> bool:
        return not self._jobs

    def plan(self, queue: deque[Job], empty_lanes: int) -> Turn | None:
        """The next turn: read what there is room for, else a token for every row; None with nothing to do.

        A lane leaves jobs in the queue to the `empty_lanes` (itself among them, if it is empty).
        """
        share = -(-len(queue) // max(1, empty_lanes)) if self.empty or not empty_lanes else 0
        reading: list[Job] = []
        tokens = 0
        while queue and len(reading) < share and len(self.rows) + len(self._waiting) < self.cache.room.rows:
            length = queue[0].length
            if not self.cache.fits(length) or (reading and tokens + length > READ_TOKENS):
                break
            job, tokens = queue.popleft(), tokens + length
            reading.append(job)
            self._jobs[job.rows[0]] = job
            self._waiting += [(row, job.rows[0]) for row in job.rows]
            self.cache.admit(job.rows[0], length)
        free = self.cache.room.rows - len(self.rows)
        joining = [self._waiting.popleft() for _ in range(min(len(self._waiting), free))]
        if joining:
            self.rows = np.append(self.rows, [row for row, _ in joining])
            self.cache.add_rows([job for _, job in joining])
        reading = [job for job in reading if job.length]
        if not reading and not len(self.rows):
            return None
        return Turn(reading, self.rows[:0] if reading else self.rows)

    def leave(self, done: np.ndarray) -> None:
        """Rows for which `done` [R] is true give their room to others, and so do prompts without rows."""
        if not done.any():
            return
        self.rows = self.rows[self.cache.keep_rows(~done)]
        needed = {*self.cache.prompts, *(job for _, job in self._waiting)}
        for job in sorted(self._jobs.keys() - needed):
            self.cache.drop(job)
            del self._jobs[job]
