"""The handle-free core against numpy: thousands of random nested types, every instruction set, and under sanitizers."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from ir_reference import indices, random_ir, size, text

from undertow.mpi_interpose import core
from undertow.mpi_interpose.compile import core_library
from undertow.mpi_interpose.errors import InterposeError

pytestmark = pytest.mark.slow  # on the checkout only


def expected_pack(ir: tuple, count: int, extent: int, buffer: np.ndarray, origin: int) -> np.ndarray:
    one = indices(ir)
    return buffer[origin + (np.arange(count)[:, None] * extent + one[None, :]).reshape(-1)]


def arena(ir: tuple, count: int, extent: int, rng: random.Random) -> tuple[np.ndarray, int]:
    """Random bytes that just hold the type, so that a stray access leaves the array, and the place of its origin."""
    one = indices(ir)
    touched = np.concatenate([one, one + (count - 1) * extent]) if len(one) and count else np.zeros(1, np.int64)
    low = min(0, int(touched.min()))
    length = max(int(touched.max()) + 1, 0) - low + 1
    return np.frombuffer(rng.randbytes(length), np.uint8).copy(), -low


def check_one(rng: random.Random, library: Path | None = None) -> None:
    ir = random_ir(rng)
    count = rng.choice([0, 1, 1, 2, 3, 5, 40]) if size(ir) < 4000 else 1
    extent = rng.choice([size(ir), size(ir) + 3, 7, 256, -64, 4])
    buffer, origin = arena(ir, count, extent, rng)
    want = expected_pack(ir, count, extent, buffer, origin)
    plan = core.CorePlan(text(ir), extent, library)
    assert plan.size == size(ir)
    guard = 64
    packed = np.full(len(want) + 2 * guard, 0xAB, np.uint8)
    plan.pack(count, buffer.ctypes.data + origin, packed.ctypes.data + guard)
    assert np.array_equal(packed[guard : guard + len(want)], want), text(ir)
    assert (packed[:guard] == 0xAB).all() and (packed[guard + len(want) :] == 0xAB).all(), text(ir)
    low = rng.randint(0, len(want))
    high = rng.randint(low, len(want))
    part = np.zeros(max(1, high - low), np.uint8)
    plan.walk(False, count, buffer.ctypes.data + origin, part.ctypes.data, low, high)
    assert np.array_equal(part[: high - low], want[low:high]), (text(ir), low, high)

    one = indices(ir)
    places = origin + (np.arange(count)[:, None] * extent + one[None, :]).reshape(-1)
    if len(np.unique(places)) != len(places):
        return  # receiving into overlapping bytes is an error in MPI
    blank = np.full(len(buffer), 0xCD, np.uint8)
    target = blank.copy()
    plan.unpack(count, want.ctypes.data, target.ctypes.data + origin)
    model = blank.copy()
    model[places] = want
    assert np.array_equal(target, model), text(ir)
    target = blank.copy()
    segment = np.concatenate([want[low:high], np.zeros(1, np.uint8)])
    plan.walk(True, count, segment.ctypes.data, target.ctypes.data + origin, low, high)
    model = blank.copy()
    model[places[low:high]] = want[low:high]
    assert np.array_equal(target, model), (text(ir), low, high)


@pytest.mark.slow
def test_random_types_pack_and_unpack_like_numpy(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(4000):
        check_one(rng)


def test_normal_form_means_the_same_bytes_and_is_stable(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(1500):
        ir = random_ir(rng)
        once = core.normalise(text(ir))
        assert core.parse(once) == once
        assert np.array_equal(indices(read(once)), indices(ir)), text(ir)
        assert core.normalise(once) == once, text(ir)


def read(source: str) -> tuple:
    """The text form back to tuples, independent of the core's parser."""
    tokens = source.replace("(", " ( ").replace(")", " ) ").split()

    def node(at: int) -> tuple[tuple, int]:
        kind, at = tokens[at + 1], at + 2
        if kind == "bytes":
            return ("bytes", int(tokens[at])), at + 2
        if kind == "loop":
            child, end = node(at + 2)
            return ("loop", int(tokens[at]), int(tokens[at + 1]), child), end + 1
        items = []
        while tokens[at] != ")":
            off = int(tokens[at])
            if kind == "seq":
                child, at = node(at + 1)
            else:
                child, at = int(tokens[at + 1]), at + 2
            items.append((off, child))
        return (kind, items), at + 1

    return node(0)[0]


@pytest.mark.parametrize(
    "ir, want",
    [
        ("(loop 4 8 (loop 2 4 (bytes 4)))", "(bytes 32)"),
        ("(loop 3 16 (loop 4 4 (bytes 2)))", "(loop 12 4 (bytes 2))"),
        ("(seq 0 (bytes 4) 4 (bytes 4) 16 (bytes 8) 32 (bytes 8))", "(loop 3 16 (bytes 8))"),
        ("(runs 0 4 8 4 16 4)", "(loop 3 8 (bytes 4))"),
        ("(loop 1 99 (seq 8 (bytes 4)))", "(seq 8 (bytes 4))"),
        ("(seq 0 (bytes 0) 5 (loop 0 3 (bytes 3)))", "(bytes 0)"),
        # A transpose type: the strides must not be sorted, or the packed order changes.
        ("(loop 3 4 (loop 5 12 (bytes 4)))", "(loop 3 4 (loop 5 12 (bytes 4)))"),
        ("(loop 2 -4 (bytes 4))", "(loop 2 -4 (bytes 4))"),
    ],
)
def test_normal_forms(ir: str, want: str) -> None:
    assert core.normalise(ir) == want


@pytest.mark.parametrize(
    "ir",
    ["", "(bytes)", "(bytes -1)", "(loop 2 4)", "(knot 3)", "(bytes 4) x", "(loop 9999999999 0 (bytes 9999999999))"],
)
def test_what_is_not_an_ir_is_refused(ir: str) -> None:
    with pytest.raises(InterposeError):
        core.parse(ir)


CHILD = """
import random, sys
sys.path.insert(0, {here!r})
from test_core import check_one
from undertow.mpi_interpose.core import load
rng = random.Random({seed})
for _ in range({rounds}):
    check_one(rng, {library!r})
print(load({library!r}).undertow_core_kernels().decode())
"""


def run_child(environment: dict[str, str], rounds: int, seed: int, library: str | None) -> str:
    code = CHILD.format(here=str(Path(__file__).parent), seed=seed, rounds=rounds, library=library)
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.split()[-1]


def test_portable_kernels_agree_too(seed: int) -> None:
    assert run_child({"UNDERTOW_MPI_ISA": "generic"}, 1500, seed, None) == "generic"


def test_no_stray_access_under_address_and_undefined_sanitizers(seed: int) -> None:
    library = core_library(sanitize=True)
    runtime = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    environment = {"LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    run_child(environment, 600, seed, str(library))
