"""A `Machine` as tables for a person: rates of copies, disks and arithmetic, and each link with its fit beside it."""

from __future__ import annotations

from rich.console import Console, Group, RenderableType
from rich.table import Table

from .machine import Link, Machine
from .units import format_bytes, format_flops, format_rate, format_seconds

_TITLES = {"copies": "Copies", "disks": "Disk", "flops": "Arithmetic"}


def tables(machine: Machine, skipped: dict[str, str]) -> Group:
    """Everything that was measured, and a line for each number that was not, with the reason."""
    parts: list[RenderableType] = [f"[bold]{machine.name}[/bold]"]
    for name, title in _TITLES.items():
        values: dict[str, float] = getattr(machine, name)
        if values:
            table = Table("", "rate", title=title, title_justify="left")
            table.columns[1].justify = "right"
            for key, value in values.items():
                table.add_row(key, format_flops(value) if name == "flops" else format_rate(value))
            parts.append(table)
    parts += [link_table(name, link) for name, link in machine.links.items()]
    parts += [f"not measured: {key} ({reason})" for key, reason in skipped.items()]
    return Group(*parts)


def link_table(name: str, link: Link) -> Table:
    """Measured one-way times beside those of the fitted line; a ratio far from 1 is where the line does not hold."""
    title = f"Link {name}: {format_seconds(link.latency_s)} + n / ({format_rate(link.bytes_per_s)})"
    table = Table("bytes", "time", "rate", "predicted", "ratio", title=title, title_justify="left")
    table.caption = "both directions at once" if link.duplex else "one direction at a time"
    for column in table.columns:
        column.justify = "right"
    for nbytes, seconds in link.samples:
        predicted_s = link.seconds(nbytes)
        ratio = f"{seconds / predicted_s:.2f}" if predicted_s > 0 else ""
        row = (format_seconds(seconds), format_rate(nbytes / seconds), format_seconds(predicted_s), ratio)
        table.add_row(format_bytes(nbytes), *row)
    return table


def show(machine: Machine, skipped: dict[str, str]) -> None:
    Console(highlight=False).print(tables(machine, skipped))
