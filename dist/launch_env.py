"""From a launcher's environment variables to one frozen `Launch`; pure, so that every launcher is a table in a test.

An MPI launcher is recognised before srun, because mpirun inside an allocation starts its daemons with srun and the
tasks inherit the daemons' SLURM_PROCID. RANK and WORLD_SIZE win over both, since torchrun may run under either; but
when they were set by hand and deny what srun or mpirun says (every task RANK=0 of 1, say), independent runs would
overwrite each other's files, so that is an error. An sbatch script is one plain process although SLURM_NTASKS is set.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from .errors import UserError
from .hostlist import expand_counts, expand_hosts

_FIRST_PORT, _PORTS = 15000, 15000  # below the range from which systems hand out ports of their own
_FIRST_SPECIAL_STEP = 0xFFFFFF00  # SLURM_STEP_ID of the batch script, the extern step and the interactive step


@dataclass(frozen=True)
class Launch:
    """One process's place in a job. `launcher` is 'torchrun', 'srun', 'mpirun' or 'plain'.

    'torchrun' stands for anything that sets RANK and WORLD_SIZE. `master_addr` is empty and `master_port` 0 where the
    launcher does not tell; `init_process_group` finds them. `node` is the index of the host where the launcher tells.
    """

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str = "127.0.0.1"
    master_port: int = 0
    restart_count: int = 0
    run_id: str = ""
    disabled: bool = False  # UNDERTOW_DISABLE: every automatic path of the package is off
    node: int | None = None
    agent_store: bool = False  # torchrun's agent serves the store; no rank may

    @property
    def node_rank(self) -> int:
        """Index of this process's host; without `node`, ranks are taken to fill one host after another."""
        return self.rank // self.local_world_size if self.node is None else self.node

    @property
    def one_host(self) -> bool:
        return self.local_world_size == self.world_size


def detect(env: Mapping[str, str] = os.environ) -> Launch:
    """Read the launcher's variables from `env`; `UserError` when they are malformed or contradict each other."""
    disabled = env.get("UNDERTOW_DISABLE", "").strip().lower() not in ("", "0", "false", "no", "off")
    if "TORCHELASTIC_RUN_ID" in env:
        return _torchrun(env, disabled)
    other = _mpirun(env, disabled) or _srun(env, disabled)
    if "RANK" in env or "WORLD_SIZE" in env:
        launch = _torchrun(env, disabled)
        if other:
            _refuse_contradiction(launch, other)
        return launch
    return other or Launch("plain", 0, 1, 0, 1, disabled=disabled)


def port_of(identity: str) -> int:
    """A port that every process of the job `identity` computes alike."""
    return _FIRST_PORT + zlib.crc32(identity.encode()) % _PORTS


def _torchrun(env: Mapping[str, str], disabled: bool) -> Launch:
    for present, absent in (("RANK", "WORLD_SIZE"), ("WORLD_SIZE", "RANK")):
        if absent not in env:
            raise UserError(
                f"{present} is set to '{env[present]}' but {absent} is not set",
                expected="both or neither",
                remedy=f"start with torchrun, or unset {present}",
            )
    world_size = _integer(env, "WORLD_SIZE")
    local_size = "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in env else "LOCAL_SIZE"  # DeepSpeed's launcher sets this
    return _checked(
        Launch(
            launcher="torchrun",
            rank=_integer(env, "RANK"),
            world_size=world_size,
            local_rank=_integer(env, "LOCAL_RANK", _integer(env, "RANK")),
            local_world_size=_integer(env, local_size, world_size),
            master_addr=env.get("MASTER_ADDR", "127.0.0.1"),
            master_port=_integer(env, "MASTER_PORT", 0),
            restart_count=_integer(env, "TORCHELASTIC_RESTART_COUNT", 0),
            run_id=env.get("TORCHELASTIC_RUN_ID", ""),
            disabled=disabled,
            node=_integer(env, "GROUP_RANK") if "GROUP_RANK" in env else None,
            agent_store=env.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        ),
        "RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE",
    )


def _srun(env: Mapping[str, str], disabled: bool) -> Launch | None:
    if "SLURM_STEP_ID" not in env or "SLURM_PROCID" not in env:
        return None
    step = _integer(env, "SLURM_STEP_ID")
    if step >= _FIRST_SPECIAL_STEP:
        return None
    sizes = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
    world_size, node = _integer(env, sizes), _integer(env, "SLURM_NODEID", 0)
    job = env.get("SLURM_JOB_ID", "0")
    restarts = _integer(env, "SLURM_RESTART_COUNT", 0)
    return _checked(
        Launch(
            launcher="srun",
            rank=_integer(env, "SLURM_PROCID"),
            world_size=world_size,
            local_rank=_integer(env, "SLURM_LOCALID"),
            local_world_size=_slurm_local_size(env, world_size, node),
            master_addr=_slurm_master(env, world_size),
            master_port=_integer(env, "MASTER_PORT", port_of(f"slurm {job} {step} {restarts}")),
            restart_count=restarts,
            run_id=f"{job}.{step}",
            disabled=disabled,
            node=node,
        ),
        f"SLURM_PROCID, {sizes}, SLURM_LOCALID, SLURM_TASKS_PER_NODE",
    )


def _slurm_local_size(env: Mapping[str, str], world_size: int, node: int) -> int:
    for name in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"):
        if name in env:
            counts = expand_counts(env[name], name=name)
            if sum(counts) == world_size and node < len(counts):
                return counts[node]
    if _integer(env, "SLURM_STEP_NUM_NODES", _integer(env, "SLURM_NNODES", 0)) == 1:
        return world_size
    raise UserError(
        f"SLURM_TASKS_PER_NODE is '{env.get('SLURM_TASKS_PER_NODE', '')}' for {world_size} tasks, node {node}",
        expected="counts that add up to the number of tasks, such as 4(x2)",
        remedy="start the processes with srun, not from a copied environment",
    )


def _slurm_master(env: Mapping[str, str], world_size: int) -> str:
    if "MASTER_ADDR" in env:
        return env["MASTER_ADDR"]
    for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"):
        if env.get(name):
            hosts = expand_hosts(env[name], name=name)
            return hosts[0] if len(hosts) > 1 else "127.0.0.1"
    return "127.0.0.1" if world_size == 1 else ""


def _mpirun(env: Mapping[str, str], disabled: bool) -> Launch | None:
    families = []
    if "OMPI_COMM_WORLD_RANK" in env:
        names = [f"OMPI_COMM_WORLD_{part}" for part in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")]
        families.append((names, env.get("PMIX_NAMESPACE", env.get("OMPI_MCA_ess_base_jobid", ""))))
    if "PMI_RANK" in env and ("MPI_LOCALRANKID" in env or "SLURM_STEP_ID" not in env):  # else Slurm's own pmi2
        families.append((["PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"], ""))
    launches = [_mpi_family(env, names, run_id, disabled) for names, run_id in families]
    if len(launches) == 2 and (launches[0].rank, launches[0].world_size) != (launches[1].rank, launches[1].world_size):
        raise UserError(
            f"Open MPI says rank {launches[0].rank} of {launches[0].world_size}, "
            f"MPICH says rank {launches[1].rank} of {launches[1].world_size}",
            expected="the variables of one MPI launcher",
            remedy="do not start one mpirun inside the other, or unset PMI_RANK and PMI_SIZE",
        )
    return launches[0] if launches else None


def _mpi_family(env: Mapping[str, str], names: list[str], run_id: str, disabled: bool) -> Launch:
    world_size = _integer(env, names[1])
    local_size = _integer(env, names[3], world_size)
    address, port = env.get("MASTER_ADDR", "127.0.0.1" if local_size == world_size else ""), 0
    if not address and env.get("SLURM_JOB_NODELIST"):
        address = expand_hosts(env["SLURM_JOB_NODELIST"], name="SLURM_JOB_NODELIST")[0]
    if run_id or "SLURM_JOB_ID" in env:
        port = port_of(f"mpi {run_id} {env.get('SLURM_JOB_ID', '')}")
    return _checked(
        Launch(
            launcher="mpirun",
            rank=_integer(env, names[0]),
            world_size=world_size,
            local_rank=_integer(env, names[2], _integer(env, names[0])),
            local_world_size=local_size,
            master_addr=address,
            master_port=_integer(env, "MASTER_PORT", port),
            restart_count=_integer(env, "SLURM_RESTART_COUNT", 0),
            run_id=run_id,
            disabled=disabled,
        ),
        ", ".join(names),
    )


def _integer(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    if name not in env and default is not None:
        return default
    text = env.get(name, "")
    if not (text.isascii() and text.isdigit()):
        shown = f"is '{text}'" if name in env else "is not set"
        raise UserError(f"{name} {shown}", expected="a whole number, 0 or more, set by the launcher")
    return int(text)


def _checked(launch: Launch, names: str) -> Launch:
    place = (
        f"rank {launch.rank} of {launch.world_size}, local rank {launch.local_rank} of {launch.local_world_size}, "
        f"port {launch.master_port}"
    )
    if not (
        launch.rank < launch.world_size
        and launch.local_rank < launch.local_world_size <= launch.world_size
        and launch.master_port < 65536
    ):
        raise UserError(
            f"the launcher's variables contradict each other: {place}",
            expected="rank < world size, local rank < local world size <= world size, port < 65536",
            remedy=f"look at {names}, MASTER_PORT in the environment",
        )
    return launch


def _refuse_contradiction(launch: Launch, other: Launch) -> None:
    fewer = launch.world_size < other.world_size
    if fewer or (launch.world_size == other.world_size and launch.rank != other.rank):
        raise UserError(
            f"RANK and WORLD_SIZE say rank {launch.rank} of {launch.world_size}, but {other.launcher} says rank "
            f"{other.rank} of {other.world_size}",
            expected="one launcher",
            remedy=f"unset RANK and WORLD_SIZE to follow {other.launcher}, or start one torchrun per node",
        )
