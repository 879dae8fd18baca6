"""Mathematics split over ranks or over time: ring attention, overlapped layers, streamed backpropagation."""

from .context_parallel import ContextParallel, enable_context_parallel
from .partition import shard_sequence, unshard_sequence
from .token_ring.api import token_ring_attention

__all__ = [
    "ContextParallel",
    "enable_context_parallel",
    "shard_sequence",
    "token_ring_attention",
    "unshard_sequence",
]
