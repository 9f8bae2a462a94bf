"""A draft of a site's file (config/cluster/SITE.yaml), from what Slurm, `module avail` and this host say.

    python -m megatron_avatar.doctor --site > megatron_avatar/config/cluster/site_NAME.yaml

What nobody but a person can know is marked DECIDE. Commands that are missing or don't answer are named in the draft,
which loads all the same: its values are then the defaults. Needs nothing but the standard library.
"""

from __future__ import annotations

import getpass
import json
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megatron_avatar.config.paths import NAMES, variable
from megatron_avatar.resilience import queue

ANSWER_S = 30.0
USUAL_MINUTES = 1440  # where a partition has no limit
# Name of a GPU in Slurm's words -> cluster.gpu, and GiB where the words don't say. GH200 and GH100 hold an H100.
KNOWN = (("gh200", "h100", 96), ("h200", "h200", 140), ("h100", "h100", 80), ("a100", "a100", 40))
SIZES = "40|64|80|94|96|141|144"
RANK = {"h200": 3, "h100": 2, "a100": 1}
SOFTWARE = re.compile(r"^(cuda|cudatoolkit|nccl|aws-ofi-nccl|apptainer|singularity|pytorch|nvhpc|python)\b", re.I)
SLICE = re.compile(r"\d+g\.\d+gb", re.I)  # MIG: a part of a GPU, alone or behind the GPU's name
INTERFACES = re.compile(r"^(ib|hsn|roce|bond|en|eth)")


@dataclass(frozen=True)
class Node:
    """As sinfo shows it. gpus: type ("": none said) -> count."""

    name: str
    cpus: int
    threads: int
    mib: int
    gpus: tuple[tuple[str, int], ...]
    words: str  # types and features, in small letters


@dataclass
class Partition:
    name: str
    said: dict[str, str]  # scontrol's words
    nodes: list[Node] = field(default_factory=list)

    @property
    def kind(self) -> tuple[str, int]:
        """The commonest (type, count) of GPUs on its nodes; ("", 0) where Slurm names none."""
        found = Counter(gpu for node in self.nodes for gpu in node.gpus)
        return max(found, key=lambda gpu: (RANK.get(model(gpu[0])[0], 0), found[gpu]), default=("", 0))

    def with_gpus(self) -> list[Node]:
        """Its nodes of that kind; all where Slurm names none."""
        return [node for node in self.nodes if self.kind in node.gpus] or self.nodes


@dataclass
class Site:
    """What was asked and what came back."""

    partitions: list[Partition]
    config: dict[str, str]
    associations: list[list[str]]  # account, partition, qos, default qos
    walls: dict[str, str]  # of a qos: its longest job
    modules: list[str]
    silent: list[str]


def model(words: str) -> tuple[str, int, bool]:
    """(cluster.gpu, GiB, whether they are told and not guessed) of a GPU in Slurm's words: a type, features, a
    partition's name. ("", 0, False) where it is none that plans know."""
    each = re.split(r"[^\w.-]+", words.lower())
    for name, gpu, gib in KNOWN:
        if own := [word for word in each if re.search(rf"{name}(?!\d)", word)]:  # a1000 is another
            size = rf"{name}[\w.-]*?[-_]({SIZES})g?b?(?![\da-z])|(?<![\da-z.])({SIZES})gb?(?![\da-z])"
            told = next(filter(None, (re.search(size, word) for word in own)), None)
            return gpu, min(140, int(told[1] or told[2])) if told else gib, bool(told) or gpu == "h200"
    return "", 0, False


def look() -> Site:
    """Ask. Whatever is missing or silent is listed."""
    silent: list[str] = []

    def said(*command: str) -> str:
        try:
            return queue.ask(*command, patience_s=0, answer_s=ANSWER_S)
        except (queue.SlurmRefused, queue.SlurmSilent, OSError) as error:
            reason = str(error)
            silent.append(reason if reason.startswith(command[0]) else f"{command[0]}: {reason}")
            return ""

    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a number without a name
        user = str(os.getuid())
    found = {name: Partition(name, fields) for name, fields in
             ((fields.get("PartitionName", ""), fields) for fields in
              map(_fields, said("scontrol", "--oneliner", "show", "partition").splitlines())) if name}  # fmt: skip
    for line in said("sinfo", "--noheader", "--Node", "--format=%R|%N|%c|%z|%m|%G|%f").splitlines():
        if line.count("|") == 6:
            name, node = line.split("|", 1)[0].strip(), _node(*line.split("|")[1:])
            found.setdefault(name, Partition(name, {})).nodes.append(node)
    config: dict[str, str] = {}
    for line in said("scontrol", "show", "config").splitlines():
        key, equals, value = line.partition("=")
        config |= {key.strip(): value.strip()} if equals else {}
    accounts = said("sacctmgr", "--noheader", "--parsable2", "show", "assoc", f"user={user}",
                    "format=Account,Partition,QOS,DefaultQOS")  # fmt: skip
    walls = said("sacctmgr", "--noheader", "--parsable2", "show", "qos", "format=Name,MaxWall") if accounts else ""
    pairs = (line.split("|") for line in walls.splitlines() if line.count("|") == 1)
    return Site([p for p in found.values() if p.said.get("State", "UP") == "UP"], config,
                [line.split("|") for line in accounts.splitlines() if line.count("|") == 3],
                {name: wall for name, wall in pairs if wall}, _modules(silent), silent)  # fmt: skip


def _fields(line: str) -> dict[str, str]:
    return dict(part.split("=", 1) for part in line.split() if "=" in part)


def _node(name: str, cpus: str, shape: str, mib: str, gres: str, features: str) -> Node:
    parts = (re.match(r"gpu(?::([^:()]+?))??:(\d+)(?:\(|$)", part) for part in re.split(r",(?![^(]*\))", gres))
    gpus = tuple((part[1] or "", int(part[2])) for part in parts if part and not SLICE.search(part[1] or ""))
    count, threads, memory = (int(re.sub(r"\D.*", "", text) or 0) for text in (cpus, shape.rpartition(":")[2], mib))
    return Node(name.strip(), count, threads, memory, gpus, f"{gres},{features}".lower())


def _modules(silent: list[str]) -> list[str]:
    """Environment modules that may matter, as a login shell sees them."""
    try:
        done = subprocess.run(["bash", "-lc", "module -t avail 2>&1"], capture_output=True, text=True, timeout=ANSWER_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        silent.append(f"module avail: {error}")
        return []
    if done.returncode:
        silent.append("module avail: no environment modules in a login shell")
        return []
    names = (re.sub(r"\(.*?\)|<.*?>", "", line).strip() for line in done.stdout.splitlines())
    return list(dict.fromkeys(name for name in names if SOFTWARE.match(name) and not name.endswith(":")))


# ---- the draft -------------------------------------------------------------------------------------------------------


def draft(site: Site) -> str:
    """The file's text."""
    name = site.config.get("ClusterName") or "this site"
    lines = [f"# A draft for {name}, from what Slurm said: each DECIDE is for a person. example.yaml explains keys.",
             "# Save it as megatron_avatar/config/cluster/site_NAME.yaml, and `export AVATAR_CLUSTER=site_NAME`."]
    lines += [f"# No answer: {words}" for words in site.silent]
    for key, value, comment in _entries(site):
        text = value if isinstance(value, str) and value.startswith("\n") else f" {json.dumps(value)}"
        lines.append(f"{key}:{text}{f' # {comment}' if comment else ''}" if key else f"# {comment}")
    return "\n".join(lines) + "\n"


def _entries(site: Site) -> Iterator[tuple[str, object, str]]:
    """(key, value, comment); without a key, a comment alone."""
    with_gpus = [p for p in site.partitions if p.kind[1]]
    named = [p for p in site.partitions if model(p.name)[0] or "gpu" in p.name.lower()]
    featured = [p for p in site.partitions if any(model(node.words)[0] for node in p.nodes)]
    first = next((p for p in site.partitions if p.said.get("Default") == "YES"), None)
    chosen = max(with_gpus or named or featured, key=_worth, default=first)
    others = [p.name for p in (with_gpus or site.partitions) if p is not chosen]
    yield from _nodes(chosen, bool(site.partitions))
    yield from _limits(site, chosen)
    more = f"also: {', '.join(others)}" if others else ""
    decide = f"DECIDE: the one for GPUs{f' of {more[6:]}' if more else ''}" if not with_gpus else more
    yield "partition", chosen.name if chosen else "", decide
    yield from _accounts(site, chosen)
    plain = [p for p in site.partitions if p.nodes and not any(node.gpus for node in p.nodes) and p is not chosen]
    best = max(plain, key=lambda p: (p.said.get("Default") == "YES", len(p.nodes)), default=None)
    yield "cpu_partition", best.name if best and with_gpus else "", "of jobs without a GPU; empty: as the others"
    yield from _software(site, chosen)


def _worth(partition: Partition) -> tuple[int, int, bool]:
    kind, count = partition.kind
    gpu = model(kind)[0] or model(partition.name)[0]
    return RANK.get(gpu, 0), count * len(partition.with_gpus()), partition.said.get("Default") == "YES"


def _nodes(chosen: Partition | None, answered: bool) -> Iterator[tuple[str, object, str]]:
    """What a node is."""
    nodes = chosen.with_gpus() if chosen else []
    kind, count = chosen.kind if chosen else ("", 0)
    words = " ".join([kind, *(node.words for node in nodes[:1]), chosen.name if chosen else ""])
    gpu, gib, sure = model(kind)
    if not sure and (guess := model(words))[0] and gpu in ("", guess[0]):  # features and names may mean anything
        gpu, gib, _ = guess
    if nodes:
        yield "", None, f"{len(nodes)} nodes in {chosen.name if chosen else ''}: {nodes[0].name} to {nodes[-1].name}"
    yield "gpu", gpu or "h100", "" if gpu else (f"DECIDE: Slurm says {kind or 'nothing of GPUs'}; a100, h100 or h200, "
                                                "measured (after --calibrate on such a GPU), or cpu")  # fmt: skip
    yield "gpu_memory_gib", gib or 80, "" if sure else "DECIDE: a guess; nvidia-smi on a node says it"
    yield "gpus_per_node", count or 4, "" if count else "DECIDE: Slurm doesn't count them"
    yield "gres", (f"gpu:{kind}:{{n}}" if kind else "gpu:{n}") if count or not answered else "", \
        "" if count else "empty: the site keeps no account of GPUs" if answered else ""  # fmt: skip
    cpus, threads = min((n.cpus for n in nodes), default=0), max((n.threads for n in nodes), default=1)
    share = max(1, cpus // (count or 4)) if cpus else 12
    yield "cpus_per_task", share, f"of {cpus} of a node{', hyper-threads' if threads > 1 else ''}" if cpus else ""
    mib = min((n.mib for n in nodes), default=0)
    most = (chosen.said.get("MaxMemPerNode", "") if chosen else "").rstrip("M")
    mib = min(mib, int(most)) if most.isdigit() and mib else mib
    yield "host_memory_gib", mib // 1024, "of a node" if mib else "0: not known"


def _limits(site: Site, chosen: Partition | None) -> Iterator[tuple[str, object, str]]:
    """Time, and what happens at its end."""
    said, config = chosen.said if chosen else {}, site.config
    counted = "MEM" in config.get("SelectTypeParameters", "MEM").upper()
    yield "memory", "plan", "" if counted else "Slurm keeps no account of memory here"
    told = said.get("MaxTime", "")
    limit = queue.seconds(told)
    if limit is None or limit == float("inf"):
        why = f"DECIDE: MaxTime is {told}; short jobs start sooner" if told else "DECIDE: the longest job"
        yield "minutes", USUAL_MINUTES, why
    else:
        yield "minutes", max(1, int(limit // 60)), f"MaxTime of {chosen.name if chosen else ''}"
    yield "signal_s", 300, f"KillWait is {config['KillWait']}" if "KillWait" in config else ""
    mode = said.get("PreemptMode") or config.get("PreemptMode", "OFF")
    if config.get("PreemptType", "preempt/none") != "preempt/none" and mode not in ("OFF", "GANG"):
        grace = said.get("GraceTime", "0")
        ask = ("its processes are told, and save their state" if "preempt_send_user_signal" in
               config.get("SlurmctldParameters", "") else "without preempt_send_user_signal they may only be killed: "
               "what is newer than the last checkpoint is lost (checkpoint.minutes)")  # fmt: skip
        yield "", None, f"Jobs may be preempted (PreemptMode={mode}, {grace} s of grace): {ask}."
        if "CANCEL" in mode:
            yield "", None, "Preempted jobs are cancelled here, not requeued: submit the same again."
    if config.get("JobRequeue") == "0":
        yield "", None, "JobRequeue=0: jobs are requeued only where they ask for it (--requeue), as these scripts do."
    yield "retries", 3, ""


def _accounts(site: Site, chosen: Partition | None) -> Iterator[tuple[str, object, str]]:
    allowed = (chosen.said.get("AllowAccounts", "ALL") if chosen else "ALL").lower().split(",")
    own = [row for row in site.associations if (allowed == ["all"] or row[0].lower() in allowed)
           and row[1] in ("", chosen.name if chosen else "")]  # fmt: skip
    accounts = list(dict.fromkeys(row[0] for row in own))
    needed = "associations" in site.config.get("AccountingStorageEnforce", "") or allowed != ["all"]
    yield "account", accounts[0] if accounts else "", (
        f"DECIDE: one of {', '.join(accounts)}" if len(accounts) > 1 else
        "" if accounts else "DECIDE: jobs need one here" if needed else "empty: your default")  # fmt: skip
    names = list(dict.fromkeys(name for row in own for name in row[2].split(",") if name))
    allow = (chosen.said.get("AllowQos", "ALL") if chosen else "ALL").split(",")
    usable = [name for name in names if allow == ["ALL"] or name in allow]
    default = next((row[3] for row in own if row[3]), "normal")
    listed = ", ".join(f"{name}{f' (at most {site.walls[name]})' if name in site.walls else ''}" for name in usable)
    if allow != ["ALL"] and default not in allow:
        yield "qos", [*usable, *allow][0], f"DECIDE: {chosen.name if chosen else ''} takes {', '.join(allow)}"
    else:
        yield "qos", "", f"empty: your default; there are {listed}" if listed else "empty: your default"


def _software(site: Site, chosen: Partition | None) -> Iterator[tuple[str, object, str]]:
    kinds = {gpu[0] for node in (chosen.nodes if chosen else []) for gpu in node.gpus}
    mixed = f"{chosen.name if chosen else ''} has {', '.join(sorted(map(str, kinds)))}" if len(kinds) > 1 else ""
    yield "sbatch", [], mixed
    given = {key: path for key in NAMES if (path := os.environ.get(variable(key)))}
    if given:
        yield "paths", "".join(f"\n  {key}: {json.dumps(path)}" for key, path in given.items()), ""
    yield "", None, "DECIDE: paths of models and data (model_7b, data ...), as in example.yaml, or in the environment."
    yield "modules", [], (f"there are {', '.join(site.modules[:12])}{' ...' if len(site.modules) > 12 else ''}; "
                          "pip's PyTorch brings its own CUDA" if site.modules else "")  # fmt: skip
    runtime = "pyxis" if _pyxis() else next((name for name in ("apptainer", "singularity") if shutil.which(name)), "")
    words = f"{runtime} is here; slurm/containers has recipes" if runtime else "no runtime was found from here"
    yield "container", "", f"empty: none. {words}"
    yield "runtime", runtime or "pyxis", ""
    node = chosen.nodes[0].name if chosen and chosen.nodes else ""
    juwels = re.match(r"jw[bc]\d", node)
    yield "master", "{node}i" if juwels else "{node}", "its name on InfiniBand" if juwels else ""
    here = [path.name for path in sorted(Path("/sys/class/net").glob("*")) if INTERFACES.match(path.name)]
    there = f"; this host, which may differ from the nodes, has {', '.join(here)}" if here else ""
    yield "env", '\n  NCCL_DEBUG: "WARN"', ""
    yield "", None, f"DECIDE: NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME where nodes have several networks{there}."


def _pyxis() -> bool:
    """Whether srun has pyxis's options."""
    try:
        return "--container-image" in queue.ask("srun", "--help", patience_s=0, answer_s=ANSWER_S)
    except (queue.SlurmRefused, queue.SlurmSilent, OSError):
        return False


def show(write: Callable[[str], object] = print) -> None:
    """Print the draft."""
    write(draft(look()).removesuffix("\n"))
