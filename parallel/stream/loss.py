"""Losses over rows of hidden states that never hold all logits: token log-probabilities with a weight per row.

Every sequence loss in use is a function of the log-probabilities of chosen tokens, so one primitive serves them all:
`token_log_probs` returns them differentiably, and its backward forms (softmax - onehot) * weight for a few rows at a
time, where the weight of a row is whatever the user's loss says. `weighted_nll` is the case in which weights are known
in advance (SFT): gradients are formed in the forward sweep, which saves computing logits twice. `map_rows` is for
losses of whole logit rows (distillation). Ignored rows are dropped before anything is computed. Weight gradients add
up in float32; matrix products run in the type of the model.

Legend: N selected rows, R rows of a chunk, d channels, V vocabulary, B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..kernels.row_loss import row_loss
from ..merge import lse_dtype
from .deepspeed_zero import with_weights
from .rows import Pipeline, Rows
from .sweep import Sweep

IGNORE = -100


class _WeightedNLL(torch.autograd.Function):
    """sum of weight * nll over the selected rows, gradients formed on the way; params stay float32 sums until backward,
    so that they are rounded once."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, labels: Tensor, weights: Tensor | None, index: Tensor | None, pipeline: Pipeline,
        rows: int | None, *params: nn.Parameter,
    ) -> Tensor:  # fmt: skip
        sweep = Sweep(x, index, pipeline, rows)
        total = torch.zeros((), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32, device=x.device)
        differentiable = any(ctx.needs_input_grad)
        for start, stop in sweep.chunks():
            label, weight = labels[start:stop], None if weights is None else weights[start:stop]

            def of_logits(z: Tensor, label: Tensor = label, weight: Tensor | None = weight) -> tuple[Tensor, Tensor]:
                sweep.know(z)
                nll, dz = row_loss(z, label, weight, True)
                assert dz is not None
                return nll, dz

            if differentiable:
                nll = sweep.gradient(start, stop, of_logits)
            else:
                z = sweep.logits(start, stop)
                sweep.know(z)
                nll = row_loss(z, label, None, False)[0]
            total += (nll if weight is None else nll * weight).sum()
        ctx.found = (sweep.dx(), sweep.sums) if differentiable else None
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        found, ctx.found = ctx.found, None
        if found is None:
            raise RuntimeError("a streamed loss was differentiated twice; retain_graph=True is not supported")
        dx, sums = found
        dx.mul_(dloss)  # one number in float32, which a bfloat16 tensor does not round before it multiplies
        sums.scale(dloss)
        return dx, None, None, None, None, None, *sums.rounded()


class _MapRows(torch.autograd.Function):
    """value [N] of each selected row; backward runs the chunks again with the row weights it is given."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, index: Tensor | None, pipeline: Pipeline, rows: int | None, score: Score,
        *params: nn.Parameter,
    ) -> Tensor:  # fmt: skip
        sweep = Sweep(x, index, pipeline, rows)
        values = []
        for start, stop in sweep.chunks():
            z = sweep.logits(start, stop)
            sweep.know(z)
            values.append(score.value(z, start, stop))
        ctx.save_for_backward(x, index)
        ctx.how = pipeline, sweep.rows, score
        ctx.autocast = torch.is_autocast_enabled(x.device.type), torch.get_autocast_dtype(x.device.type)
        return torch.cat(values) if values else x.new_zeros(0, dtype=torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dvalues: Tensor) -> tuple[Tensor | None, ...]:
        x, index = ctx.saved_tensors
        pipeline, rows, score = ctx.how
        enabled, dtype = ctx.autocast
        with torch.autocast(x.device.type, dtype=dtype, enabled=enabled):
            sweep = Sweep(x, index, pipeline, rows)
            for start, stop in sweep.chunks():
                weight = dvalues[start:stop]
                sweep.gradient(start, stop, lambda z, a=start, b=stop, w=weight: (w, score.gradient(z, a, b, w)))
        return sweep.dx(), None, None, None, None, *sweep.sums.rounded()


class Score(Protocol):
    """A value per row of logits and its gradient; rows start … stop of the selected ones."""

    def value(self, z_RV: Tensor, start: int, stop: int) -> Tensor: ...

    def gradient(self, z_RV: Tensor, start: int, stop: int, weight_R: Tensor) -> Tensor:
        """d(sum of weight * value) / dz, in the type of z."""
        ...


class _LogProb:
    """log softmax(z)[label]."""

    def __init__(self, labels_N: Tensor) -> None:
        self._labels = labels_N

    def value(self, z_RV: Tensor, start: int, stop: int) -> Tensor:
        return -row_loss(z_RV, self._labels[start:stop], None, False)[0]

    def gradient(self, z_RV: Tensor, start: int, stop: int, weight_R: Tensor) -> Tensor:
        gradient = row_loss(z_RV, self._labels[start:stop], -weight_R, True)[1]
        assert gradient is not None
        return gradient


class _Written:
    """Any function of (logits [R, V], row tensors …) to [R]; its gradient comes from autograd, a chunk at a time."""

    def __init__(self, function: Callable[..., Tensor], given: tuple[Tensor, ...]) -> None:
        self._function, self._given = function, given

    def _call(self, z_RV: Tensor, start: int, stop: int) -> Tensor:
        return self._function(z_RV, *(t[start:stop] for t in self._given))

    def value(self, z_RV: Tensor, start: int, stop: int) -> Tensor:
        with torch.no_grad():
            return self._call(z_RV, start, stop)

    def gradient(self, z_RV: Tensor, start: int, stop: int, weight_R: Tensor) -> Tensor:
        with torch.enable_grad():
            z = z_RV.detach().requires_grad_()
            value = self._call(z, start, stop)
        return torch.autograd.grad(value, z, weight_R.to(value.dtype))[0]


def rows_of(hidden_BTd: Tensor, head: nn.Module, norm: nn.Module | None = None) -> Rows:
    """`Rows` for a model of one's own: `hidden` through `norm`, then `head` (a row-wise module ending in logits)."""
    pipeline = Pipeline() if norm is None else Pipeline().then(norm, norm)
    return Rows(hidden_BTd, pipeline.then(head, head))


def _opened(logits: Rows | Tensor) -> tuple[Tensor, Pipeline]:
    return (logits.x, logits.pipeline) if isinstance(logits, Rows) else (logits, Pipeline())


def _selected(labels: Tensor) -> tuple[Tensor, Tensor | None]:
    """The labels that count, and where they are; None when all do. Copies one number to the host."""
    flat = labels.reshape(-1)
    index = (flat != IGNORE).nonzero().squeeze(1)
    return (flat, None) if index.shape[0] == flat.shape[0] else (flat[index], index)


def weighted_nll(
    logits: Rows | Tensor, labels_BT: Tensor, weights_BT: Tensor | None = None, *, rows: int | None = None
) -> Tensor:
    """sum over rows of weight * -log p(label); rows labelled -100 are dropped. A scalar in float32 at least.

    `labels_BT[b, t]` belongs to row t (shift before calling). Weights get no gradient; where they depend on the model,
    use `token_log_probs`.
    """
    x, pipeline = _opened(logits)
    labels, index = _selected(labels_BT)
    weights = None
    if weights_BT is not None:
        weights = weights_BT.detach().reshape(-1)
        weights = weights if index is None else weights[index]

    def compute() -> Tensor:
        params = pipeline.parameters()
        return _WeightedNLL.apply(x, labels, weights, index, pipeline, rows, *params)  # type: ignore[return-value]

    return with_weights(pipeline.weights(), x, compute)


def causal_loss(
    logits: Rows | Tensor, labels_BT: Tensor, num_items: Tensor | int | None = None, *, rows: int | None = None
) -> Tensor:
    """Mean cross-entropy over the rows that are not -100, or their sum divided by `num_items`; labels are aligned."""
    count = (labels_BT != IGNORE).sum() if num_items is None else num_items
    count = count.to(logits.device) if isinstance(count, Tensor) else torch.tensor(count, device=logits.device)
    if logits.dtype == torch.float16:  # 1 / count may be too small for it; a scaled loss then brings its own factor
        return weighted_nll(logits, labels_BT, rows=rows) / count
    share = torch.ones((), dtype=lse_dtype(logits.dtype), device=logits.device) / count
    return weighted_nll(logits, labels_BT, share.expand(labels_BT.shape), rows=rows)


def token_log_probs(logits: Rows | Tensor, labels_BT: Tensor, *, rows: int | None = None) -> Tensor:
    """log p(label) of each row [B, T], differentiable; 0 without gradient where the label is -100."""
    x, pipeline = _opened(logits)
    labels, index = _selected(labels_BT)
    return _placed(_mapped(x, index, pipeline, rows, _LogProb(labels)), index, labels_BT)


def _mapped(x: Tensor, index: Tensor | None, pipeline: Pipeline, rows: int | None, score: Score) -> Tensor:
    def compute() -> Tensor:
        return _MapRows.apply(x, index, pipeline, rows, score, *pipeline.parameters())  # type: ignore[return-value]

    return with_weights(pipeline.weights(), x, compute)


def map_rows(
    function: Callable[..., Tensor], logits: Rows | Tensor, *given: Tensor, where: Tensor, rows: int | None = None
) -> Tensor:
    """`function(logits [R, V], *given rows)` to [R], for the rows that `where` [B, T] selects; [B, T], 0 elsewhere.

    `given` are [B, T, …] tensors without gradient. `function` must treat each row alone.
    """
    x, pipeline = _opened(logits)
    chosen = torch.where(where, 0, IGNORE)
    _, index = _selected(chosen)
    flat = tuple(t.detach().flatten(0, 1) for t in given)
    flat = flat if index is None else tuple(t[index] for t in flat)
    return _placed(_mapped(x, index, pipeline, rows, _Written(function, flat)), index, where)


def _placed(values: Tensor, index: Tensor | None, like: Tensor) -> Tensor:
    if index is None:
        return values.view(like.shape)
    full = torch.zeros(like.numel(), dtype=values.dtype, device=values.device)
    return full.index_copy(0, index, values).view(like.shape)
