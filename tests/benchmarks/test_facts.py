"""Facts for the reader of a result: names for files, the commit with its dirty flag, no folder of one machine."""

from __future__ import annotations

import subprocess

import pytest

from undertow.benchmarks import facts


@pytest.mark.parametrize(
    ("hardware", "name"),
    [
        ("1 x NVIDIA H200 + 16 cores of INTEL(R) XEON(R) PLATINUM 8558", "1x-nvidia-h200"),
        ("2 cores of AMD EPYC", "2core-amd-epyc"),
        ("8 cores of Intel(R) Core(TM) i7-9700K CPU @ 3.60GHz", "8core-intel-core-i7-9700k"),
        ("4 cores of weird/../name processor", "4core-weird-name"),
    ],
)
def test_slug(hardware, name):
    assert facts.slug(hardware) == name


def git(folder, *arguments):
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True, timeout=240)


def test_commit_and_dirty_flag(tmp_path, monkeypatch):
    monkeypatch.setattr(facts, "ROOT", tmp_path)
    assert facts.commit() == "no git metadata"
    git(tmp_path, "init", "-q")
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    for path in ("code.py", "benchmarks/results/old.md"):
        (tmp_path / path).write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "one")
    clean = facts.commit()
    assert clean.startswith("commit ") and len(clean) == len("commit ") + 12
    (tmp_path / "benchmarks/results/old.md").write_text("2")
    (tmp_path / "untracked").write_text("3")
    assert facts.commit() == clean
    (tmp_path / "code.py").write_text("2")
    assert facts.commit() == f"{clean}, dirty"


def test_a_package_inside_another_repository_is_not_that_repository(tmp_path, monkeypatch):
    git(tmp_path, "init", "-q")
    (tmp_path / "site-packages" / "undertow").mkdir(parents=True)
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "somebody else's")
    monkeypatch.setattr(facts, "ROOT", tmp_path / "site-packages" / "undertow")
    assert facts.commit() == "no git metadata"


def test_facts_are_texts_without_folders():
    found = facts.facts(("xxhash", "no-such-package"))
    assert all(isinstance(value, str) and value for value in found.values())
    assert found["no-such-package"] == "not installed" and found["xxhash"][0].isdigit()
    assert not any(str(facts.ROOT) in value for value in found.values())
