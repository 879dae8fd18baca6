"""Saves to memory and disk, restores and restarts in any order: what comes back is the newest save, bit by bit.

UNDERTOW_TEST_SEED=7 tries other orders.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))

from ckpt_job import Job, Moody, same

from undertow.checkpointing import Checkpointer, Mirror, Partner, host_tier
from undertow.dist.errors import UserError

KNOWN = "no position now", "has kept its shape", "RemoveIPC"  # why a save may be lost here
SAVES = ["due", "due", "both", "memory", "disk", "again", "one raises"]
ACTS = [*SAVES, *SAVES, "one changes", "all change", "wait", "newest", "back", "restart", "restart", "cleanup"]


class Wild:
    """One rank's job. `saved`: (step, turn) → state; `last`: step → the turn of its last save that has begun."""

    def __init__(self, rank: int, root: Path, tier: str, draw: random.Random) -> None:
        host_tier.SHARED_MEMORY = self.memory = root / ("shm" if tier == "host" else f"memory-{rank}")
        self.memory.mkdir(exist_ok=True)
        self.job, self.moody, self.root, self.draw = Job(layers=1), Moody(), root, draw
        partner = Partner(host=f"host-{rank}", memory=self.memory, address="127.0.0.1") if tier == "partner" else None
        every, keep = draw.choice([0, 1, 3]), draw.choice([None, 2, 3])
        self.options = {"host_every": 1, "every": every, "keep": keep, "partner": partner, "timeout_s": 120.0}
        self.saved, self.last = dict[tuple[int, int], Any](), dict[int, int]()
        self.step, self.lost, self.reasons, self.wrong = 0, set[int](), list[str](), list[str]()
        self.restores = 0
        self.ckpt = self.open()

    def open(self) -> Checkpointer:
        mirror = Mirror(self.root / "far", every=2)
        return self.job.checkpointer(self.root / "c", moody=self.moody, mirror=mirror, **self.options)

    def save(self, act: str, turn: int, raises: bool) -> None:
        self.step += act != "again"
        self.moody.value, self.moody.raises = turn, raises
        self.saved[self.step, turn], begun = self.job.state(), False
        with suppress(RuntimeError):
            ways = {"disk": act != "memory", "host": act != "disk"}
            begun = self.ckpt.step(self.step) if act == "due" else self.ckpt.save(self.step, **ways)
        self.moody.raises = False
        if begun:
            self.last[self.step] = turn
        self.job.advance(turn)

    def read(self) -> None:
        """Take the reports that there are."""
        bad = [report for report in self.ckpt.wait() if not report.ok]
        self.lost |= {report.step for report in bad}
        self.reasons += [report.reason for report in bad]

    def restore(self, step: int | None = None) -> None:
        found, top = self.ckpt.restore(step), max(self.last, default=None)
        if found is None:
            self.wrong += [f"nothing, but {top} was saved"] * bool(self.last.keys() - self.lost)
            return
        self.restores += 1
        if not same(self.job.state(), self.saved.get((found, self.moody.value))):
            self.wrong.append(f"step {found} is not what was saved in turn {self.moody.value}")
        if step is None and found != top and top not in self.lost:
            self.wrong.append(f"step {found}, but {top} was saved")
        if found not in self.lost and self.last.get(found) != self.moody.value:
            self.wrong.append(f"step {found} of turn {self.moody.value}, later saved in {self.last.get(found)}")
        self.step = found
        self.last = {step: turn for step, turn in self.last.items() if step <= found}

    def restart(self) -> None:
        if self.draw.random() < 0.5:
            self.restore()  # and the ranks close one after the other
        self.ckpt.close()
        self.ckpt = self.open()
        self.restore()

    def clean_up(self, mine: bool) -> None:
        """Somebody removes a memory: what was in it alone is lost, and a save on its way to it."""
        dist.barrier()
        for path in self.memory.iterdir() if mine else ():
            shutil.rmtree(path)
        self.lost |= self.last.keys()
        dist.barrier()


def any_order(rank: int, world: int, root: str, seed: int, tier: str) -> tuple[list[str], list[str], int]:
    draw = random.Random(seed)
    wild = Wild(rank, Path(root), tier, draw)
    for turn in range(40):
        act, who, size = draw.choice(ACTS), draw.randrange(world), draw.randrange(3)
        if act in SAVES:
            wild.save(act, turn, act == "one raises" and rank == who)
            dist.barrier()
            continue
        if act in ("one changes", "all change"):
            wild.moody.size = size if act == "all change" or rank == who else wild.moody.size
            continue
        wild.read()
        if act == "newest":
            wild.restore()
        elif act == "restart":
            wild.restart()
        elif act == "cleanup" and size == 0:
            wild.clean_up(rank == (who if tier == "partner" else 0))
        elif act == "back":
            with suppress(UserError):  # it was not saved, or retention has removed it
                wild.restore(max(0, wild.step - size))
        if draw.random() < 0.7:
            dist.barrier()
    wild.read()
    wild.ckpt.close()
    return wild.wrong, wild.reasons, wild.restores


@pytest.mark.parametrize("tier", ["host", "partner"])
@pytest.mark.parametrize("number", range(2))
def test_saves_and_restarts_in_any_order(ranks, tmp_path, tier, number):
    seed = int(os.environ.get("UNDERTOW_TEST_SEED", 0)) + number
    for wrong, reasons, restores in ranks(2, any_order, str(tmp_path), seed, tier):
        assert not wrong and restores >= 3
        assert all(any(known in reason for known in KNOWN) for reason in reasons), reasons
