"""Which schedule to run: predicted seconds of every possible one on a measured machine, forward and backward apart.

Totals of compute and bytes, which need no schedule, bound the time of each from below. For few ranks the schedules are
then replayed on the simulator, likely ones first, until the bound of the next is longer than the best time found; for
many ranks the bound, with a latency per message, is the prediction. Moving queries wins for MHA backward and for few
queries against many keys, keys and values win with grouped heads, Ulysses where ranks outnumber the ratio of the heads;
the numbers decide. Nothing else is chosen than `ring_kv` unless it is predicted to be clearly faster.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from rich.table import Table

from ...comms.actions import Compute
from ...comms.cost import Seconds, buffer_bytes
from ...comms.network import Network, fastest, of_machine
from ...comms.schedule import Schedule
from ...comms.simulate import ASSUMED, makespan_s
from ...comms.topologies import PRESETS
from ...dist.errors import UserError
from ...dist.machine import Machine
from ...dist.units import format_bytes, format_seconds
from .problem import SCHEDULES, Problem

DEFAULT = "ring_kv"
MARGIN = 0.97  # another schedule must be predicted to take at most so much of the default's time
_SIMULATED_RANKS = 32  # which takes some seconds; what a bound leaves out decides between networks of two levels
_MANY_RANKS, _FEW_SCHEDULES = 8, 5  # with more ranks than that, only so many schedules are simulated
_ALWAYS = (DEFAULT, "all_gather_kv")  # the plain ways are always simulated
STARTS_S = (0.07e-3, 0.27e-3)  # of a GPU's attention kernels, forward and backward; see `Rates.start_s`


@dataclass(frozen=True)
class Estimate:
    """What a schedule would take: bytes of the busiest rank, predicted seconds; or the reason why it cannot be.

    `at_least`: it was not simulated, because even this bound is longer than another's time, or because with more than
    8 ranks the likeliest few are enough. `buffer_bytes` is 0 where the schedule was not built.
    """

    name: str
    seconds: float = float("inf")
    sent_bytes: int = 0
    buffer_bytes: int = 0
    reason: str = ""
    at_least: bool = False


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
                buffers = format_bytes(e.buffer_bytes) if e.buffer_bytes else ""
                numbers = format_bytes(e.sent_bytes), buffers, f"{'≥ ' * e.at_least}{format_seconds(e.seconds)}"
                table.add_row(e.name, *numbers, "chosen" if e.name == self.name else "")
        return table


@dataclass(frozen=True)
class Rates:
    """The part of a `Machine` that a choice depends on; hashable, so that choices can be remembered.

    `attention`: (flops/s forward, backward); `copy_bytes_per_s` of one memory; `launch_s`: host time per operation.
    `drag`: how much of a merge's time the attention beside it loses, 0 to 1; all of it unless somebody has measured.
    `start_s`: what an attention kernel loses, forward and backward, by filling the device and leaving it piece by
    piece, at most as long as it computes. It is what makes small blocks slow: a rate and such a constant give cuDNN's
    times of 24 shapes of blocks (4,096 to 57,344 rows, 32:8 heads of 128, one H200,
    `benchmarks/attention_blocks.py`) within 6 %, with 0.07 and 0.27 ms.
    """

    name: str
    attention: tuple[float, float]
    copy_bytes_per_s: float
    network: Network
    launch_s: float = 0.0
    drag: float = 1.0
    start_s: tuple[float, float] = (0.0, 0.0)

    @classmethod
    def of(cls, machine: Machine | None, dtype: str, *, topology: str = "ports") -> Rates:
        """What `machine` says, and `ASSUMED` where it says nothing. float64 is taken at half of float32.

        `topology`: what the measured link's rate limits, or the name of a preset in `comms.topologies`.
        """
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
            PRESETS[topology].network if topology in PRESETS else of_machine(known, topology=topology),
            start_s=STARTS_S if "d2d" in machine.copies else (0.0, 0.0),
        )

    def block_seconds(self, flops: int, backward: bool) -> float:
        """Of one attention kernel."""
        computing_s = flops / self.attention[backward]
        return computing_s + min(computing_s, self.start_s[backward])

    def op_seconds(self, schedule: Schedule) -> Seconds:
        """Seconds of every operation of `schedule`."""

        def seconds(action: Compute) -> float:
            if action.engine.startswith("attention_"):
                return self.launch_s + self.block_seconds(action.flops, action.engine.startswith("attention_backward"))
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
    """Modelled seconds of one run, on the simulator."""
    return makespan_s(schedule, network=rates.network, op_seconds=rates.op_seconds(schedule), drag=rates.drag)


def bound(problem: Problem, name: str, rates: Rates, *, backward: bool, message_s: float = 0.0) -> float:
    """Seconds that no run can beat: the longest of a rank's compute, its bytes out and its bytes in; every message
    costs `message_s` more."""
    found, network = problem.totals(name, backward=backward), rates.network
    compute_s = max(sum(rates.block_seconds(flops, backward) for flops in total.blocks) for total in found)
    near, far = ([[0] * problem.world, [0] * problem.world] for _ in range(2))
    for source, total in enumerate(found):
        for to, nbytes in total.sent_to.items():
            out, into = far if network.far(source, to) else near
            out[source] += nbytes
            into[to] += nbytes
    ends = range(problem.world)
    inside = network.most_bytes_per_s(network.node or problem.world)
    links_s = max(
        max(max(near[way][r] / inside, far[way][r] / network.far_bytes_per_s) for way in (0, 1))
        + found[r].messages_sent * message_s
        for r in ends
    )
    return max(compute_s, links_s, sum(near[0]) / network.bus_bytes_per_s)


@lru_cache(maxsize=256)
def choose(
    problem: Problem, rates: Rates, *, backward: bool = False, names: tuple[str, ...] = tuple(SCHEDULES),
    every: bool = False,
) -> Choice:  # fmt: skip
    """The fastest schedule by prediction. Pure: all ranks that call it with the same arguments get the same.

    `every`: simulate also those that cannot win (for few ranks).
    """
    few = problem.world <= _SIMULATED_RANKS
    possible = {name: problem.possible(name) for name in names}
    message_s = 0.0 if few else rates.network.latency_s
    bounds = {
        name: bound(problem, name, rates, backward=backward, message_s=message_s)
        for name, reason in possible.items()
        if not reason
    }
    found: dict[str, Estimate] = {}
    for name in sorted(bounds, key=lambda n: (n not in _ALWAYS, bounds[n])):
        best = min((e.seconds for e in found.values()), default=float("inf"))
        sent = max(total.sent_bytes for total in problem.totals(name, backward=backward))
        enough = problem.world > _MANY_RANKS and len(found) >= _FEW_SCHEDULES
        if not few or ((bounds[name] > best or enough) and not every and name not in _ALWAYS):
            found[name] = Estimate(name, bounds[name], sent, at_least=few)
            continue
        schedule = problem.schedule(name, backward=backward, goals=False)
        buffers = max(buffer_bytes(schedule, rank) for rank in range(problem.world))
        found[name] = Estimate(name, predict(schedule, rates), sent, buffers)
    best = min((e for e in found.values() if not e.at_least), key=lambda e: e.seconds)
    plain = found.get(DEFAULT, best)
    chosen = best.name if best.seconds <= MARGIN * plain.seconds else plain.name
    estimates = tuple(found[name] if not reason else Estimate(name, reason=reason) for name, reason in possible.items())
    return Choice("backward" if backward else "forward", chosen, estimates, rates.name)


def resolve(problem: Problem, rates: Rates, wanted: str, *, backward: bool) -> str:
    """`wanted`, or what 'auto' and 'predicted' propose here; `UserError` for a schedule that does not exist."""
    if wanted in ("auto", "predicted"):
        return choose(problem, rates, backward=backward).name if problem.world > 1 else DEFAULT
    if wanted not in SCHEDULES:
        raise UserError(f"schedule {wanted!r}", expected=f"'auto', 'predicted' or one of {', '.join(SCHEDULES)}")
    if reason := problem.possible(wanted):
        raise UserError(f"schedule '{wanted}': {reason}", remedy="choose ring_kv, or schedule='auto'")
    return wanted
