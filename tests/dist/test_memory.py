"""Memory: numbers move as the memory does, and a container's limit is respected."""

from __future__ import annotations

import mmap

import numpy as np
import psutil
import torch

from undertow.dist import memory

MIB = 1 << 20


def touch(nbytes: int) -> np.ndarray:
    """Pages of its own: an allocator would hand out pages that are resident already, where it has some left."""
    block = np.frombuffer(mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=np.uint8)
    block[::4096] = 1
    return block


def resident(rank: int, world: int) -> dict[str, memory.Memory | bool]:
    """In a process of its own: the peak must follow an allocation, and a reset must forget it."""
    before = memory.read()
    block = touch(64 * MIB)
    during = memory.read()
    del block
    after = memory.read()
    reset = memory.reset_peak()
    return {"before": before, "during": during, "after": after, "reset": reset, "anew": memory.read()}


def test_rss_and_its_peak(ranks):
    seen = ranks(1, resident)[0]
    assert seen["during"].rss - seen["before"].rss >= 63 * MIB
    assert seen["during"].pss - seen["before"].pss >= 63 * MIB
    assert seen["after"].rss - seen["before"].rss < 32 * MIB
    assert seen["after"].peak_rss >= seen["during"].rss - MIB
    if seen["reset"]:
        assert seen["anew"].peak_rss < seen["after"].peak_rss - 32 * MIB
    assert seen["before"].device_allocated == seen["before"].pinned == 0


def test_pss_can_be_left_out():
    assert memory.read().pss and memory.read(pss=False).pss is None
    assert memory.read(pss=False).rss > 0


def shared_block(rank: int, world: int) -> tuple[int, int]:
    before = memory.read()
    block = mmap.mmap(-1, 32 * MIB)  # anonymous, shared
    for offset in range(0, 32 * MIB, 4096):
        block[offset] = 1
    after = memory.read()
    block.close()
    return (after.shared or 0) - (before.shared or 0), after.rss - before.rss


def test_shared_memory_is_told_apart(ranks):
    shared, rss = ranks(1, shared_block)[0]
    assert shared >= 31 * MIB and rss >= 31 * MIB


def test_free_bytes_is_at_most_what_the_host_has():
    assert 0 < memory.free_bytes() <= psutil.virtual_memory().total
    assert memory.free_bytes(torch.device("cpu")) > 0


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


def test_every_cgroup_level_limits_v2(tmp_path):
    write(tmp_path / "job", memory__max=1000, memory__current=900, memory__stat="anon 5\ninactive_file 300\nfile 9")
    write(tmp_path / "job" / "step", memory__max="max", memory__current=100)
    (tmp_path / "me").write_text("0::/job/step\n")
    assert memory._cgroup_free(tmp_path, tmp_path / "me") == [400]
    write(tmp_path / "job" / "step", memory__max=150, memory__current=160)
    assert memory._cgroup_free(tmp_path, tmp_path / "me") == [0, 400]


def test_cgroup_v1(tmp_path):
    write(tmp_path / "memory" / "job", memory__limit_in_bytes=5000, memory__usage_in_bytes=1000)
    write(tmp_path / "memory", memory__limit_in_bytes=9223372036854771712, memory__usage_in_bytes=1000)
    (tmp_path / "me").write_text("5:devices:/\n4:cpu,memory:/job\n0::/\n")
    assert memory._cgroup_free(tmp_path, tmp_path / "me") == [4000]


def test_no_cgroup_files_mean_no_limit(tmp_path):
    assert memory._cgroup_free(tmp_path, tmp_path / "absent") == []
