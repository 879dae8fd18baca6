"""What a save does and costs, as text: plan, tiers, the prediction for a machine, and what the last saves did cost."""

from __future__ import annotations

from collections.abc import Sequence

from ..dist.machine import Machine
from ..dist.units import format_seconds
from .budget import Budget
from .cost import predict
from .live import LiveState
from .rhythm import Rhythm
from .save import SaveReport
from .tiers import Tiers

LATE_S = 0.02  # of one save, from which on a way to shorten it is named


def explain(
    live: LiveState,
    tiers: Tiers,
    budget: Budget,
    rhythm: Rhythm,
    reports: Sequence[SaveReport],
    machine: Machine | None,
    *,
    window_s: float,
) -> str:
    """`live` has a plan. `reports`: of the last saves. `machine`: None takes what `undertow probe` wrote here, if
    anything. `window_s`: from the call to the optimizer's first write."""
    image, arena_bytes = live.plan.image, budget.of(live.plan.image)
    lines = [str(live.plan).splitlines()[0], f"  state   {live.way}", tiers.explain(*rhythm.intervals, arena_bytes)]
    lines += filter(None, [budget.park.explain(image, live.copier) or _hint(live, reports)])
    if machine is None and (path := Machine.default_path()).is_file():
        machine = Machine.load(path)
    if machine is not None:
        cost = predict(
            image.size,
            machine,
            cuda=live.pinned,
            window_s=window_s,
            arena_bytes=arena_bytes,
            eager_bytes=image.eager_bytes,
            parked_bytes=budget.park.parked_bytes(image, live.copier),
        )
        lines.append(f"predicted on {machine.name}: {cost}")
    lines += [f"measured: {report}" for report in reports]
    return "\n".join([*lines, *rhythm.reasons])


def _hint(live: LiveState, reports: Sequence[SaveReport]) -> str:
    """That the device may help, where the last saves held steps up, as far as one can tell at fences or not."""
    late_s = max((max(report.fence_s, report.slowdown_s or 0.0) for report in reports), default=0.0)
    if not live.copier.queues or late_s < LATE_S:
        return ""
    waited = format_seconds(late_s)
    return f"  device  the last save held up steps by {waited}: device_bytes=… may take what has to wait"
