"""The section "undertow" of a DeepSpeed JSON, read strictly: DeepSpeed itself ignores what it does not know.

    {"undertow": {"checkpoint": {"lazy": true, "timeout_s": 300}, "stream": {"budget": "20GB"}}}

A misspelt section or key would silently train without what the user asked for, so every unknown name is refused, and
top-level names that are nearly "undertow" too.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..dist.errors import UserError

SECTION = "undertow"
KNOWN = {"checkpoint": "lazy, atomic, verified checkpoints"}  # integrations/deepspeed_plugin adds the other systems
REFUSED = {  # systems that a user may well ask for here, and why not; false and null are fine
    "stream": "only 'import undertow.integrations.deepspeed_plugin' teaches DeepSpeed that section",
    "overlap": "ZeRO partitions and gathers weights by itself, and knows no tensor-parallel layers of ours",
    "context_parallel": "only 'import undertow.integrations.deepspeed_plugin' teaches DeepSpeed that section",
}


@dataclass(frozen=True)
class CheckpointSection:
    """`lazy`: tensors leave during the next forward and backward (false: before save_checkpoint returns).
    `timeout_s`: how long ranks wait for each other's files."""

    lazy: bool = True
    timeout_s: float = 300.0

    def __post_init__(self) -> None:
        if not isinstance(self.lazy, bool):
            raise UserError(f"undertow.checkpoint.lazy is {self.lazy!r}", expected="true or false")
        if isinstance(self.timeout_s, bool) or not isinstance(self.timeout_s, (int, float)) or self.timeout_s <= 0:
            raise UserError(f"undertow.checkpoint.timeout_s is {self.timeout_s!r}", expected="a positive number")


def section(config: Mapping[str, Any]) -> dict[str, Any]:
    """The raw section, {} when there is none. `UserError` for names not in `KNOWN`, with reasons for `REFUSED`."""
    for name in config:
        if name != SECTION and difflib.SequenceMatcher(None, str(name).lower(), SECTION).ratio() > 0.75:
            raise UserError(f"the DeepSpeed configuration has a section '{name}'", remedy=f"write '{SECTION}'")
    found = config.get(SECTION, {})
    if not isinstance(found, Mapping):
        raise UserError(f"'{SECTION}' is {found!r}", expected=f"an object with some of {', '.join(KNOWN)}")
    for name in found:
        if name in REFUSED and name not in KNOWN:
            if found[name] in (None, False):
                continue
            raise UserError(f"'{SECTION}.{name}' cannot be switched on here: {REFUSED[name]}")
        if name not in KNOWN:
            raise UserError(
                f"'{SECTION}.{name}' is unknown", expected=f"one of {', '.join(KNOWN)}", remedy=near(name, KNOWN)
            )
    return dict(found)


def checkpoint_section(raw: Any) -> CheckpointSection | None:
    """From the value of "checkpoint": true means the defaults, false and null off."""
    if raw in (None, False):
        return None
    if raw is True:
        return CheckpointSection()
    if not isinstance(raw, Mapping):
        raise UserError(f"'{SECTION}.checkpoint' is {raw!r}", expected="true, false or an object")
    names = [field.name for field in fields(CheckpointSection)]
    for name in raw:
        if name not in names:
            raise UserError(
                f"'{SECTION}.checkpoint.{name}' is unknown",
                expected=f"one of {', '.join(names)}",
                remedy=near(name, names),
            )
    return CheckpointSection(**raw)


def near(name: str, known: Any) -> str:
    """'write X' for the known name that `name` nearly is, or ''."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f"write '{close[0]}'" if close else ""
