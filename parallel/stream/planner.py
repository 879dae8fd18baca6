"""From free bytes and a model's sizes to a `StreamPlan`: a pure function, the same answer on every rank.

The whole sequence and chunk lengths from `LONGEST_CHUNK` down to `SMALLEST` rows are tried, each with layer inputs
where they fit: on the device (the last layers first, because their backward comes first), the rest on the host; when
the host is full too, only every n-th one is kept, with the smallest n that fits. What room remains goes to attention
outputs, which saves their recomputation; and where one chunk fits, to the whole graphs of the last layers, which then
compute nothing twice. Of what fits, the plan with the least predicted work wins: one chunk is plain checkpointing of
whole layers with a chunked loss, so chunking is chosen only where it does not fit, or where the room that it frees
saves more attention than chunks cost. When nothing fits, the tightest plan is returned with a reason, so that a run
degrades instead of failing here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ..memory_model import DecoderShape, attention_bytes, loss_bytes, moments, step_flops, sum_bytes
from .plan import StreamPlan
from .ring_memory import ring_bytes
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
SPACINGS = (1, 2, 3, 4, 6, 8)  # of kept layer inputs
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
    ranks: int = 0,
    settled: int | None = None,
) -> StreamPlan:
    """The plan for `batch` sequences of `tokens`.

    `budget_bytes`: device bytes above weights and gradients (None: no limit). `host_bytes`: host memory for offload.
    `chunk`, `loss_rows`, `every` (n: every n-th layer input), `offload` (True: all inputs, False: none) and `stash`
    (keep attention outputs: True all, False none) fix what is otherwise chosen. Whole graphs are kept only where none
    of `chunk`, `offload=True`, `stash` and `every` above 1 says otherwise, and not of families whose graphs have no
    formula (`DecoderShape.more_norms`), such as mixtures of experts.

    `ranks`: 0, or attention is one call over all rows of a layer, and over those of so many ranks (1: on this one
    alone); `tokens` are then those of one rank. Ranks must keep attention of the same layers: `settled` says of how
    many, the last ones (graphs among them), and `stash=True` means all.
    """
    usable = None if budget_bytes is None else int(budget_bytes * (1 - MARGIN))
    rows = loss_rows or _loss_rows(shape, batch * tokens, usable, kernel)
    settled = shape.layers if ranks and stash and settled is None else settled
    task = _Task(shape, batch, tokens, usable, max(host_bytes, 0), offload, stash, kernel, ranks, settled)
    tried, found = _chunks(batch, tokens, chunk), list[StreamPlan]()
    shorter = [] if chunk else [size for size in (256, 128) if size < tried[-1]]
    smaller = [rows] if loss_rows else [n for n in (128, 64, 32, 16) if n <= rows]
    for sizes, fewer in ((tried, rows), *(([*tried, *shorter], n) for n in smaller)):
        for size in sizes:
            # A wider spacing computes more and frees no more than the attention outputs that would make up for it.
            placed = (_place(task, size, fewer, spacing) for spacing in _spacings(every, shape.layers))
            first = next((best for best in placed if best is not None), None)
            found += [first] if first is not None else []
        if found:
            break
    free = chunk is None and stash is None and not offload and every in (None, 1)
    if free and shape.more_norms is not None:
        task = replace(task, usable=None if usable is None else int(usable * (1 - GRAPH_MARGIN)))
        found += _with_graphs(lambda graphs: _place(task, tokens, rows, 1, graphs), shape.layers)
    if found:
        best = min(found, key=lambda candidate: cost(candidate, shape, ranks))
        reason = _reason(best, found, tried, shape, ranks)
        return replace(best, reason=reason, loss_rows=loss_rows or best.loss_rows)
    place = "host" if host_bytes > 0 and offload is not False else "device"
    inputs = tuple("derived" if every and layer % every else place for layer in range(shape.layers))
    attention = ("none",) * (shape.layers - (settled or 0)) + (place,) * (settled or 0)
    tightest = StreamPlan(batch, tokens, min(tried[-1], tokens), inputs, attention, rows)
    return replace(
        predicted(tightest, shape, kernel=kernel, ranks=ranks), reason="even the smallest plan exceeds the budget"
    )


@dataclass(frozen=True)
class _Task:
    """What all candidates share; as the arguments of `plan`. `usable`: bytes of the budget, less a margin."""

    shape: DecoderShape
    batch: int
    tokens: int
    usable: int | None
    host_bytes: int
    offload: bool | None
    stash: bool | None
    kernel: bool
    ranks: int
    settled: int | None

    @property
    def rows(self) -> int:
        return self.batch * self.tokens

    @property
    def row_bytes(self) -> int:
        """Of one layer's input."""
        return self.rows * self.shape.width * self.shape.element_size


def cost(plan: StreamPlan, shape: DecoderShape, ranks: int = 0) -> float:
    """Seconds of one forward and backward on a machine of `RATES`: for comparing plans, not for promising."""
    work = step_flops(shape, plan.batch, plan.tokens, chunks=len(plan.bounds), ranks=ranks, **plan.fractions)
    copies = HOST_SEEN * 2 * plan.host_bytes / HOST_BYTES_PER_S
    sums = sum_bytes(shape, plan.batch * plan.tokens, plan.batch * plan.chunk) / BYTES_PER_S
    return sum(amount / RATES[kind] for kind, amount in work.items()) + sums + copies


def _reason(best: StreamPlan, found: list[StreamPlan], tried: list[int], shape: DecoderShape, ranks: int) -> str:
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
        gain = cost(longest, shape, ranks) / cost(best, shape, ranks) - 1
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


def _spacings(every: int | None, layers: int) -> list[int]:
    return [n for n in SPACINGS if n == 1 or n <= layers] if every is None else [every]


def _with_graphs(place: Callable[[int], StreamPlan | None], layers: int) -> list[StreamPlan]:
    """Plans that keep the graphs of as many layers as fit, and of some fewer: more room for attention outputs."""
    low, high = 0, layers
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if place(middle) else (low, middle - 1)
    counts = {low, low - 1, 3 * low // 4, low // 2} - {0, -1}
    return [placed for count in sorted(counts) if (placed := place(count))]


def _place(task: _Task, chunk: int, loss_rows: int, spacing: int, graphs: int = 0) -> StreamPlan | None:
    """The best placement with these chunks, or None when none fits."""
    layers, tail = task.shape.layers - graphs, ("graph",) * graphs
    kept = [layer for layer in range(layers) if layer % spacing == 0]
    outputs = None if task.settled is None else task.settled - graphs  # of attention, to be kept
    if outputs is not None and not 0 <= outputs <= layers:
        return None
    host_bytes, offload, stash = task.host_bytes, task.offload, task.stash
    if offload and not host_bytes:
        host_bytes = len(kept) * task.row_bytes + (layers * attention_bytes(task.shape, task.rows) if stash else 0)

    def build(on_device: int, attention: tuple[str, ...]) -> StreamPlan:
        away = kept[: len(kept) - on_device]
        inputs = tuple(
            "derived" if layer % spacing else "host" if layer in away else "device" for layer in range(layers)
        )
        attention = attention + ("none",) * graphs
        draft = StreamPlan(task.batch, task.tokens, min(chunk, task.tokens), inputs + tail, attention, loss_rows)
        return predicted(draft, task.shape, kernel=task.kernel, ranks=task.ranks)

    def fits(candidate: StreamPlan) -> bool:
        return (task.usable is None or candidate.device_bytes <= task.usable) and candidate.host_bytes <= host_bytes

    nothing = ("none",) * layers
    most = 0 if offload else len(kept)
    least = len(kept) if offload is False or not host_bytes else 0
    chosen = next((n for n in range(most, least - 1, -1) if fits(build(n, nothing))), None)
    if chosen is None:
        return None
    attention: list[str] = list(nothing)
    for layer in reversed(range(layers)):
        if outputs == layers - attention.count("none") or (stash is False and outputs is None):
            break
        for where in ("device", "host"):
            if where == "device" and offload and stash:
                continue
            attention[layer] = where
            if fits(build(chosen, tuple(attention))):
                break
            attention[layer] = "none"
        if attention[layer] == "none":
            break
    if outputs is not None and layers - attention.count("none") != outputs:
        return None
    return build(chosen, tuple(attention))


def predicted(plan: StreamPlan, shape: DecoderShape, *, kernel: bool = True, ranks: int = 0) -> StreamPlan:
    """`plan` with the bytes that it will need; `kernel` and `ranks` as for `plan()`."""
    rows = plan.batch * plan.tokens
    found = moments(
        shape,
        rows=rows,
        chunk=plan.batch * plan.chunk,
        loss_rows=plan.loss_rows,
        inputs_on_device=plan.inputs.count("device"),
        inputs_on_host=plan.inputs.count("host"),
        attention_on_device=plan.attention.count("device"),
        attention_on_host=plan.attention.count("host"),
        derived=plan.derived_rows,
        graphs=plan.inputs.count("graph"),
        kernel=kernel,
        ranks=ranks,
        call=ring_bytes(shape, rows, ranks, batch=plan.batch, kernel=kernel) if ranks else (0, 0),
    )
    host = plan.inputs.count("host") * rows * shape.width * shape.element_size
    host += plan.attention.count("host") * attention_bytes(shape, rows)
    return replace(plan, device_bytes=found.peak, host_bytes=host)
