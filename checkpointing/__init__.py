"""Lazy, asynchronous, multi-level checkpoints: state to tiers and back."""

from .checkpointer import Checkpointer
from .preemption import Preemption

__all__ = ["Checkpointer", "Preemption"]
