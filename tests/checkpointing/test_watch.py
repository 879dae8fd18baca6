"""The fast path of a save trusts that nothing was replaced since the last one: every way of replacing must be seen."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

from ckpt_job import Job, same


def new_data(job: Job) -> None:
    for parameter in job.model.parameters():
        parameter.data = torch.randn_like(parameter)


def new_parameter(job: Job) -> None:
    old = job.model[0].weight
    job.model[0].weight = nn.Parameter(torch.randn_like(old))
    job.optimizer.param_groups[0]["params"][0] = job.model[0].weight
    job.optimizer.state[job.model[0].weight] = job.optimizer.state.pop(old)


def new_buffer(job: Job) -> None:
    job.model[1].running_mean = torch.full_like(job.model[1].running_mean, 3.5)


def buffer_through_the_dictionary(job: Job) -> None:
    job.model[1]._buffers["running_var"] = torch.full_like(job.model[1].running_var, 2.5)


def new_state_tensor(job: Job) -> None:
    for values in job.optimizer.state.values():
        values["exp_avg"] = torch.randn_like(values["exp_avg"])


def new_state_dictionary(job: Job) -> None:
    for parameter in list(job.optimizer.state):
        values = job.optimizer.state[parameter]
        job.optimizer.state[parameter] = {key: value + 1 for key, value in values.items()}


def optimizer_loads(job: Job) -> None:
    other = copy.deepcopy(job.optimizer.state_dict())
    for values in other["state"].values():
        values["exp_avg"] += 1
    other["param_groups"][0]["lr"] = 0.25
    job.optimizer.load_state_dict(other)


def new_submodule(job: Job) -> None:
    old = job.model[1]
    job.model[1] = nn.BatchNorm1d(job.width)
    params = job.optimizer.param_groups[0]["params"]
    for before, after in zip(old.parameters(), job.model[1].parameters()):
        params[[p is before for p in params].index(True)] = after
        job.optimizer.state[after] = job.optimizer.state.pop(before)


def state_cleared(job: Job) -> None:
    job.optimizer.state.clear()


def new_rate(job: Job) -> None:
    job.optimizer.param_groups[0]["lr"] = 0.125


def other_groups(job: Job) -> None:
    group = job.optimizer.param_groups[0]
    job.optimizer.param_groups = [{**group, "lr": 0.5}]


def in_place(job: Job) -> None:
    with torch.no_grad():
        for value in job.model.state_dict().values():
            value.add_(1)


CHANGES = [
    new_data,
    new_parameter,
    new_buffer,
    buffer_through_the_dictionary,
    new_state_tensor,
    new_state_dictionary,
    optimizer_loads,
    new_submodule,
    state_cleared,
    new_rate,
    other_groups,
    in_place,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_save_after_a_change_holds_the_change(tmp_path, change):
    job = Job(layers=1)
    job.advance(0)
    with job.checkpointer(tmp_path, keep=None) as ckpt:
        for step in range(3):  # the plan is made, and used again
            ckpt.save(step)
            job.advance(step + 1)
        ckpt.fence()
        before = job.state()
        change(job)
        expected = job.state()
        assert not same(before, expected)
        ckpt.save(7)
        assert ckpt.wait()[-1].ok, ckpt.reports[-1]
    other = Job(seed=9, layers=1)
    with other.checkpointer(tmp_path) as ckpt:
        assert ckpt.restore() == 7
    assert same(other.state(), expected)


def test_a_tensor_that_shrank_in_place(tmp_path):
    """The same object at the same address, but shorter."""

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("memory", torch.arange(100_000.0))

    from undertow.checkpointing import Checkpointer

    holder = Holder()
    with Checkpointer(tmp_path, holder=holder, timeout_s=240) as ckpt:
        ckpt.save(0)
        ckpt.save(1)
        holder.memory.data = holder.memory.data[:50_000]
        ckpt.save(2)
        assert ckpt.wait()[-1].ok
        holder.memory.data = torch.zeros(50_000)
        ckpt.restore()
    assert torch.equal(holder.memory, torch.arange(50_000.0))


SHAPES = [(), (1,), (1, 1), (24,), (4, 6), (6, 4), (24, 1), (2, 3, 4), (4, 3, 2), (2, 12, 1), (0, 5), (0, 6), (5, 0)]


@pytest.mark.parametrize("before", SHAPES)
def test_another_shape_at_the_same_address(before):
    from undertow.checkpointing.state import AppState
    from undertow.checkpointing.watch import Watch

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("memory", torch.arange(24.0))

    holder = Holder()
    whole = holder.memory.clone()

    def give(shape: tuple[int, ...]) -> None:
        holder.memory.data = whole[: torch.Size(shape).numel()].view(shape)

    give(before)
    state = AppState({"holder": holder}, {}, rank=0, rng=False)
    watch = Watch(state, state.leaves())
    for after in SHAPES:
        give(after)
        assert watch.unchanged() == (after == before), after
