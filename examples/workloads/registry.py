"""The workloads by name, in the order of the table. A module is imported only when its workload is asked for."""

from __future__ import annotations

import importlib

from ...dist.errors import UserError
from .contract import Workload

MODULES = {
    "mor": "mor",
    "graphgps": "graphgps",
    "trace": "trace",
    "stable-rps": "stable_rps",
    "atlas": "atlas",
    "thoughts": "thoughts",
}


def get(name: str) -> Workload:
    if name not in MODULES:
        raise UserError(f"no workload '{name}'", expected=f"one of {', '.join(MODULES)}")
    return importlib.import_module(f".{MODULES[name]}", __package__).WORKLOAD


def all_workloads() -> list[Workload]:
    return [get(name) for name in MODULES]
