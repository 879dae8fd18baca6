"""What a copy between device and host costs from pageable and from pinned memory, and host to host.

A checkpoint leaves through such a copy. Plain is what `tensor.cpu()` does, a copy into pageable memory; ours is the
pinned memory that the snapshot arena holds. The arm `pin, then copy` pays for the pinning every time, which is why the
arena pins once and keeps it. Host to host: a torch copy against the arena's own memcpy, which runs without the
interpreter lock; that is the whole snapshot of a CPU run. Predictions come from the machine file (`--machine`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

from undertow.benchmarks.case import Arm, Benchmark, Case, Context, Trial
from undertow.checkpointing.arena import copy_bytes
from undertow.dist.units import format_bytes

MIB = 2**20
NO_CUDA = "needs a CUDA device"


def cases(context: Context) -> list[Case]:
    sizes = [MIB, 64 * MIB] if context.quick else [MIB // 16, MIB, 16 * MIB, 256 * MIB]
    rates = context.machine.copies if context.machine else {}
    found = []
    for group, trial in (("device to host", to_host), ("host to device", to_device)):
        found += [
            Case(
                name=f"{group}, {format_bytes(size)}",
                build=lambda size=size, trial=trial: trial(size, context.seed, rates),
                plain="pageable",
                ours="pinned",
                nbytes=size,
                group=group,
            )
            for size in sizes
        ]
    return found + [
        Case(
            name=f"host to host, {format_bytes(size)}",
            build=lambda size=size: host_to_host(size, context.seed, rates),
            plain="torch",
            ours="memcpy",
            nbytes=size,
            group="host to host",
        )
        for size in sizes
    ]


def random_bytes(nbytes: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def predicted(nbytes: int, rate: float | None) -> float | None:
    return nbytes / rate if rate else None


def host_to_host(nbytes: int, seed: int, rates: dict[str, float]) -> Trial:
    source = random_bytes(nbytes, seed)
    targets = [torch.zeros_like(source) for _ in range(2)]

    def memcpy() -> torch.Tensor:
        copy_bytes(targets[1].data_ptr(), source.data_ptr(), nbytes)
        return targets[1]

    time_s = predicted(nbytes, rates.get("host"))
    arms = [
        Arm("torch", lambda: targets[0].copy_(source), predicted_s=time_s),
        Arm("memcpy", memcpy, predicted_s=time_s),
    ]
    return Trial(arms, reference=lambda: source)


def to_host(nbytes: int, seed: int, rates: dict[str, float]) -> Trial:
    source = random_bytes(nbytes, seed)
    if not torch.cuda.is_available():
        return absent(source)
    device, pageable = source.cuda(), torch.zeros_like(source)
    pinned = torch.zeros_like(source).pin_memory()

    def pin_then_copy() -> torch.Tensor:
        return torch.zeros_like(source).pin_memory().copy_(device, non_blocking=True)

    slow, fast = rates.get("d2h_pageable"), rates.get("d2h_pinned")
    arms = [
        cuda_arm("pageable", lambda: pageable.copy_(device), nbytes, slow),
        cuda_arm("pinned", lambda: pinned.copy_(device, non_blocking=True), nbytes, fast),
        cuda_arm("pin, then copy", pin_then_copy, nbytes),
    ]
    return Trial(arms, reference=lambda: source)


def to_device(nbytes: int, seed: int, rates: dict[str, float]) -> Trial:
    source = random_bytes(nbytes, seed)
    if not torch.cuda.is_available():
        return absent(source)
    device, pinned = torch.zeros_like(source, device="cuda"), source.pin_memory()
    slow, fast = rates.get("h2d_pageable"), rates.get("h2d_pinned")
    arms = [
        cuda_arm("pageable", lambda: device.copy_(source), nbytes, slow),
        cuda_arm("pinned", lambda: device.copy_(pinned, non_blocking=True), nbytes, fast),
    ]
    return Trial(arms, reference=lambda: source)


def cuda_arm(name: str, run: Callable[[], torch.Tensor], nbytes: int, rate: float | None = None) -> Arm:
    return Arm(name, run, device="cuda", predicted_s=predicted(nbytes, rate))


def absent(source: torch.Tensor) -> Trial:
    return Trial([Arm.missing("pageable", NO_CUDA), Arm.missing("pinned", NO_CUDA)], reference=lambda: source)


BENCHMARK = Benchmark(
    name="copies",
    claim="pinned memory that is kept carries a checkpoint at the speed of the bus",
    cases=cases,
    x_label="bytes copied",
)

if __name__ == "__main__":
    from undertow.benchmarks.cli import main

    sys.exit(main(["copies", *sys.argv[1:]]))
