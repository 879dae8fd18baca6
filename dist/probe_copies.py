"""Copy rates of one process: within the host's memory, between host and device (pinned and pageable), on the device.

The destination is compared with the source once before a route is timed. Buffers are far larger than the caches of the
processor, and no route may take more than an eighth of the memory that is left.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from .measure import Effort, Measurement, Skipped, median_s
from .memory import free_bytes

_FULL_BYTES, _QUICK_BYTES = 512 << 20, 64 << 20


def plan(device: torch.device, quick: bool) -> list[Measurement]:
    """The copies to measure: host routes always, device routes when `device` is CUDA."""
    nbytes = min(_QUICK_BYTES if quick else _FULL_BYTES, free_bytes() // 8)
    effort = Effort.of(quick)
    measurements = [
        Measurement("copies", "host", lambda: _host(nbytes, effort, torch.get_num_threads())),
        Measurement("copies", "host_one_thread", lambda: _host(nbytes, effort, 1)),
    ]
    if device.type == "cuda":
        nbytes = min(nbytes, free_bytes(device) // 8)
        measurements += [
            Measurement("copies", route, lambda route=route: _device(route, nbytes, effort, device))
            for route in ("d2h_pinned", "d2h_pageable", "h2d_pinned", "h2d_pageable", "d2d")
        ]
        measurements.append(Measurement("copies", "pin", lambda: _pin(nbytes)))
    return measurements


def _host(nbytes: int, effort: Effort, threads: int) -> float:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        source = torch.arange(nbytes // 8, dtype=torch.int64)
        target = torch.zeros_like(source)
        return _rate(target, source, effort, torch.device("cpu"))
    finally:
        torch.set_num_threads(before)


def _device(route: str, nbytes: int, effort: Effort, device: torch.device) -> float:
    host = torch.empty(nbytes // 8, dtype=torch.int64, pin_memory=route.endswith("_pinned"))
    there = torch.empty(nbytes // 8, dtype=torch.int64, device=device)
    values = torch.arange(nbytes // 8, dtype=torch.int64)
    if route.startswith("d2h"):
        there.copy_(values)
        return _rate(host.zero_(), there, effort, device)
    if route.startswith("h2d"):
        return _rate(there.zero_(), host.copy_(values), effort, device)
    there.copy_(values)
    return _rate(torch.zeros_like(there), there, effort, device)


def _rate(target: torch.Tensor, source: torch.Tensor, effort: Effort, device: torch.device) -> float:
    target.copy_(source)
    if not torch.equal(target, source.to(target.device)):
        raise Skipped("the copy differs from its source")
    seconds = median_s(lambda: target.copy_(source, non_blocking=True), effort, device)
    return source.nbytes / seconds


def _pin(nbytes: int) -> float:
    """Bytes per second at which fresh memory is page-locked, past torch's cache of pinned blocks."""
    block = torch.zeros(nbytes, dtype=torch.uint8)
    runtime: Any = torch.cuda.cudart()
    start_s = time.perf_counter()
    if int(runtime.cudaHostRegister(block.data_ptr(), block.nbytes, 0)):
        raise Skipped("cudaHostRegister failed (ulimit -l?)")
    seconds = time.perf_counter() - start_s
    runtime.cudaHostUnregister(block.data_ptr())
    return nbytes / seconds
