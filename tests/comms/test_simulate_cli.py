"""`undertow simulate`: what it prints and writes, and how it refuses."""

from __future__ import annotations

import builtins
import json

import pytest

from undertow.__main__ import main
from undertow.comms.builders.attention_named import SCHEDULES, even_attention
from undertow.comms.builders.catalog import ATTENTION_HEADS, CATALOG, by_name
from undertow.comms.builders.peers import NAMES, PEERS
from undertow.comms.builders.ring_attention import ring_attention
from undertow.comms.check import check
from undertow.comms.cost import rank_costs
from undertow.comms.schedule_text import parse
from undertow.comms.simulate import ASSUMED, simulate
from undertow.comms.simulate_peers import ideal_s, ways
from undertow.comms.topologies import preset
from undertow.dist.machine import Link, Machine


@pytest.mark.parametrize("name", list(CATALOG))
def test_every_builder_is_simulated_by_name(name, capsys):
    ranks = "4" if "ulysses" in name else "3"  # 32 heads
    assert main(["simulate", name, "--ranks", ranks, "--bytes", "1MiB"]) == 0
    out = capsys.readouterr().out
    shown = name.removeprefix("attention_").removesuffix("_backward").split("_sequential")[0]
    assert "modelled time: " in out and "rates are assumed" in out and shown[:14] in out
    assert "│" in out and "waited" in out


def test_the_field_and_ours_in_one_table(capsys):
    """Every way is there, says that it is modelled, and its times and bytes are those of its own schedule."""
    assert main(["simulate", "peers", "--ranks", "4", "--bytes", "64MiB", "--topology", "nvswitch"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("modelled: causal attention, 4 ranks of 4,096 tokens") and "Modelled, not measured" in out
    assert "rates are assumed" in out and "preset nvswitch" in out and out.count(" *") >= 2
    network = preset("nvswitch")
    found = {way.name: way for way in ways(4, 4096, ATTENTION_HEADS, ASSUMED, network)}
    assert list(found) == [*PEERS, *SCHEDULES] and all(name[:14] in out for name in found)
    ideal = ideal_s(4, 4096, ATTENTION_HEADS, ASSUMED)
    assert all(s > best for way in found.values() for s, best in zip(way.seconds, ideal))
    assert found["TokenRing as published"].sent_bytes[1] == found["zigzag ring (ring-flash-attention)"].sent_bytes[1]
    narrow, whole = (found[n].sent_bytes for n in ("need-only (FCP-like)", "zigzag ring (ring-flash-attention)"))
    assert narrow[1] < whole[1]
    h = ATTENTION_HEADS  # whole shards of keys and values, three times; their gradients come home in float32
    assert whole == tuple(3 * 2 * 4096 * h.kv_heads * h.head_dim * width for width in (2, 2 + 4))
    ours = even_attention("ring_kv", 4, 4096, h, causal=True)
    assert found["ring_kv"].seconds[0] == simulate(ours, ASSUMED, network=network, drag=1).makespan_s
    assert found["Ulysses"].sent_bytes == found["ulysses"].sent_bytes
    for i in (0, 1):  # contiguous shards leave the first rank idle under a causal mask
        assert found["ring (Liu et al.)"].seconds[i] > found["zigzag ring (ring-flash-attention)"].seconds[i]
    assert main(["simulate", "peers", "--ranks", "3", "--bytes", "1MiB", "--heads", "32:4"]) == 0
    out = capsys.readouterr().out
    assert "cannot be dealt to 3 ranks" in out and "32:4 heads of 128" in out
    for words in (["peers", "--heads", "32:5"], ["ring_attention", "--heads", "32:4"]):
        assert main(["simulate", *words]) == 2
        assert "--heads" in capsys.readouterr().err


def test_peers_schedules_are_proved_and_compute_what_ours_do():
    for name in NAMES:
        for suffix in ("", "_backward"):
            for world in (1, 2, 4):
                plan = by_name(f"peer_{name}{suffix}", world, 1 << 20)
                check(plan)
                ours = by_name(f"attention_all_gather_kv{suffix}", world, 1 << 20)
                assert sum(c.flops for c in rank_costs(plan)) == sum(c.flops for c in rank_costs(ours))


def test_text_form_goes_through_a_file(tmp_path, capsys):
    assert main(["simulate", "gemm_reduce_scatter", "--ranks", "2", "--text"]) == 0
    text = capsys.readouterr().out
    assert str(parse(text)) == text
    path = tmp_path / "schedule.txt"
    path.write_text(text)
    assert main(["simulate", str(path), "--all", "--rendezvous", "--topology", "pairs"]) == 0
    assert "per pair" in capsys.readouterr().out
    assert main(["simulate", str(path), "--topology", "bus"]) == 0
    assert "per bus" in capsys.readouterr().out
    assert main(["simulate", str(path), "--topology", "nvswitch"]) == 0
    assert "450 GB/s (preset nvswitch" in capsys.readouterr().out
    assert main(["simulate", str(path), "--ranks", "3"]) == 2
    assert "is a schedule for 2 ranks" in capsys.readouterr().err


def test_machine_file_json_and_picture(tmp_path, capsys):
    machine = tmp_path / "machine.json"
    Machine("box", links={"gloo": Link(1e-5, 1e9, duplex=False)}, copies={"host": 5e9}).dump(machine)
    data, picture = tmp_path / "t.json", tmp_path / "t.png"
    arguments = ["--ranks", "12", "--machine", str(machine), "--json", str(data), "--png", str(picture)]
    assert main(["simulate", "ring_all_gather", *arguments]) == 0
    out = capsys.readouterr().out
    assert (
        "machine: box; link 1 GB/s (gloo, per port)" in out
        and "one direction at a time" in out
        and "assumed" not in out
    )
    assert "rank 0 of 12; --all shows" in out
    found = json.loads(data.read_text())
    assert found["modelled"] is True and found["world"] == 12 and len(found["spans"]) == 12 * 23
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and picture.stat().st_size > 10_000


def test_no_name_lists_the_names(capsys):
    assert main(["simulate"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in CATALOG)
    assert main(["simulate", "--help"]) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing_such"], "neither a schedule's name nor a file"),
        (["all_to_all", "--bytes", "lots"], "--bytes 'lots' is not a number of bytes"),
        (["all_to_all", "--machine", "absent.json"], "cannot read the machine file"),
        (["all_to_all", "--topology", "torus"], "topology 'torus'"),
        (["all_to_all", "--transport", "mpi"], "no link 'mpi'"),
        (["all_to_all", "--png", "no/such/folder/x.png"], "its folder does not exist"),
        (["all_to_all", "--ranks", "0"], "--ranks"),
        (["all_to_all", "--unknown"], "--unknown"),
    ],
)
def test_bad_input_gives_one_line_and_code_2(arguments, words, capsys):
    assert main(["simulate", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_a_broken_schedule_is_refused_with_its_fault(tmp_path, capsys):
    path = tmp_path / "broken.txt"
    path.write_text(str(ring_attention(2, 4)).replace("kv.of.0 (kv", "kv.of.9 (kv"))
    assert main(["simulate", str(path)]) == 2
    assert "unmatched send: rank 0, lane to_next" in capsys.readouterr().err


def test_without_matplotlib_the_extra_is_named(tmp_path, capsys, monkeypatch):
    real = builtins.__import__
    monkeypatch.setattr(
        builtins,
        "__import__",
        lambda name, *a, **k: (
            (_ for _ in ()).throw(ImportError(name)) if name.startswith("matplotlib") else real(name, *a, **k)
        ),
    )
    assert main(["simulate", "all_to_all", "--png", str(tmp_path / "x.png")]) == 2
    assert "undertow[plots]" in capsys.readouterr().err
