"""Lazy checkpoints and streamed backpropagation for Lightning: two callbacks, no strategy.

    trainer = lightning.Trainer(callbacks=[LazyCheckpoints(), ModelCheckpoint(every_n_train_steps=100)], …)
    trainer.fit(module, ckpt_path="last")

Lightning decides when to save, what is in the file and which older one goes; its `CheckpointIO` is where the bytes
pass, so that is what the callback replaces while `fit` runs. The file is the one Lightning would have written, and
stock Lightning loads it. Weights and optimizer state leave during the next forward and backward, fenced before the
optimizer's step. An older file is removed only when the newer one is durable.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..checkpointing.files import FileOps
from ..checkpointing.hooks import WholeFence, attach
from ..checkpointing.lazy_file import LazyFile
from ..checkpointing.lazy_saver import LazySaver, Phase
from ..dist import launch
from ..dist.errors import UserError
from ..dist.log import get_logger, warn_once
from ..parallel.stream import disable, enable
from ..parallel.stream.api import check_names

try:
    from lightning.pytorch import Callback
    from lightning.pytorch.plugins.io import CheckpointIO
    from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
except ImportError as error:
    message = f"undertow's Lightning callbacks need the package lightning: pip install 'undertow[lightning]' ({error})"
    raise ImportError(message, name="lightning") from error

log = get_logger(__name__)


class LazyCheckpoints(Callback):
    """For `Trainer(callbacks=[…])`, on every rank. `reports` tells how each save ended: (file name, '' or the reason).

    Works where one rank writes the whole state: one device, and DDP. Under other strategies, and for paths that are not
    local files, Lightning saves as it always did, and a warning says why. `timeout_s`: how long ranks wait for each
    other when training ends.
    """

    def __init__(self, *, timeout_s: float = 300.0) -> None:
        if timeout_s <= 0:
            raise UserError(f"timeout_s={timeout_s}", expected="a positive number of seconds")
        self.timeout_s = timeout_s
        self.reports: list[tuple[str, str]] = []
        self._io: _LazyIO | None = None
        self._hooks: list[Any] = []

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage != "fit" or self._io is not None:
            return
        strategy = trainer.strategy
        reasons = {
            "undertow is switched off": launch.detect().disabled,
            f"{type(strategy).__name__} writes shards of its own": type(strategy)
            not in (SingleDeviceStrategy, DDPStrategy),
        }
        if reason := next((reason for reason, applies in reasons.items() if applies), ""):
            warn_once(log, "checkpoints are written by Lightning alone, not lazily: %s", reason)
            return
        self._io = _LazyIO(strategy.checkpoint_io, LazySaver(timeout_s=self.timeout_s), self.reports)
        strategy.checkpoint_io = self._io

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if self._io is not None:
            fence = self._io.saver.fence
            self._io.weights = {parameter.data_ptr() for parameter in pl_module.parameters()}
            self._hooks = attach(WholeFence(fence), [pl_module], trainer.optimizers)

    def wait(self) -> None:
        """Until every save begun so far is durable or has failed."""
        if self._io is not None:
            self._io.saver.drain()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "fit":
            self._leave(trainer)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.wait()

    def _leave(self, trainer: Any) -> None:
        for handle in self._hooks:
            handle.remove()
        self._hooks = []
        if self._io is not None:
            self._io.saver.close()
            trainer.strategy.checkpoint_io = self._io.plain
            self._io = None


class Stream(Callback):
    """Streamed backpropagation while `fit` trains. `name`: which submodule of the LightningModule is the decoder, a
    transformers model or one of our protocol ('' is the module itself); `options` are those of `enable`."""

    def __init__(self, name: str = "model", **options: Any) -> None:
        check_names(options)
        self.name, self.options = name, options
        self.engine: Any = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.engine = enable(pl_module.get_submodule(self.name), **self.options)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        disable(pl_module.get_submodule(self.name))

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        disable(pl_module.get_submodule(self.name))


class _LazyIO(CheckpointIO):
    """Writes late what the optimizer alone changes; anything that is no local file goes to `plain`."""

    def __init__(self, plain: CheckpointIO, saver: LazySaver, reports: list[tuple[str, str]]) -> None:
        self.plain, self.saver, self.reports = plain, saver, reports
        self.weights: set[int] = set()
        self._ops = FileOps(direct=False)
        self._failed = False

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if storage_options is not None or "://" in str(path):
            warn_once(log, "%s is no local file: Lightning writes it alone, not lazily", path)
            self.plain.save_checkpoint(checkpoint, path, storage_options)
            return
        self.saver.drain()  # one in flight: host memory for two would be needed otherwise
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        self.saver.add(LazyFile(target, checkpoint, self._late(checkpoint), self.saver.buffers))
        self.saver.seal(target.name, self._commit)

    def _late(self, checkpoint: dict[str, Any]) -> Callable[[tuple], bool]:
        """Parameters and optimizer state; buffers may be written by a forward."""
        state = checkpoint.get("state_dict", {})
        parameters = {
            name
            for name, value in state.items()
            if isinstance(value, torch.Tensor) and value.data_ptr() in self.weights
        }
        return lambda keys: keys[0] == "optimizer_states" or (keys[0] == "state_dict" and keys[-1] in parameters)

    def _commit(self, files: list[LazyFile], phase: Phase) -> None:
        """In the background, on the rank that saves: others have no part in it."""
        (file,) = files
        self._failed = True
        try:
            file.write()
            self._ops.rename(file.part, file.path)
            self._ops.fsync_dir(file.path.parent)
        except Exception as error:
            file.part.unlink(missing_ok=True)
            self.reports.append((file.path.name, f"{type(error).__name__}: {error}"))
            raise
        self._failed = False
        self.reports.append((file.path.name, ""))

    def load_checkpoint(self, path: Any, *args: Any, **options: Any) -> Any:
        self.saver.drain()
        return self.plain.load_checkpoint(path, *args, **options)

    def remove_checkpoint(self, path: Any) -> None:
        """After what is being written; kept when that fails."""

        def remove(files: list[LazyFile], phase: Phase) -> None:
            if self._failed:
                log.warning("%s is kept, because the save that replaces it failed", path)
                return
            with contextlib.suppress(FileNotFoundError):
                self.plain.remove_checkpoint(path)

        self.saver.seal(f"removal of {Path(path).name}", remove)

    def teardown(self) -> None:
        self.saver.drain()
        self.plain.teardown()
