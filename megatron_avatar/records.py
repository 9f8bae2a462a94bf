"""The records that flow through the system: sample -> prompt -> completion -> trajectory -> group.

Shapes: P prompt tokens, L completion tokens (end token included), G completions of a group,
N vision patches, T log-mel frames. Records hold no model state and know no algorithm.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:  # what grades answers needs no torch
    import torch

Variant = Literal["plain", "hinted"]
MediaKind = Literal["video", "image", "audio"]
ProblemType = Literal["multiple_choice", "numerical", "math", "ocr", "free_form", "code", "other"]


@dataclass(frozen=True)
class Media:
    """One picture or sound source of a sample, as measured when the manifest was made.

    `path` and `audio_path` are relative to the manifest's folder. `audio_path` names the 16 kHz
    mono FLAC sidecar of a video (None: no sound). `pts` holds seconds per frame for clips of
    variable frame rate (None: constant `fps`).
    """

    path: str
    kind: MediaKind
    frame_count: int = 0
    fps: float = 0.0
    pts: tuple[float, ...] | None = None
    height: int = 0
    width: int = 0
    audio_path: str | None = None
    audio_samples: int = 0
    audio_in_video: bool = False


@dataclass(frozen=True)
class Sample:
    """One line of the manifest. `id` is the identity that baselines and replay are keyed by."""

    id: str
    stage: str
    split: str
    family: str
    question: str
    answer: str
    problem_type: ProblemType
    choices: tuple[str, ...] = ()
    media: tuple[Media, ...] = ()
    trace: str | None = None
    hint: str | None = None
    audio_caption: str | None = None
    scene: dict[str, Any] | None = None


@dataclass
class Prompt:
    """A tokenised prompt and the features of its media, ready for the policy.

    token_ids [P] int64 (media placeholders already expanded); positions [3, P] float32 (temporal, height, width; whole
    but for Qwen3-Omni's times); pixels [N, 6 * patch * patch] float32 with grid_thw [media, 3] int64; mel [128, sum T]
    float32 with mel_lengths [clips] int64. Absent media are None. embedded [M, W]: what encoders that don't train have
    made of pixels and mel, which are gone then (data/loader.py, `keep`).
    """

    sample_id: str
    variant: Variant
    token_ids: np.ndarray
    positions: np.ndarray
    pixels: torch.Tensor | None = None
    grid_thw: torch.Tensor | None = None
    mel: torch.Tensor | None = None
    mel_lengths: torch.Tensor | None = None
    embedded: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def next_position(self) -> float:
        """Rotary position of the first completion token, equal on all three axes."""
        return float(self.positions.max()) + 1


@dataclass
class Completion:
    """token_ids [L] int64 (int32 in the replay buffer); logprobs [L] float32 under the policy that sampled them (full
    softmax at the sampling temperature); `finished` is False when the length limit cut it; `cut_off` is the mean over
    its tokens of the probability that top_k and top_p left out of the draw (0 in the replay buffer)."""

    token_ids: np.ndarray
    logprobs: np.ndarray
    finished: bool
    cut_off: float = 0.0

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass
class Trajectory:
    """A scored completion, as kept by the replay buffer; media are kept by reference (sample id).

    `parts` maps reward name to its raw value in [0, 1]; NaN marks a masked part.
    `kl_ref` is the mean over tokens of k3 to the reference `ref_id`.
    """

    sample_id: str
    variant: Variant
    completion: Completion
    reward: float
    parts: dict[str, float]
    kl_ref: float
    ref_id: str
    stage: str
    step: int
    policy_version: int
    text: str = ""


@dataclass
class Group:
    """One prompt with its trajectories: the unit of generation, packing and training.

    advantages [G] float32 (before temporal shaping); on_policy [G] bool. `weight` 0 marks a
    filler that keeps ranks in step and contributes nothing.
    """

    prompt: Prompt
    trajectories: list[Trajectory]
    advantages: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    on_policy: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    weight: float = 1.0
