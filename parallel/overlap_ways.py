"""What an arm does with a product's operands, as a function that is made once and called ever after.

The sequential arm between GPUs is `overlap_plain`, while it is measured too: through the engine a short product takes
longer, and arms would win against that which lose against cuBLAS and NCCL.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..comms.chunk_plan import ChunkPlan
from ..comms.cuda_recorder import Recorder
from ..comms.overlap_cuda import CudaOverlapEngine
from ..comms.overlap_engine import OverlapEngine
from . import overlap_plain
from .kernels.tracked_matmul import tracked_product
from .overlap_arms import Arm
from .overlap_products import panel_of, rows_of

SCATTER, SUM, GATHER = "matmul_reduce_scatter", "matmul_all_reduce", "all_gather_matmul"
Way = Callable[..., Any]  # of (a, b) and, if it is plain, their product; of (a, several b) for a gather


@dataclass(frozen=True)
class Ways:
    """Of one engine, whose ranks are `group`. `recorder`: of what may be replayed, if it can record."""

    engine: OverlapEngine | CudaOverlapEngine
    group: dist.ProcessGroup
    recorder: Recorder | None

    def of(self, kind: str, plan: ChunkPlan, arm: Arm, dtype: torch.dtype) -> Way:
        group, rows, whole = self.group, plan.sizes[0], plan.rows
        if not self.plain(plan, arm, dtype):
            return partial(self._gathered, plan, arm) if kind == GATHER else partial(self._multiplied, kind, plan, arm)
        if kind == SUM:
            return lambda a, b, y=None: overlap_plain.all_reduce(a, b, group, y)
        if kind == SCATTER:
            return lambda a, b, y=None: overlap_plain.reduce_scatter(a, b, rows, group, y)
        return lambda a, bs: overlap_plain.all_gather(a, bs, whole, group)

    def plain(self, plan: ChunkPlan, arm: Arm, dtype: torch.dtype) -> bool:
        """Whether the way is a script's: the product and one collective."""
        equal = len(set(plan.sizes)) == 1 and not dtype.is_complex  # a process group takes real numbers only
        return not arm.overlap and equal and plan.world > 1 and isinstance(self.engine, CudaOverlapEngine)

    def prepare(self, plan: ChunkPlan, arm: Arm, a: Tensor, b: Tensor) -> None:
        """Before a reduce-scatter that is measured: record it where that arm would, or remember its addresses."""
        if self.recorder is None:
            return
        if arm.replayed:
            self.recorder.prepare(plan, (a, b), b.shape[1], self._recorded(plan, a, b))
        else:
            self.recorder.see((a, b))

    def settle(self, arms: Iterable[Arm], chosen: Arm, sizes: tuple[int, ...], n: int, dtype: torch.dtype) -> None:
        """Drop what a reduce-scatter's other arms have recorded while they were measured: it holds memory."""
        for arm in arms:
            if self.recorder is not None and arm.replayed and arm != chosen:
                plan = self.engine.plan(sizes, arm.subchunks, n if arm.columns else 0, whole=arm.whole)
                self.recorder.drop(plan, n, dtype)

    def _gathered(self, plan: ChunkPlan, arm: Arm, a: Tensor, bs: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        whole = a.new_empty(plan.rows, a.shape[1])
        outs = [a.new_empty(plan.rows, b.shape[1]) for b in bs]
        products = [rows_of(whole, b, out) for b, out in zip(bs, outs)]

        def use(low: int, high: int) -> None:
            for product in products:
                product(low, high)

        self.engine.all_gather(plan, a, whole, use, overlap=arm.overlap)
        return whole, outs

    def _multiplied(self, kind: str, plan: ChunkPlan, arm: Arm, a: Tensor, b: Tensor) -> Tensor:
        n = b.shape[1]
        if arm.replayed and kind == SCATTER and self.recorder is not None:
            return self.recorder.run(plan, (a, b), n, self._recorded(plan, a, b))
        y = a.new_empty(a.shape[0], n)
        more = {"tracked": tracked_product(a, b, y)} if arm.tracked else {}
        return self._queue(kind, plan, a, b, y, overlap=arm.overlap, **more)

    def _recorded(self, plan: ChunkPlan, a: Tensor, b: Tensor) -> Callable[[Tensor, Tensor | None], Tensor]:
        return lambda y, out: self._queue(SCATTER, plan, a, b, y, out=out)

    def _queue(self, kind: str, plan: ChunkPlan, a: Tensor, b: Tensor, y: Tensor, **more: Any) -> Tensor:
        more |= {"panel": panel_of(a, b)} if plan.columns else {}
        pattern: Callable[..., Tensor] = self.engine.all_reduce if kind == SUM else self.engine.reduce_scatter
        return pattern(plan, rows_of(a, b, y), y, **more)


class Lasting:
    """A way that is taken for so many calls; the last of them calls `over`, unless a CUDA graph is being captured, in
    which nothing can be measured: then a later one does."""

    def __init__(self, way: Way, calls: int, over: Callable[[], None], capturing: Callable[[], bool]) -> None:
        self._way, self._left, self._over, self._capturing = way, calls, over, capturing

    def __call__(self, *operands: Any) -> Any:
        self._left -= 1
        if self._left <= 0 and not self._capturing():
            self._over()
        return self._way(*operands)


class Guesses:
    """Of which reductions the way may be guessed to be plain, by how many numbers the first matrix has: `plain`."""

    def __init__(self) -> None:
        self.plain = set[int]()
        self._settled: dict[int, dict[Hashable, bool | None]] = {}

    def settle(self, case: Hashable, numbers: int, plain: bool | None) -> None:
        """One of so many numbers has settled on a plain way or another, and all must have settled on plain ones; None:
        it has not yet, and each guess would cost it a product."""
        of_as_many = self._settled.setdefault(numbers, {})
        of_as_many[case] = plain
        if all(of_as_many.values()):
            self.plain.add(numbers)
        else:
            self.plain.discard(numbers)


def keys_of(case: tuple, a: Tensor, b: Tensor | Sequence[Tensor]) -> list[Hashable]:
    """What a settled product is found by: its `case` (kind, shapes, rows of each rank, dtype), and, where ranks have
    equal shares, which follow from the shapes of two matrices then, by these alone."""
    if len(case) != 5 or len(set(case[-2])) > 1:  # several second matrices, or shares of a caller's own
        return [case]
    second = b if isinstance(b, Tensor) else b[0]
    return [case, (case[0], a.shape, second.shape, a.dtype, second.dtype)]
