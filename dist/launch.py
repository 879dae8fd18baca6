"""Who am I among how many: one frozen `Launch`, read once from the environment, handed on as a value.

No other module reads launcher variables. torchrun, srun, mpirun (Open MPI, MPICH) and a plain process are told apart
here and only here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Launch:
    """One process's place in a job. `launcher` is 'torchrun', 'srun', 'mpirun' or 'plain'."""

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

    @property
    def node_rank(self) -> int:
        return self.rank // self.local_world_size


def detect(env: Mapping[str, str] = os.environ) -> Launch:
    """Read the launcher's variables from `env`."""
    disabled = env.get("UNDERTOW_DISABLE", "") not in ("", "0")
    if "RANK" in env and "WORLD_SIZE" in env:
        return Launch(
            "torchrun",
            int(env["RANK"]),
            int(env["WORLD_SIZE"]),
            int(env.get("LOCAL_RANK", env["RANK"])),
            int(env.get("LOCAL_WORLD_SIZE", env["WORLD_SIZE"])),
            env.get("MASTER_ADDR", "127.0.0.1"),
            int(env.get("MASTER_PORT", "0")),
            int(env.get("TORCHELASTIC_RESTART_COUNT", "0")),
            env.get("TORCHELASTIC_RUN_ID", ""),
            disabled,
        )
    return Launch("plain", 0, 1, 0, 1, disabled=disabled)


def init_process_group(launch: Launch, *, device: torch.device, timeout_s: float = 600.0) -> None:
    """Initialise torch.distributed's default group for `launch`: NCCL for CUDA devices, gloo otherwise."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        init_method="env://",
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=timedelta(seconds=timeout_s),
    )
