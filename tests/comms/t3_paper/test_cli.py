"""`undertow simulate t3` from the command line."""

from __future__ import annotations

import json

import pytest

from undertow.__main__ import main
from undertow.comms.t3_paper.document import paper_document
from undertow.comms.t3_paper.hardware import Hardware
from undertow.comms.t3_paper.paper import CLAIMS

KEYS = [
    f"{name}_{kind}" for name in ("t3", "t3_mca", "ideal", "tp32", "traffic") for kind in ("geomean", "max")
]  # issue 6


@pytest.mark.slow
def test_the_paper_as_table_json_and_picture(rows, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    file, picture = tmp_path / "t3.json", tmp_path / "t3.png"
    assert main(["simulate", "t3", "--json", str(file), "--png", str(picture), "--constants"]) == 0
    out = capsys.readouterr().out
    assert "paper / ours" in out and "MISSED" not in out and "calibrated" in out
    assert all(claim.text in out for claim in CLAIMS)
    document = json.loads(file.read_text())
    assert document == json.loads(json.dumps(paper_document(rows, Hardware())))
    assert all(isinstance(document[key], float) for key in KEYS)
    assert document["constants"]["gemm_efficiency"]["origin"] == "calibrated"
    assert len(document["rows"]) == 28
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_model_of_one_s_own(tmp_path, capsys):
    file = tmp_path / "own.json"
    arguments = "simulate t3 --hidden 4096 --layers 32 --tokens 2048 --tp 4 --link-GBps 300 --dram-GBps 3000"
    arguments += " --peak-TFLOPs 800 --compute-units 132 --llc-MiB 50 --link-latency-us 2"
    assert main([*arguments.split(), "--json", str(file)]) == 0
    out = capsys.readouterr().out
    assert "hidden 4096" in out and "32 layers" in out and "saved by T3-MCA" in out
    assert "on: 576 TFLOP/s in a product, 132 compute units, memory 3 TB/s, cache 50.0 MiB, link 300 GB/s" in out
    document = json.loads(file.read_text())
    assert document["constants"]["link_bytes_per_s"]["value"] == 300e9
    assert [row["layer"] for row in document["rows"]] == ["OP", "FC-2", "FC-1", "IP"]
    assert document["rows"][0]["K"] == 1024


def test_faster_links_leave_less_to_hide(tmp_path):
    saved = []
    for rate in (10, 1000):
        file = tmp_path / f"{rate}.json"
        line = f"simulate t3 --hidden 2048 --tokens 1024 --tp 4 --link-GBps {rate}"
        assert main([*line.split(), "--json", str(file)]) == 0
        configs = [row["configs"] for row in json.loads(file.read_text())["rows"]]
        saved.append(sum(c["Sequential"]["seconds"] - c["T3-MCA"]["seconds"] for c in configs))
    assert saved[0] > saved[1] > 0


def test_the_help_shows_how_and_the_output_whose_gpu_it_was(capsys):
    assert main(["simulate", "t3", "--help"]) == 0
    out = capsys.readouterr().out
    assert "\n  Your model on your links: undertow simulate t3 --model config.json" in out
    assert main(["simulate", "t3", "--hidden", "64", "--tokens", "64", "--tp", "2", "--link-GBps", "9"]) == 0
    out = capsys.readouterr().out
    assert "80 compute units*," in out and "link 9 GB/s, latency 500 ns* (* the paper's)" in out


@pytest.mark.parametrize(
    "arguments, match",
    [
        ("--tp 8", "without a model"),
        ("--hidden 100 --tp 8", "100 % 8"),
        ("--model nowhere.json", "cannot read the model config"),
        ("--model nowhere.json --hidden 8", "--model with --hidden"),
        ("--link-GBps 0", "link_bytes_per_s"),
        ("--json nowhere/x.json", "cannot write"),
        ("--calibrate --link-GBps 100", "--calibrate on another GPU"),
        ("--machine nowhere.json", "cannot read the machine file"),
        ("--hidden 0", "--hidden"),
    ],
)
def test_bad_input_is_one_clear_error(arguments, match, capsys):
    assert main(["simulate", "t3", *arguments.split()]) == 2
    captured = capsys.readouterr()
    assert match in captured.err and "Traceback" not in captured.err
