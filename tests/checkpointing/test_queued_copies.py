"""Copies that are queued, as on a device: a thread of ours issues them, and whoever needs them waits for them."""

from __future__ import annotations

import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from ckpt_job import HeldOps

from undertow.checkpointing import Checkpointer, explain, host_tier, live
from undertow.checkpointing.copies import HostCopier
from undertow.checkpointing.folder import read_manifest
from undertow.checkpointing.reader import Reader

LAYERS, WIDTH = 6, 320  # 400 KiB each: copied lazily
PARKED: dict[str, Any] = {"arena_bytes": 5 * 2**20, "device_bytes": 3 * 2**20}  # of eight chunks of 1 MiB


class Queue(HostCopier):
    """What a stream is to a device: copies and marks in one row, done when somebody waits for a mark behind them."""

    queues, chunks_at_once = True, 2

    def __init__(self) -> None:
        self.row: list = []
        self.done = self.calls = 0
        self.threads: set[str] = set()
        self.lock = threading.RLock()
        self.open = threading.Event()
        self.open.set()

    def copy(self, target, source, nbytes):
        with self.lock:
            self.row.append((target, source, nbytes))

    def copy_many(self, targets, sources, sizes):
        self.calls += 1
        self.threads.add(threading.current_thread().name)
        super().copy_many(targets, sources, sizes)

    def mark(self):
        return len(self.row)

    def wait(self, mark):
        self.open.wait()
        with self.lock:
            while self.done < mark:
                HostCopier.copy(self, *self.row[self.done])
                self.done += 1

    def order_after(self, mark):
        self.wait(mark)

    def bring(self, flag):
        return flag, self.mark()


@pytest.fixture
def queue(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(host_tier, "SHARED_MEMORY", tmp_path_factory.mktemp("memory"))  # which nobody clears
    one = Queue()
    monkeypatch.setattr(live, "copier_for", lambda tensors: one)
    return one


def make(groups=1):
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[torch.nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)])
    held = list(model.parameters())
    size = len(held) // groups
    parts = [{"params": held[begin : begin + size]} for begin in range(0, len(held), size)]
    return model, torch.optim.AdamW(parts, lr=1e-2, foreach=True)


def train(model, optimizer):
    optimizer.zero_grad()
    model(torch.randn(2, WIDTH)).pow(2).mean().backward()
    optimizer.step()


def tensors(model, optimizer):
    names = {id(p): n for n, p in model.named_parameters()}
    found = {f"model.{n}": v.detach().clone() for n, v in model.state_dict().items()}
    for p, state in optimizer.state.items():
        found |= {f"optimizer.state.{names[id(p)]}.{k}": v.clone() for k, v in state.items()}
    return found


def stored(folder, step):
    path = folder.final(step)
    manifest = read_manifest(path)
    reader = Reader(path, manifest)
    return {key: reader.shard(key, record.shards[0]) for key, record in manifest.tensors.items()}


@pytest.mark.parametrize("parked", [0, 3 * 2**20, 2**30])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("disk", [False, True])
def test_queued_copies_are_exact(tmp_path, queue, groups, disk, parked):
    model, optimizer = make(groups)
    train(model, optimizer)
    expected = {}
    ways: dict[str, Any] = {"every": 1, "keep": None} if disk else {"host_every": 1}
    ways["device_bytes"] = parked
    with Checkpointer(tmp_path, model=model, optimizer=optimizer, chunk_bytes=2**20, **ways) as ckpt:
        for step in range(5):
            expected = tensors(model, optimizer)
            ckpt.step(step)
            train(model, optimizer)
        assert all(report.ok for report in ckpt.wait()), ckpt.reports
        found = stored(ckpt.folder if disk else ckpt._tiers.folders[0], 4)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items())
        assert ("are parked there" in ckpt.explain()) == bool(parked)
    if not disk and groups == 1:
        assert queue.calls == 5 if not parked else 5 < queue.calls <= 15  # everything at once, but what is parked


def test_a_write_to_what_was_queued_fails_the_save(tmp_path, queue):
    """The version counter tells it, though the samples were taken again before."""
    model, optimizer = make()
    train(model, optimizer)
    with Checkpointer(tmp_path, model=model, optimizer=optimizer, host_every=1) as ckpt:
        queue.open.clear()
        ckpt.step(0)
        with torch.no_grad():
            model[2].weight[7, 7] += 1.0  # nobody samples there
        queue.open.set()
        report = ckpt.wait()[-1]
        assert not report.ok and "written while it was being copied" in report.reason
        ckpt.step(1)
        train(model, optimizer)
        assert ckpt.wait()[-1].ok


def test_the_training_thread_does_not_issue_them(tmp_path, queue):
    model, optimizer = make()
    train(model, optimizer)
    with Checkpointer(tmp_path, model=model, optimizer=optimizer, host_every=1) as ckpt:
        ckpt.step(0)
        until = threading.Event()
        while not queue.calls:
            until.wait(0.001)
        assert queue.threads == {"undertow-copier"}
        assert ckpt.wait()[-1].ok


@pytest.mark.parametrize("groups", [1, 3])
def test_parked_chunks_leave_while_training_goes_on(tmp_path, queue, groups):
    """The disk is held, and the arena has room for what is not parked: neither step nor the next save waits for it."""
    model, optimizer = make(groups)
    train(model, optimizer)
    ops, expected = HeldOps(), []
    options: dict[str, Any] = {"chunk_bytes": 2**20, "keep": None, "ops": ops}
    with Checkpointer(tmp_path, model=model, optimizer=optimizer, **options, **PARKED) as ckpt:
        for step in range(2):
            expected.append(tensors(model, optimizer))
            ckpt.save(step)
            if step == 0:
                snapshot = ckpt._fences.current
                train(model, optimizer)
                assert snapshot is not None and snapshot._parking is not None  # not all has left
        ops.let_go.set()
        train(model, optimizer)
        assert all(report.ok for report in ckpt.wait()), ckpt.reports
        for step, values in enumerate(expected):
            found = stored(ckpt.folder, step)
            assert all(torch.equal(found[key], value) for key, value in values.items()), step


def test_a_save_that_fails_gives_its_parking_back(tmp_path, queue):
    class Full(HeldOps):
        """Writes fail as long as they are held."""

        def pwrite(self, handle, data, offset):
            if not self.let_go.is_set():
                raise OSError(28, "No space left on device")
            super().pwrite(handle, data, offset)

    model, optimizer = make()
    train(model, optimizer)
    options: dict[str, Any] = {"chunk_bytes": 2**20, "ops": Full()}
    with Checkpointer(tmp_path, model=model, optimizer=optimizer, **options, **PARKED) as ckpt:
        for step in range(2):
            ckpt.save(step)
            train(model, optimizer)
        assert [report.ok for report in ckpt.wait()] == [False, False]
        options["ops"].let_go.set()
        expected = tensors(model, optimizer)
        ckpt.save(2)
        train(model, optimizer)
        assert ckpt.wait()[-1].ok
        found = stored(ckpt.folder, 2)
        assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_the_parking_goes_with_the_plan_and_with_close(tmp_path, queue):
    model, optimizer = make()
    with Checkpointer(tmp_path, model=model, optimizer=optimizer, chunk_bytes=2**20, **PARKED) as ckpt:
        ckpt.save(0)
        memory = weakref.ref(ckpt._budget.park._memory)
        train(model, optimizer)  # the optimizer's state comes
        ckpt.save(1)
        train(model, optimizer)
        assert all(report.ok for report in ckpt.wait()), ckpt.reports
        assert memory() is None
        memory = weakref.ref(ckpt._budget.park._memory)
    assert memory() is None


@pytest.mark.parametrize("parked", [0, 3 * 2**20])
def test_explain_names_the_device_where_saves_hold_steps_up(tmp_path, queue, monkeypatch, parked):
    model, optimizer = make()
    train(model, optimizer)
    options = PARKED | {"device_bytes": parked}
    with Checkpointer(tmp_path, model=model, optimizer=optimizer, chunk_bytes=2**20, **options) as ckpt:
        ckpt.save(0)
        assert ckpt.wait()[-1].ok
        for late_s in (1e9, 0.0):
            monkeypatch.setattr(explain, "LATE_S", late_s)
            text = ckpt.explain()
            assert ("held up steps" in text) == (not parked and not late_s)
            assert ("are parked there" in text) == bool(parked)
