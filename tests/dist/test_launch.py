"""Joining the job: a plain process, ranks under torchrun with restarts, MPI, and what the user can mend."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from undertow.dist.errors import PeerLost, UserError
from undertow.dist.launch import Launch, any_shared, detect, free_port, init_process_group, local_device

CPU = torch.device("cpu")
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def rejoin(launch: Launch) -> tuple[float, str]:
    """Leave the fixture's group, join by `launch`, reduce; the sum of ranks and gloo's interface."""
    dist.barrier()  # a rank that leaves now could break the connections that others are still making
    dist.destroy_process_group()
    for name in (*LAUNCHER_VARIABLES, "GLOO_SOCKET_IFNAME"):
        os.environ.pop(name, None)
    init_process_group(launch, device=CPU, timeout_s=240)
    total = torch.tensor(float(launch.rank))
    dist.all_reduce(total)
    return total.item(), os.environ.get("GLOO_SOCKET_IFNAME", "")


@pytest.mark.parametrize(("names", "shared"), [(["a", "b", "c"], False), (["a", "b", "a"], True), (["a"], False)])
def test_ranks_learn_whether_two_share_a_device(names, shared):
    store = dist.HashStore()
    with ThreadPoolExecutor(len(names)) as pool:
        told = list(pool.map(lambda name: any_shared(store, name, len(names)), names))
    assert told == [shared] * len(names)


def plain(rank, world):
    return rejoin(detect({}))


def with_port(rank, world, port):
    return rejoin(Launch("torchrun", rank, world, rank, world, "127.0.0.1", port))


def by_srun(rank, world, job):
    env = {
        "SLURM_STEP_ID": "0",
        "SLURM_JOB_ID": str(job),
        "SLURM_PROCID": str(rank),
        "SLURM_NTASKS": str(world),
        "SLURM_LOCALID": str(rank),
        "SLURM_NNODES": "1",
        "SLURM_STEP_NODELIST": "node7",
    }
    return rejoin(detect(env))


def test_a_plain_process_needs_no_environment(ranks):
    assert ranks(1, plain)[0][0] == 0.0


def test_ranks_on_one_host_meet_and_bind_loopback(ranks):
    results = ranks(3, with_port, free_port())
    assert [total for total, _ in results] == [3.0] * 3
    assert {interface for _, interface in results} == {"lo"}


def test_srun_tasks_meet_without_a_port_in_the_environment(ranks):
    assert [total for total, _ in ranks(2, by_srun, os.getpid())] == [1.0, 1.0]


def _restarted_rank(rank: int, world: int, port: int, attempt: int, said: Connection) -> None:
    """One rank of one attempt against the agent's store: join, reduce, tell, and wait to be killed."""
    try:
        launch = Launch("torchrun", rank, world, rank, world, "127.0.0.1", port, 0, "run", agent_store=True)
        init_process_group(launch, device=CPU, timeout_s=240)
        total = torch.tensor(float(rank + attempt))
        dist.all_reduce(total)
        said.send(total.item())
    except BaseException as error:
        said.send(repr(error))
    signal.pause()


def _agent(said: Connection) -> None:
    """Serve a store as torchrun's agent does; in a process of its own, since a process with threads must not fork."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    said.send(store.port)
    signal.pause()


@contextmanager
def forked(function, *arguments: tuple) -> Iterator[list]:
    """Fork `function(*arguments, pipe)` for each argument tuple; yield what each said first; SIGKILL all at the end."""
    context, started = multiprocessing.get_context("fork"), []
    try:
        for argument in arguments:
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=function, args=(*argument, theirs))
            process.start()
            started.append((process, ours))
        yield [ours.recv() if ours.poll(240) else "silent for 240 s" for _, ours in started]
    finally:
        for process, _ in started:
            process.kill()
            process.join()


def test_restarts_against_the_store_of_a_living_agent():
    """What torchrun does at --max-restarts: the store lives on, the processes do not. Stock gloo fails here."""
    world = 3
    with forked(_agent, ()) as (port,):
        for attempt in range(8):
            with forked(_restarted_rank, *((rank, world, port, attempt) for rank in range(world))) as totals:
                assert totals == [sum(range(world)) + world * attempt] * world, f"attempt {attempt}"


RESTART_PROGRAM = """
import os, sys, torch, torch.distributed as dist
from undertow.dist.launch import detect, init_process_group
launch = detect()
init_process_group(launch, device=torch.device("cpu"), timeout_s=240)
total = torch.ones(1)
dist.all_reduce(total)
if launch.rank == 1 and launch.restart_count < 1:
    os.kill(os.getpid(), 9)
dist.all_reduce(total)
open(f"rank{launch.rank}", "w").write(f"attempt {launch.restart_count} total {total.item():g}")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_real_torchrun_restarts(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(RESTART_PROGRAM)
    options = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "2", "--monitor-interval", "0.1"]
    command = [sys.executable, "-m", "torch.distributed.run", *options, str(program)]
    env = {key: value for key, value in os.environ.items() if key not in LAUNCHER_VARIABLES}
    env.pop("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", None)
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    assert [(tmp_path / f"rank{rank}").read_text() for rank in (0, 1)] == ["attempt 1 total 4"] * 2


MPI_PROGRAM = """
import torch, torch.distributed as dist
from undertow.dist.launch import detect, init_process_group
launch = detect()
init_process_group(launch, device=torch.device("cpu"), timeout_s=240)
total = torch.ones(1)
dist.all_reduce(total)
open(f"rank{launch.rank}", "w").write(f"{launch.launcher} {launch.local_rank} {total.item():g}")
dist.destroy_process_group()
"""


def test_mpirun_without_a_port(tmp_path):
    mpiexec = Path(sys.executable).with_name("mpiexec")
    if not mpiexec.exists():
        pytest.skip(f"no mpiexec beside {sys.executable}: pip install mpich")
    program = tmp_path / "program.py"
    program.write_text(MPI_PROGRAM)
    env = {key: value for key, value in os.environ.items() if key not in LAUNCHER_VARIABLES}
    done = subprocess.run(
        [str(mpiexec), "-n", "2", "sh", "-c", f"'{sys.executable}' '{program}'"],  # not the launcher's own child
        capture_output=True,
        text=True,
        timeout=280,
        env=env,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert [(tmp_path / f"rank{rank}").read_text() for rank in (0, 1)] == ["mpirun 0 2", "mpirun 1 2"]


def test_an_unknown_meeting_place_is_a_user_error():
    two_hosts = {"PMI_RANK": "0", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"}
    with pytest.raises(UserError, match="rank 0 of 4 cannot be found.*MASTER_ADDR"):
        init_process_group(detect(two_hosts), device=CPU)
    with pytest.raises(UserError, match="no-such-host.invalid"):
        init_process_group(Launch("srun", 1, 2, 0, 1, "no-such-host.invalid", 1), device=CPU)
    with pytest.raises(UserError, match="timeout_s is 0"):
        init_process_group(detect({}), device=CPU, timeout_s=0)


def test_a_node_without_a_name_in_dns_is_found_through_slurm(tmp_path, monkeypatch):
    tool = tmp_path / "scontrol"
    tool.write_text("#!/bin/sh\necho NodeName=$4 Arch=x86_64 NodeAddr=127.0.0.1 NodeHostName=h OS=Linux 6\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    lonely = Launch("srun", 0, 2, 0, 1, "no-such-host.invalid", free_port())
    with pytest.raises(PeerLost, match="rank 1"):  # the store was served: only the other rank is missing
        init_process_group(lonely, device=CPU, timeout_s=0.2)


def test_a_taken_port_is_a_user_error():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        with pytest.raises(UserError, match="cannot serve the store at port.*MASTER_PORT"):
            init_process_group(
                Launch("torchrun", 0, 2, 0, 2, "127.0.0.1", taken.getsockname()[1]), device=CPU, timeout_s=240
            )


def test_lost_peers():
    with pytest.raises(PeerLost, match="1 of 2 ranks did not arrive within 0.2 s: rank 1"):
        init_process_group(Launch("torchrun", 0, 2, 0, 2, "127.0.0.1", free_port()), device=CPU, timeout_s=0.2)
    with pytest.raises(PeerLost, match="rank 1 cannot reach the store"):
        init_process_group(Launch("torchrun", 1, 2, 1, 2, "127.0.0.1", free_port()), device=CPU, timeout_s=0.2)
    assert not dist.is_initialized()


def test_devices(monkeypatch):
    launch = Launch("torchrun", 5, 8, 1, 4)
    assert local_device(launch, "cpu") == CPU
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert local_device(launch, "cuda") == torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert local_device(launch, "cuda") == torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match="local rank 1 has no CUDA device: 0 visible, 4 processes"):
        local_device(launch, "cuda")
