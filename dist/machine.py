"""What one machine can do: a frozen `Machine`, measured once by `undertow probe` and kept as a JSON file.

Planners, cost models and the simulator read rates only from here, so that a prediction can be repeated anywhere
from the file. Rates are payload bytes per second (a copy counts its bytes once, although it reads and writes them) or
floating-point operations per second, times are seconds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from .errors import UserError

FORMAT = 1


@dataclass(frozen=True)
class Link:
    """One transport between two ranks: a message of n bytes takes `latency_s + n / bytes_per_s`.

    `duplex`: both directions run at full rate at once. `samples`: the measured (bytes, seconds) pairs behind the fit.
    """

    latency_s: float
    bytes_per_s: float
    duplex: bool = True
    samples: tuple[tuple[int, float], ...] = ()

    def seconds(self, nbytes: float) -> float:
        return self.latency_s + nbytes / self.bytes_per_s

    @classmethod
    def fit(cls, samples: Sequence[tuple[int, float]], *, duplex: bool = True) -> Link:
        """The α-β line (Hockney 1994) with the least sum of squared *relative* errors, so that small messages count.

        `samples`: (bytes, seconds), at least two different sizes, seconds > 0. Neither α nor 1/β comes out negative:
        where the free optimum would be, it is 0 (β infinite for 1/β) and the other is fitted alone.
        """
        if len({nbytes for nbytes, _ in samples}) < 2 or any(seconds <= 0 for _, seconds in samples):
            raise ValueError("a fit needs two different sizes, and times above 0")
        # Minimise Σ (a·x + g·y - 1)² with x = 1/t, y = n/t: the relative error of a + g·n against t.
        points = [(1 / seconds, nbytes / seconds) for nbytes, seconds in samples]
        xx, xy, yy = (sum(p[i] * p[j] for p in points) for i, j in ((0, 0), (0, 1), (1, 1)))
        x1, y1 = (sum(p[i] for p in points) for i in (0, 1))
        det = xx * yy - xy * xy
        latency_s, per_byte = (x1 * yy - y1 * xy) / det, (y1 * xx - x1 * xy) / det
        if latency_s < 0:
            latency_s, per_byte = 0.0, y1 / yy
        elif per_byte <= 0:
            latency_s, per_byte = x1 / xx, 0.0
        bytes_per_s = 1 / per_byte if per_byte else float("inf")
        return cls(latency_s, bytes_per_s, duplex, tuple((int(n), float(t)) for n, t in samples))


@dataclass(frozen=True)
class Machine:
    """Measured rates of one machine.

    `links` by transport ('gloo', 'nccl', 'mpi'; with '_network' for two hosts and '_ring' for all ranks at once);
    `copies` in bytes/s by route ('host', 'host_one_thread', 'd2h_pinned', 'd2h_pageable', 'h2d_pinned', 'h2d_pageable',
    'd2d', 'pin'); `disks` in bytes/s ('write_direct', 'write_buffered', 'read_direct', 'read_buffered'); `flops` by
    'kind/dtype' with kinds 'gemm', 'gemm_backward', 'attention_forward', 'attention_backward' and dtypes 'float32',
    'bfloat16'; `facts` names the hardware and software versions; `datatypes` by MPI version: rows of
    `undertow mpi measure` (use, class, block, step, bytes, ns without us, ns with us, share). What was not measured is
    absent.
    """

    name: str
    links: dict[str, Link] = field(default_factory=dict)
    copies: dict[str, float] = field(default_factory=dict)
    disks: dict[str, float] = field(default_factory=dict)
    flops: dict[str, float] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)
    datatypes: dict[str, Sequence[Sequence]] = field(default_factory=dict)

    def updated(self, newer: Machine) -> Machine:
        """This machine with everything that `newer` measured in place of the old."""
        tables = {name: getattr(self, name) | getattr(newer, name) for name in TABLES}
        return replace(newer, **tables)

    def dump(self, path: Path) -> None:
        """Write the JSON file atomically; `UserError` when the folder does not allow it."""
        scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            scratch.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=2) + "\n")
            scratch.replace(path)
        except OSError as error:
            raise UserError(f"cannot write the machine file {path} ({error.strerror})") from error
        finally:
            scratch.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path) -> Machine:
        """Read a file that `dump` wrote; `UserError` when it is missing, torn or of another format."""
        try:
            data = json.loads(path.read_text())
            if data.pop("format") != FORMAT:
                raise KeyError("format")
            links = {
                name: Link(**{**link, "samples": tuple(map(tuple, link["samples"]))})
                for name, link in data.pop("links").items()
            }
            return cls(links=links, **data)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"cannot read the machine file {path} ({type(error).__name__}: {error})",
                expected=f"a JSON file of format {FORMAT} written by `undertow probe`",
                remedy=f"undertow probe --output {path}",
            ) from error

    @staticmethod
    def default_path() -> Path:
        """Where `undertow probe` writes and others look: machine.json in the user's cache folder."""
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "undertow" / "machine.json"


TABLES = ("links", "copies", "disks", "flops", "facts", "datatypes")
