"""Chunked losses against the same formulas over full logits, in float64: values and all gradients."""

import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from undertow.parallel.kernels import row_loss as row_loss_module
from undertow.parallel.stream import loss as L
from undertow.parallel.stream import objectives as O

B, T, D, V = 3, 17, 12, 40
NO_GPU = pytest.mark.skipif(torch.cuda.device_count() == 0, reason="needs a CUDA device")


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D, dtype=torch.float64))

    def forward(self, x):
        return self.weight * F.normalize(x, dim=-1)


def setting(head_kind="linear"):
    x = torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)
    norm = Norm()
    head = nn.Linear(D, V, bias=head_kind == "bias").double()
    if head_kind == "frozen":
        head.requires_grad_(False)
    labels = torch.randint(0, V, (B, T))
    labels[torch.rand(B, T) < 0.4] = -100
    return x, norm, head, labels


def gradients(value, *leaves):
    return torch.autograd.grad(value, [t for t in leaves if t.requires_grad], retain_graph=True)


@pytest.mark.parametrize("rows", [1, 7, 1000, None])
@pytest.mark.parametrize("head_kind", ["linear", "bias", "frozen", "scaled"])
def test_nll_and_log_probs_equal_full_logits(head_kind, rows, seed):
    x, norm, head, labels = setting(head_kind)
    weights = torch.rand(B, T, dtype=torch.float64)

    def after(z):
        return torch.tanh(z * 0.5 / 3.0) * 3.0 if head_kind == "scaled" else z

    logits = after(head(norm(x)))
    lazy = after(L.rows_of(x, head, norm))
    leaves = [x, norm.weight, *head.parameters()]
    nll = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(B, T)
    expected = [(nll * weights).sum(), nll.sum() / (labels != -100).sum(), nll.sum() / 11]
    expected.append((torch.exp(-nll) * weights * (labels != -100)).sum())
    log_probs = L.token_log_probs(lazy, labels, rows=rows)
    mine = [
        L.weighted_nll(lazy, labels, weights, rows=rows),
        L.causal_loss(lazy, labels, rows=rows),
        L.causal_loss(lazy, labels, torch.tensor(11), rows=rows),
        (torch.exp(log_probs) * weights * (labels != -100)).sum(),
    ]
    assert (log_probs[labels == -100] == 0).all()
    for a, b in zip(mine, expected):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        for grad, exact in zip(gradients(a, *leaves), gradients(b, *leaves)):
            torch.testing.assert_close(grad, exact, rtol=1e-10, atol=1e-12)


def test_all_rows_ignored_gives_zero_gradient(seed):
    x, norm, head, labels = setting()
    value = L.weighted_nll(L.rows_of(x, head, norm), torch.full_like(labels, -100))
    value.backward()
    assert value.item() == 0 and not x.grad.any()


def test_rows_fall_back_to_the_plain_tensor(seed):
    x, norm, head, labels = setting()
    plain = head(norm(x))
    for use in (
        lambda z: z[:, -1],
        lambda z: z.view(-1, V),
        lambda z: F.softmax(z, -1),
        lambda z: z + 1.0,
        lambda z: z.sum(),
    ):
        lazy = L.rows_of(x, head, norm)
        torch.testing.assert_close(use(lazy), use(plain))
        grad, exact = (gradients(use(z).sum(), x, head.weight)[1] for z in (L.rows_of(x, head, norm), head(norm(x))))
        torch.testing.assert_close(grad, exact)


def test_preference_losses_and_their_gradients(seed):
    x, norm, head, labels = setting()
    answer = labels != -100
    plain = -F.cross_entropy(head(norm(x)).flatten(0, 1), labels.flatten(), reduction="none").view(B, T)
    lazy = L.token_log_probs(L.rows_of(x, head, norm), labels, rows=5)
    reference, old = (torch.randn(B, T, dtype=torch.float64) * answer - 3 for _ in range(2))
    advantages = torch.randn(B, dtype=torch.float64)
    beta, eps = 0.3, 0.2

    def dpo_written(lp):
        s, r = (lp * answer).sum(1), (reference * answer).sum(1)
        return -torch.log(1 / (1 + torch.exp(-beta * ((s[0] - r[0]) - (s[1] - r[1])))))

    def dpo(lp):
        s, r = (lp * answer).sum(1), (reference * answer).sum(1)
        return O.dpo_loss(s[:1], s[1:2], r[:1], r[1:2], beta)

    def kto_written(lp):
        gap = (lp * answer).sum(1) - (reference * answer).sum(1) - 0.7
        v = [torch.sigmoid(beta * gap[0]), torch.sigmoid(-beta * gap[1]), torch.sigmoid(beta * gap[2])]
        return ((1 - v[0]) * 2 + (1 - v[1]) * 3 + (1 - v[2]) * 2) / 3

    def kto(lp):
        s, r = (lp * answer).sum(1), (reference * answer).sum(1)
        return O.kto_loss(s, r, torch.tensor([1, 0, 1]), torch.tensor(0.7), beta, 2.0, 3.0)

    def grpo_written(lp, unbiased=False):
        total = 0.0
        for b in range(B):
            terms = []
            for t in range(T):
                if not answer[b, t]:
                    continue
                ratio = torch.exp(lp[b, t] - old[b, t])
                clipped = min(max(ratio, torch.tensor(1 - eps)), torch.tensor(1 + eps))
                gain = torch.min(ratio * advantages[b], clipped * advantages[b])
                kl = torch.exp(reference[b, t] - lp[b, t]) - (reference[b, t] - lp[b, t]) - 1
                terms.append(gain - beta * kl * (ratio if unbiased else 1))
            total = total + sum(terms) / len(terms)
        return -total / B

    def grpo(lp, unbiased=False):
        options = {"epsilon": eps, "reference_BT": reference, "beta": beta, "unbiased_kl": unbiased}
        return O.grpo_loss(lp, old, advantages, answer, **options)

    unbiased = partial(grpo_written, unbiased=True), partial(grpo, unbiased=True)
    for written, ours in ((dpo_written, dpo), (kto_written, kto), (grpo_written, grpo), unbiased):
        a, b = ours(lazy), written(plain)
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        leaves = x, norm.weight, head.weight
        for grad, exact in zip(
            torch.autograd.grad(a, leaves, retain_graph=True), torch.autograd.grad(b, leaves, retain_graph=True)
        ):
            torch.testing.assert_close(grad, exact, rtol=1e-6, atol=1e-8)


def test_distillation(seed):
    x, norm, head, labels = setting()
    teacher = nn.Sequential(nn.Linear(9, V)).double()
    hidden = torch.randn(B, T, 9, dtype=torch.float64)
    where = labels != -100
    mine = O.distillation_loss(L.rows_of(x, head, norm), hidden, teacher, where, temperature=2.0, rows=4)
    p = F.log_softmax(teacher(hidden) / 2, -1).detach()
    q = F.log_softmax(head(norm(x)) / 2, -1)
    expected = ((p.exp() * (p - q)).sum(-1) * 4)[where].mean()
    torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-6)
    for grad, exact in zip(gradients(mine, x, head.weight), gradients(expected, x, head.weight)):
        torch.testing.assert_close(grad, exact, rtol=1e-5, atol=1e-7)


def test_a_shared_weight_gets_both_gradients(seed):
    table = nn.Embedding(V, D).double()
    tied = nn.Linear(D, V, bias=False).double()
    tied.weight = table.weight
    tokens, labels = torch.randint(0, V, (B, T)), torch.randint(0, V, (B, T))
    exact = gradients(F.cross_entropy(tied(table(tokens)).flatten(0, 1), labels.flatten()), table.weight)[0]
    mine = gradients(L.causal_loss(L.rows_of(table(tokens), tied), labels, rows=6), table.weight)[0]
    torch.testing.assert_close(mine, exact, rtol=1e-10, atol=1e-12)


def test_bfloat16_weight_gradient_is_as_good_as_one_product(seed):
    """Hundreds of chunks must not cost accuracy: the sum is float32 and rounded once."""
    x = torch.randn(1, 4096, 16).bfloat16().requires_grad_()
    head = nn.Linear(16, 64, bias=False).bfloat16()
    labels = torch.randint(0, 64, (1, 4096))
    exact_head = nn.Linear(16, 64, bias=False).double()
    exact_head.weight.data.copy_(head.weight.data.double())
    exact = gradients(F.cross_entropy(exact_head(x[0].double()), labels[0]), exact_head.weight)[0]
    many, one = (
        gradients(L.causal_loss(L.rows_of(x, head), labels, rows=r), head.weight)[0].double() for r in (16, 4096)
    )
    assert (many - exact).norm() <= 1.1 * (one - exact).norm()


@pytest.mark.gpu
@NO_GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_equals_its_reference(dtype, seed):
    for rows, vocabulary, weighted in itertools.product([1, 37], [40, 8192, 50257], [False, True]):
        z = (torch.randn(rows, vocabulary, device="cuda") * 4).to(dtype)
        labels = torch.randint(0, vocabulary, (rows,), device="cuda")
        weights = torch.rand(rows, device="cuda") if weighted else None
        mine = row_loss_module.row_loss(z, labels, weights, True)
        exact = row_loss_module.reference(z, labels, weights, True)
        torch.testing.assert_close(mine[0], exact[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(mine[1], exact[1], rtol=1.6e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-7)
