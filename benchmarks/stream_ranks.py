"""Streamed backpropagation on the GPUs of one host: FSDP2, and FSDP2 with the sequence spread over the ranks.

Llama-3.2-1B with random weights in bfloat16, gradients only. The rival is transformers' gradient checkpointing with our
chunked loss, without and with its offload. First, every arm's gradients at a small length are held against float32 ones
of the same weights. Then each arm's sequence is doubled until its measured peak passes a budget that is far below the
device's memory: a length that does not fit is seen in the count of bytes and not by an error, which would leave the
other rank in a collective. `run_tokens` is the longest that ran within the budget, `open` 1 where time, not memory,
ended the doubling. `fits_budget_tokens` and `fits_80GB_tokens` follow from the slope of the last two peaks for rivals,
and are the planner's promise for ours, which fills any budget; nobody ran them. At last all arms take turns at one
length, whatever memory they need.

    torchrun --nproc-per-node 2 -m undertow bench stream_ranks --minutes 4

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
from undertow.benchmarks.stream_job import FREE, PLAIN, WITHIN, Job, Step, decoder
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
SEARCH = 0.35  # of the benchmark's time
PATIENCE_S = 90.0  # for a rank that does not come to an agreement


@dataclass(frozen=True)
class Setting:
    """One size of the benchmark. Lengths are a rank's own; they are times the ranks where one sequence is spread."""

    shape: Mapping[str, Any]
    check_layers: int
    check_tokens: int
    shortest: int
    timed: int
    limit_bytes: int
    search_s: float


@dataclass
class Found:
    """What the doubling found: (tokens, peak bytes of the hungriest rank) of each length that ran."""

    limit_bytes: int
    points: list[tuple[int, int]] = field(default_factory=list)
    out_of_time: bool = False

    @property
    def slope(self) -> float:
        """Bytes per token, by the last two lengths."""
        (t0, b0), (t1, b1) = self.points[-2:]
        return (b1 - b0) / (t1 - t0)

    def fits(self, limit: float) -> float:
        """Tokens at which the straight line through the last two peaks reaches `limit` bytes."""
        tokens, nbytes = self.points[-1]
        return tokens + (limit - nbytes) / self.slope

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
    """Double the sequence until its peak passes the budget, or until the next one would not be done by `until_s`."""
    found = Found(setting.limit_bytes)
    tokens = setting.shortest * (dist.get_world_size() if job.spread else 1)
    most = 0.8 * torch.cuda.get_device_properties(job.device).total_memory if job.device.type == "cuda" else math.inf
    with job.armed(name) as step:
        while True:
            peak, seconds = measure(job, step, job.tokens(tokens, seed), ranks)
            found.points.append((tokens, peak))
            enough = len(found.points) > 1
            if peak > setting.limit_bytes and enough:
                break
            late = ranks.peers.largest(float(time.monotonic() + 4.2 * seconds > until_s)) > 0
            if (late and enough) or 2 * peak > most:
                found.out_of_time = late
                break
            tokens *= 2
    job.clear()
    return found


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


def check(setting: Setting, device: torch.device, spread: bool, seed: int, ranks: Ranks) -> dict[str, tuple[int, str]]:
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

    told: dict[str, tuple[int, str]] = {}
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


def trial(setting: Setting, spread: bool, seed: int) -> Trial:
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    ranks = Ranks()
    checks = check(setting, device, spread, seed, ranks)
    _forget()
    job = Job(decoder(dict(setting.shape), device), device, spread=spread, limit_bytes=setting.limit_bytes)
    _forget()
    until_s = time.monotonic() + setting.search_s
    longest: dict[str, dict[str, float]] = {}
    failed = {name: why for name, (_, why) in checks.items() if why}
    for name in job.names():
        if job.unavailable(name) or name in failed or checks[name][0] or name == FREE:
            continue
        found, why = ranks.together(partial(search, job, name, setting, ranks, until_s, seed))
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
    limit_s = context.limit_s or 480.0
    search_s = SEARCH * limit_s / 2
    setting = Setting(TINY, 2, 48, 128, 64, 2_500_000, min(search_s, 15.0))
    if torch.cuda.is_available():
        setting = Setting(LLAMA, 2, 2048, 16_384, 32_768, 16_000_000_000, search_s)
    found = []
    for spread, name in ((False, "FSDP2"), (True, "FSDP2 and context parallel")):
        mine = setting
        if spread and torch.cuda.is_available():
            mine = Setting(**{**vars(setting), "timed": setting.timed // 2})  # a step is four times the work otherwise
        found.append(
            Case(
                f"{name}, {mine.timed * (context.world_size if spread else 1):,} tokens, {mine.limit_bytes / 1e9:g} GB",
                partial(trial, mine, spread, context.seed),
                plain=PLAIN,
                ours=WITHIN,
                group=name,
                warm_ups=1,
            )
        )
    return found


BENCHMARK = Benchmark(
    name="stream_ranks",
    claim="streaming under FSDP2 trains sequences several times as long in the same memory, in no more time",
    cases=cases,
    rounds=8,
    packages=("torch", "transformers"),
    x_label="",
)

if __name__ == "__main__":
    from undertow.benchmarks.cli import main

    sys.exit(main(["stream_ranks", *sys.argv[1:]]))
