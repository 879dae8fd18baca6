"""FlexAttention: torch's compiled kernel for any mask, one call where others take a call for each tile of the mask.

A mask is given as three rows of numbers: query i sees the keys whose number `at` lies in `low[i]` ≤ at < `high[i]`.
Every mask of this package is of that form (the number is the key's position), so packed documents, windows, prefixes
and zigzag or striped shards are all one kernel. Its blocks of 128 × 128 are sorted here, from the ends of each block,
into those that are seen whole, in part, and not at all; no matrix of scores or of booleans is made.

Its backward cannot be handed a merged output and log-sum-exp by torch's public interface. It need not be: with
w = exp(lse_block - lse), the gradients (w · dout, w · rowsum(dout · (out_block - out))) of the block's own out and
log-sum-exp give exactly the block's share of the merged result. So backward computes the block's forward again.

The kernel exists on CUDA. torch runs the same interface on a CPU, without a kernel, and refuses gradients there, so on
a CPU this backend is refused (the tests lift torch's refusal and compare its numbers). Compiling takes seconds for each
kind of call, and lengths become symbols with the second one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex

from ..merge import lse_dtype

NAME = "flex"
BLOCK = 128
WIDTHS = (16, 32, 64, 128, 256)  # of heads; others are filled up with zeros, which change no score
KINDS = 64  # of calls that may be compiled; beyond torch's 8 it would run without a kernel
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
    """A mask in torch's form, alike for all heads and rows of a batch. `ready`: when the device has made it."""

    mask: torch_flex.BlockMask
    ready: torch.cuda.Event | None


def plan(seen: Seen) -> Plan:
    low, high, at = seen

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (at[key] >= low[query]) & (at[key] < high[query])

    some, whole = blocks(seen)
    mask = torch_flex.BlockMask.from_kv_blocks(
        *_listed(some & ~whole), *_listed(whole), BLOCK_SIZE=BLOCK, mask_mod=visible,
        seq_lengths=(low.numel(), at.numel()),
    )  # fmt: skip
    ready = torch.cuda.Event() if at.is_cuda else None
    if ready is not None:
        ready.record(torch.cuda.current_stream(at.device))
    return Plan(mask, ready)


@lru_cache(maxsize=256)
def _band_plan(lq: int, lk: int, causal: bool, window: int | None, device: torch.device) -> Plan:
    return plan(band(lq, lk, causal, window, device))


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of each row are chosen, and which, these first: [1, 1, rows] and [1, 1, rows, columns] int32."""
    order = torch.argsort(chosen.to(torch.int8), dim=1, descending=True, stable=True)
    return chosen.sum(1).to(torch.int32)[None, None], order.to(torch.int32)[None, None].contiguous()


@cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(torch_flex.flex_attention, fullgraph=True)


def _attention(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> tuple[Tensor, Tensor]:
    if plan.ready is not None:
        plan.ready.wait(torch.cuda.current_stream(q.device))
    call: Callable[..., Any] = _compiled() if q.is_cuda else torch_flex.flex_attention
    wide = [_filled(x) for x in (q, k, v)]
    with torch._dynamo.config.patch(recompile_limit=KINDS):
        out, aux = call(
            *wide, block_mask=plan.mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1],
            return_aux=torch_flex.AuxRequest(lse=True),
        )  # fmt: skip
    return out[..., : v.shape[3]], aux.lse.to(lse_dtype(q.dtype))


def _filled(x: Tensor) -> Tensor:
    width = next(w for w in WIDTHS if w >= x.shape[3])
    return x if width == x.shape[3] else F.pad(x, (0, width - x.shape[3]))


def _apart(work: Callable[[], Any], device: torch.device) -> Any:
    """Run `work` on a thread of its own, on this thread's stream, and wait for it (not for the device).

    A custom operator's body runs below autograd, which is a state of the thread: nothing has gradients there.
    """
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    found: list[Any] = []

    def run() -> None:
        try:
            with torch.cuda.stream(stream):
                found.extend((work(), None))
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
            return _attention(q_BHLD, k_BGLD, v_BGLE, plan, scale)

    return _apart(work, q_BHLD.device)


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

    def work() -> tuple[Tensor, ...]:
        with torch.enable_grad():
            q, k, v = leaves = [x.detach().requires_grad_() for x in (q_BHLD, k_BGLD, v_BGLE)]
            own, own_lse = _attention(q, k, v, plan, scale)
        with torch.no_grad():
            empty = torch.isneginf(own_lse) | torch.isneginf(lse_BHL)
            share = torch.exp(own_lse - lse_BHL).masked_fill(empty, 0)
            wide = dout_BHLE.to(own_lse.dtype)
            dlse = share * (wide * (own.to(wide.dtype) - out_BHLE.to(wide.dtype))).sum(-1)
            down = (wide * share.unsqueeze(-1)).to(own.dtype)
        return torch.autograd.grad((own, own_lse), leaves, (down, dlse.masked_fill(empty, 0)))

    dq, dk, dv = _apart(work, q_BHLD.device)
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
