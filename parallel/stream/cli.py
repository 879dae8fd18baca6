"""`undertow stream plan`: what a long sequence would need, and how it would be run, without a GPU or weights.

Weights, gradients and optimizer state are subtracted from the device's memory first; the planner gets the rest. With a
machine file from `undertow probe` the time of a step is predicted from its measured rates.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ...dist.command_line import application, run_application
from ...dist.errors import UserError
from ...dist.machine import Machine
from ...dist.units import format_bytes, parse_bytes
from ..memory_model import DecoderShape, checkpointing_bytes, step_flops
from .plan import StreamPlan
from .planner import plan as make_plan
from .ring_memory import ring_bytes

KNOWN = {
    "llama3-8b": DecoderShape(32, 4096, 32, 8, 128, 14336, 128256, 218_112_000),
    "qwen3-8b": DecoderShape(36, 4096, 32, 8, 128, 12288, 151936, 192_945_152, more_norms=5120),
    "qwen3-4b": DecoderShape(36, 2560, 32, 8, 128, 9728, 151936, 100_930_560, tied=True, more_norms=5120),
}
OPTIMIZERS = {"none": 0, "sgd": 0, "adamw": 8, "adamw+master": 12}  # bytes of state per parameter
LONGEST = 1 << 26
app = application()


def main(argv: list[str]) -> int:
    """Run the command line; the exit code."""
    return run_application(app, argv, "undertow stream")


@app.callback()
def stream() -> None:
    """Streamed backpropagation: plan it before it runs."""


@app.command()
def plan(
    model: Annotated[str, typer.Option(help=f"a config.json, its folder, or one of {', '.join(KNOWN)}")],
    seq_len: Annotated[int, typer.Option(help="tokens of a sequence", min=1)],
    batch: Annotated[int, typer.Option(help="sequences of a step", min=1)] = 1,
    memory: Annotated[str, typer.Option(help="memory of the device")] = "80GB",
    host: Annotated[str, typer.Option(help="host memory for offload; 0 for none")] = "100GB",
    optimizer: Annotated[str, typer.Option(help=f"{', '.join(OPTIMIZERS)}")] = "none",
    shards: Annotated[int, typer.Option(help="ranks that share weights, gradients, state (FSDP, ZeRO 3)", min=1)] = 1,
    chunk: Annotated[int | None, typer.Option(help="rows of a chunk", show_default=False)] = None,
    context: Annotated[int, typer.Option(help="ranks that share a sequence, by ring attention", min=1)] = 1,
    machine: Annotated[str, typer.Option(metavar="FILE", help="what `undertow probe` wrote: predicts time")] = "",
) -> None:
    """Print the plan for MODEL at SEQ_LEN, its predicted peak, and the longest sequences that would fit."""
    shape = shape_of(model)
    if optimizer not in OPTIMIZERS:
        raise UserError(f"no optimizer is called '{optimizer}'", expected=f"one of {', '.join(OPTIMIZERS)}")
    total, host_bytes = parse_bytes(memory, name="--memory"), parse_bytes(host, name="--host")
    resident = shape.parameters * (2 * shape.element_size + OPTIMIZERS[optimizer]) // shards
    gathered = 2 * shape.layer_parameters * shape.element_size if shards > 1 else 0
    budget = total - resident - gathered
    if budget <= 0:
        raise UserError(
            f"weights, gradients and state take {format_bytes(resident + gathered)} of {format_bytes(total)}",
            remedy="more --shards, a smaller optimizer, or a device with more --memory",
        )
    console = Console(highlight=False)
    ranks, mine = (context, -(-seq_len // context)) if context > 1 else (0, seq_len)
    # With sharded weights a neighbour's are not there in backward: every layer's input is kept.
    kind: dict[str, Any] = {"ranks": ranks, "every": 1 if shards > 1 else None}
    made = make_plan(shape, batch, mine, budget_bytes=budget, host_bytes=host_bytes, chunk=chunk, **kind)
    console.print(f"{shape.parameters / 1e9:.2f} G parameters: {format_bytes(resident)} of weights, gradients, state")
    if context > 1:
        console.print(
            f"each of {context} ranks: {mine} tokens, and {format_bytes(host_bytes)} of host memory for itself"
        )
    console.print(str(made), markup=False, soft_wrap=True)
    fits = made.device_bytes <= budget
    verdict = "" if fits else ": it does not fit"
    console.print(
        f"peak        {format_bytes(resident + gathered + made.device_bytes)} of {format_bytes(total)}{verdict}"
    )
    work = _work(shape, made, ranks)
    console.print(f"work        {sum(work.values()) / 1e15:.2f} PFLOP a step")
    if machine:
        console.print(f"time        {_seconds(Machine.load(Path(machine)), work):.1f} s a step, from {machine}")
    console.print(_lengths(shape, batch, budget, host_bytes, kind))
    if not fits:
        raise typer.Exit(1)


def shape_of(model: str) -> DecoderShape:
    """A known name, a config.json, or a folder with one. `UserError` otherwise."""
    if model in KNOWN:
        return KNOWN[model]
    path = Path(model)
    path = path / "config.json" if path.is_dir() else path
    try:
        return DecoderShape.from_config(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read the model config {path} ({type(error).__name__}: {error})",
            expected=f"a config.json, its folder, or one of {', '.join(KNOWN)}",
        ) from error


def _work(shape: DecoderShape, made: StreamPlan, ranks: int) -> dict[str, float]:
    return step_flops(shape, made.batch, made.tokens, chunks=len(made.bounds), ranks=ranks, **made.fractions)


def _seconds(machine: Machine, work: dict[str, float]) -> float:
    rates = {kind: machine.flops.get(f"{kind}/bfloat16") for kind in work}
    missing = [kind for kind, rate in rates.items() if not rate]
    if missing:
        raise UserError(
            f"the machine file has no rate for {', '.join(f'{kind}/bfloat16' for kind in missing)}",
            remedy="undertow probe on a machine with a GPU",
        )
    return sum(amount / rates[kind] for kind, amount in work.items())  # type: ignore[operator]


def longest(fits) -> int:
    """The largest number of tokens, in steps of 1024, for which `fits` holds; 0 when not even 1024 do."""
    low, high = 0, LONGEST // 1024
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle * 1024) else (low, middle - 1)
    return low * 1024


def _lengths(shape: DecoderShape, batch: int, budget: int, host: int, kind: dict[str, Any]) -> Table:
    """Of a whole sequence; checkpointing is counted with the buffers of the same ring."""
    table = Table("way", "longest sequence", title="what would fit (predicted)", title_justify="left")
    context = max(1, kind["ranks"] or 1)
    row = shape.layers * shape.width * shape.element_size * batch

    def plain(chunked: bool, offload: bool):
        def fits(tokens: int) -> bool:
            needed = checkpointing_bytes(shape, batch * tokens, chunked_loss=chunked, offload=offload)
            needed += max(ring_bytes(shape, batch * tokens, context, batch=batch)) if context > 1 else 0
            return needed <= budget * 0.94 and (not offload or tokens * row <= host)

        return fits

    def ours(**how):
        how |= {"budget_bytes": budget, **kind}
        return lambda tokens: "exceeds" not in make_plan(shape, batch, tokens, **how).reason

    ways = {
        "gradient checkpointing": plain(False, False),
        "… and chunked loss": plain(True, False),
        "… and offload": plain(True, True),
        "streamed": ours(offload=False),
        "streamed, offload": ours(host_bytes=host),
    }
    for name, fits in ways.items():
        table.add_row(name, f"{context * longest(fits) // 1024:,} K tokens")
    return table
