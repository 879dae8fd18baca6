"""Ring attention over NCCL: every schedule, forward and backward, many calls queued before the first is looked at.

Also a program: ``torchrun --nproc-per-node 2 tests/parallel/test_token_ring_cuda.py`` (without GPUs it runs over gloo);
with the word ``flex`` behind it also FlexAttention, one program for each phase, which is compiled first.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from undertow.parallel import shard_sequence, token_ring_attention
from undertow.parallel.blocks import flex as flex_kernel
from undertow.parallel.masks import Mask
from undertow.parallel.token_ring.executors import forget
from undertow.parallel.token_ring.problem import SCHEDULES

LENGTH, HEADS, GROUPS, WIDTH = 777, 8, 4, 64
CALLS = 6
MASKS: dict[str, tuple[Mask, str]] = {
    "causal": (Mask(causal=True), "zigzag"),
    "full": (Mask(), "contiguous"),
    "window": (Mask(causal=True, window=100), "striped"),
    "documents": (Mask(causal=True, cu_seqlens_q=(0, 5, 300, LENGTH)), "zigzag_documents"),
}
# Of the largest number of each answer. bfloat16: inputs and one rounding of each result (2^-9) and of probabilities
# and partial gradients on the way; float32: sums of a thousand terms, in kernels that may use TF32 (2^-11).
LIMITS = {torch.bfloat16: 2**-5, torch.float32: 2**-9}


def _reference(tensors: list[torch.Tensor], dout: torch.Tensor, mask: Mask) -> list[torch.Tensor]:
    """out, dq, dk, dv in float64 from the definition."""
    spec = importlib.util.spec_from_file_location("reference", Path(__file__).with_name("attention_reference.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    leaves = [x.double().cpu().requires_grad_() for x in tensors]
    out, _ = module.full_attention(*leaves, mask, WIDTH**-0.5)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.double().cpu())]


def compare(device: torch.device, names: list[str], flex: bool) -> int:
    """Wrong answers of this rank over all schedules, masks and types; ranks share a seed."""
    wrong = 0
    for dtype in LIMITS:
        for kind, (mask, layout) in MASKS.items():
            torch.manual_seed(len(kind))
            whole = [torch.randn(1, LENGTH, h, WIDTH).to(device, dtype) for h in (HEADS, GROUPS, GROUPS, HEADS)]
            bounds = mask.cu_seqlens_q
            given: Any = {"layout": layout, "cu_seqlens": bounds}
            wanted = [shard_sequence(x, **given) for x in _reference(whole[:3], whole[3], mask)]
            mine = [shard_sequence(x, **given).contiguous().requires_grad_() for x in whole[:3]]
            dout = shard_sequence(whole[3], **given)
            ways = [(name, "auto") for name in names]
            if flex and dtype == torch.bfloat16 and (bounds or mask.window):  # tiles in one call
                ways.append(("ring_kv", "flex"))
            for name, kernel in ways:
                call: Any = dict(
                    causal=mask.causal, window=mask.window, cu_seqlens=bounds, layout=layout,
                    lengths=(LENGTH, LENGTH), schedule=name, backward_schedule=name, kernel=kernel,
                )  # fmt: skip
                found, began_s = [], time.monotonic()
                for _ in range(CALLS):  # nothing waits for the device in between
                    out = token_ring_attention(*mine, **call)
                    found.append([out.detach(), *torch.autograd.grad(out, mine, dout)])
                for answer in found:
                    for got, want in zip(answer, wanted):
                        off = (got.double().cpu() - want).abs().max() / want.abs().max()
                        wrong += not bool(off < LIMITS[dtype])
                took_s = time.monotonic() - began_s  # a run that is cut off shows by its last line where it stood
                print(f"{dtype} {kind} {name} {kernel}: {took_s:.1f} s", file=sys.stderr, flush=True)
    forget()
    return wrong


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs")
def test_every_schedule_over_nccl():
    """In processes of its own: CUDA cannot be used in a fork of one that has used it."""
    world = min(torch.cuda.device_count(), 4)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    command = [*launch, __file__, "flex"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": 0 wrong") == world


if __name__ == "__main__":
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    there = torch.device("cpu")
    if torch.cuda.is_available():
        there = torch.device("cuda", rank)
        torch.cuda.set_device(there)
    dist.init_process_group("cpu:gloo,cuda:nccl" if there.type == "cuda" else "gloo")
    fewest = {"ulysses_ring": 4, "ulysses_token": 4, "ring_kv_joined": 3, "all_gather_kv_joined": 3}
    able = [name for name in SCHEDULES if world >= fewest.get(name, 1)]
    count = compare(there, able, flex=there.type == "cuda" and "flex" in sys.argv[1:])
    for line in flex_kernel.report():
        print(f"rank {rank} {line}", file=sys.stderr, flush=True)
    count += flex_kernel.programs().count > 2  # all masks and lengths share one for each phase
    print(f"rank {rank}: {count} wrong", flush=True)
    dist.destroy_process_group()
    sys.exit(bool(count))
