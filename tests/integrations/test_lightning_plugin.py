"""Lightning's own Trainer with lazy checkpoints: the same numbers, files that stock Lightning resumes bit by bit."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning", reason="needs lightning: pip install 'undertow[lightning]'")

import lightning  # noqa: E402
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402

from undertow.checkpointing.lazy_file import LazyFile  # noqa: E402
from undertow.dist.errors import UserError  # noqa: E402
from undertow.examples.lm import ByteLM, LMConfig  # noqa: E402
from undertow.integrations.lightning_plugin import LazyCheckpoints, Stream  # noqa: E402

pytestmark = pytest.mark.slow


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.model = ByteLM(LMConfig(layers=2, width=32, heads=2, kv_heads=1, hidden=64))
        self.drop = torch.nn.Dropout(0.1)
        self.register_buffer("seen", torch.zeros(()))  # written by forward
        self.losses: list[float] = []

    def training_step(self, batch, index):
        self.seen += batch.numel()
        loss = self.model(batch[:, :-1], batch[:, 1:])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2), "interval": "step"}]


def loader() -> torch.utils.data.DataLoader:
    """Three batches: saves fall on ends of epochs, because Lightning begins an epoch anew with a stateless loader."""
    rows = torch.randint(0, 256, (6, 33), generator=torch.Generator().manual_seed(1))
    return torch.utils.data.DataLoader(rows, batch_size=2)  # type: ignore[arg-type]


def fit(folder: Path, *extra, steps: int = 10, resume: Path | None = None, keep: int = 1) -> Module:
    saved = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=3, save_top_k=keep)
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=steps, callbacks=[*extra, saved], logger=False, accumulate_grad_batches=1,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, gradient_clip_val=0.5,
    )  # fmt: skip
    module = Module()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few loader workers, no srun
        trainer.fit(module, loader(), ckpt_path=resume)
    return module


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())


def test_the_file_is_lightnings_and_resumes_bit_identically(tmp_path):
    plain = fit(tmp_path / "plain", keep=-1)
    saver = LazyCheckpoints()
    lazy = fit(tmp_path / "lazy", saver, keep=-1)
    assert same(lazy, plain) and lazy.losses == plain.losses
    names = [f"step={step}.ckpt" for step in (3, 6, 9)]
    assert saver.reports == [(name, "") for name in names]
    assert sorted(path.name for path in (tmp_path / "lazy").iterdir()) == names
    for name in names:
        one, two = (torch.load(tmp_path / kind / name, weights_only=False) for kind in ("plain", "lazy"))
        assert one.keys() == two.keys()
        assert all(torch.equal(value, two["state_dict"][key]) for key, value in one["state_dict"].items())
        for key, state in one["optimizer_states"][0]["state"].items():
            assert all(torch.equal(v, two["optimizer_states"][0]["state"][key][n]) for n, v in state.items())
    for extra in ([], [LazyCheckpoints()]):  # by stock Lightning, and by ours
        again = fit(tmp_path / f"again{len(extra)}", *extra, resume=tmp_path / "lazy" / names[1])
        assert same(again, plain) and again.losses == plain.losses[6:]


def test_an_older_file_goes_only_when_the_newer_one_is_there(tmp_path, monkeypatch):
    write = LazyFile.write

    def full(self):
        if "step=6" in self.path.name:
            raise OSError(28, "No space left on device")
        return write(self)

    monkeypatch.setattr(LazyFile, "write", full)
    saver = LazyCheckpoints()
    fit(tmp_path, saver, steps=8)
    assert [path.name for path in tmp_path.iterdir()] == ["step=3.ckpt"]
    assert saver.reports[0] == ("step=3.ckpt", "") and "No space left" in saver.reports[1][1]
    monkeypatch.undo()
    fit(tmp_path / "whole", LazyCheckpoints(), steps=8)
    assert [path.name for path in (tmp_path / "whole").iterdir()] == ["step=6.ckpt"]


def test_streaming(tmp_path):
    stream = Stream(chunk=8)
    plain, streamed = fit(tmp_path / "plain", steps=4), fit(tmp_path / "streamed", stream, LazyCheckpoints(), steps=4)
    assert stream.engine.last_plan is not None and stream.engine.last_plan.chunk == 8
    assert all(abs(a - b) < 2e-5 for a, b in zip(streamed.losses, plain.losses, strict=True))  # sums in another order
    assert "_undertow_stream_engine" not in streamed.model.__dict__


def test_the_guides_example_goes_on_from_its_own_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "huggingface.md").read_text()
    example = re.findall(r"```python\n(.*?)```", page, flags=re.S)[3]
    names: dict = {}
    exec(example, names)
    assert names["trainer"].global_step == 30 and (tmp_path / "runs" / "lightning" / "last.ckpt").exists()
    exec(example.replace("max_epochs=3", "max_epochs=4"), names)
    assert names["trainer"].global_step == 40


def test_wrong_use():
    with pytest.raises(UserError, match="a positive number of seconds"):
        LazyCheckpoints(timeout_s=0)
