"""Join the job: from a `Launch` to torch.distributed's default process group.

A single process needs no network at all and gets a store in its own memory. Otherwise the ranks meet at a TCP store:
torchrun's agent serves it, or rank 0 does, at a port that every rank computes from the job's identity. What torch's
own `env://` leaves to chance is decided here: a key prefix per attempt (`rendezvous`), the interface that gloo binds
(loopback when all ranks share a host; otherwise the one that reaches rank 0), and the CUDA device of the process.
"""

from __future__ import annotations

import os
import random
import shutil
import socket
import subprocess
from contextlib import suppress
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist

from .errors import PeerLost, UserError
from .launch_env import Launch, detect, port_of
from .log import get_logger
from .rendezvous import agree

__all__ = ["Launch", "any_shared", "detect", "init_process_group", "local_device"]

log = get_logger(__name__)

_MPI_LAUNCHERS = ("hydra_pmi_proxy", "hydra_bstrap_pr", "mpiexec", "mpirun", "prterun", "prted", "orted", "orterun")


def local_device(launch: Launch, kind: str | None = None) -> torch.device:
    """The device of this process: CUDA when there is one (or `kind` says so), by local rank; otherwise the CPU.

    When a launcher shows each process a single device (Slurm's --gpus-per-task), that one is taken.
    """
    kind = kind or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind != "cuda":
        return torch.device(kind)
    count = torch.cuda.device_count()
    index = 0 if count == 1 else launch.local_rank
    if index >= count:
        raise UserError(
            f"local rank {launch.local_rank} has no CUDA device: {count} visible, "
            f"{launch.local_world_size} processes on this host",
            expected="at most one process per device",
            remedy="start fewer processes per node, or look at CUDA_VISIBLE_DEVICES",
        )
    return torch.device("cuda", index)


def init_process_group(launch: Launch, *, device: torch.device, timeout_s: float = 600.0) -> None:
    """Initialise torch.distributed's default group for `launch`, on all ranks.

    CPU tensors travel by gloo, CUDA tensors (when `device` is one) by NCCL, or by gloo when two ranks share a device,
    which NCCL refuses; `device` without an index means the one of
    `local_device`, and becomes the current CUDA device. Sets GLOO_SOCKET_IFNAME unless the user did. Raises `UserError`
    for what the user can mend and `PeerLost` when ranks do not arrive within `timeout_s`.
    """
    if timeout_s <= 0:
        raise UserError(f"timeout_s is {timeout_s}", expected="a positive number of seconds")
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device if device.index is not None else local_device(launch, "cuda"))
        backend = "cpu:gloo,cuda:nccl"
    if launch.world_size == 1:
        _bind_gloo(launch, "127.0.0.1")
        store: dist.Store = dist.HashStore()
    else:
        address, port = _meeting_place(launch)
        _bind_gloo(launch, address)
        prefix = dist.PrefixStore(launch.run_id, _connect(launch, address, port, timeout_s))
        store = agree(prefix, launch.rank, launch.world_size, timeout_s=timeout_s)
        if device.type == "cuda" and any_shared(store, _device_name(), launch.world_size):
            backend = "cpu:gloo,cuda:gloo"
            if launch.rank == 0:
                log.warning("ranks share a CUDA device, which NCCL refuses: gloo carries CUDA tensors, slowly")
    dist.init_process_group(  # no device_id: it makes torch split subgroups off NCCL alone, without gloo
        backend,
        store=store,
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=timedelta(seconds=timeout_s),
    )


def any_shared(store: dist.Store, name: str, world_size: int) -> bool:
    """Whether any two of the `world_size` ranks, which all call this once, gave the same name. Four requests a rank."""
    if store.add(f"device/{name}", 1) > 1:
        store.add("devices/shared", 1)
    if store.add("devices/told", 1) == world_size:
        store.set("devices/all", "told")
    store.wait(["devices/all"])
    return store.add("devices/shared", 0) > 0


def _device_name() -> str:
    index = torch.cuda.current_device()
    return f"{socket.gethostname()}/{torch.cuda.get_device_properties(index).uuid}"


def free_port() -> int:
    """A free port of this host, below the range from which the system gives ports to connections: one of those might
    take it before it is served."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _meeting_place(launch: Launch) -> tuple[str, int]:
    """Address and port of the store; the same on every rank."""
    port = launch.master_port
    if not port and launch.launcher == "mpirun" and launch.one_host and (job := _mpi_job()):
        port = port_of(job)
    if not launch.master_addr or not port:
        raise UserError(
            f"rank 0 of {launch.world_size} cannot be found: MASTER_ADDR '{launch.master_addr}', MASTER_PORT {port}",
            expected="an address of rank 0's host and a free port, the same on all ranks",
            remedy="MPICH: mpiexec -genv MASTER_ADDR HOST -genv MASTER_PORT 29500; Open MPI: mpirun -x MASTER_ADDR=HOST"
            " -x MASTER_PORT=29500; otherwise torchrun --standalone --nproc-per-node N",
        )
    return _resolvable(launch, launch.master_addr), port


def _mpi_job() -> str:
    """What the processes of an mpirun on this host have in common when its variables name no job: the launcher."""
    for parent in psutil.Process().parents():
        if parent.name() in _MPI_LAUNCHERS:
            return f"mpi {parent.pid} {parent.create_time()}"
    return ""


def _resolvable(launch: Launch, name: str) -> str:
    """`name`, or the NodeAddr that Slurm knows for a node whose name is not in DNS."""
    try:
        socket.getaddrinfo(name, None)
        return name
    except OSError as error:
        if launch.launcher == "srun" and shutil.which("scontrol"):
            shown = subprocess.run(["scontrol", "-o", "show", "node", name], capture_output=True, text=True, timeout=30)
            fields = dict(field.split("=", 1) for field in shown.stdout.split() if "=" in field)
            if "NodeAddr" in fields and fields["NodeAddr"] != name:
                return fields["NodeAddr"]
        raise UserError(
            f"the name of rank 0's host, '{name}', has no address ({error})",
            expected="a host name that this host can resolve",
            remedy="set MASTER_ADDR to an address of rank 0's host",
        ) from error


def _connect(launch: Launch, address: str, port: int, timeout_s: float) -> dist.Store:
    serves = launch.rank == 0 and not launch.agent_store
    try:
        return dist.TCPStore(
            address,
            port,
            launch.world_size,
            is_master=serves,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            multi_tenant=not launch.agent_store,
        )
    except dist.DistError as error:
        if serves:
            raise UserError(
                f"rank 0 cannot serve the store at port {port} ({str(error).splitlines()[0]})",
                expected="a free port",
                remedy="set MASTER_PORT to another one, the same on all ranks",
            ) from error
        raise PeerLost(
            f"rank {launch.rank} cannot reach the store at {address}:{port} within {timeout_s:g} s; "
            f"look at the output of rank 0 ({str(error).splitlines()[0]})"
        ) from error


def _bind_gloo(launch: Launch, address: str) -> None:
    """Choose gloo's interface: its own way, by the host's name, fails where that name has no or a wrong address."""
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    ours = "127.0.0.1" if launch.one_host else address_towards(address)
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.family == socket.AF_INET and entry.address == ours for entry in addresses):
            os.environ["GLOO_SOCKET_IFNAME"] = name
            return


def address_towards(address: str) -> str:
    """Our IPv4 address on the way to `address`; on rank 0's own host, the way out of it. '' when there is none."""
    for target in (address, "192.0.2.1"):  # the second is a documentation address: it selects the default route
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                probe.connect((target, 9))  # sends nothing
                ours = probe.getsockname()[0]
        except OSError:
            continue
        if not ours.startswith("127."):
            return ours
    return ""
