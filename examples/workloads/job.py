"""The process group, device and folder of a workload's command: what every rank sets up before a run, or refuses."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ...dist import launch
from ...dist.errors import UserError
from ...dist.launch import Launch


@contextmanager
def job(device: str) -> Iterator[tuple[Launch, torch.device]]:
    """The process group of this job, if it has more than one rank."""
    if device not in ("cpu", "cuda"):
        raise UserError(f"--device {device}", expected="cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no CUDA device", remedy="pass --device cpu")
    here = launch.detect()
    where = launch.local_device(here, device)
    torch.use_deterministic_algorithms(True, warn_only=True)
    if device == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS's sums differ from run to run
    torch.set_num_threads(1)  # the models are small: a second thread costs more than it does, and sums in another order
    if here.world_size > 1:
        launch.init_process_group(here, device=where)
    try:
        yield here, where
    finally:
        if here.world_size > 1:
            dist.destroy_process_group()


def folder_for(out: Path, here: Launch, content: dict[str, Any], resume: bool) -> None:
    """Rank 0 makes the run's folder, or refuses one that holds another run; its verdict is every rank's."""
    problem = [""]
    if here.rank == 0:
        path, now = out / "config.json", json.loads(json.dumps(content))
        try:
            if path.exists() and not resume:
                problem = [f"{out} holds a run already; to mend it: pass another --out, or --resume"]
            elif path.exists() and json.loads(path.read_text()) != now:
                problem = [f"{out} holds a run of another configuration; to mend it: pass another --out"]
            elif not path.exists() and out.exists() and any(out.iterdir()):
                problem = [f"{out} holds other files; to mend it: pass another --out"]
            else:
                out.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(now, indent=2) + "\n")
        except (OSError, ValueError) as error:
            problem = [f"cannot use the folder {out} ({error}); to mend it: pass another --out"]
    if here.world_size > 1:
        dist.broadcast_object_list(problem, src=0)
    if problem[0]:
        raise UserError(problem[0])
