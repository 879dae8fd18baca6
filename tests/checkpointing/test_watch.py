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

from undertow.checkpointing import whereabouts


def new_data(job: Job) -> None:
    for parameter in job.model.parameters():
        parameter.data = torch.randn_like(parameter)


def other_strides(job: Job) -> None:
    for parameter in job.model.parameters():
        if parameter.dim() == 2 and parameter.shape[0] == parameter.shape[1]:
            parameter.data = parameter.data.t()


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
    other_strides,
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
def test_another_shape_at_the_same_address(before, looked_at):
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


@pytest.fixture(params=["from memory", "one by one"])
def looked_at(request, monkeypatch):
    """Both ways of asking where tensors lie."""
    assert whereabouts.offsets() is not None  # found in every supported torch
    if request.param == "one by one":
        monkeypatch.setattr(whereabouts, "offsets", lambda: None)


@pytest.mark.parametrize("switch", ["", "1", "0", "off"])
def test_both_ways_of_asking_give_the_same_saves(tmp_path, monkeypatch, switch):
    """Byte for byte, through replaced and transposed weights; `explain` says which way it was, and why."""

    def saves(root: Path) -> tuple[list[bytes], str]:
        job = Job(layers=1)
        job.advance(0)
        with job.checkpointer(root, keep=None, rng=False) as ckpt:
            for step in range(6):
                if step > 2:
                    (new_data, other_strides, new_state_tensor)[step - 3](job)
                ckpt.save(step)
                job.advance(step + 1)
            assert all(report.ok for report in ckpt.wait()), ckpt.reports
            files = [(ckpt.folder.final(step) / "__0_0.distcp").read_bytes() for step in range(6)]
            return files, ckpt.explain()

    monkeypatch.delenv(whereabouts.SWITCH, raising=False)
    expected, _ = saves(tmp_path / "plain")
    assert len(set(expected)) == 6
    monkeypatch.setenv(whereabouts.SWITCH, switch)
    found, said = saves(tmp_path / "switched")
    assert found == expected
    asked = f"each asked where it lies: UNDERTOW_CHECKPOINT_OFFSETS={switch}" in said
    assert (asked, "looked up at offsets" in said) == ((True, False) if switch in ("0", "off") else (False, True)), said


def test_explain_says_why_tensors_are_asked(tmp_path, monkeypatch):
    job = Job(layers=1)
    with job.checkpointer(tmp_path) as ckpt:
        monkeypatch.setattr(whereabouts, "_found", lambda: None)
        assert f"torch {torch.__version__} keeps these numbers elsewhere" in ckpt.explain()
        assert whereabouts.offsets() is None


def swapped(holder: nn.Module) -> None:
    torch.utils.swap_tensors(holder.square, torch.ones(4, 4))


def moved(holder: nn.Module) -> None:
    holder.square.set_(torch.ones(4, 4))


def grown(holder: nn.Module) -> None:
    holder.deep.untyped_storage().resize_(2**20)


def other_rows(holder: nn.Module) -> None:
    holder.deep.data = torch.ones(1, 2, 1, 2, 1, 3, 1)


def transposed(holder: nn.Module) -> None:
    holder.square.data = holder.square.data.t()


def shifted(holder: nn.Module) -> None:
    holder.square.data = holder.row[1:17].view(4, 4)


@pytest.mark.parametrize("change", [swapped, moved, grown, other_rows, transposed, shifted], ids=lambda f: f.__name__)
def test_a_tensor_that_lies_elsewhere(change, looked_at):
    from undertow.checkpointing.state import AppState
    from undertow.checkpointing.watch import Watch

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.row = nn.Buffer(torch.arange(40.0))
            self.square = nn.Buffer(self.row[:16].view(4, 4))
            self.deep = nn.Buffer(torch.zeros(2, 1, 2, 1, 3, 1))  # of more dims than a tensor keeps in itself

    holder = Holder()
    state = AppState({"holder": holder}, {}, rank=0, rng=False)
    watch = Watch(state, state.leaves())
    holder.row.add_(1)
    assert watch.unchanged() and watch.unchanged()
    change(holder)
    assert not watch.unchanged()
    assert Watch(state, state.leaves()).unchanged()


def test_what_memory_does_not_tell_is_not_believed(monkeypatch):
    tensors = [torch.zeros(3), torch.zeros(())]
    found = whereabouts.Whereabouts.of(tensors, [], [])
    assert found is not None and found.unchanged()
    at = whereabouts.offsets()
    assert at is not None
    tensors[0].add_(1)
    assert whereabouts.Versions.of(tensors) is not None
    for field in {*at._fields} - {"counter"}:  # whose neighbour may be no address
        monkeypatch.setattr(whereabouts, "offsets", lambda field=field: at._replace(**{field: getattr(at, field) + 1}))
        kinds = whereabouts.Whereabouts.of(tensors, [], []), whereabouts.Versions.of(tensors)
        assert None in kinds, field
    assert whereabouts.Whereabouts.of([], [], []) is None and whereabouts.Versions.of([]) is None


def test_versions_are_torchs_own():
    tensors = [torch.zeros(4, 4), torch.zeros(()), torch.ones(3), torch.nn.Parameter(torch.ones(2)).detach()]
    for _ in range(3):
        tensors[1].add_(1)
    found = whereabouts.Versions.of(tensors)
    assert found is not None and found.now() == [0, 3, 0, 0]
    tensors[0][2, 2] = 5.0
    tensors[3].mul_(2)
    assert found.now() == [1, 3, 0, 1] == [tensor._version for tensor in tensors]
    tensors[2].data = torch.ones(7)
    tensors[2].add_(1)
    torch.utils.swap_tensors(tensors[1], torch.zeros(()))
    assert found.now() == [tensor._version for tensor in tensors]
    with torch.inference_mode():
        none = torch.zeros(2)
    assert whereabouts.Versions.of([none]) is None  # it has no counter


def test_another_part_of_a_wrapper():
    """A DTensor keeps its part of the whole in a slot."""

    class Wrapper:
        __slots__ = ("_local_tensor", "_spec")

    parts, wrappers = [torch.zeros(3), torch.zeros(2, 2)], [Wrapper(), Wrapper()]
    for wrapper, part in zip(wrappers, parts):
        wrapper._local_tensor = part
    found = whereabouts.Whereabouts.of(parts, wrappers, parts)
    assert found is not None and found.unchanged()
    wrappers[1]._local_tensor = parts[1].clone()
    assert not found.unchanged()
    assert whereabouts.Whereabouts.of(parts, wrappers, parts) is None  # it is no longer the part that was given
