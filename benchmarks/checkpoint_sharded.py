"""The FSDP2 job that checkpoint benchmarks of several ranks share, and what makes its steps repeat.

Ranks on one host share its cores, and a scheduler that moves threads of one onto the cores of another shows as steps
that differ by a fifth. `bind_cores` gives each rank its own, as `srun --cpus-per-task` does, before the job's threads
are there. With `fused`, AdamW updates all parameters in one operation; torch's default asks every DTensor a dozen
times, which takes the processor longer than a small model takes the GPU, and then a step's time is the processor's.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from undertow.benchmarks.checkpoint_job import Loop, Size
from undertow.dist.launch import detect
from undertow.examples.lm import ByteLM


class Sharded(Loop):
    """One FSDP2 training job on this rank; `folder` is the same on all ranks. `fused`: AdamW's implementation."""

    def __init__(self, size: Size, device: torch.device, folder: Path, *, fused: bool = False) -> None:
        torch.manual_seed(0)
        self.device, self.folder = device, folder
        with device:
            self.model = ByteLM(size.model)
        for layer in self.model.blocks:
            fully_shard(layer)
        fully_shard(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=fused or None)
        torch.manual_seed(1 + dist.get_rank())
        self.tokens = torch.randint(0, 256, (size.batch, size.length + 1), device=device)
        self.closing = contextlib.ExitStack()
        self.train()

    @property
    def state_bytes(self) -> int:
        """Of this rank: its shards of the parameters and of the optimizer's state."""
        found = [parameter.data for parameter in self.model.parameters()]
        found += [value for state in self.optimizer.state.values() for value in state.values()]
        return sum(local(value).nbytes for value in found if isinstance(value, torch.Tensor))

    def state(self) -> dict[str, Any]:
        """As dcp keeps it: sharded, by names."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def pace(self, steps: int = 5) -> tuple[float, float]:
        """Seconds from a step's begin to the optimizer's first write, and to its end, on the device; medians."""
        stamps: list[Any] = []
        hook = self.optimizer.register_step_pre_hook(lambda *call: stamps.append(self._stamp()))
        for _ in range(steps):
            stamps.append(self._stamp())
            self.train()
        stamps.append(self._stamp())
        hook.remove()
        self.synchronize()
        begins, writes = stamps[0:-1:2], stamps[1::2]
        windows = [_between_s(begin, write) for begin, write in zip(begins, writes)]
        return median(windows), median(_between_s(begin, end) for begin, end in zip(begins, stamps[2::2]))

    def _stamp(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def local(value: torch.Tensor) -> torch.Tensor:
    """What of it this rank has."""
    return value.to_local() if isinstance(value, DTensor) else value


def _between_s(begin: Any, end: Any) -> float:
    return end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1e3


def bind_cores() -> None:
    """Keep this rank, with the threads it has and will have, on its share of the host's cores; not where the launcher
    has bound it, or where there are fewer cores than ranks."""
    job, cores = detect(), sorted(os.sched_getaffinity(0))
    share = len(cores) // job.local_world_size
    if job.local_world_size > 1 and share and len(cores) == os.cpu_count():
        mine = cores[job.local_rank * share :][:share]
        for thread in os.listdir("/proc/self/task"):
            with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
                os.sched_setaffinity(int(thread), mine)
