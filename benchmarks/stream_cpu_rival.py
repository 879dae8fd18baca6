"""The published StreamBP on a CPU, in a process of its own that takes turns with the arms of `stream_cpu`.

`FOLDER` (see `stream_rival` for how it is filled) goes before everything else on its path. Commands come as lines on
standard input and each is answered by one line of JSON: `step` (CPU seconds of forward and backward), `peak` (live
bytes of one, seconds left out), `gradients FILE` (of the latest step). It ends when its input does. Chunks and rows of
logits are those of the streamed arms; the mask of ones without which it fails is given to it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class Published:
    """The rival's process, seen from the benchmark. `weights` and `gradients` travel through files in `folder`."""

    def __init__(self, site: Path, folder: Path, model: Any, options: dict[str, Any]) -> None:
        self.folder, weights = folder, folder / "weights.pt"
        torch.save(model.state_dict(), weights)
        given = json.dumps({**options, "weights": str(weights)})
        old = [str(site), *filter(None, [os.environ.get("PYTHONPATH", "")])]
        self.process = subprocess.Popen(
            [sys.executable, __file__, given],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(old)},
        )
        self.ask("ready")

    def ask(self, command: str) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of streambp ended with status {self.process.wait()}; its output is above")
        return json.loads(line)

    def gradients(self) -> dict[str, Tensor]:
        path = self.folder / "gradients.pt"
        self.ask(f"gradients {path}")
        return torch.load(path)

    def close(self) -> None:
        self.process.communicate()  # its input ends


def steps(options: dict[str, Any]) -> tuple[dict[str, Tensor], Callable[[], None]]:
    """The parameters by their names before the package wraps the layers, and one forward and backward."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from undertow.benchmarks.stream_rival import stream_model

    torch.set_num_threads(1)
    auto: Any = AutoModelForCausalLM
    model = auto.from_config(AutoConfig.for_model(**options["shape"]), attn_implementation="sdpa")
    model.load_state_dict(torch.load(options["weights"]))
    named: dict[str, Tensor] = dict(model.named_parameters())
    stream: Any = stream_model()(
        model.train(), gradient_accumulation_steps=1, logits_chunk_size=options["rows"], stream_checkpoint=True,
        checkpoint_chunk_size=options["chunk"],
    )  # fmt: skip
    stream.train()
    stream.gradient_checkpointing_enable()
    ids = torch.tensor([options["ids"]])

    def step() -> None:
        stream(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)  # runs backward as well

    return named, step


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("case", type=json.loads, help="what to run, as JSON: `stream_cpu` writes it")
    case = parser.parse_args(argv).case

    from undertow.parallel.stream.track import PeakBytes

    answers, sys.stdout = sys.stdout, sys.stderr  # what the package prints is not an answer
    for newer in ("datasets", "peft"):  # of this environment, which the old transformers cannot work with
        sys.modules[newer] = None  # type: ignore[assignment]
    named, step = steps(case)
    for line in sys.stdin:
        command, _, path = line.strip().partition(" ")
        answer: dict[str, float] = {}
        if command == "peak":
            with PeakBytes() as memory:
                step()
            answer = {"peak": memory.peak}
        elif command == "gradients":
            torch.save({name: p.grad for name, p in named.items()}, path)
        elif command == "step":
            for parameter in named.values():
                parameter.grad = None
            start_s = time.process_time()
            step()
            answer = {"seconds": time.process_time() - start_s}
        print(json.dumps(answer), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
