"""What the "undertow" section of a DeepSpeed JSON may say of the systems beside checkpoints; needs no DeepSpeed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..checkpointing.deepspeed_config import KNOWN, SECTION, near
from ..dist.errors import UserError
from ..dist.units import parse_bytes
from ..parallel.partition import LAYOUTS
from ..parallel.token_ring.problem import SCHEDULES

WAYS = ("auto", "predicted", *SCHEDULES)
KNOWN |= {
    "stream": "streamed backpropagation",
    "context_parallel": "TokenRing attention of transformers models, each sequence on several ranks",
}


@dataclass(frozen=True)
class StreamSection:
    """`budget`: device memory for activations, as '20GB' (None: what is free); `chunk`: rows (None: planned)."""

    budget: str | int | None = None
    chunk: int | None = None


def stream_section(raw: Any) -> StreamSection | None:
    """From the value of "stream": true means the defaults, false and null off."""
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
    found = StreamSection(**options)
    if found.budget is not None:
        parse_bytes(found.budget, name=f"{SECTION}.stream.budget")
    return found


@dataclass(frozen=True)
class ContextSection:
    """`ranks`: neighbouring ranks that share a sequence; the others are those of `enable_context_parallel`."""

    ranks: int
    layout: str = "zigzag"
    schedule: str = "auto"
    backward_schedule: str = "auto"


def context_section(raw: Any) -> ContextSection | None:
    """From the value of "context_parallel": the number of ranks, or an object with it; 1, false and null are off."""
    if raw is None or raw is False:
        return None
    name = f"{SECTION}.context_parallel"
    options = dict(raw) if isinstance(raw, Mapping) else {"ranks": raw}
    names = [field.name for field in fields(ContextSection)]
    for key in options:
        if key not in names:
            raise UserError(
                f"'{name}.{key}' is unknown", expected=f"one of {', '.join(names)}", remedy=near(key, names)
            )
    ranks = options.get("ranks")
    if isinstance(ranks, bool) or not isinstance(ranks, int) or ranks < 1:
        raise UserError(
            f"'{name}' is {raw!r}", expected="the number of ranks that share a sequence, or an object with 'ranks'"
        )
    for key, known in (("layout", LAYOUTS), ("schedule", WAYS), ("backward_schedule", WAYS)):
        if options.get(key, known[0]) not in known:
            raise UserError(f"'{name}.{key}' is {options[key]!r}", expected=f"one of {', '.join(known)}")
    return ContextSection(**options) if ranks > 1 else None


def refuse_beside(config: Mapping[str, Any], context: ContextSection | None) -> None:
    """What the rest of the JSON asks for and context parallelism does not go with."""
    if context is None:
        return
    tensor = config.get("tensor_parallel") or {}
    others = {
        "'tensor_parallel'": isinstance(tensor, Mapping) and tensor.get("autotp_size", 0) > 1,
        "'sequence_parallel_size'": (config.get("sequence_parallel_size") or 1) > 1,
        "'pipeline'": bool(config.get("pipeline")),
    }
    for what, given in others.items():
        if given:
            raise UserError(f"{what} beside '{SECTION}.context_parallel'", remedy=f"leave out {what}")


def describe(config: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """What `undertow deepspeed check` says about the systems here; `UserError` for what `config` cannot have beside."""
    stream, context = stream_section(found.get("stream")), context_section(found.get("context_parallel"))
    refuse_beside(config, context)
    lines = []
    if stream is not None:
        budget = "what is free on the device" if stream.budget is None else str(stream.budget)
        lines.append(f"streamed backpropagation: within {budget}, chunks {stream.chunk or 'planned'}")
    if context is not None:
        lines.append(
            f"context parallel: {context.ranks} neighbouring ranks share each sequence ({context.layout}, schedule "
            f"{context.schedule}); give them the same batch, a step has batch / {context.ranks} different rows"
        )
    return lines
