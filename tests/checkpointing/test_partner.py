"""Copies in the memory of partners: a machine's loss costs no committed step, and a bad partner only the save."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

sys.path.insert(0, str(Path(__file__).parent))

from ckpt_job import CHUNK_BYTES, same

from undertow.checkpointing import Checkpointer, Partner, plan
from undertow.checkpointing.manifest import checksum
from undertow.checkpointing.partner import Place, pair
from undertow.checkpointing.partner_holder import Holder
from undertow.checkpointing.partner_memory import Held, PartnerMemory
from undertow.checkpointing.partner_wire import Link, Server
from undertow.dist.errors import PeerLost, UserError


def layers(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(96, 301), nn.Linear(301, 96))


def update(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Gradients that do not depend on the layout."""
    for index, parameter in enumerate(model.parameters()):
        full = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1000 * step + index))
        if isinstance(parameter, DTensor):
            full = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.grad = full
    optimizer.step()


def whole_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Every tensor whole; the same on every rank. Collective."""
    found = dict(model.state_dict())
    for index, values in optimizer.state_dict()["state"].items():
        found |= {f"{index}.{key}": value for key, value in values.items()}
    whole = {key: value.full_tensor() if isinstance(value, DTensor) else value for key, value in found.items()}
    return {key: value.detach().clone() for key, value in whole.items()}


class Run:
    """Two layers, FSDP2 or the same on every rank, `per_host` ranks on each machine of a made-up cluster."""

    def __init__(self, root: str, rank: int, world: int, *, sharded: bool, per_host: int = 1, **options: Any) -> None:
        plan.SMALL_BYTES = 4096  # small tensors are lazy too
        self.model = layers(options.pop("seed", 0))
        if sharded:
            fully_shard(self.model, mesh=init_device_mesh("cpu", (world,), mesh_dim_names=("dp",)))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        memory = memory_of(root, rank // per_host)
        memory.mkdir(exist_ok=True)
        partner = options.pop("partner", {})
        self.ckpt = Checkpointer(
            Path(root) / "c",
            model=self.model,
            optimizer=self.optimizer,
            chunk_bytes=CHUNK_BYTES,
            host_every=1,
            partner=Partner(host=f"host-{rank // per_host}", memory=memory, address="127.0.0.1", **partner),
            **{"timeout_s": 200.0, **options},
        )

    def advance(self, step: int) -> None:
        update(self.model, self.optimizer, step)

    def right(self, step: int) -> bool:
        """Whether the state is, bit by bit, what it was at the save of `step`. Collective."""
        return same(whole_state(self.model, self.optimizer), expected(step))


def expected(step: int) -> dict[str, torch.Tensor]:
    """The state at the save of `step`, from one process that saves nothing."""
    model = layers(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for number in range(1, step):
        update(model, optimizer, number)
    return whole_state(model, optimizer)


def saved_again(rank: int, world: int, root: str) -> tuple[int, bool]:
    """To memory and disk, and with another state to the disk alone."""
    run = Run(root, rank, world, sharded=True)
    with run.ckpt as ckpt:
        ckpt.save(5, host=True)
        run.advance(1)
        ckpt.save(5)
        run.advance(2)
        return ckpt.restore(), run.right(2)


def test_partners_keep_no_older_save_of_a_step_than_the_disk(ranks, tmp_path):
    assert ranks(2, saved_again, str(tmp_path)) == [(5, True)] * 2


def saved_in_memory_again(rank: int, world: int, root: str) -> tuple[list[bool], int, bool]:
    """One step as often as there are places for it, and further ones."""
    run = Run(root, rank, world, sharded=True)
    with run.ckpt as ckpt:
        begun = []
        for turn, step in enumerate((5, 5, 5, 5, 6, 7)):
            begun.append(ckpt.save(step, disk=False, host=True))
            run.advance(turn + 1)
            ckpt.wait()
        return begun, ckpt.restore(), run.right(6)


def test_a_step_that_is_saved_again_does_not_take_all_places_of_partners(ranks, tmp_path):
    """Of two places one that holds the newest step is kept, and both would."""
    assert ranks(2, saved_in_memory_again, str(tmp_path)) == [([True] * 6, 7, True)] * 2


def memory_of(root: str, host: int) -> Path:
    return Path(root) / f"memory-{host}"


def train(rank: int, world: int, root: str, kind: dict, steps: int) -> None:
    """Save every step to memory, and end without closing anything, as a killed process does."""
    run = Run(root, rank, world, **kind)
    for step in range(1, steps + 1):
        assert run.ckpt.step(step), run.ckpt.reports
        run.advance(step)
        reports = run.ckpt.wait()
    assert [report.tier for report in reports] == ["partner"] * steps and all(r.ok for r in reports), reports


def restart(rank: int, world: int, root: str, kind: dict, more: int = 0) -> tuple[int | None, bool, list[dict]]:
    """Restore: the step, whether the state is right, whence it came. Then some steps more, and end without closing."""
    run = Run(root, rank, world, seed=7, **kind)
    step = run.ckpt.restore() or 0
    right = run.right(step) if step else False
    for after in range(step + 1, step + 1 + more):
        run.advance(after - 1)
        assert run.ckpt.step(after), run.ckpt.reports
        assert all(report.ok for report in run.ckpt.wait()), run.ckpt.reports
    return step, right, run.ckpt.origins


OWN, HELD, FAR = "memory of this machine", "partner copies on this machine", "memory of other machines"


def test_partners_are_on_the_next_machine():
    def places(*counts: int) -> list[Place]:
        return [Place(f"h{host}", "/dev/shm", "", 0) for host, count in enumerate(counts) for _ in range(count)]

    assert pair(places(2, 2, 2), across_hosts=True) == (2, 3, 4, 5, 0, 1)
    assert pair(places(1, 1), across_hosts=True) == (1, 0)
    assert pair(places(3, 2), across_hosts=True) == (3, 4, 3, 0, 1)  # the third has no like: the first takes it too
    assert pair(places(3), across_hosts=False) == (1, 2, 0)
    assert pair(places(3), across_hosts=True) == pair(places(1), across_hosts=False) == ()
    mixed = [places(1, 1)[rank % 2] for rank in range(4)]  # ranks go round the machines
    assert pair(mixed, across_hosts=True) == (1, 0, 3, 2)
    for counts in ((2, 2, 2), (3, 2), (1, 4, 2)):
        for rank, partner in enumerate(pair(where := places(*counts), across_hosts=True)):
            assert where[rank].host != where[partner].host
    with pytest.raises(UserError, match="timeout_s=0"):
        Partner(timeout_s=0)


@pytest.mark.slow
@pytest.mark.parametrize(("sharded", "world"), [(True, 4), (False, 3)])
def test_the_loss_of_any_machine_costs_nothing(ranks, tmp_path, sharded, world):
    """Two machines, each lost once, with saves in between and other numbers of ranks; no disk has ever been written."""
    root, kind = str(tmp_path), {"sharded": sharded, "per_host": 2}
    ranks(world, train, root, kind, 3)
    if sharded:
        assert {found[:2] for found in ranks(3, restart, root, kind)} == {(3, True)}
    else:  # each machine has its own shards and copies of the other's
        for step, right, origins in ranks(world, restart, root, kind):
            assert (step, right) == (3, True)
            assert all(FAR not in origin for origin in origins)
    shutil.rmtree(memory_of(root, 1))
    for step, right, origins in ranks(world, restart, root, kind, 2):
        assert (step, right) == (3, True)
        assert FAR not in origins[0] and origins[-1].keys() == {FAR}
    shutil.rmtree(memory_of(root, 0))
    for step, right, origins in ranks(world, restart, root, kind):
        assert (step, right) == (5, True)
        assert origins[0].keys() == {FAR} and FAR not in origins[-1]
    assert not list((tmp_path / "c").glob("step-*"))
    if not sharded:
        for host in (0, 1):
            shutil.rmtree(memory_of(root, host))
        assert [found[0] for found in ranks(1, restart, root, kind)] == [0]  # nothing is left, and no partner either


def dies(rank: int, world: int, root: str, victim: int, at: str) -> None:
    """`victim` is killed in the save of step 3, inside `at`; the other one sees that save fail, and writes down why."""
    run, step = Run(root, rank, world, sharded=False), 0
    receive = run.ckpt.host.crew._server._handle

    class Dies(Link):
        def tell(self, head: dict, payload: Any = b"") -> None:
            super().tell(head, payload)
            if step == 3 and at in (head["do"], head.get("name")):
                os.kill(os.getpid(), signal.SIGKILL)

    def handle(peer: int, wire: Any, head: dict) -> None:
        if step == 3 and at == f"got {head['do']}":
            os.kill(os.getpid(), signal.SIGKILL)
        receive(peer, wire, head)

    if rank == victim:
        run.ckpt.host._link.__class__ = Dies
        run.ckpt.host.crew._server._handle = handle
    for step in range(1, 4):
        with suppress(RuntimeError):  # the victim may be dead before this rank has left
            dist.barrier()
        run.ckpt.step(step)
        run.advance(step)
        assert all(report.ok for report in run.ckpt.wait()) or step == 3
    run.ckpt._coordinator.forget("begin")  # no error where rank 0 has died: it would end the committing thread
    Path(root, "survivor").write_text(run.ckpt.reports[-1].reason)
    run.ckpt.close()  # what it keeps in memory is what a restart finds


def processes(world: int, store: Path, fn: Any, *args: Any) -> list[int]:
    """Their exit codes: unlike `ranks`, the others go on when one has died."""
    pids = []
    for rank in range(world):
        pids.append(os.fork())
        if not pids[-1]:
            try:
                dist.init_process_group("gloo", store=dist.FileStore(str(store), world), rank=rank, world_size=world)
                fn(rank, world, *args)
                os._exit(0)
            finally:
                os._exit(1)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_killed_in_the_middle_of_a_copy_costs_that_save(ranks, tmp_path, victim):
    places = {0: ["chunk", "manifest.json", "COMMIT.json"], 1: ["__1_1.distcp", "got chunk"]}
    for number, at in enumerate(places[victim]):
        folder = tmp_path / str(number)
        folder.mkdir()
        codes = processes(2, folder / "store", dies, str(folder), victim, at)
        assert codes[victim] == -signal.SIGKILL and codes[1 - victim] == 0, at
        assert (folder / "survivor").read_text(), at
        if number % 2:  # and the victim's machine with it
            shutil.rmtree(memory_of(str(folder), victim))
        for step, right, _ in ranks(2, restart, str(folder), {"sharded": False}):
            assert right and (step == 2 or (at == "COMMIT.json" and step == 3)), at


def flip(path: Path, at: int = -9) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.slow
def test_a_damaged_copy_is_replaced_and_two_cost_a_step(ranks, tmp_path):
    root, kind = str(tmp_path), {"sharded": True}
    ranks(2, train, root, kind, 3)
    saved = {path.parent: json.loads(path.read_text())["step"] for path in tmp_path.glob("memory-*/*/*/SAVE.json")}
    newest = [path for path, step in saved.items() if step == 3 and "-00001-" in path.name]
    held, own = sorted(newest, key=lambda path: path.parents[1])  # machine 1's own, held on machine 0
    assert "held" in held.name and "own" in own.name
    flip(own / "__1_0.distcp")
    for step, right, origins in ranks(2, restart, root, kind):
        assert (step, right) == (3, True)
        assert origins[1][FAR] > 0  # the partner's, for the damaged chunk
    assert (own / "__1_0.distcp").read_bytes() == (held / "__1_0.distcp").read_bytes()  # mended
    for path in (own, held):
        flip(path / "__1_0.distcp")
    assert {found[:2] for found in ranks(2, restart, root, kind)} == {(2, True)}


def trouble(rank: int, world: int, root: str) -> list[str]:
    """One partner too slow, then a copy that arrives damaged, then memory outgrown; a good save after each."""
    run, said = Run(root, rank, world, sharded=False, partner={"timeout_s": 200.0}), []
    tier, go = run.ckpt.host, threading.Event()
    handle = tier.crew._server._handle

    def save(step: int) -> str:
        dist.barrier()
        assert run.ckpt.step(step)
        run.advance(step)
        return [report for report in run.ckpt.wait() if report.step == step][-1].reason

    assert save(1) == ""
    if rank == 1:
        tier.crew._server._handle = lambda *args: (go.wait(), handle(*args))
    else:
        tier._link.close()
        tier._link._timeout_s = 1.0  # its answer to the end of the copy does not come
    said.append(save(2))
    go.set()
    tier._link.close()
    tier._link._timeout_s = 200.0
    assert save(3) == ""
    if rank == 0:
        tier._link.tell = lambda head, payload=b"": Link.tell(
            tier._link, {**head, "sum": "0"} if head["do"] == "chunk" else head, payload
        )
    said.append(save(4))
    tier._link.__dict__.pop("tell", None)
    assert save(5) == ""
    free, tier.memory.free = tier.memory.free, lambda: 1000
    run.model.append(nn.Linear(96, 301))
    run.optimizer.add_param_group({"params": list(run.model[-1].parameters())})
    run.ckpt.save(6, disk=False, host=True)
    said.append(run.ckpt.wait()[-1].reason)
    tier.memory.free = free
    assert run.ckpt.failures == 3
    dist.barrier()
    assert run.ckpt.save(7, disk=False, host=True)
    assert run.ckpt.wait()[-1].ok
    assert "partner every 1 steps" in (text := run.ckpt.explain()) and f"rank {1 - rank} on host-{1 - rank}" in text
    return said


def test_a_bad_partner_costs_saves_and_not_the_training(ranks, tmp_path):
    for slow, damaged, outgrown in ranks(2, trouble, str(tmp_path)):
        assert "rank 0" in slow and "too slow" in slow
        assert "arrived damaged" in damaged
        assert "generations" in outgrown and "on host-0" in outgrown


def somebody_cleans_up(rank: int, world: int, root: str, what: str) -> tuple[list, bool]:
    """A machine's memory is removed after step 3 (as logind does with RemoveIPC), or the shards in it."""
    run = Run(root, rank, world, sharded=False)
    for step in range(1, 9):
        if step == 4 and rank == 1:
            for path in memory_of(root, 1).glob("*" if what == "all" else f"*/*-{what}-*/__*.distcp"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        dist.barrier()
        run.ckpt.step(step)
        run.advance(step)
        run.ckpt.wait()
    found = run.ckpt.restore()
    return [(r.step, r.reason) for r in run.ckpt.reports if not r.ok], (found, run.right(8)) == (8, True)


@pytest.mark.parametrize("what", ["all", "own", "held"])
def test_memory_that_somebody_has_removed_is_had_anew(ranks, tmp_path, what):
    """It costs the saves that were on their way there, said why, and after them all machines have copies again."""
    for lost, right in ranks(2, somebody_cleans_up, str(tmp_path), what):
        assert [step for step, _ in lost] == [4] and "RemoveIPC" in lost[0][1] and right
    kind = {"sharded": False}
    for host in (0, 1):  # each machine's memory is enough
        kept = memory_of(str(tmp_path), host).rename(tmp_path / "kept")
        assert {found[:2] for found in ranks(2, restart, str(tmp_path), kind)} == {(8, True)}
        shutil.rmtree(memory_of(str(tmp_path), host), ignore_errors=True)
        kept.rename(memory_of(str(tmp_path), host))


def beside_disk(rank: int, world: int, root: str) -> tuple[list, list[str]]:
    """Saves to partners at every step and to disk at every second; roll back, go on, close. What was found when."""
    run, found = Run(root, rank, world, sharded=False, every=2, keep=None), []
    for step in range(1, 6):
        run.ckpt.step(step)
        run.advance(step)
        run.ckpt.wait()
    assert [(report.tier, report.step) for report in run.ckpt.reports if not report.ok] == []
    found.append((run.ckpt.restore(), run.right(5), FAR in run.ckpt.origins[rank]))
    found.append((run.ckpt.restore(2), run.right(2), list(run.ckpt.origins[rank])[0].endswith("step-000000002")))
    found.append((run.ckpt.restore(), run.right(2)))  # what came later is forgotten, in memory and on disk
    run.advance(2)
    assert run.ckpt.step(3) and run.ckpt.wait()[-1].ok
    found.append((run.ckpt.restore(), run.right(3)))
    run.advance(3)
    assert run.ckpt.step(4)
    run.ckpt.close()
    return found, sorted(path.name for path in memory_of(root, rank).glob("*/*"))


def test_partners_beside_the_disk(ranks, tmp_path):
    for found, left in ranks(2, beside_disk, str(tmp_path)):
        assert found == [(5, True, False), (2, True, True), (2, True), (3, True)]
        assert left == []  # the disk has step 4, too
    assert sorted(path.name for path in (tmp_path / "c").glob("step-*")) == ["step-000000002", "step-000000004"]


def test_a_server_takes_and_gives_what_it_should(tmp_path):
    holder = Holder()
    holder.memory = PartnerMemory(tmp_path, tmp_path / "c")
    holder.memory.make()
    entry = "a1-1-held-00003-0"
    holder.rooms[(3, 1, 0)] = Held(holder.memory.root / entry, "__3_0.distcp", 10)
    server = Server("127.0.0.1", lambda: "secret", holder.handle)

    def link(secret: str = "secret", purpose: str = "send") -> Link:
        return Link(3, "127.0.0.1", server.port, secret, purpose=purpose, timeout_s=200.0)

    def send(out: Link, nbytes: int = 10, at: int = 0, total: str = checksum(b"0123456789"), slot: int = 0) -> None:
        out.start()
        out.tell({"do": "begin", "save": "a1/7", "step": 7, "number": 7, "plan": 1, "slot": slot, "nbytes": nbytes})
        out.tell({"do": "chunk", "begin": at, "nbytes": 10, "sum": total}, b"0123456789")
        out.ask({"do": "seal"})

    try:
        with pytest.raises(PeerLost, match="closed the connection"):
            link("guess").start()
        out = link()
        for problem in ({"total": "0"}, {"nbytes": 11}, {"slot": 1}):
            with pytest.raises(PeerLost, match="refuses"):
                send(out, **problem)
            assert holder.memory.entries() == []
        send(out)  # the connection has stayed good
        assert [(e.name, e.rank, e.step, e.files) for e in holder.memory.entries()] == [
            (entry, 3, 7, {"__3_0.distcp": 10})
        ]
        into, back = bytearray(4), link(purpose="read")
        back.start()
        ask = {"do": "read", "entry": entry, "file": "__3_0.distcp", "begin": 3, "nbytes": 4}
        back.read(ask, memoryview(into))
        assert bytes(into) == b"3456"
        for bad in ({"entry": "../c"}, {"file": "../ROOT.part"}, {"file": "__4_0.distcp"}, {"begin": 8}):
            back.start()
            with pytest.raises(PeerLost, match="refuses|has not the 4 bytes"):
                back.read({**ask, **bad}, memoryview(into))
        with pytest.raises(PeerLost, match="lost"):
            send(out, at=5)  # over the end of its room: the connection is cut
        newer = link()
        send(newer)
        with pytest.raises(PeerLost):  # of two senders with one rank's name the older is cut off
            send(out := link())
            newer.ask({"do": "seal"})
    finally:
        server.close()
