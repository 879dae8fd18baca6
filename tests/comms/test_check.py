"""A valid schedule, broken in one way at a time: `check` refuses each with its own kind and says where."""

from __future__ import annotations

import pytest
import torch

from undertow.comms import local
from undertow.comms.builders.all_gather import ring_all_gather
from undertow.comms.builders.gemm_reduce_scatter import gemm_reduce_scatter
from undertow.comms.builders.reduce_scatter import direct_reduce_scatter, ring_reduce_scatter
from undertow.comms.builders.ring_attention import ring_attention
from undertow.comms.check import check, find_problems, out_of_order
from undertow.comms.graph import build
from undertow.comms.problems import ScheduleError
from undertow.comms.schedule_text import parse

GATHER = str(ring_all_gather(3, 4, [2]))
SCATTER = str(direct_reduce_scatter(3, 4, [2]))
RING = str(ring_reduce_scatter(5, 4, [2]))
GEMM = str(gemm_reduce_scatter(3, 4, 4, 5))
ATTEND = str(ring_attention(5, 4))


def _with_extra(rows: str, count: int) -> str:
    """GEMM with one more product on rank 0."""
    extra = f"rank 0\nlane compute\n  compute gemm({rows}, w[0:4]) => extra[0:{count}]\n"
    text = GEMM.replace("rank 0\nlane compute\n", extra)
    return text.replace("goal 0", f"value extra float32[{count}, 5] scratch\ngoal 0", 1)


# name: (text, what to replace, by what, kind, words of the message)
BREAKS = {
    "a send is dropped": (
        GATHER,
        "  send -> 1 chunk.0 (x[0:4])\n",
        "",
        "unmatched receive",
        "rank 1, lane from_previous",
    ),
    "a receive is dropped": (
        GATHER,
        "  recv <- 2 chunk.2 => out[8:12]\n",
        "",
        "unmatched send",
        "rank 2, lane to_next",
    ),
    "a tag is misspelt": (GATHER, "send -> 1 chunk.0 (x", "send -> 1 chunk.9 (x", "unmatched send", "chunk.9"),
    "a tag is used twice": (
        GATHER,
        "  send -> 1 chunk.2 (out[8:12])",
        "  send -> 1 chunk.0 (out[8:12])",
        "tag",
        "chunk.0 is used twice",
    ),
    "a message to oneself": (
        GATHER,
        "rank 0\nlane compute",
        "rank 0\nlane me\n  send -> 0 a (x[0:4])\nlane compute",
        "peer",
        "rank 0",
    ),
    "a peer that does not exist": (
        GATHER,
        "send -> 1 chunk.0",
        "send -> 7 chunk.0",
        "peer",
        "rank 7 is not another rank",
    ),
    "fewer bytes sent than received": (GATHER, "chunk.0 (x[0:4])", "chunk.0 (x[0:3])", "unequal message", "3 × 8 B"),
    "another dtype at the other end": (
        SCATTER.replace(
            "value x float32[12, 2] input", "value x float32[12, 2] input @ 0 2\nvalue x int32[12, 2] input @ 1"
        ),
        "",
        "",
        "unequal message",
        "int32",
    ),
    "rows that do not exist": (
        GATHER,
        "=> out[8:12]\nlane",
        "=> out[9:13]\nlane",
        "rows",
        "rows 9:13 of a value with 12 rows",
    ),
    "a value that is not declared": (
        GEMM,
        "compute gemm(x[4:8], w[0:4])",
        "compute gemm(x[4:8], v[0:4])",
        "unknown value",
        "value v",
    ),
    "a value declared twice": (GEMM, "value w", "value x float32[1] scratch\nvalue w", "declared twice", "value x"),
    "rows written twice": (GEMM, "=> y[4:8]", "=> y[8:12]", "written twice", "rows 8:12 have a writer already"),
    "an input written": (
        GEMM,
        "reduce add(y[0:4], from.1[0:4]) => sum.1[0:4]",
        "reduce add(y[0:4], from.1[0:4]) => x[0:4]",
        "input written",
        "value x",
    ),
    "rows read that nobody writes": (
        GEMM,
        "  compute gemm(x[4:8], w[0:4]) => y[4:8] ~ 160 gemm/float32\n",
        "",
        "never written",
        "value y",
    ),
    "an output left incomplete": (GATHER, "  copy copy(x[0:4]) => out[0:4]\n", "", "output incomplete", "value out"),
    "a lane that sends and computes": (GEMM, "lane out\n", "", "lane", "mixes operation and send"),
    "two lanes of one name": (GEMM, "lane reduce", "lane compute", "lane", "two lanes of this name"),
    "an input in a shared slot": (
        ATTEND,
        "value q float32[4, 1, 1, 1] input",
        "value q float32[4, 1, 1, 1] input in part.o",
        "slot",
        "cannot hold an input",
    ),
    "a send that writes data": (GATHER, "chunk.0 (x[0:4])", "chunk.0 (x[0:4]) => out[0:4]", "token", "tokens only"),
    "a program is missing": (GATHER, GATHER[GATHER.index("rank 2") :], "", "world", "expected one each for 0 … 2"),
    "each rank waits for the other": (
        GATHER,
        "  recv <- 2 chunk.2 => out[8:12]\n",
        "  wait (out[4:8])\n  recv <- 2 chunk.2 => out[8:12]\n",
        "deadlock",
        "waits for the end of rank 0, lane from_previous",
    ),
    "receives in an order that cannot be": (
        RING,
        "  recv <- 4 step.0.0 => got.0.0[0:4]\n  recv <- 4 step.1.0 => got.1.0[0:4]\n  wait (sum.0.0[0:4])\n",
        "  recv <- 4 step.1.0 => got.1.0[0:4]\n  wait (sum.0.0[0:4])\n  recv <- 4 step.0.0 => got.0.0[0:4]\n",
        "deadlock",
        "got.0.0",
    ),
    "a buffer received into early": (ATTEND, "  wait (sent.1[0:1])\n", "", "slot reuse", "has read kv.1[0:4]"),
    "a buffer received into before it is computed on": (ATTEND, "  wait (o.1[0:4])\n", "", "slot reuse", "attend"),
    "a sum written over one that is leaving": (RING, "  wait (sent.1.0[0:1])\n", "", "slot reuse", "slot leaving.0.0"),
    "owners of a slot in the wrong order": (
        ATTEND,
        "value kv.3 float32[4, 2, 1, 1, 1] scratch in buffer.1\n",
        "value kv.3 float32[4, 2, 1, 1, 1] scratch in buffer.0\n",
        "slot reuse",
        "kv.3",
    ),
    "two results of a merge that change places in memory": (
        ATTEND.replace("output in running.o", "output in other").replace("output in running.l", "output in running.o"),
        "output in other",
        "output in running.l",
        "slot reuse",
        "has read l.to.3[0:4]",
    ),
    "a term of the sum left out": (
        SCATTER,
        "reduce add(sum.1[0:4], from.2[0:4]) => out[0:4]",
        "copy copy(sum.1[0:4]) => out[0:4]",
        "missing block",
        "x@2[0:4]",
    ),
    "a term of the sum added twice": (
        SCATTER,
        "add(sum.1[0:4], from.2[0:4])",
        "add(sum.1[0:4], from.2[0:4], from.2[0:4])",
        "block twice",
        "x@2[0:4]",
    ),
    "chunks that change places": (
        GATHER,
        "send -> 1 chunk.2 (out[8:12])",
        "send -> 1 chunk.2 (x[0:4])",
        "missing block",
        "x@2[0:4]",
    ),
    "a block computed by two ranks": (_with_extra("x[4:8]", 4), "", "", "computed twice", "extra[0:4]"),
    "work that nobody needs": (_with_extra("x[0:1]", 1), "", "", "not needed", "extra[0:1]"),
    "a block under another mask": (
        ATTEND,
        "compute attend(q[0:4], kv.1[0:4])",
        "compute attend{causal=true}(q[0:4], kv.1[0:4])",
        "missing block",
        "kv@4[0:4]",
    ),
    "log-sum-exps that change places": (
        ATTEND,
        "merge_lse(o.to.0[0:4], l.to.0[0:4], o.1[0:4], l.1[0:4])",
        "merge_lse(o.to.0[0:4], l.1[0:4], o.1[0:4], l.to.0[0:4])",
        "wrong sum",
        "different blocks",
    ),
    "another sum than the goal's": (
        SCATTER,
        "reduce add(sum.1[0:4], from.2[0:4])",
        "reduce maximum(sum.1[0:4], from.2[0:4])",
        "wrong sum",
        "already a sum by add",
    ),
    "a sum of unequal rows": (
        SCATTER,
        "add(x[0:4], from.1[0:4])",
        "add(x[0:3], from.1[0:4])",
        "wrong sum",
        "equally many",
    ),
    "an output without a goal": (
        SCATTER,
        "goal 1 out[0:4] = add: x@0[4:8] + x@1[4:8] + x@2[4:8]\n",
        "",
        "no goal",
        "rank 1, value out",
    ),
    "a goal for rows that do not exist": (SCATTER, "goal 1 out[0:4]", "goal 1 out[0:9]", "goal", "out[0:9]"),
}


@pytest.mark.parametrize("name", list(BREAKS))
def test_check_refuses(name):
    text, old, new, kind, words = BREAKS[name]
    assert old in text
    schedule = parse(text.replace(old, new, 1) if old else text)
    with pytest.raises(ScheduleError) as caught:
        check(schedule)
    assert caught.value.kind == kind and words in str(caught.value)


def test_every_kind_of_refusal_is_covered_here():
    assert len({kind for *_, kind, _ in BREAKS.values()}) >= 20


def test_a_send_that_must_wait_for_its_receive_can_deadlock():
    """Both ranks send before they reach their receive: right with buffered sends, stuck without."""
    lines = []
    for rank in (0, 1):
        lines += [f"rank {rank}", "lane a", f"  send -> {1 - rank} t (x[0:2]) => sent[0:1]", "lane b"]
        lines += ["  wait (sent[0:1])", f"  recv <- {1 - rank} t => out[0:2]"]
    values = ["value x float32[2] input", "value out float32[2] output", "value sent token[1] scratch"]
    goals = ["goal 0 out[0:2] = x@1[0:2]", "goal 1 out[0:2] = x@0[0:2]"]
    schedule = parse("\n".join(["schedule swap", "world 2", *values, *goals, *lines]))
    check(schedule)
    problem = find_problems(schedule, rendezvous=True)[0]
    assert problem.kind == "deadlock" and "when sends wait for their receive" in problem.text
    with pytest.raises(local.Stuck):
        local.run(schedule, [{"x": torch.ones(2)}] * 2, rendezvous=True)


def test_transports_without_tags_need_messages_in_order():
    """NCCL would give the second message to the first receive; with tags the schedule is right."""
    first, second = "  recv <- 2 chunk.2 => out[8:12]\n", "  recv <- 2 chunk.1 => out[4:8]\n"
    schedule = parse(GATHER.replace(first + second, second + first))
    assert out_of_order(build(parse(GATHER))) == []
    (problem,) = out_of_order(build(schedule))
    assert problem.kind == "message order" and problem.rank == 2 and "rank 0, lane from_previous" in problem.text


def test_all_faults_are_named_at_once():
    schedule = parse(
        GATHER.replace("chunk.0 (x[0:4])", "chunk.0 (x[0:3])").replace("chunk.1 (x[0:4])", "chunk.1 (z[0:4])")
    )
    with pytest.raises(
        ScheduleError, match="unknown value: rank 1, lane to_next, action 0 `send -> 2 chunk.1"
    ) as caught:
        check(schedule)
    assert {problem.kind for problem in caught.value.problems} == {"unknown value"}
    assert caught.value.problems[0].rank == 1 and caught.value.problems[0].lane == "to_next"


def test_what_check_calls_early_reuse_really_corrupts(seed):
    """Without the guards of its buffers, some interleaving of the ring gives a wrong answer."""
    text = RING
    for line in {line for line in RING.splitlines(keepends=True) if line.startswith("  wait (")}:
        text = text.replace(line, "")
    schedule, inputs = parse(text), [{"x": torch.randint(-4, 5, (20, 2)).float()} for _ in range(5)]
    assert find_problems(schedule)[0].kind == "slot reuse"
    want = sum(i["x"] for i in inputs)
    runs = [torch.cat([o["out"] for o in local.run(schedule, inputs, seed=seed + i)]) for i in range(40)]
    assert not all(torch.equal(got, want) for got in runs)
