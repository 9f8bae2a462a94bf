"""Rewards in a run: the judge over HTTP, asked once for a completion, and what happens when it falls silent."""

import base64
import hashlib
import io
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_avatar.config import load_config
from megatron_avatar.config.families import OMNI
from megatron_avatar.data.features import patchify
from megatron_avatar.records import Prompt, Sample
from megatron_avatar.rl.rewards.http_judge import CRITERIA
from megatron_avatar.training.scoring import Scoring, pictures
from tests.servers import ChatServer
from tests.training.small import ROOT, arguments, train
from tests.training.test_loop import metrics


def verdict(body, number=0):
    """Depends on what is asked alone, as a judge at temperature 0."""
    digest = hashlib.sha256(json.dumps(body["messages"]).encode()).digest()
    return json.dumps({name: digest[k] / 255 for k, name in enumerate(CRITERIA)})


def test_the_judge_sees_the_frames_that_the_policy_saw():
    video = np.repeat(np.arange(0, 160, 10, dtype=np.uint8), 56 * 84 * 3).reshape(16, 56, 84, 3)
    photo = np.full((1, 28, 28, 3), 200, np.uint8)
    parts = [patchify(video, OMNI), patchify(np.repeat(photo, 2, axis=0), OMNI)]
    prompt = Prompt("s", "plain", np.zeros(1), np.zeros((3, 1)), torch.cat([p for p, _ in parts]),
                    torch.stack([g for _, g in parts]))  # fmt: skip
    shown = [np.asarray(Image.open(io.BytesIO(jpeg))) for jpeg in pictures(prompt, 8, OMNI)]
    assert [picture.shape for picture in shown] == [(56, 84, 3)] * 7 + [(28, 28, 3)]
    assert [round(picture.mean(), -1) for picture in shown] == [0, 20, 50, 70, 90, 110, 140, 200]
    assert len(pictures(prompt, 100, OMNI)) == 17
    assert pictures(Prompt("s", "plain", np.zeros(1), np.zeros((3, 1))), 8, OMNI) == []


def test_a_stage_may_switch_a_reward_off_by_a_weight_of_zero():
    settings = ["recipe=tiny_avatar", "model.path=m", "data.manifest=d",
                "+rl.rewards.mine=tests/rl/own_rewards.py:half", "+stages.visual.rewards.mine=0.5",
                "+stages.localisation.rewards.mine=0"]  # fmt: skip
    config = load_config(settings)
    scoring = Scoring(config, SimpleNamespace(tp_rank=0, is_last_stage=True, rank=0))
    sample = Sample("id", "localisation", "train", "what", "?", "red", "other")
    weights = {**config.stages["localisation"].rewards, "judge": 0.0}
    group = SimpleNamespace(prompt=SimpleNamespace(sample_id="id"), trajectories=[SimpleNamespace(text="x")])
    (future,) = scoring.start([group], {"id": sample}, weights)
    ((reward, parts),) = future.result()[0]
    scoring.close()
    assert reward == 0 and "mine" not in parts and "judge" not in parts


def judged(world, out, server, *more):
    return arguments(
        world, world / out, f"judge.endpoint={server.url}", "judge.model=judge", "judge.wait_s=5", "~stages.visual",
        "~stages.audio_visual", "checkpoint.every=100", *more, steps=9,
    )  # fmt: skip


def without_removed(args):
    return [a for a in args if not a.startswith(("stages.visual.", "stages.audio_visual."))]


@pytest.mark.slow
def test_a_silent_judge_stops_the_run_and_the_same_command_goes_on(world):
    whole = ChatServer(verdict)
    done = train(*without_removed(judged(world, "whole", whole)))
    assert done.returncode == 0, done.stderr
    records = metrics(world / "whole")
    assert len(records) == 9 and all(0 < r["reward/judge"] < 1 and r["judge/unscored"] == 0 for r in records)
    shown = [p for p in whole.requests[5]["messages"][1]["content"] if p["type"] == "image_url"]
    assert len(shown) == 8 and base64.b64decode(shown[0]["image_url"]["url"].partition(",")[2])[:2] == b"\xff\xd8"

    early = ChatServer(lambda body, n: verdict(body) if n < 40 else 500)
    args = without_removed(judged(world, "silent", early, "judge.retries=0"))
    stopped = train(*args)
    assert stopped.returncode == 1 and "without a verdict" in stopped.stderr and "HTTP 500" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    state = json.loads(next((world / "silent" / "checkpoints").glob("step_*/state.json")).read_text())
    assert 2 < state["step"] < 9 and len(metrics(world / "silent")) == state["step"]

    # A new server: nothing that has a verdict is asked again, and no step that was applied is repeated.
    late = ChatServer(verdict)
    resumed = train(*[f"judge.endpoint={late.url}" if a.startswith("judge.endpoint") else a for a in args])
    assert resumed.returncode == 0, resumed.stderr
    assert metrics(world / "silent")[:2] == metrics(world / "whole")[:2]
    assert len(metrics(world / "silent")) == 9


@pytest.mark.slow
def test_one_rank_of_a_replica_asks_and_an_absent_judge_is_named_at_once(world):
    server = ChatServer(verdict)
    done = train(*without_removed(judged(world, "tp", server, "parallel.tp=2", "stages.localisation.steps=2")), ranks=2)
    assert done.returncode == 0, done.stderr
    unique = {json.dumps(r["messages"]) for r in server.requests[1:]}
    assert len(server.requests) == 1 + len(unique) <= 1 + 2 * 16
    gone = train(*without_removed(judged(world, "gone", server, "judge.endpoint=http://127.0.0.1:9/v1",
                                         "judge.wait_s=0.5")))  # fmt: skip
    assert gone.returncode == 1 and "is not ready after 0.5 s" in gone.stderr
    assert not (world / "gone").exists(), "nothing of a run is there"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_reward_of_ones_own_trains_and_its_fault_stops_the_run(world):
    """By the real command: a worker's worker of the tests' forked ranks would outlive its parent's end."""

    def own(out, function):
        settings = arguments(world, world / out, f"+rl.rewards.mine={function}", "+stages.visual.rewards.mine=0.5",
                             "~stages.localisation", steps=1)  # fmt: skip
        settings = [item for item in settings if not item.startswith("stages.localisation")]
        command = [sys.executable, "-m", "megatron_avatar.train", *settings]
        return subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=ROOT, check=False)

    done = own("own", "examples/own_reward.py:short")
    assert done.returncode == 0, done.stderr
    first, second = (record["reward/mine"] for record in metrics(world / "own"))
    assert 0 < first <= 1 and second is None
    failed = own("failed", "tests/rl/own_rewards.py:only_on_answers")
    assert failed.returncode == 1 and "never saw such a text" in failed.stderr and "Traceback" not in failed.stderr
    assert "the same command goes on" in failed.stderr
