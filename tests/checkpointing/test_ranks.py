"""Several ranks: replicated, FSDP2 and tensor-parallel state, another world size, one rank that fails or is late."""

from __future__ import annotations

import errno
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

sys.path.insert(0, str(Path(__file__).parent))

from ckpt_job import CHUNK_BYTES, Job, same

from undertow.checkpointing import Checkpointer, plan
from undertow.checkpointing.coordinate import Coordinator
from undertow.checkpointing.files import FileOps
from undertow.checkpointing.folder import read_manifest
from undertow.checkpointing.spread import own_part
from undertow.dist.errors import UserError


class Net(nn.Module):
    """Sizes that no number of ranks divides."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(37, 301)
        self.down = nn.Linear(301, 37)
        self.norm = nn.BatchNorm1d(37)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.down(torch.relu(self.up(x))))


def build(layout: str, world: int, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """`layout`: plain (the same on every rank), zero1, fsdp, tp, or fsdp+tp (2 x world/2)."""
    torch.manual_seed(seed)
    net: nn.Module = Net()
    if layout == "tp":
        mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
        parallelize_module(net, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    elif layout == "fsdp":
        fully_shard(net, mesh=init_device_mesh("cpu", (world,), mesh_dim_names=("dp",)))
    elif layout == "fsdp+tp":
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("dp", "tp"))
        parallelize_module(net, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fully_shard(net, mesh=mesh["dp"])
    elif layout == "zero1":
        return net, ZeroRedundancyOptimizer(net.parameters(), torch.optim.AdamW, lr=1e-2)
    return net, torch.optim.AdamW(net.parameters(), lr=1e-2)


def update(net: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Gradients that do not depend on the layout, so that states of different layouts can be compared."""
    for index, parameter in enumerate(net.parameters()):
        generator = torch.Generator().manual_seed(1000 * step + index)
        full = torch.randn(parameter.shape, generator=generator)
        if isinstance(parameter, DTensor):
            full = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.grad = full
    optimizer.step()
    with torch.no_grad():
        net.norm.running_mean += 1


def full_state(net: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Every tensor whole, by name. Collective."""
    found = dict(net.state_dict())
    names = {id(p): name for name, p in net.named_parameters()}
    for parameter, values in own_part(optimizer).state.items():
        found |= {f"{names[id(parameter)]}.{key}": value for key, value in values.items()}
    whole = {key: value.full_tensor() if isinstance(value, DTensor) else value for key, value in found.items()}
    if own_part(optimizer) is not optimizer:  # each rank has its share of the parameters
        shares: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(shares, whole)
        whole = {key: value for share in shares for key, value in share.items()}
    return {key: value.detach().clone() for key, value in whole.items()}


def save_job(rank: int, world: int, root: str, layout: str, restore: bool) -> dict[str, Any]:
    """Restore what is there, one update, save. The whole state."""
    plan.SMALL_BYTES = 4096  # small tensors are lazy too
    net, optimizer = build(layout, world, seed=world if restore else 0)
    with Checkpointer(root, model=net, optimizer=optimizer, chunk_bytes=CHUNK_BYTES, timeout_s=240) as ckpt:
        step = ckpt.restore() if restore else 0
        assert step is not None
        update(net, optimizer, step)
        ckpt.save(step + 1)
        update(net, optimizer, 99)  # must not show
        assert all(report.ok for report in ckpt.wait()), ckpt.reports
        ckpt.restore(step + 1)
        return {key: value.numpy() for key, value in full_state(net, optimizer).items()}


def tensors(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {key: torch.from_numpy(np.array(value)) for key, value in state.items()}


CHAINS = {
    "fsdp at other sizes": [("fsdp", 4), ("fsdp", 2), ("fsdp", 3), ("plain", 1)],
    "tp to fsdp to one": [("tp", 2), ("fsdp", 3), ("plain", 1)],
    "two axes": [("fsdp+tp", 4), ("tp", 2), ("plain", 3), ("fsdp", 2)],
    "zero 1": [("zero1", 2), ("zero1", 3), ("plain", 1), ("zero1", 2)],
    "one to many": [("plain", 1), ("fsdp", 3), ("tp", 4)],
}


@pytest.mark.slow
@pytest.mark.parametrize("chain", CHAINS)
def test_every_layout_restores_every_other(ranks, tmp_path, chain):
    """Restore, update and save under one layout after the other; a plain run on one rank is the answer."""
    torch.manual_seed(0)
    net, optimizer = build("plain", 1, seed=0)
    for index, (layout, world) in enumerate(CHAINS[chain]):
        states = ranks(world, save_job, str(tmp_path), layout, index > 0)
        update(net, optimizer, index)
        expected = full_state(net, optimizer)
        for state in states:
            assert same(tensors(state), expected), (layout, world)


def refusals(rank: int, world: int, root: str) -> list[str]:
    """What is said of parts of a state that would be taken for copies of each other."""
    flat = FullyShardedDataParallel(nn.Linear(8, 8), device_id=torch.device("cpu"))
    late = ZeroRedundancyOptimizer(nn.Linear(8, 8).parameters(), torch.optim.SGD, overlap_with_ddp=True, lr=1.0)
    found = []
    for objects in ({"model": flat}, {"model": nn.Linear(8, 8), "optimizer": late}, {"model": nn.Linear(8, 8 + rank)}):
        with pytest.raises(UserError) as caught:
            with Checkpointer(root, timeout_s=240, **objects) as ckpt:
                ckpt.save(1)
        found.append(str(caught.value))
    return found


def test_parts_that_cannot_be_told_apart_are_refused(ranks, tmp_path):
    for said in ranks(2, refusals, str(tmp_path)):
        assert [word in text for word, text in zip(("FSDP 1", "overlap_with_ddp", "(8, 8) on rank 0"), said)] == [
            True
        ] * 3, said


class Stage(nn.Module):
    """Some of a model's layers, under the names they have in the whole."""

    def __init__(self, layers: range, width: int = 300) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(layer): nn.Linear(width, 4) for layer in layers})


def staged(rank: int, world: int, root: str, restore: bool, widths: tuple[int, ...]) -> dict[str, np.ndarray] | str:
    """Layers 0 to 3, shared out in order; what this rank's are in the end, or why the restore was refused."""
    torch.manual_seed(10 * world + rank + restore)
    per_rank = 4 // world
    net = Stage(range(per_rank * rank, per_rank * (rank + 1)), widths[rank])
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    for parameter in net.parameters():
        parameter.grad = torch.randn_like(parameter)
    if not restore:
        optimizer.step()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with Checkpointer(root, model=net, optimizer=optimizer, timeout_s=240) as ckpt:
        if not restore:
            ckpt.save(1)
            assert ckpt.wait()[-1].ok
        else:
            try:
                assert ckpt.restore() == 1
            except UserError as error:
                assert same(net.state_dict(), before) and not optimizer.state
                return str(error)
    names = {id(p): name for name, p in net.named_parameters()}
    moments = {f"{names[id(p)]}.exp_avg": values["exp_avg"] for p, values in optimizer.state.items()}
    return {key: value.detach().numpy() for key, value in {**net.state_dict(), **moments}.items()}


def test_pipeline_stages_come_back_on_any_number_of_ranks(ranks, tmp_path):
    def gather(parts: list[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
        return tensors({key: value for part in parts for key, value in part.items()})

    saved = gather(ranks(2, staged, str(tmp_path), False, (300, 300)))
    assert len(saved) == 16
    for world in (2, 1, 4):
        assert same(gather(ranks(world, staged, str(tmp_path), True, (300,) * world)), saved), world
    for said in ranks(2, staged, str(tmp_path), True, (300, 299)):  # what one refuses, all do
        assert "'model.layers.2.weight' has shape (4, 299) here and (4, 300)" in said


def replicated(rank: int, world: int, root: str) -> tuple[int, dict]:
    job = Job(layers=4)
    job.advance(0)
    with job.checkpointer(Path(root)) as ckpt:
        ckpt.save(1)
        assert ckpt.wait()[-1].ok
        manifest = read_manifest(ckpt.folder.final(1))
    return manifest.files[f"__{rank}_0.distcp"].nbytes, {k: len(v.shards) for k, v in manifest.tensors.items()}


@pytest.mark.parametrize("world", [2, 3])
def test_replicated_state_is_written_once_and_in_equal_parts(ranks, tmp_path, world):
    results = ranks(world, replicated, str(tmp_path))
    sizes = [size for size, _ in results]
    assert set(results[0][1].values()) == {1}
    job = Job(layers=4)
    job.advance(0)
    stored = [value.nbytes for value in job.state().values() if isinstance(value, torch.Tensor)]
    assert sum(sizes) < 1.1 * sum(stored) + 2**17
    assert max(sizes) - min(sizes) <= max(stored) + 2**17  # the best that whole tensors allow


def random_job(rank: int, world: int, root: str) -> list[tuple]:
    torch.manual_seed(rank)
    random.seed(rank)
    np.random.seed(rank)
    job = Job(layers=1)

    class Loader:
        position = 10 * rank

        def state_dict(self) -> dict:
            return {"position": self.position}

        def load_state_dict(self, state: dict) -> None:
            self.position = state["position"]

    def draw() -> tuple:
        return torch.rand(2).tolist(), random.random(), np.random.rand(), loader.position

    loader = Loader()
    torch.manual_seed(100 + rank)
    with job.checkpointer(Path(root), per_rank={"loader": loader}) as ckpt:
        ckpt.save(0)
        first = draw()
        loader.position = -1
        ckpt.wait()
        ckpt.restore()
        return [first, draw()]


def test_each_rank_keeps_its_own_random_numbers_and_position(ranks, tmp_path):
    results = ranks(3, random_job, str(tmp_path))
    assert all(before == after for before, after in results)
    assert len({repr(before) for before, _ in results}) == 3


class FailsOnce(FileOps):
    def __init__(self) -> None:
        super().__init__(direct=False)
        self.fail = False

    def pwrite(self, handle: int, data: Any, offset: int) -> None:
        if self.fail:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().pwrite(handle, data, offset)


def one_rank_fails(rank: int, world: int, root: str, guilty: int) -> list[tuple[bool, str]]:
    job, ops = Job(layers=2), FailsOnce()
    with job.checkpointer(Path(root), ops=ops, timeout_s=240) as ckpt:
        for step in range(4):
            ops.fail = step == 1 and rank == guilty
            ckpt.save(step)
            job.advance(step)
            ckpt.wait()
        assert ckpt.folder.committed() == [0, 2, 3]
        assert ckpt.restore() == 3
        assert [report.heard for report in ckpt.reports] == [False, rank > 0, False, False]  # rank 0 says it
        return [(report.ok, report.reason) for report in ckpt.reports]


@pytest.mark.parametrize("guilty", [0, 1, 2])
def test_a_rank_that_cannot_write_fails_the_save_on_all_and_nothing_else(ranks, tmp_path, guilty):
    for results in ranks(3, one_rank_fails, str(tmp_path), guilty):
        assert [ok for ok, _ in results] == [True, False, True, True]
        assert f"rank {guilty}: " in results[1][1]
        assert "No space left" in results[1][1]


class Slow(FileOps):
    """While `late` is set, files are not made before the file `until` is there."""

    def __init__(self, until: Path) -> None:
        super().__init__(direct=False)
        self.until, self.late = until, False

    def create(self, path: Path, nbytes: int) -> int:
        deadline_s = time.monotonic() + 240
        while self.late and not self.until.exists():
            assert time.monotonic() < deadline_s, "rank 0 never gave up"
            time.sleep(0.01)
        return super().create(path, nbytes)


def one_rank_is_late(rank: int, world: int, root: str) -> list[tuple[bool, str]]:
    job, ops = Job(layers=1), Slow(Path(f"{root}.given-up"))
    with job.checkpointer(Path(root), ops=ops) as ckpt:
        (committer,) = ckpt._tiers.committers
        patient_s = committer._timeout_s
        for step in range(4):
            ops.late = rank == 1 and step == 1
            committer._timeout_s = 1.0 if rank == 0 and step == 1 else patient_s  # others may be slow without a fault
            ckpt.save(step)
            job.advance(step)
            ckpt.wait()
            if rank == 0 and step == 1:
                ops.until.touch()
            dist.barrier()  # the training's own collectives are not disturbed
        return [(report.ok, report.reason) for report in ckpt.reports]


@pytest.mark.slow
def test_a_rank_that_is_late_costs_one_save(ranks, tmp_path):
    first, second = ranks(2, one_rank_is_late, str(tmp_path))
    assert [ok for ok, _ in first] == [ok for ok, _ in second]
    assert [ok for ok, _ in first] == [True, False, True, True]
    assert "rank 1 did not answer" in first[1][1]
    with Job(seed=9, layers=1).checkpointer(tmp_path) as ckpt:
        assert ckpt.restore() == 3


def one_rank_is_late_to_the_plan(rank: int, world: int, root: str, late: int) -> list[tuple[int, bool, str]]:
    """At step 0 `late` comes when the other has given up; at step 2 a tensor is new, and all come."""
    job, given_up, extra = Job(layers=1), Path(f"{root}.given-up"), nn.ParameterList()
    with job.checkpointer(Path(root), extra=extra, host_every=1) as ckpt:
        patient_s = ckpt._live._timeout_s
        for step in range(4):
            if step == 2:
                extra.append(nn.Parameter(torch.ones(3)))
            if step == 0 and rank == late:
                deadline_s = time.monotonic() + 240
                while not given_up.exists():
                    assert time.monotonic() < deadline_s, "nobody gave up"
                    time.sleep(0.01)
            ckpt._live._timeout_s = 1.0 if step == 0 and rank != late else patient_s
            begun = ckpt.save(step)
            if step == 0:
                given_up.touch()
                assert not begun and ckpt.failures == 1
            job.advance(step)
            ckpt.wait()
        return [(report.step, report.ok, report.reason) for report in ckpt.reports]


@pytest.mark.parametrize("late", [0, 1])
def test_a_rank_that_is_late_to_the_plan_costs_one_save_on_all(ranks, tmp_path, late):
    first, second = ranks(2, one_rank_is_late_to_the_plan, str(tmp_path / "root"), late)
    assert first == second
    assert [(step, ok) for step, ok, _ in first] == [(0, False), (1, True), (2, True), (3, True)]
    assert f"rank {late} did not answer" in first[0][2]
    job = Job(seed=9, layers=1)
    with job.checkpointer(tmp_path / "root", extra=nn.ParameterList([nn.Parameter(torch.zeros(3))])) as ckpt:
        assert ckpt.restore() == 3


def one_rank_has_no_memory(rank: int, world: int, root: str, host: bool) -> list[tuple[int, bool, str]]:
    job, made = Job(layers=1), []

    def short(make: Any) -> Any:
        def tried(*what: Any, **named: Any) -> Any:
            made.append(what)
            if rank == 1 and len(made) == 1:
                raise MemoryError("none left")
            return make(*what, **named)

        return tried

    with job.checkpointer(Path(root), host_every=int(host)) as ckpt:
        ckpt._budget.arena = short(ckpt._budget.arena)
        if ckpt.host is not None:
            ckpt.host.close_maps = short(ckpt.host.close_maps)
        for step in range(3):
            ckpt.save(step, disk=not host, host=host)
            job.advance(step)
            ckpt.wait()
        assert ckpt.restore() == 2
        return [(report.step, report.ok, report.reason) for report in ckpt.reports]


@pytest.mark.parametrize("host", [False, True])
def test_a_rank_without_memory_costs_one_save_on_all(ranks, tmp_path, host):
    first, second = ranks(2, one_rank_has_no_memory, str(tmp_path / "root"), host)
    assert first == second
    assert [(step, ok) for step, ok, _ in first] == [(0, False), (1, True), (2, True)]
    assert "rank 1: MemoryError: none left" in first[0][2]


def one_waits_in_vain(rank: int, world: int, root: str) -> list[Any]:
    """Rank 0 says the first word in time; it says the second when rank 1 has decided without it."""
    coordinator, decided = Coordinator.from_default_group(timeout_s=240), Path(root, "decided")
    found = [coordinator.lead("in time", 5, otherwise=7, timeout_s=240)]
    if rank == 0:
        deadline_s = time.monotonic() + 240
        while not decided.exists():
            assert time.monotonic() < deadline_s, "rank 1 never decided"
            time.sleep(0.01)
    found.append(coordinator.lead("late", 5, otherwise=7, timeout_s=0.1))
    decided.touch()
    coordinator.part()
    return found


def test_a_word_of_rank_0_that_is_waited_for_in_vain_is_replaced_on_all(ranks, tmp_path):
    """What an interval of `Frequency` and a generation of host memory are agreed by."""
    assert ranks(2, one_waits_in_vain, str(tmp_path)) == [[5, 7], [5, 7]]


def unpicklable(rank: int, world: int, root: str) -> list[bool]:
    class Thing:
        value: Any = 1

        def state_dict(self) -> Any:
            return {"f": self.value}

        def load_state_dict(self, state: Any) -> None:
            self.value = state["f"]

    job, thing = Job(layers=1), Thing()
    with job.checkpointer(Path(root), per_rank={"thing": thing}) as ckpt:
        for step in range(3):
            thing.value = (lambda: 1) if rank == 1 and step == 1 else step
            ckpt.save(step)
            ckpt.wait()
        ckpt.restore()
        assert thing.value == 2
        return [report.ok for report in ckpt.reports]


def test_an_object_of_one_rank_that_cannot_be_pickled_costs_one_save(ranks, tmp_path):
    assert ranks(2, unpicklable, str(tmp_path)) == [[True, False, True]] * 2


def damaged_for_one(rank: int, world: int, root: str) -> int | None:
    """Rank 1 alone finds a chunk damaged: all must choose the older one."""
    job = Job(layers=3)
    with job.checkpointer(Path(root)) as ckpt:
        for step in (1, 2):
            job.advance(step)
            ckpt.save(step)
        ckpt.wait()
        dist.barrier()
        if rank == 0:
            path = ckpt.folder.final(2) / "__1_0.distcp"
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
        dist.barrier()
        return ckpt.restore()


@pytest.mark.parametrize("world", [2, 4])
def test_all_ranks_agree_on_the_newest_whole_checkpoint(ranks, tmp_path, world):
    assert ranks(world, damaged_for_one, str(tmp_path)) == [1] * world


def refused_everywhere(rank: int, world: int, root: str) -> list[str]:
    from undertow.dist.errors import UserError

    messages = []
    if rank == 0:
        (Path(root) / "thesis.tex").write_text("precious")
    dist.barrier()
    job = Job(layers=1)
    try:
        job.checkpointer(Path(root))
    except UserError as error:
        messages.append(str(error))
    return messages


def test_a_folder_of_somebody_else_is_refused_on_every_rank(ranks, tmp_path):
    for messages in ranks(3, refused_everywhere, str(tmp_path)):
        assert len(messages) == 1
        assert "thesis.tex" in messages[0]
    assert sorted(os.listdir(tmp_path)) == ["thesis.tex"]


def placements(rank: int, world: int, root: str) -> bool:
    """DTensors as plain values of a user's object: sharded on a dim that is not the first, and replicated."""
    mesh = init_device_mesh("cpu", (world,))
    full = torch.arange(7 * 11, dtype=torch.float32).view(7, 11)

    class Holder(nn.Module):
        def __init__(self, value: torch.Tensor, placement: Any) -> None:
            super().__init__()
            self.w = nn.Parameter(distribute_tensor(value, mesh, [placement]))

    written, read = Holder(full, Shard(1)), Holder(torch.zeros(7, 11), Shard(0))
    with Checkpointer(root, model=written) as ckpt:
        ckpt.save(0)
        assert ckpt.wait()[-1].ok
    with Checkpointer(root, model=read) as ckpt:
        ckpt.restore()
    assert torch.equal(read.w.full_tensor(), full)
    again = Holder(torch.zeros(7, 11), Replicate())
    with Checkpointer(root, model=again) as ckpt:
        ckpt.restore()
    return torch.equal(again.w.to_local(), full)


@pytest.mark.parametrize("world", [2, 3])
def test_another_placement_on_the_same_ranks(ranks, tmp_path, world):
    assert ranks(world, placements, str(tmp_path)) == [True] * world


def _one_asks(rank: int, world: int, folder: Path) -> list[str]:
    job = Job(2)
    with job.checkpointer(folder, timeout_s=30.0) as ckpt:
        said = [ckpt.explain()] if rank == 0 else []
        ckpt.save(1)
        job.advance(1)
        assert ckpt.wait()[-1].ok
        said += [ckpt.explain()] if rank == 0 else []
        dist.barrier()
    return said


def test_one_rank_may_ask_what_a_save_does(ranks, tmp_path):
    before, after = ranks(2, _one_asks, tmp_path)[0]
    assert before == "no save has been planned yet: the ranks do that together at the first one"
    assert "SavePlan rank 0/2" in after and "measured: step 1" in after


def grows_often(rank: int, world: int, root: str) -> list[int]:
    """How many words are in the store after each save of a state that has another shape every time."""
    job, more, found = Job(layers=1), nn.ParameterList(), []
    with job.checkpointer(Path(root), more=more) as ckpt:
        for step in range(1, 31):
            more.append(nn.Parameter(torch.ones(3)))
            assert ckpt.save(step) and ckpt.wait()[-1].ok
            if world > 1:
                dist.barrier()  # all have read the verdict
            found.append(ckpt._coordinator.store.num_keys())
        assert ckpt.restore() == 30
    return found


@pytest.mark.parametrize("world", [1, 2])
def test_old_plans_do_not_stay_in_the_store(ranks, tmp_path, world):
    """They are as large as the state's list of tensors; only a few short words of each save may stay."""
    for found in ranks(world, grows_often, str(tmp_path)):
        assert found[29] - found[19] <= 10 * (1 + world), found
