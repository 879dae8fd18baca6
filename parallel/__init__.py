"""Mathematics split over ranks or over time: ring attention, overlapped layers, streamed backpropagation."""

from .context_parallel import ContextParallel, enable_context_parallel
from .overlap_loss import vocab_parallel_cross_entropy
from .overlap_team import Team
from .overlap_teams import close_teams
from .overlapped_linear import all_gather_matmul, matmul_all_reduce, matmul_reduce_scatter
from .partition import shard_sequence, unshard_sequence
from .tensor_parallel import (
    ColumnParallelLinear,
    OverlapColwiseParallel,
    OverlapRowwiseParallel,
    RowParallelLinear,
    SequenceParallelMLP,
)
from .tensor_parallel_attention import SequenceParallelAttention
from .token_ring.api import token_ring_attention

__all__ = [
    "ColumnParallelLinear",
    "ContextParallel",
    "OverlapColwiseParallel",
    "OverlapRowwiseParallel",
    "RowParallelLinear",
    "SequenceParallelAttention",
    "SequenceParallelMLP",
    "Team",
    "all_gather_matmul",
    "close_teams",
    "enable_context_parallel",
    "matmul_all_reduce",
    "matmul_reduce_scatter",
    "shard_sequence",
    "token_ring_attention",
    "unshard_sequence",
    "vocab_parallel_cross_entropy",
]
