"""bench.decode and bench.soak in small: same frames from every reader, every damaged file named."""

import json

import numpy as np
import pytest

from bench import decode, soak, timing


def test_all_readers_give_the_same_frames_and_a_wrong_one_is_found(tmp_path, monkeypatch):
    rates = decode.compare(tmp_path, "mjpeg", rounds=1, seconds=1)
    assert rates.keys() == json.loads((timing.RESULTS / "decode.json").read_text())["mjpeg"].keys()
    assert rates["ours"] > 0 and rates["pyav"] > 0 and rates["dali"] > 0
    late = {"ours": decode.decode_frames, "late": lambda path, k: decode.decode_frames(path, np.minimum(k + 5, 24))}
    monkeypatch.setattr(decode, "readers", lambda: late)
    with pytest.raises(AssertionError, match="late gives other frames"):
        decode.compare(tmp_path, "mjpeg", rounds=1, seconds=1)


@pytest.mark.slow
def test_every_damaged_file_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(soak, "DEADLINE_S", 10.0)  # on a busy machine a sound file may take a second
    found = soak.soak(tmp_path, 110, 0.1)
    assert found["named"] == found["damaged"] == 11 and set(found["by_kind"]) == set(soak.DAMAGES)
    assert found.keys() | {"machine", "date"} == json.loads((timing.RESULTS / "soak.json").read_text()).keys()
