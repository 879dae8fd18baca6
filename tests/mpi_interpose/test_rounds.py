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
    # Of 1,023 rounds after the first: two trials of 9 to 36, a third of them or more the library's way. The table takes
    # all that can be, so the others were ours, until they promised nothing.
    for one in found:
        library, ours = one["samples"]
        assert 18 <= library + ours <= 72 and (library + ours) % 9 == 0 and library >= 6 and ours >= 6, found
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

    def run(self, times: int, ns: Sequence[int], first_ns: int = 0, tables: bool = True) -> list[tuple[int, bool]]:
        """(way, timed) of each round; the first after a change of way takes `first_ns` longer."""
        seen: list[tuple[int, bool]] = []
        for _ in range(times):
            choice = self._lib.undertow_core_trial_next(self._at)
            way, timed = choice & 3, bool(choice & 4)
            new = not seen or seen[-1][0] != way
            seen.append((way, timed))
            self._lib.undertow_core_trial_done(self._at, ctypes.c_int64(ns[way] + (first_ns if new else 0)), tables)
        return seen

    def put_off(self, rounds: int) -> None:
        self._lib.undertow_core_trial_put_off(self._at, rounds)


LIBRARY, TABLED, ALL = 0, 1, 2


def turn(table: int = TABLED, everything: int = ALL) -> list[int]:
    """The ways of one turn; one that was given up is replaced."""
    return [LIBRARY] * 3 + [table] * 3 + [everything] * 3


@pytest.mark.parametrize(
    ("ns", "chosen", "turns"),
    [
        ((1000, 900, 700), ALL, [turn()] * 4),
        ((1000, 700, 900), TABLED, [turn()] * 4),
        ((1000, 700, 1100), TABLED, [turn()] + [turn(everything=TABLED)] * 3),
        ((1000, 1100, 1300), LIBRARY, [turn()] + [turn(everything=TABLED)] * 3),  # the table has known better so far
        ((1000, 1120, 1300), LIBRARY, [turn()]),
        ((1000, 1120, 800), ALL, [turn()] + [turn(table=LIBRARY)] * 3),  # one side loses, both win
        ((1000, 940, 920), TABLED, [turn()] * 4),  # in doubt what was taken before
        ((1000, 1000, 980), LIBRARY, [turn()] + [turn(everything=TABLED)] * 3),  # not worth it
    ],
)
def test_a_trial_takes_the_best_way_and_gives_up_what_promises_nothing(
    ns: tuple[int, int, int], chosen: int, turns: list[list[int]]
) -> None:
    rounds = Rounds()
    seen = rounds.run(40 + 512, ns, first_ns=5000)
    assert seen[:4] == [(TABLED, False)] * 4
    assert [way for way, timed in seen if timed] == [way for one in turns for way in one]
    assert seen[4 + 9 * len(turns) :] == [(chosen, False)] * (36 - 9 * len(turns) + 512)
    assert rounds.run(1, ns)[0][1]  # the next one begins where it would have after a whole trial


@pytest.mark.parametrize(("everything", "timed"), [(1000, 9), (980, 9), (1500, 9), (900, 36)])
def test_where_the_table_takes_nothing_the_library_s_way_is_tried_against_one_other(
    everything: int, timed: int
) -> None:
    rounds = Rounds()
    seen = rounds.run(40 + 512, (1000, 1000, everything), tables=False)
    assert sum(timed for _, timed in seen) == timed
    ways = [way for way, timed in seen if timed]
    assert ways == (turn() + 3 * turn(table=LIBRARY))[:timed]
    assert seen[-1] == (ALL if everything == 900 else LIBRARY, False)


def test_ranks_stay_in_step_whatever_they_measure() -> None:
    a, b, c = Rounds(), Rounds(), Rounds()
    one, other = a.run(30_000, (1000, 900, 700)), b.run(30_000, (1000, 800, 700))
    least = c.run(30_000, (1000, 2000, 3000))
    assert one == other and sum(timed for _, timed in one) == 6 * 36  # at rests of 512, 1024, ... rounds
    begins = [k for k in range(1, 30_000) if one[k][1] and not one[k - 1][1]]
    assert begins == [k for k in range(1, 30_000) if least[k][1] and not least[k - 1][1]]
    assert sum(timed for _, timed in least) == 6 * 9
    assert {way for way, timed in least[40:] if timed} == {LIBRARY}  # what lost much is not gone again


def test_a_trial_begins_again_where_rounds_change() -> None:
    rounds = Rounds()
    rounds.run(20, (1000, 10, 10))
    rounds.put_off(64)
    seen = rounds.run(64 + 36, (1000, 2000, 3000))  # the times of before do not count
    assert [timed for _, timed in seen] == [False] * 64 + [True] * 9 + [False] * 27
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
        # 1,024 rounds: one before, 4 of rest, two trials of 9 to 36 (in the first three receives or more are ours, and
        # six or more the library's; in the second, none where they lost much), and 512 and 435 of rest, longer where a
        # trial was short.
        for row in types:
            assert row["recv"]["taken"] + row["recv"]["passed"] == 1024
            (checked,) = row["checked"]
            library, ours = checked["samples"]
            between = row["recv"]["taken"] - ours
            assert ours >= 3 and library >= 12 and (library + ours) % 9 == 0 and library + ours <= 72
            if checked["decision"] == "ours":
                assert 435 <= between <= 974, (between, checked)
            else:
                assert between == 0 or 512 <= between <= 539, (between, checked)
