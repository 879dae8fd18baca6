"""The bug report: complete on a sound machine, present on a broken one, and free of secrets."""

from __future__ import annotations

import json

import pytest

from undertow.dist import environment
from undertow.dist.environment import HIDDEN, SECTIONS, as_text, collect, looks_secret, relevant_variables


@pytest.fixture
def quick(monkeypatch):
    """No programs are started: their absence is what the report then shows."""
    monkeypatch.setattr(environment, "_output", lambda *command: "")
    monkeypatch.setattr(environment, "nvidia_smi", lambda *arguments: "")


def test_every_section_is_there_and_none_failed(quick):
    report = collect()
    assert list(report) == list(SECTIONS)
    assert not [name for name, entries in report.items() if "error" in entries]
    assert report["launch"]["world_size"] >= 1 and report["packages"]["torch"] != "not installed"
    text = as_text(report)
    assert all(f"\n{name}\n" in f"\n{text}" for name in SECTIONS)


def test_json_is_json(quick, capsys):
    assert environment.main(["--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == set(SECTIONS)


@pytest.mark.parametrize("name", list(SECTIONS))
def test_one_broken_section_hides_no_other(quick, monkeypatch, capsys, name):
    def broken():
        raise RuntimeError("the driver is gone")

    monkeypatch.setattr(environment, "SECTIONS", {**SECTIONS, name: broken})
    assert environment.main([]) == 0
    out = capsys.readouterr().out
    assert "RuntimeError: the driver is gone" in out
    assert out.count("error") >= 1 and all(f"\n{other}\n" in f"\n{out}" for other in SECTIONS)


def test_contradictory_launcher_variables_are_shown_not_raised(quick, monkeypatch):
    monkeypatch.setenv("RANK", "7")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    report = collect()
    assert "WORLD_SIZE is not set" in report["launch"]["error"]
    assert report["variables"]["RANK"] == "7"


def test_a_missing_current_folder_and_a_broken_machine_file(quick, monkeypatch, tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    cache = tmp_path / "undertow"
    cache.mkdir()
    (cache / "machine.json").write_text("{")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    report = collect()
    assert "FileNotFoundError" in report["disks"]["error"]
    assert "cannot read the machine file" in report["undertow"]["error"]
    assert report["torch"]["version"]


def test_programs_that_fail_or_hang_are_told(monkeypatch, tmp_path):
    tool = tmp_path / "gcc"
    tool.write_text("#!/bin/sh\nexit 3\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment._first_line("gcc", "--version") == "does not answer"
    assert environment._first_line("gfortran", "--version") == "none"
    monkeypatch.setenv("PATH", "")
    assert environment._output("gcc") == ""


@pytest.mark.parametrize(
    ("name", "value", "secret"),
    [
        ("HF_TOKEN", "x", True),
        ("UNDERTOW_S3_SECRET", "x", True),
        ("SLURM_JWT_AUTH", "x", True),
        ("MPI_PASSWORD", "x", True),
        ("UNDERTOW_KEY", "x", True),
        ("UNDERTOW_STORE", "https://me:pw@host/p", True),
        ("HF_HOME", "hf_abcdefghijklmnopqrstuvw", True),
        ("NCCL_SOCKET_IFNAME", "eth0", False),
        ("UNDERTOW_MPI_KEYFRAMES", "1", False),
        ("MASTER_ADDR", "10.0.0.1", False),
        ("UNDERTOW_STORE", "s3://bucket/path", False),
    ],
)
def test_secrets_are_hidden(name, value, secret):
    assert looks_secret(name, value) is secret
    assert relevant_variables({name: value})[name] == (HIDDEN if secret else value)


def test_variables_of_others_are_not_shown():
    shown = relevant_variables({"AWS_REGION": "eu", "HOME": "/home/me", "NCCL_DEBUG": "INFO", "PATH": "/bin"})
    assert shown == {"NCCL_DEBUG": "INFO"}
