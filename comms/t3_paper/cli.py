"""`undertow simulate t3`: the paper's evaluation as table, JSON and picture; or what T3 would give one's own model.

Without a model it reproduces the paper on the paper's GPU. With `--hidden … --tokens …` or `--model config.json` it
simulates that model's sub-layers, on the paper's GPU changed by the options, or on a machine that was measured. The
calibrated constants stay what they were fitted to on the paper's GPU, and the output says so.
"""

from __future__ import annotations

import json as jsonlib
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ...dist.command_line import application, run_application
from ...dist.errors import UserError
from ...dist.machine import Machine
from . import table
from .calibrate import calibrate
from .document import model_document, paper_document
from .hardware import Hardware, from_machine
from .paper import evaluate, evaluate_paper
from .workloads import Model, paper_rows, read_model, sublayers

app = application()
_FILE_COLUMNS = 140  # a file or pipe has no width of its own
_TIMED = ("T-NLG", 8, "FC-2")  # the sub-layer whose DRAM traffic the paper draws over time (figure 17)

TOKENS, TP = 4096, 8  # where the user does not say
_MODEL = "Your model (instead of the paper's)"
_GPU = "Your GPU and links (instead of the paper's)"


def main(argv: list[str]) -> int:
    """The command line after `undertow simulate t3`; returns the exit code."""
    return run_application(app, argv, "undertow simulate t3")


def _option(
    name: str, text: str, panel: str | None = None, metavar: str | None = None, least: float | None = None
) -> Any:
    return typer.Option(name, help=text, rich_help_panel=panel, metavar=metavar, min=least, show_default=False)


@app.command()
def _t3(
    json: Annotated[str, _option("--json", "write the results as JSON", metavar="FILE")] = "",
    png: Annotated[str, _option("--png", "draw the results (needs the extra `plots`)", metavar="FILE")] = "",
    constants: Annotated[bool, _option("--constants", "list the constants and where they come from")] = False,
    fit: Annotated[bool, _option("--calibrate", "repeat the fit of the calibrated constants, and use it")] = False,
    model: Annotated[str, _option("--model", "a transformers config.json", _MODEL, "FILE")] = "",
    hidden: Annotated[int | None, _option("--hidden", "hidden size", _MODEL, least=1)] = None,
    layers: Annotated[int | None, _option("--layers", "number of layers (default 1)", _MODEL, least=1)] = None,
    intermediate: Annotated[
        int | None, _option("--intermediate", "feed-forward width (4 x hidden)", _MODEL, least=1)
    ] = None,
    qkv: Annotated[int | None, _option("--qkv", "columns of the QKV projection (3 x hidden)", _MODEL, least=1)] = None,
    gated: Annotated[bool, _option("--gated", "the feed-forward has a gate", _MODEL)] = False,
    tokens: Annotated[int | None, _option("--tokens", "sequence length x micro-batch (4096)", _MODEL, least=1)] = None,
    tp: Annotated[int | None, _option("--tp", "tensor-parallel degree (8)", _MODEL, least=2)] = None,
    machine: Annotated[str, _option("--machine", "what `undertow probe` wrote", _GPU, "FILE")] = "",
    link_gbps: Annotated[float | None, _option("--link-GBps", "ring link, GB/s per direction", _GPU)] = None,
    latency_us: Annotated[float | None, _option("--link-latency-us", "its latency, microseconds", _GPU)] = None,
    dram_gbps: Annotated[float | None, _option("--dram-GBps", "memory bandwidth, GB/s", _GPU)] = None,
    peak_tflops: Annotated[float | None, _option("--peak-TFLOPs", "peak matrix rate, 10^12 operations/s", _GPU)] = None,
    compute_units: Annotated[int | None, _option("--compute-units", "CUs or SMs", _GPU)] = None,
    llc_mib: Annotated[float | None, _option("--llc-MiB", "last-level cache", _GPU)] = None,
) -> None:
    """Simulate the T3 paper's hardware: its own evaluation, or your model and links. Simulated, not measured.

    \b
    The paper's evaluation:   undertow simulate t3
    Your model on your links: undertow simulate t3 --model config.json --tokens 8192 --tp 8 --link-GBps 450
    On a measured machine:    undertow probe --output m.json; undertow simulate t3 --hidden 8192 --machine m.json

    Whatever is not given is the paper's, and the output says what that is.
    """
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, width=_FILE_COLUMNS)
    hw = _hardware(machine, link_gbps, latency_us, dram_gbps, peak_tflops, compute_units, llc_mib)
    paper_gpu = hw == Hardware()
    own = _model(model, hidden, layers, intermediate, qkv, gated, tokens, tp)
    outputs = [_writable(name) for name in (json, png) if name]
    if constants:
        console.print(table.constants_table())
    if fit:
        if not paper_gpu:
            raise UserError("--calibrate on another GPU", expected="the paper's, whose results are known")
        hw, fits = calibrate(hw)
        console.print(table.fit_table(fits))
    if own is None:
        rows = evaluate_paper(hw)
        timed = next(row for row in paper_rows() if (row.model, row.tp, row.layer) == _TIMED)
        document = paper_document(rows, hw)
        console.print(table.row_table(rows, "sub-layers: sequential parts, speedups over sequential, DRAM traffic"))
        console.print(table.paper_table(rows))
        if not paper_gpu:
            console.print("this is not the paper's GPU: deviations from the paper are then no error")
    else:
        degree = tp or TP
        subs = sublayers(own, degree)
        rows, timed = evaluate(subs, hw), subs[1]
        document = model_document(rows, hw, own.layers)
        console.print(table.row_table(rows, f"{own.name} on {degree} GPUs: speedups over sequential, DRAM traffic"))
        console.print(table.total_table(own, rows))
        console.print(table.hardware_line(hw))
        console.print(
            "these are the sliced products and their all-reduce; attention and the rest of a step come on top"
        )
    console.print(
        "simulated, not measured; gemm_efficiency, reduce_efficiency, interference and mca_share are calibrated"
    )
    for path in outputs:
        if path == Path(json):
            path.write_text(jsonlib.dumps(document, indent=2) + "\n")
        else:
            from .plots import draw

            draw(rows, timed, hw, path, paper=own is None)
        console.print(f"written: {path}")


def _hardware(
    machine: str,
    link_gbps: float | None,
    latency_us: float | None,
    dram_gbps: float | None,
    peak_tflops: float | None,
    units: int | None,
    llc_mib: float | None,
) -> Hardware:
    """The paper's GPU with what the options change; a measured machine first, single options over it."""
    hw = from_machine(Machine.load(Path(machine))) if machine else Hardware()
    peak = hw.peak_flops if peak_tflops is None else peak_tflops * 1e12
    options = {
        "link_bytes_per_s": (link_gbps, 1e9),
        "link_latency_s": (latency_us, 1e-6),
        "dram_bytes_per_s": (dram_gbps, 1e9),
        "llc_bytes": (llc_mib, 2**20),
        "compute_units": (units, 1),
    }
    changes = {name: value * unit for name, (value, unit) in options.items() if value is not None}
    return replace(hw, **changes).with_peak(peak)


def _model(
    config: str,
    hidden: int | None,
    layers: int | None,
    intermediate: int | None,
    qkv: int | None,
    gated: bool,
    tokens: int | None,
    tp: int | None,
) -> Model | None:
    """The user's model, or None for the paper's; `UserError` where options do not go together."""
    shape = {"--hidden": hidden, "--layers": layers, "--intermediate": intermediate, "--qkv": qkv, "--gated": gated}
    if config:
        given = [name for name, value in shape.items() if value]
        if given:
            raise UserError(f"--model with {', '.join(given)}", expected="the shape from one place", remedy="drop one")
        return read_model(Path(config), tokens or TOKENS)
    if hidden is None:
        given = [name for name, value in {**shape, "--tokens": tokens, "--tp": tp}.items() if value]
        if given:
            raise UserError(f"{', '.join(given)} without a model", expected="--hidden or --model beside them")
        return None
    plain = Model.plain(f"hidden {hidden}", hidden, layers or 1, tokens or TOKENS)
    return replace(plain, intermediate=intermediate or plain.intermediate, qkv=qkv or plain.qkv, gated=gated)


def _writable(name: str) -> Path:
    path = Path(name)
    if not path.parent.is_dir() or path.is_dir():
        raise UserError(f"cannot write {path}", expected="a file in a folder that exists")
    return path
