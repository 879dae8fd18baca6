"""A reduce-scatter recorded once as a CUDA graph, and replayed when the same call comes again.

To queue a piece takes the host some 60 µs, so where the GPU takes less, or has nothing else to do when the call begins,
it waits for the host; a whole graph is queued in the time of one piece. The graph holds the very calls that the engine
queues (products, events as edges, copies, sums), so a replay gives the same bits. What it depends on is its key: plan,
operands' addresses and strides, torch's settings for products, and the messenger's own memory. The product and the
landings lie in a memory pool that all recordings of an engine share, as they run one after the other; what a caller
gets is a copy of the rows that the rank keeps. Nothing is recorded while somebody else captures a graph, which then
gets the calls themselves.

Work is captured on streams that nobody else has: torch hands the streams of its pool out again, and with them cuBLAS's
workspace, which a graph goes on using. Products follow each other on one stream. On two, pieces take processors from
each other and leave late; a graph's nodes follow each other closely enough without. Streams of falling priority were
slower too.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakValueDictionary

import torch

from ..dist.collector import no_collection
from ..dist.errors import UndertowError
from ..dist.log import get_logger
from . import cuda_driver
from .chunk_plan import ChunkPlan
from .cuda_replays import Replays

if TYPE_CHECKING:
    from .overlap_cuda import CudaOverlapEngine

log = get_logger(__name__)
Case = tuple[ChunkPlan, int, torch.dtype]  # the product's columns
Queue = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]  # a call into (the product, the result or None)


class Recording(NamedTuple):
    """What replays a call on a stream (its handle), and what it needs: the graph, whose pool has the product, and the
    memory of the result, which recordings of the same shape share."""

    replay: Callable[[int], None]
    graph: Any
    out: torch.Tensor


class Recorder:
    """Of one engine. `record(queue)`: capture what it queues; (what replays that on a stream, what must live as long).
    Replaced in tests."""

    def __init__(
        self,
        engine: CudaOverlapEngine,
        *,
        record: Callable[[Callable[[], Any]], tuple[Callable[[int], None], Any]] | None = None,
    ) -> None:
        self.engine, self.replays = engine, Replays[Recording]()
        self._record = record or self._capture
        self.recording = False  # a capture is this one's own
        self._outs: WeakValueDictionary[Hashable, torch.Tensor] = WeakValueDictionary()
        self._streams: list[Any] = []  # of a capture: its own, then that of the products
        self._pool: Any = None
        self._done: Any = None  # the last replay, whose memory the next one uses
        self._last: int | None = None  # the handle of the stream that it was on

    def able(self) -> str:
        """Why calls cannot be recorded; '' when they can."""
        if self.replays.off:
            return self.replays.off
        return "" if self.engine.messenger.memory() is not None else "its messages cannot be recorded"

    def run(self, plan: ChunkPlan, operands: Sequence[torch.Tensor], columns: int, queue: Queue) -> torch.Tensor:
        """This rank's rows of the sum, [own rows, columns]: by a replay, or by `queue(y, None)`, which must make the
        product of `operands` and of nothing else. Collective, but ranks need not agree which of them replay."""
        case = plan, columns, operands[0].dtype
        if not self.able() and self.replays.looks(case) and not self.engine.capturing():
            key, addresses = self._key(case, operands)
            found = self.replays.find(key)
            if found is None and self._wanted(case, key, self.replays.see(addresses)):
                found = self._new(plan, case, key, operands[0], queue)
            if found is not None:
                return self._replay(found)
        out = queue(operands[0].new_empty(plan.rows, columns), None)
        self.replays.case(case).ready = True
        return out

    def see(self, operands: Sequence[torch.Tensor]) -> None:
        """Remember where they lie, for a call that is made in another way."""
        self.replays.see(tuple(map(_place, operands)))

    def prepare(self, plan: ChunkPlan, operands: Sequence[torch.Tensor], columns: int, queue: Queue) -> None:
        """Record now what `run` would record at this call. Nothing is sent."""
        case = plan, columns, operands[0].dtype
        if self.able() or self.engine.capturing():
            return
        key, addresses = self._key(case, operands)
        if self._wanted(case, key, self.replays.see(addresses)):
            self._new(plan, case, key, operands[0], queue)

    def drop(self, plan: ChunkPlan, columns: int, dtype: torch.dtype) -> None:
        """The recordings of calls that will be made in another way."""
        self.replays.drop((plan, columns, dtype))

    def close(self) -> None:
        """Drop all recordings."""
        self.replays.stop("closed")
        if self._streams:
            if self._done is not None:
                self._done.synchronize()
            _spare[self.engine.device].append(self._streams)  # cuBLAS keeps a workspace for each of them
        self._streams, self._pool = [], None

    def _key(self, case: Hashable, operands: Sequence[torch.Tensor]) -> tuple[Hashable, Hashable]:
        addresses = tuple(map(_place, operands))
        return (case, self.engine.messenger.memory(), settings(), addresses), addresses

    def _wanted(self, case: Case, key: Hashable, seen: bool) -> bool:
        return self.replays.wants(case, key, seen, _nbytes(*case), _shared(*case))

    def _new(self, plan: ChunkPlan, case: Case, key: Hashable, like: torch.Tensor, queue: Queue) -> Recording | None:
        """None where it failed; nothing is recorded any more then."""
        out = self._outs.get(_shared(*case))
        if out is None:
            out = self._outs[_shared(*case)] = like.new_empty(plan.own[1] - plan.own[0], case[1])
        try:
            replay, graph = self._record(lambda: queue(like.new_empty(plan.rows, case[1]), out))
        except (RuntimeError, TypeError, UndertowError) as error:  # by type: torch before 2.8, which keeps no graph
            log.warning("overlapped products are queued piece by piece, because recording failed: %s", error)
            self.replays.stop(f"recording failed ({str(error).splitlines()[0]})")
            return None
        found = Recording(replay, graph, out)
        self.replays.keep(case, key, found, _nbytes(*case), _shared(*case))
        return found

    def _replay(self, found: Recording) -> torch.Tensor:
        handle = _current(self.engine.device)
        if self._last not in (None, handle):
            self._done.wait(torch.cuda.current_stream(self.engine.device))
        self._last = handle
        found.replay(handle)  # the GPU may have waited for this
        out, current = found.out.clone(), torch.cuda.current_stream(self.engine.device)
        self._done = self._done or torch.cuda.Event()
        self._done.record(current)
        self.engine.watched(current)
        return out

    def _capture(self, queue: Callable[[], Any]) -> tuple[Callable[[int], None], Any]:
        """By a CUDA graph. Nothing runs."""
        engine, device = self.engine, self.engine.device
        if not self._streams:
            spare = _spare.setdefault(device, [])
            self._streams = spare.pop() if spare else [cuda_driver.new_stream(device) for _ in range(2)]
        if not len(self.replays):  # torch refuses a pool whose graphs have all gone
            self._pool = torch.cuda.graph_pool_handle()
        graph, current = torch.cuda.CUDAGraph(keep_graph=True), torch.cuda.current_stream(device)
        products, engine.streams, self.recording = engine.streams, self._streams[1:], True
        end = engine.messenger.recording()
        try:
            with no_collection():  # what one would free meanwhile may ask the device, which a capture forbids
                torch.cuda.set_stream(self._streams[0])
                _captured(graph, queue, self._pool)
            handle = graph.raw_cuda_graph()
            instance = cuda_driver.Launchable(handle)
            before = end((handle, instance.handle))
        except BaseException:
            end(None)
            raise
        finally:
            torch.cuda.set_stream(current)
            engine.streams, self.recording = products, False

        def replay(stream: int) -> None:
            before()
            instance.launch(stream)

        return replay, graph


_spare: dict[torch.device, list[list[Any]]] = {}  # streams of recorders that are closed


def _captured(graph: Any, queue: Callable[[], Any], pool: Any) -> None:
    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
    try:
        queue()
    except BaseException:
        with suppress(RuntimeError):  # the capture is broken already, and says so again
            graph.capture_end()
        raise
    graph.capture_end()


def _current(device: torch.device) -> int:
    """The handle of the current stream; torch takes ten times as long for its object."""
    return torch._C._cuda_getCurrentRawStream(torch.cuda.current_device() if device.index is None else device.index)


def settings() -> Hashable:
    """Of torch, what a product's kernel and rounding depend on beside its operands."""
    c = torch._C  # `torch.backends.cuda` takes up to thirty times as long for the same
    return (
        c._get_float32_matmul_precision(),
        c._get_cublas_allow_bf16_reduced_precision_reduction(),
        c._get_cublas_allow_fp16_reduced_precision_reduction(),
        c._get_blas_preferred_backend(),
        torch.are_deterministic_algorithms_enabled(),
    )


def _place(operand: torch.Tensor) -> Hashable:
    return operand.data_ptr(), operand.shape, operand.stride(), operand.dtype


def _nbytes(plan: ChunkPlan, columns: int, dtype: torch.dtype) -> int:
    """Of the product, the landings and the result."""
    own = plan.own[1] - plan.own[0]
    return (plan.rows + plan.world * own) * columns * dtype.itemsize


def _shared(plan: ChunkPlan, columns: int, dtype: torch.dtype) -> Hashable:
    """Plans of the same product share its memory."""
    return plan.sizes, columns, dtype
