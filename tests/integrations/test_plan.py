"""`undertow plan`: the answers follow from the planners, name them, and say where their rates come from."""

from __future__ import annotations

from dataclasses import replace

import pytest

from undertow.__main__ import main
from undertow.checkpointing.frequency import young_daly
from undertow.comms.simulate import ASSUMED
from undertow.dist.errors import UserError
from undertow.dist.machine import Link, Machine
from undertow.integrations.plan import Job, preflight
from undertow.parallel.memory_model import step_flops
from undertow.parallel.stream.cli import KNOWN

JOB = Job(KNOWN["llama3-8b"], ranks=8, tokens=8192)
MACHINE = Machine(
    "measured",
    links={"nccl": Link(1e-5, 2e11)},
    copies={"d2h_pinned": 5e10, "d2d": 1.5e12},
    disks={"write_direct": 1e9},
    flops=dict(ASSUMED.flops),
)


def answers(job: Job, machine: Machine | None = None) -> dict[str, str]:
    return {line.question: line.answer for line in preflight(job, machine).lines}


def test_every_line_names_its_calculation_and_its_source():
    for machine, source in ((None, "assumed"), (MACHINE, "measured")):
        job = replace(JOB, context=2, tensor=2)
        lines = preflight(job, machine).lines
        assert all(line.calculation and line.source.startswith("modelled") for line in lines)
        rated = {line.source for line in lines} - {"modelled"}
        assert rated == {f"modelled, {source} rates"}


def test_a_rate_that_was_not_measured_is_not_called_so():
    without_disk = replace(MACHINE, disks={})
    sources = {line.question: line.source for line in preflight(JOB, without_disk).lines}
    assert sources["checkpoint cost"] == "modelled, assumed rates"
    assert sources["compute of a rank"] == "modelled, measured rates"


def test_memory_decides_whether_it_fits():
    assert preflight(JOB).fits
    whole = preflight(replace(JOB, sharded=False))  # 8 G parameters × 16 B do not fit 80 GB
    assert not whole.fits
    assert dict((line.question, line.answer) for line in whole.lines)["does it fit"].startswith("no")
    assert "chunks of" in answers(replace(JOB, tokens=1 << 20))["streamed backpropagation"]


def test_step_time_of_one_rank_is_work_over_rates():
    job = replace(JOB, ranks=1, state_bytes=0, device_bytes=10**13)
    found = preflight(job, MACHINE)
    forward_once = step_flops(job.shape, 1, job.tokens, attention_kept=1.0)
    expected = sum(flops / MACHINE.flops[f"{kind}/bfloat16"] for kind, flops in forward_once.items())
    assert found.step_s == pytest.approx(expected, rel=1e-9)


def test_a_step_on_context_ranks_holds_products_attention_and_gradients():
    """Products and attention follow each other; a link that costs nothing leaves the work over the ranks, no less."""
    free = replace(MACHINE, links={"nccl": Link(0.0, 1e18)})
    job = replace(JOB, ranks=2, tokens=65536, state_bytes=0, device_bytes=10**13)
    alone, shared = preflight(replace(job, ranks=1), free), preflight(replace(job, context=2), free)
    assert alone.step_s / 2 * 0.9 < shared.step_s < alone.step_s / 2 * 1.5
    slow = replace(MACHINE, links={"nccl": Link(0.0, 1e9)})
    assert "gradients and weights" in answers(replace(job, context=2), slow)


def test_slower_links_never_make_a_step_shorter():
    job = replace(JOB, context=2, tensor=2)
    slow = replace(MACHINE, links={"nccl": Link(1e-4, 1e9)})
    assert preflight(job, slow).step_s > preflight(job, MACHINE).step_s


def test_overlap_is_off_where_it_gains_nothing():
    job = replace(JOB, tensor=2)
    endless = replace(MACHINE, links={"nccl": Link(0.0, 1e18)}, copies={"d2d": 1e18})
    assert answers(job, endless)["overlap engine"].startswith("sequential")
    balanced = replace(MACHINE, links={"nccl": Link(1e-6, 1e11)})
    assert answers(job, balanced)["overlap engine"].startswith("tracked chunks")


def test_failures_shorten_the_interval_and_the_goodput():
    calm, rough = (preflight(replace(JOB, mtbf_s=mtbf_s), MACHINE) for mtbf_s in (7 * 86400.0, 3600.0))
    assert calm.goodput > rough.goodput > 0
    slow_copy = replace(MACHINE, copies={"d2h_pinned": 1e9})
    interval = answers(replace(JOB, mtbf_s=86400.0), slow_copy)["checkpoint interval"]
    copy_s = JOB.shape.parameters * 14 / 8 / 1e9
    stall_s = copy_s - 0.9 * preflight(JOB, slow_copy).step_s
    wanted_s = max(young_daly(stall_s, 86400.0), stall_s / 0.01, 2 * copy_s)
    assert f"every {round(wanted_s / preflight(JOB, slow_copy).step_s)} steps" in interval


def test_degrees_must_multiply():
    with pytest.raises(UserError, match="data × context × tensor = ranks"):
        replace(JOB, context=3)
    with pytest.raises(UserError, match="divides both"):
        replace(JOB, ranks=3, tensor=3)


def test_the_command(capsys, tmp_path):
    MACHINE.dump(tmp_path / "machine.json")
    words = ["plan", "--model", "llama3-8b", "--ranks", "8", "--seq-len", "131072", "--context", "4"]
    assert main([*words, "--machine", str(tmp_path / "machine.json")]) == 0
    out = capsys.readouterr().out
    assert "attention schedule, backward" in out and "expected goodput" in out and "assumed" not in out
    assert main(["plan", "--model", "llama3-8b", "--ranks", "1", "--seq-len", "8192"]) == 1
    assert main(["plan", "--model", "absent", "--ranks", "1", "--seq-len", "8192"]) == 2
    assert "cannot read the model config" in capsys.readouterr().err
