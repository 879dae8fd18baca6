"""Under torchrun: a dead worker is replaced and the run goes on bit for bit; an error reaches torch's error file."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

from undertow.__main__ import main
from undertow.benchmarks.kill_resume import Job, prepare
from undertow.dist.trace import trace_path
from undertow.dist.trace_read import read_attempts
from undertow.examples.metrics import read

DOCS = Path(__file__).parents[2] / "docs"
STEPS = 40
PACED = Path(__file__).with_name("paced_train.py")  # `undertow train` that waits for the kill


def test_an_error_reaches_torchs_error_file(tmp_path, monkeypatch):
    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    assert main(["plan", "--model", "absent", "--ranks", "1", "--seq-len", "8"]) == 2
    said = json.loads(path.read_text())["message"]
    assert "cannot read the model config" in said["message"]
    assert "py_callstack" not in said["extraInfo"]  # torchrun shows a traceback in place of the message


def _train(out: Path, words: list[str], *options: str) -> subprocess.Popen:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *options]
    torchrun += [str(PACED), *words, "--out", str(out), "--resume", "--threads", "1", "--device", "cpu"]
    env = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
    log = out.with_suffix(".log").open("w")
    return subprocess.Popen(torchrun, env=env, stdout=log, stderr=log, start_new_session=True)


@pytest.mark.slow
def test_a_dead_worker_is_replaced(tmp_path):
    data = Path(sysconfig.get_paths()["stdlib"]) / "asyncio"
    reference, run = tmp_path / "reference", tmp_path / "run"
    words = ["--recipe", "tiny", "--data", str(data), "--steps", str(STEPS)]
    prepare()
    killed = tmp_path / "killed"
    job = _train(run, [str(killed), "13", "10", *words], "--max-restarts", "3")
    try:
        deadline_s = time.monotonic() + 240
        while max((line["step"] for line in read(run / "metrics.jsonl")), default=-1) < 12:
            assert time.monotonic() < deadline_s and job.poll() is None, run.with_suffix(".log").read_text()
            time.sleep(0.02)
        os.kill(read_attempts(trace_path(run / "trace", 1))[-1].os_pid, signal.SIGKILL)
        killed.touch()
        Job([*words, "--out", str(reference)], 2, reference.with_suffix(".log")).succeed(280)  # while others restart
        assert job.wait(280) == 0, run.with_suffix(".log").read_text()
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    assert len(read_attempts(trace_path(run / "trace", 0))) == 2
    for name in ("weights_hash", "state_hash"):
        ours, theirs = (json.loads((path / "result.json").read_text())[name] for path in (run, reference))
        assert ours == theirs


def _blocks(page: str, language: str = "sh") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(), flags=re.S)


def _environment() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
@pytest.mark.parametrize("page", ["launch.md", "slurm.md"])
def test_the_commands_of_the_page_run(page, tmp_path, monkeypatch):
    """In the page's order, in one folder. `undertow …` runs in this process, without a new one that imports torch."""
    monkeypatch.chdir(tmp_path)
    for command in _blocks(page):
        line = command.replace("\\\n", " ").strip()
        if line.startswith("undertow ") and "\n" not in line:
            assert main(shlex.split(line, comments=True)[1:]) == 0, command
            continue
        done = subprocess.run(["bash", "-ec", command], env=_environment(), capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    made = "runs/a/report.html" if page == "launch.md" else "job.sbatch"
    assert (tmp_path / made).stat().st_size > 1000


@pytest.mark.slow
def test_the_testing_page_runs(tmp_path):
    (tmp_path / "test_total.py").write_text(_blocks("testing.md", "python")[0])
    command = _blocks("testing.md")[0]
    done = subprocess.run(
        ["bash", "-ec", command], cwd=tmp_path, env=_environment(), capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr
