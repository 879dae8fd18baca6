"""All systems in one run of the main job: none of them, nor a kill among them, changes what is computed."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest

from undertow.benchmarks.kill_resume import Job, Moment, prepare
from undertow.dist.errors import UserError
from undertow.examples.metrics import read
from undertow.examples.systems import Systems

STEPS = 8
DATA = Path(sysconfig.get_paths()["stdlib"]) / "asyncio"
# Sums are taken in another order: fp32 rounding, 2^-24 of a loss near 5.5, grows a little with every step (1e-6 is
# seen). A gradient that counts one axis twice, or leaves one out, shows as 1e-2 and more.
NOISE = 2e-5


def words(out: Path, *options: str) -> list[str]:
    base = ["--recipe", "tiny", "--steps", str(STEPS), "--checkpoint-every", "2", "--data", str(DATA)]
    return [*base, "--out", str(out), *options]


def curve(out: Path) -> list[tuple[float, float]]:
    """(loss, norm of the whole gradient before clipping) of every step."""
    return [(line["loss"], line["grad_norm"]) for line in read(out / "metrics.jsonl") if "loss" in line]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    prepare()
    out = tmp_path_factory.mktemp("alone") / "run"
    Job(words(out), 1, out.with_suffix(".log")).succeed(280)
    return out


def assert_same(out: Path, alone: Path) -> None:
    for (loss, norm), (expected, expected_norm) in zip(curve(out), curve(alone), strict=True):
        assert abs(loss - expected) < NOISE
        assert norm == pytest.approx(expected_norm, rel=1e-4)


@pytest.mark.slow
def test_all_at_once_with_a_kill_inside_a_checkpoint(alone, tmp_path):
    """Lazy checkpoints, streaming, two context × two tensor-parallel ranks with overlap; rank 3 dies by SIGKILL while
    its bytes of a save are on their way, and the run goes on from the newest whole checkpoint."""
    prepare()
    out, log = tmp_path / "run", tmp_path / "run.log"
    options = ["--stream", "--context-parallel", "2", "--tensor-parallel", "2", "--overlap", "on"]
    job = Job(words(out, *options), 4, log, Moment(3, "flush", 3, 0.0))
    job.wait(280)
    assert job.codes[job.pids[3]] == -9, log.read_text()
    assert curve(out) and not (out / "result.json").exists()
    Job(words(out, *options, "--resume"), 4, log).succeed(280)
    said = log.read_text()
    assert "restored step" in said and "ranks: data 1 × context 2 × tensor 2" in said
    assert "streamed backpropagation:" in said and "overlapped products:" in said
    assert "not streamed" not in said
    assert_same(out, alone)


@pytest.mark.slow
@pytest.mark.parametrize("shared", ["--context-parallel", "--tensor-parallel"])
def test_streaming_where_ranks_share_rows_beside_data_parallelism(alone, tmp_path, shared):
    prepare()
    out = tmp_path / "run"
    Job(words(out, "--stream", shared, "2"), 4, out.with_suffix(".log")).succeed(280)
    assert_same(out, alone)


def test_chunks_where_ranks_share_a_row_are_refused():
    with pytest.raises(UserError, match="leave --stream-chunk out"):
        Systems(stream=True, stream_chunk=8, tensor_parallel=2)
