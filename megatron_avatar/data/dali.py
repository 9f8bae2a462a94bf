"""Video by NVIDIA's DALI: on a GPU's own decoders (NVDEC) where there is one, else on the CPU.

Clips that were announced are decoded ahead, while the features of those before are made. Where they are to be resized,
that is done piece by piece: a clip's frames at full size may be more than a GPU's memory holds.
"""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_avatar.data.container import Fit
from megatron_avatar.data.features import resize

CPU_CODECS = ("vp8", "vp9", "mjpeg")
GPU_CODECS = ("h264", "hevc", "av1", "mpeg4")
PIECE_BYTES = 2**27  # of frames at full size
Item = tuple[str, tuple[int, ...], Fit | None]  # a file, the frames that are wanted of it, what they are made into


@cache
def codecs() -> tuple[str, ...]:
    """Codecs that DALI decodes here; none where it cannot be imported."""
    try:
        import nvidia.dali  # noqa: F401
    except ImportError:
        return ()
    return CPU_CODECS + (GPU_CODECS if torch.cuda.is_available() else ())


@cache
def reader() -> Reader:
    """This process's only one."""
    return Reader()


class Reader:
    """A pipeline with a thread of its own, which decodes clips in the order in which they were announced."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="dali")
        self._pipeline: Any = None
        self._ahead: dict[Item, Future[np.ndarray]] = {}

    def announce(self, clips: list[tuple[Path, np.ndarray, Fit | None]]) -> None:
        """Begin to decode; what was announced before and not taken is forgotten."""
        for future in self._ahead.values():
            future.cancel()
        self._ahead = {item: self._thread.submit(self._decode, item) for item in (_item(*c) for c in clips)}

    def take(self, path: Path, indices: np.ndarray, fit: Fit | None = None) -> np.ndarray:
        """RGB frames [T, H, W, 3] uint8, decoded ahead where the clip was announced.

        Raises RuntimeError for a clip that DALI refuses; the others are decoded all the same.
        """
        item = _item(path, indices, fit)
        return (self._ahead.pop(item, None) or self._thread.submit(self._decode, item)).result()

    def _decode(self, item: Item) -> np.ndarray:
        path, indices, fit = item
        encoded = np.fromfile(path, np.uint8)
        if fit is None:
            return self._run(encoded, indices)
        step = max(1, PIECE_BYTES // (3 * fit.source[0] * fit.source[1]))
        pieces = []
        for first in range(0, len(indices), step):
            frames = self._run(encoded, indices[first : first + step])
            fit.check(Path(path), frames.shape[1:3])
            pieces.append(resize(frames, *fit.size))
        return np.concatenate(pieces) if len(pieces) > 1 else pieces[0]

    def _run(self, encoded: np.ndarray, indices: tuple[int, ...]) -> np.ndarray:
        if self._pipeline is None:
            self._pipeline = _build()
        try:
            self._pipeline.feed_input("encoded", [encoded])
            self._pipeline.feed_input("frames", [np.array(indices, np.int32)])
            (frames,) = self._pipeline.run()
            return np.array(frames.as_cpu()[0])
        except RuntimeError:
            self._pipeline = None  # dead after an error
            raise


def _item(path: Path, indices: np.ndarray, fit: Fit | None) -> Item:
    return str(path), tuple(int(k) for k in indices), fit


def _build() -> Any:
    """Bytes of a file and frame numbers in, frames out."""
    from nvidia.dali import fn, pipeline_def, types

    device, device_id = "cpu", None
    if torch.cuda.is_available():
        local_rank = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or "0"
        device, device_id = "mixed", int(local_rank) % torch.cuda.device_count()

    options: dict[str, Any] = {"device_id": device_id, "exec_dynamic": True}  # DALI's types know neither as it is meant

    @pipeline_def(batch_size=1, num_threads=1, prefetch_queue_depth=1, **options)
    def pipeline():
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
        frames = fn.external_source(name="frames", dtype=types.INT32, ndim=1)
        return fn.decoders.video(encoded, device=device, frames=frames, pad_mode="none")  # else black past the end

    built = pipeline()
    built.build()
    return built
