"""What the device pack is compared with: copies of the driver, of torch and of cupy, and a re-implemented paper scheme.

Each arm is a callable that queues one pack (or unpack) on the current stream. `make` returns those that can express the
layout: cudaMemcpy2D and 3D know two and three dimensions, the paper's kernels up to three.

The paper's scheme (TEMPI, section on packing kernels), written from its description: one kernel per number of
dimensions, a thread block shaped after the object (words of a block along x, blocks along y, the outer dimension along
z or in a loop), word of at most 8 bytes chosen by the block's length and start alone.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from undertow.mpi_interpose import gpu, gpu_kernels

PAPER = r"""
template <class W, bool kPack>
__device__ void copy(char* packed, char* user, unsigned words, unsigned n1, long s1, unsigned n2, long s2) {
  for (unsigned z = blockIdx.z * blockDim.z + threadIdx.z; z < n2; z += gridDim.z * blockDim.z)
    for (unsigned y = blockIdx.y * blockDim.y + threadIdx.y; y < n1; y += gridDim.y * blockDim.y)
      for (unsigned x = blockIdx.x * blockDim.x + threadIdx.x; x < words; x += gridDim.x * blockDim.x) {
        W* p = reinterpret_cast<W*>(packed) + (size_t(z) * n1 + y) * words + x;
        W* u = reinterpret_cast<W*>(user + z * s2 + y * s1) + x;
        if (kPack) *p = *u; else *u = *p;
      }
}
#define MAKE(W, name) \
  extern "C" __global__ void pack_##name(char* p, char* u, unsigned w, unsigned n1, long s1, unsigned n2, long s2) \
  { copy<W, true>(p, u, w, n1, s1, n2, s2); } \
  extern "C" __global__ void unpack_##name(char* p, char* u, unsigned w, unsigned n1, long s1, unsigned n2, long s2) \
  { copy<W, false>(p, u, w, n1, s1, n2, s2); }
MAKE(unsigned char, 1) MAKE(unsigned short, 2) MAKE(unsigned int, 4) MAKE(unsigned long long, 8)
"""


@dataclass(frozen=True)
class Layout:
    """Blocks of `block` bytes repeated by `dims` = ((count, byte stride), …), outermost first; or a table of blocks."""

    name: str
    block: int
    dims: tuple[tuple[int, int], ...] = ()
    offsets: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        total = self.block * (len(self.offsets) or 1)
        for count, _ in self.dims:
            total *= count
        return total

    @property
    def span(self) -> int:
        if self.offsets:
            return max(self.offsets) + self.block
        return self.block + sum((count - 1) * stride for count, stride in self.dims)

    def ir(self) -> str:
        if self.offsets:
            return "(runs" + "".join(f" {offset} {self.block}" for offset in self.offsets) + ")"
        text = f"(bytes {self.block})"
        for count, stride in reversed(self.dims):
            text = f"(loop {count} {stride} {text})"
        return text


class Driver:
    """The few driver calls of the rivals, through ctypes."""

    def __init__(self) -> None:
        self.cuda = ctypes.CDLL("libcuda.so.1")
        nvcc = gpu_kernels.find_nvcc()
        self.module = ctypes.c_void_p()
        self.functions: dict[str, ctypes.c_void_p] = {}
        if nvcc:
            with tempfile.TemporaryDirectory() as folder:
                source, target = Path(folder) / "paper.cu", Path(folder) / "paper.ptx"
                source.write_text(PAPER)
                major, minor = torch.cuda.get_device_capability()
                arch = f"-arch=compute_{major}{minor}"
                subprocess.run([nvcc, "-O3", arch, "-ptx", str(source), "-o", str(target)], check=True)
                torch.cuda.current_stream().synchronize()
                image = target.read_bytes() + b"\0"
            self.must(self.cuda.cuModuleLoadData(ctypes.byref(self.module), image))

    @staticmethod
    def must(result: int) -> None:
        if result:
            raise RuntimeError(f"CUDA driver error {result}")

    def function(self, name: str) -> ctypes.c_void_p:
        if name not in self.functions:
            made = ctypes.c_void_p()
            self.must(self.cuda.cuModuleGetFunction(ctypes.byref(made), self.module, name.encode()))
            self.functions[name] = made
        return self.functions[name]

    def paper(self, layout: Layout, user: int, packed: int, packing: bool) -> Callable[[], object] | None:
        dims = layout.dims
        if layout.offsets or not 1 <= len(dims) <= 2 or not self.module:
            return None
        word = next(w for w in (8, 4, 2, 1) if layout.block % w == 0)
        words, (n1, s1) = layout.block // word, dims[-1]
        n2, s2 = dims[0] if len(dims) == 2 else (1, 0)
        x = min(512, 1 << (words - 1).bit_length())
        y = min(512 // x, 1 << (n1 - 1).bit_length())
        z = min(512 // (x * y), 64, 1 << (n2 - 1).bit_length())
        grid = (-(-words // x), min(65535, -(-n1 // y)), min(65535, -(-n2 // z)))
        function = self.function(f"{'pack' if packing else 'unpack'}_{word}")
        values = (
            ctypes.c_uint64(packed), ctypes.c_uint64(user), ctypes.c_uint(words), ctypes.c_uint(n1),
            ctypes.c_long(s1), ctypes.c_uint(n2), ctypes.c_long(s2),
        )  # fmt: skip
        arguments = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))

        def run(_keep: tuple = values) -> None:
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            self.must(self.cuda.cuLaunchKernel(function, *grid, x, y, z, 0, stream, arguments, None))

        return run

    def memcpy(self, layout: Layout, user: int, packed: int, packing: bool) -> Callable[[], object] | None:
        """cuMemcpy2DAsync, or 3D when the outer stride is a multiple of the inner one (a pitch must divide it)."""
        dims = layout.dims
        if layout.offsets or not 1 <= len(dims) <= 2 or dims[-1][1] < layout.block:
            return None
        (n1, s1), depth, height = dims[-1], 1, 0
        if len(dims) == 2:
            depth = dims[0][0]
            if dims[0][1] % s1 or dims[0][1] // s1 < n1:
                return None
            height = dims[0][1] // s1
        strided, dense = (user, s1, height or n1), (packed, layout.block, n1)
        source, target = (strided, dense) if packing else (dense, strided)
        record = _copy3d(source, target, (layout.block, n1, depth))

        def run(_keep: ctypes.Array = record) -> None:
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            self.must(self.cuda.cuMemcpy3DAsync_v2(record, stream))

        return run


def _copy3d(source: tuple[int, int, int], target: tuple[int, int, int], extent: tuple[int, int, int]) -> ctypes.Array:
    """A CUDA_MEMCPY3D with device memory on both sides: 25 words of 8 bytes, as cuda.h lays it out."""
    device = 2
    words = (ctypes.c_uint64 * 25)()
    for base, (address, pitch, height) in ((0, source), (11, target)):
        # xInBytes, y, z, lod; memory type; host, device, array; reserved; pitch; height
        words[base + 4], words[base + 6], words[base + 9], words[base + 10] = device, address, pitch, height
    words[22], words[23], words[24] = extent
    return words


_TYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


def _word(layout: Layout, user: torch.Tensor) -> int:
    numbers = [user.storage_offset(), layout.block, *(stride for _, stride in layout.dims)]
    return next(w for w in (16, 8, 4, 2, 1) if all(number % w == 0 for number in numbers))


def views(layout: Layout, user: torch.Tensor, packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(the strided view of the user's bytes, the packed side of the same shape), in the largest element that fits."""
    if layout.offsets:
        word = next(w for w in (16, 8, 4, 2, 1) if layout.block % w == 0 and all(o % w == 0 for o in layout.offsets))
        raise ValueError(f"a table of blocks has no strided view (word {word})")
    word = _word(layout, user)
    shape = [*(count for count, _ in layout.dims), layout.block // word]
    strides = [*(stride // word for _, stride in layout.dims), 1]
    typed = _TYPES[word]
    whole = user[: user.numel() // word * word].view(typed)
    return torch.as_strided(whole, shape, strides), packed[: layout.size].view(typed).view(shape)


def kind_of(pieces: str) -> str:
    """What a plan with these pieces (GpuPlan.describe) is to the kernels: 'single piece', 'transpose' or ''."""
    lines = pieces.splitlines()
    if len(lines) != 1:
        return ""
    return "transpose" if lines[0].startswith("transpose") else "single piece"


def make(
    layout: Layout, user: torch.Tensor, packed: torch.Tensor, packing: bool, driver: Driver
) -> dict[str, Callable[[], object]]:
    """The arms by name; 'ours' first. `user` holds the layout's span, `packed` its size, both uint8 on the device.

    `older` is ours with the kernels that serve any piece, which were there before those for one.
    """
    plan = gpu.GpuPlan(layout.ir(), layout.span)
    at, to = user.data_ptr(), packed.data_ptr()

    def ours(kernel: str) -> Callable[[], object]:
        def run() -> None:
            gpu.use_kernel(kernel)
            plan.enqueue(1, at, to, packing, torch.cuda.current_stream().cuda_stream)

        return run

    arms = {"ours": ours("")}
    arms["again"] = arms["ours"]
    if kind_of(plan.describe(1, at, to)):
        arms["older"] = ours("general")
    for name, arm in (("memcpy", driver.memcpy), ("paper", driver.paper)):
        made = arm(layout, at, to, packing)
        if made:
            arms[name] = made
    if layout.offsets:
        arms["torch"] = _indexed(layout, user, packed, packing)
        return arms
    view, dense = views(layout, user, packed)
    arms["torch"] = (lambda: dense.copy_(view)) if packing else (lambda: view.copy_(dense))
    try:
        import cupy
    except ImportError:
        return arms
    theirs, flat = (cupy.from_dlpack(tensor.detach()) for tensor in (view, dense))

    def copy() -> None:
        with cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
            cupy.copyto(flat, theirs) if packing else cupy.copyto(theirs, flat)

    arms["cupy"] = copy
    return arms


def _indexed(layout: Layout, user: torch.Tensor, packed: torch.Tensor, packing: bool) -> Callable[[], object]:
    """A gather or scatter by torch's index_select and index_copy_, with the index ready on the device."""
    word = next(w for w in (8, 4, 2, 1) if layout.block % w == 0 and all(o % w == 0 for o in layout.offsets))
    typed = _TYPES[word]
    offsets = torch.tensor(layout.offsets, device=user.device)[:, None] // word
    index = (offsets + torch.arange(layout.block // word, device=user.device)[None, :]).reshape(-1)
    whole, dense = user[: user.numel() // word * word].view(typed), packed[: layout.size].view(typed)
    if packing:
        return lambda: torch.index_select(whole, 0, index, out=dense)
    return lambda: whole.index_copy_(0, index, dense)
