"""Streamed backpropagation: exact gradients of long sequences, a chunk of one layer at a time."""
