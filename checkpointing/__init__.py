"""Lazy, asynchronous, multi-level checkpoints: state to tiers and back."""

from .bucket import Bucket
from .checkpointer import Checkpointer
from .drop_in import async_save
from .frequency import Frequency
from .mirror import Mirror
from .partner import Partner
from .preemption import Preemption
from .retention import Retention
from .stored import open_checkpoint

__all__ = [
    "Bucket",
    "Checkpointer",
    "Frequency",
    "Mirror",
    "Partner",
    "Preemption",
    "Retention",
    "async_save",
    "open_checkpoint",
]
