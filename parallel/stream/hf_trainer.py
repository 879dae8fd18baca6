"""Streaming inside transformers' `Trainer` (and TRL's trainers, which derive from it): one callback.

``Trainer(model, args, callbacks=[StreamCallback(chunk=8192)], …)``. It switches streaming on when training begins,
after the trainer has wrapped the model, and off when it ends, so that what is saved and generated is the plain model.
Leave `gradient_checkpointing` off in the arguments; it is not needed.
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from .api import check_names, disable, enable
from .engine import Engine


class StreamCallback(TrainerCallback):
    """`options` are those of `enable`. `engine` holds the plan and the report while training runs."""

    def __init__(self, **options: Any) -> None:
        check_names(options)
        self.options = options
        self.engine: Engine | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.engine = enable(kwargs["model"], **self.options)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        disable(kwargs["model"])
