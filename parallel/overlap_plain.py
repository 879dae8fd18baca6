"""The sequential way between GPUs as a script writes it: a product and one collective of equal shares, and no more.

What a product has settled on is called this way, because a GPU that is not kept busy waits for the host: through the
engine, a call of 0.15 ms took 0.04 ms longer. The collective is asked of the process group itself, with the options
that `torch.distributed` gives it: what its functions do besides pays for the look-up that led here. Before a product
nothing pays for it, and where the product takes longer than the host needs for the collective, all of it shows: so a
caller that can guess this way makes the product before it looks (`Team.firsts`), and hands it on as `y`.

Shapes: M rows over all ranks in equal shares, K and N this rank's inner and outer dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import AllgatherOptions, AllreduceOptions, ReduceScatterOptions


def _waited(options: Any) -> Any:
    """Of a call that the current stream waits for."""
    options.asyncOp = False
    return options


_GATHER, _REDUCE, _SCATTER = map(_waited, (AllgatherOptions(), AllreduceOptions(), ReduceScatterOptions()))
_gather: Any = getattr(ProcessGroup, "all_gather_single", None) or ProcessGroup._allgather_base  # until torch 2.12
_scatter: Any = getattr(ProcessGroup, "reduce_scatter_single", None) or ProcessGroup._reduce_scatter_base


def reduce_scatter(a_MK: Tensor, b_KN: Tensor, rows: int, group: ProcessGroup, y_MN: Tensor | None = None) -> Tensor:
    """This rank's `rows` rows of the sum of all a @ b, which is `y` where that is made already."""
    y_MN = a_MK @ b_KN if y_MN is None else y_MN
    out = y_MN.new_empty(rows, y_MN.shape[1])
    _wait(_scatter(group, out, y_MN, _SCATTER))
    return out


def all_reduce(a_MK: Tensor, b_KN: Tensor, group: ProcessGroup, y_MN: Tensor | None = None) -> Tensor:
    """The sum of all a @ b, which is `y` where that is made already, and then becomes the sum."""
    y_MN = a_MK @ b_KN if y_MN is None else y_MN
    _wait(group.allreduce([y_MN], _REDUCE))
    return y_MN


def all_gather(a_rK: Tensor, bs: Sequence[Tensor], rows: int, group: ProcessGroup) -> tuple[Tensor, list[Tensor]]:
    """(all ranks' rows of a, `rows` in all; its product with each b)."""
    whole_MK = a_rK.new_empty(rows, a_rK.shape[1])
    _wait(_gather(group, whole_MK, a_rK, _GATHER))
    return whole_MK, [whole_MK @ b for b in bs]


def _wait(work: Any) -> None:
    if work is not None:
        work.wait()
