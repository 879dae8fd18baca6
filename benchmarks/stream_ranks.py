"""Streamed backpropagation on the GPUs of one host: FSDP2, and FSDP2 with the sequence spread over the ranks.

Llama-3.2-1B with random weights in bfloat16, gradients only. The rival is transformers' gradient checkpointing with our
chunked loss, without and with its offload. Arms' gradients at a small length are first held against float32 ones of the
same weights. Then four cases, the most telling first, each written when it is done: the longest sequence in a budget
(and the time of a short one), and the time of a longer one; for FSDP2, then for a sequence that all ranks share.

The budget is far below the device's memory, so that a length that does not fit is seen in the count of bytes and not by
an error, which would leave the other rank in a collective. Two short steps give a rival's slope, the next goes to the
length that it promises, and to a corrected one when it was wrong; ours goes to the planner's promise. `run_tokens` is
the longest that ran within the budget, `open` 1 where time, not memory, ended the search. `fits_budget_tokens` and
`fits_80GB_tokens` follow from the slope of the last two peaks for rivals, and are the planner's promise for ours, which
fills any budget; nobody ran the latter. Each step of a search is also printed as it ends.

    torchrun --nproc-per-node 2 -m undertow bench stream_ranks --minutes 3.5      # `--filter longest` for half of it

Without GPUs it runs a tiny model over gloo, to see that it works. Lengths are those of a rank's own sequence, or of the
one that all ranks share.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from undertow.benchmarks.case import Arm, Benchmark, Case, Context, Measured, Trial
from undertow.benchmarks.stream_job import OFFLOAD, PLAIN, TORCH, WITHIN, Job, Step, decoder
from undertow.benchmarks.timing import Peers
from undertow.dist.errors import UserError
from undertow.parallel.stream.track import PeakBytes

LLAMA = dict(
    model_type="llama", hidden_size=2048, intermediate_size=8192, num_attention_heads=32, num_key_value_heads=8,
    num_hidden_layers=16, vocab_size=128256, head_dim=64, rms_norm_eps=1e-5, tie_word_embeddings=True,
)  # fmt: skip
TINY = dict(
    model_type="llama", hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2,
    num_hidden_layers=2, vocab_size=256, head_dim=16, tie_word_embeddings=True,
)  # fmt: skip
FULL_BYTES = 80e9
CLOSE = 1.03  # a longer sequence that is not this many times as long is not tried
STEPS = 5  # of one arm's search
Checks = dict[str, tuple[int, str]]  # by arm: wrong parameters, or why it did not run
PATIENCE_S = 90.0  # for a rank that does not come to an agreement


@dataclass(frozen=True)
class Setting:
    """One case. Lengths are a rank's own; they are times the ranks where one sequence is spread. `search`: the longest
    sequence within `limit_bytes` as well, begun at `timed`."""

    shape: Mapping[str, Any]
    check_layers: int
    check_tokens: int
    timed: int
    limit_bytes: int
    search: bool = False


@dataclass
class Found:
    """What a search found: (tokens, peak bytes of the hungriest rank) of each length that ran. `promised`: the length
    that a planner says will fit, None where only peaks tell."""

    limit_bytes: int
    promised: int | None = None
    points: list[tuple[int, int]] = field(default_factory=list)
    out_of_time: bool = False

    @property
    def slope(self) -> float:
        """Bytes per token, by the two longest sequences."""
        (t0, b0), (t1, b1) = sorted(self.points)[-2:]
        return (b1 - b0) / (t1 - t0)

    def fits(self, limit: float) -> float:
        """Tokens at which the straight line through the last two peaks reaches `limit` bytes."""
        tokens, nbytes = max(self.points)
        return tokens + (limit - nbytes) / self.slope

    def goal(self) -> float | None:
        """The next length to try, None when the longest is known to `CLOSE`."""
        longest = max(tokens for tokens, _ in self.points)
        good = max((tokens for tokens, nbytes in self.points if nbytes <= self.limit_bytes), default=0)
        bad = min((tokens for tokens, nbytes in self.points if nbytes > self.limit_bytes), default=math.inf)
        if self.promised is not None:
            quarter = self.promised / 4  # tells the time of the whole
            goal = quarter if quarter > 2 * longest else self.promised if self.promised < bad else 0.85 * bad
        elif len(self.points) == 1:
            goal = 2.0 * longest if good else longest / 2
        else:
            goal = self.fits(self.limit_bytes) if self.slope > 0 else 2.0 * longest
            goal = min(goal, 8.0 * longest, 0.97 * bad)
        return goal if goal > CLOSE * good else None

    def extras(self) -> dict[str, float]:
        within = [tokens for tokens, nbytes in self.points if nbytes <= self.limit_bytes]
        told = {"run_tokens": float(max(within, default=0)), "open": float(self.out_of_time)}
        if len(self.points) > 1 and self.slope > 0:
            told |= {"fits_budget_tokens": self.fits(self.limit_bytes), "fits_80GB_tokens": self.fits(FULL_BYTES)}
        return told


class Ranks:
    """What the ranks agree on, over gloo, whatever state the devices' collectives are in."""

    def __init__(self) -> None:
        patience = timedelta(seconds=PATIENCE_S)
        self.group = dist.new_group(backend="gloo", timeout=patience)
        self.peers = Peers(dist.new_group(backend="gloo", timeout=patience))

    def together(self, call: Callable[[], Any]) -> tuple[Any, str]:
        """(what `call` returned, "") on every rank, or (None, why) on every rank when it failed on all of them.

        A rank that fails alone leaves the others in a collective: it waits `PATIENCE_S` for them, and ends the job.
        """
        result, why = None, ""
        try:
            result = call()
        except Exception as error:
            why = f"{type(error).__name__}: {error}".split("\n")[0]
        try:
            everywhere: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(everywhere, why, group=self.group)
        except RuntimeError as alone:
            print(
                f"rank {dist.get_rank()} failed ({why}), and the others did not: {alone}", file=sys.stderr, flush=True
            )
            os._exit(1)  # destroying groups would wait for those ranks; torchrun ends them
        failed = [text for text in everywhere if text]
        if failed and len(failed) < len(everywhere):
            raise RuntimeError(f"{failed[0]} (on {len(failed)} of {len(everywhere)} ranks)")
        return (None, failed[0]) if failed else (result, "")


def measure(job: Job, step: Step, ids: Tensor, ranks: Ranks) -> tuple[int, float]:
    """Peak bytes and seconds of one step, of the hungriest and the slowest rank. On CPUs, live bytes of the step."""
    job.clear()
    gc.collect()
    cuda = job.device.type == "cuda"
    watch = PeakBytes()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    ranks.peers.barrier()
    began_s = time.perf_counter()
    with contextlib.nullcontext() if cuda else watch:
        step(ids)
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began_s
    peak = torch.cuda.max_memory_allocated() if cuda else watch.peak
    return int(ranks.peers.largest(float(peak))), ranks.peers.largest(seconds)


def search(job: Job, name: str, setting: Setting, ranks: Ranks, until_s: float, seed: int) -> Found:
    """Steps towards the longest sequence whose peak is within the budget, none that would not end by `until_s`."""
    world = dist.get_world_size() if job.spread else 1
    tokens, grain = setting.timed * world, max(1, setting.timed // 16) * world
    with job.armed(name) as step:
        found = Found(setting.limit_bytes, job.planned(setting.limit_bytes) if name == WITHIN else None)
        for _ in range(STEPS):
            peak, seconds = measure(job, step, job.tokens(tokens, seed), ranks)
            found.points.append((tokens, peak))
            if dist.get_rank() == 0:
                print(f"{name}: {tokens:,} tokens, peak {peak / 1e9:.2f} GB, {seconds:.2f} s", flush=True)
            goal = found.goal()
            if goal is None:
                break
            in_time = _reach(tokens, seconds, until_s, ranks)
            if 0.7 * tokens < in_time < goal:
                # The first step of a length also plans, measures kernels and pins memory; the second tells its time.
                _, seconds = measure(job, step, job.tokens(tokens, seed), ranks)
                in_time = _reach(tokens, seconds, until_s, ranks)
            found.out_of_time = in_time < goal
            length = int(min(goal, in_time)) // grain * grain
            if length <= 0 or any(length == tried for tried, _ in found.points) or (in_time < goal and length < tokens):
                break
            tokens = length
    job.clear()
    return found


def _reach(tokens: int, seconds: float, until_s: float, ranks: Ranks) -> float:
    """The longest sequence whose step would end by `until_s`, if time grows with the square of the length."""
    left_s = -ranks.peers.largest(time.monotonic() - until_s)
    return tokens * math.sqrt(max(left_s, 0.0) / seconds)


def local_errors(job: Job, exact: Mapping[str, Tensor], ranks: Ranks) -> dict[str, float]:
    """Relative error of every parameter's gradient, over all ranks' shards; `exact` holds this rank's."""
    squares = torch.zeros(2, len(exact), dtype=torch.float64)
    for at, (name, parameter) in enumerate(job.model.named_parameters()):
        mine, wanted = parameter.grad.to_local().float(), exact[name]
        squares[0, at] = (mine - wanted).double().square().sum().item()
        squares[1, at] = wanted.double().square().sum().item()
    dist.all_reduce(squares, group=ranks.group)
    relative = (squares[0] / squares[1]).sqrt().tolist()
    job.clear()
    return dict(zip(exact, relative))


def check(setting: Setting, device: torch.device, spread: bool, seed: int, ranks: Ranks) -> Checks:
    """By arm: parameters whose gradient is wrong at a small length, or why the arm did not run.

    float32: more than 1e-5 away from one process's gradients. bfloat16: more than three times as far from float32
    gradients as without checkpointing, chunks or streaming; rounding happens in another order, and errors of single
    parameters scatter.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    model = decoder({**setting.shape, "num_hidden_layers": setting.check_layers}, device)
    whole: Any = copy.deepcopy(model).float()
    for each in range(1 if spread else world):
        generator = torch.Generator().manual_seed(seed + each)
        ids = torch.randint(0, model.config.vocab_size, (1, setting.check_tokens), generator=generator).to(device)
        (whole(input_ids=ids, labels=ids).loss / (1 if spread else world)).backward()
    exact = {name: _part(p.grad, world, rank) for name, p in whole.named_parameters()}
    del whole
    job = Job(model, device, spread=spread, limit_bytes=setting.limit_bytes)
    ids = job.tokens(setting.check_tokens, seed)

    def errors(step: Step) -> dict[str, float]:
        job.clear()
        step(ids)
        return local_errors(job, exact, ranks)

    with job.plain() as step:
        plain = errors(step)
    bfloat16 = next(model.parameters()).dtype == torch.bfloat16
    limits = {name: 3 * error if bfloat16 else 1e-5 for name, error in plain.items()}

    def wrong(name: str) -> int:
        with job.armed(name) as step:
            found = errors(step)
        return sum(not found[n] <= limits[n] for n in limits)

    told: Checks = {}
    for name in job.names():
        if job.unavailable(name):
            continue
        count, why = ranks.together(partial(wrong, name))
        told[name] = (count or 0, why)
    return told


def _part(whole: Tensor, world: int, rank: int) -> Tensor:
    """This rank's rows, as FSDP2 cuts them."""
    parts = whole.chunk(world)
    return (parts[rank] if rank < len(parts) else whole[:0]).clone()


def trial(setting: Setting, spread: bool, seed: int, checked: dict[bool, Checks], until_s: float) -> Trial:
    """The case's arms. `checked` keeps the arms' checks from case to case; a search ends by `until_s`, shared out."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    ranks = Ranks()
    if spread not in checked:
        checked[spread] = check(setting, device, spread, seed, ranks)
    checks = checked[spread]
    _forget()
    job = Job(decoder(dict(setting.shape), device), device, spread=spread, limit_bytes=setting.limit_bytes)
    _forget()
    longest: dict[str, dict[str, float]] = {}
    failed = {name: why for name, (_, why) in checks.items() if why}
    searched = [name for name in (WITHIN, PLAIN, OFFLOAD, TORCH) if name in job.names() and not job.unavailable(name)]
    searched = [name for name in searched if name not in failed and not checks[name][0]] if setting.search else []
    for at, name in enumerate(searched):
        share = 0.6 if name == WITHIN else 1 / (len(searched) - at)  # ours is the longest
        mine_s = time.monotonic() + share * (until_s - time.monotonic())
        found, why = ranks.together(partial(search, job, name, setting, ranks, mine_s, seed))
        if why:
            failed[name] = why
        else:
            longest[name] = found.extras()
            if name == WITHIN:
                limits = {"fits_budget_tokens": setting.limit_bytes, "fits_80GB_tokens": FULL_BYTES}
                longest[name] |= {told: float(job.planned(limit)) for told, limit in limits.items()}
        _forget()
    ids = job.tokens(setting.timed * (dist.get_world_size() if spread else 1), seed)

    def run(name: str) -> Measured:
        with job.armed(name) as step:
            peak, seconds = measure(job, step, ids, ranks) if cuda else _timed(job, step, ids, ranks)
        told = {"us_per_token": 1e6 * seconds / ids.shape[1], **longest.get(name, {})}
        return Measured(0, seconds, told | ({"peak_bytes": peak} if cuda else {}))

    def arm(name: str) -> Arm:
        why = job.unavailable(name) or (f"failed: {failed[name]}" if name in failed else "")
        return Arm.missing(name, why) if why else Arm(name, partial(run, name), reference=lambda: checks[name][0])

    return Trial([arm(name) for name in job.names()], reference=lambda: 0)


def _timed(job: Job, step: Step, ids: Tensor, ranks: Ranks) -> tuple[float, float]:
    """On a CPU, without the watch, which slows every operator."""
    job.clear()
    began_s = time.perf_counter()
    step(ids)
    return 0.0, ranks.peers.largest(time.perf_counter() - began_s)


def _forget() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def cases(context: Context) -> Sequence[Case]:
    if context.world_size < 2:
        raise UserError(
            "this benchmark needs several ranks", remedy="torchrun --nproc-per-node 2 -m undertow bench stream_ranks"
        )
    begin_s, limit_s = time.monotonic(), context.limit_s or 240.0
    checked: dict[bool, Checks] = {}
    found = []
    for spread, search_ends in ((False, 0.4), (True, 0.8)):
        name = "FSDP2 and context parallel" if spread else "FSDP2"
        for mine in settings(spread):
            tokens = f"{mine.timed * (context.world_size if spread else 1):,} tokens"
            budget = f"{mine.limit_bytes / 1e9:g} GB"
            until_s = begin_s + search_ends * limit_s if torch.cuda.is_available() else begin_s + 15
            found.append(
                Case(
                    f"{name}, longest in {budget}, and {tokens}" if mine.search else f"{name}, {tokens}, {budget}",
                    partial(trial, mine, spread, context.seed, checked, until_s),
                    plain=PLAIN,
                    ours=WITHIN,
                    group=name,
                    warm_ups=0,  # the check of the answer is one
                )
            )
    return found


def settings(spread: bool) -> list[Setting]:
    """The longest sequence, then the time of one that rivals cannot hold in the budget (or all can, where spread)."""
    if not torch.cuda.is_available():
        return [Setting(TINY, 2, 48, 128, 2_500_000, True), Setting(TINY, 2, 48, 256, 2_500_000)]
    if spread:
        return [
            Setting(LLAMA, 2, 2048, 8192, 12_000_000_000, True),
            Setting(LLAMA, 2, 2048, 16_384, 12_000_000_000),
        ]
    return [Setting(LLAMA, 2, 2048, 8192, 7_500_000_000, True), Setting(LLAMA, 2, 2048, 24_576, 7_500_000_000)]


BENCHMARK = Benchmark(
    name="stream_ranks",
    claim="streaming under FSDP2 trains sequences several times as long in the same memory, in no more time",
    cases=cases,
    rounds=6,
    packages=("torch", "transformers"),
    x_label="",
)

if __name__ == "__main__":
    from undertow.benchmarks.cli import main

    sys.exit(main(["stream_ranks", *sys.argv[1:]]))
