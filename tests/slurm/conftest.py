"""A private Slurm on this host: one slurmctld and two slurmd, each a virtual node, on loopback and free ports.

Nothing of the system's own Slurm is touched: configuration, state, spool and logs are in the test's folder, processes
stay in the foreground as children, and are ended by their id. No munge, no cgroups, no systemd.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from undertow.dist.launch import free_port

CONF = """\
ClusterName=undertow
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,defer_batch
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
JobRequeue=1
KillWait=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=low Nodes=n[1-2] Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=60 State=UP
PartitionName=high Nodes=n[1-2] PriorityTier=10 PreemptMode=OFF State=UP
"""


def free_ports(count: int) -> list[int]:
    ports: set[int] = set()
    while len(ports) < count:
        ports.add(free_port())
    return sorted(ports)


@dataclass
class Cluster:
    folder: Path
    env: dict[str, str]

    def call(self, *words: str) -> str:
        """One of Slurm's commands; its output. Fails with what it said."""
        done = subprocess.run(words, env=self.env, cwd=self.folder, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, f"{' '.join(words)}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, script: Path, *options: str) -> str:
        """The job's number."""
        return self.call("sbatch", "--parsable", *options, str(script)).strip()

    def job(self, number: str) -> dict[str, str]:
        shown = self.call("scontrol", "-o", "show", "job", number)
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def wait(self, number: str, states: str, *, timeout_s: float = 400) -> dict[str, str]:
        """Until the job is in one of `states` (words); a pending job waits for no requeue delay."""
        deadline_s, pending_s = time.monotonic() + timeout_s, 0.0
        while True:
            job = self.job(number)
            if job["JobState"] in states.split():
                return job
            assert time.monotonic() < deadline_s, f"job {number} is {job}\n{self.logs()}"
            pending_s = pending_s + 0.2 if job["JobState"] == "PENDING" else 0.0
            if pending_s > 5 and int(job["Restarts"]):  # the old script's end would be taken for the new start's
                subprocess.run(
                    ["scontrol", "update", f"jobid={number}", "StartTime=now"], env=self.env, capture_output=True
                )  # refused while it is starting
            time.sleep(0.2)

    def logs(self) -> str:
        """The newest words of everything that wrote a log here."""
        files = sorted(self.folder.rglob("*.log"))
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in files)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    missing = [name for name in ("sbatch", "slurmctld", "slurmd") if not shutil.which(name, path=_path())]
    if missing or os.geteuid() != 0:
        pytest.skip(f"a private Slurm needs root and {', '.join(missing) or 'slurm-wlm'}: `make system` as root")
    folder = tmp_path_factory.mktemp("slurm")
    ports = free_ports(3)
    host = socket.gethostname().split(".")[0]
    nodes = "\n".join(
        f"NodeName=n{i} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[i]} CPUs=4 RealMemory=1000" for i in (1, 2)
    )
    for name in ("state", "spool/n1", "spool/n2"):
        (folder / name).mkdir(parents=True)
    (folder / "slurm.conf").write_text(CONF.format(host=host, ports=ports, folder=folder, nodes=nodes))
    keep = {
        name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH", "TORCHELASTIC"))
    }
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "RUN_DIR"):
        keep.pop(name, None)
    path = f"{Path(sys.executable).parent}{os.pathsep}{_path()}"
    env = {**keep, "PATH": path, "SLURM_CONF": str(folder / "slurm.conf"), "OMP_NUM_THREADS": "1"}
    daemons = []
    try:
        for command in (["slurmctld", "-D", "-c"], *(["slurmd", "-D", "-N", f"n{i}"] for i in (1, 2))):
            log = (folder / f"{command[0]}-{command[-1]}.out.log").open("w")
            program = shutil.which(command[0], path=path) or command[0]
            words = [program, *command[1:]]
            daemons.append(
                subprocess.Popen(
                    words, env=env, stdout=log, stderr=log, start_new_session=True, preexec_fn=_die_with_parent
                )
            )
        found = Cluster(folder, env)
        _ready(found, daemons)
        yield found
        subprocess.run(["scancel", "--user=root"], env=env, capture_output=True, timeout=240)
        time.sleep(0.5)
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def _die_with_parent() -> None:
    """So that no daemon stays behind when the test itself is killed."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _path() -> str:
    return os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


def _ready(cluster: Cluster, daemons: list[subprocess.Popen]) -> None:
    deadline_s = time.monotonic() + 240
    while True:
        seen = subprocess.run(["sinfo", "-h", "-N", "-o", "%t"], env=cluster.env, capture_output=True, text=True)
        if seen.stdout.split() == ["idle"] * 4:  # two nodes in two partitions
            return
        assert all(daemon.poll() is None for daemon in daemons), f"a daemon ended\n{cluster.logs()}"
        assert time.monotonic() < deadline_s, f"Slurm is not ready: {seen.stdout}{seen.stderr}\n{cluster.logs()}"
        time.sleep(0.1)
