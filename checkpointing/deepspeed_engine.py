"""Lazy, atomic, verified checkpoints for DeepSpeed, selected by its JSON: {"undertow": {"checkpoint": true}}.

Importing this module teaches DeepSpeed the section; the files are DeepSpeed's own, so that its converters read them.
DeepSpeed asks its engine for a commit just before the optimizer's update, at the gradient boundary: that is where the
copies are fenced. Durable files, the vote of all ranks, and `latest` follow in the background. `load_checkpoint`
without a tag takes the newest tag that verifies on all ranks. DeepSpeed has no registry of engines (0.19), so its
factory, and the two methods that save and load, are wrapped here.
"""

from __future__ import annotations

import atexit
import functools
import os
import queue
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime import engine as _deepspeed
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine

from ..dist import launch
from ..dist.errors import UserError
from ..dist.log import get_logger, warn_once
from .coordinate import Coordinator
from .deepspeed_config import CheckpointSection, checkpoint_section, section
from .files import FileOps
from .lazy_file import HostBuffers, LazyFile, check_file
from .manifest import BadCheckpoint, FileRecord
from .tag_folder import RECORD, candidates, problems, publish, read_record, zero_ranks

log = get_logger(__name__)
LATE = ("module", "optimizer", "optimizer_state_dict", "frozen_param_fragments")  # written by the update alone


class UndertowCheckpointEngine(CheckpointEngine):
    """One per DeepSpeed engine, on every rank. `reports` tells how each tag ended: (tag, '' or the reason)."""

    def __init__(self, config: CheckpointSection) -> None:
        self.name = "undertow"
        self.config = config
        self.reports: list[tuple[str, str]] = []
        self._coordinator = Coordinator.from_default_group(timeout_s=config.timeout_s)
        self._ops, self._buffers = FileOps(direct=False), HostBuffers()
        self._open: _Tag | None = None
        self._unfenced: list[LazyFile] = []
        self._jobs: queue.Queue[_Tag | LazyFile | None] = queue.Queue()
        self._pending = 0
        self._idle = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="undertow-deepspeed", daemon=True)
        self._thread.start()
        atexit.register(_finish, weakref.ref(self))

    # -- what DeepSpeed calls ----------------------------------------------------------------------------------------

    def create(self, info: CheckpointCommitInfo) -> None:
        """A save begins. One is in flight at a time: host memory for two would be needed otherwise."""
        self.seal()
        self.drain()
        self._open = _Tag(Path(info.save_dir), str(info.tag), info.save_latest)

    def save(self, state_dict: Any, path: str) -> None:
        if self._open is None:
            raise UserError(f"save of {path} outside of a checkpoint", expected="create() before save()")
        names = set(state_dict.get("buffer_names", ())) if isinstance(state_dict, dict) else set()

        def late(keys: tuple) -> bool:
            return bool(keys) and keys[0] in LATE and not (keys[0] == "module" and keys[-1] in names)

        file = LazyFile(Path(path), state_dict, late if self.config.lazy else lambda keys: False, self._buffers)
        self._open.files.append(file)
        self._unfenced.append(file)
        self._jobs.put(file)

    def seal(self) -> None:
        """This rank has handed over all files of the tag."""
        if self._open is not None:
            tag, self._open = self._open, None
            with self._idle:
                self._pending += 1
            self._jobs.put(tag)

    def get_commit_info(self) -> None:
        """DeepSpeed is about to update parameters: fence. There is never anything for DeepSpeed to commit."""
        self.fence()

    def fence(self) -> None:
        for file in self._unfenced:
            file.fence()
        self._unfenced.clear()

    def commit(self, info: CheckpointCommitInfo) -> bool:
        """Called by DeepSpeed where it wants files at once (save_16bit_model)."""
        self.seal()
        self.drain()
        return not self.reports[-1][1]

    def load(self, path: str, map_location: Any = None) -> Any:
        """One file, verified first; a file that undertow did not write is loaded as DeepSpeed would, with a warning."""
        self.seal()
        self.drain()
        record = read_record(Path(path).parent)
        if record is None or Path(path).name not in record.files:
            warn_once(log, "%s has no checksums by undertow: loaded as it is", os.path.dirname(path))
        elif problem := check_file(Path(path), record.files[Path(path).name]):
            raise BadCheckpoint(f"{path}: {problem}")
        return torch.load(path, map_location=map_location, weights_only=False)

    def is_decoupled(self) -> bool:
        return True  # otherwise DeepSpeed writes `latest` before anything is durable

    def preserves_storage_sharing(self) -> bool:
        return False  # each tensor is copied alone, so DeepSpeed need not clone views of its flat buffers

    def cleanup(self) -> None:
        """The end of training: everything in flight is committed, `latest` included."""
        if self._closed:
            return
        self._closed = True
        self.seal()
        self.drain()
        self._jobs.put(None)
        self._thread.join()
        self._coordinator.part()

    # -- in the background -------------------------------------------------------------------------------------------

    def drain(self) -> None:
        """Wait until every sealed tag has ended."""
        self.fence()
        with self._idle:
            self._idle.wait_for(lambda: not self._pending)

    def _work(self) -> None:
        sequence = 0
        while (job := self._jobs.get()) is not None:
            if isinstance(job, LazyFile):
                job.copy()
                continue
            sequence += 1
            reason = self._finish_tag(job, f"tag/{sequence}")
            for file in job.files:
                file.release()
            if reason:
                log.warning("the checkpoint %s failed and was dropped: %s", job.tag, reason)
            self.reports.append((job.tag, reason))
            with self._idle:
                self._pending -= 1
                self._idle.notify_all()

    def _finish_tag(self, tag: _Tag, name: str) -> str:
        """Durable on all ranks, renamed on all ranks, recorded; the reason against, or ''."""
        written: dict[str, FileRecord] = {}

        def write() -> None:
            for file in tag.files:
                written[str(file.path)] = file.write()

        def rename() -> None:
            for file in tag.files:
                self._ops.rename(file.part, file.path)

        try:
            self._together(f"{name}/durable", write)
            if self._coordinator.rank == 0:  # from here on the tag's older files go
                self._ops.unlink(tag.folder / RECORD)
            self._together(f"{name}/begin", lambda: None)
            words = self._together(f"{name}/renamed", rename, {Path(p).name: r for p, r in written.items()})
            if self._coordinator.rank == 0:
                files = {file: record for word in words for file, record in word.items()}
                if all(file.path.parent == tag.folder for file in tag.files):
                    publish(tag.root, tag.tag, files, self._ops, latest=tag.latest)
            self._together(f"{name}/published", lambda: None)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return ""

    def _together(self, name: str, act: Any, word: Any = None) -> list[Any]:
        """Act on every rank; every rank's word, or the first reason against."""
        problem = ""
        try:
            act()
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        self._coordinator.say(name, (problem, word))
        if self._coordinator.rank == 0:
            words = self._coordinator.hear_all(name, timeout_s=self.config.timeout_s)
            against = [f"rank {rank}: {reason}" for rank, (reason, _) in enumerate(words) if reason]
            self._coordinator.say(f"{name}/verdict", ("; ".join(against), [each for _, each in words]))
        deadline_s = time.monotonic() + 2 * self.config.timeout_s
        verdict, words = self._coordinator.hear(f"{name}/verdict", 0, deadline_s=deadline_s)
        if verdict:
            raise RuntimeError(verdict)
        return words

    def choose(self, root: Path) -> str | None:
        """The tag to load, agreed by all ranks: the one that `latest` names, or the newest older one that verifies."""
        self.seal()
        self.drain()
        coordinator, refused = self._coordinator, ""
        coordinator.round += 1
        tags = candidates(root) if coordinator.rank == 0 else []
        for attempt in range(1_000_000):
            name = f"load/{coordinator.round}/{attempt}"
            if coordinator.rank == 0:
                coordinator.say(name, tags[attempt] if attempt < len(tags) else None)
            tag = coordinator.hear(name, 0, deadline_s=time.monotonic() + self.config.timeout_s)
            if tag is None:
                break
            if not (root / tag / RECORD).exists():
                return tag  # stock DeepSpeed wrote it
            found = problems(root / tag, part=coordinator.rank, parts=coordinator.world)
            coordinator.say(f"{name}/verdict", found)
            words = coordinator.hear_all(f"{name}/verdict", timeout_s=self.config.timeout_s)
            wrong = [problem for word in words for problem in word]
            if not wrong:
                return tag
            refused = refused or wrong[0]
            log.warning("the checkpoint %s is damaged (%s); trying an older one", root / tag, wrong[0])
        if refused:
            raise UserError(
                f"no whole checkpoint in {root}; the newest: {refused}", remedy="pass another load_dir or tag"
            )
        return None


class _Tag:
    """One save on its way."""

    def __init__(self, root: Path, tag: str, latest: bool) -> None:
        self.root, self.tag, self.latest = root, tag, latest
        self.files: list[LazyFile] = []

    @property
    def folder(self) -> Path:
        return self.root / self.tag


def _finish(reference: weakref.ref[UndertowCheckpointEngine]) -> None:
    engine = reference()
    if engine is not None:
        engine.cleanup()


def same_ranks(folder: Path, ranks: int) -> None:
    """`UserError` when the tag's ZeRO partitions were made for another number of ranks: DeepSpeed cannot join them."""
    if (saved := zero_ranks(folder)) not in (0, ranks):
        raise UserError(
            f"{folder} is partitioned over {saved} data-parallel ranks, and this job has {ranks}",
            remedy=f"run 'undertow deepspeed convert {folder.parent} NEW', set "
            '{"checkpoint": {"load_universal": true}} and load NEW',
        )


# -- teaching DeepSpeed --------------------------------------------------------------------------------------------


def install() -> None:
    """Wrap DeepSpeed's factory, save_checkpoint and load_checkpoint; done by importing this module, once."""
    if getattr(_deepspeed.create_checkpoint_engine, "_undertow", False):
        return
    factory = _deepspeed.create_checkpoint_engine

    @functools.wraps(factory)
    def create_checkpoint_engine(config_params: Any, **options: Any) -> Any:
        raw = getattr(config_params, "_param_dict", None) or {}
        wanted = checkpoint_section(section(raw).get("checkpoint"))
        if wanted is None or launch.detect().disabled:
            return factory(config_params=config_params, **options)
        log.info("DeepSpeed's checkpoints are written by undertow (%s)", "lazy" if wanted.lazy else "not lazy")
        return UndertowCheckpointEngine(wanted)

    create_checkpoint_engine._undertow = True  # type: ignore[attr-defined]
    _deepspeed.create_checkpoint_engine = create_checkpoint_engine
    kind = _deepspeed.DeepSpeedEngine
    save, load = kind.save_checkpoint, kind.load_checkpoint

    @functools.wraps(save)
    def save_checkpoint(self: Any, *args: Any, **options: Any) -> Any:
        done = save(self, *args, **options)
        if isinstance(self.checkpoint_engine, UndertowCheckpointEngine):
            self.checkpoint_engine.seal()
        return done

    @functools.wraps(load)
    def load_checkpoint(self: Any, load_dir: str, tag: str | None = None, *args: Any, **options: Any) -> Any:
        ours = isinstance(self.checkpoint_engine, UndertowCheckpointEngine)
        if ours and tag is None and not self.load_universal_checkpoint():
            tag = self.checkpoint_engine.choose(Path(load_dir))
        if ours and tag is not None and not self.load_universal_checkpoint():
            same_ranks(Path(load_dir) / tag, self.dp_world_size)
        return load(self, load_dir, tag, *args, **options)

    kind.save_checkpoint, kind.load_checkpoint = save_checkpoint, load_checkpoint


install()
