"""The probe: every number is taken or its absence explained, nothing is left behind, bad options fail first."""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch

from undertow.dist import pingpong, probe, probe_compute, probe_copies, probe_disk, probe_links, probe_spawn
from undertow.dist.errors import UserError
from undertow.dist.launch_env import Launch
from undertow.dist.machine import Machine
from undertow.dist.measure import Effort, Measurement, Skipped, median_s

CPU = torch.device("cpu")
MIB = 1 << 20


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A probe that takes each number once, of little work; its cache folder is a scratch one."""
    monkeypatch.setattr(Effort, "of", classmethod(lambda cls, quick: Effort(1, 0.0)))
    monkeypatch.setattr(probe_copies, "_QUICK_BYTES", MIB)
    monkeypatch.setattr(probe_disk, "_QUICK_BYTES", 32 * MIB)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_the_median_of_repeats_each_long_enough():
    calls = []
    seconds = median_s(lambda: (calls.append(1), time.sleep(1e-3)), Effort(3, 5e-3))
    assert seconds >= 1e-3 and 2 + 3 <= len(calls) <= 2 + 3 * 5


def test_all_but_links_are_measured_and_written(small, capsys):
    output = small / "m.json"
    options = ["--quick", "--only", "copies,disk,compute", "--output", str(output), "--disk-path", str(small)]
    assert probe.main(options) == 0
    machine = Machine.load(output)
    assert set(machine.copies) == {"host", "host_one_thread"}
    kinds = ("gemm", "gemm_backward", "attention_forward", "attention_backward")
    assert set(machine.flops) == {f"{kind}/{dtype}" for kind in kinds for dtype in ("float32", "bfloat16")}
    assert {"write_buffered", "read_buffered"} <= set(machine.disks)
    for table in (machine.copies, machine.disks, machine.flops):
        assert all(0 < value < 1e18 for value in table.values())
    assert machine.links == {} and machine.facts["torch"] == torch.__version__
    out = capsys.readouterr().out
    assert "gemm/float32" in out and "write_buffered" in out and f"written to {output}" in out
    assert sorted(path.name for path in small.iterdir()) == ["m.json"]


def test_only_keeps_the_other_numbers_and_the_default_path_is_printed(small, capsys):
    path = Machine.default_path()
    path.parent.mkdir(parents=True)
    Machine("old", copies={"host": 1.0}, flops={"gemm/float32": 5.0}).dump(path)
    assert probe.main(["--quick", "--only", "copies", "--name", "mine"]) == 0
    machine = Machine.load(path)
    assert machine.name == "mine" and machine.copies["host"] > 1.0 and machine.flops == {"gemm/float32": 5.0}
    assert str(path) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--only", "copies,gpu"], "--only 'copies,gpu'; expected some of copies,disk,links,compute"),
        (["--only", "links", "--ranks", "1"], "--ranks 1; expected 2 or more"),
        (["--output", "/nonexistent/m.json"], "cannot write /nonexistent/m.json"),
        (["--only", "disk", "--disk-path", "/nonexistent"], "cannot probe the disk at /nonexistent"),
    ],
)
def test_bad_options_are_user_errors(small, options, words):
    with pytest.raises(UserError) as caught:
        probe.main([*options, "--quick"])
    assert words in str(caught.value)


def test_an_unknown_option_is_a_usage_error(capsys):
    assert probe.main(["--bogus"]) == 2
    assert "--bogus" in capsys.readouterr().err


def test_a_broken_former_file_is_not_overwritten(small):
    path = small / "m.json"
    path.write_text("somebody's notes")
    with pytest.raises(UserError, match="cannot read the machine file"):
        probe.main(["--quick", "--only", "copies", "--output", str(path)])
    assert path.read_text() == "somebody's notes"


def test_what_cannot_be_measured_is_named(capsys):
    def fails() -> float:
        raise Skipped("no such device")

    found = probe.Findings()
    found.take([Measurement("copies", "d2d", fails), Measurement("copies", "host", lambda: 2.0)])
    assert found.copies == {"host": 2.0} and found.skipped == {"copies d2d": "no such device"}


# --- disk


def test_the_scratch_file_has_no_name_and_holds_what_was_written(tmp_path):
    scratch = probe_disk.ScratchFile(tmp_path, 16 * MIB)
    assert list(tmp_path.iterdir()) == []  # a SIGKILL from here on leaves nothing
    assert scratch.write_s(direct=False) > 0
    content = os.pread(scratch._fd, 16 * MIB, 0)
    block = scratch._block[: probe_disk.BLOCK_BYTES]
    assert content == block * 2
    assert scratch.read_s(direct=False) > 0
    scratch.close()


def test_too_little_space_is_refused_before_writing(tmp_path, monkeypatch):
    usage = probe_disk.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(probe_disk.shutil, "disk_usage", lambda path: usage._replace(free=20 * MIB))
    with pytest.raises(UserError, match="has 20.0 MiB left; expected twice the scratch file of 16.0 MiB"):
        probe_disk.ScratchFile(tmp_path, 16 * MIB)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_a_disk_that_fills_up_costs_its_numbers_only(tmp_path, monkeypatch, call):
    scratch = probe_disk.ScratchFile(tmp_path, 16 * MIB)

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(probe_disk.os, call, full)
    with pytest.raises(Skipped, match="No space left"):
        scratch.write_s(direct=False)
    monkeypatch.undo()
    scratch.close()


def test_a_file_system_without_direct_access_is_named(tmp_path, monkeypatch):
    scratch = probe_disk.ScratchFile(tmp_path, 16 * MIB)
    real_open = os.open

    def no_direct(path, flags, *args, **kwargs):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_open(path, flags, *args, **kwargs)

    monkeypatch.setattr(probe_disk.os, "open", no_direct)
    with pytest.raises(Skipped, match="O_DIRECT"):
        scratch.write_s(direct=True)
    assert scratch.write_s(direct=False) > 0
    monkeypatch.undo()
    scratch.close()


# --- copies and arithmetic


def test_a_wrong_copy_or_product_is_not_timed(monkeypatch):
    monkeypatch.setattr(torch, "equal", lambda a, b: False)
    with pytest.raises(Skipped, match="differs"):
        probe_copies._host(MIB, Effort(1, 0.0), 1)
    monkeypatch.setitem(probe_compute.TOLERANCE, torch.float32, -1.0)
    with pytest.raises(Skipped, match="the product is wrong"):
        probe_compute._gemm(32, torch.float32, CPU, Effort(1, 0.0))


# --- links


class Counter:
    """A wire that only counts."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    def message(self, nbytes: int) -> int:
        return nbytes

    def send(self, message: int) -> None:
        self.calls.append(("send", message))

    def receive(self, message: int) -> None:
        self.calls.append(("receive", message))

    def both(self, outgoing: int, incoming: int) -> None:
        self.calls.append(("both", outgoing))


@pytest.mark.parametrize("quick", [True, False])
def test_the_two_sides_of_a_ping_pong_match(quick):
    here, there = Counter(), Counter()
    samples = list(pingpong.play(here, True, quick))
    list(pingpong.play(there, False, quick))
    assert [nbytes for nbytes, _ in samples] == list(pingpong.sizes(quick))
    opposite = {"send": "receive", "receive": "send"}
    assert [(opposite[kind], nbytes) for kind, nbytes in here.calls] == there.calls
    assert here.calls[0][0] == "send"


def test_duplex_is_judged_between_one_way_and_two():
    assert pingpong.is_duplex(1.0, 1.1) and not pingpong.is_duplex(1.0, 1.9)


def links_of(rank: int, world: int) -> dict:
    launch = Launch("torchrun", rank, world, rank, world)
    return dict(probe_links.measure(launch, CPU, quick=True))


@pytest.mark.parametrize("world", [2, 3])
def test_links_within_a_job(ranks, monkeypatch, world):
    monkeypatch.setattr(pingpong, "_QUICK_SIZES", (8, 4096, 64 << 10))
    first, *others = ranks(world, links_of)
    assert set(first) == ({"gloo"} if world == 2 else {"gloo", "gloo_ring"})
    assert others == [{}] * (world - 1)
    for link in first.values():
        assert [nbytes for nbytes, _ in link.samples] == [8, 4096, 64 << 10]
        assert all(seconds > 0 for _, seconds in link.samples)


@pytest.mark.slow
def test_links_among_ranks_of_its_own(small):
    output = small / "m.json"
    assert probe.main(["--quick", "--only", "links", "--output", str(output)]) == 0
    machine = Machine.load(output)
    assert "gloo" in machine.links and ("mpi" in machine.links) == (probe_spawn.find_spec("mpi4py") is not None)


def shell(script: str) -> list[str]:
    return ["sh", "-c", script]


def test_workers_report_json_and_other_output_is_ignored():
    records = probe_spawn.run_workers(shell("""echo noise; echo '{"rank": '$RANK'}'"""), [{"RANK": "0"}, {"RANK": "1"}])
    assert records == [{"rank": 0}]


def test_a_failing_worker_ends_the_others_and_is_quoted(tmp_path):
    fails = 'if [ "$RANK" = 1 ]; then echo "ValueError: no link" >&2; echo bye >&2; exit 3; fi'
    script = f"{fails}; sleep 60 & echo $! > {tmp_path}/child; wait"
    environments = [{"RANK": str(rank), "PATH": os.environ["PATH"]} for rank in range(2)]
    with pytest.raises(Skipped, match="ValueError: no link"):
        probe_spawn.run_workers(shell(f"sleep 0.2; {script}"), environments)
    wait_gone(tmp_path / "child")


def test_a_silent_worker_is_ended_with_its_children(tmp_path):
    with pytest.raises(Skipped, match="no result within 0.3 s"):
        script = shell(f"sleep 60 & echo $! > {tmp_path}/child; wait")
        probe_spawn.run_workers(script, [dict(os.environ)], timeout_s=0.3)
    wait_gone(tmp_path / "child")


def wait_gone(file: Path) -> None:
    """The process whose id is in `file` (if it came so far) must end."""
    pid = int(file.read_text() or 0) if file.exists() else 0
    gone = threading.Event()
    for _ in range(2400):
        if not pid or not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return
        gone.wait(0.05)
    pytest.fail(f"process {pid} is still there")


def test_launcher_variables_do_not_reach_the_workers(monkeypatch):
    for name in ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "MASTER_PORT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    clean = probe_spawn.clean_environment()
    assert "CUDA_VISIBLE_DEVICES" in clean
    assert not [name for name in clean if name.startswith(("RANK", "SLURM", "OMPI", "PMI", "MASTER", "TORCHELASTIC"))]


def test_no_mpi_is_named(monkeypatch):
    monkeypatch.setattr(probe_spawn, "find_spec", lambda name: None)
    with pytest.raises(Skipped, match=r"mpi4py is not installed: pip install 'undertow\[mpi\]'"):
        probe_spawn.mpi_link(quick=True)
