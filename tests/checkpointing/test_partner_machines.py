"""Two machines with a network, a name and a memory each, where this user may make them; else two that pass for such."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from undertow.benchmarks import partner_kills
from undertow.dist.launch import free_port

JOB = Path(__file__).parent / "partner_job.py"
# no name server can be reached, and nobody shall wait for one
INSIDE = """hostname "$0" && mount --bind "$1" /dev/shm && shift || exit 1
mount --bind /dev/null /etc/resolv.conf
exec "$@"
"""


class Machines:
    """`memory[k]` is what machine k loses with its power."""

    def __init__(self, folder: Path, spaces: list[str]) -> None:
        self.root, self.spaces = folder / "c", spaces
        self.memory = [folder / f"memory-{k}" for k in range(2)]
        self.running: list[subprocess.Popen] = []

    def start(self, act: str) -> None:
        """A rank on each machine."""
        port = str(free_port())
        for k, memory in enumerate(self.memory):
            memory.mkdir(exist_ok=True)
            command = [sys.executable, str(JOB), act, str(self.root)]
            if self.spaces:
                inside = ["bash", "-c", INSIDE, f"machine-{k}", str(memory)]
                command = ["ip", "netns", "exec", self.spaces[k], "unshare", "--uts", "--mount", *inside, *command]
            else:
                command.append(str(memory))
            address = "10.77.0.1" if self.spaces else "127.0.0.1"
            env = os.environ | {"RANK": str(k), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
            env |= {"MASTER_ADDR": address, "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
            self.running.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))

    def lines(self) -> list[str]:
        """The first line of each rank, '' where it has ended without one."""
        return [process.stdout.readline().strip() for process in self.running if process.stdout is not None]

    def end(self) -> list[int]:
        """Kill what still runs; the exit codes."""
        for process in self.running:
            process.send_signal(signal.SIGKILL)
        codes = [process.wait() for process in self.running]
        for process in self.running:
            assert process.stdout is not None
            process.stdout.close()
        self.running = []
        return codes


@contextmanager
def machines(folder: Path) -> Iterator[Machines]:
    spaces = [f"undertow-{os.getpid()}-{k}" for k in range(2)]
    try:
        two = Machines(folder, spaces if _network(spaces) else [])
        try:
            yield two
        finally:
            two.end()
    finally:
        for space in spaces if shutil.which("ip") else []:
            subprocess.run(["ip", "netns", "del", space], capture_output=True)


def _network(spaces: list[str]) -> bool:
    """Whether two network namespaces with a cable between them, and what a machine needs besides, could be made."""
    one, other = spaces
    commands = [
        "unshare --uts --mount --net true",
        f"ip netns add {one}",
        f"ip netns add {other}",
        f"ip link add cable netns {one} type veth peer name cable netns {other}",
        *(f"ip -n {space} addr add 10.77.0.{k}/24 dev cable" for k, space in enumerate(spaces, 1)),
        *(f"ip -n {space} link set {link} up" for space in spaces for link in ("cable", "lo")),
    ]
    if not shutil.which("ip") or not shutil.which("unshare"):
        return False
    return all(subprocess.run(command.split(), capture_output=True).returncode == 0 for command in commands)


@pytest.mark.slow
def test_a_machine_that_comes_back_empty_gets_its_state_from_its_partner(tmp_path):
    with machines(tmp_path) as two:
        two.start("train")
        assert two.lines() == ["saved", "saved"]
        assert two.end() == [-signal.SIGKILL] * 2
        shutil.rmtree(two.memory[1])
        two.start("restart")
        for line in two.lines():
            step, right, origins, partners, hosts, places = json.loads(line)
            assert (step, right) == (3, True)
            assert "memory of other machines" not in origins[0] and list(origins[1]) == ["memory of other machines"]
            assert (partners, hosts) == ([1, 0], ["machine-0", "machine-1"])
            assert places == (["10.77.0.1", "10.77.0.2"] if two.spaces else ["127.0.0.1"] * 2)
        assert not list(two.root.glob("step-*"))


@pytest.mark.slow
def test_kills_at_any_moment_lose_no_committed_step(tmp_path, seed):
    rows = partner_kills.run(3, tmp_path, ranks=3, machines=2, seed=seed)
    assert len(rows) == 3 and all(row.good for row in rows), rows
