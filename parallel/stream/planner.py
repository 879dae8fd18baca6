"""From free bytes and a model's sizes to a `StreamPlan`: a pure function, the same answer on every rank.

Preferences, in order: one chunk when that fits and the sequence is short (chunking buys nothing there); inputs on the
device, for the last layers first because their backward comes first; the rest on the host; every second input not
kept at all when the host is full too. What room remains goes to attention outputs, which saves their recomputation.
When nothing fits, smaller chunks are tried down to `SMALLEST`, and the last resort is returned with a reason, so that a
run degrades instead of failing in the planner.
"""

from __future__ import annotations

from ..memory_model import DecoderShape, Moments, loss_bytes, moments
from .loss import default_rows
from .plan import StreamPlan

SHORT = 16384  # rows up to which one chunk is as fast as any
PREFERRED = 8192
SMALLEST = 512
MARGIN = 0.06  # of the budget, for the allocator


def plan(
    shape: DecoderShape,
    batch: int,
    tokens: int,
    *,
    budget_bytes: int | None = None,
    host_bytes: int = 0,
    chunk: int | None = None,
    loss_rows: int | None = None,
    every: int | None = None,
    offload: bool | None = None,
    stash: bool | None = None,
    kernel: bool = True,
) -> StreamPlan:
    """The plan for `batch` sequences of `tokens`.

    `budget_bytes`: device bytes above weights and gradients (None: no limit). `host_bytes`: host memory for offload.
    `chunk`, `loss_rows`, `every` (2: every second layer input), `offload` (True: all inputs, False: none) and `stash`
    (keep attention outputs: True all, False none) fix what is otherwise chosen.
    """
    usable = None if budget_bytes is None else int(budget_bytes * (1 - MARGIN))
    rows = loss_rows or _loss_rows(shape, batch * tokens, usable, kernel)
    tried = _chunks(batch, tokens, chunk)
    last = None
    for size in tried:
        for derive in _spacings(every):
            last = _place(shape, batch, tokens, size, rows, usable, host_bytes, derive, offload, stash, kernel)
            if last is not None:
                reason = "" if size == tried[0] else f"chunks of {tried[0]} rows do not fit the budget"
                return _with(last, reason, loss_rows)
    place = "host" if host_bytes > 0 and offload is not False else "device"
    inputs = tuple("derived" if every == 2 and layer % 2 else place for layer in range(shape.layers))
    tightest = StreamPlan(batch, tokens, min(tried[-1], tokens), inputs, ("none",) * shape.layers, rows)
    return _with(_predicted(tightest, shape, kernel), "even the smallest plan exceeds the budget", loss_rows)


def _loss_rows(shape: DecoderShape, rows: int, usable: int | None, kernel: bool) -> int:
    """As many as the loss likes, unless that is more than a quarter of the budget."""
    chosen = min(default_rows(shape.vocab, shape.element_size), -(-rows // 128) * 128)
    while usable is not None and chosen > 128 and loss_bytes(shape, chosen, kernel) > usable / 4:
        chosen = max(128, chosen // 2 // 128 * 128)
    return chosen


def _chunks(batch: int, tokens: int, chunk: int | None) -> list[int]:
    if chunk is not None:
        return [min(chunk, tokens)]
    first = tokens if batch * tokens <= SHORT else min(tokens, max(SMALLEST, PREFERRED // batch))
    sizes = [first]
    while sizes[-1] > SMALLEST:
        sizes.append(max(SMALLEST, sizes[-1] // 2))
    return sizes


def _spacings(every: int | None) -> list[bool]:
    return [False, True] if every is None else [every == 2]


def _place(
    shape: DecoderShape,
    batch: int,
    tokens: int,
    chunk: int,
    loss_rows: int,
    usable: int | None,
    host_bytes: int,
    derive: bool,
    offload: bool | None,
    stash: bool | None,
    kernel: bool,
) -> StreamPlan | None:
    """The best placement with these chunks, or None when none fits."""
    layers = shape.layers
    row_bytes = batch * tokens * shape.width * shape.element_size
    attention_bytes = batch * tokens * (shape.q * shape.element_size + 4 * shape.heads)
    kept = [layer for layer in range(layers) if not (derive and layer % 2)]

    def build(on_device: int, attention: tuple[str, ...]) -> StreamPlan:
        away = kept[: len(kept) - on_device]
        inputs = tuple(
            "derived" if layer not in kept else "host" if layer in away else "device" for layer in range(layers)
        )
        draft = StreamPlan(batch, tokens, min(chunk, tokens), inputs, attention, loss_rows)
        return _predicted(draft, shape, kernel)

    def fits(candidate: StreamPlan) -> bool:
        return (usable is None or candidate.device_bytes <= usable) and candidate.host_bytes <= max(host_bytes, 0)

    nothing = ("none",) * layers
    most = 0 if offload else len(kept)
    least = len(kept) if offload is False or (host_bytes <= 0 and not offload) else 0
    if offload and host_bytes <= 0:
        host_bytes = len(kept) * row_bytes + (layers * attention_bytes if stash else 0)
    chosen = next((n for n in range(most, least - 1, -1) if fits(build(n, nothing))), None)
    if chosen is None:
        return None
    best = build(chosen, nothing)
    if stash is False:
        return best
    attention: list[str] = list(nothing)
    for layer in reversed(range(layers)):
        for where in ("device", "host"):
            if where == "device" and offload and stash:
                continue
            attention[layer] = where
            if fits(build(chosen, tuple(attention))):
                break
            attention[layer] = "none"
        if attention[layer] == "none":
            break
    return build(chosen, tuple(attention))


def _moments(plan: StreamPlan, shape: DecoderShape, kernel: bool) -> Moments:
    return moments(
        shape,
        rows=plan.batch * plan.tokens,
        chunk=plan.batch * plan.chunk,
        loss_rows=plan.loss_rows,
        inputs_on_device=plan.inputs.count("device"),
        inputs_on_host=plan.inputs.count("host"),
        attention_on_device=plan.attention.count("device"),
        derived=plan.inputs.count("derived"),
        kernel=kernel,
    )


def _predicted(plan: StreamPlan, shape: DecoderShape, kernel: bool) -> StreamPlan:
    rows = plan.batch * plan.tokens
    host = plan.inputs.count("host") * rows * shape.width * shape.element_size
    host += plan.attention.count("host") * rows * (shape.q * shape.element_size + 4 * shape.heads)
    peak = _moments(plan, shape, kernel).peak
    return StreamPlan(plan.batch, plan.tokens, plan.chunk, plan.inputs, plan.attention, plan.loss_rows, peak, host)


def _with(plan: StreamPlan, reason: str, loss_rows: int | None) -> StreamPlan:
    return StreamPlan(
        plan.batch,
        plan.tokens,
        plan.chunk,
        plan.inputs,
        plan.attention,
        loss_rows or plan.loss_rows,
        plan.device_bytes,
        plan.host_bytes,
        reason,
    )
