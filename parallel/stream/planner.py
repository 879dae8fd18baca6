"""From free bytes and a model's sizes to a `StreamPlan`: a pure function, the same answer on every rank.

The whole sequence and chunk lengths from `LONGEST_CHUNK` down to `SMALLEST` rows are tried, each with layer inputs
where they fit: on the device (the last layers first, because their backward comes first), the rest on the host, every
second one not kept at all when the host is full too. What room remains goes to attention outputs, which saves their
recomputation; and where one chunk fits, to the whole graphs of the last layers, which then compute nothing twice. Of
what fits, the plan with the least predicted work wins: one chunk is plain checkpointing of whole
layers with a chunked loss, so chunking is chosen only where it does not fit, or where the room that it frees saves more
attention than chunks cost. When nothing fits, the tightest plan is returned with a reason, so that a run degrades
instead of failing here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ..memory_model import DecoderShape, Moments, loss_bytes, moments, step_flops, sum_bytes
from .plan import StreamPlan
from .sweep import default_rows

SMALLEST = 512  # shorter chunks, and fewer rows of the loss than it likes, are tried only when nothing else fits
# Rows of one of several chunks. Longer ones promise little (the sums are read and written for every `PRODUCT_ROWS` rows
# anyway; keys are projected again for 1 - 1/chunks of the rows, 1 % of a step), take the room of attention outputs, and
# were slower: on an H100, one Llama-3-8B layer at 256K tokens took 7.10 s in 2 chunks of 128K and 6.33 s in 32 of 8K.
LONGEST_CHUNK = 32768
MARGIN = 0.06  # of the budget, for the allocator
GRAPH_MARGIN = 0.08  # of the rest, where graphs are kept: what autograd saves depends on how a layer is written
# Relative speeds of an H100 (measured: 8192³ GEMM, cuDNN attention at 32K, device copy); only their ratios matter here.
RATES = {"gemm": 787e12, "attention_forward": 641e12, "attention_backward": 545e12}
BYTES_PER_S = 3.0e12
HOST_BYTES_PER_S = 50e9
HOST_SEEN = 0.02  # of a copy to the host and back: it is hidden, but device memory is preferred


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
    (keep attention outputs: True all, False none) fix what is otherwise chosen. Whole graphs are kept only where none
    of `chunk`, `offload=True`, `stash` and `every=2` says otherwise, and not of mixtures of experts, whose graphs have
    no formula here.
    """
    usable = None if budget_bytes is None else int(budget_bytes * (1 - MARGIN))
    rows = loss_rows or _loss_rows(shape, batch * tokens, usable, kernel)
    tried, found = _chunks(batch, tokens, chunk), list[StreamPlan]()
    shorter = [] if chunk else [size for size in (256, 128) if size < tried[-1]]
    smaller = [rows] if loss_rows else [n for n in (128, 64, 32, 16) if n <= rows]
    for sizes, fewer in ((tried, rows), *(([*tried, *shorter], n) for n in smaller)):
        found = [
            placed
            for size in sizes
            for derive in _spacings(every)
            if (placed := _place(shape, batch, tokens, size, fewer, usable, host_bytes, derive, offload, stash, kernel))
        ]
        if found:
            break
    free = chunk is None and stash is None and not offload and every != 2
    if free and shape.active_parameters == shape.layer_parameters:
        usable = None if usable is None else int(usable * (1 - GRAPH_MARGIN))
        found += _with_graphs(
            lambda graphs: _place(
                shape, batch, tokens, tokens, rows, usable, host_bytes, False, offload, stash, kernel, graphs
            ),
            shape.layers,
        )
    if found:
        best = min(found, key=lambda candidate: cost(candidate, shape))
        return replace(best, reason=_reason(best, found, tried, shape), loss_rows=loss_rows or best.loss_rows)
    place = "host" if host_bytes > 0 and offload is not False else "device"
    inputs = tuple("derived" if every == 2 and layer % 2 else place for layer in range(shape.layers))
    tightest = StreamPlan(batch, tokens, min(tried[-1], tokens), inputs, ("none",) * shape.layers, rows)
    return replace(_predicted(tightest, shape, kernel), reason="even the smallest plan exceeds the budget")


def cost(plan: StreamPlan, shape: DecoderShape) -> float:
    """Seconds of one forward and backward on a machine of `RATES`: for comparing plans, not for promising."""
    work = step_flops(shape, plan.batch, plan.tokens, chunks=len(plan.bounds), **plan.fractions)
    copies = HOST_SEEN * 2 * plan.host_bytes / HOST_BYTES_PER_S
    sums = sum_bytes(shape, plan.batch * plan.tokens, plan.batch * plan.chunk) / BYTES_PER_S
    return sum(amount / RATES[kind] for kind, amount in work.items()) + sums + copies


def _reason(best: StreamPlan, found: list[StreamPlan], tried: list[int], shape: DecoderShape) -> str:
    if len(tried) == 1:
        return ""
    graphs = best.inputs.count("graph")
    if graphs == len(best.inputs):
        return "one chunk fits, and all that autograd saves: nothing is computed twice"
    if graphs:
        return f"one chunk fits, and all that autograd saves of {graphs} layers; the others are checkpointed whole"
    if len(best.bounds) == 1:
        return "one chunk fits: plain checkpointing of whole layers, with a chunked loss"
    longest = max(found, key=lambda candidate: candidate.chunk)
    if longest.chunk > best.chunk:
        gain = cost(longest, shape) / cost(best, shape) - 1
        return f"longer chunks fit, but the room saves more attention ({gain:.1%} of a step, predicted)"
    if best.chunk == tried[1] and best.batch * best.tokens > 2 * LONGEST_CHUNK:
        return f"one chunk does not fit; of several, those of more than {LONGEST_CHUNK} rows were measured to be slower"
    return "longer chunks do not fit the budget"


def _loss_rows(shape: DecoderShape, rows: int, usable: int | None, kernel: bool) -> int:
    """As many as the loss likes, unless that is more than a quarter of the budget."""
    chosen = min(default_rows(shape.vocab, shape.element_size), -(-rows // 128) * 128)
    while usable is not None and chosen > 128 and loss_bytes(shape, chosen, kernel) > usable / 4:
        chosen = max(128, chosen // 2 // 128 * 128)
    return chosen


def _chunks(batch: int, tokens: int, chunk: int | None) -> list[int]:
    if chunk is not None:
        return [min(chunk, tokens)]
    sizes = [tokens]
    while sizes[-1] * batch > SMALLEST and sizes[-1] > 128:
        half = -(-sizes[-1] // 2)
        sizes.append(min(-(-half // 128) * 128, sizes[-1] - 1) if half > 128 else 128)  # whole tiles for the kernels
    return [size for size in sizes if size == tokens or size * batch <= LONGEST_CHUNK or size <= 128]


def _spacings(every: int | None) -> list[bool]:
    return [False, True] if every is None else [every == 2]


def _with_graphs(place: Callable[[int], StreamPlan | None], layers: int) -> list[StreamPlan]:
    """Plans that keep the graphs of as many layers as fit, and of some fewer: more room for attention outputs."""
    low, high = 0, layers
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if place(middle) else (low, middle - 1)
    counts = {low, low - 1, 3 * low // 4, low // 2} - {0, -1}
    return [placed for count in sorted(counts) if (placed := place(count))]


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
    graphs: int = 0,
) -> StreamPlan | None:
    """The best placement with these chunks, or None when none fits."""
    layers, tail = shape.layers - graphs, ("graph",) * graphs
    row_bytes = batch * tokens * shape.width * shape.element_size
    attention_bytes = batch * tokens * (shape.q * shape.element_size + 4 * shape.heads)
    kept = [layer for layer in range(layers) if not (derive and layer % 2)]

    def build(on_device: int, attention: tuple[str, ...]) -> StreamPlan:
        away = kept[: len(kept) - on_device]
        inputs = tuple(
            "derived" if layer not in kept else "host" if layer in away else "device" for layer in range(layers)
        )
        attention = attention + ("none",) * graphs
        draft = StreamPlan(batch, tokens, min(chunk, tokens), inputs + tail, attention, loss_rows)
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
        graphs=plan.inputs.count("graph"),
        kernel=kernel,
    )


def _predicted(plan: StreamPlan, shape: DecoderShape, kernel: bool) -> StreamPlan:
    rows = plan.batch * plan.tokens
    host = plan.inputs.count("host") * rows * shape.width * shape.element_size
    host += plan.attention.count("host") * rows * (shape.q * shape.element_size + 4 * shape.heads)
    peak = _moments(plan, shape, kernel).peak
    return replace(plan, device_bytes=peak, host_bytes=host)
