"""Accumulation, precision and clipping with every way of sharing the work: the gradient is that of one process.

Each case is one update of the main job on real ranks. Its whole clipped gradient, gathered from all axes, is compared
with that of a single process in float64 that does nothing special; then runs that stop between updates and go on from
their checkpoint must be bit-identical to those that do not stop.
"""

from __future__ import annotations

import itertools
import sysconfig
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor

from undertow.dist import launch
from undertow.dist.errors import UserError
from undertow.dist.trace import Trace
from undertow.examples.precision import Precision
from undertow.examples.recipes import tiny
from undertow.examples.systems import Systems
from undertow.examples.train import Run, train

DATA = Path(sysconfig.get_paths()["stdlib"]) / "asyncio"
CPU = torch.device("cpu")
SHARED = {
    "data": {},
    "context": {"context_parallel": 2},
    "tensor": {"tensor_parallel": 2, "overlap": "on"},
    "both": {"context_parallel": 2, "tensor_parallel": 2, "overlap": "on"},
}
# Relative error of the whole gradient (2-norm) and of its norm against float64: about the rounding of the type (2^-24,
# 2^-11, 2^-9) times the square root of the few dozen roundings on the way through two layers. What is looked for, an
# axis counted twice, left out, or averaged after clipping, is an error of a third and more.
NOISE = {"fp32": 2e-6, "fp16": 2e-3, "bf16": 1.5e-2, "pure-bf16": 2e-2}
TOO_LARGE = 2.0**20  # a loss scale at which sums of fp16 gradients, about 0.1 unscaled, pass the largest fp16, 65504
CLIP = 0.25  # well below the norm of every gradient here, so that clipping always acts

Case = tuple[str, str, int, bool]  # (sharing, precision, accumulate, stream)


def pairwise(*factors: tuple) -> list[tuple]:
    """A greedy set of cases in which every pair of values of any two factors is found together."""
    places = list(itertools.combinations(range(len(factors)), 2))
    missing = {(i, j, a, b) for i, j in places for a in factors[i] for b in factors[j]}
    cases = []
    while missing:
        best = max(
            itertools.product(*factors), key=lambda case: sum((i, j, case[i], case[j]) in missing for i, j in places)
        )
        missing -= {(i, j, best[i], best[j]) for i, j in places}
        cases.append(best)
    return cases


def config(precision: str, accumulate: int, steps: int = 1):
    return replace(
        tiny(), steps=steps, precision=precision, accumulate=accumulate, clip=CLIP, checkpoint_every=100, eval_bytes=512
    )


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().double()


def gradient(run: Run) -> torch.Tensor:
    """After an update: all clipped gradients, by name, as one vector; collective."""
    return torch.cat([whole(p.grad).flatten() for _, p in sorted(run.model.named_parameters())])  # type: ignore[arg-type]


def updates(rank: int, world: int, cases: list[Case]) -> list[tuple]:
    here, found = launch.detect(), []
    for sharing, precision, accumulate, stream in cases:
        systems = Systems(stream=stream, **SHARED[sharing])
        run = Run(config(precision, accumulate), Path("unused"), DATA, here, CPU, systems)
        loss, norm = run.step(0)
        found.append((loss.item(), norm.item(), gradient(run).numpy()))
        run.parallel.close()
    return found


def truth(rank: int, world: int) -> tuple:
    """One process, float64, torch's own clipping; rows in one backward pass."""
    run = Run(config("fp32", 1), Path("unused"), DATA, launch.detect(), CPU)
    run.model.double()
    window = run.corpus.batch(seed=0, step=0, rows=slice(0, 4), batch=4, length=run.config.length)
    loss = run.model(window[:, :-1], window[:, 1:])
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), CLIP)
    return loss.item(), norm.item(), gradient(run).numpy()


CASES = pairwise(("data", "context", "tensor"), tuple(NOISE), (1, 2), (False, True))
FOUR: list[Case] = [  # data × tensor, data × context, context × tensor
    ("tensor", "fp16", 2, True),
    ("context", "bf16", 2, False),
    ("both", "pure-bf16", 2, True),
    ("both", "fp16", 4, False),
]


def test_pairs_are_covered():
    for (i, a), (j, b) in itertools.combinations(enumerate([list(SHARED)[:3], NOISE, (1, 2), (False, True)]), 2):
        assert {(x, y) for x in a for y in b} == {(case[i], case[j]) for case in CASES}


@pytest.mark.slow
@pytest.mark.parametrize(("world", "cases"), [(2, CASES), (4, FOUR)])
def test_one_update_is_that_of_one_process(ranks, world, cases):
    [(loss, norm, expected)] = ranks(1, truth)
    assert norm > 4 * CLIP
    for mine in ranks(world, updates, cases, timeout_s=300):
        for case, (found_loss, found_norm, found) in zip(cases, mine, strict=True):
            noise = NOISE[case[1]]
            error = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
            assert abs(found_loss - loss) < noise * loss, case
            assert abs(found_norm / norm - 1) < noise, case
            assert error < noise, (case, error)


def broken_off(rank: int, world: int, folder: Path, cases: list[Case]) -> list[tuple]:
    """Four updates at one go; and two, then two more by a new process's objects from the checkpoint."""
    here, found = launch.detect(), []
    for number, (sharing, precision, accumulate, stream) in enumerate(cases):
        ends = []
        for name, stops in (("straight", (4,)), ("broken", (2, 4))):
            out = folder / f"{number}-{name}"
            for stop in stops:
                systems = Systems(stream=stream, **SHARED[sharing])
                run = Run(config(precision, accumulate, stop), out, DATA, here, CPU, systems)
                scaler = run.precision.scaler
                if scaler is not None:  # so large that the first updates overflow and are left out
                    scaler._init_scale = TOO_LARGE
                with Trace(out / f"trace-{rank}.json", rank) as trace:
                    result = train(run, resume=stop == 4 and len(stops) == 2, checkpoints=True, trace=trace)
                run.parallel.close()
                assert result is not None
                ends.append((result.state_hash, scaler.state_dict() if scaler is not None else None))
        found.append((ends[0], ends[-1], ends[1]))
    return found


@pytest.mark.slow
def test_stopped_between_updates_and_resumed_is_bit_identical(ranks, tmp_path):
    cases: list[Case] = [("tensor", "fp16", 2, False), ("context", "pure-bf16", 2, True)]
    for mine in ranks(2, broken_off, tmp_path, cases, timeout_s=300):
        for case, (straight, resumed, half_way) in zip(cases, mine, strict=True):
            assert resumed == straight, case
            assert half_way[0] != straight[0]
            if case[1] == "fp16":
                assert half_way[1]["scale"] < TOO_LARGE, (
                    "no update overflowed: the scaler's state is not put to the test"
                )


def one_overflows(rank: int, world: int) -> tuple:
    run = Run(config("fp16", 1), Path("unused"), DATA, launch.detect(), CPU, Systems(**SHARED["tensor"]))
    before = [whole(p) for p in run.model.parameters()]
    reduce = run.parallel.reduce

    def reduce_and_break() -> None:
        reduce()
        if rank == 1:
            run.parallel._shards[0].grad.to_local()[0, 0] = float("inf")  # type: ignore[union-attr]

    run.parallel.reduce = reduce_and_break  # type: ignore[method-assign]
    run.step(0)
    kept = all(torch.equal(a, whole(p)) for a, p in zip(before, run.model.parameters()))
    assert run.precision.scaler is not None
    scale = run.precision.scaler.get_scale()
    run.parallel.close()
    return kept, scale


def test_an_overflow_on_one_rank_skips_the_update_on_all(ranks):
    assert ranks(2, one_overflows) == [(True, 2.0**15)] * 2


def three_parts_of_four_rows(rank: int, world: int) -> None:
    with pytest.raises(UserError, match="3 backward passes each.*pass --batch 6"):
        Run(config("fp32", 3), Path("unused"), DATA, launch.detect(), CPU)


def test_wrong_values_are_named(ranks):
    with pytest.raises(UserError, match="expected one of auto, fp32"):
        Precision.of("int8", CPU)
    ranks(1, three_parts_of_four_rows)
