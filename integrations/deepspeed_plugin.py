"""undertow's systems under DeepSpeed, switched on by its JSON: {"undertow": {"checkpoint": true, "stream": true}}.

`import undertow.integrations.deepspeed_plugin` before `deepspeed.initialize` is all that a program needs. Checkpoints
are an engine of DeepSpeed's (`checkpointing.deepspeed_engine`); streaming is switched on for the module once DeepSpeed
has wrapped it, where its hooks allow that. What cannot be had is refused by name before training starts.
"""

from __future__ import annotations

import functools
from typing import Any

import deepspeed

from ..checkpointing import deepspeed_engine  # noqa: F401  # teaches DeepSpeed the checkpoints
from ..checkpointing.deepspeed_config import section
from ..dist import launch
from ..dist.log import get_logger
from ..dist.units import parse_bytes
from ..parallel.stream import enable
from .deepspeed_sections import stream_section

log = get_logger(__name__)


def install() -> None:
    """Teach DeepSpeed the section; done by importing this module, once."""
    if getattr(deepspeed.initialize, "_undertow", False):
        return
    initialize = deepspeed.initialize

    @functools.wraps(initialize)
    def with_systems(*args: Any, **options: Any) -> Any:
        made = initialize(*args, **options)
        engine: Any = made[0]
        stream = stream_section(section(engine._config._param_dict).get("stream"), engine.zero_optimization_stage())
        if stream is not None and not launch.detect().disabled:
            budget = None if stream.budget is None else parse_bytes(stream.budget)
            enable(engine.module, budget_bytes=budget, chunk=stream.chunk)
            log.info("streamed backpropagation is on")
        return made

    with_systems._undertow = True  # type: ignore[attr-defined]
    deepspeed.initialize = with_systems


install()
