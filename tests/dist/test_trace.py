"""Traces: what is on disk at any moment, what a SIGKILL leaves, and what merging makes of it."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from undertow.dist.errors import UserError
from undertow.dist.trace import Trace, merge, open_spans, trace_path
from undertow.dist.trace_read import read_attempts


def events(path: Path) -> list[dict]:
    return [event for attempt in read_attempts(path) for event in attempt.events]


def test_every_event_is_on_disk_when_the_call_returns(tmp_path):
    path = trace_path(tmp_path, 3)
    trace = Trace(path, rank=3)
    with trace.span("flush", lane="checkpoint", step=12, bytes=1 << 40):
        assert [(e["ph"], e["name"]) for e in events(path)] == [("B", "flush")]
        assert events(path)[0]["args"] == {"step": 12, "bytes": 1 << 40}
    trace.instant("commit", lane="checkpoint")
    trace.counter("queue_bytes", 7)
    trace.counter("memory", rss=1.5, shm=2)
    assert [e["ph"] for e in events(path)] == ["B", "E", "i", "C", "C"]
    assert {e["pid"] for e in events(path)} == {3}
    assert events(path)[-1]["args"] == {"rss": 1.5, "shm": 2}
    lanes = read_attempts(path)[0].lanes
    assert [lanes[e["tid"]] for e in events(path)] == ["checkpoint"] * 3 + ["counters"] * 2
    times = [e["ts"] for e in events(path)]
    assert times == sorted(times)


def test_one_file_is_a_json_array_once_closed(tmp_path):
    path = tmp_path / "t.json"
    with Trace(path) as trace, trace.span('odd "name"\n', lane="ä"):
        pass
    loaded = json.loads(path.read_text().rstrip().rstrip(",") + "]")
    assert [event["ph"] for event in loaded][-2:] == ["B", "E"]


def test_begin_and_end_by_handle_by_name_and_across_threads(tmp_path):
    path = tmp_path / "t.json"
    trace = Trace(path)
    handle = trace.begin("copy", lane="dma", chunk=1)
    trace.begin("copy", lane="dma", chunk=2)
    trace.end("copy", lane="dma")  # the newest of that name
    assert [span.args for span in open_spans(path)] == [{"chunk": 1}]
    thread = threading.Thread(target=lambda: handle.end(ok=True))
    thread.start()
    thread.join()
    assert open_spans(path) == []


def test_an_exception_is_named_and_ends_the_span(tmp_path):
    trace = Trace(tmp_path / "t.json")
    with pytest.raises(ValueError), trace.span("work"):
        raise ValueError("boom")
    assert events(tmp_path / "t.json")[-1]["args"] == {"error": "ValueError"}
    assert open_spans(tmp_path / "t.json") == []


def test_threads_tear_no_line(tmp_path):
    path = tmp_path / "t.json"
    trace = Trace(path)

    def work(i: int) -> None:
        for step in range(200):
            with trace.span("step", step=step, payload="x" * (step % 50)):
                trace.counter("c", step)

    threads = [threading.Thread(target=work, args=(i,), name=f"w{i}") for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(events(path)) == 8 * 200 * 3
    assert open_spans(path) == []
    assert set(read_attempts(path)[0].lanes.values()) == {f"w{i}" for i in range(8)} | {"counters"}


def test_no_path_means_nothing_happens(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trace = Trace(None, rank=1)
    with trace.span("a"):
        trace.begin("b").end(x=1)
        trace.end("b")
        trace.instant("c")
        trace.counter("d", 1)
        trace.align(1.0)
    trace.close()
    assert not trace.enabled
    assert list(tmp_path.iterdir()) == []


def test_not_a_number_stays_valid_json(tmp_path):
    path = tmp_path / "t.json"
    trace = Trace(path)
    trace.counter("loss", float("nan"))
    trace.instant("x", a=float("inf"), b=2, c={"deep": float("nan")}, d=Path("/p"))
    assert events(path)[0]["args"] == {"value": "nan"}
    assert events(path)[1]["args"]["a"] == "inf"
    merge(path, tmp_path / "all.json")
    json.loads((tmp_path / "all.json").read_text(), parse_constant=lambda s: pytest.fail(f"{s} in the JSON"))


def test_a_closed_trace_never_writes_to_the_file_that_took_its_descriptor(tmp_path):
    trace = Trace(tmp_path / "t.json")
    span = trace.span("late")
    trace.close()
    others = [os.open(tmp_path / f"other{i}", os.O_CREAT | os.O_WRONLY) for i in range(4)]
    with span:  # a thread that was already inside the call
        pass
    for fd in others:
        os.close(fd)
    assert all((tmp_path / f"other{i}").stat().st_size == 0 for i in range(4))
    assert events(tmp_path / "t.json") == []


def test_a_failing_write_stops_the_trace_with_one_warning(tmp_path, caplog):
    trace = Trace(tmp_path / "t.json")
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, trace._fd)
    os.close(full)
    with trace.span("a"), trace.span("b"):
        pass
    assert not trace.enabled
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_unwritable_path_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot open the trace file"):
        Trace(tmp_path / "file" / "t.json")


def killed_in_a_flush(path: Path) -> None:
    """Fork a process that traces, and SIGKILL it inside the spans train > flush."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        trace = Trace(path, rank=1)
        with trace.span("done"):
            pass
        with trace.span("train", lane="main"), trace.span("flush", lane="checkpoint", step=4):
            os.write(write, b"x")
            time.sleep(60)
        os._exit(1)
    os.close(write)
    assert os.read(read, 1) == b"x"
    os.close(read)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_open_spans_tells_what_a_sigkill_interrupted(tmp_path):
    path = trace_path(tmp_path, 1)
    killed_in_a_flush(path)
    spans = open_spans(path)
    assert [(s.name, s.lane, s.rank, s.args) for s in spans] == [
        ("train", "main", 1, {}),
        ("flush", "checkpoint", 1, {"step": 4}),
    ]
    assert abs(spans[0].begin_s - time.time()) < 600  # rank 0's wall clock


def test_restart_after_a_torn_line(tmp_path):
    path = trace_path(tmp_path, 1)
    killed_in_a_flush(path)
    with path.open("ab") as file:
        file.write(b'{"ph":"B","name":"tor')  # what a kill in mid-write leaves
    trace = Trace(path, rank=1)
    trace.begin("restore", lane="main")
    assert [(s.name, s.attempt) for s in open_spans(path)] == [("train", 0), ("flush", 0), ("restore", 1)]
    merge(tmp_path, tmp_path / "all.json")
    merged = json.loads((tmp_path / "all.json").read_text())["traceEvents"]
    assert_nested(merged)
    assert sum(e.get("args", {}).get("killed", False) for e in merged) == 3
    ends = [e["ts"] for e in merged if e["ph"] == "E" and e["name"] == "flush"]
    begins = [e["ts"] for e in merged if e["ph"] == "B" and e["name"] == "restore"]
    assert len(ends) == 1 and ends[0] <= begins[0]


def assert_nested(merged: list[dict]) -> None:
    """In file order every track's B and E events must nest and its time must not run backwards."""
    tracks: dict[tuple, list[dict]] = {}
    for event in merged:
        if event["ph"] in "BE":
            tracks.setdefault((event["pid"], event["tid"]), []).append(event)
    for track in tracks.values():
        stack: list[str] = []
        for event in track:
            if event["ph"] == "B":
                stack.append(event["name"])
            else:
                assert stack.pop() == event["name"]
        assert stack == []
        assert [e["ts"] for e in track] == sorted(e["ts"] for e in track)


def test_merge_puts_all_ranks_on_one_clock(tmp_path):
    offsets_s = {0: 1000.0, 1: 500.0, 2: 2000.25}  # what each rank must add to reach rank 0's wall clock
    lines = {}
    for rank, offset_s in offsets_s.items():
        trace = Trace(trace_path(tmp_path, rank), rank)
        trace.align(offset_s)
        trace.close()
        local_us = (3000.0 - offset_s + rank) * 1e6  # the event happens at wall second 3000 + rank
        lines[rank] = f'{{"ph":"i","name":"e","pid":{rank},"tid":5,"ts":{local_us}}},\n'
        with trace_path(tmp_path, rank).open("a") as file:
            file.write(lines[rank])
    assert merge(tmp_path, tmp_path / "all.json") > 3
    merged = json.loads((tmp_path / "all.json").read_text())["traceEvents"]
    assert {e["pid"]: e["ts"] for e in merged if e["ph"] == "i"} == {0: 0.0, 1: 1e6, 2: 2e6}
    names = [e["args"]["name"] for e in merged if e["name"] == "process_name"]
    assert names == ["rank 0", "rank 1", "rank 2"]
    assert list(tmp_path.glob(".*.tmp")) == []


def test_merge_of_nothing_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="no trace at"):
        merge(tmp_path, tmp_path / "all.json")
    with pytest.raises(UserError, match="gone.json"):
        merge([tmp_path / "gone.json"], tmp_path / "all.json")
    assert list(tmp_path.iterdir()) == []


def test_any_cut_of_a_file_can_be_read(tmp_path, seed):
    import random

    path = trace_path(tmp_path, 0)
    with Trace(path) as trace:
        for step in range(20):
            with trace.span("step", step=step):
                trace.instant("inside")
    whole = path.read_bytes()
    before = len(events(path))
    for _ in range(40):
        cut = random.randrange(1, len(whole))
        path.write_bytes(whole[:cut])
        if whole[:cut].count(b"\n") > 1:
            assert len(open_spans(path)) <= 1
        assert len(events(path)) <= before
        merge(path, tmp_path / "all.json")
        assert_nested(json.loads((tmp_path / "all.json").read_text())["traceEvents"])
