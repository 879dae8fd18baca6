"""What a schedule is written in: values (named tensors of a rank), slices of their rows, and actions on slices.

Everything here is frozen, prints as one line of the text form, and is checked for syntax only when it is made; whether
it makes sense beside its neighbours is `check`'s business. An action names what it reads and what it writes and nothing
else, because these names are the only edges between lanes.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from functools import cached_property

from ..dist.errors import UserError
from .terms import op_text

ITEM_BYTES = {
    "float64": 8,
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
    "token": 0,  # carries no bytes: only the fact that an action has finished
}
ROLES = ("input", "output", "scratch")
OPERATIONS = ("compute", "reduce", "merge", "copy")
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*")
ENGINE = re.compile(r"[A-Za-z_][A-Za-z0-9_./]*")

Param = bool | int | float | str
Params = tuple[tuple[str, Param], ...]


def named(text: str, what: str) -> None:
    if not NAME.fullmatch(text):
        raise UserError(f"{text!r} cannot name {what}", expected="a letter, then letters, digits, '_' and '.'")


@dataclass(frozen=True)
class Slice:
    """Rows `start` ≤ i < `stop` of a value (its dim 0)."""

    value: str
    start: int
    stop: int

    @property
    def rows(self) -> int:
        return self.stop - self.start

    def __str__(self) -> str:
        return f"{self.value}[{self.start}:{self.stop}]"


@dataclass(frozen=True)
class Value:
    """A named tensor of one rank. `shape[0]` counts rows; other dims may be symbols (str) until `Schedule.bind`.

    `role`: 'input' comes from the caller, 'output' goes back, 'scratch' belongs to the executor. `slot`: the shared
    buffer it lives in, or '' for memory of its own. `ranks`: where it exists; empty means on every rank, and a name may
    be declared again with another shape for other ranks (ragged partitions).
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    role: str = "scratch"
    slot: str = ""
    ranks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        named(self.name, "a value")
        for name in filter(None, (self.slot, *(d for d in self.shape if isinstance(d, str)))):
            named(name, "a slot or a dim")
        if self.dtype not in ITEM_BYTES:
            raise UserError(
                f"value {self.name} has the unknown dtype {self.dtype!r}", expected=f"one of {', '.join(ITEM_BYTES)}"
            )
        if (
            not self.shape
            or not isinstance(self.shape[0], int)
            or any(isinstance(d, int) and d < 0 for d in self.shape)
        ):
            raise UserError(
                f"value {self.name} has the shape {self.shape}", expected="a number of rows first, and no negative dim"
            )
        if self.role not in ROLES:
            raise UserError(f"value {self.name} has the role {self.role!r}", expected=f"one of {', '.join(ROLES)}")

    @property
    def rows(self) -> int:
        return int(self.shape[0])

    @cached_property
    def row_size(self) -> tuple[int, tuple[str, ...]]:
        """Bytes of one row as (factor, symbols): two rows are equally long when these are equal."""
        known = math.prod(d for d in self.shape[1:] if isinstance(d, int))
        return ITEM_BYTES[self.dtype] * known, tuple(sorted(d for d in self.shape[1:] if isinstance(d, str)))

    @property
    def row_bytes(self) -> int:
        factor, symbols = self.row_size
        if symbols:
            raise UserError(
                f"the size of value {self.name} is not known: dims {', '.join(symbols)} are symbols",
                remedy="give them numbers with schedule.bind(...)",
            )
        return factor

    @property
    def nbytes(self) -> int:
        return self.rows * self.row_bytes

    def all(self) -> Slice:
        return Slice(self.name, 0, self.rows)

    def __str__(self) -> str:
        where = f" in {self.slot}" if self.slot else ""
        ranks = f" @ {' '.join(map(str, self.ranks))}" if self.ranks else ""
        return f"value {self.name} {self.dtype}[{', '.join(map(str, self.shape))}] {self.role}{where}{ranks}"


@dataclass(frozen=True)
class Compute:
    """Call the operation named `op` on the read slices; it fills the written slices. One class, four kinds.

    'compute': an opaque function. 'reduce', 'merge': a sum (in the sense of `op`) of the reads, row by row; with n
    writes the reads come in groups of n, and write j combines the j-th of every group. 'copy': the reads, moved.
    `flops` and `engine` (a key of `Machine.flops`) tell cost models what it takes; 0 means bound by memory traffic.
    """

    kind: str
    op: str
    reads: tuple[Slice, ...]
    writes: tuple[Slice, ...]
    params: Params = ()
    flops: int = 0
    engine: str = ""

    def __post_init__(self) -> None:
        named(self.op, "an operation")
        object.__setattr__(self, "params", tuple(sorted(self.params)))
        for key, value in self.params:
            named(key, "a parameter")
            literal(value)
        if (self.flops > 0) != bool(self.engine) or (self.engine and not ENGINE.fullmatch(self.engine)):
            raise UserError(
                f"operation {self.op} takes {self.flops} flops on the engine {self.engine!r}",
                expected="both, or neither; an engine is a key of Machine.flops such as gemm/float32",
            )
        if self.kind not in OPERATIONS:
            raise UserError(f"an operation of kind {self.kind!r}", expected=f"one of {', '.join(OPERATIONS)}")

    @property
    def label(self) -> str:
        return op_text(self.op, self.params)

    def __str__(self) -> str:
        cost = f" ~ {self.flops} {self.engine}" if self.engine else ""
        return f"{self.kind} {self.label}({_slices(self.reads)}) => {_slices(self.writes)}{cost}"


@dataclass(frozen=True)
class Send:
    """Send the read slices, as one message, to the receive with the same tag on rank `to`.

    `writes` may hold token values only: they become available when the source may be overwritten.
    """

    to: int
    tag: str
    reads: tuple[Slice, ...]
    writes: tuple[Slice, ...] = ()

    kind = "send"

    def __post_init__(self) -> None:
        named(self.tag, "a tag")

    def __str__(self) -> str:
        done = f" => {_slices(self.writes)}" if self.writes else ""
        return f"send -> {self.to} {self.tag} ({_slices(self.reads)}){done}"


@dataclass(frozen=True)
class Recv:
    """Receive one message from rank `source` into the written slices."""

    source: int
    tag: str
    writes: tuple[Slice, ...]

    kind = "recv"
    reads: tuple[Slice, ...] = field(default=(), init=False, repr=False)

    def __post_init__(self) -> None:
        named(self.tag, "a tag")

    def __str__(self) -> str:
        return f"recv <- {self.source} {self.tag} => {_slices(self.writes)}"


@dataclass(frozen=True)
class Wait:
    """Hold the lane until the read slices are available; moves nothing. This is how a buffer's reuse is guarded."""

    reads: tuple[Slice, ...]

    kind = "wait"
    writes: tuple[Slice, ...] = field(default=(), init=False, repr=False)

    def __str__(self) -> str:
        return f"wait ({_slices(self.reads)})"


Action = Compute | Send | Recv | Wait


def literal(value: Param) -> str:
    """A parameter as the text form writes it: true, 3, 0.5, "words"."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise UserError(f"a parameter is {value}", expected="a finite number: the text form must parse back") from None


def _slices(slices: tuple[Slice, ...]) -> str:
    return ", ".join(map(str, slices))
