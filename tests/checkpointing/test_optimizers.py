"""Every kind of optimizer: names as torch gives them, state back bit for bit, also into one that has not stepped."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn, optim
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

sys.path.insert(0, str(Path(__file__).parent))

from ckpt_job import Job, same

from undertow.checkpointing.folder import read_manifest
from undertow.dist.errors import UserError

KINDS = {
    "SGD": lambda p: optim.SGD(p, lr=0.1),
    "SGD momentum": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "Adam": lambda p: optim.Adam(p, lr=0.01),
    "Adam amsgrad": lambda p: optim.Adam(p, lr=0.01, amsgrad=True),
    "Adam tensor lr": lambda p: optim.Adam(p, lr=torch.tensor(0.01)),
    "AdamW fused": lambda p: optim.AdamW(p, lr=0.01, fused=True),
    "AdamW foreach": lambda p: optim.AdamW(p, lr=0.01, foreach=True),
    "AdamW for-loop": lambda p: optim.AdamW(p, lr=0.01, foreach=False, capturable=False),
    "NAdam": lambda p: optim.NAdam(p, lr=0.01),
    "RAdam": lambda p: optim.RAdam(p, lr=0.01),
    "Adamax": lambda p: optim.Adamax(p, lr=0.01),
    "Adagrad": lambda p: optim.Adagrad(p, lr=0.01),
    "Adadelta": lambda p: optim.Adadelta(p, lr=0.01),
    "Adafactor": lambda p: optim.Adafactor(p, lr=0.01),
    "RMSprop": lambda p: optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "Rprop": lambda p: optim.Rprop(p, lr=0.01),
    "ASGD": lambda p: optim.ASGD(p, lr=0.01),
}


@pytest.mark.parametrize("kind", KINDS)
def test_state_comes_back_and_training_goes_on_alike(tmp_path, kind):
    job = Job(optimizer=KINDS[kind])
    for step in range(2):
        job.advance(step)
    with job.checkpointer(tmp_path) as ckpt:
        before = job.state()
        ckpt.save(2)
        assert ckpt.wait()[-1].ok
    for step in range(2, 4):
        job.advance(step)
    for steps_before in (0, 3):
        other = Job(seed=99, optimizer=KINDS[kind])
        for step in range(steps_before):
            other.advance(step + 50)
        with other.checkpointer(tmp_path) as ckpt:
            assert ckpt.restore() == 2
        assert same(other.state(), before)
        for step in range(2, 4):
            other.advance(step)
        assert same(other.state(), job.state())


def test_a_save_before_the_first_step_takes_the_state_away_again(tmp_path):
    job = Job()
    with job.checkpointer(tmp_path) as ckpt:
        before = job.state()
        ckpt.save(0)
        job.advance(0)
        ckpt.restore()
        assert same(job.state(), before)


def closure_steps(job: Job, count: int) -> None:
    data = torch.randn(8, job.width, generator=torch.Generator().manual_seed(3))

    def closure():
        job.optimizer.zero_grad()
        loss = job.model(data).square().mean() + sum(p.square().sum() for p in job.model.parameters())
        loss.backward()
        return loss

    for _ in range(count):
        job.optimizer.step(closure)


def test_lbfgs_with_its_lists_of_tensors(tmp_path):
    make = lambda p: optim.LBFGS(p, lr=0.1, max_iter=3, history_size=4)  # noqa: E731
    job = Job(optimizer=make)
    closure_steps(job, 2)
    with job.checkpointer(tmp_path) as ckpt:
        before = job.state()
        ckpt.save(2)
        assert ckpt.wait()[-1].ok
    closure_steps(job, 2)
    other = Job(seed=99, optimizer=make)
    with other.checkpointer(tmp_path) as ckpt:
        ckpt.restore()
    assert same(other.state(), before)
    closure_steps(other, 2)
    assert same(other.state(), job.state())


@pytest.mark.parametrize("kind", ["SGD momentum", "AdamW fused", "Adagrad"])
def test_names_and_values_are_those_of_torch(tmp_path, kind):
    job = Job(optimizer=KINDS[kind])
    job.advance(0)
    with job.checkpointer(tmp_path) as ckpt:
        ckpt.save(1)
        ckpt.wait()
        path = ckpt.folder.final(1)
    stored = read_manifest(path)
    torchs = get_optimizer_state_dict(job.model, job.optimizer)
    expected = {f"optimizer.state.{name}.{key}" for name, values in torchs["state"].items() for key in values}
    expected |= {f"optimizer.param_groups.{i}.{key}" for i, group in enumerate(torchs["param_groups"]) for key in group}
    ours = {key for key in (*stored.tensors, *stored.objects) if key.startswith("optimizer.")}
    assert ours == expected
    for name, values in torchs["state"].items():
        for key, value in values.items():
            if isinstance(value, torch.Tensor):
                assert stored.tensors[f"optimizer.state.{name}.{key}"].shape == tuple(value.shape)


@pytest.mark.parametrize(("one", "two"), [("AdamW fused", "SGD momentum"), ("SGD", "RMSprop"), ("Adagrad", "Adam")])
def test_another_kind_of_optimizer_is_refused_with_nothing_changed(tmp_path, one, two):
    job = Job(optimizer=KINDS[one])
    job.advance(0)
    with job.checkpointer(tmp_path) as ckpt:
        ckpt.save(1)
        ckpt.wait()
    other = Job(seed=9, optimizer=KINDS[two])
    other.advance(1)
    before = other.state()
    with other.checkpointer(tmp_path) as ckpt, pytest.raises(UserError, match="'optimizer' is a .* in the checkpoint"):
        ckpt.restore()
    assert same(other.state(), before)


def test_a_new_option_of_a_later_torch_is_no_other_kind(tmp_path):
    job = Job()
    with job.checkpointer(tmp_path) as ckpt:
        ckpt.save(1)
        ckpt.wait()
    job.optimizer.param_groups[0]["new_option"] = 7
    with job.checkpointer(tmp_path) as ckpt:
        assert ckpt.restore() == 1
    assert job.optimizer.param_groups[0]["new_option"] == 7


def test_param_groups_added_later(tmp_path):
    job = Job()
    extra = nn.Linear(job.width, job.width)
    job.advance(0)

    def keep(root):
        from undertow.checkpointing import Checkpointer

        return Checkpointer(root, model=job.model, extra=extra, optimizer=job.optimizer, timeout_s=240)

    with keep(tmp_path) as ckpt:
        ckpt.save(0)
        job.optimizer.add_param_group({"params": list(extra.parameters()), "lr": 0.5})
        job.forward_backward(1)
        extra(torch.ones(2, job.width)).sum().backward()
        job.optimizer.step()
        before = {**job.state(), **{k: v.clone() for k, v in extra.state_dict().items()}}
        ckpt.save(1)
        assert [report.ok for report in ckpt.wait()] == [True, True]
        job.advance(2)
        job.optimizer.param_groups[1]["lr"] = 0.0
        ckpt.restore(1)
        assert same({**job.state(), **dict(extra.state_dict())}, before)
        with pytest.raises(UserError, match="another model or optimizer.*param_groups.1.params"):
            ckpt.restore(0)
        assert same({**job.state(), **dict(extra.state_dict())}, before)


def test_tied_weights_stay_tied(tmp_path):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(300, 300)
            self.head = nn.Linear(300, 300, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, index):
            return self.head(self.embedding(index))

    def job(seed: int) -> Job:
        made = Job(seed)
        made.model = Tied()
        made.optimizer = torch.optim.AdamW(made.model.parameters())
        return made

    one, two = job(0), job(1)
    one.model(torch.arange(5)).sum().backward()
    one.optimizer.step()
    with one.checkpointer(tmp_path) as ckpt:
        ckpt.save(1)
        assert ckpt.wait()[-1].ok
    with two.checkpointer(tmp_path) as ckpt:
        ckpt.restore()
    assert same(two.state(), one.state())
    assert two.model.head.weight is two.model.embedding.weight


def test_frozen_and_unused_parameters(tmp_path):
    def make() -> Job:
        job = Job()
        job.model[0].weight.requires_grad_(False)
        job.optimizer = torch.optim.AdamW([p for p in job.model.parameters() if p.requires_grad])
        return job

    job = make()
    job.advance(0)
    with job.checkpointer(tmp_path) as ckpt:
        ckpt.save(1)
        assert ckpt.wait()[-1].ok
    other = make()
    with torch.no_grad():
        other.model[0].weight.zero_()
    with other.checkpointer(tmp_path) as ckpt:
        ckpt.restore()
    assert same(other.state(), job.state())
    assert not other.model[0].weight.requires_grad
