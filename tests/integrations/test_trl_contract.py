"""What TRL's trainers ask of a model, without TRL: streaming must answer it with the same losses and weights.

`examples/trl_recipes.py` runs the real trainers of the installed TRL; here the forms of several versions are tried.
Written after TRL 1.16: it replaces `model.forward` on the instance, before training begins, by one that takes
`fused_lm_head=True`, calls `self.base_model`, and reads `lm_head.weight` beside the module; without that argument the
forward is the model's own. Earlier versions slice `outputs.logits`, with `logits_to_keep`. Reference models run under
`torch.no_grad()`; DPO passes chosen and rejected rows in one batch with right padding, GRPO pads prompts on the left.
"""

from __future__ import annotations

import copy
import functools
import types

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("accelerate")
pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, Qwen3Config, Trainer, TrainingArguments

from undertow.integrations.transformers_plugin import StreamCallback
from undertow.parallel.stream import stream_backprop
from undertow.parallel.stream.loss import token_log_probs
from undertow.parallel.stream.objectives import dpo_loss, grpo_loss

pytestmark = pytest.mark.slow
PROMPT, ANSWER, BETA = 7, 12, 0.1


def tiny(seed: int = 0):
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def with_fused_head(model):
    """The forward that TRL puts on the instance; log-probabilities [B, T - 1], 0 where the label is -100."""
    original = model.forward

    @functools.wraps(type(model).forward)
    def forward(self, *args, fused_lm_head=False, labels=None, num_items_in_batch=None, **kwargs):
        if not fused_lm_head:
            return original(*args, labels=labels, **kwargs)
        hidden = self.base_model(*args, **{**kwargs, "use_cache": False}).last_hidden_state[:, :-1]
        following = labels[:, 1:]
        logits = F.linear(hidden, self.get_output_embeddings().weight)
        chosen = F.log_softmax(logits.float(), -1).gather(-1, following.clamp_min(0)[..., None])[..., 0]
        return types.SimpleNamespace(log_probs=chosen.masked_fill(following == -100, 0), mask=following != -100)

    model.forward = types.MethodType(forward, model)
    return model


def rows(side: str, count: int = 4):
    """ids, attention mask and completion mask of rows with prompts and answers of different lengths."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 97, (count, PROMPT + ANSWER), generator=generator)
    mask, scored = torch.ones_like(ids), torch.ones_like(ids)
    scored[:, :PROMPT] = 0
    for row in range(count):
        if side == "left":
            mask[row, :row] = 0
        mask[row, ids.shape[1] - row :] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask, "scored": scored * mask}


def fused(model, batch):
    labels = batch["input_ids"].masked_fill(batch["scored"] == 0, -100)
    words = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    return model(**words, labels=labels, fused_lm_head=True).log_probs


def sliced(model, batch):
    """The way of earlier versions: logits of the answer only, one more than there are, shifted by hand."""
    ids = batch["input_ids"]
    words = {"input_ids": ids, "attention_mask": batch["attention_mask"], "use_cache": False}
    logits = model(**words, logits_to_keep=ANSWER + 1).logits[:, :-1]
    chosen = F.log_softmax(logits.float(), -1).gather(-1, ids[:, -ANSWER:, None])[..., 0]
    return F.pad(chosen * batch["scored"][:, -ANSWER:], (PROMPT - 1, 0))


def sft(log_probs, reference, batch):
    return -log_probs.sum() / batch["scored"][:, 1:].sum()


def dpo(log_probs, reference, batch):
    chosen, rejected = (log_probs - reference).sum(1).chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


def grpo(log_probs, reference, batch):
    advantages = torch.tensor([1.0, -0.5, 0.3, -0.8])[:, None]
    mask = batch["scored"][:, 1:]
    ratio = (log_probs - (reference + 0.1)).exp()  # against an old policy, so that clipping happens
    gain = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    gain = gain - BETA * ((reference - log_probs).exp() - (reference - log_probs) - 1)
    return -((gain * mask).sum(1) / mask.sum(1)).mean()


class LikeTrl(Trainer):
    """`compute_loss` over log-probabilities, with a frozen reference."""

    def __init__(self, way, objective, side, **options):
        self.way, self.objective, self.batch = way, objective, rows(side)
        self.reference = with_fused_head(tiny(1)).eval()
        super().__init__(**options)
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with torch.no_grad():
            reference = self.way(self.reference, self.batch)
        return self.objective(self.way(model, self.batch), reference, self.batch)


def trained(folder, way, objective, side, callbacks):
    arguments = TrainingArguments(
        str(folder), max_steps=2, per_device_train_batch_size=1, learning_rate=1e-2, use_cpu=True, report_to=[],
        save_strategy="no", logging_steps=1, disable_tqdm=True, seed=0, remove_unused_columns=False,
    )  # fmt: skip
    data = [{"input_ids": torch.tensor([3])}] * 4  # unused: every step has the rows of `side`
    model = with_fused_head(tiny())
    trainer = LikeTrl(way, objective, side, model=model, args=arguments, train_dataset=data, callbacks=callbacks)
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line], model


@pytest.mark.parametrize("way", [fused, sliced])
@pytest.mark.parametrize("objective, side", [(sft, "right"), (dpo, "right"), (grpo, "left")])
def test_a_trainer_that_scores_tokens_as_trl_does_trains_the_same_streamed(way, objective, side, tmp_path):
    callback = StreamCallback(chunk=5)
    plain, expected = trained(tmp_path, way, objective, side, [])
    streamed, found = trained(tmp_path, way, objective, side, [callback])
    assert callback.engine is not None and set(callback.engine.report().values()) == {"streamed"}
    assert len(callback.engine.last_plan.bounds) == 4
    assert streamed == pytest.approx(plain, rel=1e-5) and len(plain) == 2
    assert vars(found)["forward"].__func__.__name__ == "forward", "the forward that TRL put there is back"
    for (name, a), b in zip(expected.named_parameters(), found.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=5e-5, msg=name)  # Adam divides by the gradient's size


@pytest.mark.parametrize("objective, side", [(dpo, "right"), (grpo, "left")])
def test_our_objectives_without_full_logits_have_its_gradients(objective, side):
    """Loss and gradient of `objectives` over streamed log-probabilities against the written-out formula above."""
    model, batch, frozen = tiny(), rows(side), tiny(1).eval()
    with torch.no_grad():
        reference = fused(with_fused_head(copy.deepcopy(frozen)), batch)
    mirror = with_fused_head(copy.deepcopy(model))
    theirs = objective(fused(mirror, batch), reference, batch)
    theirs.backward()
    labels = F.pad(batch["input_ids"].masked_fill(batch["scored"] == 0, -100), (0, 1), value=-100)[:, 1:]
    with stream_backprop(model, chunk=5):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        found = token_log_probs(logits, labels)[:, :-1]
        if objective is dpo:
            ours = dpo_loss(*found.sum(1).chunk(2), *reference.sum(1).chunk(2), beta=BETA)
        else:
            ours = grpo_loss(
                found, reference + 0.1, torch.tensor([1.0, -0.5, 0.3, -0.8]), batch["scored"][:, 1:],
                reference_BT=reference, beta=BETA,
            )  # fmt: skip
        ours.backward()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    for (name, parameter), other in zip(model.named_parameters(), mirror.parameters()):
        error = (parameter.grad - other.grad).norm() / other.grad.norm()
        assert error <= 1e-5, f"{name}: relative error {error:.2e}"  # float32 sums in another order
