"""Matrix products whose collective runs meanwhile: GEMM → reduce-scatter, all-gather → GEMM, with their backward.

T3 (Pati et al., ASPLOS 2024) in software: the producer works in the order in which its rows are wanted elsewhere, and
every finished piece leaves at once. Both are schedules of `comms`, so the same object that is executed is proved and
simulated. Partial sums are added in rank order whoever owns the rows, so the sums do not depend on who is early. Each
of the two is the other's backward.

Shapes: M rows over all ranks, K and N this rank's inner and outer dimensions, W ranks.
"""

from __future__ import annotations

import functools
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..comms.builders.all_gather_gemm import all_gather_gemm
from ..comms.builders.gemm_reduce_scatter import gemm_reduce_scatter
from ..comms.link import LinkModel
from ..comms.p2p import P2P
from ..comms.schedule import Schedule
from ..dist.errors import UserError
from ..dist.trace import Trace
from .overlap_gate import Gate

ARMS = {"sequential": (1, False), "overlap": (1, True), "overlap, 4 pieces": (4, True)}  # name → (subchunks, overlap)
MODES = {"auto": None, "off": 0, "on": 2}


def shard_rows(rows: int, world: int) -> list[int]:
    """How many rows each rank owns: as torch.chunk cuts, so that DTensor's Shard agrees."""
    each = -(-rows // world) if rows else 0
    return [max(0, min(each, rows - rank * each)) for rank in range(world)]


class Team:
    """The ranks of `group` that multiply together. Create, use and `close` on every rank alike.

    `overlap`: 'auto' measures each product's arms and keeps the fastest, 'on' takes the finest overlap, 'off' none. The
    last two repeat every bit from run to run; with 'auto' that depends on the BLAS (see `overlap_gate`).
    `device`: CPU (gloo) or CUDA (NCCL). `link` emulates a slow link on gloo, `trace` records what ran when.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        *,
        overlap: str = "auto",
        device: torch.device | str = "cpu",
        timeout_s: float = 300.0,
        link: LinkModel | None = None,
        trace: Trace | None = None,
    ) -> None:
        if overlap not in MODES:
            raise UserError(f"overlap={overlap!r}", expected=f"one of {', '.join(MODES)}")
        self._p2p = P2P(group, device=device, timeout_s=timeout_s, link=link, trace=trace)
        self.rank, self.world, self.device = self._p2p.rank, self._p2p.world, self._p2p.device
        self.gate = Gate(list(ARMS), self._p2p.gather, fixed=0 if self.world == 1 else MODES[overlap])

    def reduce_scatter_product(self, x_MK: Tensor, w: Tensor, *, transposed: bool) -> Tensor:
        """x @ w (or x @ w.T), summed over the ranks; this rank's rows of it."""
        rows, (k, n) = shard_rows(x_MK.shape[0], self.world), _sizes(w, transposed)
        return self._run("gemm_reduce_scatter", tuple(rows), k, n, x_MK, w, transposed)["out"]

    def all_gather_product(self, x_rK: Tensor, w: Tensor, total: int, *, transposed: bool) -> tuple[Tensor, Tensor]:
        """(x of all ranks [M, K], its product with w); `total` is M."""
        rows, (k, n) = shard_rows(total, self.world), _sizes(w, transposed)
        if x_rK.shape[0] != rows[self.rank]:
            raise UserError(
                f"rank {self.rank} has {x_rK.shape[0]} of {total} rows", expected=f"{rows[self.rank]} (as torch.chunk)"
            )
        found = self._run("all_gather_gemm", tuple(rows), k, n, x_rK, w, transposed)
        return found["gathered"], found["out"]

    def _run(self, kind: str, rows: tuple, k: int, n: int, x: Tensor, w: Tensor, transposed: bool) -> dict[str, Tensor]:
        if x.dtype != w.dtype or x.shape[1] != k:
            raise UserError(
                f"a product of {tuple(x.shape)} {x.dtype} and {k} × {n} {w.dtype}", expected="sizes that fit"
            )
        dtype = str(x.dtype).removeprefix("torch.")
        key = f"{kind} {sum(rows)}×{k}×{n} {dtype}"
        arm = self.gate.choose(key)
        subchunks, overlap = list(ARMS.values())[arm]
        schedule = _schedule(kind, self.world, rows, k, n, dtype, subchunks, overlap, transposed)
        began_s = time.perf_counter()
        found = self._p2p.run(schedule, {"x": x.detach(), "w": w.detach()})
        self.gate.took(key, arm, time.perf_counter() - began_s)
        return found

    def explain(self) -> str:
        """What was chosen for each product, and why."""
        return self.gate.explain()

    def close(self) -> None:
        """Collective."""
        self._p2p.close()


def _sizes(w: Tensor, transposed: bool) -> tuple[int, int]:
    return (w.shape[1], w.shape[0]) if transposed else (w.shape[0], w.shape[1])


@functools.lru_cache(maxsize=1024)
def _schedule(
    kind: str, world: int, rows: tuple, k: int, n: int, dtype: str, subchunks: int, overlap: bool, transposed: bool
) -> Schedule:
    options: dict[str, Any] = {"subchunks": subchunks, "overlap": overlap, "transposed": transposed}
    if kind == "all_gather_gemm":
        return all_gather_gemm(world, rows, k, n, dtype, **options)
    sum_dtype = "float32" if dtype in ("bfloat16", "float16") else None
    return gemm_reduce_scatter(world, rows, k, n, dtype, sum_dtype=sum_dtype, **options)


class _ReduceScatterProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, w: Tensor, team: Team, transposed: bool) -> Tensor:
        ctx.save_for_backward(x_MK, w)
        ctx.how = team, transposed
        return team.reduce_scatter_product(x_MK, w, transposed=transposed)

    @staticmethod
    def backward(ctx: Any, dout_rN: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, w = ctx.saved_tensors
        team, transposed = ctx.how
        dout, dx = team.all_gather_product(dout_rN.contiguous(), w, x.shape[0], transposed=not transposed)
        dw = (dout.t() @ x if transposed else x.t() @ dout) if ctx.needs_input_grad[1] else None
        return dx, dw, None, None


class _AllGatherProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_rK: Tensor, w: Tensor, team: Team, total: int, transposed: bool) -> Tensor:
        gathered, out = team.all_gather_product(x_rK, w, total, transposed=transposed)
        ctx.save_for_backward(gathered, w)
        ctx.how = team, transposed
        return out

    @staticmethod
    def backward(ctx: Any, dout_MN: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        gathered, w = ctx.saved_tensors
        team, transposed = ctx.how
        dout = dout_MN.contiguous()
        dx = team.reduce_scatter_product(dout, w, transposed=not transposed)
        dw = (dout.t() @ gathered if transposed else gathered.t() @ dout) if ctx.needs_input_grad[1] else None
        return dx, dw, None, None, None


def matmul_reduce_scatter(x_MK: Tensor, w_KN: Tensor, team: Team, *, transposed: bool = False) -> Tensor:
    """sum over ranks of x @ w, this rank's rows of it: [M / W, N] (cut as torch.chunk does). Differentiable.

    x: [M, K], w: [K, N], or [N, K] with `transposed`, each rank's own. The gradient of x is that of this rank's shard
    of K; the output gradient is gathered once for both. All ranks call it alike.
    """
    return _ReduceScatterProduct.apply(x_MK, w_KN, team, transposed)


def all_gather_matmul(
    x_rK: Tensor, w_KN: Tensor, team: Team, *, total: int | None = None, transposed: bool = False
) -> Tensor:
    """(x of all ranks, one below the other) @ w: [M, N]. Differentiable; gathered rows are kept for the gradient of w.

    x: this rank's rows [M / W, K], w: [K, N], or [N, K] with `transposed`. `total`: M, when W does not divide it.
    """
    rows = x_rK.shape[0] * team.world if total is None else total
    return _AllGatherProduct.apply(x_rK, w_KN, team, rows, transposed)
