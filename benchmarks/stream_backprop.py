"""Streamed backpropagation against gradient checkpointing: time, peak memory and correctness of one forward + backward.

    python benchmarks/stream_backprop.py --model llama3-8b --layers 8 --tokens 8192,32768,131072 --seconds 500

Random-init models of real shapes with fewer layers (time and memory are linear in layers; the head is there once),
bfloat16, gradients only, all arms in one process on the same weights and tokens. Gradients are checked first: against
float32 gradients of the same weights, ours may not be further away than Hugging Face's own bfloat16 gradients. Rivals
get our chunked loss, which makes them faster than with their own, and `@cudnn` arms the faster attention kernel. Cells
are run in the order of `--tokens` until the time is used up; an arm that ran out of memory is not tried at longer
sequences. `plain+ce` keeps everything and computes nothing twice, where that fits; `hf+mask` is the baseline of the
StreamBP paper: a padding mask, which keeps Hugging Face from causal flash attention.
`python benchmarks/stream_report.py JSON…` turns the files of `--json` into a table and a plot.
With `--streambp FOLDER` the published StreamBP runs in processes of its own (`stream_rival.py` says how to fill
FOLDER), after our model has left the device. `--batches 1,2,4` repeats everything for each batch size; an arm like
`ours+stash#32768` has chunks of that many rows. `benchmarks/stream_session.py` runs all of it in one GPU session.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from undertow.benchmarks.facts import facts
from undertow.parallel.memory_model import DecoderShape, checkpointing_bytes, loss_bytes, saved_bytes
from undertow.parallel.stream import causal_loss, rows_of, stream_backprop
from undertow.parallel.stream.offload import SLAB_BYTES

SHAPES: dict[str, dict[str, Any]] = {
    "llama3-8b": dict(
        model_type="llama", hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8,
        num_hidden_layers=32, vocab_size=128256, rms_norm_eps=1e-5,
    ),
    "qwen3-8b": dict(
        model_type="qwen3", hidden_size=4096, intermediate_size=12288, num_attention_heads=32, num_key_value_heads=8,
        num_hidden_layers=36, vocab_size=151936, head_dim=128,
    ),
    "qwen3-4b": dict(
        model_type="qwen3", hidden_size=2560, intermediate_size=9728, num_attention_heads=32, num_key_value_heads=8,
        num_hidden_layers=36, vocab_size=151936, head_dim=128, tie_word_embeddings=True,
    ),
    "tiny": dict(
        model_type="qwen3", hidden_size=128, intermediate_size=384, num_attention_heads=8, num_key_value_heads=4,
        num_hidden_layers=4, vocab_size=4096, head_dim=16,
    ),
}  # fmt: skip
RIVALS = ("plain+ce", "hf", "hf+mask", "hf+ce", "hf+ce@cudnn", "hf+ce+offload", "alst")
LONG = 32768  # tokens, from which an eighth of them is enough to warm up
OURS = {
    "ours": {"offload": False, "stash": False},
    "ours+stash": {"offload": False, "stash": True},
    "ours+offload": {"offload": True, "stash": False},
    "ours+offload+stash": {"offload": True, "stash": True},
    "ours+offload+every2": {"offload": True, "stash": False, "every": 2},
    "ours@flash2": {"offload": False, "stash": False, "attention_backend": "flash2"},
    "ours auto": {},
}


def options_of(arm: str, chunk: int | None) -> dict[str, Any]:
    """Of one of our arms; `arm#ROWS` has chunks of its own length, so that lengths can be compared in one run."""
    name, _, rows = arm.partition("#")
    return {**OURS[name], "chunk": None if name == "ours auto" else int(rows) if rows else chunk}


def build(name: str, layers: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    options = {**SHAPES[name], "num_hidden_layers": layers, "max_position_embeddings": 1 << 21, "use_cache": False}
    config = AutoConfig.for_model(**options)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype)
    return model.train()


def chunked_loss(model: Any, tokens: Tensor) -> Tensor:
    """A rival's loss without full logits: the decoder as it is, our rows for the head."""
    hidden = model.model(input_ids=tokens).last_hidden_state
    return causal_loss(rows_of(hidden, model.lm_head), nn.functional.pad(tokens[:, 1:], (0, 1), value=-100))


@contextlib.contextmanager
def tiled_mlps(model: nn.Module, rows: int) -> Iterator[None]:
    """Every MLP in tiles of the sequence, each recomputed in backward: the tiling of ALST."""
    found: list[Any] = [m.mlp for m in model.modules() if hasattr(m, "mlp")]

    def tile(mlp: nn.Module):
        plain = type(mlp).forward.__get__(mlp)
        return lambda x: torch.cat([checkpoint(plain, part, use_reentrant=False) for part in x.split(rows, 1)], 1)

    for mlp in found:
        mlp.forward = tile(mlp)
    try:
        yield
    finally:
        for mlp in found:
            del mlp.forward


@contextlib.contextmanager
def armed(arm: str, model: Any, chunk: int | None) -> Iterator[Callable[[Tensor], tuple[Tensor, Any]]]:
    """The arm's step, tokens to (loss, plan or None), with the model set up for it and put back afterwards."""
    if arm.partition("#")[0] in OURS:
        with stream_backprop(model, **options_of(arm, chunk)) as engine:

            def ours(tokens: Tensor) -> tuple[Tensor, Any]:
                loss = model(input_ids=tokens, labels=tokens).loss
                loss.backward()
                refused = [reason for reason in engine.report().values() if reason != "streamed"]
                if refused:
                    raise RuntimeError(f"not streamed: {refused[0]}")
                return loss.detach(), engine.last_plan

            yield ours
        return
    on_cuda = next(model.parameters()).is_cuda  # transformers' offload pins memory, which a CPU build cannot
    if arm != "plain+ce":
        model.gradient_checkpointing_enable(
            {"use_reentrant": False}, offload=on_cuda and ("offload" in arm or arm == "alst")
        )
    kernel = sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if "@cudnn" in arm else contextlib.nullcontext()
    tiled = tiled_mlps(model, 16384) if arm == "alst" else contextlib.nullcontext()

    def rival(tokens: Tensor) -> tuple[Tensor, Any]:
        if arm == "hf+mask":
            mask = torch.ones_like(tokens)
            mask[:, -tokens.shape[1] // 10 :] = 0  # up to a fifth of the tokens in the paper's script
            loss = model(input_ids=tokens, labels=tokens.masked_fill(mask == 0, -100), attention_mask=mask).loss
        else:
            loss = model(input_ids=tokens, labels=tokens).loss if arm == "hf" else chunked_loss(model, tokens)
        loss.backward()
        return loss.detach(), None

    try:
        with kernel, tiled:
            yield rival
    finally:
        if arm != "plain+ce":
            model.gradient_checkpointing_disable()


def forget(model: nn.Module, device: torch.device) -> None:
    for parameter in model.parameters():
        parameter.grad = None
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def pinned_blocks() -> int | None:
    """Blocks of pinned host memory that torch has asked the system for so far; None where it does not count them."""
    return torch.cuda.host_memory_stats().get("num_host_alloc") if hasattr(torch.cuda, "host_memory_stats") else None


def reserve_pinned(gibibytes: int) -> None:
    """Have torch's allocator keep so many slabs of the streamed ways' size, so that no step has to pin them first."""
    begin = time.perf_counter()
    slabs = [torch.empty(SLAB_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(gibibytes)]
    took = time.perf_counter() - begin
    print(f"pinned {len(slabs)} GiB in {took:.1f} s", flush=True)


def measure(arm: str, model: Any, tokens: Tensor, chunk: int | None, repeats: int, warm: str) -> dict[str, Any]:
    """Median seconds, peak bytes above weights and gradients, loss and gradient norm of one cell. `warm`: 'whole' for
    an untimed step first, 'part' for one over an eighth of the tokens, after which a first step in which the system
    has to find and pin host memory is told apart (`first_seconds`): it does so once in a run."""
    device = tokens.device
    on_cuda = device.type == "cuda"
    synchronize = torch.cuda.synchronize if on_cuda else (lambda: None)
    row: dict[str, Any] = {"arm": arm, "tokens": tokens.shape[1], "batch": tokens.shape[0]}
    seconds, loss, plan = [], torch.zeros(()), None
    try:
        with armed(arm, model, chunk) as step:
            forget(model, device)  # what the arm before cached; between repeats the allocator keeps its blocks
            turns = deque(range(-1 if warm else 0, repeats))
            while turns:
                turn = turns.popleft()
                for parameter in model.parameters():
                    parameter.grad = None
                if turn < 0 and warm == "part":
                    step(tokens[:, : tokens.shape[1] // 8])
                    continue
                if on_cuda:
                    torch.cuda.reset_peak_memory_stats()
                synchronize()
                blocks, start = pinned_blocks() if on_cuda else None, time.perf_counter()
                loss, plan = step(tokens)
                synchronize()
                took = time.perf_counter() - start
                pins = plan.host_bytes > 0 if plan is not None else "offload" in arm
                if blocks is not None:
                    pins = pinned_blocks() != blocks
                if turn == 0 and warm == "part" and pins and "first_seconds" not in row:
                    row["first_seconds"] = took
                    turns.appendleft(0)
                elif turn >= 0:
                    seconds.append(took)
    except torch.OutOfMemoryError:
        forget(model, device)
        return {**row, "oom": True}
    resident = sum(2 * p.numel() * p.element_size() for p in model.parameters())
    norm = torch.stack([p.grad.float().norm() for p in model.parameters() if p.grad is not None]).norm()
    row |= {"seconds": statistics.median(seconds), "all_seconds": seconds, "loss": loss.item(), "norm": norm.item()}
    if on_cuda:
        row |= {"peak_bytes": torch.cuda.max_memory_allocated(), "resident_bytes": resident}
        row["reserved_bytes"] = torch.cuda.max_memory_reserved()
    if plan is not None:
        row |= {"plan": str(plan), "predicted_bytes": plan.device_bytes + resident, "host_bytes": plan.host_bytes}
    else:
        shape = shape_of(model)
        rows = tokens.numel()
        predicted = checkpointing_bytes(
            shape, rows, chunked_loss=arm not in ("hf", "hf+mask"), offload="offload" in arm or arm == "alst"
        )
        if arm == "plain+ce":
            predicted = shape.layers * saved_bytes(shape, rows) + loss_bytes(shape, 1024, True)
        row["predicted_bytes"] = predicted + resident
    return row


def shape_of(model: Any) -> DecoderShape:
    return DecoderShape.from_config(model.config.to_dict(), next(model.parameters()).element_size())


def check(name: str, device: torch.device, tokens: int, chunk: int) -> list[dict[str, Any]]:
    """bf16 gradients of Hugging Face and of ours against float32 ones: the largest relative error of a parameter, and
    the geometric mean over parameters of the error over Hugging Face's (one parameter's ratio is a random number)."""
    exact: Any = build(name, 2, device, torch.float32)
    exact.to(torch.bfloat16).to(torch.float32)  # both precisions start from the same weights
    torch.manual_seed(1)
    ids = torch.randint(0, exact.config.vocab_size, (1, tokens), device=device)
    with armed("hf+ce", exact, chunk) as step:
        step(ids)
    truth = {n: p.grad for n, p in exact.named_parameters()}
    forget(exact, device)
    model: Any = exact.to(torch.bfloat16)
    rows = []
    errors: dict[str, dict[str, float]] = {}
    for arm in ("hf+ce", "hf", "ours", "ours+stash", "ours+offload+stash", "ours+offload+every2"):
        if arm == "hf" and device.type == "cuda" and tokens > 16384:
            continue
        forget(model, device)
        with armed(arm, model, chunk) as step:
            step(ids)
        errors[arm] = {
            n: ((p.grad.float() - truth[n]).norm() / truth[n].norm()).item() for n, p in model.named_parameters()
        }
        ratios = [errors[arm][n] / errors["hf+ce"][n] for n in truth]
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        rows.append({"arm": arm, "worst_error": max(errors[arm].values()), "mean_ratio": mean})
    del model, exact, truth
    gc.collect()
    return rows


def show(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'arm':<22}{'tokens':>9}{'seconds':>10}{'us/token':>10}{'peak GiB':>10}{'predicted':>10}{'loss':>10}"]
    for row in rows:
        head = f"{row['arm']:<22}{row['tokens']:>9}"
        if row.get("oom"):
            lines.append(f"{head}{'out of memory':>20}")
            continue
        peak = f"{row['peak_bytes'] / 2**30:.1f}" if "peak_bytes" in row else "-"
        predicted = f"{row['predicted_bytes'] / 2**30:.1f}"
        per_token = row["seconds"] / (row["tokens"] * row["batch"]) * 1e6
        lines.append(f"{head}{row['seconds']:>10.2f}{per_token:>10.2f}{peak:>10}{predicted:>10}{row['loss']:>10.4f}")
    return "\n".join(lines)


def longest(rows: list[dict[str, Any]], layers: int, full: int, shape: DecoderShape, limits: list[float]) -> str:
    """Maximum tokens by the slope of measured peaks, at this depth and at full depth (with its weights, gradients). Not
    for arms whose peaks have no slope to go by: a plan fills what it is given."""
    lines = [
        f"{'arm':<22}{'bytes/token':>12}" + "".join(f"{f'{limit:.0f} GB':>12}{'full depth':>12}" for limit in limits)
    ]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        points = sorted(
            (r["tokens"] * r["batch"], r["peak_bytes"]) for r in rows if r["arm"] == arm and "peak_bytes" in r
        )
        if len(points) < 2 or points[-1][0] == points[0][0] or arm in ("ours auto", "plain+ce"):
            continue
        (t0, b0), (t1, b1) = points[-2], points[-1]
        slope = (b1 - b0) / (t1 - t0)
        base = b1 - slope * t1
        kept = 0 if "offload" in arm or arm == "alst" else shape.width * shape.element_size
        kept += shape.q * shape.element_size + 4 * shape.heads if arm == "ours+stash" else 0
        deeper = (full - layers) * shape.layer_parameters * 2 * shape.element_size
        cells = ""
        for limit in limits:
            here = (limit * 1e9 - base) / slope
            there = (limit * 1e9 - base - deeper) / (slope + (full - layers) * kept)
            cells += f"{here / 1024:>11.0f}K{max(there, 0) / 1024:>11.0f}K"
        lines.append(f"{arm:<22}{slope:>12.0f}{cells}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--model", choices=SHAPES, default="llama3-8b")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", default="8192,32768,131072")
    parser.add_argument("--batches", default="1", help="batch sizes, one after another")
    parser.add_argument("--streambp", type=Path, help="folder with streambp and its transformers")
    parser.add_argument("--chunk", type=int, default=8192)
    parser.add_argument("--arms", default=",".join((*RIVALS, *OURS)))
    parser.add_argument("--repeats", type=int, default=3, help="timed steps per cell; fewer where a step is long")
    parser.add_argument("--seconds", type=float, default=500.0, help="no new cell starts after this")
    parser.add_argument("--check-tokens", type=int, default=8192, help="0 leaves the correctness check out")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--pinned", type=int, default=0, help="GiB of host memory pinned once, before the first cell")
    parser.add_argument("--gigabytes", type=float, help="of device memory for all arms, where there is more")
    parser.add_argument("--json", type=Path, help="where to write all rows")
    options = parser.parse_args(argv)
    begin, device = time.perf_counter(), torch.device(options.device)
    result: dict[str, Any] = {
        "options": {k: str(v) for k, v in vars(options).items()},
        "facts": facts(["transformers"]),
    }
    print(result["facts"], flush=True)
    if options.gigabytes and device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, options.gigabytes * 1e9 / there))

    if options.pinned and device.type == "cuda":
        reserve_pinned(options.pinned)

    def save() -> None:
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(result, indent=1) + "\n")

    failed = False
    if options.check_tokens:
        result["check"] = check(options.model, device, options.check_tokens, max(1, options.check_tokens // 4))
        for row in result["check"]:
            wrong = row["mean_ratio"] > 1.05 and row["arm"] != "hf"
            failed |= wrong
            print(f"gradient error {row['arm']:<22} {row['worst_error']:.2e}, {row['mean_ratio']:.3f} x hf+ce"
                  f"{'  TOO FAR' if wrong else ''}", flush=True)  # fmt: skip
        save()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32  # a CPU has no fast bfloat16
    model: Any = build(options.model, options.layers, device, dtype)
    rows: list[dict[str, Any]] = []
    result["rows"] = rows
    shape, dead, last = shape_of(model), dict[str, int](), dict[str, tuple[int, float]]()
    lengths, batches = ([int(n) for n in given.split(",")] for given in (options.tokens, options.batches))
    for batch, count in itertools.product(batches, lengths):
        if count == lengths[0]:
            dead, last = {}, {}
        torch.manual_seed(2)
        ids = torch.randint(0, model.config.vocab_size, (batch, count), device=device)
        for arm in options.arms.split(","):
            if "@" in arm and device.type != "cuda":
                continue
            tried = [point for name, point in last.items() if name.startswith("ours") == arm.startswith("ours")]
            before, seconds = last.get(arm) or (tried or [(count, 1.0)])[-1]  # an arm of its kind tells about its time
            expected = seconds * (count / before) ** (1.8 if count > before else 1)
            left = options.seconds - (time.perf_counter() - begin)
            if count >= dead.get(arm, count + 1) or expected * 1.4 > left:
                print(f"skipped: {arm} at {batch} x {count}", flush=True)
                continue
            repeats = max(1, min(options.repeats, int(30 / max(expected, 1e-3))))
            whole = expected * (repeats + 1) < left / 4 and count * batch <= LONG
            row = measure(arm, model, ids, options.chunk, repeats, "whole" if whole else "part")
            rows.append(row)
            if row.get("oom"):
                dead[arm] = count
            else:
                last[arm] = (count, row["seconds"])
            print(show([row]).splitlines()[1], flush=True)
            save()
    forget(model, device)
    del model
    gc.collect()
    for batch, count in itertools.product(batches, lengths) if options.streambp else ():
        left = options.seconds - (time.perf_counter() - begin)
        rows += published(options, batch, count, device, left) if left > 20 else []
        save()
    print(show(rows))
    if device.type == "cuda":
        full = SHAPES[options.model]["num_hidden_layers"]
        result["longest"] = longest(rows, options.layers, full, shape, [80.0, 141.0])
        print(result["longest"])
    save()
    return int(failed)


def published(options: Any, batch: int, tokens: int, device: torch.device, left: float) -> list[dict[str, Any]]:
    """The row of the published StreamBP, or none when it failed or took too long; says so."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    shape = {**SHAPES[options.model], "num_hidden_layers": options.layers, "max_position_embeddings": 1 << 21}
    asked = {"shape": shape, "tokens": tokens, "batch": batch, "device": str(device), "dtype": dtype, "repeats": 1}
    command = [sys.executable, str(Path(__file__).with_name("stream_rival.py")), json.dumps(asked)]
    environment = {**os.environ, "PYTHONPATH": str(options.streambp.resolve())}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=left)
    except subprocess.TimeoutExpired:
        print(f"skipped: streambp at {batch} x {tokens} (more than the {left:.0f} s that were left)", flush=True)
        return []
    if done.returncode:
        print(f"failed: streambp at {batch} x {tokens}: {done.stderr.strip().splitlines()[-1:]}", flush=True)
        return []
    return [{**json.loads(done.stdout.strip().splitlines()[-1]), "predicted_bytes": 0}]


if __name__ == "__main__":
    sys.exit(main())
