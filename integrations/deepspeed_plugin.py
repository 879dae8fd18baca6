"""undertow's systems under DeepSpeed, switched on by its JSON: {"undertow": {"checkpoint": true, "stream": true}}.

`import undertow.integrations.deepspeed_plugin` before `deepspeed.initialize` is all that a program needs. Checkpoints
are an engine of DeepSpeed's (`checkpointing.deepspeed_engine`); streaming and context parallelism are switched on for
the module once DeepSpeed has wrapped it, and work under every ZeRO stage. DeepSpeed averages gradients over all ranks,
which is what the loss of `ContextParallel` expects: it needs no groups of ours.
"""

from __future__ import annotations

import functools
import inspect
import json
from pathlib import Path
from typing import Any

import deepspeed
import torch.distributed as dist

from ..checkpointing import deepspeed_engine  # noqa: F401  # teaches DeepSpeed the checkpoints
from ..checkpointing.deepspeed_config import section
from ..dist import launch
from ..dist.errors import UserError
from ..dist.log import get_logger
from ..dist.units import parse_bytes
from ..parallel import enable_context_parallel
from ..parallel.stream import enable
from ..parallel.stream.deepspeed_zero import prepare
from ..parallel.stream.protocol import Attend, Ranks
from .context_groups import check_first_batch, context_group
from .deepspeed_sections import ContextSection, context_section, refuse_beside, stream_section

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
        found = section(raw)
        stream, context = stream_section(found.get("stream")), context_section(found.get("context_parallel"))
        refuse_beside(raw, context)
        if (stream is None and context is None) or launch.detect().disabled:
            return initialize(*args, **options)
        model = bound["model"]
        if context is not None and bound.get("training_data") is not None:
            raise UserError(
                "training_data beside 'undertow.context_parallel'",
                expected="a loader that gives the ranks of a group the same rows: DeepSpeed's deals to all ranks",
                remedy="make it yourself, and leave training_data out",
            )
        if stream is not None:
            prepare(model)  # what stage 3 must know before it partitions; the other stages do not look
        made = initialize(*args, **options)
        attend, ranks = (None, None) if context is None else _spread(model, context)
        if stream is not None:
            budget = None if stream.budget is None else parse_bytes(stream.budget)
            enable(model, budget_bytes=budget, chunk=stream.chunk, attend=attend, ranks=ranks)
            log.info("streamed backpropagation is on")
        return made

    with_systems._undertow = True  # type: ignore[attr-defined]
    deepspeed.initialize = with_systems


def _spread(model: Any, context: ContextSection) -> tuple[Attend, Ranks]:
    """Switch context parallelism on: the attention of the latest batch and its ranks, to stream over. Collective."""
    mesh, group = context_group(context.ranks, dist.get_world_size(), dist.get_rank())
    enabled = enable_context_parallel(
        model, group, layout=context.layout, schedule=context.schedule, backward_schedule=context.backward_schedule
    )
    check_first_batch(enabled.root, group, "sample by data-parallel place: rank // context_parallel")
    log.info("sequences are spread over ranks: %s", mesh)

    def attend(
        q_BHTD: Any, k_BGTD: Any, v_BGTD: Any, *, positions: Any = None, scale: Any = None, window: Any = None
    ) -> Any:
        return enabled.context.attend(q_BHTD, k_BGTD, v_BGTD, scale=scale, window=window)

    return attend, enabled.context


def _raw(config: Any) -> dict[str, Any]:
    """The JSON as a dictionary: DeepSpeed takes one, or a file's path. Anything else is left to DeepSpeed."""
    if isinstance(config, dict):
        return config
    path = Path(config) if isinstance(config, str) else None
    found = json.loads(path.read_text()) if path is not None and path.is_file() else {}
    return found if isinstance(found, dict) else {}


install()
