"""Messages that one MPI_Waitall completes are timed as a round, and only where the time is the round's own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from decisions import ALL, LIBRARY, TABLED, Trial, noise
from mpis import PROGRAMS, Install, start

from undertow.mpi_interpose import launch, measure

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
    # Of 1,023 rounds after the first: 9 to 372 of a trial, and three checks where it took something, without the first
    # of each row, whose time does not count. A third of a trial or more goes the library's way.
    for one in found:
        library, ours = one["samples"]
        assert 12 <= library + ours <= 2 * (CLOCKED + 12) and library >= 4 and ours >= 4, found
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


def turn(backwards: bool, table: int = TABLED, everything: int = ALL, row: int = 3) -> list[int]:
    """The ways of one turn; one that was given up is replaced."""
    ways = [LIBRARY] * row + [table] * row + [everything] * row
    return ways[::-1] if backwards else ways


QUICK, SLOW = 3 * 3, 3 * 5  # rounds of a turn
CLOCKED = 11 * 3 * 2 + 17 * 3 * 4  # those of a trial whose time counts: not the first of a row
WHOLE = 11 * 2 * QUICK + 17 * 4 * SLOW  # of a trial: the chosen way goes as many after each turn, and later three times
NEXT = 4 + WHOLE + 3 * 6 + 512  # where the second one begins


@pytest.mark.parametrize(
    ("ns", "chosen"),
    [
        ((1000, 900, 700), ALL),
        ((1000, 700, 900), TABLED),
        ((1000, 700, 1100), TABLED),
        ((1000, 1120, 800), ALL),  # one side loses, both win
        ((1000, 940, 920), TABLED),  # with fewer sides where the difference is small
        ((1000, 1100, 1300), LIBRARY),
        ((1000, 1000, 980), LIBRARY),  # not worth it
        ((1000, 980, 980), LIBRARY),  # what the table says of single messages does not count
    ],
)
def test_a_trial_takes_the_best_way_and_the_library_s_where_nothing_is_clear(
    ns: tuple[int, int, int], chosen: int
) -> None:
    seen = Trial().run(NEXT + 1, ns, first_ns=5000)
    assert seen[:4] == [(TABLED, False)] * 4
    ways = [[(way, True) for way in turn(backwards)] for backwards in (False, True)]
    assert seen[4:31] == [*ways[0], *[(LIBRARY, False)] * QUICK, *ways[1]]
    ends = 1 + max(k for k in range(4, 4 + WHOLE) if seen[k][1])
    assert ends - 4 in [18 * turns + QUICK for turns in range(11)] or (ends - 4 - 198) % 60 == SLOW
    rest = seen[ends:NEXT]
    assert {way for way, timed in rest if not timed} == {chosen}
    # A way that was taken is checked after 64, 128 and 256 rounds; the next trial begins in the same round for all.
    timed = [k for k in range(ends, NEXT) if seen[k][1]]
    begins = [4 + WHOLE + gap for gap in (64, 198, 460)] if chosen else []
    assert timed == [begin + k for begin in begins for k in range(6)]
    checks = [LIBRARY] * 3 + [chosen] * 6 + [LIBRARY] * 6 + [chosen] * 3
    assert [seen[k][0] for k in timed] == checks[: len(timed)]
    assert seen[NEXT][1]


@pytest.mark.parametrize(
    ("ns", "timed"),
    [
        ((1000, 1050, 1050), 27),
        ((1000, 1120, 1120), 18),  # clearly lost twice
        ((1000, 1400, 1400), 9),  # by too much to be tried again
        ((1000, 1000, 1000), 27),
    ],
)
def test_what_promises_nothing_is_given_up_soon(ns: tuple[int, int, int], timed: int) -> None:
    seen = Trial().run(NEXT, ns)
    assert sum(clock for _, clock in seen) == timed
    assert all(clock for _, clock in seen[4 : 4 + QUICK]) and not any(clock for _, clock in seen[4 + 2 * timed :])
    assert {way for way, clock in seen[4:] if not clock} == {LIBRARY}


def test_where_the_table_takes_nothing_the_library_s_way_is_tried_against_one_other() -> None:
    seen = Trial(tables=False).run(4 + 72, (1000, 1000, 700))
    ways = [way for way, timed in seen if timed]
    assert ways == turn(False) + turn(True, LIBRARY) + turn(False, LIBRARY) + turn(True, LIBRARY)


def begins(seen: list[tuple[int, bool]]) -> list[int]:
    """Where trials begin: a row of timed rounds that is longer than a check's, after more others than between turns."""
    starts = [k for k in range(1, len(seen) - QUICK) if seen[k][1] and not seen[k - 1][1]]
    after = [k for k in starts if not any(timed for _, timed in seen[max(0, k - 3 * SLOW - 1) : k])]
    return [k for k in after if all(timed for _, timed in seen[k : k + QUICK])]


def test_ranks_stay_in_step_whatever_they_measure() -> None:
    one, other = (Trial().run(30_000, (1000, ns, 700)) for ns in (900, 800))
    least = Trial().run(30_000, (1000, 2000, 3000))
    rng = np.random.default_rng(7)
    noisy = Trial().series(10_000 * noise("spells", rng, 30_000)[:, None] * np.array((1, 0.95, 0.9)))
    assert begins(one) == begins(other) == begins(least)
    assert begins(list(zip(*noisy, strict=True))) == begins(one) and len(begins(one)) == 6  # rests of 512, 1024, ...
    # What lost much in two trials is not gone again.
    third = begins(least)[2]
    assert {way for way, timed in least[third:] if timed} == {LIBRARY}


def test_what_was_found_of_some_rounds_is_not_held_of_others() -> None:
    trial = Trial()
    trial.run(NEXT - 1, (1000, 2000, 700))
    trial.put_off(64)
    trial.forget()
    # As at the start: no way is taken before there is evidence.
    seen = trial.run(500, (1000, 1000, 1020))
    turns = ([True] * QUICK + [False] * QUICK) * 3
    assert [timed for _, timed in seen] == [False] * 64 + turns + [False] * (500 - 64 - len(turns))
    assert {way for way, timed in seen[64:] if not timed} == {LIBRARY}


def test_rounds_that_are_interrupted_keep_what_was_found() -> None:
    trial = Trial()
    trial.run(NEXT - 1, (1000, 2000, 700))
    trial.put_off(64)
    assert trial.run(64 + 40, (1000, 2000, 700))[-1] == (ALL, False)


def test_a_trial_begins_again_where_rounds_change() -> None:
    trial = Trial()
    trial.run(20, (1000, 10, 10))
    trial.put_off(64)
    seen = trial.run(64 + 9, (1000, 2000, 3000))
    assert [timed for _, timed in seen] == [False] * 64 + [True] * 9
    assert trial.run(512, (1000, 2000, 3000)) == [(LIBRARY, False)] * 512


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
        # 1,024 rounds: one before, 4 of rest, and a trial; 9 to 372 are timed, three or more with all receives ours;
        # where the trial was short, up to three checks in the rest.
        for row in types:
            assert row["recv"]["taken"] + row["recv"]["passed"] == 1024
            (checked,) = row["checked"]
            library, ours = checked["samples"]
            firsts = min(ours // 2, 11 + 3 + max(0, ours - 22) // 4)  # of rows of ours, at most
            between = row["recv"]["taken"] - ours
            assert ours >= 2 and library >= 4 and library + ours <= CLOCKED + 12
            # Untimed rounds are ours from the eleventh turn on at the soonest, until that is taken back if it is.
            assert between <= 1024 - 5 - 11 * 2 * QUICK + firsts, checked
            assert between > firsts or checked["decision"] != "ours", checked
