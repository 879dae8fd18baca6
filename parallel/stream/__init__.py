"""Streamed backpropagation: exact gradients of long sequences, a chunk of one layer at a time."""

from .api import disable, enable, stream_backprop
from .gate import keep_faster
from .loss import causal_loss, map_rows, rows_of, token_log_probs, weighted_nll
from .plan import StreamPlan

__all__ = [
    "StreamPlan",
    "causal_loss",
    "disable",
    "enable",
    "keep_faster",
    "map_rows",
    "rows_of",
    "stream_backprop",
    "token_log_probs",
    "weighted_nll",
]
