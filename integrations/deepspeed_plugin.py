"""undertow's systems under DeepSpeed, switched on by its JSON: {"undertow": {"checkpoint": true, "stream": true}}.

`import undertow.integrations.deepspeed_plugin` before `deepspeed.initialize` is all that a program needs. Checkpoints
are an engine of DeepSpeed's (`checkpointing.deepspeed_engine`); streaming is switched on for the module once DeepSpeed
has wrapped it, where its hooks allow that. What cannot be had is refused by name before training starts.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..checkpointing.deepspeed_config import KNOWN, SECTION, near, section
from ..dist import launch
from ..dist.errors import UserError
from ..dist.log import get_logger
from ..dist.units import parse_bytes

log = get_logger(__name__)
KNOWN |= {"stream": "streamed backpropagation"}


@dataclass(frozen=True)
class StreamSection:
    """`budget`: device memory for activations, as '20GB' (None: what is free); `chunk`: rows (None: planned)."""

    budget: str | int | None = None
    chunk: int | None = None


def stream_section(raw: Any, stage: int) -> StreamSection | None:
    """From the value of "stream"; refuses what ZeRO stage `stage` cannot do."""
    if raw in (None, False):
        return None
    if raw is not True and not isinstance(raw, Mapping):
        raise UserError(f"'{SECTION}.stream' is {raw!r}", expected="true, false or an object")
    options = {} if raw is True else dict(raw)
    names = [field.name for field in fields(StreamSection)]
    for name in options:
        if name not in names:
            raise UserError(
                f"'{SECTION}.stream.{name}' is unknown", expected=f"one of {', '.join(names)}", remedy=near(name, names)
            )
    if stage == 3:
        raise UserError(
            f"'{SECTION}.stream' with ZeRO stage 3",
            expected="stage 0, 1 or 2: stage 3 gathers weights by hooks on whole-layer calls, which chunks do not make",
        )
    found = StreamSection(**options)
    if found.budget is not None:
        parse_bytes(found.budget, name=f"{SECTION}.stream.budget")
    return found


def describe(found: Mapping[str, Any], stage: int) -> list[str]:
    """What `undertow deepspeed check` says about the systems here."""
    stream = stream_section(found.get("stream"), stage)
    if stream is None:
        return []
    budget = "what is free on the device" if stream.budget is None else str(stream.budget)
    return [f"streamed backpropagation: within {budget}, chunks {stream.chunk or 'planned'}"]


def install() -> None:
    """Teach DeepSpeed the section; done by importing this module, once."""
    import deepspeed

    from ..checkpointing import deepspeed_engine  # noqa: F401  # teaches it the checkpoints

    if getattr(deepspeed.initialize, "_undertow", False):
        return
    initialize = deepspeed.initialize

    @functools.wraps(initialize)
    def with_systems(*args: Any, **options: Any) -> Any:
        made = initialize(*args, **options)
        engine = made[0]
        stage = engine.zero_optimization_stage()
        stream = stream_section(section(engine._config._param_dict).get("stream"), stage)
        if stream is not None and not launch.detect().disabled:
            from ..parallel.stream import enable

            budget = None if stream.budget is None else parse_bytes(stream.budget)
            enable(engine.module, budget_bytes=budget, chunk=stream.chunk)
            log.info("streamed backpropagation is on")
        return made

    with_systems._undertow = True  # type: ignore[attr-defined]
    deepspeed.initialize = with_systems


try:
    install()
except ImportError:
    log.debug("DeepSpeed is not installed: only its configurations can be checked")
