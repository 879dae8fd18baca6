"""What a `Checkpointer` was asked for, looked at before any folder is taken or any other rank waits.

A wrong type is told here by the option's name; found later it would be an AttributeError of ours, on a folder that the
failed object still holds.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any

from ..dist.errors import UserError
from .bucket import Bucket
from .frequency import Frequency
from .mirror import Mirror
from .partner import Partner
from .preemption import Preemption
from .retention import Retention


def check_options(objects: Mapping[str, Any], **options: Any) -> None:
    """Raises `UserError` for the first of `options` that cannot be meant, and for an object whose name is nearly an
    option's. `objects` themselves are looked at by `AppState`."""
    for name, value in options.items():
        fits, expected = RULES[name]
        if not fits(value):
            raise UserError(f"{name}={value!r}", expected=expected)
    if options["partner"] is not None and not options["host_every"]:
        raise UserError("partner without host_every", expected="a save to host memory", remedy="pass host_every=1")
    if not objects:
        raise UserError("nothing to checkpoint was given", remedy="pass model=…, optimizer=… by name")
    for name, thing in objects.items():
        near = [] if callable(getattr(thing, "state_dict", None)) else get_close_matches(name, [*RULES, *FREE], 1, 0.8)
        if near:
            raise UserError(f"Checkpointer has no option '{name}'", remedy=f"{near[0]}={thing!r}")


def _whole(least: int, *, none: bool = False, kind: type | None = None) -> Callable[[Any], bool]:
    def fits(value: Any) -> bool:
        if value is None or (kind is not None and isinstance(value, kind)):
            return none or value is not None
        return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least

    return fits


def _kind(kind: type) -> Callable[[Any], bool]:
    return lambda value: value is None or isinstance(value, kind)


def _each(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, Sequence) and not isinstance(value, str) and all(map(fits, value))


def _positive(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and float(value) > 0


FREE = ("rng", "trace", "ops")  # options that nothing is asked of
RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "every": (_whole(0, kind=Frequency), "every ≥ 0 steps, or a Frequency(…)"),
    "keep": (_whole(1, none=True, kind=Retention), "keep ≥ 1, None for all, or a Retention(…)"),
    "recycle": (_kind(bool), "None (where it helps), True or False"),
    "mirror": (_kind(Mirror), 'None or a Mirror("/lustre/run", every=1000)'),
    "bucket": (_kind(Bucket), 'None or a Bucket("s3://bucket/run", every=1000)'),
    "host_every": (_whole(0, kind=Frequency), "host_every ≥ 0 steps, or a Frequency(…)"),
    "host_generations": (_whole(1), "host_generations ≥ 1"),
    "partner": (_kind(Partner), "None or a Partner()"),
    "per_rank": (_kind(Mapping), "None or a dict of objects with state_dict(), such as {'loader': loader}"),
    "arena_bytes": (_whole(1, none=True), "None or a number of bytes ≥ 1"),
    "device_bytes": (_whole(0), "a number of bytes ≥ 0"),
    "chunk_bytes": (_whole(1), "a number of bytes ≥ 1"),
    "writers": (_whole(1), "writers ≥ 1 threads"),
    "timeout_s": (_positive, "seconds > 0"),
    "preemption": (_kind(Preemption), "None or a Preemption()"),
    "allow_types": (_each(lambda each: isinstance(each, type)), "a list of classes"),
    "observers": (_each(callable), "a list of functions of (report, arena bytes)"),
}


def step_of(step: Any) -> int:
    """The number of a checkpoint; NumPy's and torch's whole numbers count."""
    try:
        number = operator.index(step)
    except TypeError:
        number = -1
    if number < 0:
        raise UserError(f"step={step!r}", expected="a whole number ≥ 0")
    return number


def metrics_of(metrics: Mapping[str, Any] | None) -> dict[str, float]:
    """Plain numbers, taken now: a tensor may change later, and one on a GPU is waited for."""
    if metrics is not None and not isinstance(metrics, Mapping):
        raise UserError(f"metrics={metrics!r}", expected="a dict of numbers, such as {'loss': 1.5}")
    found = {}
    for name, value in (metrics or {}).items():
        try:
            if isinstance(value, str):
                raise TypeError("a text")
            found[str(name)] = float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"metrics[{name!r}]={value!r}", expected="a number") from error
    return found
