"""TRL's SFT, DPO and GRPO trainers as they are, and with streamed backpropagation: the same losses, the same weights.

`python -m undertow.examples.trl_recipes` trains a tiny random model twice by each of them, also with peft's LoRA, and
compares: losses of every step, trained weights, and, for DPO and GRPO, TRL's loss and gradient with the functions of
`parallel.stream.objectives`, which need no full logits. Needs trl and peft (`pip install trl peft`); no network.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from ..integrations.transformers_plugin import StreamCallback
from ..parallel.stream import stream_backprop
from ..parallel.stream.loss import token_log_probs
from ..parallel.stream.objectives import dpo_loss, grpo_loss

CHUNK = 16
BETA = 0.1
TEXTS = ["the sea is deep and blue today", "a ship leaves before the tide", "waves do not wait for anyone at all"]


def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and two names for the ends."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate([*letters, "<pad>", "<eos>"])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")


def model(folder: str) -> Any:
    """Random weights, from files, because TRL loads a reference model by its name."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=256,
        eos_token_id=257,
        bos_token_id=None,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(f"{folder}/model")
    return AutoModelForCausalLM.from_pretrained(f"{folder}/model")


def arguments(kind: type, folder: str, **more: Any) -> Any:
    return kind(
        output_dir=folder,
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        report_to=[],
        logging_steps=1,
        save_strategy="no",
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
        seed=0,
        **more,
    )


def sft(folder: str, **options: Any) -> Any:
    data = Dataset.from_dict({"text": TEXTS * 4})
    return SFTTrainer(
        model(folder), arguments(SFTConfig, folder), train_dataset=data, processing_class=tokenizer(), **options
    )


def dpo(folder: str, **options: Any) -> Any:
    data = Dataset.from_dict({"prompt": TEXTS * 4, "chosen": [" yes, always"] * 12, "rejected": [" no"] * 12})
    args = arguments(DPOConfig, folder, beta=BETA)
    return DPOTrainer(model(folder), args=args, train_dataset=data, processing_class=tokenizer(), **options)


def grpo(folder: str, **options: Any) -> Any:
    def letters(completions: list[str], **_: Any) -> list[float | None]:
        return [float(sum(map(ord, text)) % 7) for text in completions]

    data = Dataset.from_dict({"prompt": TEXTS * 4})
    args = arguments(GRPOConfig, folder, num_generations=2, max_completion_length=12, beta=0.04, loss_type="grpo")
    return GRPOTrainer(model(folder), letters, args, train_dataset=data, processing_class=tokenizer(), **options)


TRAINERS: dict[str, Callable[..., Any]] = {"SFT": sft, "DPO": dpo, "GRPO": grpo}


def trained(make: Callable[..., Any], folder: str, stream: bool, lora: bool) -> tuple[list[float], dict[str, Any]]:
    """Losses of the steps, and what was trained."""
    streaming = StreamCallback(chunk=CHUNK)
    options: dict[str, Any] = {"callbacks": [streaming] if stream else []}
    if lora:
        options["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])
    trainer = make(folder, **options)
    trainer.train()
    if stream:
        report = streaming.engine.report() if streaming.engine else {}
        if set(report.values()) != {"streamed"}:
            raise SystemExit(f"not streamed: {report}")
    weights = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    return [line["loss"] for line in trainer.state.log_history if "loss" in line], weights


def largest(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    """The largest difference, relative to the largest value of each tensor."""
    return max(float((one[n] - two[n]).abs().max() / one[n].abs().max().clamp_min(1e-12)) for n in one)


def log_probs(model: Any, ids: torch.Tensor, mask: torch.Tensor, scored: torch.Tensor) -> torch.Tensor:
    """Of each token that `scored` marks, given those before it; 0 elsewhere. [B, T], of the token after each."""
    following = torch.nn.functional.pad(ids.masked_fill(scored == 0, -100), (0, 1), value=-100)[:, 1:]
    return token_log_probs(model(input_ids=ids, attention_mask=mask).logits, following)


def dpo_by_hand(trainer: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    rows = inputs["input_ids"], inputs["attention_mask"], inputs["completion_mask"]
    with torch.no_grad(), stream_backprop(trainer.ref_model):
        reference = log_probs(trainer.ref_model, *rows).sum(1)
    chosen, rejected = log_probs(trainer.model, *rows).sum(1).chunk(2)
    return dpo_loss(chosen, rejected, *reference.chunk(2), beta=BETA)


def grpo_by_hand(trainer: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    prompts, answers = inputs["prompt_ids"].shape[1], inputs["completion_ids"].shape[1]
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    scored = mask.clone()
    scored[:, :prompts] = 0
    found = log_probs(trainer.model, ids, mask, scored)[:, prompts - 1 : prompts - 1 + answers]
    old, reference = inputs.get("old_per_token_logps"), inputs["ref_per_token_logps"]
    old = found.detach() if old is None else old
    marks = inputs["completion_mask"]
    return grpo_loss(
        found, old, inputs["advantages"], marks, reference_BT=reference, beta=trainer.beta, unbiased_kl=True
    )


def against_trl(make: Callable[..., Any], by_hand: Callable[..., torch.Tensor], folder: str) -> tuple[float, float]:
    """Relative differences of loss and gradient between TRL's own and `by_hand`, streamed, on TRL's first batch."""
    trainer = make(folder)
    trainer.current_gradient_accumulation_steps = 1
    with torch.no_grad():  # away from the reference model, where DPO's loss is log 2 whatever the weights are
        for parameter in trainer.model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    theirs = trainer.compute_loss(trainer.model, inputs)
    theirs.backward()
    expected = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad()
    with stream_backprop(trainer.model, chunk=CHUNK):
        ours = by_hand(trainer, inputs)
        ours.backward()
    found = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
    if expected.keys() != found.keys():
        raise SystemExit(f"gradients of other parameters: {sorted(expected.keys() ^ found.keys())}")
    return abs(float(theirs - ours) / float(theirs)), largest(expected, found)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m undertow.examples.trl_recipes", description=__doc__)
    parser.add_argument("--only", choices=list(TRAINERS), help="one of the trainers")
    only = parser.parse_args(argv).only
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for name, make in TRAINERS.items():
            for lora in (False, True) if only in (None, name) else ():
                plain, weights = trained(make, folder, False, lora)
                streamed, others = trained(make, folder, True, lora)
                apart = max(abs(a - b) for a, b in zip(plain, streamed, strict=True))
                gap = largest(weights, others)
                worst = max(worst, apart, gap)
                label = f"{name}{' with LoRA' if lora else ''}"
                print(
                    f"{label:<15} losses {plain}, streamed {apart:.1e} apart, weights {gap:.1e} (relative)", flush=True
                )
        for name, by_hand in {"DPO": dpo_by_hand, "GRPO": grpo_by_hand}.items():
            if only in (None, name):
                loss, gradient = against_trl(TRAINERS[name], by_hand, folder)
                worst = max(worst, loss, gradient)
                print(
                    f"{name:<15} our objective, streamed: loss {loss:.1e}, gradients {gradient:.1e} from TRL's",
                    flush=True,
                )
    print("the same" if worst < 1e-3 else f"not the same: {worst:.1e}")
    return 0 if worst < 1e-3 else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
