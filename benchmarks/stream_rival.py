"""One cell of the published StreamBP (PyPI `streambp` 1.0), in a process of its own with the transformers it needs.

    pip install --no-deps --target OLD streambp transformers==4.51.3 tokenizers==0.21.4 huggingface_hub==0.36.2
    pip install --target OLD requests
    PYTHONPATH=OLD python benchmarks/stream_rival.py '{"shape": {...}, "tokens": 32768, ...}'

`benchmarks/stream_backprop.py --streambp OLD` starts it for each length. Its own defaults are used (layer chunks of
5000 rows, logits in 100), and the all-ones mask without which it fails. Loss and gradient of a fully labelled row are
(T - 1) / T of the right ones there; `norm` shows it. Prints one JSON row.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch


def stream_model() -> Any:
    """The class, loaded from its file: the package's `__init__` imports TRL of that time."""
    package = importlib.util.find_spec("streambp")
    if package is None or package.origin is None:
        raise SystemExit("streambp is not on PYTHONPATH; see the head of this file")
    file = Path(package.origin).parent / "stream_model.py"
    spec = importlib.util.spec_from_file_location("streambp_stream_model", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.StreamModel


def run(options: dict[str, Any]) -> dict[str, Any]:
    """Median seconds, peak bytes, loss and gradient norm of forward and backward."""
    from transformers import AutoConfig, AutoModelForCausalLM

    device, tokens = torch.device(options["device"]), options["tokens"]
    on_cuda = device.type == "cuda"
    config = AutoConfig.for_model(**options["shape"])
    torch.manual_seed(0)
    auto: Any = AutoModelForCausalLM
    with torch.device(device):
        model = auto.from_config(config, attn_implementation="sdpa", torch_dtype=getattr(torch, options["dtype"]))
    stream: Any = stream_model()(
        model.train(), gradient_accumulation_steps=1, logits_chunk_size=100, stream_checkpoint=True,
        checkpoint_chunk_size=options.get("chunk", 5000),
    )  # fmt: skip
    stream.train()
    stream.gradient_checkpointing_enable()
    torch.manual_seed(2)
    ids = torch.randint(0, config.vocab_size, (options.get("batch", 1), tokens), device=device)
    seconds, loss = [], torch.zeros(())
    for turn in range(options.get("repeats", 3) + 1):
        for parameter in model.parameters():
            parameter.grad = None
        if on_cuda:
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        start = time.perf_counter()
        loss = stream(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss  # runs backward as well
        if on_cuda:
            torch.cuda.synchronize()
        if turn:
            seconds.append(time.perf_counter() - start)
    norm = torch.stack([p.grad.float().norm() for p in model.parameters() if p.grad is not None]).norm()
    row = {"arm": "streambp", "tokens": tokens, "batch": ids.shape[0], "seconds": statistics.median(seconds)}
    row |= {"all_seconds": seconds, "loss": loss.item(), "norm": norm.item()}
    resident = sum(2 * p.numel() * p.element_size() for p in model.parameters())
    return row | ({"peak_bytes": torch.cuda.max_memory_allocated(), "resident_bytes": resident} if on_cuda else {})


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("cell", type=json.loads, help="what to run, as JSON: `stream_backprop` writes it")
    options = parser.parse_args(argv).cell
    try:
        row = run(options)
    except torch.OutOfMemoryError:
        row = {"arm": "streambp", "tokens": options["tokens"], "batch": options.get("batch", 1), "oom": True}
    print(json.dumps(row))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
