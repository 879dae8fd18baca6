"""transformers' own Trainer with each sequence spread over two ranks, streamed, its checkpoints lazy.

    torchrun --nproc-per-node 2 -m undertow.examples.context_parallel_trainer runs/long

A small random Qwen3 on the bytes of Python's standard library; three callbacks are all that differs from a plain
Trainer. Run it again, and it goes on from its newest whole checkpoint.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
import typer

from . import corpus as text


def main(
    out: Annotated[str, typer.Argument(help="Folder for checkpoints.")],
    ranks: Annotated[int, typer.Option(help="Ranks that share a sequence.")] = 2,
    length: Annotated[int, typer.Option(help="Tokens of a row.")] = 513,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 10,
) -> None:
    """Train; every other rank beyond `ranks` is data-parallel."""
    from transformers import AutoModelForCausalLM, Qwen3Config, Trainer, TrainingArguments

    from ..integrations.transformers_plugin import (
        ContextParallelCallback,
        LazyCheckpoints,
        StreamCallback,
        newest_whole,
    )

    corpus = text.load(None)
    batch = corpus.batch(seed=0, step=0, rows=slice(0, 64), batch=64, length=length - 1).long()
    rows: Any = [{"input_ids": row, "labels": row} for row in batch]
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}
    config = Qwen3Config(vocab_size=256, num_attention_heads=4, num_key_value_heads=2, **sizes)
    args = TrainingArguments(
        out,
        max_steps=steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        save_steps=5,
        logging_steps=5,
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        ddp_backend=None if torch.cuda.is_available() else "gloo",
    )
    model: Any = AutoModelForCausalLM
    trainer = Trainer(model.from_config(config), args, train_dataset=rows, callbacks=[StreamCallback()])
    trainer.add_callback(ContextParallelCallback(trainer, ranks=ranks))
    trainer.add_callback(LazyCheckpoints(trainer))
    trainer.train(resume_from_checkpoint=newest_whole(out))


if __name__ == "__main__":
    typer.run(main)
