"""A stock transformers `Trainer` whose ranks share each sequence: TokenRing attention, by one callback.

    trainer = Trainer(model, args, train_dataset=data)
    trainer.add_callback(ContextParallelCallback(trainer, ranks=2))

Two things of the trainer change: ranks of one group read the same batches, and the batch counts them once. The model's
shards, shifted labels, positions and attention are `enable_context_parallel`'s, whose loss has a gradient that is right
once it is averaged over all ranks, which DDP does and the trainer's own factor (tokens of all devices) expects.
transformers' own way (Accelerate's `ParallelismConfig(cp_size=…)`) shards a second time and is refused.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from ..dist import launch
from ..dist.errors import UserError
from ..parallel import enable_context_parallel
from ..parallel.stream.hf_trainer import StreamCallback
from .context_groups import check_first_batch, context_group

ENGINE = "_undertow_stream_engine"  # where parallel.stream.api keeps a model's engine


class ContextParallelCallback(TrainerCallback):
    """Add it to its trainer on every rank, before `train`. `ranks` neighbouring ranks share each sequence, the others
    are data-parallel. `options` are those of `enable_context_parallel`: layout, schedule, backward_schedule.

    On from the beginning of training to its end, off in evaluation, where each rank has rows of its own as ever. With
    a `StreamCallback` the layers are streamed over the ring. `UserError` names what does not go with
    it; collective.
    """

    def __init__(self, trainer: Trainer, *, ranks: int, **options: Any) -> None:
        if not isinstance(trainer, Trainer):
            raise UserError(
                f"ContextParallelCallback({type(trainer).__name__})", expected="the Trainer that it is added to"
            )
        self.trainer: Any = trainer
        self.options = options
        args = trainer.args
        if args.n_gpu > 1:
            raise UserError(
                f"one process for {args.n_gpu} GPUs", remedy="start one for each: torchrun --nproc-per-node …"
            )
        self._refuse()
        self.mesh, self.group = context_group(ranks, args.world_size, args.process_index)
        self.place = self.mesh.coordinates(args.process_index)
        self._enabled: Any = None
        self._streamed: list[StreamCallback] = []
        self._plain = {name: getattr(trainer, name) for name in ("get_total_train_batch_size", "get_train_dataloader")}
        self._plain["evaluation_loop"] = trainer.evaluation_loop
        if ranks > 1:
            self.trainer.get_total_train_batch_size = self._batch_size
            self.trainer.get_train_dataloader = self._loader
            self.trainer.evaluation_loop = self._evaluate

    def _refuse(self) -> None:
        trainer, args = self.trainer, self.trainer.args
        parallelism = getattr(trainer.accelerator, "parallelism_config", None)
        others = [n for n in ("cp", "sp", "tp") if getattr(parallelism, f"{n}_size", 1) > 1]
        reasons = {
            f"Accelerate's ParallelismConfig, {', '.join(f'{n}_size' for n in others)}": (bool(others), "leave it out"),
            "a tensor-parallel model (tp_plan)": ((getattr(trainer.model, "_tp_size", None) or 1) > 1, "leave it out"),
            "DeepSpeed": (
                trainer.is_deepspeed_enabled,
                "a loop of your own with {'undertow': {'context_parallel': N}} in its JSON (docs/deepspeed.md)",
            ),
            "FSDP": (trainer.is_fsdp_enabled, "enable_context_parallel in a loop of your own"),
            "compute_loss_func": (trainer.compute_loss_func is not None, "the loss of the model itself"),
            "label_smoothing_factor": (args.label_smoothing_factor != 0, "leave it at 0"),
            "use_liger_kernel": (args.use_liger_kernel, "StreamCallback, which computes no whole logits either"),
            f"{type(trainer).__name__}.compute_loss": (
                type(trainer).compute_loss is not Trainer.compute_loss,
                "a trainer that takes the model's loss: the logits here are one rank's tokens",
            ),
            "train_sampling_strategy='batch_rebalance'": (
                getattr(args, "train_sampling_strategy", "") == "batch_rebalance",
                "another strategy: this one deals rows to ranks by itself",
            ),
        }
        for what, (applies, remedy) in reasons.items():
            if applies:
                raise UserError(f"{what} with ContextParallelCallback", expected="a trainer without", remedy=remedy)

    # -- events of the trainer ---------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._leave()
        if self.mesh.size("context") == 1 or launch.detect().disabled:
            return
        self._refuse()
        model: nn.Module = self.trainer.model
        self._enabled = enable_context_parallel(model, self.group, **self.options)
        remedy = "let the Trainer make its loader from a dataset of fixed order, the same on every rank"
        self._first = check_first_batch(self._enabled.root, self.group, remedy)
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, StreamCallback):
                self._streamed.append(callback)
                callback.options |= {"attend": self._attend, "ranks": self._enabled.context}
                if callback.engine is not None and ENGINE in kwargs["model"].__dict__:  # it began before us
                    callback.on_train_end(args, state, control, **kwargs)
                    callback.on_train_begin(args, state, control, **kwargs)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        engines = [m.__dict__[ENGINE] for m in kwargs["model"].modules() if ENGINE in m.__dict__]
        if self._enabled is not None and any(engine.attend != self._attend for engine in engines):
            raise UserError(
                "streaming was switched on by hand under ContextParallelCallback", remedy="use StreamCallback()"
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._leave()

    def _leave(self) -> None:
        if self._enabled is not None:
            self._enabled.disable()
            self._first.remove()
            self._enabled = None
        for callback in self._streamed:
            callback.options.pop("attend", None)
            callback.options.pop("ranks", None)
        self._streamed = []

    # -- what replaces the trainer's own -----------------------------------------------------------------------------

    def _batch_size(self, args: Any) -> int:
        return self._plain["get_total_train_batch_size"](args) // self.mesh.size("context")

    def _loader(self) -> Any:
        """The trainer's loader, dealt out over the data axis only."""
        from accelerate import accelerator  # here: every Trainer has it, but this file is named after another

        prepare = accelerator.prepare_data_loader

        @functools.wraps(prepare)
        def over_data(*args: Any, **options: Any) -> Any:
            place = {"num_processes": self.mesh.size("data"), "process_index": self.place["data"]}
            return prepare(*args, **{**options, **place, "dispatch_batches": False})

        with _replaced(accelerator, "prepare_data_loader", over_data):
            return self._plain["get_train_dataloader"]()

    def _evaluate(self, *args: Any, **options: Any) -> Any:
        """Without the ring: ranks evaluate different rows."""
        if self._enabled is None:
            return self._plain["evaluation_loop"](*args, **options)
        self._enabled.disable()
        engines = [callback.engine for callback in self._streamed if callback.engine is not None]
        for engine in engines:
            engine.attend = None
        try:
            return self._plain["evaluation_loop"](*args, **options)
        finally:
            for engine in engines:
                engine.attend = self._attend
            self._enabled = enable_context_parallel(self.trainer.model, self.group, **self.options)

    # -- one step ----------------------------------------------------------------------------------------------------

    def _attend(
        self, q_BHTD: Any, k_BGTD: Any, v_BGTD: Any, *, positions: Any = None, scale: Any = None, window: Any = None
    ) -> torch.Tensor:
        """Attention of the latest batch, for streamed layers, whose backward comes before the next forward."""
        return self._enabled.context.attend(q_BHTD, k_BGTD, v_BGTD, scale=scale, window=window)


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Callable) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
