"""Which calls are recorded, kept, dropped and left alone; and calls that are replayed, with stand-ins and on a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from undertow.benchmarks import overlap_cuda
from undertow.comms import cuda_replays
from undertow.comms.cuda_recorder import Recorder, settings
from undertow.comms.cuda_replays import PATIENCE, PAUSE, WASTED, WORTH, Replays
from undertow.comms.spans import Memory
from undertow.parallel.overlap_arms import REPLAYED_ARMS


def call(replays: Replays[str], key: Any, case: Any = "case", nbytes: int = 1, memory: Any = None) -> str:
    """What a call does: 'eager', 'unseen', 'recorded' or 'replayed'."""
    if not replays.looks(case):
        return "eager"
    if replays.find(key) is not None:
        return "replayed"
    memory = case if memory is None else memory
    if replays.wants(case, key, replays.see(key), nbytes, memory):
        replays.keep(case, key, "a recording", nbytes, memory)
        return "recorded"
    replays.case(case).ready = True
    return "unseen"


def test_a_call_is_recorded_when_its_addresses_come_again():
    replays = Replays[str]()
    assert [call(replays, at) for at in (1, 2, 1, 1, 2, 2, 3)] == [
        "unseen", "unseen", "recorded", "replayed", "recorded", "replayed", "unseen",
    ]  # fmt: skip
    assert replays.explain() == "replay: 2 of 7 calls by 2 recordings, 0 MiB"


def test_nothing_is_recorded_before_the_case_has_run():
    replays = Replays[str]()
    assert not replays.wants("case", "key", True, 1)
    replays.case("case").ready = True
    assert replays.wants("case", "key", True, 1)


def test_the_recording_that_was_used_longest_ago_goes_first():
    replays = Replays[str](kept=2)
    for key in (1, 1, 2, 2, 1, 3, 3):  # 1 is used after 2
        call(replays, key)
    assert len(replays) == 2
    assert [replays.find(key) is not None for key in (1, 2, 3)] == [True, False, True]


def test_addresses_that_never_repeat_are_hardly_looked_at():
    replays = Replays[str]()
    done = [call(replays, at) for at in range(3 * (PATIENCE + PAUSE))]
    assert done[:PATIENCE] == ["unseen"] * PATIENCE
    assert done.count("unseen") == 3 * PATIENCE and done.count("eager") == 3 * PAUSE
    assert len(replays) == 0
    assert [call(replays, "same") for _ in range(3)] == ["unseen", "recorded", "replayed"]


def test_a_cycle_that_is_longer_than_what_is_kept_stops_recording_and_keeps_what_it_has():
    replays = Replays[str](kept=4)
    layers = 4 + WASTED + 20
    done = [call(replays, at) for _ in range(50) for at in range(layers)]
    assert done.count("recorded") == 4 + WASTED
    assert len(replays) == 4 and done[-layers:].count("replayed") == 4


def test_what_pays_may_go_and_come_again():
    replays = Replays[str](kept=1)
    for step in range(5 * WASTED):
        assert [call(replays, (step, 0)) for _ in range(2 + WORTH)] == ["unseen", "recorded"] + ["replayed"] * WORTH


def test_memory_is_capped_over_cases_and_given_back():
    replays = Replays[str](kept=2, most_bytes=10)
    assert [call(replays, 1, "small", 6) for _ in range(3)] == ["unseen", "recorded", "replayed"]
    assert [call(replays, 2, "large", 6) for _ in range(3)] == ["unseen"] * 3
    for key in (3, 4):  # of the same case: they share its memory
        assert [call(replays, key, "small", 6) for _ in range(2)] == ["unseen", "recorded"]
    assert replays.nbytes() == 6
    assert [call(replays, (7, of), of, 6, "small") for of in ("way", "way")] == ["unseen", "recorded"]
    assert replays.nbytes() == 6  # another way to make the same product
    assert [call(replays, 5, "little", 4) for _ in range(2)] == ["unseen", "recorded"]
    assert [call(replays, 6, "little", 4) for _ in range(2)] == ["unseen", "recorded"]
    assert replays.case("small").nbytes == 0  # the last of its recordings has gone
    assert call(replays, 2, "large", 6) == "recorded"


def test_what_is_dropped_gives_its_memory_back_and_leaves_the_others():
    replays = Replays[str](most_bytes=10)
    for _ in range(3):
        call(replays, "a", case="first", nbytes=8, memory="one")
        call(replays, "b", case="second", nbytes=2, memory="two")
    assert len(replays) == 2 and replays.nbytes() == 10
    replays.drop("first")
    replays.drop("unknown")
    assert len(replays) == 1 and replays.nbytes() == 2
    assert call(replays, "b", case="second", nbytes=2, memory="two") == "replayed"
    assert call(replays, "a", case="first", nbytes=8, memory="one") == "recorded"  # its addresses are known
    assert len(replays) == 2 and replays.nbytes() == 10


def test_cases_and_addresses_are_forgotten(monkeypatch):
    monkeypatch.setattr(cuda_replays, "SEEN", 8)
    replays = Replays[str]()
    for at in range(100):
        call(replays, at, case=at)
    assert len(replays.cases) <= 8 and len(replays._seen) <= 8


def test_what_was_stopped_says_why():
    replays = Replays[str]()
    for _ in range(3):
        call(replays, 1)
    replays.stop("no graphs here")
    assert call(replays, 1) == "eager" and len(replays) == 0
    assert replays.explain() == "replay: off, no graphs here"


class _Engine:
    """What a recorder asks an engine; `product`: a call that doubles its operand and keeps two rows of three."""

    def __init__(self) -> None:
        self.device, self.messenger = torch.device("cpu"), self
        self.place: int | None = 0
        self.captures = False
        self.watches = 0

    def memory(self) -> Any:
        return self.place

    def capturing(self) -> bool:
        return self.captures

    def watched(self, stream: Any) -> None:
        self.watches += 1


class _Plan:
    rows, own, world, sizes = 3, (1, 3), 2, (1, 2)


def _recorder(monkeypatch: pytest.MonkeyPatch, engine: Any, record: Any = None) -> Recorder:
    class Event:
        def wait(self, stream: None) -> None: ...
        def record(self, stream: None) -> None: ...

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: None)
    monkeypatch.setattr("undertow.comms.cuda_recorder._current", lambda _: 1)
    return Recorder(engine, record=record or (lambda queue: (lambda _: queue(), None)))


def _doubled(recorder: Recorder, a: torch.Tensor, done: list[str]) -> torch.Tensor:
    plan: Any = recorder.__dict__.setdefault("plan", _Plan())

    def queue(y: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        done.append("eager" if out is None else "replayed")
        y.copy_(2 * a)
        out = y.new_empty(2, a.shape[1]) if out is None else out
        return out.copy_(y[1:])

    return recorder.run(plan, (a,), a.shape[1], queue)


def test_a_replay_gives_the_bits_of_the_call_in_memory_of_its_own(monkeypatch):
    engine, done = _Engine(), list[str]()
    recorder = _recorder(monkeypatch, engine)
    a, results = torch.arange(12.0).view(3, 4), []
    for step in range(4):
        a.fill_(step)  # what lies there counts, not what lay there
        results.append(_doubled(recorder, a, done))
    assert done == ["eager", "replayed", "replayed", "replayed"] and engine.watches == 3
    assert [float(found.unique()) for found in results] == [0.0, 2.0, 4.0, 6.0]
    assert len({found.data_ptr() for found in results}) == 4


@pytest.mark.parametrize("change", ["address", "strides", "settings", "mirror"])
def test_what_a_recording_depends_on_is_its_key(monkeypatch, change):
    engine, done = _Engine(), list[str]()
    recorder = _recorder(monkeypatch, engine)
    memory = torch.arange(64.0)
    a = memory[:12].view(3, 4)
    for _ in range(2):
        _doubled(recorder, a, done)
    if change == "address":
        a = memory[1:13].view(3, 4)
    elif change == "strides":
        a = memory.as_strided((3, 4), (8, 1))
    elif change == "settings":
        monkeypatch.setattr("undertow.comms.cuda_recorder.settings", lambda: "another")
    else:
        engine.place = 1
    found = _doubled(recorder, a, done)
    assert torch.equal(found, 2 * a[1:])
    known = change in ("settings", "mirror")  # the addresses were seen: recorded anew, not replayed from before
    assert done[:2] == ["eager", "replayed"] and done[2] == ("replayed" if known else "eager")
    assert len(recorder.replays) == 1 + known


def test_settings_of_products_are_told_apart():
    """Of torch's, what a CPU build can set."""
    before, precision = settings(), torch.get_float32_matmul_precision()
    reduced = torch.backends.cuda.matmul
    kept = reduced.allow_bf16_reduced_precision_reduction, reduced.allow_fp16_reduced_precision_reduction
    try:
        found = {before}
        torch.set_float32_matmul_precision("medium" if precision != "medium" else "high")
        found.add(settings())
        reduced.allow_bf16_reduced_precision_reduction = not kept[0]
        found.add(settings())
        reduced.allow_fp16_reduced_precision_reduction = not kept[1]
        found.add(settings())
        torch.use_deterministic_algorithms(True)
        found.add(settings())
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_float32_matmul_precision(precision)
        reduced.allow_bf16_reduced_precision_reduction, reduced.allow_fp16_reduced_precision_reduction = kept
    assert len(found) == 5 and settings() == before


def test_calls_are_queued_as_ever_while_somebody_else_captures(monkeypatch):
    engine, done = _Engine(), list[str]()
    recorder, a = _recorder(monkeypatch, engine), torch.ones(3, 4)
    engine.captures = True
    for _ in range(4):
        _doubled(recorder, a, done)
    assert done == ["eager"] * 4


def test_what_cannot_be_recorded_is_queued_as_ever(monkeypatch):
    engine, done = _Engine(), list[str]()

    def broken(queue: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    recorder, a = _recorder(monkeypatch, engine, broken), torch.ones(3, 4)
    for _ in range(4):
        assert torch.equal(_doubled(recorder, a, done), 2 * a[1:])
    assert done == ["eager"] * 4
    assert recorder.able() == "recording failed (operation not permitted when stream is capturing)"
    engine.place = None
    assert _recorder(monkeypatch, engine).able() == "its messages cannot be recorded"


def test_a_call_is_prepared_without_running(monkeypatch):
    engine, done = _Engine(), list[str]()
    recorder, a = _recorder(monkeypatch, engine), torch.ones(3, 4)
    _doubled(recorder, a, done)
    recorder.prepare(recorder.__dict__["plan"], (a,), 4, lambda y, out: (done.append("prepared"), y)[1])
    assert len(recorder.replays) == 1 and done == ["eager"]
    with pytest.raises(AssertionError):  # what was prepared is what is replayed
        torch.testing.assert_close(_doubled(recorder, a, done), 2 * a[1:])


ARMS = [pytest.param(arm, id=arm.name) for arm in REPLAYED_ARMS]


def _plainly(rank: Any, arm: Any) -> torch.Tensor:
    """The same pieces, queued."""
    return rank.scatter(replace(arm, replayed=False))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("arm", ARMS)
def test_a_recording_sends_and_sums_the_same_bytes(seed, arm):
    """What the peers get and the sum, bit by bit; then with operands that change where they lie, and lie elsewhere."""
    rank = overlap_cuda.rank_of(512, 1024, 1024, seed)
    rank.scatter(arm, check=True)
    assert rank.engine.recorder.able() == "" and len(rank.engine.recorder.replays) == 1
    for _ in range(3):  # on its way while the next one is queued
        rank.a.mul_(-1.5)
        rank.b.add_(0.25)
        found = rank.scatter(arm)
        assert torch.equal(found, _plainly(rank, arm))
    for _ in range(3):
        rank.a = rank.a.clone()  # freed memory may come back, at an address that was recorded
        for _ in range(3):
            rank.a.normal_()
            assert torch.equal(rank.scatter(arm), _plainly(rank, arm))
    assert rank.engine.recorder.replays.case(next(iter(rank.engine.recorder.replays.cases))).replayed >= 7
    rank.engine.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_late_operands_other_streams_and_other_shapes_do_not_mix(seed):
    """Replays of two shapes, which share memory, one after the other on two streams, behind operands that are late."""
    ranks = [overlap_cuda.rank_of(512, n, 1024, seed) for n in (1024, 2048)]
    one = ranks[0].engine
    ranks[1].engine, ranks[1].messenger = one, ranks[0].messenger  # the first one's peers give zeros to it
    come = torch.zeros(7, 64, 2048, dtype=torch.bfloat16, pin_memory=True)
    one.messenger._theirs, one.messenger._come = Memory(come), come.numel() * 2  # type: ignore[attr-defined]
    arm, streams = REPLAYED_ARMS[0], [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    for turn in range(12):
        stream, rank = streams[turn % 3 == 0], ranks[turn % 2]
        with torch.cuda.stream(stream):
            torch.cuda._sleep(2_000_000)
            rank.a.fill_(turn % 5)
            found = rank.scatter(arm)
            want = rank.a[:64] @ rank.b
        stream.synchronize()
        torch.testing.assert_close(found, want, rtol=2**-7, atol=2**-7)
    states = one.recorder.replays.cases.values()
    assert [state.replayed for state in states] == [4, 4]
    one.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_graph_of_the_callers_own_holds_the_pieces(seed):
    rank, arm = overlap_cuda.rank_of(512, 1024, 1024, seed), REPLAYED_ARMS[0]
    for _ in range(3):
        rank.scatter(arm)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = rank.scatter(arm)
    rank.a.normal_()
    graph.replay()
    assert torch.equal(out, rank.scatter(arm)) and torch.equal(out, _plainly(rank, arm))
    rank.engine.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_recordings_that_go_leave_those_that_stay(seed, monkeypatch):
    """More operands than recordings are kept: what is dropped is on its way, and its memory is the others' too."""
    monkeypatch.setattr(cuda_replays, "WASTED", 1000)
    rank, arm = overlap_cuda.rank_of(512, 1024, 1024, seed), REPLAYED_ARMS[2]
    rank.engine.recorder.replays.kept = 2
    many = [torch.randn_like(rank.a) for _ in range(3)]
    want = []
    for rank.a in many:
        want.append(_plainly(rank, arm))
    for _ in range(4):
        for rank.a, wanted in zip(many, want):
            for _ in range(2):
                found = rank.scatter(arm)
            assert torch.equal(found, wanted)
    assert len(rank.engine.recorder.replays) == 2
    rank.engine.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_what_was_dropped_is_recorded_anew(seed):
    """All of it, and a part: of two ways the other one's stays."""
    rank, (one, two) = overlap_cuda.rank_of(512, 1024, 1024, seed), REPLAYED_ARMS[:2]
    recorder, want = rank.engine.recorder, [_plainly(rank, arm) for arm in REPLAYED_ARMS[:2]]
    for dropped in ((one, two), (one,), (one, two)):
        for _ in range(3):
            assert torch.equal(rank.scatter(one), want[0]) and torch.equal(rank.scatter(two), want[1])
        assert recorder.able() == "" and len(recorder.replays) == 2
        for arm in dropped:
            recorder.drop(rank.engine.plan(rank.sizes, arm.subchunks), 1024, torch.bfloat16)
        assert len(recorder.replays) == 2 - len(dropped)
    rank.engine.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_call_that_cannot_be_captured_is_queued_ever_after(seed):
    rank, arm = overlap_cuda.rank_of(512, 1024, 1024, seed), REPLAYED_ARMS[0]
    add = rank.engine.add

    def waits(*arguments: Any) -> None:
        torch.cuda.current_stream().synchronize()
        add(*arguments)

    rank.engine.add = waits
    want = _plainly(rank, arm)
    for _ in range(4):
        assert torch.equal(rank.scatter(arm), want)
    assert "recording failed" in rank.engine.recorder.able()
    graph = torch.cuda.CUDAGraph()  # nothing is left of the broken capture
    with torch.cuda.graph(graph):
        twice = rank.a + rank.a
    graph.replay()
    assert torch.equal(twice, 2 * rank.a)
    rank.engine.close()
