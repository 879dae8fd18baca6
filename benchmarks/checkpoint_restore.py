"""How long a restart takes to read its state: `Checkpointer.restore` beside torch.load and dcp.load, warm and cold.

Every arm fills the same live model and optimizer and is compared bit for bit with what was saved. Ours verifies every
checksum before it interprets a byte; the others verify nothing, so an arm without verification shows what that costs.
Cold means that the files' pages were dropped from the page cache (`posix_fadvise`) just before, outside the time.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from undertow.benchmarks.case import Arm, Benchmark, Case, Context, Trial
from undertow.benchmarks.checkpoint_job import CPU, CPU_LARGE, Job, Size
from undertow.checkpointing import Checkpointer
from undertow.checkpointing.folder import read_manifest
from undertow.checkpointing.restore import load


def drop_from_cache(folder: Path) -> None:
    """Have the next read of these files come from the disk."""
    os.sync()  # only clean pages can be dropped
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(handle)


def trial(size: Size, cold: bool) -> Trial:
    folder = Path(tempfile.mkdtemp(prefix="undertow-bench-", dir=os.environ.get("UNDERTOW_BENCH_DIR")))
    job = Job(size, torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"), folder)
    saved = {key: value.to("cpu", copy=True) for key, value in job.tensors().items()}
    ckpt = Checkpointer(folder / "ours", model=job.model, optimizer=job.optimizer, rng=False)
    ckpt.save(1)
    if not ckpt.wait()[-1].ok:
        raise RuntimeError(ckpt.reports[-1].reason)
    torch.save(saved, folder / "torch.pt")
    dcp.save(saved, checkpoint_id=folder / "dcp")
    path = ckpt.folder.final(1)

    def spoil() -> None:
        for tensor in job.tensors().values():
            tensor.zero_()
        if cold:
            drop_from_cache(folder)

    def answer(fill: Callable[[], object]) -> Callable[[], float]:
        def run() -> float:
            fill()
            job.synchronize()
            return 0.0

        return run

    def checked(fill: Callable[[], object]) -> Callable[[], object]:
        """Fill once and refuse an arm that fills wrongly; afterwards it is only timed."""
        spoil()
        fill()
        wrong = [key for key, value in job.tensors().items() if not torch.equal(value.cpu(), saved[key])]
        if wrong:
            raise RuntimeError(f"{len(wrong)} tensors came back wrong, {wrong[0]} for one")
        return fill

    def by_torch(mapped: bool) -> None:
        found = torch.load(folder / "torch.pt", map_location="cpu", weights_only=True, mmap=mapped)
        for key, value in job.tensors().items():
            value.copy_(found[key])

    fills: dict[str, Callable[[], object]] = {
        "torch.load": lambda: by_torch(False),
        "torch.load, mmap": lambda: by_torch(True),
        "dcp.load": lambda: dcp.load(dict(job.tensors()), checkpoint_id=folder / "dcp"),
        "undertow restore (verified)": lambda: ckpt.restore(1),
        "undertow, not verified": lambda: load(ckpt.state, path, read_manifest(path), ()),
    }
    with torch.no_grad():
        arms = [Arm(name, answer(checked(fill)), prepare=spoil) for name, fill in fills.items()]
    return Trial(arms, lambda: 0.0)


def _cases(context: Context) -> Sequence[Case]:
    size = CPU if context.quick else CPU_LARGE
    return [
        Case(f"{size.name}, {name}", partial(trial, size, cold), "dcp.load", "undertow restore (verified)", warm_ups=1)
        for name, cold in (("warm", False), ("cold", True))
    ]


BENCHMARK = Benchmark(
    "checkpoint_restore",
    "A verified restore is no slower than dcp.load, which verifies nothing.",
    _cases,
    rounds=6,
    packages=("torch", "xxhash"),
    x_label="parameters",
)

if __name__ == "__main__":
    from undertow.benchmarks.cli import main

    sys.exit(main(["checkpoint_restore", *sys.argv[1:]]))
