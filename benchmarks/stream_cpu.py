"""Streamed backpropagation against gradient checkpointing on a CPU: peak of live bytes and time, in a size for CI.

A four-layer Qwen3 in float32, one sequence, forward and backward. Plain is Hugging Face's checkpointing as users switch
it on; `hf+ce` has our loss as well, `ROWS` rows of logits at a time. Ours gets what a user sets: a budget, here a half
and a third of the peak of `hf+ce`, or a chunk and the rows of the loss. `peak_MB` counts the live
bytes above weights and gradients by watching every operator (`parallel.stream.track`), once per arm and outside the
time. Time is CPU seconds of one thread, so that other programs on the machine count little. Offload has no arm: on a
CPU there is no second memory that what is put away would not be counted in.

The answer is the gradient of every parameter, at most 1e-5 away from plain autograd's; `error` is the furthest. With
UNDERTOW_STREAMBP=FOLDER the published StreamBP 1.0 takes part from a process of its own (`stream_rival` tells how to
fill FOLDER). It divides a fully labelled row by one token too many: it is held against (T - 1) / T of the right
gradients here, so that it is timed at all, and its `error` is against the right ones.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from undertow.benchmarks.case import Arm, Benchmark, Case, Context, Measured, Trial
from undertow.benchmarks.stream_backprop import SHAPES, build
from undertow.benchmarks.stream_cpu_rival import Published
from undertow.parallel.stream import causal_loss, rows_of, stream_backprop

SHAPE, LAYERS = "tiny", 4
ROWS, CHUNK = 256, 512  # rows of logits; rows of a chunk where one is set
PLAIN, CHUNKED, HALF, THIRD = "hf", "hf+ce", "ours, 1/2 of hf+ce", "ours, 1/3 of hf+ce"
FIXED: dict[str, dict[str, Any]] = {
    f"ours, chunk {CHUNK}": {"stash": False},
    f"ours, chunk {CHUNK}, stash": {"stash": True},
}
PUBLISHED = "streambp 1.0"
TOLERANCE = 1e-5  # relative, per parameter: float32 sums in another order
Gradients = dict[str, Tensor]
_open: list[tuple[Published, Any]] = []  # of the case that runs now


def cases(context: Context) -> list[Case]:
    lengths = [1024] if context.quick else [2048, 4096]
    return [
        Case(
            name=f"{tokens} tokens",
            build=partial(trial, tokens, context.seed),
            plain=PLAIN,
            ours=HALF,
            group="one step",
            x=tokens,
            wrong=wrong,
            warm_ups=0,  # the peak has been taken by then
        )
        for tokens in lengths
    ]


class Side:
    """The model, its sequence, and the right gradients."""

    def __init__(self, tokens: int, seed: int) -> None:
        torch.set_num_threads(1)
        self.model: Any = build(SHAPE, LAYERS, torch.device("cpu"), torch.float32)
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(0, self.model.config.vocab_size, (1, tokens), generator=generator)
        self.model(input_ids=self.ids, labels=self.ids).loss.backward()
        self.exact = self.gradients()

    def gradients(self) -> Gradients:
        return {name: p.grad for name, p in self.model.named_parameters()}

    def clear(self) -> None:
        self.model.zero_grad(set_to_none=True)

    def checkpointed(self, chunked: bool) -> None:
        model, ids = self.model, self.ids
        model.gradient_checkpointing_enable({"use_reentrant": False})
        try:
            if chunked:
                hidden = model.model(input_ids=ids).last_hidden_state
                labels = nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
                causal_loss(rows_of(hidden, model.lm_head), labels, rows=ROWS).backward()
            else:
                model(input_ids=ids, labels=ids).loss.backward()
        finally:
            model.gradient_checkpointing_disable()

    def streamed(self, **options: Any) -> None:
        with stream_backprop(self.model, **options) as engine:
            self.model(input_ids=self.ids, labels=self.ids).loss.backward()
        refused = [reason for reason in engine.report().values() if reason != "streamed"]
        if refused:
            raise RuntimeError(f"not streamed: {refused[0]}")

    def error(self, found: Gradients) -> float:
        return max(((found[n] - g).norm() / g.norm()).item() for n, g in self.exact.items())


def trial(tokens: int, seed: int) -> Trial:
    close()
    side = Side(tokens, seed)
    rivals = {PLAIN: partial(side.checkpointed, False), CHUNKED: partial(side.checkpointed, True)}
    told = {name: _told(side, step) for name, step in rivals.items()}
    ours: dict[str, dict[str, Any]] = {
        name: {"budget_bytes": int(1e6 * told[CHUNKED]["peak_MB"]) // part} for name, part in ((HALF, 2), (THIRD, 3))
    }
    ours |= {name: {"chunk": CHUNK, "loss_rows": ROWS, **given} for name, given in FIXED.items()}
    ways: dict[str, Callable[[], None]] = {**rivals}
    for name, options in ours.items():
        ways[name] = partial(side.streamed, **options)
        told[name] = _told(side, ways[name])
        if "budget_bytes" in options:
            told[name]["budget_MB"] = options["budget_bytes"] / 1e6
    arms = [_arm(side, name, step, told[name]) for name, step in ways.items()]
    return Trial([*arms, _published(side)], reference=lambda: side.exact)


def _told(side: Side, step: Callable[[], None]) -> dict[str, float]:
    """What an arm has to tell beside its time."""
    from undertow.parallel.stream.track import PeakBytes

    side.clear()
    step()
    error = side.error(side.gradients())
    with PeakBytes() as memory:  # gradients exist, and are not counted
        step()
    side.clear()
    return {"error": error, "peak_MB": memory.peak / 1e6}


def _arm(side: Side, name: str, step: Callable[[], None], told: dict[str, float]) -> Arm:
    def timed() -> Measured:
        start_s = time.process_time()
        step()
        return Measured(side.gradients(), time.process_time() - start_s, extras=told)

    return Arm(name, timed, prepare=side.clear)


def _published(side: Side) -> Arm:
    site = os.environ.get("UNDERTOW_STREAMBP", "")
    if not site:
        return Arm.missing(PUBLISHED, "UNDERTOW_STREAMBP names no folder with streambp and its transformers")
    folder = tempfile.TemporaryDirectory(prefix="undertow-bench-")
    shape = {**SHAPES[SHAPE], "num_hidden_layers": LAYERS, "use_cache": False, "max_position_embeddings": 1 << 21}
    options = {"shape": shape, "ids": side.ids[0].tolist(), "chunk": CHUNK, "rows": ROWS}
    rival = Published(Path(site), Path(folder.name), side.model, options)
    _open.append((rival, folder))
    rival.ask("step")
    told = {"error": side.error(rival.gradients()), "peak_MB": rival.ask("peak")["peak"] / 1e6}
    tokens = side.ids.shape[1]

    def timed() -> Measured:
        seconds = rival.ask("step")["seconds"]
        return Measured(rival.gradients(), seconds, extras=told)

    return Arm(
        PUBLISHED, timed, reference=lambda: {n: g * ((tokens - 1) / tokens) for n, g in side.exact.items()}
    )  # fmt: skip


def close() -> None:
    """End the rival's process of the former case."""
    while _open:
        rival, folder = _open.pop()
        rival.close()
        folder.cleanup()


def wrong(found: Gradients, exact: Gradients) -> int:
    """How many parameters have a gradient further than `TOLERANCE` from the reference."""
    return sum(not (found[n] - exact[n]).norm() <= TOLERANCE * exact[n].norm() for n in exact)


BENCHMARK = Benchmark(
    name="stream_cpu",
    claim="within half of the memory that checkpointing with a chunked loss needs, in about the same time",
    cases=cases,
    rounds=6,
    packages=("transformers",),
    x_label="tokens",
)

if __name__ == "__main__":
    from undertow.benchmarks.cli import main

    sys.exit(main(["stream_cpu", *sys.argv[1:]]))
