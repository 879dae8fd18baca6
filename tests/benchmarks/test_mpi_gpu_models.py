"""What the GPU benchmarks conclude from their cells, without a GPU: the model of paths, and which kernel stays."""

from __future__ import annotations

import pytest

from undertow.benchmarks import mpi_gpu_pack, mpi_gpu_paths
from undertow.mpi_interpose import gpu
from undertow.mpi_interpose.compile import CSRC
from undertow.mpi_interpose.errors import InterposeError


def cells(crossover):
    """Cells where the direct path is better up to crossover[way](block) bytes, by samples that differ a little."""
    made = []
    for block in (4, 32, 256):
        for size in (1 << k for k in range(10, 24)):
            cell = {"block": block, "size": size, "samples": {}}
            for way in ("to host", "from host"):
                direct = 10 if size <= crossover[way](block) else 30
                cell["samples"][f"{way} direct"] = [direct + 0.1 * k for k in range(16)]
                cell["samples"][f"{way} staged"] = [20 + 0.1 * k for k in range(16)]
            made.append(cell)
    return made


def test_the_fitted_paths_are_the_crossovers_and_the_library_reads_them() -> None:
    found = cells({"to host": lambda block: block << 12, "from host": lambda block: 1 << 16})
    model = mpi_gpu_paths.text(mpi_gpu_paths.fit(found), ["a machine"])
    assert mpi_gpu_paths.judge(found, model) == (1.0, 0.0)
    for block, packing, want in ((4, True, 1 << 14), (31, True, 1 << 14), (32, True, 1 << 17), (8192, True, 1 << 20)):
        assert gpu.direct_up_to(model, packing, block) == want
    assert gpu.direct_up_to(model, False, 1) == gpu.direct_up_to(model, False, 300) == 1 << 16
    always_staged = mpi_gpu_paths.text([("to_host", 1, 0), ("from_host", 1, 0)], [])
    share, regret = mpi_gpu_paths.judge(found, always_staged)
    assert share < 1 and regret > 0.1


def test_the_shipped_paths_are_rows_and_other_texts_are_refused() -> None:
    assert gpu.direct_up_to((CSRC / "policy" / "gpu.txt").read_text(), True, 8) > 0
    for bad in ("to_host 1", "sideways 1 2", "to_host 0 5", "to_host 1 2 3", "to_host 1 -2"):
        with pytest.raises(InterposeError, match="expected `to_host BLOCK BYTES`"):
            gpu.direct_up_to(bad, True, 8)


def row(name: str, ratio: list[float], kind: str = "single piece") -> dict:
    return {"kind": kind, "way": "pack", "name": name, "size": 1024, "ratio": {"older": ratio}}


def test_a_newer_kernel_stays_only_where_no_cell_loses() -> None:
    good, bad = row("good", [1.2, 1.1, 1.3]), row("bad", [0.9, 0.85, 0.95])
    (kept,), (lost,) = mpi_gpu_pack.verdicts([good]), mpi_gpu_pack.verdicts([good, bad])
    assert kept.endswith("keep") and "1.20 over 1 cells" in kept
    assert lost.endswith("reconsider (bad)") and "least 0.90 [0.85, 0.95]" in lost
    assert mpi_gpu_pack.verdicts([row("x", [2.0, 2.0, 2.0], "")]) == []
