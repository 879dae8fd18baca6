"""What rivals' own code sends, keeps and loses: wire bytes, peak memory and error beside ours, on gloo, no timing.

    torchrun --nproc-per-node 4 -m undertow bench token_ring_rivals

Rivals run from what the user has installed: torch's context parallelism, and ring-attention-pytorch (lucidrains) where
it can be imported; nothing of them is part of this package. ring-flash-attention calls flash-attn, whose kernels need
CUDA, so its schedule (whole shards round a ring, merges between blocks) runs in our executor and says so. torch's
public call knows no CPU kernel either; the ring templates beneath it do, through an adapter of ten lines.

Bytes are counted where messages are issued: c10d operations of the rivals, the executor's transport of ours. Peak
memory is what the calling thread has allocated beyond its inputs, by torch's profiler; ours also has threads whose
temporaries it does not see, so the plan's own buffers stand beside it. Errors are against attention in float64.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode

from undertow.benchmarks.attention_modelled import PEERS, schedule_of
from undertow.benchmarks.case import Benchmark
from undertow.benchmarks.facts import facts
from undertow.benchmarks.token_ring import _exact, _whole
from undertow.comms.builders.attention_shape import Heads
from undertow.comms.cost import rank_costs
from undertow.comms.link import LinkModel
from undertow.comms.p2p import P2P
from undertow.comms.schedule import Schedule
from undertow.dist.errors import UserError
from undertow.dist.units import format_bytes
from undertow.parallel.masks import Mask
from undertow.parallel.partition import positions_of
from undertow.parallel.token_ring.block_ops import ops
from undertow.parallel.token_ring.problem import Problem

Tensors = Sequence[torch.Tensor]
Way = Callable[[Problem, Tensors], tuple[Tensors, "Sent", int]]  # q, k, v, dout → (out, dq, dk, dv), sent, buffers


@dataclass
class Sent:
    """Payload bytes that this rank has sent."""

    nbytes: int = 0


@dataclass(frozen=True)
class Row:
    """Of the rank with the most of each. `reason`: why it did not run; `errors`: the largest of out, dq, dk, dv."""

    way: str
    heads: str
    dtype: str
    reason: str = ""
    sent_bytes: int = 0
    peak_bytes: int = 0
    plan_bytes: int = 0
    errors: tuple[float, ...] = ()
    mean_error: float = 0.0


class _Counter(TorchDispatchMode):
    """Counts what c10d operations of this thread send."""

    def __init__(self, world: int) -> None:
        super().__init__()
        self.world, self.sent = world, Sent()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if name.startswith("c10d.send"):
            self.sent.nbytes += sum(x.numel() * x.element_size() for x in args[0])
        elif "all_gather_into_tensor" in name:
            self.sent.nbytes += (self.world - 1) * args[0].numel() * args[0].element_size()
        elif name.startswith("_c10d_functional.all_to_all_single"):
            kept = args[2][dist.get_rank()]
            self.sent.nbytes += (sum(args[2]) - kept) * args[0].element_size() * args[0].stride(0)
        return func(*args, **(kwargs or {}))


def _counted(problem: Problem, run: Callable[[], Tensors]) -> tuple[Tensors, Sent, int]:
    with _Counter(problem.world) as counter:
        return run(), counter.sent, 0


def _autograd(call: Callable[..., torch.Tensor], tensors: Tensors) -> Tensors:
    leaves = [x.detach().requires_grad_() for x in tensors[:3]]
    out = call(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, tensors[3])]


def _causal_sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def _torch_public(problem: Problem, tensors: Tensors) -> tuple[Tensors, Sent, int]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel

    mesh = init_device_mesh("cpu", (problem.world,))
    given = [x.permute(1, 2, 0, 3).contiguous() for x in tensors]

    def run() -> Tensors:
        with context_parallel(mesh, buffers=[torch.zeros(2 * problem.world)], buffer_seq_dims=[0]):
            found = _autograd(_causal_sdpa, given)  # looked up inside, because torch patches the function
        return [x.permute(2, 0, 1, 3) for x in found]

    return _counted(problem, run)


def _torch_templates(rotate: str, problem: Problem, tensors: Tensors) -> tuple[Tensors, Sent, int]:
    """torch's ring with its load balance, whose shards are our zigzag; the CPU kernel in the place of CUDA's."""
    from torch.distributed.tensor.experimental._context_parallel import _attention as cp

    aten = torch.ops.aten

    def forward(q: Any, k: Any, v: Any, is_causal: bool) -> Any:
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal)

    def known(*, grad_out: Any, query: Any, key: Any, value: Any, out: Any, logsumexp: Any, is_causal: bool) -> Any:
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out, query, key, value, out, logsumexp, 0.0, is_causal
        )

    backward: Any = known  # torch's protocol for kernels is looser than this signature
    q, k, v, dout = (x.permute(1, 2, 0, 3).contiguous() for x in tensors)
    options: Any = cp._cp_options
    kept = options.enable_load_balance, options.rotate_method
    options.enable_load_balance = True
    cp.set_rotate_method(rotate)
    try:

        def run() -> Tensors:
            group: Any = dist.group.WORLD
            out, lse, *_ = cp._templated_ring_attention(group, 2, forward, q, k, v, is_causal=True)  # pyright: ignore
            found = cp._templated_ring_attention_backward(
                group,
                2,
                backward,
                dout,
                "grad_out",
                q,
                k,
                v,
                out,
                lse,
                is_causal=True,  # pyright: ignore
            )
            return [x.permute(2, 0, 1, 3) for x in (out, *found[:3])]

        return _counted(problem, run)
    finally:
        options.enable_load_balance, options.rotate_method = kept


def _lucidrains(problem: Problem, tensors: Tensors) -> tuple[Tensors, Sent, int]:
    """Its query heads that share a key head are G apart, ours are neighbours; so they are put into its order, and back.

    As of 0.5.20 its dK and dV are wrong outside of CUDA: what carries them home returns a pair (received, sent), which
    is taken apart as (dK, dV), and autograd then adds up each one's two halves. The errors are shown as they are.
    """
    from ring_attention_pytorch import ring_flash_attn  # pyright: ignore[reportMissingImports]

    rows, heads, keys = tensors[0].shape[0], tensors[0].shape[2], tensors[1].shape[2]
    theirs = torch.arange(heads).reshape(keys, -1).T.flatten()
    ours = theirs.argsort()
    call = partial(ring_flash_attn, causal=True, bucket_size=rows, ring_reduce_col=True, striped_ring_attn=True)
    q, k, v, dout = (x.transpose(0, 1).contiguous() for x in tensors)
    given = [q[:, :, theirs], k, v, dout[:, :, theirs]]

    def run() -> Tensors:
        out, dq, dk, dv = _autograd(call, given)
        return [x.transpose(0, 1) for x in (out[:, :, ours], dq[:, :, ours], dk, dv)]

    return _counted(problem, run)


def _flash_attn(problem: Problem, tensors: Tensors) -> tuple[Tensors, Sent, int]:
    import ring_flash_attn  # noqa: F401  # pyright: ignore[reportMissingImports]

    raise UserError("ring-flash-attention on the CPU", expected="CUDA tensors: flash-attn has no other kernels")


def _ours(names: tuple[str, str], problem: Problem, tensors: Tensors) -> tuple[Tensors, Sent, int]:
    return _planned(problem, tensors, [problem.schedule(n, backward=bool(b)) for b, n in enumerate(names)])


def _peer(problem: Problem, tensors: Tensors) -> tuple[Tensors, Sent, int]:
    peer = PEERS["zigzag ring (ring-flash-attention)"]
    plans = [schedule_of(peer, problem, b, goals=True) for b in (False, True)]
    return _planned(problem, tensors, [plan for plan in plans if plan is not None])


def _planned(problem: Problem, tensors: Tensors, plans: Sequence[Schedule]) -> tuple[Tensors, Sent, int]:
    q, k, v, dout = tensors
    table = ops(problem, 1, problem.heads.head_dim**-0.5)
    with P2P(link=LinkModel(1e12), timeout_s=120) as executor:
        f = executor.run(plans[0], {"q": q, "k": k, "v": v}, table)
        given = {"q": q, "k": k, "v": v, "dout": dout, "lse": f["lse"]}
        b = executor.run(plans[1], given | {"delta": (dout.float() * f["out"].to(q.dtype).float()).sum(-1)}, table)
        assert executor.link is not None
        sent = Sent(sum(executor.link.sent_bytes.values()))
    buffers = max(rank_costs(plan)[executor.rank].buffer_bytes for plan in plans)
    return [x.to(q.dtype) for x in (f["out"], b["dq"], b["dk"], b["dv"])], sent, buffers


WAYS: dict[str, tuple[Way, str]] = {
    "torch context_parallel, as called": (_torch_public, "contiguous"),
    "torch's ring, all-to-all": (partial(_torch_templates, "alltoall"), "zigzag"),
    "torch's ring, all-gather": (partial(_torch_templates, "allgather"), "zigzag"),
    "ring-attention-pytorch, striped": (_lucidrains, "striped"),
    "ring-flash-attention": (_flash_attn, "zigzag"),
    "its zigzag ring, in our executor": (_peer, "zigzag"),
    "undertow ring_kv": (partial(_ours, ("ring_kv", "ring_kv")), "zigzag"),
    "undertow need_only": (partial(_ours, ("need_only_kv", "need_only_kv")), "zigzag"),
    "undertow token_ring": (partial(_ours, ("token_ring", "token_ring")), "zigzag"),
}


def measure(way: str, heads: Heads, rows: int, seed: int = 0) -> Row:
    """One way on one problem, on all ranks; collective."""
    run, layout = WAYS[way]
    world, rank = dist.get_world_size(), dist.get_rank()
    problem = Problem(world, rows * world, rows * world, heads, Mask(causal=True), layout)
    dtype = getattr(torch, heads.dtype)
    whole = [x.to(dtype) for x in _whole(problem, seed)]
    at = positions_of(problem.q_spans[rank])
    mine, wanted = [x[at].contiguous() for x in whole], [x[at] for x in _exact(problem, whole)]
    row = partial(Row, way, f"{heads.q_heads}:{heads.kv_heads}", heads.dtype)
    try:
        run(problem, mine)  # once unwatched: it may import, compile and connect
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            found, sent, buffers = run(problem, mine)
    except Exception as error:  # a rival that cannot run here is a finding, and the row names it
        return row(reason=f"{type(error).__name__}: {' '.join(str(error).split())[:160]}")
    errors = [(x.double() - y).abs() for x, y in zip(found, wanted)]
    figures = [sent.nbytes, peak_of(profile), buffers, sum(float(e.mean()) for e in errors) / 4]
    most = torch.tensor([*figures, *(float(e.max()) for e in errors)], dtype=torch.float64)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    sent_bytes, peak, plan, mean, *worst = most.tolist()
    return row("", int(sent_bytes), int(peak), int(plan), tuple(worst), mean)


def peak_of(profile: Any) -> int:
    """The most bytes that were allocated at once since the profile began."""
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def table(rows: Sequence[Row], world: int, count: int) -> Table:
    shown = Table(title=f"causal, {world} ranks of {count} tokens, forward + backward", title_justify="left")
    for column in ("way", "heads", "dtype", "sent per rank", "peak memory", "of the plan", "error of out",
                   "of dq", "of dk", "of dv", "mean"):  # fmt: skip
        shown.add_column(column, justify="left" if column in ("way", "heads", "dtype") else "right")
    for row in rows:
        if row.reason:
            shown.add_row(row.way, row.heads, row.dtype, f"cannot run: {row.reason}")
            continue
        plan = format_bytes(row.plan_bytes) if row.plan_bytes else "–"
        sizes = format_bytes(row.sent_bytes), format_bytes(row.peak_bytes), plan
        shown.add_row(row.way, row.heads, row.dtype, *sizes, *(f"{e:.1e}" for e in (*row.errors, row.mean_error)))
    return shown


def run(quick: bool, rounds: int | None, filter_: str, folder: Path) -> int:
    """The whole comparison; rank 0 writes token_ring_rivals.json and .txt into `folder`. Nothing repeats."""
    if not dist.is_initialized():
        if not dist.is_torchelastic_launched():
            raise UserError(
                "this benchmark needs several ranks",
                remedy="torchrun --nproc-per-node 4 -m undertow bench token_ring_rivals",
            )
        dist.init_process_group("gloo")
    torch.set_num_threads(1)
    count = 64 if quick else 512
    cells = product((8, 2), ("float32", "bfloat16"), (way for way in WAYS if filter_ in way))
    rows = [measure(way, Heads(1, 8, kv_heads, 64, 64, dtype), count) for kv_heads, dtype, way in cells]
    if dist.get_rank() == 0:
        found = table(rows, dist.get_world_size(), count)
        Console(width=190).print(found)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(
            {"facts": facts(("torch", "ring-attention-pytorch")), "rows": [asdict(row) for row in rows]}, indent=1
        )
        (folder / "token_ring_rivals.json").write_text(text + "\n")
        with (folder / "token_ring_rivals.txt").open("w") as file:
            Console(width=190, file=file).print(found)
    return int(any(row.reason for row in rows if row.way.startswith("undertow")))


BENCHMARK = Benchmark(
    name="token_ring_rivals",
    claim="as exact as the rivals' own code, with no more bytes on the wire",
    cases=lambda context: (),
    program=run,
)

if __name__ == "__main__":
    from undertow.benchmarks.cli import main

    sys.exit(main(["token_ring_rivals", *sys.argv[1:]]))
