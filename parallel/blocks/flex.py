"""FlexAttention: torch's compiled kernel for any mask, one call where others take a call for each tile of the mask.

A mask is given as three rows of numbers: query i sees the keys whose number `at` lies in `low[i]` ≤ at < `high[i]`.
Every mask of this package is of that form (the number is the key's position), so packed documents, windows, prefixes
and zigzag or striped shards are all one kernel. Its blocks of 128 × 128 are sorted here, from the ends of each block,
into those that are seen whole, in part, and not at all; no matrix of scores or of booleans is made.

Its backward cannot be handed a merged output and log-sum-exp by torch's public interface. It need not be: with
w = exp(lse_block - lse), the gradients (w · dout, w · rowsum(dout · (out_block - out))) of the block's own out and
log-sum-exp give exactly the block's share of the merged result. So backward computes the block's forward again.

Compiling takes seconds (Dynamo, Inductor, Triton), so there is one program for all blocks of a kind: numbers of rows,
of keys and of blocks of the mask are symbols from the first call on, the mask's rows of numbers are tensors that the
program is called with, and a side that fits one block of the mask is filled up to two, because a dimension of 1 would
be another program. A kind is dtype, batch, heads, head dims, scale, layout in memory, and whether gradients are wanted;
`report` says what was compiled and how long it took.

The kernel exists on CUDA. torch runs the same interface on a CPU, without a kernel, and refuses gradients there, so on
a CPU this backend is refused (the tests lift torch's refusal and compare its numbers).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex

from ...dist.log import get_logger
from ..merge import lse_dtype

log = get_logger(__name__)

NAME = "flex"
BLOCK = 128
FEWEST = 2 * BLOCK  # rows of queries and of keys in a call; fewer are filled up with rows that see nothing
WIDTHS = (16, 32, 64, 128, 256)  # of heads; others are filled up with zeros, which change no score
KINDS = 64  # of calls that may be compiled; beyond torch's 8 it would run without a kernel
HIDDEN = torch.iinfo(torch.int32).max  # the number of a key that nobody sees
Seen = tuple[Tensor, Tensor, Tensor]  # low [Lq], high [Lq], at [Lk], int32 on the device


def supports(q_BHLD: Tensor, k_BGLD: Tensor, v_BGLE: Tensor, *, causal: bool, window: int | None) -> bool:
    return (
        q_BHLD.is_cuda
        and q_BHLD.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and max(q_BHLD.shape[3], v_BGLE.shape[3]) <= WIDTHS[-1]
        and torch.cuda.get_device_capability(q_BHLD.device) >= (8, 0)
        and not torch.are_deterministic_algorithms_enabled()
    )


def band(lq: int, lk: int, causal: bool, window: int | None, device: torch.device) -> Seen:
    """The mask of the contract in `types`: the last query at the last key."""
    position = torch.arange(lk - lq, lk, dtype=torch.int32, device=device)
    nothing, everything = torch.zeros_like(position), torch.full_like(position, lk)
    low = nothing if window is None else (position - window + 1).clamp_min(0)
    return low, position + 1 if causal else everything, torch.arange(lk, dtype=torch.int32, device=device)


def blocks(seen: Seen) -> tuple[Tensor, Tensor]:
    """(some, all) [query blocks, key blocks] bool: of each block, some pair may be seen; all pairs are.

    Where ends alone cannot tell, it is 'some'; a block that rows or keys do not fill is never 'all'.
    """
    low, high, at = seen
    (lowest, low_most), (high_least, highest), (first, last) = map(_ends, (low, high, at))
    some = (lowest[:, None] <= last) & (highest[:, None] > first)
    whole = (low_most[:, None] <= first) & (high_least[:, None] > last)
    filled = [torch.arange(1, -(-x.numel() // BLOCK) + 1, device=x.device) * BLOCK <= x.numel() for x in (low, at)]
    return some, whole & filled[0][:, None] & filled[1]


def _ends(x: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest entry of each block; the last one is filled up with its last entry."""
    missing = -x.numel() % BLOCK
    rows = torch.cat([x, x[-1:].expand(missing)]).view(-1, BLOCK)
    return rows.amin(1), rows.amax(1)


@dataclass(frozen=True)
class Plan:
    """A mask, alike for all heads and rows of a batch, in the tensors that the compiled program takes.

    `seen` has at least `FEWEST` rows and keys. `lists`: what `_listed` gives of the blocks that are seen in part, of
    those that are seen whole, and of both once more with rows and columns exchanged. `ready`: when the device has them.
    """

    seen: Seen
    lists: tuple[Tensor, ...]
    ready: torch.cuda.Event | None


def plan(seen: Seen) -> Plan:
    low, high, at = seen
    some, whole = (F.pad(x, (0, at.numel() <= BLOCK, 0, low.numel() <= BLOCK)) for x in blocks(seen))
    low, high = (F.pad(x, (0, max(0, FEWEST - x.numel()))) for x in (low, high))
    at = F.pad(at, (0, max(0, FEWEST - at.numel())), value=HIDDEN)
    lists = [_listed(x) for x in (some & ~whole, whole, (some & ~whole).mT, whole.mT)]
    made = Plan((low, high, at), tuple(x for pair in lists for x in pair), _now(at.device))
    for x in made.seen:
        torch._dynamo.maybe_mark_dynamic(x, 0)
    for x in made.lists:
        torch._dynamo.maybe_mark_dynamic(x, list(range(2, x.dim())))
    return made


def _now(device: torch.device) -> torch.cuda.Event | None:
    event = torch.cuda.Event() if device.type == "cuda" else None
    if event is not None:
        event.record(torch.cuda.current_stream(device))
    return event


@lru_cache(maxsize=256)
def _band_plan(lq: int, lk: int, causal: bool, window: int | None, device: torch.device) -> Plan:
    return plan(band(lq, lk, causal, window, device))


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of each row are chosen, and which, these first: [1, 1, rows] and [1, 1, rows, columns] int32."""
    order = torch.argsort(chosen.to(torch.int8), dim=1, descending=True, stable=True)
    return chosen.sum(1).to(torch.int32)[None, None], order.to(torch.int32)[None, None].contiguous()


def _program(q: Tensor, k: Tensor, v: Tensor, seen: Seen, lists: Sequence[Tensor], scale: float) -> Any:
    """What is compiled. It makes torch's `BlockMask` itself, so only tensors tell one mask from another."""
    low, high, at = seen

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (at[key] >= low[query]) & (at[key] < high[query])

    mask = torch_flex.BlockMask(
        (q.shape[2], k.shape[2]), *lists, BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=visible,
    )  # fmt: skip
    return torch_flex.flex_attention(
        q, k, v, block_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1],
        return_aux=torch_flex.AuxRequest(lse=True),
    )  # fmt: skip


class Programs:
    """The compiled program, and how many variants of it there are. `backend`: torch.compile's, or its name."""

    def __init__(self, backend: Any = "inductor") -> None:
        from torch._dynamo.backends.registry import lookup_backend  # a second to import

        self.backend = lookup_backend(backend) if isinstance(backend, str) else backend
        self.count, self.seconds = 0, 0.0
        self.lines: list[str] = []
        self.call = torch.compile(_program, fullgraph=True, backend=self._compile)

    def _compile(self, graph: Any, inputs: Any) -> Any:
        self.count += 1
        return self.backend(graph, inputs)

    def timed(self, work: Callable[[], Any], label: str) -> Any:
        """`work()`; if it compiled, with a line for `report`."""
        count, began_s = self.count, time.perf_counter()
        result = work()
        if self.count > count:
            took_s = time.perf_counter() - began_s
            self.seconds += took_s
            self.lines.append(f"flex: compiled in {took_s:.1f} s for {label}")
            log.info("%s", self.lines[-1])
        return result


@cache
def programs() -> Programs:
    """Of this process."""
    return Programs()


def report() -> list[str]:
    """What has been compiled in this process: a line for each program, and the sum."""
    mine = programs()
    total = f"flex: {mine.count} programs compiled in this process, {mine.seconds:.1f} s"
    return [*mine.lines, total] if mine.count else []


def _attention(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> tuple[Tensor, Tensor]:
    """out and log-sum-exp of what `_ready` gives, whose rows and columns beyond the block's mean nothing."""
    if plan.ready is not None:
        plan.ready.wait(torch.cuda.current_stream(q.device))
    for x in (q, k, v):
        torch._dynamo.maybe_mark_dynamic(x, 2)
    with torch._dynamo.config.patch(recompile_limit=KINDS):
        out, aux = programs().call(q, k, v, plan.seen, plan.lists, scale)
    return out, aux.lse.to(lse_dtype(q.dtype))


def _ready(x_BHLD: Tensor) -> Tensor:
    """As a program takes it: filled; with one stride for a batch of one, of which shards and slices have each their
    own; and of no view, for whose base it would ask too."""
    with torch.no_grad():
        wide = _filled(x_BHLD)
        return (wide[0][None] if wide.shape[0] == 1 else wide).data


def _filled(x_BHLD: Tensor) -> Tensor:
    """With zeros up to a head dim of `WIDTHS` and `FEWEST` rows, and rows first in memory if it is filled."""
    length, width = x_BHLD.shape[2:]
    missing = max(0, FEWEST - length), next(w for w in WIDTHS if w >= width) - width
    if not any(missing):
        return x_BHLD
    return F.pad(x_BHLD.permute(2, 0, 1, 3), (0, missing[1], 0, 0, 0, 0, 0, missing[0])).permute(1, 2, 0, 3)


def _apart(work: Callable[[], Any], q_BHLD: Tensor, k_BGLD: Tensor, phase: str) -> Any:
    """Run `work` on a thread of its own, on this thread's stream, and wait for it (not for the device).

    A custom operator's body runs below autograd, which is a state of the thread: nothing has gradients there. All
    gradients of `work` are computed on its thread, also those that compiling asks for, of traced programs: torch's
    thread for the device may be the one that waits for this.
    """
    device = q_BHLD.device
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    found: list[Any] = []
    label = f"{phase}, {q_BHLD.dtype}, {q_BHLD.shape[1]}:{k_BGLD.shape[1]} heads of {q_BHLD.shape[3]}"

    def run() -> None:
        try:
            with torch.cuda.stream(stream), torch.autograd.set_multithreading_enabled(False):
                found.extend((programs().timed(work, label), None))
        except BaseException as error:  # handed to the caller
            found.extend((None, error))

    thread = threading.Thread(target=run, name="undertow-flex")
    thread.start()
    thread.join()
    result, error = found
    if error is not None:
        raise error
    return result


def forward_planned(
    q_BHLD: Tensor, k_BGLD: Tensor, v_BGLE: Tensor, plan: Plan, *, scale: float
) -> tuple[Tensor, Tensor]:
    """out [B, H, Lq, E] and lse [B, H, Lq] under the mask of `plan`; rows that see nothing are (0, -inf)."""

    def work() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            out, lse = _attention(_ready(q_BHLD), _ready(k_BGLD), _ready(v_BGLE), plan, scale)
        return out[:, :, : q_BHLD.shape[2], : v_BGLE.shape[3]], lse[:, :, : q_BHLD.shape[2]]

    return _apart(work, q_BHLD, k_BGLD, "forward")


def backward_planned(
    dout_BHLE: Tensor,
    q_BHLD: Tensor,
    k_BGLD: Tensor,
    v_BGLE: Tensor,
    out_BHLE: Tensor,
    lse_BHL: Tensor,
    plan: Plan,
    *,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of the block for the merged `out` and `lse`."""
    given = q_BHLD, k_BGLD, v_BGLE

    def work() -> tuple[Tensor, ...]:
        with torch.enable_grad():
            q, k, v = leaves = [_ready(x).requires_grad_() for x in given]
            own, own_lse = _attention(q, k, v, plan, scale)
            own, own_lse = own[:, :, : q_BHLD.shape[2], : v_BGLE.shape[3]], own_lse[:, :, : q_BHLD.shape[2]]
        with torch.no_grad():
            empty = torch.isneginf(own_lse) | torch.isneginf(lse_BHL)
            share = torch.exp(own_lse - lse_BHL).masked_fill(empty, 0)
            wide = dout_BHLE.to(own_lse.dtype)
            dlse = share * (wide * (own.to(wide.dtype) - out_BHLE.to(wide.dtype))).sum(-1)
            down = (wide * share.unsqueeze(-1)).to(own.dtype)
        wide = torch.autograd.grad((own, own_lse), leaves, (down, dlse.masked_fill(empty, 0)))
        return tuple(x[:, :, : like.shape[2], : like.shape[3]] for x, like in zip(wide, given))

    dq, dk, dv = _apart(work, q_BHLD, k_BGLD, "backward")
    return dq, dk, dv


def forward(
    q_BHLD: Tensor, k_BGLD: Tensor, v_BGLE: Tensor, *, scale: float, causal: bool, window: int | None = None
) -> tuple[Tensor, Tensor]:
    mine = _band_plan(q_BHLD.shape[2], k_BGLD.shape[2], causal, window, q_BHLD.device)
    return forward_planned(q_BHLD, k_BGLD, v_BGLE, mine, scale=scale)


def backward(
    dout_BHLE: Tensor,
    q_BHLD: Tensor,
    k_BGLD: Tensor,
    v_BGLE: Tensor,
    out_BHLE: Tensor,
    lse_BHL: Tensor,
    *,
    scale: float,
    causal: bool,
    window: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    mine = _band_plan(q_BHLD.shape[2], k_BGLD.shape[2], causal, window, q_BHLD.device)
    return backward_planned(dout_BHLE, q_BHLD, k_BGLD, v_BGLE, out_BHLE, lse_BHL, mine, scale=scale)
