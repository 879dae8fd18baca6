"""`undertow ckpt`: what lies in a checkpoint folder, whether it is whole, and what may go.

Every command but `prune` and `fetch` only reads, takes no lock and may be used beside a running job. PATH is a
checkpoint folder (the newest whole checkpoint in it is meant, or the one of --step), the folder of a run that has one,
one checkpoint, or the URL of checkpoints in an object store (s3://bucket/run), of which commands download what they
need. Exit codes: 0 well, 1 damage found or checkpoints differ, 2 wrong use.
"""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from ..dist.command_line import application, run_application
from ..dist.errors import UserError
from ..dist.progress import Progress
from ..dist.units import format_bytes, parse_bytes
from . import cli_view as view
from .catalogue import Entry
from .diff import compare_checkpoints
from .manifest import COMMIT, BadCheckpoint
from .object_store import is_url
from .places import Found, entries_of, find, look, problem_of, remove
from .places import fetch as fetch_files
from .reader import dtype_of
from .retention import Retention, to_keep
from .safetensors_export import export as write_export
from .safetensors_export import modules_of, plan_export
from .tensor_stream import stored_bytes


def _home(path: str) -> str:
    """The folder `checkpoints` of a run of `undertow train`, when the run's own folder is named."""
    inside = Path(path, "checkpoints")
    return str(inside) if not is_url(path) and Path(path, "config.json").is_file() and inside.is_dir() else path


def _place(name: str) -> Any:
    return typer.Argument(
        metavar=name, callback=_home, help="A folder of checkpoints, one checkpoint, a run's folder, or s3://…."
    )


app = application(no_args_is_help=True)
Where = Annotated[str, _place("PATH")]
Step = Annotated[int | None, typer.Option("--step", help="The checkpoint of this step (default: the newest whole).")]


def main(argv: list[str]) -> int:
    """Run the command line; the exit code."""
    return run_application(app, argv, "undertow ckpt")


@app.callback()
def ckpt() -> None:
    """Look at checkpoints, verify, compare, export and prune them."""


@app.command("list")
def list_(path: Where) -> None:
    """Show every checkpoint in a folder: step, size, ranks, age, and whether it looks whole (lengths, not content)."""
    view.show(view.table(path, entries_of(path)))


@app.command()
def verify(
    path: Where,
    step: Step = None,
    every: Annotated[bool, typer.Option("--all", help="Every checkpoint in the folder.")] = False,
) -> None:
    """Read every byte and compare its checksum. Exit code 1 when anything is damaged."""
    damaged = 0
    for entry in _committed(path, step, every):
        try:
            problem = _problem(look(path, entry))
        except BadCheckpoint as error:
            problem = str(error)
        damaged += bool(problem)
        view.say(f"{entry.path.name}: {'DAMAGED: ' + problem if problem else 'whole'}")
    if damaged:
        raise typer.Exit(1)


def _committed(path: str, step: int | None, every: bool) -> list[Entry]:
    """All, or the newest, whole or not: a damaged one is to be reported, not passed over."""
    if not every and not is_url(path) and (Path(path) / COMMIT).exists():
        return [Entry(0, Path(path), "whole")]
    found = [entry for entry in entries_of(path) if entry.state in ("whole", "damaged")]
    found = [entry for entry in found if every or step in (None, entry.step)]
    if not found:
        which = "" if every or step is None else f" of step {step}"
        raise UserError(f"{path} holds no checkpoint{which}", expected="a folder of checkpoints")
    return found if every else found[-1:]


def _problem(found: Found) -> str:
    with Progress(_total(found), f"verify {found.folder.name}", unit="B") as bar:
        return problem_of(found, bar.update)


def _total(found: Found) -> int:
    return sum(record.nbytes for record in found.manifest.files.values())


@app.command()
def diff(
    a: Annotated[str, _place("A")],
    b: Annotated[str, _place("B")],
    step_a: Annotated[int | None, typer.Option(help="Step of A.")] = None,
    step_b: Annotated[int | None, typer.Option(help="Step of B, which may be the same folder.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Show equal tensors too.")] = False,
) -> None:
    """Compare two checkpoints tensor by tensor and bit by bit. Exit code 1 when they differ."""
    one, two = find(a, step_a), find(b, step_b)
    shared = [key for key, record in one.manifest.tensors.items() if _same_form(record, two.manifest.tensors.get(key))]
    with one.files(None) as files_a, two.files(None) as files_b:
        with Progress(sum(stored_bytes(one.manifest, key) for key in shared), "diff", unit="B") as bar:
            pair = (files_a, one.manifest), (files_b, two.manifest)
            found = compare_checkpoints(*pair, on_bytes=bar.update)
    different = [item for item in found if item.kind != "equal"]
    view.show(view.differences(f"A = {one.where}, B = {two.where}", found if everything else different))
    view.say(f"{len(found) - len(different)} of {len(found)} tensors and objects are equal")
    if different:
        raise typer.Exit(1)


def _same_form(one, two) -> bool:
    return two is not None and (one.dtype, one.shape) == (two.dtype, two.shape)


@app.command()
def inspect(
    path: Where,
    step: Step = None,
    tensor: Annotated[str, typer.Option(help="Show this tensor's parts and statistics.")] = "",
    match: Annotated[str, typer.Option("--filter", help="Only names that contain this.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False,
) -> None:
    """Show what one checkpoint consists of: versions, files, tensors, objects. Nothing is unpickled."""
    found = find(path, step)
    manifest = found.manifest
    if as_json:
        sys.stdout.write(manifest.dumps().decode() + "\n")
        return
    if tensor:
        if tensor not in manifest.tensors:
            near = [key for key in manifest.tensors if tensor in key][:5]
            raise UserError(f"{found.where} holds no tensor '{tensor}'", expected=f"a name such as {', '.join(near)}")
        view.show(view.parts(manifest, tensor))
        with found.files([tensor]) as folder:
            view.say(view.statistics(folder, manifest, tensor))
        return
    view.say(view.headline(found.where, manifest))
    view.show(view.files(manifest))
    view.show(view.contents(manifest, match))


@app.command()
def export(
    path: Where,
    out: Annotated[Path, typer.Option(help="A new or empty folder for the files.")],
    step: Step = None,
    module: Annotated[str, typer.Option(help="Which module to export, by the name given to Checkpointer.")] = "",
    dtype: Annotated[str, typer.Option(help="Convert floating-point tensors, to bfloat16 for example.")] = "",
    max_shard_size: Annotated[str, typer.Option(help="Largest file; one tensor may exceed it.")] = "5GB",
    check: Annotated[bool, typer.Option("--verify/--no-verify", help="Verify the checkpoint first.")] = True,
) -> None:
    """Write a module as Hugging Face safetensors: model.safetensors, or several files and their index."""
    found = find(path, step)
    manifest, modules = found.manifest, modules_of(found.manifest)
    module = module or (modules[0] if len(modules) == 1 else "model")
    wanted = None
    if dtype:
        try:
            wanted = dtype_of(dtype)
        except BadCheckpoint as error:
            raise UserError(f"--dtype {dtype}", expected="a torch type such as bfloat16 or float16") from error
    limit = parse_bytes(max_shard_size, name="--max-shard-size")
    files = plan_export(manifest, module, max_shard_bytes=limit, dtype=wanted)
    problem = _problem(found) if check and found.bucket is None else ""  # what is downloaded is checked as it comes
    if problem:
        raise UserError(f"the checkpoint is damaged: {problem}", remedy="export another step")
    with found.files([name for file in files for name, _, _ in file.tensors]) as folder:
        with Progress(sum(file.nbytes for file in files), "export", unit="B") as bar:
            write_export(folder, manifest, files, out, on_bytes=bar.update)
    tensors = sum(len(file.tensors) for file in files)
    view.say(f"{tensors} tensors of '{module}' of step {manifest.step} in {len(files)} file(s) under {out}")


@app.command()
def fetch(
    url: Annotated[str, typer.Argument(metavar="URL", help="Checkpoints in an object store, s3://… for example.")],
    out: Annotated[Path, typer.Option(help="A folder of checkpoints, or a new one.")],
    step: Step = None,
) -> None:
    """Copy a checkpoint from an object store to a folder, verified, as if it had been saved there."""
    found = find(url, step)
    with Progress(_total(found), f"fetch {found.folder.name}", unit="B") as bar:
        written = fetch_files(found, out, bar.update)
    view.say(f"{format_bytes(_total(found))} of step {found.manifest.step} in {written}")


@app.command()
def prune(
    path: Where,
    keep: Annotated[str, typer.Option(help="What stays: last=3,every=1000,best=2:loss:min")] = "last=3",
    aside: Annotated[bool, typer.Option("--aside", help="Also remove what restores have set aside.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run/--no-dry-run", help="Only say what would be removed.")] = True,
) -> None:
    """Remove checkpoints that no rule keeps. Without --no-dry-run it only shows them. Refused in a folder to which a
    job writes."""
    policy = Retention.parse(keep)
    if not is_url(path) and (Path(path) / COMMIT).exists():
        raise UserError(f"{path} is one checkpoint", expected="a folder of checkpoints")
    found = entries_of(path)
    whole = {entry.step: entry for entry in found if entry.usable}
    stay = to_keep(list(whole), policy, {step: entry.metrics for step, entry in whole.items()})
    go = [entry for step, entry in sorted(whole.items()) if step not in stay]
    go += [entry for entry in found if aside and entry.aside]
    view.show(view.table(path, found, remove={entry.path for entry in go}))
    total = format_bytes(sum(entry.nbytes for entry in go))
    if dry_run or not go:
        view.say(f"{len(go)} would be removed ({total}); pass --no-dry-run to do it" if go else "nothing to remove")
        return
    remove(path, go)
    view.say(f"{len(go)} removed ({total})")


@app.command()
def watch(
    path: Where,
    interval_s: Annotated[float, typer.Option("--interval", help="Seconds between two looks.")] = 2.0,
    count: Annotated[int, typer.Option(help="Stop after this many looks (0: at Ctrl-C).")] = 0,
) -> None:
    """Show the list again and again, with saves that are being written."""
    if interval_s <= 0:
        raise UserError(f"--interval {interval_s}", expected="a time above 0")
    looks = 0
    with view.live() as screen, suppress(KeyboardInterrupt):
        while True:
            screen(path, entries_of(path))
            looks += 1
            if looks == count:
                return
            time.sleep(interval_s)
