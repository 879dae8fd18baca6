"""Train a Hugging Face decoder on long sequences with streamed backpropagation: the one line is `stream_backprop`.

    python -m undertow.examples.stream_hf --tokens 4096 --steps 3

With `--model NAME` the model comes from `from_pretrained`; without, it is a small random one. transformers' `Trainer`
takes `undertow.parallel.stream.hf_trainer.StreamCallback()` instead.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from ..parallel.stream import stream_backprop


def main() -> None:
    from transformers import AutoModelForCausalLM, Qwen3Config

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--model", default="")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "head_dim": 32}
    small = Qwen3Config(**sizes, num_attention_heads=4, num_key_value_heads=2, vocab_size=8192)
    auto: Any = AutoModelForCausalLM
    model = auto.from_pretrained(options.model) if options.model else auto.from_config(small)
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    tokens = torch.randint(0, model.config.vocab_size, (1, options.tokens), device=device)
    with stream_backprop(model) as stream:
        for step in range(options.steps):
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            print(f"step {step}: loss {loss.item():.4f}")
        print(stream.last_plan)


if __name__ == "__main__":
    main()
