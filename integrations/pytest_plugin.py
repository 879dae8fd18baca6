"""Several ranks from plain `pytest`: a fixture for gloo ranks, a mark for MPI ranks (`pytest_mpi_plugin`).

``def test_sum(ranks): assert ranks(4, lambda rank, world: …) == […]``. The ranks are forked from the test process
(starting four takes well under a second, because torch is imported already), joined by a file store, and watched: the
first rank that fails or dies ends the others, and a time-out ends all, so one failing rank never hangs the run. Each
rank returns one picklable value. Use with ``pytest -p undertow.integrations.pytest_plugin``.

Forking is safe only while the parent has not touched CUDA and runs torch on one thread, so the plugin sets that.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import pytest

from . import pytest_mpi_plugin as mpi


class RankFailure(AssertionError):
    """One rank raised, died or did not answer; the message carries that rank's traceback."""


def pytest_configure(config: pytest.Config) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    config.addinivalue_line("markers", mpi.MARK)
    if os.environ.get(mpi.CHILD):  # an MPI rank, which may not want torch
        return
    import torch

    torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    mark = pyfuncitem.get_closest_marker("mpi_ranks")
    if mark is None or os.environ.get(mpi.CHILD):
        return None
    mpi.run_again(pyfuncitem, *mark.args, **mark.kwargs)
    return True


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    outcome = yield
    if os.environ.get(mpi.CHILD) and item.get_closest_marker("mpi_ranks") is not None:
        mpi.tell(outcome.get_result())


def _child(rank: int, world: int, store: str, fn: Callable, args: tuple, timeout_s: float, pipe) -> None:
    import torch.distributed as dist

    try:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=timeout_s)
        )
        pipe.send(("ok", fn(rank, world, *args)))
        dist.barrier()  # nobody closes its connections while another rank still uses them
    except BaseException:
        pipe.send(("error", traceback.format_exc()))
    finally:
        pipe.close()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # skip the parent's atexit handlers, which this fork inherited


def run_ranks(world: int, fn: Callable[..., Any], *args: Any, timeout_s: float = 60.0) -> list[Any]:
    """Run `fn(rank, world, *args)` on `world` forked gloo ranks; return their values in rank order.

    Raises `RankFailure` with the first failing rank's traceback; never waits longer than `timeout_s`.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="undertow-ranks-") as folder:
        store = os.path.join(folder, "store")
        pipes, processes = [], []
        for rank in range(world):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(rank, world, store, fn, args, timeout_s, theirs))
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        try:
            return _collect(world, pipes, timeout_s)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()


def _collect(world: int, pipes: list[Connection], timeout_s: float) -> list[Any]:
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout_s
    while len(results) < world:
        waiting = {pipes[rank]: rank for rank in range(world) if rank not in results}
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankFailure(f"rank(s) {sorted(waiting.values())} of {world} gave no result within {timeout_s} s")
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = waiting[pipe]
            try:
                state, value = pipe.recv()
            except EOFError:
                raise RankFailure(f"rank {rank} of {world} died without a traceback") from None
            if state == "error":
                raise RankFailure(f"rank {rank} of {world} failed:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(world)]


@pytest.fixture
def ranks() -> Callable[..., list[Any]]:
    """`ranks(world, fn, *args, timeout_s=60)`: run `fn(rank, world, *args)` on forked gloo ranks."""
    return run_ranks
