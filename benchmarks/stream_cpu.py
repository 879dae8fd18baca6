"""Streamed backpropagation against gradient checkpointing on a CPU: peak of live bytes and time, in a size for CI.

A four-layer Qwen3 in float32, one sequence, forward and backward. `peak_MB` counts the live bytes above weights and
gradients by watching every operator (`parallel.stream.track`), once per arm and outside the time. Time is CPU seconds
of one thread, so that other programs on the machine count little. Plain is Hugging Face's checkpointing as users switch
it on; the second rival has our chunked loss as well. The answer is the gradient of every parameter, at most 1e-5 away
from plain autograd's.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from torch import Tensor

from undertow.benchmarks.case import Arm, Benchmark, Case, Context, Measured, Trial
from undertow.benchmarks.stream_backprop import armed, build

SHAPE, LAYERS, CHUNK = "tiny", 4, 512
ARMS = ("hf", "hf+ce", "ours", "ours+stash", "ours auto")
TOLERANCE = 1e-5  # relative, per parameter: float32 sums in another order


def cases(context: Context) -> list[Case]:
    lengths = [512, 1024] if context.quick else [1024, 2048]
    return [
        Case(
            name=f"{tokens} tokens",
            build=lambda tokens=tokens: trial(tokens, context.seed),
            plain="hf",
            ours="ours+stash",
            group="one step",
            x=tokens,
            wrong=wrong,
            warm_ups=0,  # the peak has been taken by then
        )
        for tokens in lengths
    ]


def trial(tokens: int, seed: int) -> Trial:
    from undertow.parallel.stream.track import PeakBytes

    torch.set_num_threads(1)
    model: Any = build(SHAPE, LAYERS, torch.device("cpu"), torch.float32)
    ids = torch.randint(0, model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(seed))

    def clear() -> None:
        for parameter in model.parameters():
            parameter.grad = None

    def gradients() -> dict[str, Tensor]:
        return {name: p.grad for name, p in model.named_parameters()}

    def arm(name: str) -> Arm:
        def step() -> None:
            with armed(name, model, CHUNK) as run:
                run(ids)

        step()  # so that gradients exist and are not counted
        with PeakBytes() as memory:
            step()
        clear()
        peak = memory.peak

        def timed() -> Measured:
            start = time.process_time()
            step()
            return Measured(gradients(), time.process_time() - start, extras={"peak_MB": peak / 1e6})

        return Arm(name, timed, prepare=clear)

    def reference() -> dict[str, Tensor]:
        clear()
        model(input_ids=ids, labels=ids).loss.backward()
        return gradients()

    return Trial([arm(name) for name in ARMS], reference=reference)


def wrong(found: dict[str, Tensor], exact: dict[str, Tensor]) -> int:
    """How many parameters have a gradient further than `TOLERANCE` from the reference."""
    return sum(not (found[n] - exact[n]).norm() <= TOLERANCE * exact[n].norm() for n in exact)


BENCHMARK = Benchmark(
    name="stream_cpu",
    claim="streamed backpropagation needs a fraction of checkpointing's memory, in no more time",
    cases=cases,
    rounds=6,
    packages=("transformers",),
    x_label="tokens",
)

if __name__ == "__main__":
    from undertow.benchmarks.cli import main

    sys.exit(main(["stream_cpu", *sys.argv[1:]]))
