"""`undertow train` as typed: what it leaves behind, what it refuses, and that ranks do not change the answer."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sysconfig
import time
from pathlib import Path
from unittest.mock import ANY

import pytest
import torch

from undertow.__main__ import main
from undertow.benchmarks.kill_resume import Job, prepare
from undertow.examples.metrics import read
from undertow.examples.train import Run

STEPS = 8


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder, total = tmp_path_factory.mktemp("data"), 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        (folder / path.name).write_bytes(path.read_bytes())
        total += path.stat().st_size
        if total > 400_000:
            break
    return folder


def run(out: Path, data: Path, *options: str, ranks: int = 1) -> Path:
    """A run in forked ranks that must succeed."""
    prepare()
    words = ["--recipe", "tiny", "--steps", str(STEPS), "--checkpoint-every", "3"]
    Job([*words, "--data", str(data), "--out", str(out), *options], ranks, out.with_suffix(".log")).succeed(280)
    return out


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data) -> Path:
    return run(tmp_path_factory.mktemp("runs") / "one", data)


@pytest.fixture(autouse=True)
def deterministic_mode_is_put_back():
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in read(out / "metrics.jsonl") if "loss" in line]


def files(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def test_what_a_run_leaves_behind(finished):
    lines = read(finished / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == list(range(STEPS))
    assert all({"loss", "grad_norm", "lr", "tokens_per_s"} <= line.keys() for line in lines if "loss" in line)
    assert sum("bits_per_byte" in line for line in lines) == 1
    result = json.loads((finished / "result.json").read_text())
    assert result["losses"] == STEPS
    assert 0 < result["bits_per_byte"] <= 8.5
    assert json.loads((finished / "config.json").read_text())["config"]["steps"] == STEPS
    assert sorted(path.name for path in (finished / "checkpoints").glob("step-*"))[-1] == f"step-{STEPS:09d}"
    assert list((finished / "trace").glob("trace-*.json"))
    assert "text" in (finished.with_suffix(".log")).read_text()


def test_it_learns(finished):
    """Bytes drawn evenly cost log 256 = 5.545 nats; a few steps must beat that."""
    found = losses(finished)
    assert abs(found[0] - math.log(256)) < 0.5
    assert found[-1] < found[0] - 0.1


def test_the_same_run_again_gives_the_same_bits(finished, tmp_path, data):
    again = run(tmp_path / "again", data)
    assert losses(again) == losses(finished)
    one, two = (json.loads((out / "result.json").read_text()) for out in (finished, again))
    assert (one["weights_hash"], one["state_hash"]) == (two["weights_hash"], two["state_hash"])


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_do_not_change_the_answer(finished, tmp_path, data, ranks):
    """Ranks add gradients in another order: fp32 rounding, 2^-24 of a loss near 5.5, grows a little with every step.
    Measured at 8 steps: about 1e-6. A wrong average or a row used twice shows as 1e-2 and more."""
    shared = run(tmp_path / "shared", data, ranks=ranks)
    for alone, together in zip(losses(finished), losses(shared), strict=True):
        assert abs(alone - together) < 2e-5
    assert losses(shared)[0] == pytest.approx(losses(finished)[0], abs=2e-6)


@pytest.mark.parametrize("ranks", [1, 2])
def test_streaming_does_not_change_the_answer(finished, tmp_path, data, ranks):
    """Streaming adds in another order: the same fp32 noise as other ranks."""
    streamed = run(tmp_path / "streamed", data, "--stream", "--stream-chunk", "24", ranks=ranks)
    for alone, together in zip(losses(finished), losses(streamed), strict=True):
        assert abs(alone - together) < 2e-5
    log = streamed.with_suffix(".log").read_text()
    assert "streamed backpropagation:" in log
    assert log.split("chunks")[1].split()[:3] == ["3", "of", "24"]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("system", ["--context-parallel", "--tensor-parallel"])
def test_a_row_or_a_product_on_several_ranks_does_not_change_the_answer(finished, tmp_path, data, system, ranks):
    """Two ranks share each row (or product); with four there are two such pairs. The noise of other sums, as above."""
    together = run(tmp_path / "together", data, system, "2", ranks=ranks)
    for one, two in zip(losses(finished), losses(together), strict=True):
        assert abs(one - two) < 2e-5
    results = [json.loads((out / "result.json").read_text()) for out in (finished, together)]
    assert results[0]["bits_per_byte"] == pytest.approx(results[1]["bits_per_byte"], abs=1e-4)


@pytest.mark.slow
def test_a_checkpoint_of_tensor_parallel_ranks_is_one_of_the_whole_model(tmp_path, data):
    """Two tensor-parallel ranks stop early; one plain rank goes on from their checkpoint."""
    straight = run(tmp_path / "straight", data)
    out = run(tmp_path / "parts", data, "--tensor-parallel", "2", ranks=2)
    shutil.rmtree(out / "checkpoints" / f"step-{STEPS:09d}")
    (out / "result.json").unlink()
    run(out, data, "--resume")
    assert "restored step 6" in out.with_suffix(".log").read_text()
    for one, two in zip(losses(straight), losses(out), strict=True):
        assert abs(one - two) < 2e-5


def test_going_on_gives_the_same_bits_and_every_step_once(tmp_path, data):
    """Stop at step 5 by configuration, go on to 8 with --resume; one line for each step."""
    straight = run(tmp_path / "straight", data, "--log-every", "2")
    out = run(tmp_path / "parts", data, "--log-every", "2")
    for step in (6, STEPS):
        shutil.rmtree(out / "checkpoints" / f"step-{step:09d}")  # as if killed at step 5: step 3 is the newest
    (out / "result.json").unlink()
    run(out, data, "--resume", "--log-every", "2")
    assert losses(out) == losses(straight)
    assert [line["step"] for line in read(out / "metrics.jsonl") if "loss" in line] == list(range(STEPS))
    assert "restored step 3" in out.with_suffix(".log").read_text()
    one, two = (json.loads((path / "result.json").read_text()) for path in (straight, out))
    assert one == two


@pytest.mark.slow
def test_a_signal_saves_and_the_run_goes_on_later(tmp_path, data, monkeypatch):
    """SIGUSR1 to one of two ranks: both save the same step and leave a marker; --resume ends bit-identical."""
    straight = run(tmp_path / "straight", data, "--steps", "60", ranks=2)
    out, log = tmp_path / "told", tmp_path / "told.log"
    prepare()
    words = ["--recipe", "tiny", "--steps", "60", "--checkpoint-every", "1000", "--data", str(data), "--out", str(out)]
    plain_step, told = Run.step, tmp_path / "signal"

    def step(self, number):
        """Not so fast that the run is over before it is told."""
        deadline_s = time.monotonic() + (10 if number > 3 else 0)
        while time.monotonic() < deadline_s and not told.exists():
            time.sleep(0.01)
        return plain_step(self, number)

    monkeypatch.setattr(Run, "step", step)
    job = Job(words, 2, log)
    deadline_s = time.monotonic() + 240
    while len(read(out / "metrics.jsonl")) < 3:
        assert time.monotonic() < deadline_s, log.read_text()
        time.sleep(0.01)
    os.kill(job.pids[1], signal.SIGUSR1)
    told.touch()
    monkeypatch.undo()
    job.wait(280)
    assert set(job.codes.values()) == {0}, log.read_text()
    step = int((out / "preempted").read_text())
    assert 3 <= step < 60 and not (out / "result.json").exists()
    run(out, data, "--steps", "60", "--checkpoint-every", "1000", "--resume", ranks=2)
    assert not (out / "preempted").exists()
    assert losses(out) == losses(straight)
    one, two = (json.loads((path / "result.json").read_text()) for path in (straight, out))
    assert one == two


def test_a_torn_last_line_of_metrics_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "loss": 1.0}\n{"step": 1, "lo')
    assert read(tmp_path / "metrics.jsonl") == [{"step": 0, "loss": 1.0}]


WRONG = {
    "unknown recipe": (["--recipe", "huge"], "no recipe 'huge'"),
    "missing data": (["--data", "/no/such/file"], "cannot read the training data /no/such/file"),
    "no steps": (["--steps", "0"], "steps is 0"),
    "a device that is none": (["--device", "tpu"], "--device tpu"),
    "a long row": (["--length", "0"], "length is 0"),
    "a rate that is none": (["--lr", "-1"], "lr is -1.0; expected a positive, finite number"),
    "an endless rate": (["--lr", "inf"], "lr is inf"),
    "checkpoints before the start": (["--checkpoint-every", "-1"], "checkpoint_every is -1"),
    "nothing to keep": (["--keep", "0"], "keep is 0"),
    "an overlap that is none": (["--overlap", "x"], "overlap 'x'; expected one of auto, off, on"),
    "an overlap of nothing": (["--overlap", "on"], "pass --tensor-parallel N too"),
    "too few ranks": (
        ["--context-parallel", "3"],
        "start 3 ranks, or a multiple of them (torchrun --nproc-per-node 3)",
    ),
    "a budget for nothing": (["--stream-budget", "1MiB"], "a stream budget or chunk without streaming"),
    "a budget that is no size": (["--stream", "--stream-budget", "much"], "much"),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_input_is_one_line_and_nothing_is_made(tmp_path, data, capsys, name):
    options, message = WRONG[name]
    base = ["train", "--recipe", "tiny", "--device", "cpu", "--data", str(data), "--out", str(tmp_path / "out")]
    assert main(base + options) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("undertow train: ")]
    assert len(error) == 1
    assert message in error[0]
    assert not (tmp_path / "out").exists()


def test_a_batch_that_ranks_cannot_share(tmp_path, data):
    prepare()
    log = tmp_path / "log"
    options = ["--recipe", "tiny", "--data", str(data), "--out", str(tmp_path / "out"), "--batch", "5"]
    job = Job(options, 2, log)
    job.wait(280)
    assert any(code == 2 for code in job.codes.values())
    assert "batch 5 rows over 2 ranks" in log.read_text()
    assert "pass --batch 6" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert not (tmp_path / "out").exists()


REFUSED = {
    "another configuration": (["--lr", "0.5", "--resume"], "another configuration (lr 0.001"),
    "another length": (["--length", "32", "--resume"], "another configuration (length 64"),
    "no --resume": ([], "holds a run already"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_finished_run_is_not_overwritten(finished, data, capsys, name):
    options, message = REFUSED[name]
    before = files(finished)
    base = ["train", "--recipe", "tiny", "--steps", str(STEPS), "--checkpoint-every", "3", "--device", "cpu"]
    assert main([*base, "--data", str(data), "--out", str(finished), *options]) == 2
    assert message in capsys.readouterr().err
    assert files(finished) == before


def test_fewer_steps_than_were_made_set_nothing_aside(finished, data, capsys):
    before = files(finished / "checkpoints")
    base = ["train", "--recipe", "tiny", "--steps", "2", "--checkpoint-every", "3", "--device", "cpu", "--resume"]
    assert main([*base, "--data", str(data), "--out", str(finished)]) == 2
    assert f"trained to step {STEPS} already, and --steps is 2" in capsys.readouterr().err
    assert files(finished / "checkpoints") == before | {".lock": ANY, "RESTARTS.json": ANY}


def test_other_text_is_another_configuration(finished, tmp_path, capsys):
    text = tmp_path / "text"
    text.write_bytes(os.urandom(200_000).replace(b"\0", b"a"))
    before = files(finished)
    base = ["train", "--recipe", "tiny", "--device", "cpu", "--resume"]
    assert main([*base, "--data", str(text), "--out", str(finished)]) == 2
    assert "another configuration (" in (error := capsys.readouterr().err)
    assert "text " in error
    assert files(finished) == before


def test_a_folder_of_somebody_else_is_not_touched(tmp_path, data, capsys):
    (tmp_path / "thesis.tex").write_text("precious")
    assert main(["train", "--recipe", "tiny", "--data", str(data), "--out", str(tmp_path), "--device", "cpu"]) == 2
    assert "holds other files" in capsys.readouterr().err
    assert files(tmp_path) == {"thesis.tex": b"precious"}


def test_a_folder_that_cannot_be_made(tmp_path, data, capsys):
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "out"
    assert main(["train", "--recipe", "tiny", "--data", str(data), "--out", str(out), "--device", "cpu"]) == 2
    assert "cannot use the run folder" in capsys.readouterr().err
