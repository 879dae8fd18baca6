"""What `undertow plan` is asked and what it answers: a `Job`, a `Line`, and the rates that a machine file may hold."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..comms.network import fastest
from ..comms.simulate import ASSUMED
from ..dist.errors import UserError
from ..dist.machine import Link, Machine
from ..parallel.memory_model import DecoderShape

RESTART_S = 180.0  # assumed: notice, start the processes, join, read the checkpoint
DTYPES = {"bfloat16": 2, "float32": 4}
STREAM = ("auto", "on", "off")


@dataclass(frozen=True)
class Job:
    """`ranks` = data × context × tensor. `batch` sequences of `tokens` for each data-parallel rank. An activation has
    `shape.element_size` bytes, a weight and its gradient `weight_bytes` (0: the same; 4 under autocast), the optimizer
    `state_bytes` per parameter. `sharded`: weights, gradients and state are spread over the data and context axes
    (ZeRO 3, FSDP). `stream`: 'auto' streams where a plain step does not fit. `device_bytes`, `host_bytes` of a rank.
    `mtbf_s` of the whole job."""

    shape: DecoderShape
    ranks: int
    tokens: int
    batch: int = 1
    context: int = 1
    tensor: int = 1
    weight_bytes: int = 0
    state_bytes: int = 12
    sharded: bool = True
    stream: str = "auto"
    device_bytes: int = 80_000_000_000
    host_bytes: int = 0
    mtbf_s: float = 6 * 3600.0
    restart_s: float = RESTART_S

    def __post_init__(self) -> None:
        if min(self.ranks, self.tokens, self.batch, self.context, self.tensor) < 1:
            raise UserError("ranks, tokens, batch and degrees", expected="at least 1 each")
        if self.stream not in STREAM:
            raise UserError(f"stream '{self.stream}'", expected=f"one of {', '.join(STREAM)}")
        if self.ranks % (self.context * self.tensor):
            raise UserError(
                f"{self.ranks} ranks, context {self.context} × tensor {self.tensor}",
                expected="data × context × tensor = ranks",
                remedy=f"--ranks {self.context * self.tensor * max(1, self.ranks // (self.context * self.tensor))}",
            )
        if self.tokens % self.context:
            raise UserError(f"{self.tokens} tokens over {self.context} ranks", expected="a multiple of the degree")
        if self.shape.heads % self.tensor or self.shape.hidden % self.tensor:
            raise UserError(
                f"{self.shape.heads} heads, {self.shape.hidden} channels over {self.tensor} ranks",
                expected="a tensor degree that divides both",
            )

    @property
    def data(self) -> int:
        return self.ranks // (self.context * self.tensor)

    @property
    def rows(self) -> int:
        """Tokens of one sequence on one rank; tensor-parallel ranks share a row's activations too."""
        return max(1, self.tokens // (self.context * self.tensor))

    @property
    def weight(self) -> int:
        """Bytes of one weight."""
        return self.weight_bytes or self.shape.element_size

    @property
    def dtype(self) -> str:
        """Of the arithmetic."""
        return "bfloat16" if self.shape.element_size == 2 else "float32"


@dataclass(frozen=True)
class Line:
    """One answer. `source`: 'modelled, measured rates' or 'modelled, assumed rates'."""

    question: str
    answer: str
    calculation: str
    source: str


@dataclass(frozen=True)
class Rated:
    """A rate, and whether a machine file holds it."""

    value: float
    measured: bool


def source(*measured: bool) -> str:
    return "modelled, measured rates" if all(measured) else "modelled, assumed rates"


def rate(machine: Machine | None, table: str, keys: tuple[str, ...], assumed: float) -> Rated:
    """The first of `keys` that the machine's `table` holds."""
    known: dict[str, float] = getattr(machine, table) if machine else {}
    found = next((known[key] for key in keys if known.get(key)), None)
    return Rated(assumed if found is None else found, found is not None)


def flops(machine: Machine | None, kind: str, dtype: str) -> Rated:
    """Of 'gemm_backward' too, which an older machine file and the assumed one give as 'gemm'."""
    keys = (f"{kind}/{dtype}", f"{kind.removesuffix('_backward')}/{dtype}" if kind == "gemm_backward" else "")
    return rate(machine, "flops", keys, next(ASSUMED.flops[key] for key in keys if key in ASSUMED.flops))


def torch_links(machine: Machine | None) -> Machine | None:
    """`machine` with the link that torch's ranks would use alone: NCCL's, else gloo's; MPI's may be faster, but no
    training job sends over it."""
    for backend in ("nccl", "gloo"):
        names = [name for name in (machine.links if machine else {}) if name.startswith(backend)]
        if machine is not None and names:
            best = max(names, key=lambda name: machine.links[name].bytes_per_s)
            return replace(machine, links={best: machine.links[best]})
    return machine


def link_of(machine: Machine | None) -> tuple[str, Link, bool]:
    """(name, link, whether it was measured)."""
    known = machine if machine is not None and machine.links else None
    found = known or ASSUMED
    name = fastest(found)
    return name, found.links[name], known is not None
