"""What happened when, on which rank and in which lane: spans, instants and counters in Chrome's trace-event format.

Every event is one line, written with one `os.write` to a file opened for appending, before the call returns. A process
that dies by SIGKILL therefore leaves a `B` without its `E` for each span it was in, and a test can ask `open_spans`
whether the kill landed inside a flush. A file is a JSON array without its closing bracket, which the format allows, so
that chrome://tracing and Perfetto open the file of one rank as it is; `merge` joins the ranks.

Timestamps are the monotonic clock in microseconds. A metadata event holds `epoch_s`, the seconds to add to reach rank
0's wall clock: first this host's own guess, later the measured one (`align`, from `clock.measure`). There is no lock:
one append is atomic, a fork or a signal handler in mid-write cannot deadlock, and `close` redirects the descriptor
instead of closing it, so that a late writer can never reach a file that took over its number.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import zlib
from pathlib import Path
from types import TracebackType
from typing import Any

from .errors import UserError
from .trace_read import CLOCK, START, merge, open_spans

__all__ = ["Span", "Trace", "merge", "open_spans", "trace_path"]


def trace_path(folder: Path | str, rank: int) -> Path:
    """The file of one rank in a run's trace folder; `merge(folder)` finds all files named so."""
    return Path(folder) / f"trace-{rank:05d}.json"


class Span:
    """One span: `with trace.span(…)`, or the handle that `trace.begin` returned. `end` may run in another thread."""

    __slots__ = ("_args", "_lane", "_name", "_trace")

    def __init__(self, trace: Trace, name: str, lane: str, args: dict[str, Any]) -> None:
        self._trace, self._name, self._lane, self._args = trace, name, lane, args

    def __enter__(self) -> Span:
        self._trace._event("B", self._name, self._lane, self._args)
        return self

    def end(self, **args: Any) -> None:
        self._trace._event("E", self._name, self._lane, args)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._trace._event("E", self._name, self._lane, {"error": kind.__name__} if kind else {})


class _NoSpan(Span):
    """The span of a disabled trace: one shared object that does nothing."""

    __slots__ = ()

    def __init__(self) -> None: ...

    def __enter__(self) -> Span:
        return self

    def end(self, **args: Any) -> None: ...

    def __exit__(self, *exc: object) -> None: ...


_NO_SPAN = _NoSpan()


class Trace:
    """A trace file of one rank; every method is safe from any thread and costs a few microseconds.

    `path` None makes every method a no-op. An existing file is continued, so that the attempts of a restarted run stand
    in one file. A *lane* (default: the thread's name) becomes a track of the viewer; spans of one lane must nest, so
    two threads that work at once need two lanes. Arguments of events must be plain Python values: formatting a device
    tensor would synchronise. Raises `UserError` when the file cannot be opened. When a write fails later (a full
    disk), the trace stops with one warning; it never stops the run.
    """

    def __init__(self, path: Path | str | None, rank: int = 0) -> None:
        self.path, self.rank = (None if path is None else Path(path)), rank
        self._fd = -1
        self._open = False
        self._lanes: dict[str, int] = {}
        self._quoted: dict[str, str] = {}
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise UserError(
                f"cannot open the trace file {self.path} ({error.strerror})",
                expected="a path in a folder where this user may write",
            ) from error
        self._open = True
        size = os.fstat(self._fd).st_size
        if size == 0:
            self._write(b"[\n")
        elif os.pread(self._fd, 1, size - 1) != b"\n":  # the last process was killed in mid-write
            self._write(b"\n")
        self._metadata(START, {"os_pid": os.getpid(), "host": socket.gethostname(), "rank": rank})
        self._metadata("process_name", {"name": f"rank {rank}"})
        self.align(time.time() - time.monotonic(), measured=False)

    @property
    def enabled(self) -> bool:
        return self._open

    def span(self, name: str, *, lane: str | None = None, **args: Any) -> Span:
        """A context manager; `args` (step=12, bytes=…) are shown by the viewer and kept by `open_spans`."""
        if not self._open:
            return _NO_SPAN
        return Span(self, name, lane or threading.current_thread().name, args)

    def begin(self, name: str, *, lane: str | None = None, **args: Any) -> Span:
        """Begin a span now; end it with the returned handle's `end()`, or with `Trace.end`."""
        return self.span(name, lane=lane, **args).__enter__()

    def end(self, name: str, *, lane: str | None = None, **args: Any) -> None:
        """End the newest open span called `name` of the lane."""
        if self._open:
            self._event("E", name, lane or threading.current_thread().name, args)

    def instant(self, name: str, *, lane: str | None = None, **args: Any) -> None:
        """Mark a moment."""
        if self._open:
            self._event("i", name, lane or threading.current_thread().name, args)

    def counter(self, name: str, value: float | None = None, **series: float) -> None:
        """A sampled number, drawn as a graph: `counter("queue_bytes", 12)`, or several named `series` in one graph."""
        if self._open:
            self._event("C", name, "counters", ({} if value is None else {"value": value}) | series)

    def align(self, epoch_s: float, *, measured: bool = True) -> None:
        """Record that local monotonic time + `epoch_s` is rank 0's wall clock; holds for this process's whole trace."""
        if self._open:
            self._metadata(CLOCK, {"epoch_s": epoch_s, "measured": measured})

    def close(self) -> None:
        """Stop tracing. Later calls from any thread do nothing."""
        if self._open:
            self._open = False
            null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
            os.dup2(null, self._fd, inheritable=False)
            os.close(null)

    def __enter__(self) -> Trace:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        if self._fd >= 0:  # no writer can be left: it would hold a reference
            os.close(self._fd)

    def _event(self, phase: str, name: str, lane: str, args: dict[str, Any]) -> None:
        now_ns = time.monotonic_ns()
        tid = self._lanes.get(lane)
        if tid is None:
            tid = zlib.crc32(lane.encode()) & 0x7FFFFFFF  # the same in every attempt and on every rank
            self._metadata("thread_name", {"name": lane}, tid)
            self._lanes[lane] = tid
        quoted = self._quoted.get(name)
        if quoted is None:
            if len(self._quoted) > 4096:  # names made per step must not become a leak
                self._quoted.clear()
            quoted = self._quoted[name] = json.dumps(name)
        tail = f',"args":{_dumps(args)}}},\n' if args else "},\n"
        scope = ',"s":"t"' if phase == "i" else ""
        self._write(
            f'{{"ph":"{phase}","name":{quoted},"pid":{self.rank},"tid":{tid},'
            f'"ts":{now_ns // 1000}.{now_ns % 1000:03d}{scope}{tail}'.encode()
        )

    def _metadata(self, name: str, args: dict[str, Any], tid: int = 0) -> None:
        event = {"ph": "M", "name": name, "pid": self.rank, "tid": tid, "ts": time.monotonic_ns() / 1000, "args": args}
        self._write(f"{json.dumps(event)},\n".encode())

    def _write(self, line: bytes) -> None:
        try:
            written = os.write(self._fd, line)
            reason = "short write" if written != len(line) else ""
        except OSError as error:
            reason = str(error.strerror)
        if reason and self._open:
            self.close()
            logging.getLogger(__name__).warning("the trace %s ends here: %s", self.path, reason)


_encode = json.JSONEncoder(allow_nan=False, default=str).encode


def _dumps(args: dict[str, Any]) -> str:
    """JSON of event arguments, quick for numbers; what JSON does not know (NaN, infinities) becomes a string."""
    parts = []
    for key, value in args.items():
        if type(value) is int:
            text = str(value)
        elif type(value) is float:
            text = repr(value) if value - value == 0.0 else f'"{value}"'
        else:
            try:
                text = _encode(value)
            except (ValueError, TypeError):  # a NaN, or a key that is not a string, somewhere inside
                text = _encode(str(value))
        parts.append(f'"{key}":{text}' if key.isidentifier() else f"{_encode(key)}:{text}")
    return "{" + ",".join(parts) + "}"
