"""Lazy, atomic, verified checkpoints for transformers' `Trainer`, and what else undertow offers it.

    trainer = Trainer(model, args, train_dataset=data)
    trainer.add_callback(LazyCheckpoints(trainer))
    trainer.train(resume_from_checkpoint=newest_whole(args.output_dir))

The trainer decides when to save, and its own code writes the folder, so `resume_from_checkpoint`, `from_pretrained`,
`save_total_limit` and the best model work as ever. Only the large files differ: weights and optimizer state leave
during the next forward and backward, fenced before the optimizer's step. The folder is filled beside its place and
gets its name, checkpoint-N, when all ranks' files are durable and summed up; a torn one is never seen.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from ..checkpointing.attempt import SaveLost
from ..checkpointing.files import FileOps
from ..checkpointing.hooks import WholeFence, attach
from ..checkpointing.lazy_file import LazyFile
from ..checkpointing.lazy_safetensors import LazySafetensors
from ..checkpointing.lazy_saver import LazySaver, Phase
from ..checkpointing.tag_folder import RECORD, problems, seal_folder
from ..dist import launch
from ..dist.errors import UserError
from ..dist.log import get_logger, warn_once
from ..parallel.stream.hf_trainer import StreamCallback
from .transformers_context_plugin import ContextParallelCallback

__all__ = ["ContextParallelCallback", "LazyCheckpoints", "StreamCallback", "newest_whole"]

log = get_logger(__name__)
WRITERS = ("transformers.modeling_utils", "peft.peft_model")  # have safetensors' save_file as `safe_save_file`
STAGING = ".undertow-"
STATE = "trainer_state.json"


class LazyCheckpoints(TrainerCallback):
    """Add it to its trainer on every rank. `reports` tells how each save ended: (folder, '' or the reason).

    `timeout_s`: how long ranks wait for each other's files. Where a save cannot be lazy (FSDP, DeepSpeed, which has an
    engine of its own, pushing to a hub, folders on each node) the trainer saves as it always did, and a warning says
    why. Outside of `train` the trainer is untouched.
    """

    def __init__(self, trainer: Trainer, *, timeout_s: float = 300.0) -> None:
        if not isinstance(trainer, Trainer):
            raise UserError(f"LazyCheckpoints({type(trainer).__name__})", expected="the Trainer that it is added to")
        if timeout_s <= 0:
            raise UserError(f"timeout_s={timeout_s}", expected="a positive number of seconds")
        self.trainer: Any = trainer
        self.timeout_s = timeout_s
        self.reports: list[tuple[str, str]] = []
        self._saver: LazySaver | None = None
        self._ops = FileOps(direct=False)
        self._hooks: list[Any] = []
        self._saves = 0
        self._plain: dict[str, Callable] = {}

    # -- events of the trainer ---------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._saver is not None:  # an earlier train() was interrupted
            self._leave()
        if reason := self._obstacle(kwargs["optimizer"]):
            warn_once(log, "checkpoints are written by the trainer alone, not lazily: %s", reason)
            return
        self._saver = LazySaver(timeout_s=self.timeout_s)
        self._saver.reports = self.reports
        coordinator = self._saver.coordinator
        for stale in Path(args.output_dir).glob(f"{STAGING}*") if coordinator.rank == 0 else []:
            if not stale.name.startswith(STAGING + coordinator.token):
                shutil.rmtree(stale, ignore_errors=True)  # a killed run's
        saver = self._saver
        optimizer = _innermost(kwargs["optimizer"])
        self._hooks = attach(WholeFence(saver.fence), [self.trainer.model], [optimizer])
        for name, ours in (("_save_checkpoint", self._save), ("_finalize_training", self._finalize)):
            self._plain[name] = getattr(self.trainer, name)
            setattr(self.trainer, name, ours)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._leave()

    def wait(self) -> None:
        """Until every save begun so far is committed or has failed."""
        if self._saver is not None:
            self._saver.drain()

    def _leave(self) -> None:
        if self._saver is not None:
            self._saver.close()
            self._saver = None
        for handle in self._hooks:
            handle.remove()
        for name in self._plain:
            delattr(self.trainer, name)  # the class's own shows again
        self._hooks, self._plain = [], {}

    def _obstacle(self, optimizer: Any) -> str:
        """Why this trainer's saves cannot be lazy, or ''."""
        trainer, args = self.trainer, self.trainer.args
        reasons = {
            "undertow is switched off": launch.detect().disabled,
            "DeepSpeed has an engine of its own (docs/deepspeed.md)": trainer.is_deepspeed_enabled,
            "FSDP writes shards of its own (use undertow.checkpointing.Checkpointer)": trainer.is_fsdp_enabled,
            "push_to_hub reads the files at once": args.push_to_hub,
            "save_on_each_node": args.save_on_each_node,
            "the optimizer steps inside backward": "LayerWise" in type(_innermost(optimizer)).__name__,
            "the optimizer is not torch's": not isinstance(_innermost(optimizer), torch.optim.Optimizer),
        }
        return next((reason for reason, applies in reasons.items() if applies), "")

    # -- one save ----------------------------------------------------------------------------------------------------

    def _save(self, model: Any, trial: Any) -> None:
        """In place of the trainer's `_save_checkpoint`: the same, into a folder beside, large files later."""
        saver = self._saver
        assert saver is not None
        saver.drain()  # one in flight: host memory for two would be needed otherwise
        trainer, state = self.trainer, self.trainer.state
        run = Path(trainer._get_output_dir(trial=trial))
        self._saves += 1
        staging = run / f"{STAGING}{saver.coordinator.token}-{self._saves}"
        name = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        try:
            with self._redirected(staging):
                self._plain["_save_checkpoint"](model, trial)
            if state.best_model_checkpoint == str(staging / name):
                state.best_model_checkpoint = str(run / name)
                if trainer.args.should_save:
                    state.save_to_json(str(staging / name / STATE))
            reason = ""
        except OSError as error:  # a full disk must not end a training
            if trainer.args.world_size > 1 and state.best_global_step:
                raise  # the other ranks wait in the trainer's own barrier
            reason = f"{type(error).__name__}: {error}"
        limit, best = trainer.args.save_total_limit, state.best_model_checkpoint
        saver.seal(name, functools.partial(self._commit, staging, run / name, reason, limit, best))

    @contextlib.contextmanager
    def _redirected(self, staging: Path) -> Iterator[None]:
        """The trainer writes into `staging`, its large files lazily."""
        saver, trainer = self._saver, self.trainer
        assert saver is not None
        weights = {p.data_ptr() for p in trainer.model.parameters()}  # buffers may be written by forward

        def save_file(tensors: dict[str, torch.Tensor], filename: Any, metadata: Any = None) -> None:
            late = {name for name, tensor in tensors.items() if tensor.data_ptr() in weights}
            file = LazySafetensors(Path(filename), tensors, metadata or {}, lambda keys: keys[0] in late, saver.buffers)
            saver.add(file)

        def save_optimizer(output_dir: str) -> None:
            if trainer.args.should_save:
                path, optimizer = Path(output_dir), trainer.optimizer.state_dict()
                saver.add(LazyFile(path / "optimizer.pt", optimizer, lambda keys: keys[0] == "state", saver.buffers))
                torch.save(trainer.lr_scheduler.state_dict(), path / "scheduler.pt")

        with contextlib.ExitStack() as stack:
            stack.enter_context(_replaced(trainer, "_get_output_dir", lambda trial=None: str(staging)))
            stack.enter_context(_replaced(trainer, "_save_optimizer_and_scheduler", save_optimizer))
            stack.enter_context(_replaced(safetensors.torch, "save_file", save_file))
            for module in WRITERS:
                if hasattr(sys.modules.get(module), "safe_save_file"):
                    stack.enter_context(_replaced(sys.modules[module], "safe_save_file", save_file))
            yield

    def _commit(
        self,
        staging: Path,
        final: Path,
        reason: str,
        limit: int | None,
        best: str | None,
        files: list[LazyFile],
        phase: Phase,
    ) -> None:
        """In the background: durable on all ranks, summed up, renamed; then older folders may go."""
        saver = self._saver
        assert saver is not None
        leader = saver.coordinator.rank == 0
        written: dict = {}

        def write() -> None:
            if reason:
                raise SaveLost(reason)
            for file in files:
                written[file.path] = file.write()
                self._ops.rename(file.part, file.path)

        def publish() -> None:
            if not leader:
                return
            folder = staging / final.name
            seal_folder(folder, written, self._ops)
            if final.exists():  # a run that was rolled back comes by this step again
                final.rename(staging / "replaced")
            self._ops.rename(folder, final)
            self._ops.fsync_dir(final.parent)

        try:
            phase("written", write)
            phase("published", publish)
        finally:
            if leader:  # what it replaced, or what a failed save has left
                shutil.rmtree(staging, ignore_errors=True)
        if leader:
            rotate_checkpoints(str(final.parent), limit, best, use_mtime=True)

    def _finalize(self, *args: Any, **options: Any) -> Any:
        """The end of training looks at the folders, perhaps for the best model."""
        self.wait()
        return self._plain["_finalize_training"](*args, **options)


def newest_whole(output_dir: str | Path) -> str | None:
    """The newest checkpoint-N in `output_dir` whose every byte is as it was written, for `resume_from_checkpoint`; None
    if there is none. One that undertow did not write has no checksums and is taken as it is. Collective: rank 0 reads.
    """
    found: list[str | None] = [None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        found = [_newest_whole(Path(output_dir))]
    if dist.is_initialized():
        dist.broadcast_object_list(found, src=0)
    return found[0]


def _newest_whole(root: Path) -> str | None:
    steps: dict[int, Path] = {}
    for path in root.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        number = path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if number.isdecimal() and path.is_dir():
            steps[int(number)] = path
    for step in sorted(steps, reverse=True):
        path = steps[step]
        wrong = problems(path) if (path / RECORD).exists() else []
        if not wrong:
            return str(path)
        log.warning("%s is damaged (%s); trying an older one", path, wrong[0])
    return None


def _innermost(optimizer: Any) -> Any:
    """The optimizer that Accelerate has wrapped."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`owner.name` is `value` inside."""
    mine = name in vars(owner)
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if mine:
            setattr(owner, name, before)
        else:
            delattr(owner, name)
