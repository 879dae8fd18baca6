"""Lazy, asynchronous, multi-level checkpoints: state to tiers and back."""
