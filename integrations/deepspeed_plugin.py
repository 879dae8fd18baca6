"""undertow's systems under DeepSpeed, switched on by its JSON: {"undertow": {"checkpoint": true, "stream": true}}.

`import undertow.integrations.deepspeed_plugin` before `deepspeed.initialize` is all that a program needs. Checkpoints
are an engine of DeepSpeed's (`checkpointing.deepspeed_engine`); streaming is switched on for the module once DeepSpeed
has wrapped it, and works under every ZeRO stage.
"""

from __future__ import annotations

import functools
import inspect
import json
from pathlib import Path
from typing import Any

import deepspeed

from ..checkpointing import deepspeed_engine  # noqa: F401  # teaches DeepSpeed the checkpoints
from ..checkpointing.deepspeed_config import section
from ..dist import launch
from ..dist.log import get_logger
from ..dist.units import parse_bytes
from ..parallel.stream import enable
from ..parallel.stream.deepspeed_zero import prepare
from .deepspeed_sections import stream_section

log = get_logger(__name__)


def install() -> None:
    """Teach DeepSpeed the section; done by importing this module, once."""
    if getattr(deepspeed.initialize, "_undertow", False):
        return
    initialize = deepspeed.initialize

    @functools.wraps(initialize)
    def with_systems(*args: Any, **options: Any) -> Any:
        bound = inspect.signature(initialize).bind(*args, **options).arguments
        raw = _raw(bound.get("config") or bound.get("config_params"))
        stream = stream_section(section(raw).get("stream"))
        if stream is None or launch.detect().disabled:
            return initialize(*args, **options)
        model = bound["model"]
        prepare(model)  # what stage 3 must know before it partitions; the other stages do not look
        made = initialize(*args, **options)
        budget = None if stream.budget is None else parse_bytes(stream.budget)
        enable(model, budget_bytes=budget, chunk=stream.chunk)
        log.info("streamed backpropagation is on")
        return made

    with_systems._undertow = True  # type: ignore[attr-defined]
    deepspeed.initialize = with_systems


def _raw(config: Any) -> dict[str, Any]:
    """The JSON as a dictionary: DeepSpeed takes one, or a file's path. Anything else is left to DeepSpeed."""
    if isinstance(config, dict):
        return config
    path = Path(config) if isinstance(config, str) else None
    found = json.loads(path.read_text()) if path is not None and path.is_file() else {}
    return found if isinstance(found, dict) else {}


install()
