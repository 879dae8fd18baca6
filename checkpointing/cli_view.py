"""The tables and lines that `undertow ckpt` prints; no command decides anything here."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table

from ..dist.units import format_bytes, format_seconds
from .catalogue import Entry
from .diff import Difference
from .manifest import Manifest, metrics_of
from .tensor_stream import pieces, stored_bytes

FRAME = 6  # lines of a table beside its rows, and the cursor's


def console() -> Console:
    """Where tables go: the terminal's width, or 160 columns where there is none."""
    return Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False)


def show(table: Table) -> None:
    """The title is a line before the table, which would fold a path at its own width."""
    screen = console()
    if table.title:
        screen.print(table.title, soft_wrap=True)
        table.title = None
    screen.print(table)


def say(line: str) -> None:
    sys.stdout.write(line + "\n")


@contextmanager
def live() -> Iterator[Callable[[Path | str, Sequence[Entry]], None]]:
    """Shows a folder's list: on a terminal in place of the one before, with as many of the last rows as fit on it;
    elsewhere one list after the other."""
    screen = console()
    if not screen.is_terminal:
        yield lambda root, entries: show(table(root, entries))
        return
    with Live(console=screen, auto_refresh=False) as shown:
        yield lambda root, entries: shown.update(table(root, entries, last=screen.height - FRAME), refresh=True)


def table(
    root: Path | str, entries: Sequence[Entry], *, remove: Collection[Path] | None = None, last: int | None = None
) -> Table:
    """The list of a folder; with `remove` a column that says what a prune takes away; with `last` so many rows."""
    made = Table(title=f"{sum(entry.usable for entry in entries)} whole in {root}", title_justify="left")
    for name in ("step", "size", "ranks", "age"):
        made.add_column(name, justify="right")
    made.add_column("valid?", overflow="fold")
    if remove is not None:
        made.add_column("prune")
    for entry in entries if last is None else entries[-max(1, last) :]:
        metrics = "".join(f"  {name} {value:.4g}" for name, value in entry.metrics.items())
        problem = entry.problem.replace(f"{entry.path}/", "")  # the row says where
        state = entry.state + (f": {problem}" if problem else "") + metrics
        cells = [str(entry.step), format_bytes(entry.nbytes), str(entry.world_size or ""), _age(entry.age_s), state]
        if remove is not None:
            cells.append("remove" if entry.path in remove else "keep")
        made.add_row(*cells)
    return made


def _age(age_s: float) -> str:
    return format_seconds(float(round(age_s))) if age_s >= 1 else "now"


def differences(title: str, found: Sequence[Difference]) -> Table:
    made = Table(title=title, title_justify="left")
    made.add_column("name", overflow="fold")
    for name in ("differs in", "elements", "of", "largest"):
        made.add_column(name, justify="right")
    made.add_column("note", overflow="fold")
    for item in found:
        number = item.kind == "values" and not item.note.startswith("object:")
        counts = [str(item.count), str(item.total), f"{item.largest:.3g}"] if number else ["", "", ""]
        made.add_row(item.key, item.kind, *counts, item.note)
    return made


def headline(where: Path | str, manifest: Manifest) -> str:
    versions = ", ".join(f"{name} {value}" for name, value in manifest.facts.items() if isinstance(value, str))
    metrics = "".join(f", {name} {value:.6g}" for name, value in metrics_of(manifest).items())
    total = format_bytes(sum(record.nbytes for record in manifest.files.values()))
    ranks = f"{manifest.world_size} rank{'' if manifest.world_size == 1 else 's'}"
    return f"{where}\nstep {manifest.step}, {total} from {ranks}{metrics}; {versions}"


def files(manifest: Manifest) -> Table:
    made = Table(title="files", title_justify="left")
    made.add_column("name")
    made.add_column("size", justify="right")
    made.add_column("checksums", justify="right")
    for name, record in sorted(manifest.files.items()):
        made.add_row(name, format_bytes(record.nbytes), str(len(record.chunks)))
    return made


def contents(manifest: Manifest, match: str) -> Table:
    made = Table(title="contents", title_justify="left")
    made.add_column("name", overflow="fold")
    for name in ("type", "shape", "size", "parts"):
        made.add_column(name, justify="right")
    for key in sorted(manifest.paths):
        if match not in key:
            continue
        record = manifest.tensors.get(key)
        if record is None:
            made.add_row(key, "object", "", format_bytes(manifest.objects[key].length), "1")
        else:
            size = format_bytes(stored_bytes(manifest, key))
            made.add_row(key, record.dtype, str(list(record.shape)), size, str(len(record.shards)))
    return made


def parts(manifest: Manifest, key: str) -> Table:
    record = manifest.tensors[key]
    made = Table(title=f"{key}: {record.dtype} {list(record.shape)}", title_justify="left")
    for name in ("offsets", "sizes", "file", "data at byte"):
        made.add_column(name, justify="right")
    for shard in record.shards:
        made.add_row(str(list(shard.offsets)), str(list(shard.sizes)), shard.file, str(shard.payload))
    return made


def statistics(folder: Path, manifest: Manifest, key: str) -> str:
    """Smallest, largest and mean of the finite values, in float64, and how many are not finite. Complex: of moduli."""
    low, high, total, count, odd = math.inf, -math.inf, 0.0, 0, 0
    for piece in pieces(folder, manifest, key):
        wide = piece.to(torch.complex128).abs() if piece.is_complex() else piece.to(torch.float64)
        finite = wide[torch.isfinite(wide)]
        odd += wide.numel() - finite.numel()
        if finite.numel():
            low, high = min(low, finite.min().item()), max(high, finite.max().item())
            total, count = total + finite.sum().item(), count + finite.numel()
    if not count:
        return f"no finite values; {odd} not finite"
    return f"min {low:.6g}, max {high:.6g}, mean {total / count:.6g}; {odd} of {count + odd} not finite"
