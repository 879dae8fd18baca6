"""Everything with a state_dict: schedulers, scalers, loaders, users' own; and what is refused, with nothing changed."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter, OrderedDict, deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as L
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parent))

from ckpt_job import Job, same

from undertow.checkpointing import Checkpointer, async_save
from undertow.checkpointing.files import FileOps
from undertow.dist.errors import UserError


class Thing:
    """An object with any state."""

    def __init__(self, state: Any = None) -> None:
        self.value = state

    def state_dict(self) -> Any:
        return self.value

    def load_state_dict(self, state: Any) -> None:
        self.value = state


SCHEDULERS = {
    "step": lambda o: L.StepLR(o, 2),
    "milestones": lambda o: L.MultiStepLR(o, [2, 2, 5]),
    "lambda": lambda o: L.LambdaLR(o, lambda step: 0.9**step),
    "cosine": lambda o: L.CosineAnnealingLR(o, 10),
    "restarts": lambda o: L.CosineAnnealingWarmRestarts(o, 3),
    "one cycle": lambda o: L.OneCycleLR(o, max_lr=0.1, total_steps=20),
    "cyclic": lambda o: L.CyclicLR(o, 0.01, 0.1, cycle_momentum=False),
    "sequence": lambda o: L.SequentialLR(o, [L.LinearLR(o), L.ExponentialLR(o, 0.9)], milestones=[3]),
    "chain": lambda o: L.ChainedScheduler([L.LinearLR(o), L.ExponentialLR(o, 0.9)]),
}


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_schedulers_go_on_where_they_were(tmp_path, kind):
    def run(job: Job, scheduler: Any, steps: range) -> list[float]:
        rates = []
        for step in steps:
            job.advance(step)
            scheduler.step()
            rates.append(job.optimizer.param_groups[0]["lr"])
        return rates

    job = Job()
    scheduler = SCHEDULERS[kind](job.optimizer)
    run(job, scheduler, range(4))
    with Checkpointer(tmp_path, model=job.model, optimizer=job.optimizer, scheduler=scheduler) as ckpt:
        ckpt.save(4)
        assert ckpt.wait()[-1].ok
    expected = run(job, scheduler, range(4, 9))
    other = Job(seed=9)
    again = SCHEDULERS[kind](other.optimizer)
    with Checkpointer(tmp_path, model=other.model, optimizer=other.optimizer, scheduler=again) as ckpt:
        ckpt.restore()
    assert run(other, again, range(4, 9)) == expected
    assert same(other.state(), job.state())


def test_reduce_on_plateau(tmp_path):
    job = Job()
    scheduler = L.ReduceLROnPlateau(job.optimizer, patience=1)
    for value in (3.0, 2.0, 2.0, 2.0):
        scheduler.step(value)
    with Checkpointer(tmp_path, model=job.model, optimizer=job.optimizer, scheduler=scheduler) as ckpt:
        ckpt.save(0)
        before = scheduler.state_dict()
        scheduler.step(9.0)
        ckpt.restore()
        assert scheduler.state_dict() == before


def test_grad_scaler(tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1)
    job = Job()
    scaler.scale(job.forward_backward(0).requires_grad_())
    with Checkpointer(tmp_path, model=job.model, scaler=scaler) as ckpt:
        before = scaler.state_dict()
        ckpt.save(0)
        scaler.update(64.0)
        assert scaler.state_dict() != before
        ckpt.restore()
        assert scaler.state_dict() == before


STATES = {
    "numbers and text": {"epoch": 3, "loss": 0.1, "name": "a", "none": None, "flag": True, "tuple": (1, (2, "x"))},
    "containers": OrderedDict(a=[1, 2], b={3: {4: "deep"}}, c=Counter("aab")),
    "tensors in a tree": {"ema": {"w": torch.arange(100000.0), "b": [torch.ones(3), 5]}, "count": 7},
    "a plain number": 17,
    "an empty dict": {},
    "a list": [1, [2, torch.ones(2)]],
    "bytes": {"raw": b"\x00\xff"},
    "names with dots": {"a.b": {"c": torch.ones(2)}, "a": {"b.d": torch.zeros(2)}},
}


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("where", ["shared", "per rank"])
def test_plain_states_come_back(tmp_path, name, where):
    thing, other = Thing(STATES[name]), Thing()
    given = {"thing": thing} if where == "shared" else {"per_rank": {"thing": thing}, "job": Thing({})}
    with Checkpointer(tmp_path, **given) as ckpt:
        ckpt.save(0)
        assert ckpt.wait()[-1].ok, ckpt.reports
    given = {"thing": other} if where == "shared" else {"per_rank": {"thing": other}, "job": Thing({})}
    with Checkpointer(tmp_path, **given) as ckpt:
        ckpt.restore()
    assert repr(other.value) == repr(thing.value)


def test_states_may_change_right_after_save(tmp_path):
    inner = [1, 2]
    thing = Thing({"list": inner, "tensor": torch.zeros(200_000)})
    with Checkpointer(tmp_path, thing=thing) as ckpt:
        ckpt.save(0)
        inner.append(3)
        thing.value["tensor"].fill_(1)
        thing.value["new"] = 1
        ckpt.wait()
        ckpt.restore()
    assert thing.value["list"] == [1, 2]
    assert not thing.value["tensor"].any()
    assert set(thing.value) == {"list", "tensor"}


class Loader:
    """A seekable loader, as stateful data loaders are: a shuffled order and a position."""

    def __init__(self, seed: int) -> None:
        self.loader = DataLoader(TensorDataset(torch.arange(100)), batch_size=5)
        self.order, self.position = torch.randperm(20, generator=torch.Generator().manual_seed(seed)), 0

    def next(self) -> int:
        self.position += 1
        return int(self.order[self.position - 1])

    def state_dict(self) -> dict:
        return {"order": self.order, "position": self.position, "seen": deque_to_list(deque([1, 2]))}

    def load_state_dict(self, state: dict) -> None:
        self.order, self.position = state["order"], state["position"]


def deque_to_list(items: deque) -> list:
    return list(items)


def test_a_loader_goes_on_where_it_was(tmp_path):
    loader = Loader(0)
    for _ in range(7):
        loader.next()
    with Checkpointer(tmp_path, job=Thing({}), per_rank={"loader": loader}) as ckpt:
        ckpt.save(0)
        ckpt.wait()
    expected = [loader.next() for _ in range(10)]
    other = Loader(1)
    with Checkpointer(tmp_path, job=Thing({}), per_rank={"loader": other}) as ckpt:
        ckpt.restore()
    assert [other.next() for _ in range(10)] == expected


class Unknown:
    """A class that no restricted unpickler knows."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Unknown) and other.value == self.value

    __hash__ = None  # type: ignore[assignment]


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
@pytest.mark.parametrize("workers", [0, 2])
def test_torchdatas_stateful_loader_goes_on_where_it_was(tmp_path, workers):
    loaders = pytest.importorskip("torchdata.stateful_dataloader")

    def make() -> Any:
        generator = torch.Generator().manual_seed(1)
        return loaders.StatefulDataLoader(
            list(range(40)), batch_size=4, shuffle=True, generator=generator, num_workers=workers
        )

    model, first, second, rest = nn.Linear(2, 2), make(), make(), []
    with Checkpointer(tmp_path, model=model, per_rank={"loader": first}) as ckpt:
        for index, batch in enumerate(first):
            if index == 3:  # its own batch is out, the next one is not
                ckpt.save(index)
            if index > 3:
                rest.append(batch.tolist())
        assert ckpt.wait()[-1].ok, ckpt.reports
    with Checkpointer(tmp_path, model=model, per_rank={"loader": second}) as ckpt:
        ckpt.restore()
        assert [batch.tolist() for batch in second] == rest and len(rest) == 6


def test_unknown_classes_are_refused_before_anything_changes(tmp_path):
    job = Job()
    job.advance(0)
    thing = Thing({"x": Unknown(3)})
    with job.checkpointer(tmp_path, thing=thing) as ckpt:
        ckpt.save(1)
        assert ckpt.wait()[-1].ok
    other, target = Job(seed=9), Thing("untouched")
    other.advance(5)
    before, drawn = other.state(), torch.get_rng_state()
    with other.checkpointer(tmp_path, thing=target) as ckpt:
        with pytest.raises(UserError, match="'thing'.*cannot be read safely.*Unknown.*allow_types"):
            ckpt.restore()
        assert same(other.state(), before)
        assert torch.equal(torch.get_rng_state(), drawn)
        assert target.value == "untouched"
        assert ckpt.folder.committed() == [1]  # nothing wrong with it: not set aside
    with other.checkpointer(tmp_path, thing=target, allow_types=[Unknown]) as ckpt:
        assert ckpt.restore() == 1
    assert target.value == {"x": Unknown(3)}
    assert same(other.state(), job.state())


class RunsCode:
    """Pickles to a call of os.system."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple:
        return os.system, (self.command,)


def test_a_hostile_pickle_does_not_run(tmp_path):
    flag = tmp_path / "pwned"
    thing = Thing({"x": RunsCode(f"touch {flag}")})
    with Checkpointer(tmp_path / "c", thing=thing) as ckpt:
        ckpt.save(0)
        assert ckpt.wait()[-1].ok
    with Checkpointer(tmp_path / "c", thing=Thing()) as ckpt:
        with pytest.raises(UserError, match="cannot be read safely"):
            ckpt.restore()
    assert not flag.exists()


def test_objects_without_a_tensor_do_not_come_before_their_folder(tmp_path):
    """Shard and objects are made durable at the same time."""

    class Slow(FileOps):
        def mkdir(self, path):
            time.sleep(0.05)
            super().mkdir(path)

    thing, other = Thing({"n": 3}), Thing()
    with Checkpointer(tmp_path, thing=thing, ops=Slow()) as ckpt:
        ckpt.save(0)
        assert ckpt.wait()[-1].ok, ckpt.reports
    with Checkpointer(tmp_path, thing=other) as ckpt:
        assert ckpt.restore() == 0 and other.value == {"n": 3}


def test_what_a_restore_would_refuse_is_said_at_the_first_save(tmp_path, caplog):
    job, thing = Job(), Thing({"queue": deque([1])})
    for allowed, said in (((), 1), ((deque,), 0)):
        with job.checkpointer(tmp_path / str(said), thing=thing, allow_types=allowed) as ckpt:
            for step in range(2):
                ckpt.save(step)
                assert ckpt.wait()[-1].ok
        assert caplog.text.count("the object 'thing' is saved, but restore() will refuse it") == said
        assert caplog.text.count("collections.deque") == said
        caplog.clear()


def test_an_object_that_cannot_be_pickled_costs_one_save(tmp_path):
    job = Job()
    thing = Thing({"f": lambda: 1})
    with job.checkpointer(tmp_path, thing=thing) as ckpt:
        ckpt.save(0)
        assert not ckpt.wait()[-1].ok
        assert "'thing' cannot be pickled" in ckpt.reports[-1].reason
        thing.value = {"f": 1}
        ckpt.save(1)
        assert ckpt.wait()[-1].ok
        assert ckpt.folder.committed() == [1]


OTHERS = {
    "wider": lambda: Job(seed=1, width=280),
    "deeper": lambda: Job(seed=1, layers=3),
    "shallower": lambda: Job(seed=1, layers=1),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_another_model_is_refused_with_nothing_changed(tmp_path, kind):
    job = Job()
    job.advance(0)
    with job.checkpointer(tmp_path) as ckpt:
        ckpt.save(1)
        ckpt.wait()
    other = OTHERS[kind]()
    other.advance(3)
    before, drawn = other.state(), torch.get_rng_state()
    files = sorted(os.listdir(tmp_path))
    with other.checkpointer(tmp_path) as ckpt:
        with pytest.raises(UserError, match="another model or optimizer.*'model"):
            ckpt.restore()
        assert same(other.state(), before)
        assert torch.equal(torch.get_rng_state(), drawn)
    assert sorted(os.listdir(tmp_path)) == files


def test_a_missing_or_new_object_is_named(tmp_path):
    job = Job()
    with job.checkpointer(tmp_path, thing=Thing({"a": 1})) as ckpt:
        ckpt.save(0)
        ckpt.wait()
    with job.checkpointer(tmp_path) as ckpt:
        with pytest.raises(UserError, match="'thing' is only in the checkpoint"):
            ckpt.restore()
    with job.checkpointer(tmp_path, thing=Thing(), other=Thing()) as ckpt:
        with pytest.raises(UserError, match="'other' is not in the checkpoint"):
            ckpt.restore()


def test_module_extra_state(tmp_path):
    class Extra(nn.Linear):
        amax: Any = 1.0

        def get_extra_state(self) -> Any:
            return {"amax": self.amax}

        def set_extra_state(self, state: Any) -> None:
            self.amax = state["amax"]

    one, two = Extra(3, 3), Extra(3, 3)
    one.amax = 5.5
    with Checkpointer(tmp_path, model=one) as ckpt:
        ckpt.save(0)
        assert ckpt.wait()[-1].ok
    with Checkpointer(tmp_path, model=two) as ckpt:
        ckpt.restore()
    assert two.amax == 5.5
    assert torch.equal(two.weight, one.weight)


def test_two_values_of_one_name_are_refused(tmp_path):
    with Checkpointer(tmp_path, a=Thing({"b": torch.ones(1)}), **{"a.b": Thing(3)}) as ckpt:
        with pytest.raises(UserError, match="two values of the state have the name 'a.b'"):
            ckpt.save(0)


def test_numpy_arrays_and_scalars_in_states(tmp_path):
    thing, other = Thing({"array": np.arange(5), "scalar": np.float64(0.5)}), Thing()
    with Checkpointer(tmp_path, thing=thing) as ckpt:
        ckpt.save(0)
        assert ckpt.wait()[-1].ok
    with Checkpointer(tmp_path, thing=other) as ckpt:
        try:
            ckpt.restore()
        except UserError as error:
            assert "allow_types" in str(error)
        else:
            assert (other.value["array"] == thing.value["array"]).all()


def test_states_changed_in_place_between_saves(tmp_path):
    """The same list, or a tuple that is equal but for a type inside: each save has its own."""
    inner: list[Any] = [1, [2, torch.ones(2)]]
    thing, states = Thing(inner), []
    job = Job(layers=1)
    job.optimizer.param_groups[0]["note"] = [1]
    with job.checkpointer(tmp_path, keep=None, thing=thing) as ckpt:
        for step in range(3):
            states.append((repr(thing.value), repr(job.optimizer.param_groups[0]["note"])))
            ckpt.save(step)
            inner.append(step)
            inner[1][1].add_(1)
            job.optimizer.param_groups[0]["note"].append(step)
        ckpt.save(3)
        thing.value = (1, 2.0)
        ckpt.save(4)
        thing.value = (True, 2)
        ckpt.save(5)
        assert all(report.ok for report in ckpt.wait()), ckpt.reports
        for step, expected in [(5, "(True, 2)"), (4, "(1, 2.0)")]:
            ckpt.restore(step)
            assert repr(thing.value) == expected
        for step in (2, 1, 0):
            ckpt.restore(step)
            assert (repr(thing.value), repr(job.optimizer.param_groups[0]["note"])) == states[step]


@pytest.mark.parametrize("lazy", [lambda: nn.LazyLinear(4), lambda: nn.LazyBatchNorm1d(affine=False)])
def test_a_lazy_module_without_shapes_is_named_and_works_after_a_call(tmp_path, lazy):
    model = nn.Sequential(lazy())
    with Checkpointer(tmp_path, model=model, every=1) as ckpt:
        with pytest.raises(UserError, match=r"model\.0\.\w+ belongs to a lazy module .* call the model once"):
            ckpt.step(0)
        model(torch.ones(2, 3))
        ckpt.step(1)
        assert ckpt.wait()[-1].ok
        assert ckpt.restore() == 1


ODD = {
    "sparse_coo": lambda: torch.eye(3).to_sparse(),
    "sparse_csr": lambda: torch.eye(3).to_sparse_csr(),
    "on the meta device": lambda: torch.empty(3, device="meta"),
}


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("kind", ODD)
def test_a_tensor_that_is_not_plain_memory_is_named(tmp_path, kind):
    model = nn.Linear(2, 2)
    model.register_buffer("odd", ODD[kind]())
    with Checkpointer(tmp_path / "a", model=model, every=1) as ckpt:
        with pytest.raises(UserError, match=f"'model.odd' is {kind}; expected dense tensors"):
            ckpt.step(0)
        model.odd = torch.ones(3)
        assert ckpt.step(1) and ckpt.wait()[-1].ok
    with pytest.raises(UserError, match=f"'x' is {kind}"):
        async_save({"x": ODD[kind]()}, checkpoint_id=tmp_path / "b")
