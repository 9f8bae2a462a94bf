import hashlib
import json
import logging
import os
import resource
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.show import read_rows
from megatron_avatar.records import Completion, Trajectory
from megatron_avatar.rl.replay import store
from megatron_avatar.rl.replay.store import TABLES, collect_garbage, read_shards, read_tables, write_shards

number = st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def trajectories(draw: st.DrawFn) -> Trajectory:
    length = draw(st.integers(1, 12))
    completion = Completion(
        token_ids=np.array(draw(st.lists(st.integers(0, 2**31 - 1), min_size=length, max_size=length)), np.int64),
        logprobs=np.array(draw(st.lists(st.floats(-50, 0, width=32), min_size=length, max_size=length)), np.float32),
        finished=draw(st.booleans()),
    )
    parts = draw(st.dictionaries(st.text(max_size=5), st.floats(0, 1) | st.just(float("nan")), max_size=4))
    return Trajectory(
        sample_id=draw(st.text(max_size=8)), variant=draw(st.sampled_from(["plain", "hinted"])), completion=completion,
        reward=draw(number), parts=parts, kl_ref=draw(number), ref_id=draw(st.text(max_size=4)), stage="stage-2",
        step=draw(st.integers(0, 10**9)), policy_version=draw(st.integers(0, 10**9)), text=draw(st.text(max_size=9)),
    )


def make(n: int, first: int = 0, stage: str = "s") -> dict[int, Trajectory]:
    """Trajectories of 1..5 tokens with serials first .. first + n - 1."""
    rows = {}
    for k in range(first, first + n):
        size = 1 + k % 5
        completion = Completion(np.arange(size) + k, np.full(size, -0.1 * k, np.float32), True)
        rows[k] = Trajectory(f"id{k}", "plain", completion, k / 7, {"accuracy": 1.0}, 0.01, "ref", stage, k, k)
    return rows


def assert_same(found: dict[int, Trajectory], expected: dict[int, Trajectory]) -> None:
    assert list(found) == sorted(expected)
    for serial, t in expected.items():
        got = found[serial]
        np.testing.assert_equal(asdict(got), asdict(t))  # NaN equals NaN
        assert type(got.completion.finished) is bool and type(got.reward) is float and type(got.step) is int
        assert got.completion.token_ids.dtype == np.int32 and got.completion.logprobs.dtype == np.float32


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@settings(deadline=None, max_examples=40)
@given(st.dictionaries(st.integers(0, 10**6), trajectories(), max_size=8))
def test_everything_survives_exactly(tmp_path_factory: pytest.TempPathFactory, rows: dict[int, Trajectory]) -> None:
    folder = tmp_path_factory.mktemp("replay")
    index = json.loads(json.dumps(write_shards(folder, rows, known={})))
    found, damaged = read_shards(folder, index)
    assert_same(found, rows)
    assert not damaged
    assert write_shards(folder, found, known=index) == index  # what was read is known to be stored


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 4)), min_size=1, max_size=6), st.integers(1, 4),
       st.integers(1, 3))
def test_any_history_of_checkpoints_reads_back(
    tmp_path_factory: pytest.TempPathFactory, history: list[tuple[int, int]], rows_per_shard: int, writers: int
) -> None:
    """Appending and evicting between checkpoints, two of which are kept: neither loses a trajectory, however many
    ranks write."""
    folder = tmp_path_factory.mktemp("replay")
    rows, first, kept = {}, 0, [({}, {})]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "ROWS_PER_SHARD", rows_per_shard)
        patch.setattr(store, "MIN_ROWS_PER_SHARD", 1)
        for added, evicted in history:
            rows = dict(list({**rows, **make(added, first)}.items())[evicted:])
            first += added
            index = write_all(folder, rows, kept[-1][0], writers)
            kept = [*kept[-1:], (index, rows)]
            collect_garbage(folder, [index for index, _ in kept])
            for index, expected in kept:
                found, damaged = read_shards(folder, index)
                assert_same(found, expected)
                assert not damaged
            assert files(folder) == {name for index, _ in kept for name in index}
            assert all(2 * len(s["live"]) >= s["rows"] for s in kept[-1][0].values())  # dead rows stay bounded


def write_all(folder: Path, rows: dict[int, Trajectory], known: store.Index, writers: int) -> store.Index:
    """What the data-parallel ranks write side by side, in any order."""
    parts = [write_shards(folder, rows, known=known, writer=w, writers=writers) for w in reversed(range(writers))]
    names = [name for part in parts for name in part]
    assert len(names) == len(set(names)), "two ranks wrote the same shard"
    return {name: shard for part in parts for name, shard in part.items()}


def test_ranks_share_the_writing_and_read_the_disk_once(tmp_path: Path) -> None:
    rows = make(300)
    parts = [write_shards(tmp_path, rows, known={}, writer=w, writers=3) for w in range(3)]
    assert [sum(shard["rows"] for shard in part.values()) for part in parts] == [100, 100, 100]
    few = [len(write_shards(tmp_path / "few", make(70), known={}, writer=w, writers=3)) for w in range(3)]
    assert few == [1, 1, 0], "shards of a handful of rows would burden the file system"
    index = {name: shard for part in parts for name, shard in part.items()}
    images = []

    def first_rank(read):
        images.append(read())
        return images[-1]

    here, damaged = read_shards(tmp_path, index, share=first_rank)
    there, _ = read_shards(Path("/nowhere"), index, share=lambda read: images.pop(0))
    assert_same(here, rows)
    assert_same(there, rows)


def test_a_shard_can_be_checked_by_its_name(tmp_path: Path) -> None:
    (name,) = write_shards(tmp_path, make(3), known={})
    digits = name.removeprefix("shard-").removesuffix(".h5")
    assert store.damage(tmp_path / name, digits) == ""
    (tmp_path / name).write_bytes(b"x")
    assert store.damage(tmp_path / name, digits) == "its checksum is wrong"
    assert "No such file" in store.damage(tmp_path / "shard-0.h5", "0")


def test_only_new_trajectories_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = write_shards(tmp_path, make(10), known={})
    (old,) = files(tmp_path)
    stamp = (tmp_path / old).stat()
    second = write_shards(tmp_path, make(13), known=first)
    (new,) = files(tmp_path) - {old}
    assert second[old] == first[old] and second[new]["rows"] == 3
    assert (tmp_path / old).stat() == stamp
    partly = write_shards(tmp_path, make(9, 4), known=second)  # 4 of the old shard's 10 are gone: it stays
    assert partly.keys() == second.keys() and len(partly[old]["live"]) == 6
    assert_same(read_shards(tmp_path, partly)[0], make(9, 4))
    third = write_shards(tmp_path, make(5, 8), known=partly)  # 8 of the old shard's 10 are gone: compacted
    assert old not in third and old in files(tmp_path)
    assert_same(read_shards(tmp_path, third)[0], make(5, 8))
    assert_same(read_shards(tmp_path, second)[0], make(13))
    with monkeypatch.context() as patch:  # another node has it open
        patch.setattr(Path, "unlink", lambda path, missing_ok=False: (_ for _ in ()).throw(OSError(16, "busy")))
        assert collect_garbage(tmp_path, [third]) == []
    assert collect_garbage(tmp_path, [third]) == [old]


def test_a_serial_used_again_is_another_trajectory(tmp_path: Path) -> None:
    """A later stage's buffer counts from zero again: nothing of the earlier stage may come back."""
    index = write_shards(tmp_path, make(4, stage="one"), known={})
    later = write_shards(tmp_path, make(4, stage="two"), known=index)
    assert not later.keys() & index.keys()
    assert_same(read_shards(tmp_path, later)[0], make(4, stage="two"))


def test_eight_bytes_a_token_and_few_reads(tmp_path: Path) -> None:
    rows = make(50)
    for t in rows.values():
        t.completion = Completion(np.arange(2048), np.zeros(2048, np.float32), True)
    (name,) = write_shards(tmp_path, rows, known={})
    assert (tmp_path / name).stat().st_size / (50 * 2048) < 8.2
    with h5py.File(tmp_path / name) as file:  # a plain HDF5 file of four datasets
        assert {key: file[key].shape for key in ("rows", "token_ids", "logprobs")} == {
            "rows": (50,), "token_ids": (50 * 2048,), "logprobs": (50 * 2048,)}
        assert len(file) == 4 and file["token_ids"].dtype == np.int32


@pytest.mark.parametrize("harm", ["flip", "truncate", "empty", "remove"])
def test_a_damaged_shard_is_set_aside_and_the_rest_goes_on(
    tmp_path: Path, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    index = write_shards(tmp_path, make(6), known={})
    (name,) = index
    index = write_shards(tmp_path, make(9), known=index)
    path = tmp_path / name
    image = bytearray(path.read_bytes())
    image[len(image) // 2] ^= 1
    changed = {"flip": bytes(image), "truncate": bytes(image[:-1]), "empty": b""}
    path.unlink() if harm == "remove" else path.write_bytes(changed[harm])

    with caplog.at_level(logging.ERROR):
        found, damaged = read_shards(tmp_path, index)
    assert_same(found, make(3, 6))
    assert damaged == [name]
    assert name in caplog.text and "6 trajectories" in caplog.text
    assert name not in files(tmp_path) and (harm == "remove" or f"{name}.damaged" in files(tmp_path))
    assert read_shards(tmp_path, index)[1] == [name]  # a rank that comes later counts it, too
    following = write_shards(tmp_path, found, known=index)
    assert name not in following and read_shards(tmp_path, following)[1] == []
    collect_garbage(tmp_path, [following])
    assert harm == "remove" or f"{name}.damaged" in files(tmp_path)  # kept for the user to look at


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    """The kernel itself refuses the write: files of this process may not grow beyond 20 kB."""
    index = write_shards(tmp_path, make(3), known={})
    big = make(4)
    big[3].completion = Completion(np.arange(5000), np.zeros(5000, np.float32), True)
    before, limits = files(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"cannot write \d+ bytes.*earlier checkpoints are intact") as failure:
            write_shards(tmp_path, big, known=index)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(tmp_path) in str(failure.value) and failure.value.errno
    assert files(tmp_path) == before
    assert_same(read_shards(tmp_path, index)[0], make(3))
    assert_same(read_shards(tmp_path, write_shards(tmp_path, big, known=index))[0], big)  # room again


def test_killed_while_writing_leaves_no_shard(tmp_path: Path) -> None:
    """A process that dies before the rename leaves a file that no index can name, and garbage."""
    index = write_shards(tmp_path, make(3), known={})
    script = (
        "import os, sys, pathlib\n"
        "from megatron_avatar.rl.replay import store\n"
        "store.os.fsync = lambda fd: os._exit(9)\n"
        "store._write_whole(pathlib.Path(sys.argv[1]), 'shard-0.h5', b'half')\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path)], env=environment).returncode == 9
    (left,) = files(tmp_path) - index.keys()
    assert left.endswith(".tmp")
    assert collect_garbage(tmp_path, [index]) == [left]
    assert_same(read_shards(tmp_path, index)[0], make(3))


def test_a_shard_and_its_folder_are_on_the_disk_before_an_index_names_it(tmp_path: Path, monkeypatch) -> None:
    events, fsync, replace = [], os.fsync, os.replace

    def flushed(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def renamed(source: Path, target: Path) -> None:
        events.append(Path(target))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", renamed)
    (name,) = write_shards(tmp_path, make(3), known={})
    content, named, folder = events
    assert content.name.startswith(f".{name}") and (named, folder) == (tmp_path / name, tmp_path)


def test_nothing_to_do(tmp_path: Path) -> None:
    assert write_shards(tmp_path / "new", {}, known={}) == {}
    assert read_shards(tmp_path / "new", {}) == ({}, [])
    assert collect_garbage(tmp_path / "new", []) == []


# ---- shards that others have made ----------------------------------------------------------------------------------


def foreign(folder, change):
    """A sound shard that `change(file, tables)` makes into another one; its index, with the right checksum."""
    (name, shard), = write_shards(folder, make(5), known={}).items()
    with h5py.File(folder / name) as file:
        tables = {table: file[table][:] for table in TABLES}
    (folder / name).unlink()
    with h5py.File(folder / "made.h5", "w") as file:
        change(file, tables)
        for table, values in tables.items():
            if file.get(table, getlink=True) is None:
                file[table] = values
    image = (folder / "made.h5").read_bytes()
    digest = hashlib.sha256(image).hexdigest()
    (folder / "made.h5").rename(folder / f"shard-{digest[:16]}.h5")
    return {f"shard-{digest[:16]}.h5": {**shard, "sha256": digest}}


def outside(link):
    def change(file, tables):
        secret = Path(file.filename).with_name("secret.h5")
        with h5py.File(secret, "w") as other:
            for name, values in tables.items():
                other[name] = values
        link(file, secret)

    return change


def virtual(file, secret):
    layout = h5py.VirtualLayout((5,), TABLES["rows"])
    layout[:] = h5py.VirtualSource(str(secret), "rows", (5,), TABLES["rows"])
    file.create_virtual_dataset("rows", layout)


def external(file, secret):
    secret.write_bytes(b"\0" * 1000)
    file.create_dataset("token_ids", (15,), np.int32, external=[(str(secret), 0, 60)])


def changed(table, key, value):
    def change(file, tables):
        tables[table][key] = value

    return change


def dataset(name, make, **options):
    return lambda file, tables: file.create_dataset(name, data=make(tables), **options)


def linked_inside(file, tables):
    file["other"], file["rows"] = tables["rows"], h5py.SoftLink("/other")


def undeclared(file, tables):
    file.create_dataset("token_ids", (2 * 10**9,), np.int32, chunks=(1024,))


MADE = {
    "external link": outside(lambda file, secret: file.__setitem__("rows", h5py.ExternalLink(str(secret), "rows"))),
    "soft link": linked_inside,
    "virtual": outside(virtual),
    "external storage": outside(external),
    "sizes without bytes": undeclared,
    "packed": dataset("logprobs", lambda tables: np.zeros(10**6, np.float32), compression="gzip"),
    "group": lambda file, tables: file.create_group("meta"),
    "other numbers": dataset("token_ids", lambda tables: tables["token_ids"].astype(np.int64)),
    "two axes": dataset("logprobs", lambda tables: tables["logprobs"][None]),
    "negative": changed("rows", "tokens", -1),
    "too many": changed("rows", "meta", 10**12),
    "other rows": changed("rows", "serial", 77),
    "no JSON": changed("meta", slice(0, 1), ord("[")),
    "other keys": changed("meta", slice(2, 3), ord("X")),
}


@pytest.mark.parametrize("name", MADE)
def test_a_foreign_shard_is_set_aside_and_names_no_other_file(name, tmp_path, caplog):
    index = foreign(tmp_path, MADE[name])
    (shard,) = index
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rows, (told,) = read_rows(tmp_path, {"replay": index})
    assert rows == [] and (told["damage"] or name == "other rows")  # which is none of those alive
    sound = write_shards(tmp_path, make(3, first=50), known={})
    found, damaged = read_shards(tmp_path, {**index, **sound})
    assert list(found) == [50, 51, 52] and damaged == [shard] and f"{shard} is lost" in caplog.text
    assert (tmp_path / f"{shard}.damaged").exists()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**19  # KiB


def test_a_shards_name_stays_in_its_folder(tmp_path, caplog):
    index = write_shards(tmp_path / "a", make(2), known={})
    (tmp_path / "replay").mkdir()
    away = {f"../a/{name}": shard for name, shard in index.items()}
    assert read_shards(tmp_path / "replay", away) == ({}, list(away)) and "leads out of" in caplog.text
    assert files(tmp_path / "a") == set(index)  # and nothing there is renamed
    assert read_rows(tmp_path / "replay", {"replay": away})[0] == []


@settings(max_examples=60)
@given(st.data())
def test_damage_anywhere_is_a_shard_or_none(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("replay")
    (name,) = write_shards(folder, make(4), known={})
    image = bytearray((folder / name).read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(image) - 1), min_size=1, max_size=4)):
        image[place] = data.draw(st.integers(0, 255))
    try:
        rows, tokens, logprobs, meta = read_tables(bytes(image[: data.draw(st.integers(0, len(image)))]))
        assert rows["tokens"].sum() == len(tokens) == len(logprobs) and rows["meta"].sum() == len(meta)
    except ValueError:
        pass
