"""The gate: what the model proposes, what measurements decide, and what it says."""

from __future__ import annotations

import random

import pytest
import torch

from undertow.benchmarks.intervals import interval_rank
from undertow.comms.chunk_plan import ChunkPlan
from undertow.dist.machine import Link, Machine
from undertow.parallel import overlap_queueing
from undertow.parallel.overlap_arms import (
    ARMS,
    COLUMN_ARMS,
    CUDA_ARMS,
    PANEL_ARMS,
    ROW_ARMS,
    SEQUENTIAL,
    cut,
    fewer_reads,
    in_columns,
    narrow,
)
from undertow.parallel.overlap_gate import AGAIN, ROUNDS, ROW, Gate, Rates, surely, trial_calls
from undertow.parallel.overlap_queueing import Queueing

MACHINE = Machine("made up", links={"gloo": Link(1e-4, 1e9)}, flops={"gemm/float32": 1e11})


def play(gate: Gate, seconds, calls: int = 60, predict=None) -> None:
    """Calls whose arm number a takes seconds(a)."""
    for _ in range(calls):
        arm = gate.choose("p", predict)
        if gate.measuring("p"):
            gate.took("p", arm, seconds(arm))


def alone(mine: torch.Tensor) -> list[torch.Tensor]:
    return [mine]


@pytest.mark.parametrize("best", [1, 2, 3])
def test_the_fastest_arm_is_kept_and_shown(best):
    gate = Gate(ARMS, alone)
    play(gate, lambda arm: 0.5 if arm == best else 1.0)
    assert gate.chosen() == ARMS[best]
    assert (
        f"p: {ARMS[best].name} (measured; " in gate.explain() and f"{ARMS[best].name}: measured 2.00×" in gate.explain()
    )


def test_an_arm_that_cannot_run_a_product_is_left_out():
    gate = Gate(CUDA_ARMS, alone)
    for key, can, best in (("narrow", lambda arm: not arm.columns, 3), ("wide", lambda arm: True, 5)):
        tried = set()
        for _ in range((ROUNDS + 1) * len(CUDA_ARMS) + 1):
            arm = gate.choose(key, can=can)
            if gate.measuring(key):
                tried.add(arm)
                gate.took(key, arm, 1.0 / (1 + arm) if arm <= 5 else 2.0)
        assert gate.choose(key) == best
        assert tried == {at for at, arm in enumerate(CUDA_ARMS) if at == 0 or can(arm)}


def test_sequential_stays_where_overlap_wins_little_or_only_sometimes():
    gate = Gate(ARMS, alone)
    play(gate, lambda arm: 0.98 if arm else 1.0)
    assert gate.chosen() == SEQUENTIAL
    gate, calls = Gate(ARMS[:2], alone), [0]

    def sometimes(arm: int) -> float:  # much faster in three rounds of five
        calls[0] += arm
        return 1.0 if arm == 0 else (0.5 if calls[0] % 2 == 0 else 1.5)

    play(gate, sometimes)
    assert gate.chosen() == SEQUENTIAL


def test_the_slowest_rank_decides(seed):
    """Each rank would choose another arm; together they choose the one whose slowest rank is fastest."""
    slow = torch.ones(1, 3, ROUNDS, dtype=torch.float64)
    slow[:, 2] = 4.0  # another rank, for which the last arm is slow

    gate = Gate(ARMS[:3], lambda mine: [mine, slow * 0.6])
    play(gate, lambda arm: [1.0, 0.7, 0.2][arm])
    assert gate.chosen() == ARMS[1]


def test_noise_does_not_switch_it_on(seed):
    """Equal arms with 10 % noise: rarely more than a coin that falls alike in 4 of 5 rounds and by 3 % allows."""
    numbers, on = random.Random(seed), 0
    for _ in range(300):
        gate = Gate(ARMS[:2], alone)
        play(gate, lambda arm: numbers.gauss(1.0, 0.1), calls=2 * ROUNDS + 3)
        on += gate.chosen() != SEQUENTIAL
    assert on / 300 < 0.25  # P(≥ 4 of 5 heads) = 0.19


@pytest.mark.parametrize(
    "later, chosen",
    [
        ({1: 0.9, 2: 1.0}, ARMS[1]),
        ({1: 1.0, 2: 0.9}, ARMS[2]),  # the second of the first calls
        ({1: 1.0, 2: 1.0}, SEQUENTIAL),  # both were lucky
        ({1: 0.98, 2: 0.98}, SEQUENTIAL),  # sure, but little
        ({1: (0.8,) * 13 + (1.0,) * 7, 2: 1.0}, SEQUENTIAL),  # much in the median, but not sure
        ({1: (0.8,) * 14 + (1.0,) * 6, 2: 1.0}, SEQUENTIAL),
        ({1: (0.8,) * 15 + (1.0,) * 5, 2: 1.0}, ARMS[1]),  # P(≤ 5 of 20 heads) = 0.02
    ],
)
def test_a_short_product_is_measured_again_and_taken_only_for_sure(later, chosen):
    gate, calls = Gate(ARMS[:4], alone, short_s=2.0), [0] * 4

    def seconds(arm: int) -> float:
        calls[arm] += 1
        if calls[arm] <= ROUNDS + 1:
            return [1.0, 0.7, 0.8, 0.9][arm]
        assert gate.again("p") and arm != 3  # two beside the sequential one
        shown = later.get(arm, 1.0)
        return shown if isinstance(shown, float) else (1.0, *shown)[calls[arm] - ROUNDS - 2]  # the first warms up

    play(gate, seconds, calls=trial_calls(4))
    assert gate.chosen() == chosen and calls == [ROUNDS + AGAIN + 2] * 3 + [ROUNDS + 1]
    assert "surely" in gate.explain() and "overlap, 4 pieces: measured 1.11×" in gate.explain()


def test_two_callers_that_take_turns_meet_both_arms_alike():
    """One of them takes twice as long as the other, by either arm: no reason to choose one."""
    gate, calls = Gate(ARMS[:2], alone, short_s=10.0), [0]

    def seconds(_arm: int) -> float:
        calls[0] += 1
        return 2.0 if calls[0] % 2 else 1.0

    play(gate, seconds, calls=trial_calls(2))
    assert gate.chosen() == SEQUENTIAL


@pytest.mark.parametrize("in_a_row, chosen", [(1.0, SEQUENTIAL), (1.3, SEQUENTIAL), (0.7, ARMS[1])])
def test_a_short_product_must_gain_in_a_row_too(in_a_row, chosen):
    gate, rows = Gate(ARMS[:2], alone, short_s=1.0), set()
    for _ in range(trial_calls(2)):
        arm = gate.choose("p")
        if gate.measuring("p"):
            rows.add(gate.row("p"))
            gate.took("p", arm, (1e-4, 7e-5)[arm], (1e-4, 1e-4 * in_a_row)[arm] if gate.row("p") else 0.0)
    assert gate.chosen() == chosen and rows == {0, ROW}
    slow, rows = Gate(ARMS[:2], alone, short_s=4e-3, again_s=1.0), set()
    for seconds, row in ((7e-4, 2), (1.5e-3, 0), (5e-3, 0)):
        for _ in range(2 * (ROUNDS + 1) + 1):
            slow.took(seconds, slow.choose(seconds), seconds if slow.choose(seconds) == 0 else seconds / 2)
        assert slow.again(seconds) and slow.row(seconds) == row


@pytest.mark.parametrize("sure, chosen", [(False, ARMS[1]), (True, SEQUENTIAL)])
def test_a_longer_product_is_measured_again_and_its_best_arm_need_not_be_sure(sure, chosen):
    """In the first calls another arm is the fastest, by luck; the win of 5 % is in 13 of 20 rounds."""
    gate, calls = Gate(ARMS[:4], alone, short_s=2.0 if sure else 0.5, again_s=2.0), [0] * 4

    def seconds(arm: int) -> float:
        calls[arm] += 1
        if calls[arm] <= ROUNDS + 1:
            return [1.0, 0.8, 0.7, 0.9][arm]
        return [1.0, 0.95 if calls[arm] % 20 < 13 else 1.02, 0.98, 0.9][arm]

    play(gate, seconds, calls=trial_calls(4))
    assert gate.again("p") and gate.chosen() == chosen and calls == [ROUNDS + AGAIN + 2] * 3 + [ROUNDS + 1]


def test_only_short_products_with_hope_are_measured_again():
    for sequential_s, arm_s, chosen in ((2.0, 1.0, ARMS[1]), (1.0, 1.1, SEQUENTIAL)):
        gate, calls = Gate(ARMS[:2], alone, short_s=2.0), []
        play(gate, lambda arm: calls.append(arm) or (arm_s if arm else sequential_s))  # noqa: B023 - played here
        assert gate.chosen() == chosen and len(calls) == 2 * (ROUNDS + 1) and not gate.again("p")


def test_noise_hardly_ever_switches_a_short_product_on(seed):
    """The better of twelve equal arms with 10 % noise: one-sided 95 % of two arms, in new calls, allows 10 %."""
    numbers, on = random.Random(seed), 0
    for _ in range(200):
        gate = Gate(CUDA_ARMS, alone, short_s=2.0)
        play(gate, lambda arm: numbers.gauss(1.0, 0.1), calls=trial_calls(len(CUDA_ARMS)))
        on += gate.chosen() != SEQUENTIAL
    assert on / 200 < 0.15


def test_what_a_median_surely_exceeds_is_the_end_of_its_interval(seed):
    numbers = random.Random(seed)
    for n in range(5, 40):
        samples = [numbers.random() for _ in range(n)]
        assert surely(samples) == sorted(samples)[interval_rank(n, 0.9) - 1]  # 5 % on each side


def test_a_model_prunes_and_is_not_believed():
    rates = Rates.of(MACHINE, "float32", "cpu")
    assert rates == Rates(1e11, 1e9, 1e-4) and Rates.of(MACHINE, "bfloat16", "cpu") is None

    def predict(flops: float, nbytes: float):
        return lambda arm: rates.seconds(arm, 4, flops, nbytes)

    small = Gate(ARMS, alone)  # messages cost more than there is to hide
    play(small, lambda arm: pytest.fail("nothing to measure"), predict=predict(1e5, 1e2))
    assert small.chosen() == SEQUENTIAL and "nothing to hide, by the model" in small.explain()
    some = Gate(ARMS, alone)  # four pieces' messages cost more than they hide, one piece's do not
    play(some, lambda arm: {0: 1.0, 1: 0.5}[arm], predict=predict(5e7, 3e5))
    assert some.chosen() == ARMS[1]
    large = predict(1e10, 1e8)
    gains = [large(SEQUENTIAL) / large(arm) for arm in ARMS[:4]]
    assert gains[0] == 1.0 and 1.5 < max(gains) < 2.0 and max(gains) == gains[3]
    for truth, expected in ((0.6, ARMS[3]), (1.2, SEQUENTIAL)):  # the model says 1.9×; the measurement decides
        gate, tried = Gate(ARMS[:4], alone), set()

        def seconds(arm: int, truth: float = truth, tried: set = tried) -> float:
            tried.add(arm)
            return [1.0, 1.1, 1.1, truth][arm]

        play(gate, seconds, predict=large)
        assert gate.chosen() == expected and tried == {0, 1, 2, 3} and "predicted 1." in gate.explain()


def test_a_fixed_arm_is_never_measured():
    gate = Gate(ARMS, alone, fixed=2, why="as asked for")
    play(gate, lambda arm: pytest.fail("measured"))
    assert gate.explain() == f"p: {ARMS[2].name} (as asked for)"


def test_columns_are_tried_where_the_first_operand_is_the_smaller():
    """Against numbers written down by hand: 8 ranks of 255 rows, K 16384, N 8192, in bf16."""
    sizes, k, n = (255,) * 8, 16384, 8192
    eight = COLUMN_ARMS[2]
    rows = ChunkPlan(4, sizes, 1)
    assert rows.reads(k, n) == 2040 * k + 8 * k * n
    assert cut(eight, 4, sizes, n).reads(k, n) == 8 * 1785 * k + 255 * k + 2 * k * n + k * n  # around the own rows
    assert cut(eight, 0, sizes, n).reads(k, n) == 8 * 1785 * k + 255 * k + k * n + k * n
    assert [fewer_reads(arm, sizes, k, n, 2) for arm in COLUMN_ARMS] == [True, True, True]
    assert not fewer_reads(eight, sizes, k, 1024, 2)  # the second operand is the smaller
    assert fewer_reads(eight, (511,) * 8, k, n, 2) and not fewer_reads(eight, (512,) * 8, k, n, 2)  # operations enough
    assert [narrow(arm, 2048) for arm in (*ROW_ARMS, *COLUMN_ARMS)] == [False] * 5 + [True]
    assert not any(fewer_reads(arm, (255,), k, n, 2) for arm in COLUMN_ARMS)  # one rank sends nothing
    whole = PANEL_ARMS[1]
    assert cut(whole, 4, sizes, n).reads(k, n) == 4 * 2040 * k + k * n and fewer_reads(whole, sizes, k, n, 2)
    assert Rates(1e15, 1e11, 0.0).seconds(whole, 8, 1e12, 1e8) == pytest.approx(1e-3 * (1 + 1 / 4))
    for gpu, summed, wanted in ((False, False, eight), (True, False, whole), (True, True, eight), (False, True, eight)):
        more = {"gpu": gpu, "summed": summed}
        assert [arm for arm in (eight, whole) if in_columns(arm, sizes, k, n, 2, **more)] == [wanted]
        assert in_columns(wanted, sizes, k, 2048, 2, **more) == (gpu or summed)  # eight read more than rows then
        assert in_columns(wanted, sizes, k, 2047, 2, **more) == summed  # four of 511 columns are narrow for a GPU
        assert in_columns(wanted, (512,) * 8, k, n, 2, **more) == summed
    rates, slow = Rates(1e15, 1e11, 0.0), Rates(1e15, 1e11, 0.0, 1e12)
    seconds = {
        arm: [each.seconds(arm, 8, 1e12, 1e8, 2.0 * cut(arm, 4, sizes, n).reads(k, n)) for each in (rates, slow)]
        for arm in (ARMS[1], eight)
    }
    ratio = 0.95 * 8 / 7
    first = (ratio - 1) / (ratio**8 - 1)  # the share of the first piece
    assert seconds[ARMS[1]][0] == pytest.approx(1e-3 * (1 + 1 / 8))
    assert seconds[eight][0] == pytest.approx(1e-3 * (1 + 7 / 8 * first), rel=1e-3)
    assert seconds[ARMS[1]][1] > 1.25 * seconds[eight][1]  # where memory is slow


def test_what_pieces_cost_the_host_is_measured_by_few_and_many_of_them():
    """A call takes 5 s and 3 more for each of its pieces; every second one, with the first, is disturbed."""

    class Engine:
        world, device, rank = 3, torch.device("cpu"), 0

        def __init__(self) -> None:
            self.now_s, self.calls = 0.0, 0

        def plan(self, sizes: tuple[int, ...], subchunks: int) -> ChunkPlan:
            return ChunkPlan(self.rank, sizes, subchunks)

        def reduce_scatter(self, plan: ChunkPlan, product, y: torch.Tensor) -> None:
            product(0, plan.rows)
            assert y.abs().sum() == 0
            self.now_s += 5 + 3 * len(plan.scatter_order) + 100 * (self.calls % 2 == 0)
            self.calls += 1

    engine = Engine()
    found = overlap_queueing.measure(engine, lambda: engine.now_s, lambda: engine.now_s)  # type: ignore[arg-type]
    assert found == Queueing(5.0, 3.0) and engine.calls == 2 * overlap_queueing.CALLS
    assert Queueing.of(2.0, 1.0, 3) == Queueing(2.0, 0.0)  # noise is no gain


def test_no_arm_takes_less_than_the_host_needs_to_queue_it():
    """8 ranks: 1 ms of product, 1 ms of link, 50 us for a piece and 100 for a call; a replay is one launch."""
    slow, none = (Rates(1e15, 1e11, 0.0, queueing=each) for each in (Queueing(100e-6, 50e-6), Queueing()))
    for arm in CUDA_ARMS:
        device_s, found_s = none.seconds(arm, 8, 1e12, 1e8), slow.seconds(arm, 8, 1e12, 1e8)
        if not arm.overlap or arm.replayed:
            assert found_s == device_s
        else:
            pieces = arm.subchunks + (not arm.whole) if arm.columns else 8 * arm.subchunks
            assert found_s == pytest.approx(max(device_s, 100e-6 + pieces * 50e-6))
    gate = Gate(CUDA_ARMS, alone)  # what the host cannot queue in time is not tried
    play(gate, lambda arm: 1.0, calls=1, predict=lambda arm: slow.seconds(arm, 8, 1e11, 1e7))
    tried = {CUDA_ARMS[arm].name for arm in gate._trials["p"].arms}
    assert tried == {"sequential", *(arm.name for arm in CUDA_ARMS if arm.replayed)}
