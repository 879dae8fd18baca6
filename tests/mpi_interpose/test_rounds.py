"""Messages that one MPI_Waitall completes are timed as a round, and only where the time is the round's own."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from mpis import PROGRAMS, Install, start

from undertow.mpi_interpose import core, launch, measure

TABLE = "".join(f"{use}_local strided 4 16 {size} 9 1 1\n" for use in ("send", "recv") for size in (2048, 4096))


def checked(install: Install, how: str, folder: Path) -> tuple[list[dict], dict]:
    """What the timed calls and rounds of a run said, and the whole report."""
    table, report = folder / "table.txt", folder / how
    table.write_text(TABLE)
    program = [str(install.python), str(PROGRAMS / "rounds.py"), how]
    assert "ok" in start(install, 2, program, "auto", report, UNDERTOW_MPI_MODEL=str(table))
    merged = launch.merge(sorted(folder.glob(f"{how}.[01].json")), folder / f"{how}-merged.json")
    for row in merged["types"]:
        assert sum(row[use]["taken"] + row[use]["passed"] for use in ("send", "recv")) == 2 * 2 * 1024
    return [one for row in merged["types"] for one in row["checked"]], merged


@pytest.mark.slow
def test_rounds_that_one_waitall_completes_are_timed_both_ways(pympi: Install, tmp_path: Path) -> None:
    found, merged = checked(pympi, "waitall", tmp_path)
    assert {(one["use"], one["of"]) for one in found} == {("send", "rounds"), ("recv", "rounds")}
    # Of 1,023 rounds after the first: two trials of 36, a third of them the library's way. The table takes all that
    # can be, so the others were ours; in the second trial a way that lost much in the first is not gone again.
    assert all(sum(one["samples"]) == 72 and 24 <= one["samples"][0] <= 60 for one in found), found
    assert {one["decision"] for one in found} <= {"library", "ours"}
    assert all(min(one["ps_per_byte"]) > 0 for one in found)
    # What is timed goes one way as a whole: on each rank the sends and the receives have as many samples.
    for rank in (0, 1):
        types = json.loads((tmp_path / f"waitall.{rank}.json").read_text())["types"]
        assert len({tuple(one["samples"]) for row in types for one in row["checked"]}) == 1
    assert any("send in rounds" in line for line in measure.corrections(merged, merged["types"][0]["plan"]))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["wait", "late"])
def test_other_completions_are_not_timed(pympi: Install, how: str, tmp_path: Path) -> None:
    found, _ = checked(pympi, how, tmp_path)
    assert found == []


class Rounds:
    """One trial of the core, on a machine where a round takes `ns` of each way (library, table, all)."""

    def __init__(self) -> None:
        self._lib = core.load()
        self._lib.undertow_core_trial.restype = ctypes.c_void_p
        self._at = ctypes.c_void_p(self._lib.undertow_core_trial())

    def run(self, times: int, ns: Sequence[int], first_ns: int = 0) -> list[tuple[int, bool]]:
        """(way, timed) of each round; the first after a change of way takes `first_ns` longer."""
        seen: list[tuple[int, bool]] = []
        for _ in range(times):
            choice = self._lib.undertow_core_trial_next(self._at)
            way, timed = choice & 3, bool(choice & 4)
            new = not seen or seen[-1][0] != way
            seen.append((way, timed))
            self._lib.undertow_core_trial_done(self._at, ctypes.c_int64(ns[way] + (first_ns if new else 0)))
        return seen

    def put_off(self, rounds: int) -> None:
        self._lib.undertow_core_trial_put_off(self._at, rounds)


LIBRARY, TABLED, ALL = 0, 1, 2


@pytest.mark.parametrize(
    ("ns", "chosen"),
    [
        ((1000, 900, 700), ALL),
        ((1000, 700, 900), TABLED),
        ((1000, 1100, 1300), LIBRARY),
        ((1000, 990, 980), LIBRARY),  # not worth it
        ((1000, 940, 920), TABLED),  # in doubt what was taken before
        ((1000, 1080, 800), ALL),  # one side loses, both win
    ],
)
def test_a_trial_takes_the_best_way(ns: tuple[int, int, int], chosen: int) -> None:
    rounds = Rounds()
    seen = rounds.run(40 + 512, ns, first_ns=5000)
    assert seen[:4] == [(TABLED, False)] * 4
    assert [way for way, timed in seen if timed] == [LIBRARY] * 3 + [TABLED] * 3 + [ALL] * 3 + 3 * (
        [LIBRARY] * 3 + [TABLED] * 3 + [ALL] * 3
    )
    assert seen[40:] == [(chosen, False)] * 512


def test_ranks_stay_in_step_whatever_they_measure() -> None:
    a, b = Rounds(), Rounds()
    one, other = a.run(30_000, (1000, 900, 5000)), b.run(30_000, (1000, 2000, 300))
    assert [timed for _, timed in one] == [timed for _, timed in other]
    assert sum(timed for _, timed in one) == 6 * 36  # at rests of 512, 1024, ... rounds
    hopeless = [way for way, timed in one[40:] if timed]
    assert ALL not in hopeless and {LIBRARY, TABLED} == set(hopeless)


def test_a_trial_begins_again_where_rounds_change() -> None:
    rounds = Rounds()
    rounds.run(20, (1000, 10, 10))
    rounds.put_off(64)
    seen = rounds.run(64 + 36, (1000, 2000, 3000))  # the times of before do not count
    assert [timed for _, timed in seen] == [False] * 64 + [True] * 36
    assert rounds.run(512, (1000, 2000, 3000)) == [(LIBRARY, False)] * 512


@pytest.mark.slow
def test_a_round_goes_all_one_way_and_packs_what_the_table_leaves_alone_only_if_that_wins(
    pympi: Install, tmp_path: Path
) -> None:
    # By this table receives alone are not worth it; in a trial they are packed, and afterwards as the trial says.
    table = tmp_path / "table.txt"
    table.write_text("".join(f"recv_local strided 4 16 {size} 1 1 1\n" for size in (2048, 4096)))
    program = [str(pympi.python), str(PROGRAMS / "rounds.py"), "waitall"]
    assert "ok" in start(pympi, 2, program, "auto", tmp_path / "report", UNDERTOW_MPI_MODEL=str(table))
    for rank in (0, 1):
        types = json.loads((tmp_path / f"report.{rank}.json").read_text())["types"]
        assert sum(row["send"]["taken"] for row in types) == 0
        # 1,024 rounds: one before, 4 of rest, a trial of 36, 512 of rest, a trial of 36, 435 of rest.
        for row in types:
            assert row["recv"]["taken"] + row["recv"]["passed"] == 1024
            (checked,) = row["checked"]
            between = row["recv"]["taken"] - checked["samples"][1]
            assert checked["samples"][1] >= 12 and sum(checked["samples"]) == 72
            assert between in ((435, 947) if checked["decision"] == "ours" else (0, 512)), (between, checked)
