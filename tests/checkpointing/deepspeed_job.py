"""The job of test_deepspeed.py: a small MLP under real DeepSpeed, on whatever ranks call `train`."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist


class Counting(torch.nn.Module):
    """Counts its calls in a buffer: state that forward writes, so it must not be copied late."""

    calls: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return torch.relu(x)


def prepare() -> None:
    """Import DeepSpeed before the ranks are forked; without its shared-memory all-reduce, a build of a minute."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    import deepspeed.runtime.zero.muon.original_muon  # noqa: F401  # brings torch's compiler, eight seconds a rank
    import deepspeed.runtime.zero.stage3
    import deepspeed.runtime.zero.stage_1_and_2
    import torch._dynamo  # noqa: F401

    import undertow.checkpointing.deepspeed_engine  # noqa: F401

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def hash_of(state: dict) -> str:
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode() + state[name].detach().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def train(
    rank: int,
    world: int,
    folder: Path,
    stage: int,
    steps: int,
    *,
    save_at: int = -1,
    load: bool = False,
    stock: bool = False,
    universal: bool = False,
    lazy: bool = True,
    killed: int = -1,
) -> dict:
    """`steps` steps in all, saving after `save_at`; rank `killed` dies in the middle of that save's commit."""
    import deepspeed

    deepspeed.init_distributed("gloo")
    torch.manual_seed(7)
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), Counting(), torch.nn.LayerNorm(64), torch.nn.Linear(64, 1))
    config: dict = {
        "train_micro_batch_size_per_gpu": 8 // world,
        "train_batch_size": 8,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    if universal:
        config["checkpoint"] = {"load_universal": True}
    if not stock:
        config["undertow"] = {"checkpoint": {"timeout_s": 240, "lazy": lazy}}
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    result: dict = {"losses": [], "loaded": None}
    if load:
        path, client = engine.load_checkpoint(str(folder))
        result |= {"loaded": Path(path).parent.name, "position": client.get("position"), "calls": calls(engine)}
    data = torch.randn(64, 8, 33, generator=torch.Generator().manual_seed(3))
    rows = slice(rank * 8 // world, (rank + 1) * 8 // world)
    while engine.global_steps < steps:
        batch = data[engine.global_steps][rows]
        loss = (engine(batch[:, :32]) - batch[:, 32:]).square().mean()
        engine.backward(loss)
        engine.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        result["losses"].append(mean.item() / world)
        if engine.global_steps == save_at:
            if killed == rank:
                engine.checkpoint_engine._ops.rename = lambda *names: os.kill(os.getpid(), signal.SIGKILL)
            engine.save_checkpoint(str(folder), client_state={"position": engine.global_steps})
            result["hash_at_save"] = hash_of(whole(engine, stage))
    result["hash"] = hash_of(whole(engine, stage))
    if killed >= 0:
        time.sleep(3600)  # until the killed one's death ends this rank too
    checkpoints = engine.checkpoint_engine
    engine.destroy()
    result["reports"] = getattr(checkpoints, "reports", [])
    return result


def calls(engine) -> float:
    return engine.module[1].calls.max().item()


def whole(engine, stage: int) -> dict:
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), enabled=stage == 3):
        return {name: value.detach().clone() for name, value in engine.module.named_parameters()}
