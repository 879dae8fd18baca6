"""Losses of preference and policy training, written as functions of per-token log-probabilities.

Each is the formula of its paper over `loss.token_log_probs`; autograd turns it into one weight per row, and the rows'
gradients are then formed chunk by chunk. Log-probabilities of reference or old policies are plain [B, T] tensors,
computed by the same function under `torch.no_grad()`.

Legend: B sequences, T tokens, P preference pairs. A mask [B, T] marks the tokens of the answer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .loss import map_rows
from .rows import Rows


def dpo_loss(chosen_P: Tensor, rejected_P: Tensor, ref_chosen_P: Tensor, ref_rejected_P: Tensor, beta: float) -> Tensor:
    """Rafailov et al. 2023, eq. 7, mean over pairs, from log-probabilities summed over each answer."""
    margin = (chosen_P - ref_chosen_P) - (rejected_P - ref_rejected_P)
    return -F.logsigmoid(beta * margin).mean()


def kto_loss(
    policy_B: Tensor, reference_B: Tensor, desirable_B: Tensor, kl: Tensor, beta: float,
    weight_desirable: float = 1.0, weight_undesirable: float = 1.0,
) -> Tensor:  # fmt: skip
    """Ethayarajh et al. 2024, eq. 8: `kl` is the (detached, non-negative) estimate of KL(policy ‖ reference)."""
    ratio = policy_B - reference_B
    kl = kl.detach().clamp_min(0)
    good = weight_desirable * (1 - torch.sigmoid(beta * (ratio - kl)))
    bad = weight_undesirable * (1 - torch.sigmoid(beta * (kl - ratio)))
    return torch.where(desirable_B.bool(), good, bad).mean()


def grpo_loss(
    log_probs_BT: Tensor, old_BT: Tensor, advantages_B: Tensor, mask_BT: Tensor, *, epsilon: float = 0.2,
    epsilon_high: float | None = None, reference_BT: Tensor | None = None, beta: float = 0.0, unbiased_kl: bool = False,
) -> Tensor:  # fmt: skip
    """Shao et al. 2024, eq. 3, KL by the k3 estimate; the mean over tokens of each answer, then over answers.

    `unbiased_kl` multiplies the estimate by the ratio, so that its gradient is that of the KL (DeepSeek-V3.2, 2025):
    the default of TRL 1.16, whose `use_bias_correction_kl=False` is ours.
    """
    ratio = torch.exp(log_probs_BT - old_BT)
    advantage = advantages_B[:, None]
    high = epsilon if epsilon_high is None else epsilon_high
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - epsilon, 1 + high) * advantage)
    if reference_BT is not None and beta:
        gap = reference_BT - log_probs_BT
        kl = torch.exp(gap) - gap - 1
        gain = gain - beta * (kl * ratio if unbiased_kl else kl)
    mask = mask_BT.to(gain.dtype)
    return -((gain * mask).sum(1) / mask.sum(1).clamp_min(1)).mean()


def distillation_loss(
    student: Rows | Tensor, teacher_hidden_BTd: Tensor, teacher_head: torch.nn.Module, where_BT: Tensor, *,
    temperature: float = 1.0, rows: int | None = None,
) -> Tensor:  # fmt: skip
    """Hinton et al. 2015: mean over the selected tokens of temperature² * KL(teacher ‖ student).

    Teacher logits are formed per chunk as well, from its last hidden states; `teacher_head` holds norm and head.
    """

    def divergence(z_RV: Tensor, hidden_Rd: Tensor) -> Tensor:
        with torch.no_grad():
            target = F.log_softmax(_wide(teacher_head(hidden_Rd)) / temperature, -1)
        mine = F.log_softmax(_wide(z_RV) / temperature, -1)
        return (target.exp() * (target - mine)).sum(-1) * temperature**2

    values = map_rows(divergence, student, teacher_hidden_BTd, where=where_BT, rows=rows)
    return values.sum() / where_BT.sum()


def _wide(z: Tensor) -> Tensor:
    return z if z.dtype == torch.float64 else z.float()
