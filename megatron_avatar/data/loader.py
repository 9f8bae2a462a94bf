"""Prompts ahead of time: decode workers that can be killed, a bounded cache, and the order of samples.

A damaged or hostile file may hang or crash a decoder. Each worker process therefore holds one sample
at a time, under a deadline: when it dies or is late, that sample alone is set aside and a new worker
takes its place. Which prompts come out never depends on timing, only whether they are there already.
"""

from __future__ import annotations

import atexit
import hashlib
import multiprocessing
import pickle
import queue
import signal
import threading
import traceback
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass, fields
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from megatron_avatar.data.prompt import PromptBuilder
from megatron_avatar.records import Prompt, Sample, Variant

Request = tuple[Sample, Variant]
Key = tuple[str, Variant]
START_DEADLINE_S = 300.0  # imports of a first worker on a slow shared file system
# What a terminal or a scheduler sends to every process of a job; only the trainer answers.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


@dataclass(frozen=True)
class Refusal:
    """Why a sample has no prompt."""

    reason: str


class MediaLoader:
    """Builds prompts in `workers` processes (0: in this one), with at most `deadline_s` seconds for each.

    `quarantined` maps the id of each sample set aside so far to the reason. Recently used prompts stay, up to
    `cache_bytes` in all plus what is being prefetched. Used from one thread.
    """

    def __init__(
        self, builder: PromptBuilder, root: Path, workers: int, deadline_s: float, *, cache_bytes: int = 512 * 2**20
    ):
        self.quarantined: dict[str, str] = {}
        self._builder, self._root, self._deadline_s, self._cache_bytes = builder, Path(root), deadline_s, cache_bytes
        self._prompts: OrderedDict[Key, Future[Prompt | Refusal]] = OrderedDict()
        self._unmeasured: set[Key] = set()  # of these, those that were not finished when looked at last
        self._sizes: dict[Key, int] = {}  # of the others, in bytes
        self._size = 0  # their sum
        self._tasks: queue.SimpleQueue[tuple[Future[Prompt | Refusal], Request] | None] = queue.SimpleQueue()
        self._workers: dict[int, _Worker] = {}
        self._closed = False
        self._threads = [threading.Thread(target=self._run, args=(i,), daemon=True) for i in range(workers)]
        for thread in self._threads:
            thread.start()
        atexit.register(self.close)

    def prefetch(self, requests: Iterable[Request]) -> None:
        """Starts to build prompts and returns at once. Without workers there is nothing to start."""
        if self._threads:
            for request in requests:
                if request[0].id not in self.quarantined:
                    self._submit(request)
            self._evict()

    def get(self, requests: list[Request]) -> list[Prompt | None]:
        """Prompts in the order asked for; None for a sample that is, or is hereby, quarantined.

        Raises RuntimeError for a fault of the program in a worker, with its traceback.
        """
        futures = [None if sample.id in self.quarantined else self._submit((sample, v)) for sample, v in requests]
        prompts: list[Prompt | None] = []
        for (sample, _), future in zip(requests, futures, strict=True):
            outcome = future.result() if future else None
            if isinstance(outcome, Refusal):
                self.quarantined.setdefault(sample.id, outcome.reason)
            prompts.append(outcome if isinstance(outcome, Prompt) else None)
        self._evict()
        return prompts

    def keep(self, prompts: Iterable[Prompt], media: Iterable[torch.Tensor | None]) -> None:
        """From now on these prompts hold their media's embeddings, of encoders that don't train, in place of what the
        embeddings were made from: a fraction of the memory, and nothing to decode or encode again."""
        for prompt, embedded in zip(prompts, media, strict=True):
            if embedded is None or prompt.embedded is not None:
                continue
            prompt.embedded, prompt.pixels, prompt.mel = embedded, None, None
            key = prompt.sample_id, prompt.variant
            if key in self._sizes:
                self._measure(key, prompt)

    def close(self) -> None:
        """Kills the workers and drops the cache. The loader cannot be used afterwards; closing twice is fine."""
        atexit.unregister(self.close)
        self._closed = True
        for _ in self._threads:
            self._tasks.put(None)
        for worker in list(self._workers.values()):
            worker.kill()
        for thread in self._threads:
            thread.join(timeout=5)
        for held in (self._prompts, self._sizes, self._unmeasured):
            held.clear()

    def _submit(self, request: Request) -> Future[Prompt | Refusal]:
        key = request[0].id, request[1]
        future = self._prompts.pop(key, None)
        if future is None:
            future = Future()
            self._unmeasured.add(key)
            if self._threads:
                self._tasks.put((future, request))
            else:
                future.set_result(_attempt(self._builder, self._root, request))
        self._prompts[key] = future
        return future

    def _evict(self) -> None:
        """Drops refusals, and the least recently used finished prompts beyond the bound."""
        for key in [key for key in self._unmeasured if self._prompts[key].done()]:
            self._unmeasured.remove(key)
            future = self._prompts[key]
            outcome = None if future.exception() else future.result()
            if isinstance(outcome, Prompt):
                self._measure(key, outcome)
            else:
                del self._prompts[key]
        for key in list(self._prompts) if self._size > self._cache_bytes else ():
            if self._size <= self._cache_bytes:
                break
            if key in self._sizes:
                self._size -= self._sizes.pop(key)
                del self._prompts[key]

    def _measure(self, key: Key, prompt: Prompt) -> None:
        size = _bytes(prompt)
        self._size += size - self._sizes.get(key, 0)
        self._sizes[key] = size

    def _more(self) -> list[tuple[Future[Prompt | Refusal], Request]]:
        """Further requests that wait already, where the builder decodes ahead."""
        tasks: list[tuple[Future[Prompt | Refusal], Request]] = []
        while len(tasks) < getattr(self._builder, "ahead", 1) - 1:
            try:
                task = self._tasks.get_nowait()
            except queue.Empty:
                break
            if task is None:  # the end, for another of the threads
                self._tasks.put(None)
                break
            tasks.append(task)
        return tasks

    def _run(self, slot: int) -> None:
        """One thread for each worker process: hands it a sample, waits no longer than the deadline, replaces it."""
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # inherited by the process that forks the workers
        while (task := self._tasks.get()) is not None and not self._closed:
            tasks = [task, *self._more()]
            ahead = len(tasks) > 1
            while tasks and not self._closed:
                together = tasks if ahead else tasks[:1]
                try:
                    if slot not in self._workers or not self._workers[slot].is_idle():
                        self._workers[slot] = _Worker(self._builder, self._root)
                    if self._closed:
                        break
                    worker = self._workers[slot]
                    worker.send([request for _, request in together])
                    for future, _ in list(together):
                        future.set_result(worker.receive(self._deadline_s))
                        tasks.pop(0)
                except _Lost as lost:
                    self._workers.pop(slot).kill()
                    if ahead:  # which of them is to blame shows when each is alone
                        ahead = False
                        continue
                    future, request = tasks.pop(0)
                    where = _files(request[0], self._root)
                    future.set_result(Refusal(f"{where}: {lost}; replace the file or drop the sample"))
                except Exception as error:
                    if slot in self._workers:  # its other answers are not waited for
                        self._workers.pop(slot).kill()
                    tasks.pop(0)[0].set_exception(error)
        if slot in self._workers:
            self._workers.pop(slot).kill()


class _Lost(Exception):
    """A worker died or was late."""


class _Worker:
    """One decode process and the pipe to it."""

    def __init__(self, builder: PromptBuilder, root: Path):
        context = multiprocessing.get_context("forkserver")  # a new worker then costs a fork, not the imports
        context.set_forkserver_preload([__name__])
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, builder, root), daemon=True)
        self._process.start()
        theirs.close()
        try:
            started = self._pipe.poll(START_DEADLINE_S) and self._pipe.recv_bytes() == b"ready"
        except EOFError:
            started = False
        if not started:
            self.kill()
            raise RuntimeError("a decode worker did not start; see its message above, or set data.workers=0")

    def send(self, requests: list[Request]) -> None:
        try:
            self._pipe.send(requests)
        except OSError:
            raise _Lost("the decoder crashed on it") from None

    def receive(self, deadline_s: float) -> Prompt | Refusal:
        """The answer to the next of the requests."""
        try:
            if not self._pipe.poll(deadline_s):
                raise _Lost(f"not decoded within {deadline_s:g} s (data.decode_deadline_s)")
            reply = pickle.loads(self._pipe.recv_bytes())  # from our own worker
        except (EOFError, OSError):
            raise _Lost("the decoder crashed on it") from None
        if isinstance(reply, str):
            raise RuntimeError(f"in a decode worker:\n{reply}")
        return reply if isinstance(reply, Refusal) else _from_arrays(reply)

    def is_idle(self) -> bool:
        """False for a worker that died after its last answer: its next sample is not to blame."""
        return not self._pipe.poll()

    def kill(self) -> None:
        self._process.kill()  # whoever waits at the pipe meets its end


def _serve(pipe: Connection, builder: PromptBuilder, root: Path) -> None:
    """A worker's life: says that it is ready, then answers requests until the trainer is gone."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    pipe.send_bytes(b"ready")
    while True:
        try:
            requests = pipe.recv()
        except EOFError:
            return
        if len(requests) > 1:
            builder.announce(requests, root)
        for request in requests:
            try:
                outcome = _attempt(builder, root, request)
                reply: Any = outcome if isinstance(outcome, Refusal) else _to_arrays(outcome)
            except Exception:
                reply = traceback.format_exc()
            pipe.send_bytes(pickle.dumps(reply, protocol=5))


def _attempt(builder: PromptBuilder, root: Path, request: Request) -> Prompt | Refusal:
    sample, variant = request
    try:
        return builder.build(sample, root, variant)
    except ValueError as error:  # MediaError, or a prompt beyond the context
        return Refusal(str(error))


def _files(sample: Sample, root: Path) -> str:
    return ", ".join(str(root / media.path) for media in sample.media) or f"sample {sample.id}"


def _to_arrays(prompt: Prompt) -> dict[str, Any]:
    """The prompt with numpy arrays for tensors: torch would send each through shared memory."""
    values = {f.name: getattr(prompt, f.name) for f in fields(prompt)}
    return {name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in values.items()}


def _from_arrays(values: dict[str, Any]) -> Prompt:
    tensors = ("pixels", "grid_thw", "mel", "mel_lengths")
    made: dict[str, Any] = {k: torch.from_numpy(v) if k in tensors and v is not None else v for k, v in values.items()}
    return Prompt(**made)


def _bytes(prompt: Prompt) -> int:
    return sum(getattr(value, "nbytes", 0) for value in vars(prompt).values())


class SampleOrder:
    """Endless order of sample ids: a permutation for each epoch, keyed by (seed, stage, epoch, id).

    The order depends neither on the order of the manifest nor on what was drawn before.
    """

    def __init__(self, ids: Iterable[str], seed: int, stage: str):
        self._ids, self._key, self._taken = sorted(ids), f"{seed}/{stage}", 0
        if not self._ids:
            raise ValueError(f"stage {stage} has no samples; check `data` of the stage against `stage` in the manifest")
        self._epoch, self._permutation = -1, self._ids

    def take(self, n: int) -> list[str]:
        """The next n ids; an epoch's end passes over into the next epoch."""
        taken = self.peek(n)
        self._taken += n
        return taken

    def peek(self, n: int) -> list[str]:
        """What `take` would return, without taking it."""
        return [self._at(place) for place in range(self._taken, self._taken + n)]

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self._taken, "ids": self._fingerprint()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError when the state was saved with other samples: the order would silently differ."""
        if state["ids"] != self._fingerprint():
            raise ValueError(
                f"the checkpoint was made with other samples, seed or stage than {self._key}; restore the manifest "
                "and settings that it was made with, or start in a new output_dir"
            )
        self._taken = state["taken"]

    def _at(self, place: int) -> str:
        epoch, index = divmod(place, len(self._ids))
        if epoch != self._epoch:
            prefix = f"{self._key}/{epoch}/"
            self._permutation = sorted(self._ids, key=lambda i: hashlib.sha256((prefix + i).encode()).digest())
            self._epoch = epoch
        return self._permutation[index]

    def _fingerprint(self) -> str:
        return hashlib.sha256("\n".join([self._key, *self._ids]).encode()).hexdigest()
