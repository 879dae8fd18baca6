"""What a save does and costs, as text: plan, tiers, the prediction for a machine, and what the last saves did cost."""

from __future__ import annotations

from collections.abc import Sequence

from ..dist.machine import Machine
from .cost import predict
from .plan import SavePlan
from .save import SaveReport


def explain(
    plan: SavePlan,
    tiers: str,
    state: str,
    machine: Machine | None,
    *,
    cuda: bool,
    window_s: float,
    arena_bytes: int,
    reports: Sequence[SaveReport],
    reasons: Sequence[str],
) -> str:
    """`tiers`: their own text. `state`: how it is watched. `machine`: None takes what `undertow probe` wrote here, if
    anything. `window_s`: from the call to the optimizer's first write. `reasons`: why the intervals are what they are.
    """
    lines = [str(plan).splitlines()[0], f"  state   {state}", tiers]
    if machine is None and (path := Machine.default_path()).is_file():
        machine = Machine.load(path)
    if machine is not None:
        image = plan.image
        cost = predict(
            image.size,
            machine,
            cuda=cuda,
            window_s=window_s,
            arena_bytes=arena_bytes,
            eager_bytes=image.eager_bytes,
        )
        lines.append(f"predicted on {machine.name}: {cost}")
    lines += [f"measured: {report}" for report in reports]
    return "\n".join([*lines, *reasons])
