"""Lazy, atomic, verified checkpoints for DeepSpeed, selected by its JSON: {"undertow": {"checkpoint": true}}.

Importing this module teaches DeepSpeed the section; the files are DeepSpeed's own, so that its converters read them.
DeepSpeed asks its engine for a commit just before the optimizer's update, at the gradient boundary: that is where the
copies are fenced. Durable files, the vote of all ranks, and `latest` follow in the background. `load_checkpoint`
without a tag takes the newest tag that verifies on all ranks. DeepSpeed has no registry of engines (0.19), so its
factory, and the two methods that save and load, are wrapped here.
"""

from __future__ import annotations

import functools
import os
import pickle
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime import engine as _deepspeed
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from ..dist import launch
from ..dist.errors import UserError
from ..dist.log import get_logger, warn_once
from .deepspeed_config import CheckpointSection, checkpoint_section, section
from .files import FileOps
from .lazy_file import LazyFile, check_file
from .lazy_saver import LazySaver, Phase
from .manifest import BadCheckpoint, FileRecord
from .tag_folder import RECORD, candidates, problems, publish, read_record, zero_ranks

log = get_logger(__name__)
LATE = ("module", "optimizer", "optimizer_state_dict", "frozen_param_fragments")  # written by the update alone


class UndertowCheckpointEngine(CheckpointEngine):
    """One per DeepSpeed engine, on every rank. `reports` tells how each tag ended: (tag, '' or the reason)."""

    def __init__(self, config: CheckpointSection) -> None:
        self.name = "undertow"
        self.config = config
        self._saver = LazySaver(timeout_s=config.timeout_s)
        self._ops = FileOps(direct=False)
        self._open: _Tag | None = None

    @property
    def reports(self) -> list[tuple[str, str]]:
        return self._saver.reports

    # -- what DeepSpeed calls ----------------------------------------------------------------------------------------

    def create(self, info: CheckpointCommitInfo) -> None:
        """A save begins. One is in flight at a time: host memory for two would be needed otherwise."""
        self.seal()
        self._saver.drain()
        self._open = _Tag(Path(info.save_dir), str(info.tag), info.save_latest)

    def save(self, state_dict: Any, path: str) -> None:
        if self._open is None:
            raise UserError(f"save of {path} outside of a checkpoint", expected="create() before save()")
        names = set(state_dict.get("buffer_names", ())) if isinstance(state_dict, dict) else set()

        def late(keys: tuple) -> bool:
            return bool(keys) and keys[0] in LATE and not (keys[0] == "module" and keys[-1] in names)

        wanted = late if self.config.lazy else lambda keys: False
        self._saver.add(LazyFile(Path(path), state_dict, wanted, self._saver.buffers))

    def seal(self) -> None:
        """This rank has handed over all files of the tag."""
        if self._open is not None:
            tag, self._open = self._open, None
            self._saver.seal(tag.tag, functools.partial(self._commit, tag))

    def get_commit_info(self) -> None:
        """DeepSpeed is about to update parameters: fence. There is never anything for DeepSpeed to commit."""
        self._saver.fence()

    def commit(self, info: CheckpointCommitInfo) -> bool:
        """Called by DeepSpeed where it wants files at once (save_16bit_model)."""
        self.seal()
        self._saver.drain()
        return not self.reports[-1][1]

    def load(self, path: str, map_location: Any = None) -> Any:
        """One file, verified first; of a file that undertow did not write, only DeepSpeed's own types are unpickled."""
        self.seal()
        self._saver.drain()
        record = read_record(Path(path).parent)
        if record is None or Path(path).name not in record.files:
            warn_once(log, "%s has no checksums by undertow: loaded as it is", os.path.dirname(path))
            return _load_foreign(path, map_location)
        if problem := check_file(Path(path), record.files[Path(path).name]):
            raise BadCheckpoint(f"{path}: {problem}")
        return torch.load(path, map_location=map_location, weights_only=False)

    def is_decoupled(self) -> bool:
        return True  # otherwise DeepSpeed writes `latest` before anything is durable

    def preserves_storage_sharing(self) -> bool:
        return False  # each tensor is copied alone, so DeepSpeed need not clone views of its flat buffers

    def cleanup(self) -> None:
        """The end of training: everything in flight is committed, `latest` included."""
        self.seal()
        self._saver.close()

    # -- committing and choosing -------------------------------------------------------------------------------------

    def _commit(self, tag: _Tag, files: list[LazyFile], phase: Phase) -> None:
        """Durable on all ranks, renamed on all ranks, recorded; in the background."""
        written: dict[str, FileRecord] = {}
        leader = self._saver.coordinator.rank == 0

        def write() -> None:
            for file in files:
                written[file.path.name] = file.write()

        def rename() -> None:
            for file in files:
                self._ops.rename(file.part, file.path)

        def publish_tag() -> None:
            if leader and all(file.path.parent == tag.folder for file in files):
                records = {name: record for word in words for name, record in word.items()}
                publish(tag.root, tag.tag, records, self._ops, latest=tag.latest)

        phase("durable", write)  # from here on the tag's older files go
        phase("begun", lambda: self._ops.unlink(tag.folder / RECORD) if leader else None)
        words = phase("renamed", rename, written)
        phase("published", publish_tag)

    def choose(self, root: Path) -> str | None:
        """The tag to load, agreed by all ranks: the one that `latest` names, or the newest older one that verifies."""
        self.seal()
        self._saver.drain()
        coordinator, refused = self._saver.coordinator, ""
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


@dataclass(frozen=True)
class _Tag:
    """One save on its way."""

    root: Path
    tag: str
    latest: bool

    @property
    def folder(self) -> Path:
        return self.root / self.tag


def _load_foreign(path: str, map_location: Any) -> Any:
    with torch.serialization.safe_globals([LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]):
        try:
            return torch.load(path, map_location=map_location, weights_only=True)
        except pickle.UnpicklingError as error:
            raise UserError(
                f"{path} was not written by undertow and cannot be read safely ({str(error).strip().splitlines()[0]})",
                expected="tensors, plain values and DeepSpeed's own types",
                remedy="if you trust who wrote it, name its types by torch.serialization.add_safe_globals([…])",
            ) from error


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
