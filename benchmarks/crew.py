"""Gloo ranks that stay alive between the samples of one case, for benchmarks that run with plain `undertow bench`.

Forking ranks for every sample would cost more than the sample. A crew is forked once per case, does what it is asked by
name, and ends with the case, because its `Crew` is then dropped.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
import weakref
from collections.abc import Callable, Mapping
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

Job = Callable[[], Any]


class Crew:
    """`world` forked ranks. `start(rank, world)` runs in each and gives its jobs by name, the same names everywhere.

    Fork it from a process that runs torch on one thread and has not touched CUDA. `timeout_s`: of any one job.
    """

    def __init__(self, world: int, start: Callable[[int, int], Mapping[str, Job]], timeout_s: float = 120.0) -> None:
        torch.set_num_threads(1)
        self.world, self.timeout_s = world, timeout_s
        self._folder = tempfile.TemporaryDirectory(prefix="undertow-crew-")
        context = multiprocessing.get_context("fork")
        self._pipes: list[Connection] = []
        processes = []
        for rank in range(world):
            ours, theirs = context.Pipe()
            args = (rank, world, os.path.join(self._folder.name, "store"), start, theirs, timeout_s)
            processes.append(context.Process(target=_serve, args=args, daemon=True))
            processes[-1].start()
            theirs.close()
            self._pipes.append(ours)
        weakref.finalize(self, _end, self._pipes, processes)

    def run(self, name: str) -> tuple[float, list[Any]]:
        """Do job `name` on all ranks, begun together: (the slowest rank's seconds, what each returned)."""
        for pipe in self._pipes:
            pipe.send(name)
        found = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(self.timeout_s):
                raise RuntimeError(f"rank {rank} of {self.world} gave no answer to '{name}' within {self.timeout_s} s")
            try:
                seconds, value, error = pipe.recv()
            except EOFError:
                raise RuntimeError(f"rank {rank} of {self.world} died in '{name}'") from None
            if error:
                raise RuntimeError(f"rank {rank} of {self.world} failed in '{name}':\n{error}")
            found.append((seconds, value))
        return max(seconds for seconds, _ in found), [value for _, value in found]


def _serve(
    rank: int, world: int, store: str, start: Callable[..., Mapping[str, Job]], pipe: Connection, timeout_s: float
) -> None:
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=timeout_s)
        )
        jobs = start(rank, world)
        while (name := pipe.recv()) is not None:
            dist.barrier()
            began_s = time.perf_counter()
            value = jobs[name]()
            pipe.send((time.perf_counter() - began_s, value, ""))
    except EOFError:
        return  # the parent is gone
    except BaseException:
        pipe.send((0.0, None, traceback.format_exc()))
    finally:
        os._exit(0)  # skip the parent's exit handlers, which this fork inherited


def _end(pipes: list[Connection], processes: list[Any]) -> None:
    for pipe in pipes:
        try:
            pipe.send(None)
        except OSError:
            continue  # that rank has ended already
        finally:
            pipe.close()
    for process in processes:
        process.join(5.0)
        if process.is_alive():
            process.kill()
            process.join()
