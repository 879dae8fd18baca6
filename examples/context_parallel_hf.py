"""Train a small Llama or Qwen3 with its sequence spread over ranks, and compare with one process.

    torchrun --nproc-per-node 2 -m undertow.examples.context_parallel_hf --family qwen3

Random weights, the text of Python's standard library as bytes, and three lines that differ from plain training: each
marked with `# context parallel`. Every rank then repeats the run alone, and the losses of both are printed.
"""

from __future__ import annotations

import copy
from typing import Annotated

import torch
import torch.distributed as dist
import typer

from ..comms.gradients import GradientAverage
from ..dist import launch
from ..parallel import enable_context_parallel
from . import corpus as text


def make(family: str) -> torch.nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        family, vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=4096, attention_dropout=0.0,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).float().train()


def train(model: torch.nn.Module, batches: list[torch.Tensor], *, parallel: bool) -> list[float]:
    handle = enable_context_parallel(model) if parallel else None  # context parallel
    average = GradientAverage(model.parameters()) if parallel else None  # context parallel; or DDP, or FSDP
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for ids in batches:
        optimizer.zero_grad(set_to_none=True)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        if average is not None:
            average()  # context parallel
        optimizer.step()
        losses.append(loss.item())
    if handle is not None:
        handle.disable()
    return losses


def main(
    family: Annotated[str, typer.Option(help="a transformers model type: llama, qwen3, mistral, …")] = "llama",
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 20,
    length: Annotated[int, typer.Option(help="Tokens of a row; any number.")] = 257,
) -> None:
    """Train with and without context parallelism and print both loss curves."""
    here = launch.detect()
    launch.init_process_group(here, device=torch.device("cpu"))
    corpus = text.load(None)
    batches = [
        corpus.batch(seed=0, step=step, rows=slice(0, 2), batch=2, length=length - 1).long() for step in range(steps)
    ]
    model = make(family)
    alone = train(copy.deepcopy(model), batches, parallel=False)
    spread = train(model, batches, parallel=True)
    if here.rank == 0:
        print(f"{family} on {here.world_size} rank(s), {length} tokens")
        for step, (a, b) in enumerate(zip(alone, spread)):
            print(f"step {step:3d}  one process {a:.6f}  spread {b:.6f}  difference {abs(a - b):.1e}")
    dist.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)
