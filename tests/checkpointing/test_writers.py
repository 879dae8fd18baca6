"""Ways to update a model that are not one plain `optimizer.step()`: each is fenced, and the save is of its moment.

The disk is held and the arena has room for two chunks, so that most of the state has not left when the writer comes.
"""

from __future__ import annotations

import copy
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

sys.path.insert(0, str(Path(__file__).parent))

from ckpt_job import CHUNK_BYTES, HeldOps

from undertow.checkpointing import Checkpointer
from undertow.checkpointing.fences import steps_by_groups

WIDTH = 320  # a weight of 400 KiB is copied late


class Scaled(nn.Module):
    """Keeps the largest magnitude it has seen, as fp8 training keeps amax histories: a buffer written in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("amax", torch.zeros(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.amax.copy_(torch.roll(self.amax, 1))
        self.amax[0] = x.detach().abs().max()
        return self.inner(x)


class Program:
    """A model, whatever updates it, and the objects to checkpoint."""

    def __init__(self, kind: str, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(*[Scaled() for _ in range(3)])
        self.kind, self.data = kind, torch.Generator().manual_seed(seed)
        self.objects: dict[str, Any] = {"model": self.model}
        if kind == "in backward":
            self.optimizers = {p: torch.optim.AdamW([p], lr=0.01) for p in self.model.parameters()}
            for index, (parameter, optimizer) in enumerate(self.optimizers.items()):
                parameter.register_post_accumulate_grad_hook(self._step_one)
                self.objects[f"optimizer{index}"] = optimizer
            return
        groups = [{"params": layer.parameters()} for layer in self.model]
        self.optimizer = torch.optim.AdamW(groups if "groups" in kind else self.model.parameters(), lr=0.01)
        self.objects["optimizer"] = self.optimizer
        if kind == "ema":
            self.ema = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
            self.objects["ema"] = self.ema
        if "compiled" in kind:
            self.compiled = torch.compile(self.optimizer.step, backend="eager")

    def _step_one(self, parameter: torch.Tensor) -> None:
        self.optimizers[parameter].step()
        self.optimizers[parameter].zero_grad()

    def advance(self) -> None:
        self.model(torch.randn(4, WIDTH, generator=self.data)).square().mean().backward()
        if self.kind == "in backward":
            return
        self.compiled() if "compiled" in self.kind else self.optimizer.step()
        self.optimizer.zero_grad()
        if self.kind == "ema":
            self.ema.update_parameters(self.model)

    def state(self) -> dict[str, Any]:
        return {name: copy.deepcopy(thing.state_dict()) for name, thing in self.objects.items()}


def same(one: Any, two: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(value, two[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(same, one, two))
    return one == two


KINDS = ["plain", "groups", "in backward", "ema", pytest.param("compiled groups", marks=pytest.mark.slow)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_save_is_of_its_moment_and_training_goes_on_alike(tmp_path, kind):
    one, ops = Program(kind, seed=1), HeldOps()
    one.advance()
    with Checkpointer(
        tmp_path, ops=ops, arena_bytes=2 * CHUNK_BYTES, chunk_bytes=CHUNK_BYTES, data=_Position(one.data), **one.objects
    ) as ckpt:
        for number in (1, 2, 3):  # a compiled step is traced by the first
            ops.let_go.clear()
            before = one.state()
            ckpt.save(number)
            threading.Timer(0.3, ops.let_go.set).start()
            one.advance()  # its first write waits at the fence until the disk is let go
        assert [report.ok for report in ckpt.wait()] == [True] * 3, ckpt.reports
    assert not same(one.state(), before)
    other = Program(kind, seed=2)
    with Checkpointer(tmp_path, chunk_bytes=CHUNK_BYTES, data=_Position(other.data), **other.objects) as ckpt:
        assert ckpt.restore() == 3
    assert same(other.state(), before)
    other.advance()
    assert same(other.state(), one.state())


def test_a_step_waits_only_for_what_its_optimizer_writes(tmp_path):
    """The disk is held, and the arena has room for the layer that steps first, not for all three."""
    one, ops = Program("in backward", seed=1), HeldOps()
    one.advance()
    first, last = one.model[2].inner.weight, one.model[0].inner.weight
    layer = 3 * first.nbytes + 3 * 2**16  # with two moments, and room for the eager part
    for torn in (False, True):
        ops.let_go.clear()
        options = {"ops": ops, "arena_bytes": layer, "chunk_bytes": CHUNK_BYTES, "timeout_s": 240.0}
        with Checkpointer(tmp_path / str(torn), **options, **one.objects) as ckpt:
            before = one.state()
            ckpt.save(1)
            for parameter in (first, last):
                parameter.grad = torch.ones_like(parameter)
            one.optimizers[first].step()  # would wait for the disk if it waited for all
            assert ckpt._fences.current._through < ckpt._live.plan.image.chunks
            if torn:  # a write that no hook sees, into a part that has not left
                last.data.add_(1)
            ops.let_go.set()
            one.optimizers[last].step()
            assert [report.ok for report in ckpt.wait()] == [not torn], ckpt.reports
            if not torn:
                ckpt.restore()
                assert same(one.state(), before)


def _grouped(kind: type[torch.optim.Optimizer]) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(3)
    model = nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3)])
    optimizer = kind([{"params": [p], "lr": 0.01} for p in model.parameters()], lr=0.01)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("torn", [False, True])
def test_a_step_waits_for_one_group_after_the_other(tmp_path, torn):
    """The disk is held, and the arena has room for the first group, not for all three."""
    (model, optimizer), ops = _grouped(torch.optim.AdamW), HeldOps()
    first, *_, last = model.parameters()
    options = {"ops": ops, "arena_bytes": 3 * first.nbytes + 3 * 2**16, "chunk_bytes": CHUNK_BYTES, "timeout_s": 240.0}
    with Checkpointer(tmp_path, model=model, optimizer=optimizer, **options) as ckpt:
        before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        kept = first.detach().clone()
        ckpt.save(1)
        step = threading.Thread(target=optimizer.step)
        step.start()
        while step.is_alive() and torch.equal(first, kept):  # it ends at the latest with the test's own time
            step.join(0.01)
        assert ckpt._fences.current is not None
        assert ckpt._fences.current._through < ckpt._live.plan.image.chunks
        assert torch.equal(last, before[0]["2.weight"])
        if torn:  # a write that no hook sees, into a group that has not left
            last.data.add_(1)
        ops.let_go.set()
        step.join()
        assert "_init_group" not in vars(optimizer)
        assert [report.ok for report in ckpt.wait()] == [not torn], ckpt.reports
        if not torn:
            ckpt.restore()
            assert same(model.state_dict(), before[0])
            assert same(optimizer.state_dict(), before[1])


GROUP_BY_GROUP = [
    kind
    for kind in vars(torch.optim).values()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and hasattr(kind, "_init_group")
]


@pytest.mark.parametrize("kind", GROUP_BY_GROUP, ids=lambda kind: kind.__name__)
def test_torchs_optimizers_leave_a_group_alone_until_they_begin_it(kind):
    """What the fence of a group stands on; a torch in which it is no longer so fails here."""
    model, optimizer = _grouped(kind)
    assert steps_by_groups(optimizer)

    def state(group: dict[str, Any]) -> list[Any]:
        return [(p.detach(), optimizer.state[p]) for p in group["params"]]

    before = [copy.deepcopy(state(group)) for group in optimizer.param_groups]
    plain, begun = optimizer._init_group, []

    def init_group(group: dict[str, Any], *rest: Any) -> Any:
        index = len(begun)
        assert group is optimizer.param_groups[index]
        assert all(same(state(g), b) for g, b in zip(optimizer.param_groups[index:], before[index:]))
        begun.append(index)
        return plain(group, *rest)

    vars(optimizer)["_init_group"] = init_group
    optimizer.step()
    assert begun == [0, 1, 2]
    assert not any(same(state(g), b) for g, b in zip(optimizer.param_groups, before))


def test_what_is_not_known_to_step_by_groups_is_waited_for_as_a_whole():
    class Own(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:  # writes all groups first
            torch._foreach_mul_([p.detach() for group in self.param_groups for p in group["params"]], 0.9)
            return super().step(closure)

    assert not steps_by_groups(_grouped(Own)[1])
    assert not steps_by_groups(torch.optim.LBFGS(nn.Linear(2, 2).parameters()))


class _Position:
    """The place in a stream of data, as a state."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.generator.set_state(state["generator"])


class Loader:
    def __init__(self, position: int) -> None:
        self.position = position

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def _run(rank: int, world: int, root: str, restore: bool) -> int:
    loader = Loader(-1 if restore else 100 + rank)
    with Checkpointer(root, model=nn.Linear(4, 4), per_rank={"loader": loader}, timeout_s=240) as ckpt:
        if restore:
            assert ckpt.restore() == 1
        else:
            ckpt.save(1)
    return loader.position


@pytest.mark.parametrize(("world", "found"), [(1, [100]), (3, [100, 101, -1])])
def test_per_rank_state_at_another_number_of_ranks(ranks, tmp_path, world, found):
    assert ranks(2, _run, str(tmp_path), False) == [100, 101]
    assert ranks(world, _run, str(tmp_path), True) == found
