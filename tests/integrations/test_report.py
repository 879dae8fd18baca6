"""`undertow report`: what stands in the page is what the run wrote, and a browser shows it without a network."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from undertow.__main__ import main
from undertow.checkpointing import Checkpointer
from undertow.dist.trace import Trace, trace_path
from undertow.integrations.report import overlap, page, window_of
from undertow.integrations.report_data import Span, read_run
from undertow.integrations.report_plots import memory as memory_plot

STEPS = 8


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run with two starts: the first is cut inside a step, the second goes on and ends well."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    (folder / "trace").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"config": {"lr": 0.1, "model": {"layers": 2}}}))
    torch.manual_seed(0)
    model = torch.nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with Trace(trace_path(folder / "trace", 0), 0) as trace:
        trace.begin("step", lane="train", step=0)  # and never ends
    lines = []
    with Trace(trace_path(folder / "trace", 0), 0) as trace:
        with Checkpointer(folder / "checkpoints", model=model, optimizer=optimizer, every=3, trace=trace) as ckpt:
            for step in range(STEPS):
                ckpt.step(step)
                with trace.span("step", lane="train", step=step):
                    loss = model(torch.ones(4, 64)).square().mean()
                    loss.backward()
                    optimizer.step()
                    time.sleep(0.02)
                trace.counter("memory", rss=float(2**30 + step))
                lines.append({"step": step, "loss": loss.item(), "tokens_per_s": 100.0 + step})
            for report in ckpt.wait():
                stall_ms = 1e3 * (report.call_s + report.fence_s)
                trace.instant("report", step=report.step, ok=report.ok, stall_ms=stall_ms)
    lines.append({"step": STEPS - 1, "bits_per_byte": 1.5})
    torn = '{"step": 99, "lo'
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + torn)
    return folder


def test_the_run_is_read_whole(run):
    found = read_run(run)
    assert [line["step"] for line in found.steps] == list(range(STEPS))
    assert [len(begins) for begins in found.starts.values()] == [2] and found.resumed_at == (0,)
    assert set(found.stalls) == {0, 3, 6} and all(value > 0 for value in found.stalls.values())
    assert found.memory["rank 0: rss"][-1][1] == 2**30 + STEPS - 1
    assert sum(span.killed for span in found.spans) == 1
    assert {span.name for span in found.spans} >= {"step", "snapshot", "copy", "flush", "fsync", "commit", "fence"}
    assert [entry.step for entry in found.checkpoints if entry.usable] == [0, 3, 6]
    assert found.missing == ("result.json",)


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.names: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]


def test_the_page_stands_alone(run):
    tags = _Tags()
    tags.feed(page(read_run(run)))
    assert "script" not in tags.names
    assert tags.names.count("svg") == 5
    assert all(link.startswith("#") for link in tags.links)


def test_a_name_cannot_break_the_page(run, tmp_path):
    odd = tmp_path / "<b>&"
    shutil.copytree(run, odd)
    assert "<b>&" not in page(read_run(odd))


def test_overlap_is_the_work_beneath_steps(run):
    spans = (
        Span("step", "train", 0, 0.0, 2.0),
        Span("flush", "writer_0", 0, 1.0, 2.0),
        Span("flush", "writer_1", 0, 1.5, 1.0),  # at the same time: counted once
        Span("step", "train", 0, 2.5, 1.0),
    )
    found = read_run(run)
    told = replace(found, spans=spans, starts={0: (0.0,)})
    assert overlap(told, 0) == (2.0, 1.5)
    assert set(window_of(told)) == set(spans)


def test_starts_are_kept_apart(run):
    """A run that went on an hour later: its timeline shows one start, and no line of a plot spans the pause."""
    first = [Span(name, lane, 0, t, 0.5) for name, lane, t in (("step", "train", 0), ("commit", "disk", 0.6))]
    first += [Span("step", "train", 0, 1.0, 0.1, killed=True, step=1)]
    later = [replace(span, begin_s=span.begin_s + 3600, killed=False, step=7) for span in first]
    memory = {"rank 0: rss": ((0.1, 2.0**30), (3600.1, 2.0**30))}
    told = replace(read_run(run), spans=(*first, *later), starts={0: (0.0, 3600.0)}, memory=memory)
    assert set(window_of(told)) == set(later) and told.resumed_at == (7,)
    early = replace(told, spans=(*first, later[0]))  # the last start was killed before its first save
    assert set(window_of(early)) == set(first)
    text = page(told)
    assert "<td>went on at step</td><td class=n>7</td>" in text and "restart" in text
    lines = re.findall(r'<path d="([^"]*)"[^>]*stroke: #1f77b4', memory_plot(told).replace("\n", " "))
    assert lines[0].count("M") == 2 and "L" not in lines[0]  # the second one is the legend's


def test_an_empty_run_has_a_report_too(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    text = page(read_run(tmp_path))
    assert "not finished" in text and "metrics.jsonl" in text


def test_what_is_no_run_is_refused(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "is not a run's folder" in capsys.readouterr().err
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").write_text("{}")
    assert main(["report", str(tmp_path)]) == 2
    assert f"undertow report {tmp_path / 'a'}" in capsys.readouterr().err


def test_a_browser_shows_it(run, tmp_path, capsys):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("needs a headless browser: `make system` brings chromium")
    output = tmp_path / "report.html"
    assert main(["report", str(run), "--output", str(output)]) == 0
    assert capsys.readouterr().out.strip() == str(output)
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--disable-dev-shm-usage", "--host-resolver-rules=MAP * ~NOTFOUND"]
    done = subprocess.run(
        [*command, "--dump-dom", output.as_uri()], capture_output=True, text=True, timeout=280, cwd=tmp_path
    )
    for text in ("Loss</h2>", "Stall</h2>", "Memory</h2>", "Overlap timeline</h2>", "Checkpoints</h2>"):
        assert text in done.stdout, done.stderr[-2000:]
    shot = tmp_path / "page.png"
    subprocess.run(
        [*command, f"--screenshot={shot}", "--window-size=1000,4000", output.as_uri()],
        capture_output=True,
        timeout=280,
        cwd=tmp_path,
        check=True,
    )
    from matplotlib.image import imread

    pixels = imread(shot)[..., :3]
    assert (abs(pixels - [0x4C / 255, 0x78 / 255, 0xA8 / 255]).max(axis=-1) < 0.02).sum() > 100  # the steps' colour
