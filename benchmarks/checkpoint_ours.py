"""Our own way to checkpoint, as the benchmarks of checkpoints use it beside the rivals'."""

from __future__ import annotations

from collections.abc import Callable

import torch

from undertow.benchmarks.checkpoint_job import Job, Method
from undertow.checkpointing import Checkpointer


class Undertow(Method):
    """Ours: `disk` (fsync, checksums, commit) or `host` (shared memory that outlives the process). `arena`: its share
    of the state; `device`: the share that may be parked on the GPU. `recycle`: as for `Checkpointer`."""

    def __init__(
        self,
        job: Job,
        folder: str,
        *,
        host: bool = False,
        arena: float | None = None,
        device: float = 0.0,
        recycle: bool | None = None,
    ) -> None:
        super().__init__(job, folder)
        self.host = host
        self.ckpt = Checkpointer(
            self.folder,
            model=job.model,
            optimizer=job.optimizer,
            keep=1,
            recycle=recycle,
            host_every=int(host),
            arena_bytes=None if arena is None else int(arena * job.state_bytes),
            device_bytes=int(device * job.state_bytes),
        )
        self.files = self.ckpt.host.folder if host and self.ckpt.host is not None else self.ckpt.folder
        job._open.append(self.ckpt.close)

    def save(self) -> bool:
        self.path = self.files.final(self.job.step)
        return self.ckpt.save(self.job.step, disk=not self.host, host=self.host)

    def drain(self) -> None:
        self.ckpt.wait()
        if self.ckpt.failures:
            raise RuntimeError(self.ckpt.reports[-1].reason)

    def written_sign(self) -> Callable[[], bool]:
        commit, step = self.path / "COMMIT.json", self.job.step

        def ended() -> bool:  # retention may have removed it, once a later one is committed
            return commit.exists() or max(self.files.committed(), default=-1) >= step

        return ended

    def clear(self) -> None:
        """Nothing: retention holds one save."""

    def costs(self, saves: int) -> dict[str, float]:
        """What the last `saves` reports say themselves."""
        last = self.ckpt.reports[-saves:]
        return {
            "call_ms": 1e3 * sum(report.call_s for report in last) / saves,
            "fence_ms": 1e3 * sum(report.fence_s for report in last) / saves,
            "commit_s": last[-1].commit_s,
        }

    def load(self) -> dict[str, torch.Tensor]:
        from undertow.checkpointing.folder import read_manifest
        from undertow.checkpointing.reader import Reader
        from undertow.checkpointing.verify import check_content

        path = self.files.final(self.files.committed()[-1])
        manifest = read_manifest(path)
        check_content(path, manifest)
        reader = Reader(path, manifest)
        return {key: reader.shard(key, record.shards[0]) for key, record in manifest.tensors.items()}
