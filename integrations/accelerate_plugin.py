"""A `Checkpointer` for what an `accelerate.Accelerator` has prepared, so that a plain loop says nothing twice.

    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    ckpt = checkpointer(accelerator, "runs/a", every=100)
    for step in range(ckpt.restore() or 0, steps): ckpt.step(step); …; optimizer.step()

Names are those of the plain program (`model`, `optimizer`, `scheduler`, `scaler`), without Accelerate's wrappers, so a
program without Accelerate, or on another number of ranks, restores the same folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType

from ..checkpointing import Checkpointer
from ..dist.errors import UserError

OTHERS = {
    DistributedType.DEEPSPEED: "use its JSON, {'undertow': {'checkpoint': true}} (docs/deepspeed.md)",
    DistributedType.MEGATRON_LM: "Megatron-LM saves its own shards",
}


def checkpointer(accelerator: Accelerator, root: Path | str, **options: Any) -> Checkpointer:
    """After `prepare`, on every rank. `options` are those of `Checkpointer`; its further objects, such as the position
    in the data, may be among them. What was given to `register_for_checkpointing` is saved as `custom`, `custom1`, ….
    """
    if not isinstance(accelerator, Accelerator):
        raise UserError(
            f"the first argument is {accelerator!r}, of type {type(accelerator).__name__}",
            expected="the accelerate.Accelerator that has prepared the model",
            remedy="checkpointer(accelerator, folder, every=100)",
        )
    if accelerator.distributed_type in OTHERS:
        raise UserError(
            f"Accelerate runs {accelerator.distributed_type.value}", remedy=OTHERS[accelerator.distributed_type]
        )
    prepared: Any = accelerator
    groups = {
        "model": [accelerator.unwrap_model(model) for model in prepared._models],
        "optimizer": [optimizer.optimizer for optimizer in prepared._optimizers],
        "scheduler": [scheduler.scheduler for scheduler in prepared._schedulers],
        "scaler": [scaler for scaler in [getattr(accelerator, "scaler", None)] if scaler is not None],
        "custom": list(prepared._custom_objects),
    }
    if not groups["model"]:
        raise UserError("the accelerator has prepared no model", remedy="call accelerator.prepare(model, …) first")
    objects = {f"{name}{i or ''}": item for name, items in groups.items() for i, item in enumerate(items)}
    if doubled := sorted(set(objects) & set(options)):
        raise UserError(f"'{doubled[0]}' is given, and prepared too", remedy=f"leave out {doubled[0]}=…")
    return Checkpointer(root, **objects, **options)
