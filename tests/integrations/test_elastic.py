"""torchrun changes the number of nodes under a run: a killed agent is done without, a later one is taken in."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

from undertow.benchmarks.kill_resume import Job, prepare
from undertow.dist.launch import free_port
from undertow.dist.trace import trace_path
from undertow.dist.trace_read import read_attempts
from undertow.examples.metrics import read

STEPS = 60
WORKER = Path(__file__).with_name("paced_train.py")
DATA = Path(sysconfig.get_paths()["stdlib"]) / "asyncio"
NOISE = 2e-5  # one rank and two add gradients in another order; see tests/examples/test_systems.py


class Agent:
    """`torchrun --nnodes 1:2` of one rank, in a session of its own: a node."""

    def __init__(self, name: str, out: Path, port: int, words: list[str]) -> None:
        self.log = out.with_name(f"{name}.log")
        conf = f"is_host={'true' if name == 'first' else 'false'},last_call_timeout=1,keep_alive_interval=2"
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2", "--nproc-per-node", "1"]
        torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "elastic"]
        torchrun += ["--rdzv-conf", conf, "--local-addr", "127.0.0.1", "--max-restarts", "20"]
        torchrun += ["--log-dir", str(out.with_name(f"{name}-logs")), str(WORKER), *words]
        env = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(torchrun, env=env, stdout=log, stderr=log, start_new_session=True)

    def kill(self) -> None:
        """The whole node at once: agent and worker. The worker has a session of its own, and dies first."""
        for child in subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(self.process.pid)], capture_output=True, text=True
        ).stdout.split():
            os.kill(int(child), signal.SIGKILL)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def _newest(out: Path) -> int:
    return max((line["step"] for line in read(out / "metrics.jsonl") if "loss" in line), default=-1)


@pytest.mark.slow
def test_the_world_shrinks_and_grows(tmp_path):
    prepare()
    base = ["--recipe", "tiny", "--steps", str(STEPS), "--data", str(DATA), "--checkpoint-every", "2"]
    reference, out, hurry = tmp_path / "reference", tmp_path / "run", tmp_path / "hurry"
    words = [str(hurry), "0", "0.5", *base, "--out", str(out), "--resume", "--threads", "1", "--device", "cpu"]
    port = free_port()
    agents = [Agent(name, out, port, words) for name in ("first", "second")]

    def until(done, what: str) -> None:
        deadline_s = time.monotonic() + 240
        while not done():
            assert time.monotonic() < deadline_s and agents[0].process.poll() is None, f"{what}\n" + "\n".join(
                agent.log.read_text()[-3000:] for agent in agents
            )
            time.sleep(0.05)

    def attempts(rank: int) -> int:
        trace = trace_path(out / "trace", rank)
        return len(read_attempts(trace)) if trace.exists() else 0

    try:
        Job([*base, "--out", str(reference)], 1, reference.with_suffix(".log")).succeed(280)  # while they start
        # A node that starts late joins a run that has begun: so what is counted are the starts from each change on.
        until(lambda: attempts(1) > 0, "no two ranks began")
        begun = _newest(out)
        until(lambda: _newest(out) >= begun + 3, "two ranks did not go on")
        alone, both, reached = attempts(0), attempts(1), _newest(out)
        agents[1].kill()
        until(lambda: attempts(0) > alone and _newest(out) >= reached + 2, "one rank did not go on alone")
        assert attempts(1) == both
        alone = attempts(0)
        agents.append(Agent("third", out, port, words))
        until(lambda: attempts(0) > alone and attempts(1) > both, "the new node was not taken in")
        hurry.touch()
        assert agents[0].process.wait(240) == 0, agents[0].log.read_text()
        assert agents[2].process.wait(240) == 0, agents[2].log.read_text()
    finally:
        for agent in agents:
            agent.kill()
    ours, theirs = ([x["loss"] for x in read(run / "metrics.jsonl") if "loss" in x] for run in (out, reference))
    assert len(ours) == STEPS
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < NOISE
    errors = [json.loads(path.read_text()) for path in tmp_path.glob("first-logs/**/error.json")]
    assert errors, "what the survivor met is in torch's error file"
    assert all("Error" in json.dumps(error) for error in errors)
