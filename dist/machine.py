"""What one machine can do: a frozen `Machine`, measured once by `undertow probe` and kept as a JSON file.

Planners, cost models and the simulator read rates only from here, so that a prediction can be repeated anywhere
from the file. Rates are bytes per second or floating-point operations per second, times are seconds.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
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


@dataclass(frozen=True)
class Machine:
    """Measured rates of one machine.

    `links` by transport ('gloo', 'nccl', 'mpi'); `copies` in bytes/s by route ('host', 'd2h_pinned', 'd2h_pageable',
    'h2d_pinned', 'h2d_pageable', 'd2d'); `disks` in bytes/s ('write_direct', 'write_buffered', 'read_direct',
    'read_buffered'); `flops` by 'kind/dtype' ('gemm/float32', 'attention_forward/bfloat16', …); `facts` names the
    hardware and software versions.
    """

    name: str
    links: dict[str, Link] = field(default_factory=dict)
    copies: dict[str, float] = field(default_factory=dict)
    disks: dict[str, float] = field(default_factory=dict)
    flops: dict[str, float] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)

    def dump(self, path: Path) -> None:
        """Write the JSON file atomically."""
        scratch = path.with_name(path.name + ".tmp")
        scratch.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=2) + "\n")
        scratch.replace(path)

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
