"""Ring attention between the GPUs of one host over NCCL: every schedule beside torch's context parallel and the ideal.

All arms get the same sequence in the same zigzag layout. `zigzag ring` is what ring-flash-attention's zigzag form does
(whole shards, merges between blocks), in this package's executor, because the package itself needs flash-attn; torch's
context parallel is the real one, its buffers sharded outside of the time. `of_ideal` is the time of the same kernel's
monolithic call on one GPU, divided by the ranks and by the arm's time. Where that ideal is longer than 0.3 s, variants
of the schedules are left out, and say so, the monolithic call is timed once, and the gate behind 'auto' decides after
three rounds; ``--rounds 6`` is then enough for a case to end in two and a half minutes. `host_us` is how long the
calling thread took to queue the call, before the device had ended: where it is longer than the device's work, the host
is what is timed. With ``--machine`` (from `undertow probe` on these GPUs) the model's prediction stands beside each
schedule.

    torchrun --nproc-per-node 2 -m undertow bench ring_gpus --minutes 8

Without GPUs it runs small shapes over gloo, to see that it works.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist

from undertow.benchmarks.attention_modelled import PEERS, Peer, schedule_of
from undertow.benchmarks.case import Arm, Benchmark, Case, Context, Measured, Trial
from undertow.comms.builders.attention_shape import Heads
from undertow.dist.errors import UserError
from undertow.dist.machine import Machine
from undertow.parallel import token_ring_attention
from undertow.parallel.blocks.select import choose as choose_block
from undertow.parallel.masks import Mask
from undertow.parallel.partition import positions_of
from undertow.parallel.token_ring.block_ops import ops
from undertow.parallel.token_ring.executors import forget, home
from undertow.parallel.token_ring.planner import Rates, predict
from undertow.parallel.token_ring.problem import SCHEDULES, Problem

PLAIN, TORCH, PEER = "ring_kv", "torch context_parallel", "zigzag ring (ring-flash-attention)"
BETWEEN = "ring_kv, merges between blocks"
GATE_CALLS = 31  # enough for the gate to have decided
LONG_S = 0.3  # a call that is ideally longer has fewer arms: those that differ in what moves, and the rivals
FEW = (PLAIN, "token_ring", "ulysses")
LENGTHS = (32_768, 65_536, 131_072, 262_144)
HEADS = ((32, 32), (32, 4))


class Side:
    """One case on this rank: the whole sequence's answer where this rank's rows are, and its shards."""

    def __init__(self, problem: Problem, backward: bool, device: torch.device, seed: int) -> None:
        self.problem, self.backward, self.device = problem, backward, device
        h, dtype = problem.heads, getattr(torch, problem.heads.dtype)
        generator = torch.Generator(device).manual_seed(seed)  # alike on all ranks
        sizes = (h.q_heads, h.kv_heads, h.kv_heads, h.q_heads)
        self.whole = [
            torch.randn(1, n, problem.lq, h.head_dim, device=device, dtype=dtype, generator=generator) for n in sizes
        ]
        at = positions_of(problem.q_spans[dist.get_rank()]).to(device)
        q, k, v, dout = self.whole
        block = choose_block(q, k, v, causal=True, window=None)
        options: dict[str, Any] = {"scale": h.head_dim**-0.5, "causal": True}
        out, lse = block.forward(q, k, v, **options)
        answer = [out, *(block.backward(dout, q, k, v, out, lse, **options) if backward else ())]
        self.wanted = [x[:, :, at].transpose(1, 2).contiguous() for x in answer]
        del answer
        self.shards = [x[:, :, at].transpose(1, 2).contiguous() for x in self.whole]

        def monolithic() -> None:
            out, lse = block.forward(q, k, v, **options)
            if backward:
                block.backward(dout, q, k, v, out, lse, **options)

        times = [self.seconds(monolithic)[0]]
        if times[0] / problem.world < LONG_S:
            times += [self.seconds(monolithic)[0] for _ in range(2)]
        self.ideal_s = sorted(times)[len(times) // 2] / problem.world
        self._ops = cache(ops)  # other operations would be rehearsed anew, within the time of a call

    def seconds(self, call: Callable[[], object]) -> tuple[float, float]:
        """Of one call: on the device where there is one, and until the calling thread had it back."""
        if self.device.type != "cuda":
            start_s = time.perf_counter()
            call()
            taken_s = time.perf_counter() - start_s
            return taken_s, taken_s
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        start_s = time.perf_counter()
        call()
        host_s = time.perf_counter() - start_s
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3, host_s

    def ours(self, schedule: str) -> Measured:
        leaves = [x.detach().requires_grad_(self.backward) for x in self.shards[:3]]
        n = self.problem.lq
        found: list[torch.Tensor] = []

        def call() -> None:
            out = token_ring_attention(
                *leaves, causal=True, lengths=(n, n), schedule=schedule, backward_schedule=schedule
            )  # fmt: skip
            grads = torch.autograd.grad(out, leaves, self.shards[3]) if self.backward else ()
            found.extend((out.detach(), *grads))

        return self._measured(found, *self.seconds(call))

    def between(self, peer: Peer) -> Measured:
        """A schedule that merges between blocks, not beside them, by this package's executor and kernels."""
        problem, found = self.problem, []
        where = home(None, self.device)
        assert where.executor is not None
        executor, scale = where.executor, problem.heads.head_dim**-0.5
        plans = [plan for phase in (False, True) if (plan := schedule_of(peer, problem, phase, goals=True))]
        table = self._ops(problem, 1, scale)
        q, k, v, dout = (x.transpose(0, 1).contiguous() for x in self.shards)
        blocking = self.device.type == "cpu"

        def call() -> None:
            with torch.no_grad():
                got = executor.run(plans[0], {"q": q, "k": k, "v": v}, table, blocking=blocking)
                out = got["out"].to(q.dtype)
                found.append(out)
                if self.backward:
                    delta = (dout.float() * out.float()).sum(-1)
                    given = {"q": q, "k": k, "v": v, "dout": dout, "lse": got["lse"], "delta": delta}
                    grads = executor.run(plans[1], given, table, blocking=blocking)
                    found.extend(grads[name].to(q.dtype) for name in ("dq", "dk", "dv"))

        measured = self.seconds(call)
        return self._measured([x.transpose(0, 1) for x in found], *measured)

    def torch_context_parallel(self) -> Measured:
        """Its zigzag ring, heads of keys repeated where its ring does not take grouped heads (as its users do)."""
        from torch.distributed.tensor.experimental import context_parallel

        mesh = dist.device_mesh.init_device_mesh(self.device.type, (self.problem.world,))
        copies = self.problem.heads.q_heads // self.problem.heads.kv_heads
        whole = [self.whole[0], *(x.repeat_interleave(copies, 1) for x in self.whole[1:3]), self.whole[3]]
        buffers = [x.clone() for x in whole]
        found: list[torch.Tensor] = []
        with context_parallel(mesh, buffers=buffers, buffer_seq_dims=[2] * 4):
            leaves = [x.detach().clone().requires_grad_(self.backward) for x in buffers[:3]]

            def call() -> None:
                out = torch.nn.functional.scaled_dot_product_attention(leaves[0], leaves[1], leaves[2], is_causal=True)
                grads = torch.autograd.grad(out, leaves, buffers[3]) if self.backward else ()
                found.extend((out.detach(), *grads))

            measured = self.seconds(call)
        if copies > 1 and self.backward:
            found[2:] = [x.unflatten(1, (-1, copies)).sum(2) for x in found[2:]]
        return self._measured([x.transpose(1, 2) for x in found], *measured)

    def _measured(self, found: Sequence[torch.Tensor], seconds: float, host_s: float) -> Measured:
        """Right when no number is further from the monolithic kernel's than rounding in bf16 can take it.

        2^-5 of the largest: an output is rounded once (2^-9), its partial results and the probabilities beside them are
        too, and a gradient sums some of these errors.
        """
        limit = 2**-5 if found[0].dtype == torch.bfloat16 else 2**-13
        errors = [
            float((x.float() - y.float()).abs().max() / y.float().abs().max()) for x, y in zip(found, self.wanted)
        ]
        right = len(found) == len(self.wanted) and max(errors) < limit
        extras = {"of_ideal": self.ideal_s / seconds, "host_us": 1e6 * host_s, "error": max(errors)}
        return Measured(right, seconds, extras)


def trial(problem: Problem, backward: bool, seed: int, machine: Machine | None) -> Trial:
    forget()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    side = Side(problem, backward, device, seed)
    names = [n for n in SCHEDULES if not problem.possible(n) and n not in ("double_ring", "ulysses_token")]
    where = home(None, device)
    assert where.executor is not None
    ideal_s = max(float(t) for t in where.executor.gather(torch.tensor(side.ideal_s)))  # alike on all ranks
    for _ in range(GATE_CALLS):
        side.ours("auto")
        if all(gate.chosen for gate in where.gates.values()):
            break
    rates = None if machine is None else Rates.of(machine, problem.heads.dtype)
    phases = (False, True) if backward else (False,)

    def predicted(name: str) -> float | None:
        if rates is None:
            return None
        return sum(predict(problem.schedule(name, backward=phase), rates) for phase in phases)

    def arm(name: str, call: Callable[[], Measured], **more: Any) -> Arm:
        if ideal_s >= LONG_S and name in (BETWEEN, *SCHEDULES) and name not in FEW:
            return Arm.missing(name, f"left out: a call takes {ideal_s:.1f} s and more")
        return Arm(name, call, **more)

    arms = [arm(name, partial(side.ours, name), predicted_s=predicted(name)) for name in names]
    arms.append(arm("auto", partial(side.ours, "auto")))
    arms.append(arm(PEER, partial(side.between, PEERS[PEER])))
    arms.append(arm(BETWEEN, partial(side.between, Peer(("ring_kv", "ring_kv")))))
    if cuda:
        arms.append(Arm(TORCH, side.torch_context_parallel))
    else:
        arms.append(
            Arm.missing(TORCH, "its ring has no CPU form (torch 2.13: no sharding strategy for the CPU kernel)")
        )
    return Trial(arms, reference=lambda: True)


def cases(context: Context) -> Sequence[Case]:
    world, cuda = context.world_size, torch.cuda.is_available()
    if world < 2:
        raise UserError(
            "this benchmark needs several ranks", remedy="torchrun --nproc-per-node 2 -m undertow bench ring_gpus"
        )
    lengths = LENGTHS if cuda else (512,)
    lengths = lengths[:1] if context.quick else lengths
    found = []
    for length in lengths:
        for q_heads, kv_heads in HEADS if cuda else ((4, 2),):
            for backward in (False, True):
                dim, dtype = (128, "bfloat16") if cuda else (32, "float32")
                heads = Heads(1, q_heads, kv_heads, dim, dim, dtype)
                problem = Problem(world, length, length, heads, Mask(causal=True))
                phase = "forward + backward" if backward else "forward"
                found.append(
                    Case(
                        f"{length:,} tokens, {q_heads}:{kv_heads} heads, {phase}",
                        partial(trial, problem, backward, context.seed, context.machine),
                        plain=PLAIN,
                        ours="auto",
                        group=f"{q_heads}:{kv_heads} heads, {phase}",
                        x=length,
                        warm_ups=1 if length < 131_072 else 0,  # the check of the answer is one
                    )
                )
    return found


BENCHMARK = Benchmark(
    name="ring_gpus",
    claim="between GPUs the chosen schedule is never slower than the KV ring, and near the ideal",
    cases=cases,
    rounds=11,
    packages=("torch",),
    x_label="tokens",
    choices=tuple(SCHEDULES),
)

if __name__ == "__main__":
    from undertow.benchmarks.cli import main

    sys.exit(main(["ring_gpus", *sys.argv[1:]]))
