"""The training loop: a run is a list of stages, a stage is a list of steps, a step reads top to bottom."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_avatar.config import check_world, save_config
from megatron_avatar.config.asked import asked, other_words
from megatron_avatar.config.checks import check_folder, check_same_model, check_same_run, model_sizes
from megatron_avatar.config.schema import Config
from megatron_avatar.data.loader import MediaLoader, SampleOrder
from megatron_avatar.data.manifest import load_manifest
from megatron_avatar.data.prompt import PromptBuilder, load_tokenizer
from megatron_avatar.files import replacing
from megatron_avatar.policy.backend import Backend
from megatron_avatar.policy.build import build_policy
from megatron_avatar.policy.generate import GenerationStopped, generate
from megatron_avatar.policy.sampling import truncates
from megatron_avatar.policy.weights import export_hf, load_hf
from megatron_avatar.records import Group, Prompt, Sample, Trajectory, Variant
from megatron_avatar.resilience import attempts, checkpoint, lock
from megatron_avatar.resilience.replay_shards import ReplayShards
from megatron_avatar.resilience.saver import Saver
from megatron_avatar.resilience.stopping import StopSignal
from megatron_avatar.resilience.watchdog import Watchdog
from megatron_avatar.rl.hints import HintPolicy
from megatron_avatar.rl.replay.buffer import ReplayBuffer
from megatron_avatar.rl.rewards import combine
from megatron_avatar.rl.step import (
    assign_on_policy,
    choose_prompts,
    commit,
    draw_replay,
    rewards_of,
    turn_accuracy,
)
from megatron_avatar.rl.tracker import RewardTracker
from megatron_avatar.training import metrics, provenance
from megatron_avatar.training.balance import deal, packed_tokens
from megatron_avatar.training.evaluate import evaluate
from megatron_avatar.training.format_watch import FormatWatch
from megatron_avatar.training.guard import Guard
from megatron_avatar.training.learner import Learner
from megatron_avatar.training.optim import Optimization, build_optimizer
from megatron_avatar.training.rollout import embed, keeps_embeddings, load_prompts, make_groups, share_visits
from megatron_avatar.training.scoring import UNSCORED, Scoring
from megatron_avatar.training.sft import sft_groups
from megatron_avatar.training.stage_data import check_stages, held_out_samples, measure_lengths, stage_samples
from megatron_avatar.training.telemetry import Telemetry, plain

SETTLE_S = 60.0  # a failing rank's patience with a checkpoint that is being written
log = logging.getLogger(__name__)


class Interrupted(Exception):
    """A stop signal ended the run after its state was saved; the same command continues it."""


class Run:
    """Everything that lives for the whole run; what lives for a stage is set by `enter_stage`."""

    def __init__(self, config: Config, backend: Backend) -> None:
        self.config, self.backend = config, backend
        self.folder = Path(config.output_dir)
        self.stop = StopSignal()
        manifest = Path(config.data.manifest)
        self.samples = {s.id: s for s in load_manifest(manifest)}
        check_stages(config, self.samples)
        self.scoring = Scoring(config, backend)  # the judge has to answer before weights are read
        tokenizer = load_tokenizer(config.model.path)
        provenance.introduce(config, backend)
        self.policy = build_policy(config.model.path, backend, config.model, config.parallel, seed=config.seed)
        self.builder = PromptBuilder(tokenizer, self.policy.hf_config, config.data, config.model.context)
        self.prompt_tokens, self.estimates = measure_lengths(config, self.samples, self.builder)
        load_hf(self.policy, config.model.path)  # last, as it takes minutes: all that may be refused comes before
        self.loader = MediaLoader(self.builder, manifest.parent, config.data.workers, config.data.decode_deadline_s)
        self.keeps_embeddings = keeps_embeddings(config, backend)
        self.telemetry = Telemetry(self.folder, config, backend)
        self.saver, self.apart = Saver(), backend.apart()
        self.format = FormatWatch()
        self.guard = Guard(config.rl.guard, exact=config.model.dtype == "float32")
        self._optimization: Optimization | None = None  # made with the first stage
        self.buffer: ReplayBuffer | None = None  # the stage's, as are tracker and hints
        self.tracker = RewardTracker(window=config.rl.vcrs_window)
        self.hints: HintPolicy | None = None
        self.shards = ReplayShards(self.folder, self.apart)
        self.step = 0  # optimizer steps applied, over all stages
        self.saved: int | None = None  # step of the newest checkpoint
        self.saved_at = time.monotonic()  # when it was taken, or the run began
        self.completions_generated = 0
        self.fresh: list[Trajectory] = []  # of the latest step
        self.stage_name = ""  # this and the next for the last words
        self.working_on: list[str] = []
        self.watchdog: Watchdog | None = None
        if (deadline := config.log.watchdog_s) > 0:
            self.watchdog = Watchdog(
                self.folder, backend, self.stop, deadline, doing=self.doing,
                alive=lambda: max(self.stop.polled, self.telemetry.timer.changed),
            )

    def doing(self) -> str:
        """What goes on, in words: the phase, the step and this rank's samples."""
        phases, samples = self.telemetry.timer.active, self.working_on
        more = f" and {len(samples) - 8} more" if len(samples) > 8 else ""
        return (f"{'/'.join(phases) or 'between steps'}, step {self.step + 1}, stage {self.stage_name}, samples "
                f"{', '.join(samples[:8]) or 'none'}{more}")  # fmt: skip

    @property
    def optimization(self) -> Optimization:
        assert self._optimization is not None, "no stage was entered"
        return self._optimization

    # ---- stages --------------------------------------------------------------------------------

    def enter_stage(self, name: str) -> None:
        """Fresh moments, learning rate, reference, loader order, baselines and buffer (paper supplement: a stage's
        rewards have a scale of their own). The weights go on, float32 main weights to the last bit: most of what a
        stage moves is smaller than a step of bfloat16."""
        config, stage = self.config, self.config.stages[name]
        self.stage_name, self.stage, self.stage_step = name, stage, 0
        self.pool = stage_samples(self.samples, stage)
        self.hintable = {i for i, sample in self.pool.items() if sample.hint}
        lr = stage.lr or config.optim.lr
        updates = stage.steps * (config.rl.updates_per_rollout if stage.kind == "rl" else 1)
        if self._optimization is None:  # for all that trains in any stage
            self.policy.set_train_towers(any(s.train_towers for s in config.stages.values()))
            self._optimization = build_optimizer(self.policy, config.optim, lr=lr, total_steps=updates,
                                                 parallel=config.parallel)
        else:
            self.optimization.renew(config.optim, lr=lr, total_steps=updates)
        self.policy.set_train_towers(stage.train_towers)
        self.learner = Learner(self.policy, self.optimization, self.backend, config.rl,
                               train_towers=stage.train_towers, pieces=self.builder.pieces, guard=self.guard)
        self.order = SampleOrder(sorted(self.pool), config.seed, name)
        if stage.kind == "sft":
            return
        self.learner.snapshot_reference()
        rl = config.rl
        if rl.replay.carry_over_stages and self.buffer is not None:
            self.buffer.rescore(lambda parts: combine(parts, stage.rewards))
            self.tracker.refill(self.buffer.trajectories.values())
            return
        self.tracker = RewardTracker(window=rl.vcrs_window)
        self.hints = HintPolicy(rl.hints, self.tracker) if rl.hints.enabled else None
        self.buffer = ReplayBuffer(rl.replay, advantage_clip=rl.advantage_clip) if rl.n_off else None

    # ---- state ---------------------------------------------------------------------------------

    def save(self, unlogged: dict[str, Any] | None = None) -> None:
        """Copy what continues the run; a thread writes it while training goes on.

        `unlogged` is the record of a step that is applied, but whose held-out evaluation a stop signal ended.
        """
        if self.saved == self.step:  # nothing was applied since
            return
        with self.telemetry.timer("checkpoint"):
            self.saver.finish()
            state = {
                "stage": self.stage_name, "stage_step": self.stage_step, "step": self.step,
                "completions_generated": self.completions_generated, "order": self.order.state_dict(),
                "quarantined": self.quarantined(), "unlogged": plain(unlogged), "model": model_sizes(self.config),
                "guard": self.guard.state_dict(), "format": self.format.state_dict(), "asked": asked(self.config.data),
            }
            trajectories = None
            if self.stage.kind == "rl":
                state["tracker"] = self.tracker.state_dict()
                state["hints"] = self.hints.state_dict() if self.hints is not None else None
                if self.buffer is not None:
                    trajectories = self.buffer.trajectories
                    state["damaged_shards"] = self.shards.damaged
            snapshot = checkpoint.take(self.step, policy=self.policy, optimization=self.optimization,
                                       reference=self.learner.reference, state=state, backend=self.backend)
            if not snapshot.copied:
                if self.backend.rank == 0:
                    log.info("a node lacks memory for copies of %.1f GiB a rank: the checkpoint is written in pieces, "
                             "training waits", snapshot.size / 2**30)
                self.write(snapshot, trajectories)
        if snapshot.copied:
            self.saver.start(lambda: self.write(snapshot, trajectories))
        self.saved, self.saved_at = self.step, time.monotonic()

    def save_is_due(self) -> bool:
        """Whether this step is one after which the state is kept; the same answer on all ranks."""
        keep = self.config.checkpoint
        late = keep.minutes > 0 and time.monotonic() - self.saved_at > 60 * keep.minutes
        return any(self.backend.all_gather_object(late)) or self.step % keep.every == 0 or self.step in keep.milestones

    def write(self, snapshot: checkpoint.Snapshot, trajectories: dict[int, Trajectory] | None) -> None:
        """Write a checkpoint, the shards first, so that its index never names a missing one; in the saver's thread."""
        keep = self.config.checkpoint
        if self.backend.device.type == "cuda":
            torch.cuda.set_device(self.backend.device)  # a thread begins with the first one
        if trajectories is not None:
            snapshot.state["replay"] = self.shards.write(trajectories)
        checkpoint.write(self.folder, snapshot, backend=self.apart, keep=keep.keep, milestones=keep.milestones)
        if trajectories is not None:
            self.shards.collect_garbage()

    def quarantined(self) -> dict[str, str]:
        """Samples set aside so far on any rank, with the reasons."""
        return {i: reason for part in self.backend.all_gather_object(self.loader.quarantined)
                for i, reason in sorted(part.items())}

    def restore(self) -> bool:
        """Continue from the newest sound checkpoint, if there is one."""
        path = checkpoint.latest(self.folder, self.backend)
        if path is None:
            self.telemetry.rewind(0)
            return False
        unlogged = self.load(path)["unlogged"]
        self.saved = self.step
        self.telemetry.rewind(self.step - (unlogged is not None))
        self.shards.collect_garbage()
        if self.backend.rank == 0:
            log.info("continuing at step %d (%s)", self.step, path.name)
        if unlogged is not None:
            self.finish_step(unlogged)
        return True

    def load(self, path: Path) -> dict[str, Any]:
        """Take over all that a checkpoint holds, in its stage; returns its state. Writes nothing."""
        self.enter_stage(checkpoint.read_state(path)["stage"])
        state = checkpoint.load(path, policy=self.policy, optimization=self.optimization,
                                reference=self.learner.reference, backend=self.backend)
        self.stage_step, self.step = state["stage_step"], state["step"]
        self.completions_generated = state["completions_generated"]
        self.order.load_state_dict(state["order"])
        self.guard.load_state_dict(state["guard"])
        self.format.load_state_dict(state["format"])
        if self.backend.rank == 0 and (different := other_words(state["asked"], self.config.data)):
            log.warning("%s goes on in other words than it was trained with so far: %s", path, different)
        self.loader.quarantined.update(state["quarantined"])
        if self.stage.kind == "rl":
            self.tracker.load_state_dict(state["tracker"])
            if self.hints is not None:
                self.hints.load_state_dict(state["hints"])
            if self.buffer is not None:
                self.buffer.restore(self.shards.read(state["replay"], state["damaged_shards"]))
        return state

    # ---- steps ---------------------------------------------------------------------------------

    def check_stop(self) -> None:
        """Drop the step where a stop signal has come; before it is applied, as keyed randomness repeats it exactly."""
        self.stop.check(self.backend)

    def prompts(self, requests: list[tuple[Sample, Variant]]) -> list[Prompt | None]:
        self.working_on = [sample.id for sample, _ in requests]
        with self.telemetry.timer("decode"):
            prompts = load_prompts(self.loader, self.backend, requests)
        self.check_stop()
        return prompts

    def embed(self, prompts: list) -> list:
        with self.telemetry.timer("towers"):
            return embed(self.policy, self.loader, prompts, keep=self.keeps_embeddings)

    def update_media(self, groups: list[Group]) -> list:
        """Embeddings for an update alone; none where the encoders train, as the update then runs them itself."""
        return [None] * len(groups) if self.stage.train_towers else self.embed([g.prompt for g in groups])

    def sft_step(self) -> dict:
        owners = self.fresh_owners()
        taken = self.order.take(self.stage.prompts_per_step)
        prompts = self.prompts([(self.pool[i], "plain") for i, owner in zip(taken, owners, strict=True)
                                if owner == self.backend.dp_rank])
        self.prefetch()
        groups = sft_groups([p for p in prompts if p is not None], self.pool, self.builder)
        media = self.update_media(groups)
        with self.telemetry.timer("update"):
            stats = self.learner.update_sft(groups, media, poll=self.check_stop)
        return {**stats, "lr": self.optimization.lr}

    def rl_step(self) -> dict:
        """B fresh prompts with n_on completions each and B replay groups: one rollout, one update."""
        config, rl, backend, timer = self.config, self.config.rl, self.backend, self.telemetry.timer
        key = (config.seed, self.stage_name, self.step)
        owners = self.fresh_owners()
        visits = choose_prompts(self.stage.prompts_per_step, rl.revisit_share, self.order, self.tracker,
                                self.hints, self.pool, self.hintable, key)
        owners = share_visits(visits, owners, self.estimates[self.stage_name], backend.dp)
        mine = [k for k, owner in enumerate(owners) if owner == backend.dp_rank]
        found = self.prompts([(self.pool[visits[k].sample_id], visits[k].variant) for k in mine])
        self.prefetch()
        mine = [k for k, p in zip(mine, found, strict=True) if p is not None]
        prompts = [p for p in found if p is not None]
        media = self.embed(prompts)

        with timer("generate"):
            keys = [visits[k].key for k in mine]
            routes: list[list[np.ndarray]] = []
            rows = self.stop.guard(lambda: generate(self.policy, prompts, rl.n_on, rl.sampling, keys, media=media,
                                                    stop=self.stop, routes=routes), backend)
        groups = make_groups(prompts, rows, self.builder.decode, stage=self.stage_name, step=self.step,
                             version=self.step, ref_id=self.stage_name)
        scores = self.scoring.start(groups, self.pool, self.stage.rewards)  # while the reference is asked
        with timer("logprobs"):
            reference = self.learner.reference_logprobs(groups, media, poll=self.check_stop)
            metrics.set_kl(groups, reference)
        with timer("reward"):
            unscored = self.scoring.finish(groups, scores, self.stop)

        by_visit = {k: rows for part in backend.all_gather_object_dp(
            {k: g.trajectories for k, g in zip(mine, groups, strict=True)}) for k, rows in part.items()}
        fresh = [t for k in sorted(by_visit) for t in by_visit[k]]  # in one order, however ranks share the step
        batch_mean = float(rewards_of(fresh).mean()) if fresh else 0.0
        gone = sum(backend.all_gather_object_dp(
            assign_on_policy(groups, self.tracker, batch_mean, std_floor=rl.std_floor)))
        drawn, off_advantages, clipped = draw_replay(
            self.buffer, self.tracker, rl, n=self.stage.prompts_per_step * rl.n_off, step=self.step, key=key)
        loads = backend.all_gather_object_dp(sum(self.tokens(g.prompt.sample_id, g.trajectories) for g in groups))
        replayed, replay_media = self.replay_groups(drawn, off_advantages, loads)
        replayable = sum(backend.all_gather_object_dp(sum(len(g.trajectories) for g in replayed)))
        everything = [*groups, *replayed]
        behaviour = [*reference, *([t.completion.logprobs for t in g.trajectories] for g in replayed)]

        with timer("update"):
            for update in range(rl.updates_per_rollout):
                first = update == 0  # after it the step is applied in part, and goes through to its end
                stats = self.learner.update(everything, [*media, *replay_media], behaviour, n_on=len(fresh),
                                            n_off=replayable, check_logprobs=first,
                                            poll=self.check_stop if first else None, routes=routes)
        with timer("replay"):
            masked = {place for part in backend.all_gather_object_dp([(mine[i], k) for i, k in self.learner.masked])
                      for place in part}
            commit(visits, by_visit, self.tracker, self.hints, self.buffer, masked)
        self.fresh = fresh
        self.completions_generated += len(fresh)
        if (words := self.format.see(fresh, config.data)) and backend.rank == 0:
            log.warning(words)
        return metrics.rl_record(
            fresh=fresh, accuracy=turn_accuracy(visits, by_visit), drawn=drawn, stats=stats,
            off_advantages=off_advantages, clipped=clipped,
            on_advantages=backend.all_gather_object_dp([g.advantages for g in groups]),
            vanished=gone / max(len(visits), 1), step=self.step, tracker=self.tracker, buffer=self.buffer,
            visits=len(visits), hinted=sum(v.variant == "hinted" for v in visits),
            in_use=self.hints.in_use if self.hints is not None else 0, pool=self.pool,
            completions_generated=self.completions_generated, lr=self.optimization.lr, updates=rl.updates_per_rollout,
            own=rl.rewards,
        ) | self.now_and_then(fresh) | unscored

    def now_and_then(self, fresh: list[Trajectory]) -> dict:
        """What only some runs have to log."""
        record: dict[str, Any] = {"replay/damaged_shards": self.shards.damaged} if self.shards.damaged else {}
        if truncates(self.config.rl.sampling):
            record["sampling/cut_off"] = metrics.mean_or_none([t.completion.cut_off for t in fresh])
        return record

    def replay_groups(
        self, drawn: list[list[Trajectory]], advantages: list[np.ndarray], loads: list[int]
    ) -> tuple[list[Group], list]:
        """This rank's share of the step's replay groups, with their prompts rebuilt from the media.

        They even out `loads`, the packed tokens of every data-parallel rank's fresh groups.
        """
        owners = deal([self.tokens(d[0].sample_id, d) for d in drawn], loads)
        share = [(d, a) for owner, d, a in zip(owners, drawn, advantages, strict=True) if owner == self.backend.dp_rank]
        prompts = self.prompts([(self.samples[d[0].sample_id], d[0].variant) for d, _ in share])
        groups = [Group(p, d, a, np.zeros(len(d), bool)) for p, (d, a) in zip(prompts, share, strict=True) if p]
        return groups, self.update_media(groups)

    def tokens(self, sample_id: str, trajectories: list[Trajectory]) -> int:
        """Packed tokens of a group; a sample's hint counts even where the prompt is plain."""
        return packed_tokens(self.prompt_tokens[sample_id], [len(t.completion) for t in trajectories])

    def fresh_owners(self) -> list[int]:
        """Data-parallel ranks of the next `prompts_per_step` samples in the loader's order.

        Known before a step's revisits are chosen, so that each rank can decode ahead what will be its own.
        """
        upcoming = self.order.peek(self.stage.prompts_per_step)
        return deal([self.estimates[self.stage_name][i] for i in upcoming], [0] * self.backend.dp)

    def prefetch(self) -> None:
        """Let the decode workers start on the next step's fresh prompts."""
        upcoming = zip(self.order.peek(self.stage.prompts_per_step), self.fresh_owners(), strict=True)
        self.loader.prefetch([(self.pool[i], "plain") for i, owner in upcoming if owner == self.backend.dp_rank])

    def train_stage(self) -> None:
        """Run the stage from where it stands to its end."""
        stage = self.stage
        with self.telemetry.progress(self.stage_name, self.stage_step, stage.steps) as bar:
            while self.stage_step < stage.steps:
                order = self.order.state_dict()
                try:
                    record = self.take_step()
                except (GenerationStopped, *UNSCORED) as reason:  # the step is dropped, as if it had not begun
                    self.order.load_state_dict(order)
                    self.save()
                    if not isinstance(reason, GenerationStopped):
                        self.saver.finish()
                        raise
                    raise Interrupted from None
                bar.update(self.finish_step(record))

    def take_step(self) -> dict[str, Any]:
        """Apply the stage's next step; returns its record."""
        with self.telemetry.timer("step"):
            record = self.sft_step() if self.stage.kind == "sft" else self.rl_step()
        self.stage_step += 1
        self.step += 1
        return {"step": self.step, "stage": self.stage_name, "stage_step": self.stage_step} | record

    def finish_step(self, record: dict[str, Any]) -> dict[str, Any]:
        """Evaluate, log and save, where it is time to, behind a step that is applied; returns the record."""
        config, last = self.config, self.stage_step == self.stage.steps
        if config.eval.every and (self.step % config.eval.every == 0 or last):
            try:
                record = record | self.held_out()
            except GenerationStopped:
                self.save(unlogged=record)
                raise Interrupted from None
        if any(self.backend.all_gather_object(self.saver.failed)):
            self.saver.finish()
        stopping = self.stop.agree(self.backend)
        # Logged before it is saved: at a checkpoint the metrics file is complete up to its step.
        self.telemetry.log(record)
        if self.save_is_due() or stopping or last:
            self.save()
        if stopping:
            raise Interrupted
        return record

    def held_out(self) -> dict:
        """Greedy accuracy on the stage's held-out samples."""
        with self.telemetry.timer("eval"):
            correct = evaluate(
                self.policy, self.backend, self.builder, self.loader,
                held_out_samples(self.samples, self.stage, self.config.eval.samples),
                max_new_tokens=self.config.rl.sampling.max_new_tokens, stop=self.stop,
            )
        return {"eval/overall": float(np.mean(correct))}


def train(config: Config, backend: Backend) -> None:
    """Run all stages of a configuration, continuing where an earlier attempt stopped.

    Raises Interrupted after a stop signal (state saved), ValueError for a user's mistake.
    """
    folder = Path(config.output_dir)
    check_world(config, backend.world)
    changed = check_same_run(config)
    if (folder / "done.json").exists():
        log.info("%s is complete; nothing to do", folder)
        return
    check_folder(folder)
    check_same_model(config)
    owner = lock.take_on_all(folder, backend)
    with lock.withdrawn_if_refused(folder, owner):
        run = Run(config, backend)
    if backend.rank == 0:  # once the settings, the data and the weights have proved usable
        folder.mkdir(parents=True, exist_ok=True)
        save_config(config, folder / "config.yaml")
        provenance.record(folder, config, backend)
    try:
        names = list(config.stages)
        if run.watchdog is not None:
            run.watchdog.start()
        resumed = run.restore()
        attempts.begin_on_all(folder, run.step, config.checkpoint.restarts, changed, backend)
        for name in names[names.index(run.stage_name) if resumed else 0 :]:
            if not (resumed and name == run.stage_name):
                run.enter_stage(name)
            run.train_stage()
            with run.telemetry.timer("export"):
                export_hf(run.policy, folder / "export" / name, config.model.path, asked=asked(config.data))
        run.saver.finish()
        summary = {"steps": run.step, "completions_generated": run.completions_generated,
                   "export": f"export/{names[-1]}", "quarantined": run.quarantined()}
        if backend.rank == 0:
            with replacing(folder / "done.json") as file:  # there, whole, or not at all: the run is over
                file.write(json.dumps(summary, indent=2) + "\n")
        if not config.checkpoint.keep_finished:
            if backend.rank == 0:
                checkpoint.drop(folder)
            run.shards.collect_garbage()
    except Interrupted:
        run.saver.finish()  # what was saved is saved once it is written
        raise
    except Exception:
        log.error("rank %d ends in %s", backend.rank, run.doing())
        run.saver.settle(SETTLE_S)
        raise
    finally:
        if run.watchdog is not None:
            run.watchdog.close()
        run.scoring.close()
        run.loader.close()
        run.telemetry.close()
        if owner is not None:
            lock.release(folder, owner)
