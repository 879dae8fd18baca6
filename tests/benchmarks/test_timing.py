"""Timers with scripted clocks and a stand-in for torch.cuda: nothing sleeps, nothing needs a device."""

from __future__ import annotations

import gc

import pytest

from undertow.benchmarks.case import Arm, Measured
from undertow.benchmarks.timing import CudaTimer, HostTimer


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def pass_s(self, seconds):
        self.now += seconds


def test_host_timer_divides_by_the_runs_and_leaves_prepare_out():
    clock, calls = Clock(), []

    def run():
        calls.append("run")
        clock.pass_s(0.25)

    def prepare():
        calls.append("prepare")
        clock.pass_s(50.0)

    sample = HostTimer(clock).sample(Arm("a", run, prepare=prepare), inner=4)
    assert sample.seconds == 0.25 and calls == ["prepare", "run", "run", "run", "run"]
    assert not sample.times_itself


def test_host_timer_takes_the_time_an_arm_measured_itself():
    sample = HostTimer(Clock()).sample(Arm("a", lambda: Measured(1, seconds=3.5, extras={"stall_s": 0.5})), inner=1)
    assert (sample.seconds, sample.times_itself, sample.extras) == (3.5, True, (("stall_s", 0.5),))


def test_host_timer_times_an_arm_that_only_reports_extras():
    clock = Clock()

    def run():
        clock.pass_s(2.0)
        return Measured(1, extras={"peak_bytes": 9.0})

    sample = HostTimer(clock).sample(Arm("a", run), inner=2)
    assert (sample.seconds, sample.times_itself, sample.extras) == (2.0, False, (("peak_bytes", 9.0),))


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_off_while_timing_and_then_as_before(enabled):
    states = []
    was = gc.isenabled()
    try:
        gc.enable() if enabled else gc.disable()
        with pytest.raises(ZeroDivisionError):
            HostTimer().sample(Arm("a", lambda: states.append(gc.isenabled()) or 1 / 0), inner=1)
        assert states == [False] and gc.isenabled() is enabled
    finally:
        gc.enable() if was else gc.disable()


class Cuda:
    """A device on a scripted clock: `current` and `side` hold seconds of work queued on two streams."""

    def __init__(self, clock):
        self.clock, self.current, self.side, self.log = clock, 0.0, 0.0, []

    def Event(self, enable_timing):  # noqa: N802
        assert enable_timing
        return _Event(self)

    def _sleep(self, cycles):
        self.log.append(cycles)
        self.current += cycles * 1e-9

    def synchronize(self):
        self.log.append("synchronize")
        self.clock.pass_s(max(self.current, self.side))
        self.current = self.side = 0.0


class _Event:
    def __init__(self, cuda):
        self.cuda, self.at = cuda, 0.0

    def record(self):
        self.cuda.log.append("record")
        self.at = self.cuda.clock.now + self.cuda.current

    def query(self):
        return self.cuda.clock.now >= self.at

    def synchronize(self):
        waited, self.cuda.current = self.cuda.current, 0.0
        self.cuda.clock.pass_s(waited)
        self.cuda.side = max(0.0, self.cuda.side - waited)

    def elapsed_time(self, other):
        return (other.at - self.at) * 1e3


def queue(cuda, stream, seconds):
    setattr(cuda, stream, getattr(cuda, stream) + seconds)


def test_cuda_timer_reads_the_events():
    cuda = Cuda(Clock())
    queue(cuda, "current", 9.0)  # what an earlier arm left behind must not count
    sample = CudaTimer(cuda, cuda.clock).sample(Arm("a", lambda: queue(cuda, "current", 0.5)), inner=4)
    assert sample.seconds == pytest.approx(0.5)
    assert cuda.log == ["synchronize", "record", "record", "synchronize"]


def test_cuda_timer_refuses_work_that_its_events_cannot_see():
    cuda = Cuda(Clock())
    timer = CudaTimer(cuda, cuda.clock)
    arm = Arm("a", lambda: (queue(cuda, "current", 1.0), queue(cuda, "side", 4.0)))
    for _ in range(2):  # the host may be late once
        timer.sample(arm, inner=1)
    with pytest.raises(RuntimeError, match="arm 'a' left 3000.00 ms of work on other streams"):
        timer.sample(arm, inner=1)


@pytest.mark.parametrize(("host_s", "sleeps"), [(0.01, 1), (0.07, 3)])
def test_cuda_timer_lets_the_device_sleep_until_all_is_queued(host_s, sleeps):
    cuda = Cuda(Clock())

    def run():
        cuda.clock.pass_s(host_s)  # of the host, while the device goes on
        cuda.current = max(0.0, cuda.current - host_s)
        queue(cuda, "current", 0.5)

    sample = CudaTimer(cuda, cuda.clock).sample(Arm("a", run, ahead=True), inner=1)
    assert sample.seconds == pytest.approx(0.5)
    slept = [entry for entry in cuda.log if isinstance(entry, int)]
    assert slept == [CudaTimer.SLEEP_CYCLES * 2**k for k in range(sleeps)]


def test_cuda_timer_refuses_an_arm_that_waits_for_the_device_while_it_is_queued():
    cuda = Cuda(Clock())
    with pytest.raises(RuntimeError, match="arm 'a' waits for the device while it is queued"):
        CudaTimer(cuda, cuda.clock).sample(Arm("a", cuda.synchronize, ahead=True), inner=1)
