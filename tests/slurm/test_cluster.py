"""The templates on a real Slurm, two nodes of two ranks: lose a rank, be pre-empted, go on bit for bit."""

from __future__ import annotations

import json
import os
import signal
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

pytestmark = [pytest.mark.root, pytest.mark.slow]
STEPS = 60
PACED = Path(__file__).parents[1] / "integrations" / "paced_train.py"  # `undertow train` that is not over too soon


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name in ("argparse.py", "ast.py", "datetime.py", "decimal.py", "difflib.py", "doctest.py", "inspect.py"):
        source = Path(sysconfig.get_paths()["stdlib"]) / name
        if source.exists():
            (folder / name).write_bytes(source.read_bytes())
    return folder


@pytest.fixture(scope="module")
def script(cluster, data):
    """`script(template, run, *options)`: the rendered file."""

    def render(template: str, run: Path, *options: str) -> Path:
        path = run.with_suffix(".sbatch")
        words = ["--nodes", "2", "--tasks-per-node", "2", "--interface", "lo", "--run-dir", str(run), "--time", "20min"]
        words += ["--min-disk", "1MiB", "--output", str(path), *options]
        paced = [str(PACED), str(hurry(run)), "13", "0.5"]
        train = [*paced, *training(run, data), "--resume", "--threads", "1", "--device", "cpu"]
        assert main(["slurm", "render", template, *words, "--", *train]) == 0
        return path

    return render


def hurry(run: Path) -> Path:
    """The file that ends the pauses of a run's steps."""
    return run.with_suffix(".hurry")


def training(run: Path, data: Path) -> list[str]:
    words = ["--out", str(run), "--recipe", "tiny", "--data", str(data)]
    return [*words, "--steps", str(STEPS), "--checkpoint-every", "10"]


@pytest.fixture(scope="module")
def undisturbed(cluster, data) -> Path:
    """Four forked ranks without Slurm: what started them leaves no trace in a result."""
    run = cluster.folder / "undisturbed"
    prepare()
    Job(training(run, data), 4, run.with_suffix(".log")).succeed(280)
    return run


def reach(run: Path, step: int, *, timeout_s: float = 280) -> None:
    deadline_s = time.monotonic() + timeout_s
    while max((line["step"] for line in read(run / "metrics.jsonl")), default=-1) < step:
        assert time.monotonic() < deadline_s, f"step {step} was not reached"
        time.sleep(0.05)


def assert_same(run: Path, reference: Path) -> None:
    for name in ("weights_hash", "state_hash", "losses"):
        assert (
            json.loads((run / "result.json").read_text())[name]
            == json.loads((reference / "result.json").read_text())[name]
        )
    assert [line.get("loss") for line in read(run / "metrics.jsonl")] == [
        line.get("loss") for line in read(reference / "metrics.jsonl")
    ]


def test_srun_loses_a_rank_and_is_preempted(cluster, script, undisturbed):
    run = cluster.folder / "srun"
    job = cluster.submit(script("srun", run), "--export=ALL,RETRY_WAIT=1")
    reach(run, 12)
    os.kill(read_attempts(trace_path(run / "trace", 3))[-1].os_pid, signal.SIGKILL)  # on the second node
    log = cluster.folder / f"undertow-{job}.log"
    while len(read_attempts(trace_path(run / "trace", 0))) < 2:
        assert cluster.job(job)["JobState"] == "RUNNING", log.read_text()
        time.sleep(0.1)
    reach(run, 16)
    cluster.call("scancel", "--batch", "--signal=USR1", job)  # what --signal=B:USR1@120 does before the time limit
    while (found := cluster.job(job))["Restarts"] == "0":
        assert found["JobState"] != "COMPLETED", cluster.logs()
        time.sleep(0.1)
    hurry(run).touch()
    assert cluster.wait(job, "COMPLETED")["Restarts"] == "1", cluster.logs()
    said = log.read_text()
    assert "attempt 0 failed" in said and "saved at step" in said and "node n2: fit" in said
    assert len(list((cluster.folder / "srun-logs").glob("*rank-3.log"))) == 3
    assert_same(run, undisturbed)


def test_torchrun_is_preempted_by_a_better_partition(cluster, script, undisturbed):
    run = cluster.folder / "torchrun"
    job = cluster.submit(script("torchrun", run))
    reach(run, 12)
    urgent = cluster.folder / "urgent.sbatch"
    urgent.write_text("#!/bin/sh\nsleep 1\n")
    other = cluster.submit(urgent, "--partition=high", "--nodes=2", "--exclusive")
    cluster.wait(other, "COMPLETED")
    hurry(run).touch()
    assert cluster.wait(job, "COMPLETED")["Restarts"] == "1", cluster.logs()
    assert len(list((cluster.folder / "torchrun-logs").rglob("stderr.log"))) == 8  # two starts of four ranks
    assert_same(run, undisturbed)


def test_a_cancelled_job_stays_away(cluster, script):
    run = cluster.folder / "cancelled"
    job = cluster.submit(script("srun", run, "--nodes", "1"))
    reach(run, 3)
    cluster.call("scancel", job)
    cluster.wait(job, "CANCELLED")
    time.sleep(1)
    assert cluster.job(job)["JobState"] == "CANCELLED"


@pytest.mark.parametrize(("code", "attempts", "last"), [(7, 2, "gave up after 1 restarts"), (2, 1, "not tried again")])
def test_a_job_that_cannot_run_stops_within_its_budget(cluster, code, attempts, last):
    path = cluster.folder / f"broken{code}.sbatch"
    words = ["--run-dir", str(cluster.folder / "broken"), "--min-disk", "1MiB", "--max-restarts", "1"]
    assert (
        main(["slurm", "render", "srun", *words, "--output", str(path), "--", "-c", f"raise SystemExit({code})"]) == 0
    )
    job = cluster.submit(path, "--export=ALL,RETRY_WAIT=0")
    cluster.wait(job, "FAILED")
    said = (cluster.folder / f"undertow-{job}.log").read_text()
    assert said.count(f"failed (code {code})") == attempts and last in said


def test_an_unfit_node_is_named(cluster, script):
    job = cluster.submit(script("srun", cluster.folder / "unfit", "--min-disk", "1EiB"))
    cluster.wait(job, "FAILED")
    said = (cluster.folder / f"undertow-{job}.log").read_text()
    assert "node n1: " in said and "less than 1.0 EiB" in said and "--exclude=NODE" in said


COLUMNS = """\
import os
import pathlib
import signal
import sys

import numpy
from mpi4py import MPI

told = []
signal.signal(signal.SIGUSR1, lambda number, frame: told.append(number))
comm, run = MPI.COMM_WORLD, pathlib.Path(os.environ["RUN_DIR"])
column = MPI.DOUBLE.Create_vector(64, 1, 64).Commit()
sent, got = numpy.arange(4096.0).reshape(64, 64) + comm.rank, numpy.zeros((64, 64))
left = (comm.rank - 1) % comm.size
comm.Sendrecv([sent, 1, column], (comm.rank + 1) % comm.size, recvbuf=[got, 1, column], source=left)
assert (got[:, 0] == sent[:, 0] - comm.rank + left).all() and not got[:, 1:].any()
os.write(1, f"column {comm.rank} of {comm.size} on {os.environ['SLURMD_NODENAME']}\\n".encode())  # in one piece
if len(sys.argv) > 1 and not (run / "saved").exists():
    (run / f"waiting-{comm.rank}").touch()
    while not comm.allreduce(len(told)):
        pass
    if comm.rank == 0:
        (run / "saved").write_text("7\\n")
        (run / "preempted").write_text("7\\n")
    comm.Barrier()
"""


def test_mpi_programs_across_nodes_under_the_preload(cluster):
    """Two nodes of two ranks each: the mpirun beside this Python, told to save and requeued; the same MPI started by
    srun through PMI-2. The preload's report names the program's type."""
    program, beside = cluster.folder / "columns.py", Path(sys.executable).parent
    if not (beside / "mpirun").exists():
        pytest.skip("needs an MPI beside this Python: pip install 'undertow[mpi]'")
    program.write_text(COLUMNS)
    started = {"mpirun": ([], [sys.executable, str(program), "wait"], "MPIRUN=" + str(beside / "mpirun"))}
    started["pmi2"] = (["--mpi", "pmi2"], [sys.executable, str(program)], f"MPICC={beside / 'mpicc'}")
    jobs = {}
    for name, (options, command, variables) in started.items():
        path, run = cluster.folder / f"mpi-{name}.sbatch", cluster.folder / f"mpi-{name}"
        words = ["--nodes", "2", "--tasks-per-node", "2", "--interface", "lo", "--run-dir", str(run), *options]
        words += ["--min-disk", "1MiB", "--max-restarts", "0", "--output", str(path)]
        assert main(["slurm", "render", "mpi", *words, "--", *command]) == 0
        jobs[name] = cluster.submit(path, f"--export=ALL,{variables}")
    deadline_s = time.monotonic() + 400  # the first start compiles the preload
    while len(list((cluster.folder / "mpi-mpirun").glob("waiting-*"))) < 4:
        ended = cluster.job(jobs["mpirun"])["JobState"] in ("COMPLETED", "FAILED")
        assert not ended and time.monotonic() < deadline_s, cluster.logs()
        time.sleep(0.1)
    cluster.call("scancel", "--batch", "--signal=USR1", jobs["mpirun"])
    for name, job in jobs.items():
        assert cluster.wait(job, "COMPLETED FAILED", timeout_s=400)["JobState"] == "COMPLETED", cluster.logs()
        logs = [cluster.folder / f"undertow-{job}.log", *(cluster.folder / f"mpi-{name}-logs").glob("*rank-*.log")]
        said = "".join(path.read_text() for path in logs)
        assert all(f"column {rank} of 4 on n{rank // 2 + 1}" in said for rank in range(4)), (name, said)
        for report in (cluster.folder / f"mpi-{name}-logs").glob("*-mpi.json"):
            assert json.loads(report.read_text())["ranks"] == [0, 1, 2, 3] and "vector" in report.read_text()
    log = (cluster.folder / f"undertow-{jobs['mpirun']}.log").read_text()
    assert "saved at step 7" in log and cluster.job(jobs["mpirun"])["Restarts"] == "1"
    assert len(list((cluster.folder / "mpi-mpirun-logs").glob("*-mpi.json"))) == 2


def test_array_of_benchmarks(cluster):
    path, run = cluster.folder / "array.sbatch", cluster.folder / "array"
    words = ["--run-dir", str(run), "--case", "checksum --list", "--case", "copies --list", "--job-name", "array"]
    assert main(["slurm", "render", "array", *words, "--output", str(path)]) == 0
    job = cluster.submit(path)
    deadline_s = time.monotonic() + 400
    while cluster.call("squeue", "-h", "-j", job).strip():
        assert time.monotonic() < deadline_s, cluster.logs()
        time.sleep(0.2)
    said = "".join(path.read_text() for path in sorted(cluster.folder.glob("array-*.log")))
    assert "task 0: checksum --list" in said and "task 1: copies --list" in said
    assert "error" not in said.lower(), said
