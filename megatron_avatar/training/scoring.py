"""A step's rewards, made beside the GPU's work: rules in threads and processes, the judge over HTTP."""

from __future__ import annotations

import io
import logging
import math
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_avatar.config.families import Family, family_of
from megatron_avatar.config.schema import Config, JudgeConfig
from megatron_avatar.data.features import unpatchify, with_colours
from megatron_avatar.endpoint import Endpoint, Replies
from megatron_avatar.policy.architecture import read_model_type
from megatron_avatar.policy.backend import Backend
from megatron_avatar.policy.generate import GenerationStopped
from megatron_avatar.records import Group, Prompt, Sample
from megatron_avatar.resilience.stopping import StopSignal
from megatron_avatar.rl.rewards import RuleJudge, judge_rewards, own, score_group
from megatron_avatar.rl.rewards.http_judge import VERDICT_TOKENS, HttpJudge, Verdict, probe, read_verdict

THREADS = 16  # groups that are scored at once; they mostly wait
ENOUGH = 100  # completions, before their unscored share says something
POLL_S = 0.2
log = logging.getLogger(__name__)
Scored = tuple[list[tuple[float, dict[str, float]]], list[float]]  # (reward, parts), and the judge's own verdicts


class JudgeSilent(RuntimeError):
    """The judge leaves too many completions without a verdict."""


UNSCORED = (JudgeSilent, own.OwnRewardFailed)  # what stops a run whose completions can't be scored, its state saved


class Scoring:
    """Scores a step's groups. One rank of each model replica does it and tells the others, so that a reward never
    depends on which of them was slow.

    Raises ConnectionError where the judge's endpoint isn't ready after judge.wait_s, ValueError where it never will be.
    """

    def __init__(self, config: Config, backend: Backend) -> None:
        self._config, self._backend = config, backend
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="reward")
        self._recent: deque[tuple[int, int]] = deque()  # (unscored, asked) of the latest steps
        self._scores = backend.tp_rank == 0 and backend.is_last_stage
        self._asks = bool(config.judge.endpoint) and any(s.rewards.get("judge") for s in config.stages.values())
        self._endpoint: Endpoint | None = None
        self._family: Family | None = None  # of the policy, where a judge is shown what it saw
        self._judge: RuleJudge | HttpJudge = RuleJudge()
        if self._asks and self._scores:
            owner = f"rank-{backend.rank}"
            replies = Replies(Path(config.output_dir) / "judge", owner, write=not config.replay_step)
            self._endpoint = judge_endpoint(config.judge, replies)
            self._judge = HttpJudge(self._endpoint)
            self._family = with_colours(family_of(read_model_type(config.model.path)), config.model.path)
        problem = None
        if self._endpoint is not None:
            try:
                self._endpoint.wait_until_ready(config.judge.wait_s, probe(config.judge.frames))
            except (ValueError, ConnectionError) as error:
                problem = (ValueError if isinstance(error, ValueError) else ConnectionError, str(error))
        if self._asks and (problems := [p for p in backend.all_gather_object(problem) if p]):
            kind, reason = problems[0]
            raise kind(f"judge.endpoint: {reason}")

    def start(self, groups: list[Group], samples: Mapping[str, Sample], weights: dict[str, float]) -> list[Future]:
        """Begin to score; returns at once. Empty on ranks that are told the result."""
        if not self._scores:
            return []
        looks = self._endpoint is not None and weights.get("judge", 0) > 0
        return [
            self._threads.submit(
                self._score, samples[g.prompt.sample_id], [t.text for t in g.trajectories], weights,
                g.prompt if looks else None,
            )
            for g in groups
        ]

    def _score(self, sample: Sample, texts: list[str], weights: dict[str, float], prompt: Prompt | None) -> Scored:
        rl, verdicts = self._config.rl, []
        weights = {name: weight for name, weight in weights.items() if weight}  # a stage may switch one off by 0
        if weights.get("judge", 0) > 0:
            shown = pictures(prompt, self._config.judge.frames, self._family) if prompt and self._family else []
            verdicts = judge_rewards(self._judge, sample, texts, shown)
        mine = {name: own.score(name, place, texts, sample) for name, place in rl.rewards.items() if weights.get(name)}
        scored = score_group(sample, texts, weights, verdicts, numerical=rl.numerical, self_reward=rl.self_reward,
                             own=mine)
        return scored, verdicts

    def finish(self, groups: list[Group], scores: list[Future], stop: StopSignal) -> dict[str, float]:
        """Set reward and parts of every trajectory; all ranks call it. Returns what to log of an HTTP judge.

        Raises GenerationStopped on all ranks if any was told to stop, and JudgeSilent and OwnRewardFailed likewise.
        """

        def collect() -> list[Scored] | str:
            while wait(scores, POLL_S).not_done:
                if stop.requested:  # no sign of life: a hung reward is the watchdog's
                    raise GenerationStopped
            try:
                return [future.result() for future in scores]
            except own.OwnRewardFailed as error:  # told to all ranks first: none may wait for another
                return str(error)

        results = self._backend.broadcast_from_last_stage(stop.guard(collect, self._backend))
        if self._config.rl.rewards:
            self._refuse(self._backend.all_gather_object(results if isinstance(results, str) else None))
        unscored = asked = 0
        for group, (scored, verdicts) in zip(groups, results, strict=True):
            for trajectory, (reward, parts) in zip(group.trajectories, scored, strict=True):
                trajectory.reward, trajectory.parts = reward, parts
            asked += len(verdicts)
            unscored += sum(map(math.isnan, verdicts))
        return self._watch(unscored, asked) if self._asks else {}

    @staticmethod
    def _refuse(failures: list[str | None]) -> None:
        if reasons := [reason for reason in failures if reason]:
            raise own.OwnRewardFailed(f"{reasons[0]}. Mend it; the same command goes on from the latest checkpoint")

    def _watch(self, unscored: int, asked: int) -> dict[str, float]:
        """The step's unscored share over all ranks; JudgeSilent where that of the latest steps passes the limit."""
        step = np.sum(self._backend.all_gather_object_dp((unscored, asked)), axis=0)
        if not step[1]:
            return {}
        self._recent.append((int(step[0]), int(step[1])))
        while sum(asked for _, asked in list(self._recent)[1:]) >= ENOUGH:
            self._recent.popleft()
        missing, total = np.sum(self._recent, axis=0)
        limit = self._config.judge.max_unscored
        if total >= ENOUGH and missing > limit * total:
            raise JudgeSilent(
                f"the judge at {self._config.judge.endpoint} left {missing} of the last {total} completions without a "
                f"verdict, more than judge.max_unscored={limit:g} allows{self._reasons()}. See that it runs, or raise "
                "judge.deadline_s; the same command goes on from the latest checkpoint"
            )
        return {"judge/unscored": float(step[0] / step[1])}

    def _reasons(self) -> str:
        failures = self._endpoint.failures if self._endpoint is not None else {}
        most = sorted(failures, key=failures.__getitem__, reverse=True)[:3]
        return f" ({', '.join(f'{reason}: {failures[reason]} times' for reason in most)})" if most else ""

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        if self._endpoint is not None:
            self._endpoint.close()


def judge_endpoint(judge: JudgeConfig, replies: Replies | None) -> Endpoint[dict[str, float]]:
    """The client of the configured judge."""
    return Endpoint(
        judge.endpoint, judge.model, read_verdict, schema=Verdict.model_json_schema(), max_tokens=VERDICT_TOKENS,
        concurrency=judge.concurrency, deadline_s=judge.deadline_s, retries=judge.retries, replies=replies,
    )


def pictures(prompt: Prompt, count: int, family: Family) -> list[bytes]:
    """JPEGs of at most `count` of the frames and pictures that the policy saw, evenly spread over them."""
    if prompt.pixels is None or prompt.grid_thw is None:
        return []
    frames, start = [], 0
    for grid in prompt.grid_thw.tolist():
        patches = math.prod(grid)
        shown = unpatchify(prompt.pixels[start : start + patches], tuple(grid), family)
        frames += list(shown[:: 1 if grid[0] > 1 else 2])  # a picture is there twice
        start += patches
    chosen = np.unique(np.rint(np.linspace(0, len(frames) - 1, min(count, len(frames)))).astype(int))
    return [_jpeg(frames[k]) for k in chosen]


def _jpeg(frame: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
