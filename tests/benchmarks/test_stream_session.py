"""The GPU session of streamed backpropagation as a list: words that its programs know, groups that fit one call."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from undertow.benchmarks import stream_backprop, stream_session
from undertow.benchmarks.stream_session import GRACE_S, PARTS, TOGETHER, TOGETHER_S, command, gather, main

CALL_S = 600  # the longest that one call on the GPU machine lasts


def test_groups_fit_one_call_and_all_of_it_half_an_hour():
    assert TOGETHER_S + GRACE_S <= 560  # parts that share a process share its limit
    for group in {part.group for part in PARTS} - {TOGETHER}:
        assert sum(part.seconds for part in PARTS if part.group == group) <= CALL_S - GRACE_S
    assert sum(part.seconds for part in PARTS if part.group == "1") <= 280
    assert sum(part.seconds for part in PARTS if part.group != TOGETHER) <= 1700
    assert len({part.name for part in PARTS}) == len(PARTS)


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_words_of_a_part_are_those_of_its_program(part, quick, tmp_path):
    program, *words = command(part, tmp_path, quick)[1:]
    text = Path(program).read_text()
    for name, _, value in (word.partition("=") for word in words):
        assert f'"{name}"' in text, f"{program} does not know {name}"
        assert value
    arms = [value for word in words for name, _, value in [word.partition("=")] if name == "--arms"]
    for arm in arms[0].split(",") if arms else ():
        assert arm.partition("#")[0] in (*stream_backprop.RIVALS, *stream_backprop.OURS)


def test_a_part_that_fails_leaves_the_others(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stream_session, "command", lambda part, out, quick: ["python3", "-c", "raise SystemExit(3)"])
    assert main(["--out", str(tmp_path), "chunks", "depth"]) == 1
    printed = capsys.readouterr().out
    assert "chunks: failed with code 3" in printed and "depth: failed with code 3" in printed
    (tmp_path / "depth.json").write_text(json.dumps({"rows": []}))
    assert gather(tmp_path) == []


def test_a_part_that_fails_in_the_common_process_leaves_the_others_and_is_told(tmp_path, monkeypatch, capsys):
    limits = list[float]()

    def measured(words: list[str]) -> int:
        options = dict(word.removeprefix("--").split("=", 1) for word in words)
        limits.append(float(options["seconds"]))
        if options["json"].endswith("half-million.json"):
            raise RuntimeError("no such kernel")
        Path(options["json"]).write_text(json.dumps({"rows": [1]}))
        return 0

    monkeypatch.setattr(stream_backprop, "main", measured)
    parts = [part.name for part in PARTS if part.group == TOGETHER]
    assert main(["--out", str(tmp_path), "--here", *parts]) == 1
    printed = capsys.readouterr()
    assert "half-million: failed" in printed.out and "no such kernel" in printed.err
    assert {file.stem for file in gather(tmp_path)} == set(parts) - {"half-million"}
    assert len(limits) == len(parts) and max(limits) < TOGETHER_S


def test_an_arm_may_bring_its_own_chunks():
    assert stream_backprop.options_of("ours+stash#16384", 8192) == {"offload": False, "stash": True, "chunk": 16384}
    assert stream_backprop.options_of("ours+stash", 8192)["chunk"] == 8192
    assert stream_backprop.options_of("ours auto", 8192) == {"chunk": None}
