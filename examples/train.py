"""The one training loop: a recipe, real text, any launcher, checkpoints that cost nothing, resume bit for bit.

`undertow train` in one process and `torchrun --nproc-per-node N -m undertow train` on N are the same program. What a
run leaves behind stands in its folder: config.json, metrics.jsonl, loss.png, checkpoints/, trace/.
"""

from __future__ import annotations

import json
import lzma
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import typer
from torch.distributed.tensor import DTensor

from ..checkpointing import Checkpointer, Preemption
from ..dist import launch, memory
from ..dist.command_line import application, run_application
from ..dist.errors import UserError
from ..dist.launch import Launch
from ..dist.log import get_logger
from ..dist.progress import Progress
from ..dist.trace import Trace, trace_path
from ..dist.units import parse_bytes
from . import corpus as text
from .lm import ByteLM
from .metrics import Metrics, plot_losses
from .precision import PRECISIONS, Precision
from .recipes import TrainConfig, describe, recipe
from .run_folder import prepare_folder
from .systems import PLAIN, Parallel, Systems

log = get_logger(__name__)


@dataclass(frozen=True)
class Result:
    """What a finished run can be compared by."""

    losses: list[float]
    weights_hash: str
    state_hash: str
    bits_per_byte: float


class Run:
    """One process's part of a run."""

    def __init__(
        self,
        config: TrainConfig,
        out: Path,
        data: Path | None,
        here: Launch,
        device: torch.device,
        systems: Systems = PLAIN,
    ) -> None:
        self.config, self.out, self.here, self.device = config, out, here, device
        self.corpus = text.load(data)
        torch.manual_seed(config.seed)
        self.precision = Precision.of(config.precision, device)
        model = self.precision.prepare(ByteLM(config.model).to(device))
        self.parallel = Parallel(systems, model, here, device)
        self.model = self.parallel.model
        self.rows = self.parallel.rows(config.batch, config.accumulate)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=config.lr,
            betas=(0.9, 0.95),
            weight_decay=config.weight_decay,
            foreach=None if systems.tensor_parallel == 1 else False,  # which cannot mix DTensors and tensors
        )

    def loss(self, window: torch.Tensor) -> torch.Tensor:
        window = window.to(self.device, non_blocking=True)
        with self.precision.autocast():
            return self.parallel.loss(window)

    def step(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One update; the loss over all ranks and the gradient's norm before clipping, both on the device."""
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate(step)
        window = self.corpus.batch(
            seed=config.seed, step=step, rows=self.rows, batch=config.batch, length=config.length
        )
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for rows in window.chunk(config.accumulate):  # equally many tokens in each: the mean of means is the mean
            loss = self.loss(rows) / config.accumulate
            self.precision.scaled(loss).backward()
            total += loss.detach()
        self.parallel.reduce()  # once, whatever the number of backward passes
        self.precision.unscale(self.optimizer)
        norm = self.parallel.clip(config.clip)
        total = self.parallel.mean(total)
        self.precision.step(self.optimizer)
        return total, norm

    @torch.no_grad()
    def bits_per_byte(self) -> float:
        """On the held-out text, each rank its share of the rows."""
        batches = self.corpus.evaluation(batch=8, length=self.config.length, limit_bytes=self.config.eval_bytes)
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        for window in batches[self.parallel.place :: self.parallel.data]:
            count = window[:, 1:].numel()
            total += torch.tensor([self.loss(window).double() * count, count], device=self.device)
        if self.here.world_size > 1:
            dist.all_reduce(total)
        return (total[0] / total[1]).item() / math.log(2)


def train(run: Run, *, resume: bool, checkpoints: bool, trace: Trace) -> Result | None:
    """Run to the last step. With `resume`, continue from the newest checkpoint that verifies on all ranks.

    None when SIGTERM or SIGUSR1 ended the run early: it is saved, and the file `preempted` says at which step, for
    batch scripts, which cannot rely on exit codes (torchrun and srun replace them).
    """
    config, rank0 = run.config, run.here.rank == 0
    preempted = run.out / "preempted"
    ckpt = Checkpointer(
        run.out / "checkpoints",
        model=run.model,
        optimizer=run.optimizer,
        **run.precision.state(),
        every=config.checkpoint_every if checkpoints else 0,
        keep=config.keep,
        trace=trace,
        preemption=Preemption() if checkpoints else None,
    )
    with ckpt:
        if rank0:
            preempted.unlink(missing_ok=True)
        start = ckpt.restore() if resume else None
        if resume and start is None:
            log.info("no checkpoint in %s yet: starting from step 0", run.out)
        start = start or 0
        if start > config.steps:  # going on would set newer checkpoints aside
            raise UserError(
                f"{run.out} has been trained to step {start} already, and --steps is {config.steps}",
                expected=f"at least {start} steps",
            )
        _note_memory(run, trace)
        metrics = Metrics(run.out, enabled=rank0, start=start)
        tokens = config.batch * config.length
        pending: list[tuple[int, torch.Tensor, torch.Tensor]] = []
        began_s = time.monotonic()
        with Progress(config.steps, "train", enabled=rank0, initial=start) as bar:
            for step in range(start, config.steps):
                if checkpoints:
                    ckpt.step(step)
                if ckpt.preempted:
                    if rank0:
                        preempted.write_text(f"{step}\n")
                    return None
                with trace.span("step", lane="train", step=step):
                    pending.append((step, *run.step(step)))
                if step == start and rank0:
                    log.info("%s", run.parallel.explain())
                if (step + 1) % config.log_every and step + 1 < config.steps:
                    bar.update()
                    continue
                _note_memory(run, trace)
                losses = [(number, loss.item(), norm.item()) for number, loss, norm in pending]  # waits for the device
                seconds = time.monotonic() - began_s
                rate = tokens * len(pending) / seconds
                for number, value, norm in losses:
                    metrics.write(
                        step=number, loss=value, grad_norm=norm, lr=config.learning_rate(number), tokens_per_s=rate
                    )
                if not math.isfinite(losses[-1][1]):
                    raise UserError(f"the loss is {losses[-1][1]} at step {step}", remedy="lower the learning rate")
                bar.update(loss=losses[-1][1], tokens_per_s=rate, checkpoint=ckpt.status() if checkpoints else None)
                pending, began_s = [], time.monotonic()
                if config.eval_every and (step + 1) % config.eval_every == 0:
                    metrics.write(step=step, bits_per_byte=run.bits_per_byte())
                    began_s = time.monotonic()
        if checkpoints:
            ckpt.save(config.steps)
            for report in ckpt.wait():
                trace.instant("report", step=report.step, ok=report.ok, stall_ms=1e3 * (report.call_s + report.fence_s))
        bits = run.bits_per_byte()
        metrics.write(step=config.steps - 1, bits_per_byte=bits)
        state = {leaf.key: leaf.value for leaf in ckpt.state.leaves() if isinstance(leaf.value, torch.Tensor)}
    result = Result(metrics.losses() if rank0 else [], hash_of(run.model.state_dict()), hash_of(state), bits)
    if rank0:
        (run.out / "result.json").write_text(json.dumps({**asdict(result), "losses": len(result.losses)}, indent=2))
    return result


def _note_memory(run: Run, trace: Trace) -> None:
    """Now and at most so far; `undertow plan --compare` reads the growth from the first note."""
    now = memory.read(run.device, pss=False)
    on_device = {}
    if run.device.type == "cuda":
        on_device = {"device": float(now.device_allocated), "device_peak": float(now.device_peak_allocated)}
    trace.counter("memory", rss=float(now.rss), peak_rss=float(now.peak_rss), **on_device)


def hash_of(tensors: dict[str, torch.Tensor]) -> str:
    """xxh3-128 over names and bytes, in name order: equal hashes mean bit-identical tensors, whatever their layout.
    Collective where there are DTensors."""
    import xxhash

    digest = xxhash.xxh3_128()
    for name in sorted(tensors):
        digest.update(name.encode())
        value = tensors[name].detach()
        value = value.full_tensor() if isinstance(value, DTensor) else value
        digest.update(value.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def main(argv: list[str]) -> int:
    app = application()
    app.command()(command)
    return run_application(app, argv, "undertow train")


def command(
    recipe_name: Annotated[str, typer.Option("--recipe", help=f"One of {describe()}.")] = "demo",
    out: Annotated[Path | None, typer.Option(help="The run's folder (default runs/RECIPE).")] = None,
    data: Annotated[Path | None, typer.Option(help="A text file or folder (default: the standard library).")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest valid checkpoint.")] = False,
    steps: Annotated[int | None, typer.Option(help="Number of updates.")] = None,
    batch: Annotated[int | None, typer.Option(help="Rows per update, over all ranks.")] = None,
    accumulate: Annotated[
        int | None, typer.Option(help="Backward passes of an update, of batch / N rows each.")
    ] = None,
    precision: Annotated[str | None, typer.Option(help=f"One of {', '.join(PRECISIONS)}.")] = None,
    length: Annotated[int | None, typer.Option(help="Bytes per row.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights and data order.")] = None,
    checkpoint_every: Annotated[int | None, typer.Option(help="Steps between checkpoints; 0 for none.")] = None,
    keep: Annotated[int | None, typer.Option(help="Newest checkpoints to keep.")] = None,
    eval_every: Annotated[int | None, typer.Option(help="Steps between evaluations.")] = None,
    log_every: Annotated[int | None, typer.Option(help="Steps between readings of the loss.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU if there is one.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads per rank.")] = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Streamed backpropagation: long rows in little memory.")
    ] = False,
    stream_budget: Annotated[str | None, typer.Option(help="Memory for its activations, e.g. 64MiB.")] = None,
    stream_chunk: Annotated[int | None, typer.Option(help="Rows of a chunk (default: planned).")] = None,
    context_parallel: Annotated[int, typer.Option(help="Ranks that share each row's tokens (TokenRing).")] = 1,
    tensor_parallel: Annotated[int, typer.Option(help="Ranks that share each matrix product.")] = 1,
    overlap: Annotated[str, typer.Option(help="Of products and messages: auto, on or off.")] = "auto",
) -> int:
    """Train the byte-level language model on real text; alone, under torchrun, srun or mpirun."""
    config = recipe(
        recipe_name,
        steps=steps,
        batch=batch,
        accumulate=accumulate,
        precision=precision,
        length=length,
        lr=lr,
        seed=seed,
        checkpoint_every=checkpoint_every,
        keep=keep,
        eval_every=eval_every,
        log_every=log_every,
    )
    systems = Systems(
        stream=stream,
        stream_budget_bytes=parse_bytes(stream_budget, name="--stream-budget") if stream_budget else None,
        stream_chunk=stream_chunk,
        context_parallel=context_parallel,
        tensor_parallel=tensor_parallel,
        overlap=overlap,
    )
    here = launch.detect()
    where = _device(device, here)
    if threads is not None:
        if threads < 1:
            raise UserError(f"--threads {threads}", expected="at least 1")
        torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    out = out or Path("runs") / recipe_name
    launch.init_process_group(here, device=where)
    try:
        run = Run(config, out, data, here, where, systems)
        problem = [""]
        if here.rank == 0:
            try:
                how = {"ranks": here.world_size, "systems": asdict(systems), "device": where.type}
                prepare_folder(out, config, run.corpus.manifest, data, how, resume=resume)
            except UserError as error:
                problem = [str(error)]
        dist.broadcast_object_list(problem, src=0)
        if problem[0]:
            raise UserError(problem[0])
        _introduce(run)
        with Trace(trace_path(out / "trace", here.rank), here.rank) as trace:
            try:
                result = train(run, resume=resume, checkpoints=config.checkpoint_every > 0, trace=trace)
            except KeyboardInterrupt:
                if here.rank == 0 and config.checkpoint_every:
                    log.info("stopped; the same command with --resume goes on from the newest checkpoint")
                raise
        if result is not None:
            _conclude(run, result)
        run.parallel.close()
    finally:
        dist.destroy_process_group()
    return 0


def _device(name: str, here: Launch) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise UserError(f"--device {name}", expected="cpu, cuda or auto")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no CUDA device", remedy="pass --device cpu")
    return torch.device("cuda", here.local_rank % torch.cuda.device_count()) if name == "cuda" else torch.device("cpu")


def _introduce(run: Run) -> None:
    if run.here.rank == 0:
        parameters = sum(p.numel() for p in run.model.parameters())
        corpus = run.corpus
        log.info(
            "%d parameters on %d × %s; %d files of %s, %.1f MB to train on, %.1f MB held out, text %s",
            parameters,
            run.here.world_size,
            run.device.type,
            corpus.files,
            corpus.source,
            len(corpus.train) / 1e6,
            len(corpus.held_out) / 1e6,
            corpus.manifest,
        )


def _conclude(run: Run, result: Result) -> None:
    if run.here.rank == 0:
        sample = run.corpus.held_out[: run.config.eval_bytes].tobytes()
        squeezed = 8 * len(lzma.compress(sample, preset=9)) / len(sample)
        log.info("held out: %.3f bits per byte (xz -9 alone: %.3f)", result.bits_per_byte, squeezed)
        log.info("weights %s, state %s", result.weights_hash, result.state_hash)
        if curve := plot_losses(run.out):
            log.info("loss curve: %s", curve)
