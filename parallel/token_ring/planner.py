"""Which schedule to run: predicted seconds of every possible one on a measured machine, forward and backward apart.

The prediction replays the very schedule that would run: on the simulator for few ranks, and for many by a bound, the
longest of its compute, its bytes out and its bytes in. Moving queries wins for MHA backward and for few queries
against many keys, keys and values win with grouped heads, Ulysses where ranks outnumber the ratio of the heads; the
numbers decide. Nothing else is chosen than `ring_kv` unless it is predicted to be clearly faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from rich.table import Table

from ...comms.actions import Compute
from ...comms.cost import Seconds, rank_costs
from ...comms.network import Network, fastest, of_machine
from ...comms.schedule import Schedule
from ...comms.simulate import ASSUMED, simulate
from ...dist.errors import UserError
from ...dist.machine import Machine
from ...dist.units import format_bytes, format_seconds
from .problem import SCHEDULES, Problem

DEFAULT = "ring_kv"
MARGIN = 0.97  # another schedule must be predicted to take at most so much of the default's time
_SIMULATED_RANKS = 8
_ATTENTION = {"attend": "attention_forward", "attend_backward": "attention_backward"}


@dataclass(frozen=True)
class Estimate:
    """What a schedule would take: bytes of the busiest rank, predicted seconds; or the reason why it cannot be."""

    name: str
    seconds: float = float("inf")
    sent_bytes: int = 0
    buffer_bytes: int = 0
    reason: str = ""


@dataclass(frozen=True)
class Choice:
    """All estimates of one phase, and the name that was chosen. `modelled_on`: the machine's name."""

    phase: str
    name: str
    estimates: tuple[Estimate, ...]
    modelled_on: str

    def table(self) -> Table:
        title = f"{self.phase} (modelled on machine '{self.modelled_on}'): {self.name}"
        table = Table(title=title, title_justify="left")
        for column in ("schedule", "sent per rank", "buffers", "predicted", ""):
            table.add_column(column, justify="left" if column in ("schedule", "") else "right")
        for e in sorted(self.estimates, key=lambda e: e.seconds):
            if e.reason:
                table.add_row(e.name, "", "", "", e.reason)
            else:
                numbers = format_bytes(e.sent_bytes), format_bytes(e.buffer_bytes), format_seconds(e.seconds)
                table.add_row(e.name, *numbers, "chosen" if e.name == self.name else "")
        return table


@dataclass(frozen=True)
class Rates:
    """The part of a `Machine` that a choice depends on; hashable, so that choices can be remembered.

    `attention`: (flops/s forward, backward); `copy_bytes_per_s` of one memory; `launch_s`: host time per operation.
    """

    name: str
    attention: tuple[float, float]
    copy_bytes_per_s: float
    network: Network
    launch_s: float = 0.0

    @classmethod
    def of(cls, machine: Machine | None, dtype: str, *, topology: str = "ports") -> Rates:
        """What `machine` says, and `ASSUMED` where it says nothing. float64 is taken at half of float32."""
        machine = machine or ASSUMED

        def flops(kind: str) -> float:
            key = dtype if dtype in ("bfloat16", "float32") else {"float16": "bfloat16"}.get(dtype, "float32")
            rate = machine.flops.get(f"{kind}/{key}") or ASSUMED.flops[f"{kind}/{key}"]
            return rate / 2 if dtype == "float64" else rate

        copy = machine.copies.get("d2d") or machine.copies.get("host") or ASSUMED.copies["d2d"]
        known = machine if fastest(machine) else ASSUMED
        return cls(
            machine.name,
            (flops("attention_forward"), flops("attention_backward")),
            copy,
            of_machine(known, topology=topology),
        )

    def op_seconds(self, schedule: Schedule) -> Seconds:
        """Seconds of every operation of `schedule`."""

        def seconds(action: Compute) -> float:
            if action.op in _ATTENTION:
                return self.launch_s + action.flops / self.attention[action.op == "attend_backward"]
            return (
                self.launch_s
                + schedule.nbytes(_owner(schedule, action), *action.reads, *action.writes) / 2 / self.copy_bytes_per_s
            )

        return dict.fromkeys(schedule.operations, seconds)


def _owner(schedule: Schedule, action: Compute) -> int:
    """A rank on which all values of the action are declared; their rows have the same size on each."""
    names = [part.value for part in (*action.reads, *action.writes)]
    return next(r for r, values in enumerate(schedule.by_rank) if all(name in values for name in names))


def predict(schedule: Schedule, rates: Rates) -> float:
    """Modelled seconds of one run."""
    if schedule.world <= _SIMULATED_RANKS:
        return simulate(schedule, network=rates.network, op_seconds=rates.op_seconds(schedule)).makespan_s
    backward = bool(dict(schedule.meta).get("backward"))
    n = rates.network
    port = min(n.port_bytes_per_s, n.pair_bytes_per_s, n.bus_bytes_per_s / schedule.world)
    return max(
        max(
            cost.flops / rates.attention[backward],
            max(cost.sent_bytes, cost.received_bytes) / port + cost.messages_sent * n.latency_s,
        )
        for cost in rank_costs(schedule)
    )


@lru_cache(maxsize=256)
def choose(
    problem: Problem, rates: Rates, *, backward: bool = False, names: Sequence[str] = tuple(SCHEDULES)
) -> Choice:
    """The fastest schedule by prediction. Pure: all ranks that call it with the same arguments get the same."""
    estimates = []
    for name in names:
        if reason := problem.possible(name):
            estimates.append(Estimate(name, reason=reason))
            continue
        schedule = problem.schedule(name, backward=backward)
        costs = rank_costs(schedule)
        most = max(cost.sent_bytes for cost in costs), max(cost.buffer_bytes for cost in costs)
        estimates.append(Estimate(name, predict(schedule, rates), *most))
    best = min(estimates, key=lambda e: e.seconds)
    plain = next((e for e in estimates if e.name == DEFAULT), best)
    name = best.name if best.seconds <= MARGIN * plain.seconds else plain.name
    return Choice("backward" if backward else "forward", name, tuple(estimates), rates.name)


def resolve(problem: Problem, rates: Rates, wanted: str, *, backward: bool) -> str:
    """`wanted`, or what 'auto' and 'predicted' propose here; `UserError` for a schedule that does not exist."""
    if wanted in ("auto", "predicted"):
        return choose(problem, rates, backward=backward).name if problem.world > 1 else DEFAULT
    if wanted not in SCHEDULES:
        raise UserError(f"schedule {wanted!r}", expected=f"'auto', 'predicted' or one of {', '.join(SCHEDULES)}")
    if reason := problem.possible(wanted):
        raise UserError(f"schedule '{wanted}': {reason}", remedy="choose ring_kv, or schedule='auto'")
    return wanted
