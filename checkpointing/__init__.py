"""Lazy, asynchronous, multi-level checkpoints: state to tiers and back."""

from .checkpointer import Checkpointer

__all__ = ["Checkpointer"]
