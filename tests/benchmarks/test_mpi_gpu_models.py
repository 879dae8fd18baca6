"""What the GPU benchmarks conclude from their cells, without a GPU: the model of paths, and which kernel stays."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from undertow.benchmarks import (
    facts,
    mpi_gpu_bound,
    mpi_gpu_pack,
    mpi_gpu_pages,
    mpi_gpu_paths,
    mpi_gpu_record,
    mpi_gpu_traffic,
    mpi_gpu_variants,
)  # fmt: skip
from undertow.benchmarks.mpi_gpu_rivals import Layout
from undertow.dist.errors import UserError
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


def pack_cell(name: str, block: int, size: int, ours: float, **others: float) -> dict:
    """A cell of mpi_gpu_pack with the medians given, in seconds; a wait is 10 us more, a copy per block 2 us."""
    spread = [1 + 0.01 * k for k in range(-4, 5)]
    medians = {"ours": ours, "again": ours, "torch": ours, "copy": ours, **others}
    samples = {arm: [median * factor for factor in spread] for arm, median in medians.items()}
    n = size // block
    waits = {
        "ours": ours + 1e-5,
        "torch": medians["torch"] + 1e-5,
        "launch floor": 1e-5,
        "one copy per block": 2e-6 * n,
    }
    return {
        "name": name, "block": block, "size": size, "way": "pack", "wrong": [], "samples": samples, "blocks": n,
        "blocks timed": min(n, 8192), "waits apart": True,
        "waits": {arm: [v * f for f in spread] for arm, v in waits.items()},
    }  # fmt: skip


def test_a_page_names_the_goals_that_were_missed(tmp_path: Path) -> None:
    mib = 1 << 20
    cells = [
        pack_cell("1-D 4 B", 4, mib, 1e-5, paper=1.4e-5),
        pack_cell("1-D 64 B", 64, 16 * mib, 2e-5, paper=2.8e-5, copy=1.6e-5),
        pack_cell("1-D 4096 B", 4096, 16 * mib, 1e-5, torch=8e-6, copy=9e-6),
        pack_cell("indexed 4 B, random", 4, 4096, 1e-5),
    ]
    data = {**mpi_gpu_pages.begun("mpi_gpu_pack", "", 9, ["a remark"]), "rows": cells}
    path = tmp_path / "mpi_gpu_pack.json"
    mpi_gpu_pages.save(data, path)
    mpi_gpu_pages.main([str(path)])
    text = path.with_suffix(".md").read_text()
    assert "| 1 of 2 cells; least 80% (pack 1-D 64 B, 16 MiB) | no |" in text
    assert "| 1 of 4 cells; the most 0.80 (pack 1-D 4096 B, 16 MiB: torch) | no |" in text
    assert "| geometric mean 1.40, 1.40 to 1.40 in 2 cells | yes |" in text
    assert "26,214 (pack 1-D 4 B, 1 MiB, 262,144 blocks)" in text and "| +10.0 to +10.0 us | " in text
    assert "- a remark" in text and "**ours**" in text and "ours (A/A)" in text
    assert path.with_suffix(".png").exists() == ("mpi_gpu_pack.png" in text)


def test_pages_of_exchanges_and_paths(tmp_path: Path) -> None:
    def exchange(name: str, **us: float) -> dict:
        samples = {way.replace("_", " "): [median + 0.01 * k for k in range(9)] for way, median in us.items()}
        return {"name": name, "size": 4096, "blocks": 512, "wrong": {"staged": 3}, "samples": samples}

    rows = [
        exchange("halo 32^3", auto=50, direct=60, staged=50, by_hand=100, per_block=5000),
        exchange("8 B blocks, 4 KiB", auto=50, by_hand=40),
    ]
    data = {**mpi_gpu_pages.begun("mpi_gpu_messages", "", 9), "rows": rows}
    text = mpi_gpu_pages.page(data)
    assert (
        "100 to 100 (halo 32^3, 512 blocks)" in text and "geometric mean 1.26; lost: 8 B blocks, 4 KiB | no |" in text
    )
    assert "| halo 32^3 | staged | 4.0 KiB | not timed |" in text  # three wrong bytes
    found = cells({"to host": lambda block: block << 12, "from host": lambda block: 1 << 16})
    half = mpi_gpu_paths.text(mpi_gpu_paths.fit(found, slice(0, None, 2)), [])
    for cell in found:
        cell["chosen"] = {way: mpi_gpu_paths.path(half, key, cell) for key, way in mpi_gpu_paths.DIRECTIONS.items()}
        cell["wrong"] = 0
        for way in cell["chosen"]:
            cell["samples"] |= {f"{way} copy": [5.0] * 16, f"{way} whole": [31.0] * 16}
    shown = mpi_gpu_pages.report({**mpi_gpu_pages.begun("mpi_gpu_paths", "", 16), "rows": found})
    ours = [row for row in shown.rows if row.role == "ours"]
    assert len(ours) == 2 * len(found) and all(row.ratio and row.ratio.low > 0.97 for row in ours)


@pytest.mark.slow
def test_a_run_is_kept_by_one_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the archive that a GPU machine sends: results, the guide's parts and the shipped paths; no wrong answers."""
    root, out = tmp_path / "checkout", tmp_path / "out"
    for folder in (mpi_gpu_record.GUIDE.parent, mpi_gpu_record.POLICY.parent):
        (root / folder).mkdir(parents=True, exist_ok=True)
    marks = [f"<!-- {name}: as made -->\n{name} of old\n<!-- end -->\n" for name in mpi_gpu_pages.KINDS]
    (root / mpi_gpu_record.GUIDE).write_text("".join(marks))
    real = (facts.ROOT / mpi_gpu_record.GUIDE).read_text()
    for name in ("mpi_gpu_pack", "mpi_gpu_messages", "mpi_gpu_collectives"):
        assert mpi_gpu_record.into_guide(real, name, "text") != real  # the guide has these marks
    packs = [pack_cell(name, 4 << k, size, 2e-5, paper=3e-5) for k, (name, size, _) in enumerate(mpi_gpu_record.CHOSEN)]
    samples = {
        way: [us + 0.1 * k for k in range(9)] for way, us in (("auto", 50), ("by hand", 75), ("per block", 5000))
    }
    halo = {"name": "halo 32^3", "size": 4096, "blocks": 512, "wrong": dict.fromkeys(samples, 0), "samples": samples}
    bad = {**halo, "wrong": {"auto": 1}}
    parts = {"mpi/mpi_gpu_pack": packs, "mpi/mpi_gpu_messages": [halo], "ranks_mpi/mpi_gpu_collectives": [bad]}
    for name, rows in {**parts, "mpi/fetch_32/mpi_gpu_pack": packs[:1]}.items():
        data = {**mpi_gpu_pages.begun(name.split("/")[-1], "", 9), "rows": rows}
        mpi_gpu_pages.save(data, out / f"{name}.json")
    found = cells({"to host": lambda block: 1 << 14, "from host": lambda block: 1 << 16})
    for cell in found:
        cell |= {"chosen": {way: "staged" for way in ("to host", "from host")}, "wrong": 0}
        cell["samples"] |= {f"{way} {how}": [5.0] * 16 for way in cell["chosen"] for how in ("copy", "whole")}
    mpi_gpu_pages.save({**mpi_gpu_pages.begun("mpi_gpu_paths", "", 16), "rows": found}, out / "mpi/mpi_gpu_paths.json")
    model = mpi_gpu_paths.text(mpi_gpu_paths.fit(found), ["a card"])
    (out / "mpi/gpu.txt").write_text(model)
    with tarfile.open(tmp_path / "all.tgz", "w:gz") as archive:
        archive.add(out, "build/gpu")
    assert mpi_gpu_record.main([str(tmp_path / "all.tgz"), "--root", str(root)]) == 1
    said = capsys.readouterr()
    assert "mpi_gpu_collectives.json: wrong answers in halo 32^3; nothing of it is kept" in said.err
    assert (root / mpi_gpu_record.POLICY).read_text() == model
    results = {path.name.split("_1")[0].split("_2")[0] for path in (root / "benchmarks/results").glob("*.md")}
    assert len(results) == 4 and any(name.startswith("mpi_gpu_pack-fetch_32") for name in results), results
    guide = (root / mpi_gpu_record.GUIDE).read_text()
    assert "| 4 B blocks, stride 8 | 16 MiB | 20.0 | 20.0 |  | 30.0 |  | 20.0 |" in guide
    assert "| halo 32^3 | 512 | 50 | 75 | 5,000 | 1.50 |" in guide and "mpi_gpu_collectives of old" in guide
    assert "mpi_gpu_pack of old" not in guide and guide.count("<!-- end -->") == 4
    kept_messages = map(str, (root / "benchmarks/results").glob("mpi_gpu_messages*.json"))
    assert mpi_gpu_record.main([*kept_messages, "--root", str(root)]) == 0
    assert (root / mpi_gpu_record.GUIDE).read_text() == guide  # keeping what is kept changes nothing
    mpi_gpu_pages.save({**mpi_gpu_pages.begun("mpi_gpu_pack", "", 9), "rows": packs[1:]}, out / "mpi_gpu_pack.json")
    assert mpi_gpu_record.main([str(out / "mpi_gpu_pack.json"), "--root", str(root)]) == 0
    assert (root / mpi_gpu_record.GUIDE).read_text() == guide  # a cell that the guide shows is missing there
    (root / mpi_gpu_record.GUIDE).write_text("no marks")
    assert mpi_gpu_record.main([str(out / "mpi/mpi_gpu_messages.json"), "--root", str(root)]) == 1
    assert "expected one, ended by" in capsys.readouterr().err


def test_the_bytes_that_must_move_are_those_of_a_count_byte_by_byte() -> None:
    made = [Layout("", block, ((n, stride),)) for block, n, stride in ((4, 64, 8), (12, 40, 16), (100, 9, 128))]
    made += [Layout("", 8, ((3, 2000), (5, 24))), Layout("", 4, ((16, 4), (8, 64))), Layout("", 4, (), (0, 40, 96, 12))]
    made.append(Layout("", 32, ((256, 64),)))
    for layout in made:
        at = [0]
        for count, stride in layout.dims:
            at = [a + k * stride for a in at for k in range(count)]
        bytes_of = {a + k for a in (layout.offsets or at) for k in range(layout.block)}
        for packing in (True, False):
            sectors = {b // 32 for b in bytes_of}
            read = 64 * len({b // 64 for b in bytes_of})
            if not packing:
                part = {s // 2 for s in sectors if not all(32 * s + k in bytes_of for k in range(32))}
                read = layout.size + 64 * len(part)
            want = (read, layout.size if packing else 32 * len(sectors))
            assert mpi_gpu_bound.bytes_moved(layout, packing) == want, layout
    halves = made[-1]
    assert mpi_gpu_bound.ceiling(halves, True) == pytest.approx(2 / 3) and mpi_gpu_bound.cache_bytes(halves) == 24576
    with pytest.raises(ValueError, match="blocks; at most"):
        mpi_gpu_bound.ceiling(Layout("x", 4, ((1 << 12, 1 << 20), (1 << 12, 8))), True)


def test_counted_traffic_is_shown_beside_what_must_move() -> None:
    found = mpi_gpu_traffic.cases(1)
    counted = [tuple(4 * value for value in mpi_gpu_bound.bytes_moved(layout, packing)) for _, layout, packing in found]
    lines = mpi_gpu_traffic.table(counted, 1).splitlines()
    assert "| copy | 1.00 | 1.00 | 1.00 | 1.00 | 100% |" in lines
    assert "| unpack 4 B blocks, gaps as large | 3.00 | 2.00 | 3.00 | 2.00 | 40% |" in lines
    assert "| pack 32 B blocks, gaps as large | 1.00 | 1.00 | 2.00 | 1.00 | 67% |" in mpi_gpu_traffic.table(
        counted, 1, 32
    )
    with pytest.raises(UserError, match="10 ranges"):
        mpi_gpu_traffic.table(counted[1:], 1)


def test_every_cell_of_the_kernels_trial_is_a_layout() -> None:
    known = {(layout.name, layout.size) for layout in mpi_gpu_pack.layouts(short=False)}
    assert known.issuperset(mpi_gpu_variants.FIRST) and len(set(mpi_gpu_variants.FIRST)) == len(mpi_gpu_variants.FIRST)
    seconds = {"chosen": 1e-6, "general": 2e-6, "nest 1x128": 1e-6, "!torch": 1.5e-6, "!copy": 5e-7}
    samples = {name: [taken] for name, taken in seconds.items()}
    row = {"way": "pack", "name": "x", "size": 1024, "wrong": ["cross 32"], "samples": samples}
    assert mpi_gpu_variants.line(row).endswith(
        "chosen 1.00  nest 1x128 1.00  !torch 1.50  general 2.00 WRONG: cross 32"
    )
    assert (
        "nest 1x128   chosen / it 1.00, general / it 2.00, torch / it 1.50, copy / it 0.50"
        in mpi_gpu_variants.decided(row)
    )


def test_a_goal_that_the_memory_does_not_allow_says_so() -> None:
    def cell(name: str, block: int, ours: float, moved: list[int], room: int) -> dict:
        samples = {"copy": [1.0] * 9, "ours": [ours] * 9, "paper": [1.6 * ours] * 9}
        return {"name": name, "way": "pack", "block": block, "size": 1 << 28, "samples": samples, "waits": {},
                "moved": moved, "cache bytes": room, "cache": 1 << 26}  # fmt: skip

    size = 1 << 28
    halves, whole = (
        cell("1-D 32 B", 32, 1.5, [2 * size, size], 3 * size),
        cell("1-D 64 B", 64, 1.25, [size, size], 3 * size),
    )
    held = cell("1-D 32 B held", 32, 1.6, [2 * size, size], 1 << 20)
    rate = mpi_gpu_pages.memory_rate([halves, whole])
    assert rate == 2 * size and mpi_gpu_pages.memory_rate([{**halves, "size": 1 << 20}]) == 0
    assert mpi_gpu_pages.most(halves, rate) == pytest.approx(2 / 3) and mpi_gpu_pages.most(held, rate) == float("inf")
    (_, copy, met), _, (_, paper, _), *_ = mpi_gpu_pages.pack_goals([halves, whole, held])
    assert met == "no" and "0 of 3 cells; least 62% (pack 1-D 32 B held, 256 MiB)" in copy
    assert "the memory allows no more in 1 of the others (pack 1-D 32 B, 256 MiB: 67% of at most 67%)" in copy
    assert "at the bound of memory, or of a copy, 2.02, and 1.3 in 3" in paper
