"""`undertow deepspeed`: what a DeepSpeed configuration will do, whether a checkpoint is whole, and its conversion."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import typer

from ..checkpointing.deepspeed_config import KNOWN, REFUSED, checkpoint_section, section
from ..checkpointing.tag_folder import candidates, problems, read_record
from ..dist.command_line import application, run_application
from ..dist.errors import MissingPackage, UserError
from .deepspeed_sections import describe

app = application(no_args_is_help=True)


def main(argv: list[str]) -> int:
    """Run the command line; the exit code."""
    return run_application(app, argv, "undertow deepspeed")


@app.callback()
def deepspeed() -> None:
    """Checkpoints and systems under DeepSpeed."""


@app.command()
def check(config: Annotated[Path, typer.Argument(help="A DeepSpeed JSON file.")]) -> None:
    """Say what a configuration will do, or what is wrong with its "undertow" section."""
    try:
        raw = json.loads(config.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {config} ({error})", expected="a DeepSpeed JSON file") from error
    if not isinstance(raw, dict):
        raise UserError(f"{config} holds a {type(raw).__name__}", expected="a JSON object")
    found = section(raw)
    stage = raw.get("zero_optimization", {}).get("stage", 0)
    checkpoint, others = checkpoint_section(found.get("checkpoint")), describe(raw, found)
    print(f"ZeRO stage {stage}")
    if checkpoint is None:
        print("checkpoints: DeepSpeed's own")
    else:
        late = (
            "leave during the next forward and backward"
            if checkpoint.lazy
            else "are copied before save_checkpoint returns"
        )
        print(f"checkpoints: undertow; tensors {late}; ranks wait {checkpoint.timeout_s:g} s for each other")
    for line in others:
        print(line)
    for name in sorted(set(KNOWN) - set(found)):
        print(f"off: {name} ({KNOWN[name]})")
    for name in sorted(set(REFUSED) - set(KNOWN)):
        print(f"not under DeepSpeed: {name} ({REFUSED[name]})")


@app.command()
def verify(
    path: Annotated[Path, typer.Argument(help="The folder given to save_checkpoint, or one tag in it.")],
) -> None:
    """Check every byte of the newest checkpoint, or of one tag. Exit code 1 when something is wrong."""
    folder = path
    if read_record(path) is None:
        tags = candidates(path)
        if not tags:
            raise UserError(f"{path} holds no DeepSpeed checkpoint", expected="a folder with tags, or a tag")
        folder = path / tags[0]
    found = problems(folder)
    for problem in found:
        print(problem)
    if found:
        sys.exit(1)
    record = read_record(folder)
    assert record is not None
    print(f"{folder}: {len(record.files)} files are whole")


@app.command()
def convert(
    path: Annotated[Path, typer.Argument(help="The folder given to save_checkpoint.")],
    out: Annotated[Path, typer.Argument(help="A new folder for the universal checkpoint.")],
    tag: Annotated[str, typer.Option(help="Which tag (default: the newest that is whole).")] = "",
    workers: Annotated[int, typer.Option(help="Processes that read and write.")] = 2,
) -> None:
    """Write a universal checkpoint, for another number of ranks: DeepSpeed's own converter on verified files.

    Load it with {"checkpoint": {"load_universal": true}} and load_checkpoint(OUT).
    """
    try:
        from deepspeed.checkpoint import ds_to_universal
    except ImportError:
        raise MissingPackage("deepspeed", extra="deepspeed", needed_for="the conversion") from None
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} holds files", expected="a new or empty folder")
    tried = [tag] if tag else candidates(path)
    whole = next((name for name in tried if not problems(path / name)), None)
    if whole is None:
        raise UserError(f"no whole checkpoint in {path} (tried: {', '.join(tried) or 'none found'})")
    ds_to_universal.main(
        SimpleNamespace(
            input_folder=str(path / whole),
            output_folder=str(out / whole),
            num_extract_workers=workers,
            num_merge_workers=workers,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
    )
    (out / "latest_universal").write_text(whole)
    print(f"{out / whole}")
