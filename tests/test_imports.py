"""What an import brings: this very package, and nothing heavy before it is asked for."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import undertow
from undertow.__main__ import VERBS

# Each of these takes a noticeable part of a second, or is optional.
HEAVY = ("torch", "numpy", "rich", "typer", "matplotlib", "transformers", "deepspeed", "mpi4py", "cupy", "xxhash")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=280)


def test_the_tests_run_against_what_they_claim():
    """`.ci/test` names the folder that the wheel was installed into; otherwise the tests' own checkout is meant."""
    expected = os.environ.get("UNDERTOW_TESTED_FROM")
    folder = Path(expected) / "undertow" if expected else Path(__file__).resolve().parents[1]
    assert Path(undertow.__file__).resolve().parent == folder.resolve()


@pytest.mark.parametrize("module", ["undertow", "undertow.__main__", "undertow.dist.errors", "undertow.dist.version"])
def test_light_modules_import_nothing_heavy(module):
    done = run("-c", f"import sys, {module}; print(sorted(set(sys.modules) & set({HEAVY!r})))")
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_usage_names_every_verb():
    done = run("-m", "undertow", "--help")
    assert done.returncode == 0
    assert all(f"\n  {verb} " in done.stdout for verb in VERBS)


HELP_OF_ALL = """
import contextlib, io, json
from undertow.__main__ import VERBS, main

def help_of(verb):
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            code = main([verb, "--help"])
        except SystemExit as left:
            code = left.code
    return code or 0, said.getvalue()

print(json.dumps({verb: help_of(verb) for verb in VERBS}))
"""


@pytest.mark.slow
def test_every_verb_helps():
    """In one process, because starting one for each takes half a minute."""
    done = run("-c", HELP_OF_ALL)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == set(VERBS)
    for verb, (code, text) in found.items():
        assert code == 0 and "usage" in text.lower() and "Traceback" not in text, f"{verb}: {text}"


WITHOUT_TORCH = """
import contextlib, io, json, sys

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")

sys.meta_path.insert(0, NoTorch())
from undertow.__main__ import main

def told(*words):
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main(list(words))
    return code, said.getvalue()

commands = ["env", "env --json", "train", "report runs", "plan --help", "ckpt list runs", "probe", "bench",
            "slurm render torchrun --nodes 2", "simulate --help", "mpi doctor --help", "bench checksum --list"]
print(json.dumps({command: told(*command.split()) for command in commands}))
"""


@pytest.mark.slow
def test_without_torch_there_is_one_clear_line():
    """Before anyone has installed it: what can work does, the bug report too, the rest says what to install."""
    done = run("-c", WITHOUT_TORCH)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for command in ("env", "bench", "slurm render torchrun --nodes 2", "simulate --help", "mpi doctor --help"):
        assert found.pop(command)[0] == 0, command
    assert json.loads(found.pop("env --json")[1])["torch"]["error"].startswith("ModuleNotFoundError")
    assert found
    for command, (code, said) in found.items():
        assert code == 2 and said.count("\n") == 1, f"{command}: {said}"
        assert "PyTorch is not installed" in said and "pip install torch==" in said, said


def test_an_unknown_verb_is_one_clear_line():
    done = run("-m", "undertow", "trian")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "'trian' is not a verb" in done.stderr


ROOMS = ("dist", "comms", "slurm", "mpi_interpose", "checkpointing", "parallel", "integrations", "benchmarks")


@pytest.mark.parametrize("folder", ROOMS)
def test_every_module_can_be_imported(folder):
    """Plain import, without the optional frameworks: adapters import theirs where they are used or named."""
    base = Path(undertow.__file__).parent
    paths = sorted((base / folder).rglob("*.py"))
    assert paths, f"no module of {folder} is installed"
    for path in paths:
        if path.stem == "__main__":
            continue
        name = ".".join(("undertow", *path.relative_to(base).with_suffix("").parts)).removesuffix(".__init__")
        try:
            importlib.import_module(name)
        except ImportError as error:
            # A file named after a framework may need it at the top; anything else is a defect.
            assert error.name and error.name.split(".")[0] in path.stem, f"{name}: {error}"
