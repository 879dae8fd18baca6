"""When to save, what to keep, where to copy it, and who is told."""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import shutil
import threading
from dataclasses import replace

import pytest
import torch

from undertow.checkpointing import Checkpointer, Frequency, Mirror, Retention, reports
from undertow.checkpointing.coordinate import Coordinator
from undertow.checkpointing.due import Due
from undertow.checkpointing.files import FileOps
from undertow.checkpointing.folder import read_manifest
from undertow.checkpointing.frequency import young_daly
from undertow.checkpointing.manifest import metrics_of
from undertow.checkpointing.observe import PrometheusFile, TensorBoardScalars
from undertow.checkpointing.save import SaveReport
from undertow.checkpointing.slowdown import StepClock
from undertow.dist.errors import UserError
from undertow.dist.trace import Trace


def pair():
    torch.manual_seed(0)
    model = torch.nn.Linear(16, 16)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def train(ckpt, model, optimizer, steps, metric=None):
    for step in steps:
        ckpt.step(step, metrics=None if metric is None else {"loss": metric(step)})
        model(torch.ones(2, 16)).square().sum().backward()
        optimizer.step()
        ckpt.wait()


def kept(root):
    return [int(path.name.split("-")[1]) for path in sorted(root.glob("step-*"))]


# -- retention -------------------------------------------------------------------------------------------------------


def test_the_best_by_a_metric_stay_and_metrics_are_stored(tmp_path):
    model, optimizer = pair()
    losses = {0: 5.0, 1: 1.0, 2: 3.0, 3: 0.5, 4: 4.0, 5: 6.0}
    policy = Retention(last=1, best=2, metric="loss")
    with Checkpointer(tmp_path / "c", model=model, optimizer=optimizer, every=1, keep=policy) as ckpt:
        train(ckpt, model, optimizer, range(6), losses.get)
    assert kept(tmp_path / "c") == [1, 3, 5]
    assert metrics_of(read_manifest(tmp_path / "c" / "step-000000003")) == {"loss": 0.5}
    # another process goes on with the same policy, and knows the older metrics from the manifests
    with Checkpointer(tmp_path / "c", model=model, optimizer=optimizer, every=1, keep=policy) as ckpt:
        train(ckpt, model, optimizer, range(6, 8), {6: 0.1, 7: 9.0}.get)
    assert kept(tmp_path / "c") == [3, 6, 7]


# -- the mirror ------------------------------------------------------------------------------------------------------


def test_the_mirror_gets_every_kth_and_a_lost_disk_is_restored_from_it(tmp_path):
    model, optimizer = pair()
    options = {"every": 2, "keep": 1, "mirror": Mirror(tmp_path / "far", every=4)}
    with Checkpointer(tmp_path / "near", model=model, optimizer=optimizer, **options) as ckpt:
        train(ckpt, model, optimizer, range(11))
        assert {(r.step, r.ok) for r in ckpt.reports if r.tier == "mirror"} == {(0, True), (4, True), (8, True)}
        at_8 = [name for name in kept(tmp_path / "far")]
    assert at_8 == [0, 4, 8] and kept(tmp_path / "near") == [10]
    for name in ("__0_0.distcp", "__0_1.distcp", ".metadata"):
        assert (tmp_path / "far" / "step-000000008" / name).is_file()
    shutil.rmtree(tmp_path / "near")
    again, other = pair()
    with Checkpointer(tmp_path / "near", model=again, optimizer=other, **options) as ckpt:
        assert ckpt.restore() == 8


def test_the_mirrors_bytes_are_the_disks(tmp_path):
    model, optimizer = pair()
    with Checkpointer(
        tmp_path / "near", model=model, optimizer=optimizer, every=1, keep=None, mirror=Mirror(tmp_path / "far")
    ) as ckpt:
        train(ckpt, model, optimizer, range(3))
    for step in range(3):
        near, far = (tmp_path / place / f"step-{step:09d}" for place in ("near", "far"))
        assert (near / "__0_0.distcp").read_bytes() == (far / "__0_0.distcp").read_bytes()


def test_damage_on_the_disk_does_not_travel_on(tmp_path, monkeypatch):
    """A byte comes back flipped when the mirror reads: it refuses, the disk's checkpoint stands, training goes on."""
    from undertow.checkpointing import mirror as room

    real = room._read

    def flipped(handle, view, offset):
        real(handle, view, offset)
        view[len(view) // 2] ^= 1

    monkeypatch.setattr(room, "_read", flipped)
    model, optimizer = pair()
    with Checkpointer(
        tmp_path / "near", model=model, optimizer=optimizer, every=1, mirror=Mirror(tmp_path / "far")
    ) as ckpt:
        train(ckpt, model, optimizer, range(1))
        (report,) = [r for r in ckpt.reports if r.tier == "mirror"]
        assert not report.ok and "has changed on the disk" in report.reason
        assert [r.ok for r in ckpt.reports if r.tier == "disk"] == [True]
    assert kept(tmp_path / "far") == [] and kept(tmp_path / "near") == [0]


def test_the_mirror_starts_while_the_disk_still_writes(tmp_path):
    """The disk stops after a few chunks: the mirror has them already, and commits when the rest has come."""

    class Gate(FileOps):
        def __init__(self) -> None:
            super().__init__(direct=False)
            self.far, self.go, self.near = threading.Semaphore(0), threading.Event(), 0

        def pwrite(self, handle, data, offset):
            target = os.readlink(f"/proc/self/fd/{handle}")
            if "/near/" in target and ".distcp" in target:
                self.near += 1
                assert self.near <= 3 or self.go.wait(240)
            super().pwrite(handle, data, offset)
            if "/far/" in target:
                self.far.release()

    model, ops = torch.nn.Linear(300, 300), Gate()
    optimizer = torch.optim.SGD(model.parameters())
    options = {"ops": ops, "chunk_bytes": 65536, "writers": 1, "mirror": Mirror(tmp_path / "far")}
    with Checkpointer(tmp_path / "near", model=model, optimizer=optimizer, **options) as ckpt:
        ckpt.save(0)
        assert all(ops.far.acquire(timeout=240) for _ in range(3)) and not ops.go.is_set()
        ops.go.set()
        assert {(r.tier, r.ok) for r in ckpt.wait()} == {("disk", True), ("mirror", True)}


def test_several_ranks_mirror_together(ranks, tmp_path):
    def job(rank, world):
        model, optimizer = pair()
        with Checkpointer(
            tmp_path / "near", model=model, optimizer=optimizer, every=1, mirror=Mirror(tmp_path / "far", every=2)
        ) as ckpt:
            train(ckpt, model, optimizer, range(5))
            return [(r.step, r.ok) for r in ckpt.reports if r.tier == "mirror"]

    assert ranks(3, job) == [[(0, True), (2, True), (4, True)]] * 3
    assert kept(tmp_path / "far") == [0, 2, 4]


@pytest.mark.parametrize("wrong", [{"every": 0}, {"keep": 0}])
def test_a_wrong_mirror(tmp_path, wrong):
    with pytest.raises(UserError):
        Mirror(tmp_path, **wrong)


def test_a_mirror_of_somebody_else_is_refused_and_the_folder_is_given_back(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "thesis.tex").write_text("precious")
    model, _ = pair()
    with pytest.raises(UserError, match="holds other files"):
        Checkpointer(tmp_path / "near", model=model, mirror=Mirror(tmp_path / "far"))
    Checkpointer(tmp_path / "near", model=model).close()


# -- frequency -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cost_s", "mtbf_s"), [(0.01, 3600.0), (1.0, 3600.0), (10.0, 86400.0), (100.0, 86400.0)])
def test_the_interval_loses_least(cost_s, mtbf_s):
    """Daly's model of the whole running time has its minimum there: nothing 5 % beside it is better by 1e-4."""

    def slowdown(interval_s):  # Daly 2006, eq. 20 without restart time
        return mtbf_s * (math.exp((interval_s + cost_s) / mtbf_s) - 1) / interval_s

    best = young_daly(cost_s, mtbf_s)
    assert slowdown(best) <= min(slowdown(best * f) for f in (0.5, 0.8, 1.25, 2.0))
    assert slowdown(best) <= min(slowdown(best * f) for f in (0.95, 1.05)) * (1 + 1e-4)


def test_the_longest_bound_counts():
    policy = Frequency(mtbf_s=3600, overhead=0.01)
    assert policy.interval_s(stall_s=0.001, commit_s=60) == 60
    assert policy.interval_s(stall_s=2.0, commit_s=1) == 200
    assert policy.interval_s(stall_s=0.01, commit_s=1) == pytest.approx(math.sqrt(72), rel=0.01)
    assert policy.steps(stall_s=0.001, commit_s=60, step_s=0.5) == 120
    assert policy.steps(stall_s=0.0, commit_s=0.0, step_s=0.5) == 1
    assert "by time to commit" in policy.explain(stall_s=0.001, commit_s=60, step_s=0.5)


@pytest.mark.parametrize(("slowdown_s", "steps"), [(None, 1), (0.001, 1), (0.0059, 2), (0.0299, 10)])
@pytest.mark.parametrize("tier", ["host", "partner"])
def test_steps_that_a_save_makes_longer_are_its_cost(tier, slowdown_s, steps, monkeypatch):
    """A save that blocks for a millisecond, in steps of a tenth of a second: more than 3 % it must not cost."""
    now_s = iter(x / 10 for x in range(10_000))
    monkeypatch.setattr("undertow.checkpointing.due.time.monotonic", lambda: next(now_s))
    report = SaveReport(0, tier, True, "", 1, 0.0005, 0.0005, 0.01, 0.01, slowdown_s)
    due = Due(
        Frequency(mtbf_s=1.0, overhead=0.03, first=3), tier, Coordinator.from_default_group(timeout_s=1), timeout_s=1
    )
    saved = []
    for step in range(200):
        if due.is_due(step):
            saved.append(step)
            due.saved(step, [report, replace(report, tier="disk", slowdown_s=9.0)])
    assert saved[0] == 3 and {b - a for a, b in itertools.pairwise(saved)} == {steps}
    assert f"{tier}: every {steps} steps" in due.reason


@pytest.mark.parametrize("tier", ["disk", "host"])
def test_all_ranks_save_the_same_steps_by_rank_0s_clock(ranks, tmp_path, tier):
    def job(rank, world):
        model, optimizer = pair()
        policy = Frequency(mtbf_s=0.5, overhead=1.0, first=2)
        options = {"every": policy} if tier == "disk" else {"host_every": policy}
        with Checkpointer(tmp_path / "c", model=model, optimizer=optimizer, keep=None, **options) as ckpt:
            for step in range(100_000):  # how many steps lie between saves is the clock's affair
                train(ckpt, model, optimizer, [step])
                if len(ckpt.reports) == 3:
                    break
            return sorted(r.step for r in ckpt.reports), [r.ok for r in ckpt.reports]

    ends = ranks(3, job)
    assert all(end == ends[0] for end in ends)
    steps, fine = ends[0]
    assert all(fine) and steps[0] == 2 and len(steps) == 3
    assert kept(tmp_path / "c") == (steps if tier == "disk" else [])


def test_after_a_rollback_the_interval_counts_from_there(tmp_path):
    """The next save is due an interval after the step that was gone back to, not after the last one of the branch."""
    model, optimizer = pair()
    options = {"every": Frequency(first=50), "keep": None}
    with Checkpointer(tmp_path / "c", model=model, optimizer=optimizer, **options) as ckpt:
        ckpt.save(10)
        ckpt.wait()
        assert ckpt.step(200)  # steps that do not follow each other tell nothing, so every 50 as at first
        ckpt.wait()
        assert ckpt.restore(10) == 10
        assert [step for step in range(11, 100) if ckpt.step(step)][0] == 61


@pytest.mark.parametrize("wrong", [{"mtbf_s": 0}, {"overhead": 0}, {"overhead": 2}, {"first": 0}])
def test_a_wrong_frequency(wrong):
    with pytest.raises(UserError):
        Frequency(**wrong)


# -- observers -------------------------------------------------------------------------------------------------------


class Writer:
    def __init__(self):
        self.seen = []

    def add_scalar(self, name, value, step):
        self.seen.append((name, value, step))


def test_prometheus_and_tensorboard_see_every_save(tmp_path):
    model, optimizer = pair()
    writer = Writer()
    observers = [PrometheusFile(tmp_path / "undertow.prom", job="a"), TensorBoardScalars(writer)]
    options = {"every": 1, "observers": observers, "trace": Trace(tmp_path / "trace.json")}
    with Checkpointer(tmp_path / "c", model=model, optimizer=optimizer, **options) as ckpt:
        train(ckpt, model, optimizer, range(3))
        nbytes, image = sum(report.nbytes for report in ckpt.reports), ckpt._live.plan.image
    text = (tmp_path / "undertow.prom").read_text()
    assert 'undertow_checkpoint_saves_total{job="a",ok="true",tier="disk"} 3.0' in text
    assert 'undertow_checkpoint_step{job="a",tier="disk"} 2.0' in text
    written = next(line for line in text.splitlines() if line.startswith("undertow_checkpoint_bytes_total{"))
    assert float(written.split()[-1]) == nbytes
    arena = [value for name, value, _ in writer.seen if name == "checkpoint/disk/arena_bytes"]
    assert arena == [image.chunks * image.chunk_bytes] * 3  # one chunk: in use from its copy to its write
    options["trace"].close()
    events = json.loads((tmp_path / "trace.json").read_text().rstrip().rstrip(",") + "]")
    assert {event["args"]["value"] for event in events if event["name"] == "arena_bytes"} <= {0.0, *arena}
    assert any(event["name"] == "arena_bytes" for event in events)
    assert {step for _, _, step in writer.seen} == {0, 1, 2}
    assert {name for name, _, _ in writer.seen} >= {"checkpoint/disk/stall_ms", "checkpoint/disk/commit_s"}


def test_a_long_run_does_not_keep_every_report(monkeypatch):
    """The newest stay, and how many failed is counted over all."""
    monkeypatch.setattr(reports, "KEPT", 10)
    kept = reports.Reports([], StepClock(), lambda: 0)
    for step in range(100):
        kept.take([SaveReport(step, "host", step % 4 > 0, "", 1, 0.0, 0.0, 0.0, 0.0)])
        assert [report.step for report in kept.ended][-10:] == list(range(max(0, step - 9), step + 1))
        assert len(kept.ended) <= 20
    assert kept.failures == 25


def test_a_lost_save_is_said_once_for_all_tiers_that_it_is_lost_to_and_by_rank_0(caplog):
    kept = reports.Reports([], StepClock(), lambda: 0)
    lost = [("host", "full", False), ("disk", "full", False), ("mirror", "slow", False), ("bucket", "far", True)]
    lost.append(("disk", "rank 1: full; " * 1000, False))
    kept.take([SaveReport(7, tier, False, why, 1, 0.0, 0.0, 0.0, 0.0, heard=heard) for tier, why, heard in lost])
    said = [record.getMessage() for record in caplog.records]
    assert said[:2] == ["step 7 is not saved to host and disk: full", "step 7 is not saved to mirror: slow"]
    assert kept.failures == 5 and len(said[2:]) == 1 and len(said[2]) < 1100 and len(kept.ended[-1].reason) > 10_000


def test_an_observer_that_fails_costs_no_save(tmp_path):
    calls = []

    def broken(report, arena_bytes):
        calls.append(report.step)
        raise ValueError("no")

    model, optimizer = pair()
    with Checkpointer(tmp_path / "c", model=model, optimizer=optimizer, every=1, observers=[broken]) as ckpt:
        train(ckpt, model, optimizer, range(3))
    assert calls == [0] and kept(tmp_path / "c") == [0, 1, 2]


# -- writers other than the optimizer --------------------------------------------------------------------------------


def test_load_state_dict_is_fenced(tmp_path):
    """Loading into the model, a part of it, or the optimizer while a save is in flight does not tear the save."""
    for what in ("model", "part", "optimizer"):
        torch.manual_seed(1)
        model = torch.nn.Sequential(torch.nn.Linear(700, 700), torch.nn.Linear(700, 700))
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.ones(1, 700)).sum().backward()
        optimizer.step()
        before = copy.deepcopy(model.state_dict())
        with Checkpointer(tmp_path / what, model=model, optimizer=optimizer) as ckpt:
            ckpt.save(1)
            target = {"model": model, "part": model[1], "optimizer": optimizer}[what]
            state = copy.deepcopy(target.state_dict())
            if what == "optimizer":
                state["state"][0]["exp_avg"] += 1
            else:
                state = {key: value + 1 for key, value in state.items()}
            target.load_state_dict(state)
            (report,) = ckpt.wait()
            assert report.ok, report
            assert ckpt.restore() == 1
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_copied_or_pickled_model_is_not_watched(tmp_path):
    import io

    model, optimizer = pair()
    with Checkpointer(tmp_path / "c", model=model, optimizer=optimizer) as ckpt:
        ema = copy.deepcopy(model)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        ckpt.save(1)
        ema.load_state_dict(model.state_dict())
        assert ckpt._fences.current is not None  # the copy's load did not fence
    buffer.seek(0)
    torch.load(buffer, weights_only=False).load_state_dict(model.state_dict())


# -- starts ----------------------------------------------------------------------------------------------------------


def test_starts_from_one_step_are_counted(tmp_path, caplog):
    model, optimizer = pair()
    with Checkpointer(tmp_path / "c", model=model, optimizer=optimizer, every=1) as ckpt:
        train(ckpt, model, optimizer, range(2))
    for start in (1, 2, 3):
        with Checkpointer(tmp_path / "c", model=model, optimizer=optimizer, every=1) as ckpt:
            assert ckpt.restore() == 1
        assert json.loads((tmp_path / "c" / "RESTARTS.json").read_text()) == {"step": 1, "starts": start}
    assert "start 3 from step 1" in caplog.text
    with Checkpointer(tmp_path / "c", model=model, optimizer=optimizer, every=1) as ckpt:
        train(ckpt, model, optimizer, range(2, 3))
        assert ckpt.restore() == 2
    assert json.loads((tmp_path / "c" / "RESTARTS.json").read_text()) == {"step": 2, "starts": 1}


def test_the_slowdown_is_what_steps_beside_a_save_took_longer():
    clock, now_s = StepClock(), 0.0

    def steps(numbers: range, seconds: float) -> None:
        nonlocal now_s
        for step in numbers:
            clock.tick(step, now_s)
            now_s += seconds

    steps(range(5), 1.0)  # four quiet steps are over, the fifth has begun
    clock.tick(5, now_s)
    clock.began(5, tiers=2)
    now_s += 1.5
    steps(range(6, 8), 1.25)
    clock.tick(8, now_s)
    assert clock.ended(5) == pytest.approx(0.5 + 0.25 + 0.25)  # one tier; the other goes on
    now_s += 2.0
    clock.tick(9, now_s)
    assert clock.ended(5) == pytest.approx(2.0)
    assert clock.ended(5) is None  # a tier that nobody announced
    clock.tick(20, now_s + 99)  # after a jump nothing is known of the time between
    clock.began(20, tiers=1)
    assert clock.ended(20) == 0.0
    fresh = StepClock()
    fresh.tick(0, 0.0)
    fresh.began(0, tiers=1)
    fresh.tick(1, 1.0)
    assert fresh.ended(0) is None  # no quiet step to compare with
