"""Adapters that see several rooms at once: DeepSpeed, transformers, pytest, run report."""
