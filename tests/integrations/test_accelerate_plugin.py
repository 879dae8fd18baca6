"""A real Accelerator's loop resumes bit by bit, and a program without Accelerate reads its folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate", reason="needs accelerate: pip install 'undertow[hf]'")

from accelerate import Accelerator  # noqa: E402
from accelerate.state import AcceleratorState, PartialState  # noqa: E402

from undertow.checkpointing import Checkpointer  # noqa: E402
from undertow.dist.errors import UserError  # noqa: E402
from undertow.integrations.accelerate_plugin import checkpointer  # noqa: E402


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps one state per process."""
    yield
    AcceleratorState._reset_state(True)
    PartialState._reset_state()


class Counter:
    count = 0

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


def parts():
    torch.manual_seed(4)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)


def run(folder: Path, steps: int) -> tuple[list[float], list[torch.Tensor]]:
    accelerator = Accelerator(cpu=True)
    module, *others = parts()
    model, optimizer, scheduler = accelerator.prepare(module, *others)
    counter = Counter()
    accelerator.register_for_checkpointing(counter)
    losses = []
    with checkpointer(accelerator, folder, every=2) as ckpt:
        for step in range(ckpt.restore() or 0, steps):
            assert counter.count == step
            ckpt.step(step)
            loss = model(torch.randn(4, 6)).square().mean()
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            counter.count += 1
            losses.append(loss.item())
    return losses, [p.detach().clone() for p in module.parameters()]


def test_resume_is_bit_identical(tmp_path):
    straight, weights = run(tmp_path / "a", 8)
    run(tmp_path / "b", 5)  # its last save is that of step 4
    resumed, again = run(tmp_path / "b", 8)
    assert resumed == straight[4:] and all(map(torch.equal, weights, again))


def test_a_plain_program_reads_the_folder(tmp_path):
    run(tmp_path, 3)
    model, optimizer, scheduler = parts()
    with Checkpointer(tmp_path, model=model, optimizer=optimizer, scheduler=scheduler, custom=Counter()) as ckpt:
        assert ckpt.restore() == 2
    assert scheduler.last_epoch == 2


def test_wrong_use(tmp_path):
    accelerator = Accelerator(cpu=True)
    with pytest.raises(UserError, match="the first argument is 3, of type int; expected the accelerate.Accelerator"):
        checkpointer(3, tmp_path)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="prepared no model"):
        checkpointer(accelerator, tmp_path)
    accelerator.prepare(*parts())
    with pytest.raises(UserError, match="leave out model="):
        checkpointer(accelerator, tmp_path, model=torch.nn.Linear(1, 1))
