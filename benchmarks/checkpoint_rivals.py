"""The rivals of `checkpoint_stall`, each used as its own guide says, and why one cannot run here.

No fsync was found in torch.save, torchsnapshot, torch_checkpointing and NVRx; DCP's writer calls it, for the data. All
but torch.save return before the state may change: the update waits where their guides say that it must.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Any, BinaryIO
from unittest.mock import patch

import torch

from undertow.benchmarks.checkpoint_job import Job, Method

END_BYTES = 22  # of a zip archive's end record without a comment


class TorchSave(Method):
    def save(self) -> None:
        torch.save(self.job.tensors(), self.fresh())

    def load(self) -> dict[str, torch.Tensor]:
        return torch.load(self.path, map_location="cpu")


class TorchSaveSync(TorchSave):
    def save(self) -> None:
        with self.fresh().open("wb") as file:
            torch.save(self.job.tensors(), file)
            file.flush()
            os.fsync(file.fileno())


class Dcp(Method):
    """torch.distributed.checkpoint.save; it fsyncs the file's data."""

    def save(self) -> None:
        import torch.distributed.checkpoint as dcp

        dcp.save(self.job.tensors(), checkpoint_id=self.fresh())

    def load(self) -> dict[str, torch.Tensor]:
        import torch.distributed.checkpoint as dcp

        blank = {key: torch.empty_like(value, device="cpu") for key, value in self.job.tensors().items()}
        dcp.load(blank, checkpoint_id=self.path)
        return blank


class DcpAsync(Dcp):
    """async_save with one stager for all saves: pinned and shared host memory where there is a device. The update must
    wait for the staging, since the stager reads live tensors."""

    def __init__(self, job: Job, folder: str, *, reused: bool = False, process: bool = False) -> None:
        super().__init__(job, folder)
        self._process = process
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        self.pending: Any = None
        cuda = job.device.type == "cuda"
        options = StagingOptions(
            use_pinned_memory=cuda, use_shared_memory=True, use_async_staging=False, use_non_blocking_copy=cuda
        )
        self.stager = DefaultStager(options) if reused else None
        if self.stager is not None:
            inner = self.stager._state_dict_stager
            close = inner.close
            inner.close = lambda: None  # torch 2.11 closes it after every staging, and the second save fails
            job._open += [self.stager.close, close]

    def save(self) -> None:
        import torch.distributed.checkpoint as dcp

        self.drain()
        extra: dict[str, Any] = {} if self.stager is None else {"async_stager": self.stager}
        if self._process:
            from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

            extra["async_checkpointer_type"] = AsyncCheckpointerType.PROCESS
        answer: Any = dcp.async_save(self.job.tensors(), checkpoint_id=self.fresh(), **extra)
        if hasattr(answer, "staging_completion"):
            answer.staging_completion.result()
            answer = answer.upload_completion
        self.pending = answer

    def drain(self) -> None:
        if self.pending is not None:
            self.pending.result()
            self.pending = None

    def written_sign(self) -> Callable[[], bool]:
        return self.pending.done


class TorchSnapshot(Method):
    """torchsnapshot's async_take; no fsync found in it."""

    pending: Any = None

    def save(self) -> None:
        import torchsnapshot

        self.drain()
        state = {"state": torchsnapshot.StateDict(**self.job.tensors())}
        self.pending = torchsnapshot.Snapshot.async_take(str(self.fresh()), state)

    def drain(self) -> None:
        if self.pending is not None:
            self.pending.wait()
            self.pending = None

    def written_sign(self) -> Callable[[], bool]:
        return self.pending.done

    def load(self) -> dict[str, torch.Tensor]:
        import torchsnapshot

        snapshot = torchsnapshot.Snapshot(str(self.path))
        keys = self.job.tensors()
        return {key: snapshot.read_object(f"0/state/{key}") for key in keys}


class TorchCheckpointing(Method):
    """Meta's torch_checkpointing: staged in a thread, written by a process. The update takes its lock, as its guide
    says. Buffered writes: its direct I/O fails to close files whose end is no multiple of a sector (EINVAL, 0.1.1)."""

    pending: Any = None

    def __init__(self, job: Job, folder: str) -> None:
        super().__init__(job, folder)
        from torch_checkpointing import CheckpointManager
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

        self.manager = CheckpointManager(
            CheckpointManager.Config(storage_config=LocalFileSystemStorageConfig(use_direct_io=False))
        )
        handle = job.optimizer.register_step_pre_hook(self._before_update)
        job._open += [handle.remove, self.manager.close]

    def _before_update(self, *unused: Any) -> None:
        if self.pending is not None:
            with self.manager.lock():
                return

    def save(self) -> None:
        self.drain()
        self.pending = self.manager.save(str(self.fresh()), {"state": self.job.tensors()})

    def drain(self) -> None:
        if self.pending is not None:
            self.pending.result()
            self.pending = None

    def written_sign(self) -> Callable[[], bool]:
        return self.pending.done

    def load(self) -> dict[str, torch.Tensor]:
        blank = {key: torch.empty_like(value, device="cpu") for key, value in self.job.tensors().items()}
        return dict(self.manager.load(str(self.path), into={"state": blank})["state"])


class Nvrx(TorchSave):
    """NVIDIA Resiliency Extension's asynchronous torch.save: copies to pinned memory and synchronises in the call, and
    a lasting process writes. What lies in host memory already (AdamW's step counts) it passes on as it is, and the next
    update changes it before it is written: such tensors are copied for it here. Without CUDA it calls
    torch.cuda.synchronize all the same, which raises, and sends to that process by a thread that crashed (SIGSEGV,
    0.4.1): the call is taken away there, and a forked process writes."""

    def __init__(self, job: Job, folder: str) -> None:
        super().__init__(job, folder)
        from nvidia_resiliency_ext.checkpointing.async_ckpt.torch_ckpt import TorchAsyncCheckpoint

        self.cuda = job.device.type == "cuda"
        self.checkpoint = TorchAsyncCheckpoint(persistent_queue=self.cuda)
        job._open.append(lambda: self.checkpoint.finalize_async_save(blocking=True, terminate=True))

    def save(self) -> None:
        self.drain()
        calm = nullcontext() if self.cuda else patch.object(torch.cuda, "synchronize", lambda *device: None)
        with calm:
            state = {key: value.clone() if value.is_cpu else value for key, value in self.job.tensors().items()}
            self.checkpoint.async_save(state, str(self.fresh()))

    def drain(self) -> None:
        self.checkpoint.finalize_async_save(blocking=True)

    def written_sign(self) -> Callable[[], bool]:
        path = self.path

        def ended() -> bool:  # the end record of the zip archive, which torch.save writes last
            with suppress(FileNotFoundError), path.open("rb") as file:
                return file.seek(0, os.SEEK_END) > END_BYTES and _at(file, -END_BYTES) == b"PK\5\6"
            return False

        return ended


def _at(file: BinaryIO, offset: int) -> bytes:
    file.seek(offset, os.SEEK_END)
    return file.read(4)


def rivals(job: Job, *, few: bool) -> dict[str, Callable[[], Method] | str]:
    """Name → how to make it, or why it cannot run here. `few`: without those that differ from another in a detail."""

    def installed(package: str) -> str:
        return "" if importlib.util.find_spec(package) else "not installed (pip install undertow[rivals])"

    cuda = job.device.type == "cuda"
    found: dict[str, Callable[[], Method] | str] = {
        "torch.save": lambda: TorchSave(job, "torch"),
        "torch.save (fsync)": lambda: TorchSaveSync(job, "torch-sync"),
        "dcp.save (fsync)": lambda: Dcp(job, "dcp"),
        "dcp.async_save (fsync)": lambda: DcpAsync(job, "dcp-async"),
        "dcp.async_save, reused stager (fsync)": lambda: DcpAsync(job, "dcp-stager", reused=True),
        "dcp.async_save, process (fsync)": lambda: DcpAsync(job, "dcp-process", process=True),
        "torchsnapshot async": installed("torchsnapshot") or (lambda: TorchSnapshot(job, "snapshot")),
        "torch_checkpointing": installed("torch_checkpointing") or (lambda: TorchCheckpointing(job, "manager")),
        f"NVRx async{'' if cuda else ', forked'}": installed("nvidia_resiliency_ext") or (lambda: Nvrx(job, "nvrx")),
        "DataStates-LLM": "needs CUDA, and its source cannot be installed from a registry",
    }
    if few:
        del found["torch.save"], found["dcp.save (fsync)"]
    return found
