"""The ranks that multiply together: one engine and one gate for a process group, and how a product is run on them.

A `Team` owns threads and a communicator, so a group keeps one (`overlap_teams`).

Shapes: M rows over all ranks, K and N this rank's inner and outer dimensions, W ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..comms.link import LinkModel
from ..comms.overlap_cuda import CudaOverlapEngine
from ..comms.overlap_engine import OverlapEngine
from ..dist.errors import UserError
from ..dist.launch_env import detect
from ..dist.log import get_logger
from ..dist.machine import Machine
from ..dist.trace import Trace
from .kernels.ordered_sum import ordered_sum
from .kernels.tracked_matmul import unusable
from .overlap_arms import ARMS, CUDA_ARMS, ROW_ARMS, Arm, cut, in_columns
from .overlap_gate import AGAIN_S, SHORT_S, Gate, Rates
from .overlap_queueing import Queueing, measure
from .overlap_transport import gpu_messenger, may_replay
from .overlap_ways import GATHER, SCATTER, SUM, Guesses, Lasting, Way, Ways, keys_of

log = get_logger(__name__)
MODES = {"auto": None, "off": 0, "on": len(ROW_ARMS)}


class Team:
    """The ranks of `group` (None: all) that multiply together. Create, use and `close` on every rank alike.

    `overlap`: 'auto' measures each product's arms and keeps the fastest (see `overlap_gate`), 'on' takes the finest
    pieces of rows, 'off' none, and the name of one of `overlap_arms.CUDA_ARMS` that one (of rows where it wants columns
    in an all-gather, or in an all-reduce on CPU); UNDERTOW_DISABLE=1 is 'off'. All but 'auto' repeat every bit from run
    to run. `device`: CPU (gloo) or CUDA. `transport` between GPUs: 'symmetric' (copy engines into the peers' mapped
    memory, as much as the largest product, on one host), 'nccl', or 'auto': the first where all ranks can.
    UNDERTOW_OVERLAP_TRANSPORT stands in for 'auto'. UNDERTOW_OVERLAP_REPLAY=0: no call is recorded to be replayed.
    `machine`: the measured rates for the gate's model, of the default file if there is one; rank 0's counts. `link`
    emulates a slow link on gloo, `trace` records what ran when.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        *,
        overlap: str = "auto",
        device: torch.device | str = "cpu",
        timeout_s: float = 300.0,
        transport: str = "auto",
        machine: Machine | None = None,
        link: LinkModel | None = None,
        trace: Trace | None = None,
    ) -> None:
        self.group: dist.ProcessGroup = group or dist.group.WORLD  # type: ignore[assignment]
        self.device = torch.device(device)
        arms = ARMS if self.device.type == "cpu" else CUDA_ARMS
        modes = MODES | {arm.name: at for at, arm in enumerate(arms)}
        if overlap not in modes:
            raise UserError(f"overlap={overlap!r}", expected=f"one of {'; '.join(modes)}")
        if self.device.type == "cpu":
            self.engine = OverlapEngine(group, timeout_s=timeout_s, link=link, trace=trace)
        elif link is None:
            messenger = gpu_messenger(group, self.device, timeout_s, transport)
            self.engine = CudaOverlapEngine(
                group, device=self.device, timeout_s=timeout_s, messenger=messenger, add=ordered_sum
            )
        else:
            raise UserError("an emulated link around NCCL", expected="device='cpu': the emulation holds host threads")
        self.rank, self.world, self.link = self.engine.rank, self.engine.world, link
        if isinstance(self.engine, CudaOverlapEngine):  # pieces must be alike on all ranks
            self.engine.processors = int(min(self._gather(torch.tensor(self.engine.processors))))
        self.machine = self._agreed(machine)
        fixed, why = modes[overlap], "as asked for"
        if self.world == 1:
            fixed, why = 0, "one rank"
        elif detect().disabled:
            fixed, why = 0, "UNDERTOW_DISABLE"
        self._in_columns = (SCATTER,) if self.device.type == "cpu" else (SCATTER, SUM)
        self._recorder = self.engine.recorder if isinstance(self.engine, CudaOverlapEngine) else None
        if self._recorder is not None and not may_replay():
            self._recorder.replays.stop("UNDERTOW_OVERLAP_REPLAY=0")
        self._records = self._recorder is not None and not self._recorder.able()  # alike on all ranks, so asked once
        more = {"short_s": SHORT_S, "again_s": AGAIN_S} if self.device.type == "cuda" else {}
        self.gate, self._chooses = Gate(arms, self._gather, fixed=fixed, why=why, **more), fixed is None
        self._making = Ways(self.engine, self.group, self._recorder)
        self.ways: dict[Hashable, Way] = {}  # of products that have settled, by `keys_of`
        self._lasting: dict[str, set[Hashable]] = {}  # what products whose choice will be checked are found by
        self._guesses = Guesses()
        self.firsts = self._guesses.plain  # how many numbers a first matrix has, the product of which needs no look-up
        self._captured = set[str]()  # products that were met there
        self._mesh: DeviceMesh | None = None
        self._queueing: Queueing | None = None

    @property
    def mesh(self) -> DeviceMesh:
        """A mesh of this group alone, for weights that come without one."""
        if self._mesh is None:
            self._mesh = DeviceMesh.from_group(self.group, self.device.type)
        return self._mesh

    def reduce_scatter(self, a_MK: Tensor, b_KN: Tensor, sizes: tuple[int, ...]) -> Tensor:
        """This rank's rows of the sum of all a @ b; `sizes`: rows of each rank."""
        y_MN = a_MK @ b_KN if a_MK.numel() in self.firsts else None
        case = SCATTER, a_MK.shape, b_KN.shape, sizes, a_MK.dtype
        way = self.ways.get(case)
        if way is None:
            return self._scattered(case, a_MK, b_KN, b_KN.shape[1], sizes)
        return way(a_MK, b_KN) if y_MN is None else way(a_MK, b_KN, y_MN)

    def all_reduce(self, a_MK: Tensor, b_KN: Tensor, sizes: tuple[int, ...]) -> Tensor:
        """The sum of all a @ b, the same bits on all ranks; `sizes`: rows that each rank adds up."""
        y_MN = a_MK @ b_KN if a_MK.numel() in self.firsts else None
        case = SUM, a_MK.shape, b_KN.shape, sizes, a_MK.dtype
        way = self.ways.get(case)
        if way is None:
            return self._scattered(case, a_MK, b_KN, 2 * b_KN.shape[1], sizes)
        return way(a_MK, b_KN) if y_MN is None else way(a_MK, b_KN, y_MN)

    def all_gather(self, a_rK: Tensor, bs: Sequence[Tensor], sizes: tuple[int, ...]) -> tuple[Tensor, list[Tensor]]:
        """(all ranks' rows of a [M, K], its product with each b); `sizes`: rows of each rank."""
        case = GATHER, a_rK.shape, *[b.shape for b in bs], sizes, a_rK.dtype
        if (way := self.ways.get(case)) is not None:
            return way(a_rK, bs)
        if a_rK.shape[0] != sizes[self.rank]:
            raise UserError(
                f"rank {self.rank} has {a_rK.shape[0]} of {sum(sizes)} rows",
                expected=f"{sizes[self.rank]} (cut as torch.chunk does)",
            )
        k, n = a_rK.shape[1], sum(b.shape[1] for b in bs)
        able = {arm: not arm.tracked and not arm.columns and not arm.replayed for arm in self.gate.arms}
        return self._run(case, (a_rK, bs), k, n, k, sizes, able.__getitem__)

    def _scattered(self, case: tuple, a: Tensor, b: Tensor, row_numbers: int, sizes: tuple[int, ...]) -> Tensor:
        kind, n = case[0], b.shape[1]

        def can(arm: Arm) -> bool:
            if arm.replayed and (kind != SCATTER or not self._records):
                return False
            if arm.columns:
                gpu, size = self.device.type == "cuda", b.element_size()
                fit = in_columns(arm, sizes, a.shape[1], n, size, gpu=gpu, summed=kind == SUM)
                return kind in self._in_columns and fit
            return not arm.tracked or not unusable(a, b)

        return self._run(case, (a, b), a.shape[1], n, row_numbers, sizes, can)

    def _run(
        self, case: tuple, operands: tuple[Tensor, Any], k: int, n: int, row_numbers: int, sizes: tuple[int, ...],
        can: Callable[[Arm], bool],
    ) -> Any:  # fmt: skip
        """`case`: what the choice is kept for, its kind first, its dtype last. `row_numbers`: how many numbers of each
        row travel. `can`: whether an arm can run it."""
        if len(sizes) != self.world:
            raise UserError(f"rows for {len(sizes)} ranks", expected=f"one number for each of {self.world}")
        kind, dtype = case[0], case[-1]
        name = str(dtype).removeprefix("torch.")
        key = f"{kind} M={sum(sizes)} N={n} K={k} {name}"
        capturing = self._capturing()
        rates = None if capturing else self._rates(name)
        nbytes = sum(sizes) * row_numbers * dtype.itemsize * (self.world - 1) / self.world
        flops = 2.0 * sum(sizes) * n * k

        def predict(arm: Arm) -> float:
            assert rates is not None
            reads = 0 if arm.tracked or not arm.overlap else cut(arm, self.world // 2, sizes, n).reads(k, n)
            return rates.seconds(arm, self.world, flops, nbytes, reads * dtype.itemsize)

        if capturing:  # the caller's graph, in which nothing can be measured or agreed on
            chosen = self.gate.standing(key)
        else:
            chosen = self.gate.choose(key, None if rates is None else predict, can)
        arm: Arm = self.gate.arms[chosen]
        columns = n if arm.columns and kind in self._in_columns else 0
        plan = self.engine.plan(sizes, arm.subchunks, columns, whole=arm.whole and columns > 0)
        way = self._making.of(kind, plan, arm, dtype)
        if capturing:
            if key not in self._captured:
                self._captured.add(key)
                log.info("overlap: %s: %s in a CUDA graph that is captured, not measured there", key, arm.name)
            return way(*operands)
        if kind != GATHER:
            plain = None if self.gate.measuring(key) else self._making.plain(plan, arm, dtype)
            self._guesses.settle(case, operands[0].numel(), plain)
        if not self.gate.measuring(key):
            keys = keys_of(case, *operands)
            if (calls := self.gate.lasts(key)) is not None:
                way = Lasting(way, calls, partial(self._check, key), self._capturing)
                self._lasting.setdefault(key, set()).update(keys)
            self.ways |= dict.fromkeys(keys, way)
            if kind == SCATTER:
                self._making.settle(self.gate.arms, arm, sizes, n, dtype)
            if self._chooses:  # a fall-back must not be silent
                log.info("overlap: %s", self.gate.explain(key))
            return way(*operands)
        if kind == SCATTER and not self.gate.again(key):  # then as later calls are: what prepares one warms the host
            self._making.prepare(plan, arm, *operands)
        began_s = self._start()
        found = way(*operands)
        taken_s, row, each_s = self._now() - began_s, self.gate.row(key), 0.0
        if row:
            began_s = self._start()
            for _ in range(row):
                way(*operands)
            each_s = (self._now() - began_s) / row
        self.gate.took(key, chosen, taken_s, each_s)
        return found

    def _capturing(self) -> bool:
        return isinstance(self.engine, CudaOverlapEngine) and self.engine.capturing()

    def _check(self, key: str) -> None:
        """The next call of this product, by whichever of its cases, begins a check of its choice."""
        for found_by in self._lasting.pop(key, ()):
            self.ways.pop(found_by, None)
        self.gate.check(key)

    def _start(self) -> float:
        """When all ranks begin a measured call: else it would wait for what made another rank late before, and an arm
        would pay for the one that came before it."""
        dist.all_reduce(torch.zeros((), device=self.device), group=self.group)
        return self._now()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # only while a product is being measured
        return time.perf_counter()

    def _rates(self, dtype: str) -> Rates | None:
        if self.machine is None:
            return None
        rates = Rates.of(self.machine, dtype, self.device.type)
        if rates is not None and self._chooses and self._recorder is not None:
            rates = replace(rates, queueing=self.queueing())
        if rates is None or self.link is None:
            return rates
        return Rates(rates.flops, self.link.bytes_per_s, rates.latency_s + self.link.latency_s)

    def queueing(self) -> Queueing:
        """What pieces cost the slowest rank's host, of a GPU; measured when it is first asked for. Collective."""
        if self._queueing is None and isinstance(self.engine, CudaOverlapEngine):
            mine = measure(self.engine, self._start)
            all_s = self._gather(torch.tensor([mine.call_s, mine.piece_s], dtype=torch.float64))
            self._queueing = Queueing(*torch.stack(all_s).max(0).values.tolist())
        return self._queueing or Queueing()

    def _agreed(self, machine: Machine | None) -> Machine | None:
        """Rank 0's machine on all ranks, so that all choose alike."""
        if machine is None and self.rank == 0 and Machine.default_path().exists():
            try:
                machine = Machine.load(Machine.default_path())
            except UserError as error:  # the other ranks wait for this one
                log.warning("overlap is chosen without a model of the machine: %s", error)
        found = [machine]
        dist.broadcast_object_list(found, group_src=0, group=self.group)
        return found[0]

    def _gather(self, mine: Tensor) -> list[Tensor]:
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, mine, group=self.group)
        return found

    def explain(self) -> str:
        """What was chosen for each product, and why; how many calls were replays."""
        replays = "" if self._recorder is None else self._recorder.replays.explain()
        return "\n".join(filter(None, (self.gate.explain(), replays)))

    def close(self) -> None:
        """Collective."""
        self.ways.clear()  # they would go on with what is closed
        self.firsts.clear()
        self.engine.close()
