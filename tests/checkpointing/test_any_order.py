"""Saves, restores and troubles in any order: nobody waits in vain, and what is restored is what was saved."""

from __future__ import annotations

import random
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))

from ckpt_job import Job, Moody, same

from undertow.checkpointing import Mirror, host_tier
from undertow.dist.errors import UserError

ACTS = [*["save"] * 6, "again", "one changes", "all change", "one raises", *["wait"] * 2, "newest", "back"]
LATE_S = 120.0


def any_order(rank: int, world: int, root: str, memory: str, seed: int, host: bool) -> tuple[list, list]:
    """What was restored, right or not; the reasons of lost saves."""
    host_tier.SHARED_MEMORY, draw = Path(memory), random.Random(seed)
    job, moody, step = Job(layers=1), Moody(), 0
    saved, restored = dict[tuple[int, int], Any](), list[tuple[str, bool]]()
    options = {"host_every": int(host), "mirror": Mirror(f"{root}.far", every=2), "keep": None, "timeout_s": LATE_S}
    with job.checkpointer(Path(root), moody=moody, **options) as ckpt:
        for turn in range(40):
            act, who, size = draw.choice(ACTS), draw.randrange(world), draw.randrange(3)
            if act in ("newest", "back", "wait"):
                ckpt.wait()
                dist.barrier()
                whole = sorted({report.step for report in ckpt.reports if report.ok and report.tier == "disk"})
                if act == "wait" or not whole:
                    continue
                wanted = None if act == "newest" else draw.choice(whole)
                try:
                    step = ckpt.restore(wanted) or 0
                except UserError:  # it was of a branch that has been left
                    continue
                restored.append((act, wanted in (None, step) and same(job.state(), saved[step, moody.value])))
                dist.barrier()
            elif act in ("one changes", "all change"):
                moody.size = size if act == "all change" or rank == who else moody.size
            else:
                step += act != "again"
                moody.value, moody.raises = turn, act == "one raises" and rank == who
                saved[step, turn] = job.state()
                with suppress(RuntimeError):
                    ckpt.save(step, host=host)
                moody.raises = False
                job.advance(turn)
                dist.barrier()
        reasons = [report.reason for report in ckpt.wait() if not report.ok]
    return restored, reasons


@pytest.mark.parametrize(("seed", "host"), [(0, True), (2, True), (121, True), (4, False), (10, False)])
def test_saves_and_restores_in_any_order(ranks, tmp_path, seed, host):
    """A rank whose state alone has changed, or whose `state_dict` raises, costs that save and none its time-out."""
    memory = tmp_path / "shm"
    memory.mkdir()
    for restored, reasons in ranks(2, any_order, str(tmp_path / "c"), str(memory), seed, host):
        assert all(right for _, right in restored), restored
        for reason in reasons:
            assert "no position now" in reason or "has kept its shape" in reason, reason  # nobody came late
