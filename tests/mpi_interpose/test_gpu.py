"""The device side. Without a GPU everything runs on a stand-in for libcuda (fake_cuda.cc): its device memory has no
access rights for the host, and its launches run the arithmetic that the kernel shares with the host. The same programs
run on a GPU where there is one."""

from __future__ import annotations

import ast
import hashlib
import io
import os
import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent))

import ctypes

from mpis import PROGRAMS, Install, need, start

from undertow.mpi_interpose import cli, gpu, gpu_build, gpu_kernels, gpu_pairs, launch, signatures
from undertow.mpi_interpose.compile import CSRC, cache_folder, compiler
from undertow.mpi_interpose.toolchain import probe

HERE = Path(__file__).parent
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(scope="session")
def stand_in() -> Path:
    """The folder of a libcuda.so.1 without a GPU."""
    source = HERE / "fake_cuda.cc"
    parts = [source, *(CSRC / "gpu" / name for name in ("pieces.hh", "shapes.hh"))]
    key = hashlib.sha256(b"".join(part.read_bytes() for part in parts)).hexdigest()[:16]
    folder = cache_folder() / f"test-cuda-{key}"
    library = folder / "libcuda.so.1"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        made = folder / f"made.{os.getpid()}"
        flags = ["-std=c++17", "-O2", "-shared", "-fPIC", f"-I{CSRC / 'gpu'}"]
        subprocess.run([compiler(), *flags, str(source), "-o", str(made)], check=True)
        made.replace(library)
    return folder


def child(code: str, folder: Path, **extra: str) -> str:
    """Output of a Python child that sees the stand-in."""
    env = {**os.environ, "LD_LIBRARY_PATH": str(folder), **extra}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def types_on(seed: int, rounds: int, env: dict[str, str]) -> str:
    command = [sys.executable, str(PROGRAMS / "device_types.py"), str(seed), str(rounds)]
    env = {**os.environ, "UNDERTOW_MPI_GPU_RING_KB": "1", **env}  # so that many go through the ring
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_random_types_between_device_and_host(stand_in: Path, seed: int) -> None:
    assert "ok 40" in types_on(seed, 40, {"LD_LIBRARY_PATH": str(stand_in)})


@pytest.mark.gpu
@NO_GPU
def test_random_types_on_a_gpu(seed: int) -> None:
    assert "ok 200" in types_on(seed, 200, {})


MOVE_NOTHING = {  # of the calls that the preload sees: they have no buffer, and complete nothing
    "Init", "Init_thread", "Finalize", "Type_commit", "Type_dup", "Start", "Startall", "Dist_graph_create_adjacent",
}  # fmt: skip


def test_messages_on_a_library_that_is_not_cuda_aware(pympi: Install, stand_in: Path, tmp_path: Path) -> None:
    """Each call of the table of signatures is made with device memory, and is taken: no such library can read it."""
    program, report = [str(pympi.python), str(PROGRAMS / "device_messages.py")], tmp_path / "report"
    out = start(pympi, 2, program, "auto", report, LD_LIBRARY_PATH=str(stand_in))
    assert "ok 26 on the stand-in" in out, out[-2000:]
    data = launch.merge([Path(f"{report}.{rank}.json") for rank in range(2)], tmp_path / "merged.json")
    taken = {name.removesuffix("_c") for name, counts in data["functions"].items() if counts["taken"]}
    offered = {
        f"MPI_{row.name}"
        for row in signatures.TABLE
        if row.name not in MOVE_NOTHING and row.handler != "not_staged" and not row.name.startswith("File_")
    }
    assert taken == offered & set(probe(pympi.mpicc).symbols)
    assert all("b" not in row.kinds for row in signatures.TABLE if row.name in MOVE_NOTHING)
    gpu_side = data["gpu"]
    assert (
        gpu_side["launches"] > 100 and gpu_side["bytes"] > 1e6 and gpu_side["code_loads"] + gpu_side["ptx_loads"] == 2
    )
    console = Console(record=True, width=200, file=io.StringIO())
    cli.show_report(data, console)
    assert re.search(
        r"device: \d+ launches, .* (PTX|machine code) of the kernels loaded in \d+\.\d ms", console.export_text()
    )


def test_files_from_and_to_device_memory(pympi: Install, stand_in: Path, tmp_path: Path) -> None:
    """By each MPI-IO call of the table that has a buffer; and what is not staged is named, once for each call."""
    program, report = [str(pympi.python), str(PROGRAMS / "device_files.py")], tmp_path / "report"
    start(pympi, 2, ["sh", "-c", '"$0" "$@" 2>"$NOTES.$$"', *program], "auto", report, LD_LIBRARY_PATH=str(stand_in),
          NOTES=str(tmp_path / "notes"), TMPDIR=str(tmp_path))  # fmt: skip
    data = launch.merge([Path(f"{report}.{rank}.json") for rank in range(2)], tmp_path / "merged.json")
    taken = {name.removesuffix("_c") for name, counts in data["functions"].items() if counts["taken"]}
    symbols = set(probe(pympi.mpicc).symbols)
    files = {f"MPI_{row.name}" for row in signatures.TABLE if row.handler.startswith("file_")}
    assert {name for name in taken if "File" in name} == files & symbols and len(files) == 22
    for notes in tmp_path.glob("notes.*"):
        named = [name.removesuffix("_c") for name in re.findall(r"(MPI_\w+) is given device memory", notes.read_text())]
        assert sorted(named) == ["MPI_Bcast_init", "MPI_Win_create"], notes.read_text()
    out = start(pympi, 2, [*program, "what_is_not_staged_is_named"], "auto", LD_LIBRARY_PATH=str(stand_in),
                UNDERTOW_MPI_CUDA_AWARE="1")  # fmt: skip
    assert "kept what_is_not_staged_is_named" in out and "not stage" not in out


def test_messages_through_a_small_ring(stand_in: Path) -> None:
    rules = ["order_is_kept", "contiguous_buffers", "short_receives", "completion_calls"]
    program = [sys.executable, str(PROGRAMS / "device_messages.py"), *rules]
    values: dict[str, Any] = {"UNDERTOW_MPI_GPU": "staged", "UNDERTOW_MPI_GPU_RING_KB": "1"}
    out = start(need("mpich-wheel"), 2, program, "auto", LD_LIBRARY_PATH=str(stand_in), **values)
    assert all(f"kept {rule}" in out for rule in rules), out[-2000:]


@pytest.mark.slow
def test_collectives_of_three_ranks_and_without_pinned_memory(pympi: Install, stand_in: Path) -> None:
    program = [str(pympi.python), str(PROGRAMS / "device_messages.py")]
    rules = ["broadcast_and_gathers", "all_to_all", "halo_by_neighbours", "reductions"]
    rules += ["other_neighbours", "intercommunicators"]
    assert "ok" in start(pympi, 3, [*program, *rules], "auto", LD_LIBRARY_PATH=str(stand_in))
    some = ["blocking_and_nonblocking", "contiguous_buffers"]
    command = ["env", "FAKE_CUDA_FAIL=cuMemHostAlloc", *program, *some]
    assert "ok" in start(pympi, 2, command, "auto", LD_LIBRARY_PATH=str(stand_in))


def test_a_cuda_aware_library_gets_types_with_gaps_packed(pympi: Install, stand_in: Path) -> None:
    """It is said to be one; what it could read itself, it would be given (and here would fault on)."""
    program = [str(pympi.python), str(PROGRAMS / "device_messages.py"), "completion_calls", "one_buffer_both_ways"]
    out = start(pympi, 2, program, "auto", LD_LIBRARY_PATH=str(stand_in), UNDERTOW_MPI_CUDA_AWARE="1")
    assert "kept completion_calls" in out and "kept one_buffer_both_ways" in out, out[-2000:]


def test_the_doctor_says_what_happens_to_device_buffers(stand_in: Path) -> None:
    code = f"""
from undertow.mpi_interpose import gpu_doctor
from undertow.mpi_interpose.toolchain import probe
rows = dict(gpu_doctor.rows(probe({need("mpich-wheel").mpicc!r})))
print(rows["GPU buffers"], "|", rows["CUDA-aware"], "|", rows["GPU kernels"], rows.get("GPU, not staged"))
"""
    out = child(code, stand_in)
    assert ("machine code for sm_80 and sm_90" in out) == bool(gpu_build.binary()) and "PTX" in out
    assert "packed on no GPU; between every pair of ranks through pinned host memory" in out and "CUDA-aware" in out
    ipc = "the sender's device memory"
    assert ipc in out and ipc not in child(code, stand_in, UNDERTOW_MPI_IPC="0")
    assert "device scratch" in child(code, stand_in, UNDERTOW_MPI_GPU="staged")
    assert "as they are" in child(code, stand_in, UNDERTOW_MPI_GPU="off")
    assert "window memory" in out and "persistent collectives" in out


def test_the_doctor_shows_each_pair_of_ranks(stand_in: Path) -> None:
    """As found by trying, under mpirun on two cards; then one rank cannot open the other's memory."""
    install, program = need("mpich-wheel"), [sys.executable, "-m", "undertow", "mpi", "doctor"]
    stand: dict[str, Any] = {"LD_LIBRARY_PATH": str(stand_in), "FAKE_CUDA_CARDS": "2"}
    out = start(install, 2, program, None, **stand)
    assert "rank 1: " in out and "card 1, no GPU" in out and "\n0           .   IPC\n1         IPC     .\n" in out, out
    second = '[ "$PMI_RANK" = 0 ] || export FAKE_CUDA_FAIL=cuIpcOpenMemHandle; exec "$0" "$@"'
    out = start(install, 2, ["sh", "-c", second, *program], None, **stand)
    assert "\n0           .   pin\n1         ipc     .\n" in out and "rank 1 cannot read that of rank 0" in out, out
    assert "\n0           .  host\n" in start(install, 2, program, None, LD_LIBRARY_PATH="")


def test_the_way_between_two_ranks_follows_from_what_they_can_do() -> None:
    def ways(**of_first: Any) -> list[str]:
        ranks = [
            gpu_pairs.Rank("a", "card", ipc_on=True, opened=frozenset({1})),
            gpu_pairs.Rank("a", "card", ipc_on=True),
        ]
        ranks[0] = replace(ranks[0], **of_first)
        ranks[1] = replace(ranks[1], opened=frozenset({0}))
        return [gpu_pairs.way(ranks, 0, 1), gpu_pairs.way(ranks, 1, 0)]

    assert ways() == ["IPC", "IPC"] and ways(ipc_on=False) == ["ipc", "ipc"]
    assert ways(off=True) == ["off", "off"] and ways(opened=frozenset()) == ["ipc", "pin"]
    assert ways(card="", opened=frozenset()) == ["ipc", "pin"] and ways(aware=True) == ["IPC", "IPC"]
    ranks = [gpu_pairs.Rank("a", "card", aware=True), gpu_pairs.Rank("b", "card", aware=True)]
    assert gpu_pairs.way(ranks, 0, 1) == "lib" and "on another host" in gpu_pairs.text(ranks)
    assert gpu_pairs.way([gpu_pairs.Rank("a"), gpu_pairs.Rank("b")], 0, 1) == "host"


@pytest.mark.slow
def test_the_halo_example_equals_the_cpu() -> None:
    """Without a GPU: the same program with its field on the CPU."""
    install = need("mpich-wheel")
    program = [sys.executable, "-m", "undertow.examples.halo3d_gpu", "--device", "cpu", "--cells", "6", "--steps", "2"]
    out = start(install, 2, program, "auto")
    assert '"wrong": 0, "different from the CPU": 0' in out and '"cards": ["cpu", "cpu"]' in out, out


def through_memory(stand_in: Path) -> dict[str, Any]:
    return {"LD_LIBRARY_PATH": str(stand_in), "UNDERTOW_MPI_IPC": "1", "UNDERTOW_MPI_IPC_MB": "1"}


def test_w_collectives_through_the_memory_of_other_ranks(pympi: Install, stand_in: Path) -> None:
    """In several processes; where one rank cannot open the others' memory, all go through the library."""
    program = [str(pympi.python), str(PROGRAMS / "device_ipc.py")]
    common = through_memory(stand_in)
    out = start(pympi, 2, program, "auto", **common)
    assert "ok 8 on the stand-in" in out, out[-2000:]
    second = '[ "${PMI_RANK:-$OMPI_COMM_WORLD_RANK}" = 0 ] || export FAKE_CUDA_FAIL=cuIpcOpenMemHandle; exec "$0" "$@"'
    some = ["blocks_go_without_the_library", "grids_and_graphs"]
    out = start(pympi, 2, ["sh", "-c", second, *program, *some], "auto", IPC_REFUSED="1", **common)
    assert all(f"kept {rule}" in out for rule in some), out[-2000:]
    out = start(pympi, 2, program, "auto", **{**common, "UNDERTOW_MPI_IPC": "auto"})  # as `undertow mpi run` sets it
    assert "ok 2 on the stand-in" in out, out[-2000:]


def test_programs_of_several_kinds_do_not_rely_on_each_others_memory(tmp_path: Path, monkeypatch: Any) -> None:
    """Only a launch of one program shows that all ranks make a w collective through the preload; a wish stands."""
    monkeypatch.delenv("UNDERTOW_MPI_IPC", raising=False)
    assert launch.one_program(["mpirun", "-n", "4", "./app"])
    for words in ("mpirun -n 2 ./a : -n 2 ./b", "srun --multi-prog jobs", "mpiexec -configfile f"):
        assert not launch.one_program([*words.split()])
    assert launch.environment(tmp_path, "auto", None)["UNDERTOW_MPI_IPC"] == "auto"
    assert launch.environment(tmp_path, "auto", None, alike=False)["UNDERTOW_MPI_IPC"] == "0"
    monkeypatch.setenv("UNDERTOW_MPI_IPC", "1")
    assert launch.environment(tmp_path, "auto", None, alike=False)["UNDERTOW_MPI_IPC"] == "1"


@pytest.mark.slow
def test_w_collectives_through_the_memory_of_three_ranks(pympi: Install, stand_in: Path) -> None:
    program = [str(pympi.python), str(PROGRAMS / "device_ipc.py")]
    common = through_memory(stand_in)
    assert "ok 8" in start(pympi, 3, program, "auto", FAKE_CUDA_CARDS="2", **common)
    rules = ["all_to_all", "halo_by_neighbours"]
    out = start(pympi, 3, [program[0], str(PROGRAMS / "device_messages.py"), *rules], "auto", **common)
    assert all(f"kept {rule}" in out for rule in rules), out[-2000:]


@pytest.mark.gpu
@NO_GPU
def test_w_collectives_through_the_memory_of_other_ranks_on_a_gpu(pympi: Install) -> None:
    program = [str(pympi.python), str(PROGRAMS / "device_ipc.py")]
    out = start(pympi, 2, program, "auto", UNDERTOW_MPI_IPC="1", UNDERTOW_MPI_IPC_MB="1")
    assert "ok 8 on a GPU" in out, out[-2000:]


@pytest.mark.gpu
@NO_GPU
def test_messages_on_a_gpu(pympi: Install) -> None:
    program = [str(pympi.python), str(PROGRAMS / "device_messages.py")]
    assert "ok 26 on a GPU" in start(pympi, 2, program, "auto")


def test_memory_of_the_driver_between_two_ranks(stand_in: Path) -> None:
    out = start(need("mpich-wheel"), 2, [sys.executable, str(PROGRAMS / "device_libraries.py"), "driver"], "auto",
                LD_LIBRARY_PATH=str(stand_in))  # fmt: skip
    assert "kept by memory of driver" in out, out[-2000:]


@pytest.mark.gpu
@NO_GPU
def test_memory_of_torch_cupy_and_the_runtime_on_a_gpu() -> None:
    """With torch's memory as cudaMalloc gives it, and mapped piece by piece (expandable segments)."""
    program = [sys.executable, str(PROGRAMS / "device_libraries.py"), "driver", "torch", "cudaMalloc"]
    try:
        import cupy  # noqa: F401
    except ImportError:
        pass
    else:
        program += ["cupy", "managed"]
    for segments in ("False", "True"):
        out = start(need("mpich-wheel"), 2, program, "auto", PYTORCH_CUDA_ALLOC_CONF=f"expandable_segments:{segments}")
        assert "kept by memory of driver, torch" in out, out[-2000:]


def test_nothing_happens_before_the_program_has_loaded_cuda(stand_in: Path) -> None:
    code = """
import ctypes, zlib
from undertow.mpi_interpose import gpu
lib = gpu.load()
seen = [lib.undertow_gpu_possible()]
import sqlite3, bz2, lzma
seen.append(lib.undertow_gpu_possible())
cuda = ctypes.CDLL("libcuda.so.1")
seen.append(lib.undertow_gpu_possible())
print(seen, gpu.memory(id(seen)))
"""
    assert child(code, stand_in) == "[0, 0, 1] host\n"
    assert child(code, stand_in, UNDERTOW_MPI_GPU="off") == "[0, 0, 0] host\n"


def test_a_failing_driver_is_an_error_and_not_a_wrong_message(stand_in: Path) -> None:
    code = f"""
import sys
sys.path.insert(0, {str(PROGRAMS)!r})
from device_memory import Device
from undertow.mpi_interpose import gpu
from undertow.mpi_interpose.errors import InterposeError
device = Device()
user, packed = device.empty(4096), device.empty(4096)
try:
    gpu.GpuPlan("(loop 8 16 (bytes 4))", 128).pack(4, user.address, packed.address)
except InterposeError as error:
    print(error)
"""
    for call in ("cuModuleLoadData", "cuLaunchKernel"):
        out = child(code, stand_in, FAKE_CUDA_FAIL=call)
        assert "CUDA_ERROR_FAKE" in out and "pack kernel" in out, out


def test_a_group_shares_launches(stand_in: Path) -> None:
    """Twenty faces in both directions: two launches each, through device memory and through pinned memory."""
    code = f"""
import ctypes, sys
sys.path.insert(0, {str(PROGRAMS)!r})
import numpy as np
from device_memory import Device
from undertow.mpi_interpose import gpu
device, values = Device(), np.arange(1, 20 * 512 + 1, dtype="u4")
user, back, packed = device.array(values), device.array(values * 0), device.empty(20 * 1024)
plan = gpu.GpuPlan("(loop 256 8 (bytes 4))", 2048)
plan.pack(1, user.address, packed.address)
slab = gpu.load().undertow_gpu_slab_get(20 * 1024, user.address)
for path, middle in (("auto", packed.address), ("direct", slab), ("staged", slab)):
    gpu.host_path(path)
    back.write(values * 0)
    before = gpu.counters()["launches"]
    with gpu.group():
        for k in range(20):
            plan.pack(1, user.address + 2048 * k, middle + 1024 * k)
    with gpu.group():
        for k in range(20):
            plan.unpack(1, middle + 1024 * k, back.address + 2048 * k)
    got = back.read("u4").reshape(-1, 2)
    right = bool((got[:, 0] == values[::2]).all() and not got[:, 1].any())
    print(path, gpu.counters()["launches"] - before, right)
"""
    assert child(code, stand_in) == "auto 4 True\ndirect 4 True\nstaged 4 True\n"


def test_pinned_memory_is_kept_up_to_a_limit_and_given_back_when_it_is_short(stand_in: Path) -> None:
    """512 MiB lie idle at most; a slab that cannot be had takes the place of idle ones of other sizes."""
    code = f"""
import ctypes, sys
sys.path.insert(0, {str(PROGRAMS)!r})
from device_memory import Device
from undertow.mpi_interpose import gpu
device, lib, mib = Device(), gpu.load(), 1 << 20
pinned = device.cuda.fake_cuda_pinned
pinned.restype = ctypes.c_ulong
some = device.empty(16)
def get(n):
    return lib.undertow_gpu_slab_get(n * mib, some.address)
def put(slab, n):
    lib.undertow_gpu_slab_put(slab, n * mib)
held = [get(n) for n in SIZES]
print([slab is not None for slab in held], pinned() // mib)
for slab, n in zip(held, SIZES):
    if slab:
        put(slab, n)
print(pinned() // mib)
again, seen = get(AGAIN), pinned() // mib
print(again in held, again is not None, seen)
put(again, AGAIN)
print(get(AGAIN + 1) is not None, pinned() // mib)
"""
    nine = code.replace("SIZES", "([64] * 9)").replace("AGAIN", "64")
    assert child(nine, stand_in) == f"{[True] * 9} 576\n512\nTrue True 512\nTrue 640\n"
    few = code.replace("SIZES", "[64, 100]").replace("AGAIN", "64")
    assert child(few, stand_in, FAKE_CUDA_PINNED=str(160 << 20)) == "[True, False] 64\n64\nTrue True 64\nTrue 128\n"


def test_what_is_queued_on_the_default_stream_is_waited_for(stand_in: Path) -> None:
    """Before a pack, which reads what is written there, and before an unpack, which writes what is read there."""
    code = f"""
import ctypes, sys
sys.path.insert(0, {str(PROGRAMS)!r})
import numpy as np
from device_memory import Device
from undertow.mpi_interpose import gpu
device, lib = Device(), gpu.load()
def pinned(values):
    slab = lib.undertow_gpu_slab_get(values.nbytes, user.address)
    host = np.ctypeslib.as_array((ctypes.c_uint8 * values.nbytes).from_address(slab))
    host[:] = values
    return host
def queue(to, source, n):
    device.must(device.cuda.cuMemcpyAsync(*map(ctypes.c_uint64, (to, source)), ctypes.c_size_t(n), None))
n, plan = 1 << 14, gpu.GpuPlan("(loop 2048 8 (bytes 4))", 1 << 14)
old, new = np.full(n, 1, "u1"), np.full(n, 2, "u1")
for path, half in (("auto", 0), ("direct", 0), ("staged", 0), ("staged", 1024)):
    gpu.host_path(path)
    gpu.ring(half)
    user = device.array(old)
    source, seen, packed = pinned(new), pinned(old * 0), pinned(old * 0)
    queue(user.address, source.ctypes.data, n)
    plan.pack(1, user.address, packed.ctypes.data)
    first = packed[: n // 2].tolist() == [2] * (n // 2)
    queue(seen.ctypes.data, user.address, n)
    packed[:] = 3
    plan.unpack(1, packed.ctypes.data, user.address)
    device.must(device.cuda.cuCtxSynchronize())
    print(path, half, first, seen.tolist() == [2] * n, user.read().reshape(-1, 8)[0].tolist())
"""
    cases = ("auto 0", "direct 0", "staged 0", "staged 1024")
    assert child(code, stand_in) == "".join(f"{case} True True [3, 3, 3, 3, 2, 2, 2, 2]\n" for case in cases)


RING = """
import random, sys
sys.path.insert(0, PROGRAMS)
import numpy as np
from device_memory import Device
from undertow.mpi_interpose import gpu
device, rng = Device(), random.Random(SEED)
types = {  # text, extent: loops, a transpose, a table of equal blocks, structs with gaps, and a table of mixed lengths
    "(loop 100 40 (loop 3 8 (bytes 4)))": 4000, "(loop 20 4 (loop 60 200 (bytes 4)))": 12000, "(bytes 12)": 16,
    "(runs 0 8 24 8 64 8 40 8)": 80, "(loop 50 24 (seq 0 (bytes 4) 8 (bytes 12)))": 1200,
    "(runs" + "".join(f" {at} {4 + at % 3}" for at in range(0, 1000, 7)) + ")": 1004,
}
gpu.host_path("staged")
for text, extent in types.items():
    plan = gpu.GpuPlan(text, extent)
    for half in (256, 1024):
        count = rng.randint(2 * half // plan.size + 1, 9 * half // plan.size + 2)
        values = np.frombuffer(rng.randbytes(count * extent + 64), "u1")
        user, back, size = device.array(values), device.empty(values.nbytes), count * plan.size
        slab, seen = gpu.load().undertow_gpu_slab_get(size, user.address), []
        host = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(slab))
        for ring in (0, half):
            gpu.ring(ring)
            host[:] = 0
            back.write(np.full(values.nbytes, 9, "u1"))
            before = gpu.counters()["copies"]
            plan.pack(count, user.address, slab)
            packs = gpu.counters()["copies"] - before
            seen.append(host.tobytes())
            with gpu.group():  # twice: the second goes through the halves while the first may still be in them
                plan.unpack(count, slab, user.address)
                plan.unpack(count, slab, back.address)
            seen.append(back.read().tobytes())
            assert user.read().tobytes() == values.tobytes()
        assert seen[0] == seen[2] and seen[1] == seen[3], (text, half)
        gpu.load().undertow_gpu_slab_put(slab, size)
        print(text[:40], "in one" if packs == 1 else "in chunks" if packs == -(-size // half) else "by turns")
"""


def test_large_messages_go_through_a_ring(stand_in: Path, seed: int) -> None:
    """The same bytes as by whole scratch, with streams that run in any order that their waits allow."""
    code = f"import ctypes\nPROGRAMS, SEED = {str(PROGRAMS)!r}, {seed}\n{RING}"
    out = child(code, stand_in)
    assert out.count("in chunks") == 10 and out.count("by turns") == out.count("in one") == 1, out


def test_reads_of_the_cache_are_left_alone_unless_asked_for(stand_in: Path) -> None:
    code = f"""
import ctypes, sys
sys.path.insert(0, {str(PROGRAMS)!r})
from device_memory import Device
from undertow.mpi_interpose import gpu
from undertow.mpi_interpose.errors import InterposeError
device = Device()
user, packed = device.empty(4096), device.empty(4096)
device.cuda.fake_cuda_limit.restype = ctypes.c_ulong
try:
    gpu.GpuPlan("(loop 8 16 (bytes 4))", 128).pack(4, user.address, packed.address)
except InterposeError as error:
    print(error)
print(device.cuda.fake_cuda_limit(5))
"""
    assert child(code, stand_in) == "0\n"
    assert child(code, stand_in, UNDERTOW_MPI_GPU_FETCH="32") == "32\n"
    assert "is '48'; expected 32, 64 or 128" in child(code, stand_in, UNDERTOW_MPI_GPU_FETCH="48")
    assert "CUDA_ERROR_FAKE" in child(code, stand_in, UNDERTOW_MPI_GPU_FETCH="32", FAKE_CUDA_FAIL="cuCtxSetLimit")


def test_the_paths_are_those_of_the_named_file(stand_in: Path, tmp_path: Path) -> None:
    """By blocks of 4 bytes: packs go directly up to 2048 bytes, unpacks never."""
    code = f"""
import sys
sys.path.insert(0, {str(PROGRAMS)!r})
from device_memory import Device
from undertow.mpi_interpose import gpu
from undertow.mpi_interpose.errors import InterposeError
device = Device()
user, lib = device.empty(1 << 14), gpu.load()
slab = lib.undertow_gpu_slab_get(1 << 14, user.address)
def copies(act):
    before = gpu.counters()["copies"]
    act()
    return gpu.counters()["copies"] - before
try:
    for n in (512, 513):
        plan = gpu.GpuPlan(f"(loop {{n}} 8 (bytes 4))", 1 << 13)
        pack, unpack = lambda: plan.pack(1, user.address, slab), lambda: plan.unpack(1, slab, user.address)
        print(copies(pack), copies(unpack))
except InterposeError as error:
    print(error)
"""
    paths = tmp_path / "gpu.txt"
    for text, want in (
        ("# a card\nto_host 4 2048\nto_host 64 9999\nfrom_host 1 0\n", "0 1\n1 1\n"),
        (None, "0 0\n0 0\n"),
        ("to_host four 2048", "expected `to_host BLOCK BYTES`"),
    ):
        paths.write_text(text or "")
        named = str(paths) if text else ""
        assert want in child(code, stand_in, UNDERTOW_MPI_GPU_PATHS=named)
    assert "cannot read" in child(code, stand_in, UNDERTOW_MPI_GPU_PATHS=str(tmp_path / "none"))


CHOSEN = """
import random, sys
sys.path.insert(0, PROGRAMS)
import numpy as np
from device_memory import Device
from undertow.mpi_interpose import gpu
device, rng, served = Device(), random.Random(SEED), {}
names = ["general", *(f"nest {u}x{n}" for u in (1, 4) for n in (64, 128, 256)), "stream 128", "stream 256",
         "pour 64", "pour 256", "", "cross 16", "cross 32", "cross 64"]
for turn in range(60):
    word = 1 << rng.randrange(5)
    block = word * (1 if turn % 2 else rng.randint(1, 9))
    if turn % 2:  # two loops that cross, perhaps with one around them
        n, m = rng.randint(8, 70), rng.randint(8, 70)
        row = word * n + word * rng.randint(0, 3)
        dims = [(n, word), (m, row)]
        if turn % 4 == 1:
            dims.insert(0, (rng.randint(2, 3), row * m + word))
        extent = row * m * 3 + 3 * word
    else:
        dims, extent = [], block
        for _ in range(rng.randint(1, 4)):
            step = extent + word * rng.randint(0, 3)
            dims.insert(0, (rng.randint(2, 9), step))
            extent = dims[0][0] * step
    text = f"(bytes {block})"
    for count, step in reversed(dims):
        text = f"(loop {count} {step} {text})"
    plan, at = gpu.GpuPlan(text, extent), word * rng.randint(0, 2)
    places = [at + sum(k * s for k, (_, s) in zip(index, dims)) for index in np.ndindex(*(n for n, _ in dims))]
    index = (np.array(places)[:, None] + np.arange(block)).reshape(-1)
    values = np.frombuffer(rng.randbytes(extent + 64), "u1")
    user, packed = device.array(values), device.empty(plan.size)
    new = np.frombuffer(rng.randbytes(plan.size), "u1")
    after = values.copy()
    after[index] = new
    for name in names:
        gpu.use_kernel(name)
        for packing in (True, False):
            good = plan.served_by(name, 1, user.address + at, packed.address, packing)
            served[name] = served.get(name, 0) + good
            if not good:
                continue
            if packing:
                user.write(values)
                packed.write(np.zeros(plan.size, "u1"))
                plan.pack(1, user.address + at, packed.address)
                assert (packed.read() == values[index]).all(), (name, text)
            else:
                user.write(values)
                packed.write(new)
                plan.unpack(1, packed.address, user.address + at)
                assert (user.read() == after).all(), (name, text)
print(sorted(served.items()))
for name in ("nest 3x128", "cross 48", "pour", "nest 1x128 "):
    try:
        gpu.use_kernel(name)
    except gpu.InterposeError as error:
        assert repr(name) in str(error) and "nest 1x128" in str(error)
    else:
        raise AssertionError(name)
"""


def test_every_kernel_that_serves_a_type_moves_its_bytes(stand_in: Path, seed: int) -> None:
    """Against numpy's indexing: loops with and without blocks of several words, transposes, ends of tiles."""
    served = dict(ast.literal_eval(child(f"PROGRAMS, SEED = {str(PROGRAMS)!r}, {seed}\n{CHOSEN}", stand_in)))
    assert min(served.values()) >= 5, served


@pytest.mark.gpu
@NO_GPU
def test_every_kernel_that_serves_a_type_moves_its_bytes_on_a_gpu(seed: int) -> None:
    done = subprocess.run([sys.executable, "-c", f"PROGRAMS, SEED = {str(PROGRAMS)!r}, {seed}\n{CHOSEN}"],
                          capture_output=True, text=True, timeout=280)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert min(dict(ast.literal_eval(done.stdout)).values()) >= 5, done.stdout


@pytest.mark.parametrize(
    "ir, user, want",
    [
        ("(loop 64 32 (bytes 16))", 0, "64 words of 16 B, 1 per block"),
        ("(loop 64 32 (bytes 16))", 4, "256 words of 4 B, 4 per block"),  # a start that is aligned to 4 bytes only
        ("(loop 64 40 (bytes 32))", 0, "256 words of 8 B, 4 per block"),  # a stride that is
        ("(loop 64 128 (bytes 100))", 0, "1600 words of 4 B, 25 per block"),
        ("(loop 50 4 (loop 60 200 (bytes 4)))", 0, "transpose: 3000 words of 4 B"),
        ("(loop 4 4 (loop 60 200 (bytes 4)))", 0, "loops: 240 words of 4 B"),  # too narrow for a tile
        ("(seq 0 (bytes 4) 8 (loop 9 64 (bytes 8)))", 0, "loops: 1 words of 4 B"),
        ("(runs 0 4 8 12 40 4 60 8)", 0, "words of 4 B"),
    ],
)
def test_the_word_is_the_largest_that_divides_everything(ir: str, user: int, want: str) -> None:
    size = gpu.GpuPlan(ir, 1 << 20).size
    text = gpu.GpuPlan(ir, 1 << 20).describe(1, user, 0)
    assert want in text, text
    assert (
        sum(int(line.split(": ")[1].split()[0]) * int(line.split(" of ")[1].split()[0]) for line in text.splitlines())
        == size
    )


def test_pieces_stay_within_their_numbers() -> None:
    """More words than a piece can number, and more loops than it has, become several pieces of the same bytes."""
    text = gpu.GpuPlan("(loop 3000000000 16 (bytes 8))", 1).describe(1, 0, 0)
    counts = [int(line.split(": ")[1].split()[0]) for line in text.splitlines()]
    assert len(counts) == 3 and max(counts) <= 1 << 30 and sum(counts) == 3_000_000_000
    deep = "(bytes 1)"
    for level in range(1, 8):
        deep = f"(loop 3 {5**level} {deep})"
    text = gpu.GpuPlan(deep, 1).describe(1, 0, 0)
    assert len(text.splitlines()) == 9 and text.count("243 words of 1 B") == 9


def test_division_by_multiplication_is_exact(stand_in: Path, seed: int) -> None:
    divide = ctypes.CDLL(str(stand_in / "libcuda.so.1")).fake_cuda_divide
    divide.restype = ctypes.c_uint
    rng = random.Random(seed)
    top = (1 << 31) - 1
    for _ in range(20000):
        d = rng.choice([rng.randint(2, 1 << rng.randint(2, 30)), 1 << rng.randint(1, 30)])
        n = rng.choice([rng.randint(0, top), top, d * (top // d), d * (top // d) - 1])
        assert divide(n, d) == n // d, (n, d)


KERNELS = """
import sys
sys.path.insert(0, PROGRAMS)
import numpy as np
from device_memory import Device
from undertow.mpi_interpose import gpu
device = Device()
user, packed = device.array(np.arange(512, dtype="u4")), device.empty(1024)
gpu.GpuPlan("(loop 256 8 (bytes 4))", 2048).pack(1, user.address, packed.address)
loads = gpu.counters()
right = bool((packed.read("u4") == np.arange(0, 512, 2)).all())
print(loads["code_loads"], loads["ptx_loads"], loads["load_us"] >= 0, right)
"""


def test_machine_code_is_loaded_where_it_was_assembled_and_ptx_where_the_driver_refuses_it(
    stand_in: Path, tmp_path: Path
) -> None:
    """By the tools at hand, which a library built without them has not; a failing one is said."""
    code = f"PROGRAMS = {str(PROGRAMS)!r}\n{KERNELS}"
    if gpu_build.binary():
        assert child(code, stand_in) == "1 0 True True\n"
        assert child(code, stand_in, UNDERTOW_MPI_GPU_BINARY="0") == "0 1 True True\n"
    assert child(code, stand_in, FAKE_CUDA_FAIL="fatbin") == "0 1 True True\n"
    for name in ("ptxas", "fatbinary"):  # tools that write what they were asked, and then ones that fail
        (tmp_path / name).write_text(
            "#!/bin/sh\nfor word; do\n"
            "case $word in --image*) ;; *.cubin) out=$word;; --create=*) out=${word#*=};; esac\ndone\n"
            "printf '\\120\\355\\125\\272' >\"$out\"\n"
        )
        (tmp_path / name).chmod(0o755)
    extra = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "UNDERTOW_MPI_CACHE": str(tmp_path / "cache")}
    asked = "from undertow.mpi_interpose import gpu_build; print(gpu_build.held_by(gpu_build.binary()))"
    assert child(asked, stand_in, **extra) == "True\n"
    (tmp_path / "ptxas").write_text("#!/bin/sh\necho cannot read this PTX >&2\nexit 1\n")
    asked = "from undertow.mpi_interpose.gpu_build import _embedded, binary; print(binary(), 'nullptr' in _embedded())"
    assert child(asked, stand_in, **{**extra, "UNDERTOW_MPI_CACHE": str(tmp_path / "other")}) == "None True\n"


@pytest.mark.skipif(gpu_kernels.find_nvcc() is None, reason="needs a CUDA compiler")
def test_the_machine_code_holds_every_kernel() -> None:
    held = gpu_build.binary()
    assert held is not None and gpu_build.held_by(held)
    images, ptx = held.read_bytes().split(b"\x7fELF")[1:], gpu_build.PTX.read_text()
    entries = set(re.findall(r"\.entry (\w+)\(", ptx))
    assert len(images) == len(gpu_build.ASSEMBLED) and "undertow_copy" in entries and len(entries) > 11
    assert all(b"\0.text." + name.encode() + b"\0" in image for name in entries for image in images)


def test_the_shipped_kernels_belong_to_their_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert gpu_kernels.main(["--check"]) == 0
    other = tmp_path / "kernels.cu"
    other.write_text(gpu_kernels.SOURCE.read_text() + "// a change")
    monkeypatch.setattr(gpu_kernels, "SOURCE", other)
    assert gpu_kernels.main(["--check"]) == 1


@pytest.mark.slow
def test_the_benchmarks_of_messages_and_collectives_are_right_by_every_way(stand_in: Path, tmp_path: Path) -> None:
    """The programs that the GPU machine runs, on the stand-in (all paths forced) and on host memory (torch's arm)."""
    install = need("mpich-wheel")
    small = {
        "mpi_gpu_collectives": ["--cells", "5", "--pencils", "8", "--transposes", "8"],
        "mpi_gpu_messages": ["--cells", "4", "--most", "4096"],
    }
    for device, way in (("driver", "staged"), ("cpu", "by hand")):
        for name, sizes in small.items():
            command = [
                sys.executable,
                "-m",
                f"undertow.benchmarks.{name}",
                *sizes,
                "--repeats",
                "6",
                "--device",
                device,
                "--output",
                str(tmp_path / device),
            ]
            out = start(install, 2, command, "auto", LD_LIBRARY_PATH=str(stand_in))
            rows = [line.split() for line in out.splitlines() if line.startswith(("halo", "pencil", "8 B"))]
            # … auto direct staged [ipc] hand kernels block and three ratios
            column = -6 if way == "by hand" else -8 if name == "mpi_gpu_collectives" else -7
            assert rows and all(float(row[column]) > 0 for row in rows), out
            assert "WRONG" not in out and "DIFFERENT" not in out
            page = (tmp_path / device / f"{name}.md").read_text()
            assert "one copy per block / ours" in page and page.count("**auto**") >= len(rows), page
