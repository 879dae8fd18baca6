"""Random datatypes on device buffers against numpy: pack and unpack, every placing of the two sides, every host path.

usage: device_types.py SEED ROUNDS
"""

from __future__ import annotations

import ctypes
import random
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from device_memory import Array, Device
from ir_reference import indices, random_ir, size, text

from undertow.mpi_interpose import gpu

LARGE = [  # (text, extent): enough words for the unrolled kernel, and the forms that random types seldom take
    ("(loop 40000 64 (bytes 32))", 40000 * 64),
    ("(loop 300 32768 (loop 50 512 (bytes 128)))", 300 * 32768),
    ("(loop 600000 8 (bytes 4))", 600000 * 8),
    ("(loop 700 4 (loop 900 2800 (bytes 4)))", 700 * 900 * 4),
    ("(loop 500 8 (loop 300 4000 (bytes 8)))", 500 * 300 * 8),
    ("(loop 65 2 (loop 333 130 (bytes 2)))", 65 * 333 * 2),
    ("(loop 3 3000000 (loop 40 16 (loop 40 1600 (loop 40 40000 (bytes 4)))))", 9000000),
    ("(loop 7 65536 (loop 7 4096 (loop 7 512 (loop 7 64 (loop 7 9 (loop 7 1 (bytes 1)))))))", 7 * 65536),
]


def spots(ir_indices: np.ndarray, count: int, extent: int) -> np.ndarray:
    return (np.arange(count)[:, None] * extent + ir_indices[None, :]).reshape(-1)


class Case:
    """One datatype with its buffer: random bytes that just hold it, at a random alignment."""

    def __init__(self, device: Device, ir: str, extent: int, count: int, one: np.ndarray, rng: random.Random) -> None:
        places = spots(one, count, extent)
        low = int(places.min()) if len(places) else 0
        shift = rng.choice([0, 0, 16, 4, 1])
        self.origin = shift - min(low, 0)
        self.places = places + self.origin
        length = max(int(self.places.max()) + 1 if len(places) else 1, self.origin + 1)
        self.bytes = np.frombuffer(rng.randbytes(length), np.uint8).copy()
        self.disjoint = len(np.unique(self.places)) == len(self.places)
        self.plan, self.count, self.device, self.ir = gpu.GpuPlan(ir, extent), count, device, ir
        self.offset = rng.choice([0, 0, 0, 1, 4, 8])

    def fail(self, what: str) -> str:
        return f"{what}: count {self.count} of {self.ir[:300]}"

    def check_pack(self, user: int, packed: Array | np.ndarray) -> None:
        want = self.bytes[self.places]
        guard = np.full(len(want) + 64, 0xAB, np.uint8)
        if isinstance(packed, Array):
            packed.write(guard)
            self.plan.pack(self.count, user, packed.address + self.offset)
            got = packed.read()
        else:
            packed[: len(guard)] = guard
            self.plan.pack(self.count, user, packed.ctypes.data + self.offset)
            got = packed[: len(guard)]
        assert np.array_equal(got[self.offset : self.offset + len(want)], want), self.fail("pack")
        rest = np.concatenate([got[: self.offset], got[self.offset + len(want) :]])
        assert (rest == 0xAB).all(), self.fail("pack wrote outside")

    def check_unpack(self, target: Array, packed: int, want: np.ndarray, arrived: int | None = None) -> None:
        blank = np.full(len(self.bytes), 0xCD, np.uint8)
        target.write(blank)
        self.plan.unpack(self.count, packed, target.address + self.origin, arrived)
        n = len(want) if arrived is None else arrived
        blank[self.places[:n]] = want[:n]
        assert np.array_equal(target.read(), blank), self.fail("unpack" if arrived is None else f"{n} bytes unpacked")

    def run(self, rng: random.Random) -> None:
        if not len(self.places):
            return
        want = self.bytes[self.places]
        device, n = self.device, len(want)
        user = device.array(self.bytes)
        packed = device.empty(n + 64)
        self.check_pack(user.address + self.origin, packed)
        self.check_pack(self.bytes.ctypes.data + self.origin, packed)  # only the packed side on the device
        self.check_pack(user.address + self.origin, np.empty(n + 64, np.uint8))  # pageable
        slab_address = gpu.load().undertow_gpu_slab_get(n + 64, user.address)
        slab = np.ctypeslib.as_array((ctypes.c_uint8 * (n + 64)).from_address(slab_address))
        for path in gpu.PATHS:
            gpu.host_path(path)
            self.check_pack(user.address + self.origin, slab)
        if self.disjoint:
            packed.write(want)
            self.check_unpack(user, packed.address, want)
            pageable = want.copy()
            self.check_unpack(user, pageable.ctypes.data, want)
            for path in gpu.PATHS:
                gpu.host_path(path)
                slab[:n] = want
                self.check_unpack(user, slab_address, want)
            self.check_unpack(user, pageable.ctypes.data, want, rng.randint(1, n))
        gpu.host_path("auto")
        gpu.load().undertow_gpu_slab_put(slab_address, n + 64)


def indices_of(source: str) -> np.ndarray:
    """Indices of a text made of loops and bytes only."""
    words = source.replace("(", " ").replace(")", " ").split()
    out = np.zeros(1, np.int64)
    loops = [(int(words[i + 1]), int(words[i + 2])) for i, w in enumerate(words) if w == "loop"]
    for n, stride in loops:
        out = (out[:, None] + (np.arange(n) * stride)[None, :]).reshape(-1)
    return (out[:, None] + np.arange(int(words[-1]))[None, :]).reshape(-1)


def main(seed: int, rounds: int) -> None:
    device, rng = Device(), random.Random(seed)
    first = device.empty(64)
    assert gpu.memory(first.address) == "device" and gpu.memory(np.zeros(8).ctypes.data) == "host"
    for _ in range(rounds):
        ir = random_ir(rng)
        count = rng.choice([1, 1, 2, 3, 5, 40]) if size(ir) < 4000 else 1
        extent = rng.choice([size(ir), size(ir) + 3, 7, 256, -64, 4])
        Case(device, text(ir), extent, count, indices(ir), rng).run(rng)
    large = LARGE if not device.is_fake else LARGE[5:]
    for ir, extent in large:
        Case(device, ir, extent, 1, indices_of(ir), rng).run(rng)
    if device.is_fake:  # one pass through the form for many words, which the stand-in compares with the general one
        ir, extent = LARGE[2]
        case = Case(device, ir, extent, 1, indices_of(ir), rng)
        user = device.array(case.bytes)
        case.check_pack(user.address + case.origin, device.empty(case.plan.size + 64))
    counts = gpu.counters()
    assert counts["launches"] > rounds, counts
    print(f"ok {rounds} random and {len(large)} large types; {counts}")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
