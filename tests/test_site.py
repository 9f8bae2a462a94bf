"""Drafts of a site's file, from fakes of Slurm's commands: whatever they say, the draft loads."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from megatron_avatar import site
from megatron_avatar.config import load_config
from megatron_avatar.config.paths import NAMES, variable
from megatron_avatar.config.schema import ClusterConfig
from megatron_avatar.config.validate import validate

PARTITION = ("PartitionName={name} AllowGroups=ALL AllowAccounts={accounts} AllowQos={qos} Default={default} "
             "GraceTime={grace} MaxTime={time} Nodes=x PreemptMode={mode} State={state} MaxMemPerNode={memory}")
USUAL = dict(accounts="ALL", qos="ALL", default="NO", grace="0", time="1-00:00:00", mode="OFF", state="UP",
             memory="UNLIMITED")  # fmt: skip


@pytest.fixture
def slurm(tmp_path, monkeypatch, fake_slurm):
    """`slurm(partitions=…, nodes=…, config=…, assoc=…, qos=…, modules=…)` is the site; returns (entries, text)."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in NAMES:
        monkeypatch.delenv(variable(name), raising=False)
    monkeypatch.setattr(site.shutil, "which", lambda name: None)

    def command(name: str, **answers: list[str]) -> None:
        cases = []
        for word, lines in answers.items():
            (fake_slurm.folder / f"{name}.{word}").write_text("".join(f"{line}\n" for line in lines))
            cases.append(f"*{word}*) cat {fake_slurm.folder}/{name}.{word} ;;")
        program = fake_slurm.folder / name
        program.write_text(f"#!/bin/bash\ncase \"$*\" in {' '.join(cases)} *) exit 1 ;; esac\n")
        program.chmod(0o755)

    def draft(partitions=(), nodes=(), config=(), assoc=None, qos=(), modules=None, pyxis=False) -> tuple[dict, str]:
        shown = [PARTITION.format(**USUAL | partition) for partition in partitions]
        command("scontrol", partition=shown, config=["Configuration data as of now", *config])
        command("sinfo", noheader=list(nodes))
        command("srun", help=["--container-image=[USER@]IMAGE"] if pyxis else ["Usage: srun"])
        if assoc is None:
            command("sacctmgr")
        else:
            command("sacctmgr", assoc=assoc, qos=list(qos))
        lines = f"printf '%s\\n' {shlex.join(modules)}" if modules else "return 1"
        monkeypatch.setenv("BASH_FUNC_module%%", f"() {{ {lines}; }}")
        text = site.draft(site.look())
        return loaded(text), text

    return draft


def loaded(text: str) -> dict:
    """The draft as the settings take it."""
    config = load_config(["recipe=avatar_7b", "model.path=m", "data.manifest=d"])
    config.cluster = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ClusterConfig), OmegaConf.create(text)))
    validate(config)
    return vars(config.cluster)


def nodes(partition: str, names: list[str], gres: str, *, cpus=64, shape="2:32:1", mib=515000, features="(null)"):
    return [f"{partition}|{name}|{cpus}|{shape}|{mib}|{gres}|{features}" for name in names]


def test_typed_gpus_limits_and_accounts(slurm):
    found, text = slurm(
        partitions=[dict(name="cpu", default="YES"), dict(name="gpu", time="12:00:00", accounts="proj1,proj2"),
                    dict(name="old", state="DOWN")],
        nodes=[*nodes("cpu", ["c1", "c2"], "(null)"),
               *nodes("gpu", ["nid001234", "nid001235"], "gpu:a100:4(S:0-1),lscratch:1", features="a100-80,nvlink"),
               *nodes("gpu", ["nid002000"], "gpu:v100:4"), *nodes("old", ["o1"], "gpu:h100:8")],
        config=["ClusterName = perl", "AccountingStorageEnforce = associations,limits", "KillWait = 30 sec",
                "SelectTypeParameters = CR_CORE_MEMORY"],
        assoc=["proj1||normal,long|normal", "proj2||normal|normal", "proj9||normal|normal"],
        qos=["long|7-00:00:00", "n|"],
        modules=["/apps:", "cuda/12.4", "cuda/13.0(default)", "gcc/12", "nccl/2.27"], pyxis=True,
    )  # fmt: skip
    assert (found["gpu"], found["gpu_memory_gib"], found["gpus_per_node"]) == ("a100", 80, 4)
    assert found["gres"] == "gpu:a100:{n}"
    assert (found["cpus_per_task"], found["host_memory_gib"], found["minutes"]) == (16, 502, 720)
    assert (found["partition"], found["cpu_partition"], found["account"]) == ("gpu", "cpu", "proj1")
    assert (found["runtime"], found["master"], found["modules"]) == ("pyxis", "{node}", [])
    for words in ("A draft for perl", "2 nodes in gpu: nid001234 to nid001235", "DECIDE: one of proj1, proj2",
                  "long (at most 7-00:00:00)", "KillWait is 30 sec", "there are cuda/12.4, cuda/13.0, nccl/2.27",
                  "gpu has a100, v100", "pyxis is here"):  # fmt: skip
        assert words in text, words
    assert "gpu_memory_gib: 80 # DECIDE: a guess" in text, "of a feature"
    assert "old" not in text and "proj9" not in text


def test_what_a_node_has_of_memory_is_not_its_gpus(slurm):
    for features in ("mem_64g", "ram_96gb", "a1000"):
        found, text = slurm([dict(name="g")], nodes("g", ["a"], "gpu:a100:4", features=features))
        assert found["gpu_memory_gib"] == 40 and "gpu_memory_gib: 40 # DECIDE: a guess" in text
    found, text = slurm([dict(name="g")], nodes("g", ["a"], "gpu:a100-sxm4-80gb:4", features="mem_64g,a100-40"))
    assert found["gpu_memory_gib"] == 80 and "nvidia-smi" not in text


def test_without_gres_a_partitions_name_or_a_nodes_feature_says_it(slurm):
    parts = [dict(name="main", default="YES", time="UNLIMITED"), dict(name="h100", time="UNLIMITED")]
    found, text = slurm(parts, [*nodes("main", ["m1"], "(null)"), *nodes("h100", ["jwb0001", "jwb0002"], "(null)")])
    assert (found["partition"], found["gpu"], found["gres"], found["gpus_per_node"]) == ("h100", "h100", "", 4)
    assert found["minutes"] == site.USUAL_MINUTES and "MaxTime is UNLIMITED" in text
    assert found["master"] == "{node}i" and "Slurm doesn't count them" in text and "keeps no account of GPUs" in text
    found, text = slurm(parts[:1], nodes("main", ["m1"], "(null)", features="nvidia_a100_40gb,ib"))
    assert (found["partition"], found["gpu"], found["gpu_memory_gib"]) == ("main", "a100", 40)
    found, text = slurm(parts[:1], nodes("main", ["m1"], "(null)"))
    assert found["partition"] == "main" and "DECIDE: Slurm says nothing of GPUs" in text


@pytest.mark.parametrize(("config", "says"), [
    (["SlurmctldParameters = preempt_send_user_signal"], "its processes are told, and save their state"),
    (["SlurmctldParameters = (null)"], "what is newer than the last checkpoint is lost"),
])  # fmt: skip
def test_preemption_and_requeueing_are_told(slurm, config, says):
    config = [*config, "PreemptType = preempt/partition_prio", "JobRequeue = 0", "SelectTypeParameters = CR_CORE"]
    gpus = nodes("g", ["c3-x9"], "gpu:8", shape="2:32:2")
    found, text = slurm([dict(name="g", mode="CANCEL", grace="120", memory="400000")], gpus, config)
    assert says in text and "PreemptMode=CANCEL, 120 s of grace" in text and "cancelled here, not requeued" in text
    assert "JobRequeue=0" in text and "no account of memory" in text and "of 64 of a node, hyper-threads" in text
    assert (found["gres"], found["host_memory_gib"], found["cpus_per_task"]) == ("gpu:{n}", 390, 8)
    assert "DECIDE: Slurm says nothing of GPUs" in text, "they have no type"
    found, text = slurm([dict(name="g")], gpus, [*config[1:2], "SlurmctldParameters = (null)"])
    assert "preempted" not in text


def test_a_qos_that_the_partition_wants_and_an_account_that_is_lacking(slurm):
    found, text = slurm([dict(name="g", qos="gpu_short,gpu_long")], nodes("g", ["a"], "gpu:h200:8"), assoc=[])
    assert found["qos"] == "gpu_short" and "DECIDE: g takes gpu_short, gpu_long" in text
    found, text = slurm([dict(name="g", accounts="x")], nodes("g", ["a"], "gpu:h200:8"))
    assert found["account"] == "" and "DECIDE: jobs need one here" in text and found["gpu_memory_gib"] == 140
    found, text = slurm([dict(name="g")], nodes("g", ["a"], "gpu:1g.10gb:7,gpu:h100:1"))
    assert found["gpus_per_node"] == 1 and found["gres"] == "gpu:h100:{n}", "a slice of a GPU is none"
    for part in ("a100_1g.5gb", "nvidia_a100_3g.20gb", "nvidia_a100_1g.5gb.me"):
        found, text = slurm([dict(name="g")], nodes("g", ["a"], f"gpu:{part}:14,gpu:a100:2"))
        assert found["gpus_per_node"] == 2 and found["gres"] == "gpu:a100:{n}", part


def test_where_nothing_answers_the_draft_holds_the_defaults_and_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("AVATAR_DATA", "/data/ü #1.jsonl")
    text = site.draft(site.look())
    for name in ("scontrol", "sinfo", "sacctmgr"):
        assert f"# No answer: {name} is not on this machine" in text
    assert "module avail" in text
    found, default = loaded(text), vars(ClusterConfig())
    for key in ("gpu", "gpus_per_node", "gres", "cpus_per_task", "minutes", "partition", "account", "host_memory_gib"):
        assert found[key] == default[key], key
    assert found["paths"]["data"] == "/data/ü #1.jsonl"
    assert text.count("DECIDE") >= 5


@pytest.mark.parametrize(("words", "gpu"), [
    ("nvidia_h100_80gb_hbm3", ("h100", 80, True)), ("a100-sxm4-40gb", ("a100", 40, True)),
    ("a100", ("a100", 40, False)),
    ("gpu:a100:8,cpu64", ("a100", 40, False)), ("gh200", ("h100", 96, False)), ("h200", ("h200", 140, True)),
    ("nvidia_gh200_480gb", ("h100", 96, False)), ("H100-94", ("h100", 94, True)), ("v100", ("", 0, False)),
    ("nvidia_rtx_a1000", ("", 0, False)), ("a100,mem_64g", ("a100", 40, False)), ("a100_3g.40gb", ("a100", 40, False)),
])  # fmt: skip
def test_a_gpus_name(words, gpu):
    assert site.model(words) == gpu


def test_the_page_names_every_key():
    page = (Path(site.__file__).parents[1] / "docs" / "cluster.md").read_text()
    keys = re.findall(r"`(\w+)`", page[page.index("## A site's file"):page.index("## What a job does")])
    assert vars(ClusterConfig()).keys() <= set(keys)


def test_it_is_printed(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["doctor", "--site"])
    from megatron_avatar import doctor

    doctor.main()
    assert loaded(capsys.readouterr().out)["partition"] == ""
    assert "doctor --site" in (Path(site.__file__).parent / "config/cluster/example.yaml").read_text()
