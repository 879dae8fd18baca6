"""What the "undertow" section of a DeepSpeed JSON may say of the systems beside checkpoints; needs no DeepSpeed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..checkpointing.deepspeed_config import KNOWN, SECTION, near
from ..dist.errors import UserError
from ..dist.units import parse_bytes

KNOWN |= {"stream": "streamed backpropagation"}


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


def describe(found: Mapping[str, Any]) -> list[str]:
    """What `undertow deepspeed check` says about the systems here."""
    stream = stream_section(found.get("stream"))
    if stream is None:
        return []
    budget = "what is free on the device" if stream.budget is None else str(stream.budget)
    return [f"streamed backpropagation: within {budget}, chunks {stream.chunk or 'planned'}"]
