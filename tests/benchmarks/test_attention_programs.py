"""The two programs about attention schedules, in their smallest form: every cell is there and adds up."""

from __future__ import annotations

import json

import pytest

from undertow.benchmarks import attention_blocks, attention_choice, attention_modelled, attention_product


def test_blocks_of_a_rank_are_timed(tmp_path, capsys):
    file = tmp_path / "blocks.json"
    arguments = ["--device", "cpu", "--dtype", "float32", "--lengths", "128", "--ranks", "2", "--heads", "4:2"]
    arguments += ["--schedules", "ring_kv,token_ring,ring_kv_joined"]  # two ranks have nothing to join
    assert attention_blocks.main([*arguments, "--wires", "float32", "--repeats", "1", "--output", str(file)]) == 0
    rows = json.loads(file.read_text())["cells"]
    assert {(r["phase"], r["mask"], r["schedule"]) for r in rows} == {
        (phase, mask, schedule)
        for phase in ("forward", "backward")
        for mask in ("causal zigzag", "full")
        for schedule in ("ring_kv", "token_ring")
    }
    causal = next(r for r in rows if r["mask"] == "causal zigzag")
    assert set(causal["shapes"]) == {"64×64 causal", "64×32 full", "32×64 full"}  # one kernel call for each block
    assert all(r["blocks_ms"] > 0 and r["ideal_ms"] == pytest.approx(r["whole_ms"] / 2) for r in rows)
    shown = capsys.readouterr().out
    assert "sums over blocks" in shown and "drag: median" in shown

    beside = json.loads(file.read_text())["beside"]
    assert {(b["schedule"], b["phase"]) for b in beside} == {(r["schedule"], r["phase"]) for r in rows}
    for pair in beside:
        assert pair["merge"].split()[0] == ("add" if pair["phase"] == "backward" else "merge_lse")
        assert pair["attention_ms"] > 0 and pair["drag"] == pytest.approx(pair["lost_ms"] / pair["merge_ms"])
    low, high = attention_modelled.measured_drags(str(file), "4:2")
    assert [low, high] == [min(max(f(b["drag"] for b in beside), 0), 1) for f in (min, max)]
    assert attention_modelled.measured_drags(str(file), "8:8") == attention_modelled.DRAGS


def test_joined_blocks_are_timed_as_one_call(tmp_path):
    file = tmp_path / "blocks.json"
    arguments = ["--device", "cpu", "--dtype", "float32", "--lengths", "96", "--ranks", "4", "--heads", "2:1"]
    arguments += ["--masks", "causal", "--schedules", "ring_kv,all_gather_kv_joined"]
    assert attention_blocks.main([*arguments, "--wires", "float32", "--repeats", "1", "--output", str(file)]) == 0
    shapes = {(r["schedule"], name) for r in json.loads(file.read_text())["cells"] for name in r["shapes"]}
    plain = {("ring_kv", name) for name in ("24×24 causal", "24×12 full", "12×24 full")}
    gathered = {("all_gather_kv_joined", f"{rows} joined") for rows in ("24×24", "24×36", "12×48", "12×72")}
    assert shapes >= plain | gathered


def test_blocks_of_windows_and_documents_are_timed(tmp_path, capsys):
    """A mask that kernels do not know as one call: the whole is one rank's block, and blocks have several tiles."""
    file = tmp_path / "blocks.json"
    arguments = ["--device", "cpu", "--dtype", "float32", "--lengths", "96", "--ranks", "2", "--heads", "2:1"]
    arguments += ["--masks", "window:20,documents:5", "--schedules", "ring_kv", "--repeats", "1", "--output", str(file)]
    assert attention_blocks.main(arguments) == 0 and "5 documents" in capsys.readouterr().out
    rows = json.loads(file.read_text())["cells"]
    assert {(r["mask"], r["phase"]) for r in rows} == {
        (mask, phase) for mask in ("window 20", "5 documents") for phase in ("forward", "backward")
    }
    assert any("tiles" in shape for r in rows if r["mask"] == "5 documents" for shape in r["shapes"])
    assert all(r["whole_ms"] > 0 for r in rows)


@pytest.mark.slow
def test_a_kernels_rate_and_start_are_read_off_the_blocks(tmp_path):
    """Times of full, causal and joined blocks that follow a line give it back; blocks of several tiles do not count."""
    file, cells = tmp_path / "blocks.json", []
    for phase, width in (("forward", 4), ("backward", 10)):
        ms = {
            f"{q}×{k} {kind}": 1e3 * (pairs * 2 * 128 * width / 5e14 + 2e-4)
            for q, k, kind, pairs in (
                (4096, 8192, "full", 1 << 25),
                (8191, 8191, "causal", 8191 * 4096),
                (4096, 65536, "joined", 1 << 28),
            )
        }
        cells.append({"heads": "2:1", "backend": "best", "phase": phase, "shapes": ms | {"9×9 7 tiles": 1.0}})
    file.write_text(json.dumps({"cells": cells}))
    rates, starts = attention_modelled.measured_rates(str(file), "2:1")
    assert rates == pytest.approx((5e14, 5e14), rel=1e-3) and starts == pytest.approx((2e-4, 2e-4), rel=1e-6)


def test_the_field_is_modelled(tmp_path, capsys):
    base = tmp_path / "modelled"
    arguments = ["--ranks", "2,4", "--heads", "8:8", "--topologies", "nvswitch", "--output", str(base)]
    assert attention_modelled.main(arguments) == 0
    found = json.loads(base.with_suffix(".json").read_text())
    assert found["modelled"] is True and base.with_suffix(".png").stat().st_size > 10_000
    assert "modelled" in base.with_suffix(".txt").read_text() and "modelled" in capsys.readouterr().out
    by_way = {(c["way"], c["ranks"], c["phase"]): c for c in found["cells"]}
    assert {way for way, *_ in by_way} == {*attention_modelled.PEERS, "undertow, predicted"}
    for cell in by_way.values():
        assert cell["seconds"][0] <= cell["seconds"][1] * (1 + 1e-9)  # half of the link is never faster
        assert cell["drags"] == list(attention_modelled.DRAGS)
        assert (cell["topology"], cell["heads"]) == ("nvswitch", "8:8") and cell["phase"] in ("forward", "backward")
        assert 0 < cell["efficiency"][1] <= cell["efficiency"][0] <= 1 + 1e-9
    whole, needed = (by_way[way, 4, "backward"] for way in attention_modelled.PEERS if "zigzag" in way or "FCP" in way)
    assert needed["sent_bytes"] < whole["sent_bytes"]


def test_the_map_of_choices_is_drawn(tmp_path, capsys):
    """On a slow link ungrouped heads want something else than the ring, grouped ones do not."""
    file = tmp_path / "choice.png"
    assert attention_choice.main(["--ranks", "2", "--links", "1", "--tokens", "512", "--output", str(file)]) == 0
    assert file.stat().st_size > 10_000 and "GB/s" in capsys.readouterr().out
    by_ratio = {(c.phase, c.ratio): c for c in attention_choice.cells(2, [1.0], [512])}
    assert len(by_ratio) == 2 * len(attention_choice.RATIOS)
    assert by_ratio["backward", 1].name != "ring_kv" and by_ratio["backward", 1].gain > 1.03
    assert by_ratio["forward", 8].name == "ring_kv" and by_ratio["forward", 8].gain == 1


def test_the_product_finds_a_schedule_that_is_wrong(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(attention_product, "RANKS", (2,))
    monkeypatch.setattr(attention_product, "LAYOUTS", ("zigzag", "zigzag_documents"))
    assert attention_product.run(False, None, "need_only_q", tmp_path) == 0
    cells = json.loads((tmp_path / "attention_product.json").read_text())["cells"]
    assert len(cells) == 3 * (2 * len(attention_product.MASKS) - 1) and max(c["error"] for c in cells) < 1e-12
    right = attention_product.ops

    def wrong(*args, **options):
        table = dict(right(*args, **options))
        table["merge_lse"] = lambda reads, writes: [w.copy_(r) for w, r in zip(writes, reads)]  # forgets a part
        return table

    monkeypatch.setattr(attention_product, "ops", wrong)
    assert attention_product.run(False, None, "need_only_q", tmp_path) == 1
    assert "wrong: Cell(schedule='need_only_q'" in capsys.readouterr().out
