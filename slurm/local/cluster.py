"""A real Slurm on one machine: munge, slurmctld and several slurmd as named nodes with make-believe GPUs.

    python slurm/local/cluster.py up [--nodes 4] [--gpus 2]     # then: source <(python slurm/local/cluster.py env)
    python slurm/local/cluster.py status | env | down

For rehearsing a launch: sbatch scripts, requeueing, preemption and job arrays behave as on a cluster. Everything lives
in one private folder ($AVATAR_SLURM, by default in /tmp); no service of the machine is touched. Needs Debian's
slurm-wlm and munge. As root each node gets a hostname of its own, otherwise all of them share the machine's.
The GPUs are names that jobs can ask for: behind them is /dev/null.
"""

from __future__ import annotations

import argparse
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROGRAMS = ("munged", "mungekey", "slurmctld", "slurmd", "sbatch", "sinfo")
SBIN = "/usr/sbin:/sbin"  # Debian keeps the daemons there, outside of most users' PATH
DEADLINE = 30.0  # seconds for all nodes to register
PARTITIONS = """
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def folder() -> Path:
    return Path(os.environ.get("AVATAR_SLURM") or Path(tempfile.gettempdir()) / f"avatar-slurm-{os.getuid()}")


def environment() -> dict[str, str]:
    """What a shell needs to talk to this Slurm. A stand-in for sacct comes first on PATH: there is no accounting."""
    return {"SLURM_CONF": str(folder() / "slurm.conf"), "PATH": f"{folder() / 'bin'}:{os.environ['PATH']}:{SBIN}"}


def missing() -> list[str]:
    """Programs that Debian's packages would bring."""
    return [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:{SBIN}") is None]


def up(nodes: int, gpus: int, cpus: int, first_job: int = 1) -> None:
    """Start the cluster, or leave a running one alone; ValueError where something is missing or doesn't come up.

    Jobs are counted from `first_job`: their ports follow from it, and two clusters of one machine share those.
    """
    if lacking := missing():
        raise ValueError(f"{', '.join(lacking)} not found: apt install slurm-wlm munge")
    if running():
        return
    root = folder()
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True, mode=0o755)
    for name in ("bin", "log", "state", "spool", "pid"):
        (root / name).mkdir()
    _write_configuration(root, nodes, gpus, cpus, first_job)
    _start_munge(root)
    _start(["slurmctld", "-i", "-f", str(root / "slurm.conf")], root / "log" / "slurmctld.out", "slurmctld")
    own_names = _may_name_nodes()
    for number in range(1, nodes + 1):
        command = ["slurmd", "-D", "-f", str(root / "slurm.conf"), "-N", f"n{number}"]
        if own_names:
            inside = f"hostname n{number}; mount --bind {root / 'hosts'} /etc/hosts; exec {' '.join(command)}"
            command = ["unshare", "--uts", "--mount", "sh", "-c", inside]
        _spawn(command, root / "log" / f"n{number}.out", f"slurmd-n{number}")
    end = time.monotonic() + DEADLINE
    while True:
        states = _states()
        if len(states) == nodes and set(states.values()) == {"idle"}:
            return
        if time.monotonic() > end:
            raise ValueError(f"the nodes didn't come up in {DEADLINE:.0f} s ({states}): see {root / 'log'}")
        time.sleep(0.2)


def down() -> None:
    """End all jobs and daemons of this cluster and remove its folder."""
    root = folder()
    if running():
        user = pwd.getpwuid(os.getuid()).pw_name
        subprocess.run(["scancel", "--user", user], env=shell(), capture_output=True, timeout=30)
        time.sleep(1)
    pids = {path.stem: int(path.read_text()) for path in sorted((root / "pid").glob("*.pid"), reverse=True)}
    for name in sorted(pids, key=lambda name: name == "munged"):  # the daemons sign their farewells with munge
        _end(pids[name])
    shutil.rmtree(root, ignore_errors=True)


def _write_configuration(root: Path, nodes: int, gpus: int, cpus: int, first_job: int) -> None:
    user = pwd.getpwuid(os.getuid()).pw_name
    control, *ports = _free_ports(nodes + 1)
    own_names = _may_name_nodes()
    host = socket.gethostname()
    lines = "\n".join(
        f"NodeName=n{i} NodeHostname={f'n{i}' if own_names else host} NodeAddr=127.0.1.{i} Port={port} "
        f"CPUs={cpus} RealMemory=16000 Gres=gpu:a100:{gpus} State=UNKNOWN"
        for i, port in enumerate(ports, 1)
    )
    (root / "slurm.conf").write_text(f"""# written by slurm/local/cluster.py
ClusterName=rehearsal
FirstJobId={first_job}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={root}/munge.sock,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/pid/slurmctld.pid
SlurmdPidFile={root}/spool/%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
GresTypes=gpu
ReturnToService=2
KillWait=3
InactiveLimit=0
MailProg=/bin/true
{lines}
{PARTITIONS.replace("State=UP Pri", "State=UP GraceTime=15 Pri")}""")
    (root / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    devices = ["/dev/null", "/dev/zero", "/dev/full", "/dev/random"]
    assert gpus <= len(devices), f"at most {len(devices)} make-believe GPUs a node"
    (root / "gres.conf").write_text("".join(f"Name=gpu Type=a100 File={device}\n" for device in devices[:gpus]))
    names = "".join(f"127.0.1.{i} n{i}\n" for i in range(1, nodes + 1))
    (root / "hosts").write_text(Path("/etc/hosts").read_text() + names)
    sacct = root / "bin" / "sacct"  # submitit asks sacct for the states of its jobs
    sacct.write_text("#!/bin/sh\necho 'JobID|State|NodeList'\nexec squeue -h -r -t all -o '%i|%T|%N'\n")
    sacct.chmod(0o755)


def _start_munge(root: Path) -> None:
    key = root / "munge.key"
    subprocess.run(["mungekey", "--create", f"--keyfile={key}"], env=shell(), check=True, capture_output=True)
    command = ["munged", f"--socket={root}/munge.sock", f"--key-file={key}", f"--pid-file={root}/pid/munged.pid",
               f"--log-file={root}/log/munged.log", f"--seed-file={root}/munge.seed", "--force"]  # fmt: skip
    subprocess.run(command, env=shell(), check=True, capture_output=True)


def _start(command: list[str], output: Path, name: str) -> None:
    with output.open("w") as file:
        if subprocess.run(command, env=shell(), stdout=file, stderr=file).returncode:
            raise ValueError(f"{name} didn't start: see {output}")


def _spawn(command: list[str], output: Path, name: str) -> None:
    with output.open("w") as file:
        process = subprocess.Popen(command, env=shell(), stdout=file, stderr=file, start_new_session=True)
    (folder() / "pid" / f"{name}.pid").write_text(str(process.pid))


def _end(pid: int) -> None:
    """Ask a daemon to leave, and make it after five seconds."""
    for attempt in range(50):
        try:
            os.kill(pid, signal.SIGTERM if attempt < 49 else signal.SIGKILL)
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return  # dead, its parent has not asked yet
        except (ProcessLookupError, FileNotFoundError):
            return
        time.sleep(0.1)


def _may_name_nodes() -> bool:
    return subprocess.run(["unshare", "--uts", "--mount", "true"], capture_output=True).returncode == 0


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for probe in sockets:
            probe.bind(("", 0))
        return [probe.getsockname()[1] for probe in sockets]
    finally:
        for probe in sockets:
            probe.close()


def _states() -> dict[str, str]:
    command = ["sinfo", "--noheader", "--Node", "--partition=main", "--format=%N %t"]
    run = subprocess.run(command, env=shell(), capture_output=True, text=True, timeout=30)
    return dict(line.split() for line in run.stdout.splitlines())


def running() -> bool:
    """Whether this user's cluster answers."""
    return (folder() / "slurm.conf").is_file() and bool(_states())


def shell() -> dict[str, str]:
    """This process's environment, with what Slurm's commands need."""
    return {**os.environ, **environment()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("up", "down", "status", "env"))
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--gpus", type=int, default=2, help="make-believe GPUs a node")
    parser.add_argument("--cpus", type=int, default=8, help="processors a node claims to have")
    arguments = parser.parse_args()
    try:
        if arguments.action == "up":
            up(arguments.nodes, arguments.gpus, arguments.cpus)
        elif arguments.action == "down":
            down()
        if arguments.action == "env":
            print("".join(f"export {key}={value!r}\n" for key, value in environment().items()), end="")
        elif arguments.action != "down":
            print(" ".join(f"{name}:{state}" for name, state in _states().items()) or "no cluster is running")
    except (ValueError, OSError, subprocess.SubprocessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
