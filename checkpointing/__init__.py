"""Lazy, asynchronous, multi-level checkpoints: state to tiers and back."""

from .checkpointer import Checkpointer
from .frequency import Frequency
from .mirror import Mirror
from .preemption import Preemption
from .retention import Retention

__all__ = ["Checkpointer", "Frequency", "Mirror", "Preemption", "Retention"]
