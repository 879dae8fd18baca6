"""What an import brings: this very package, and nothing heavy before it is asked for."""

from __future__ import annotations

import importlib
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
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120)


def exists(module: str) -> bool:
    """Whether the verb's module is part of the package yet. Later issues bring their own."""
    return (Path(undertow.__file__).parent / Path(*module.strip(".").split("."))).with_suffix(".py").exists()


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


# The id is more than the verb's name, because pytest-mpi skips any test that has the keyword 'mpi'.
@pytest.mark.slow
@pytest.mark.parametrize(
    "verb", [verb for verb, (module, _) in VERBS.items() if exists(module)], ids="undertow {}".format
)
def test_every_verb_helps(verb):
    done = run("-m", "undertow", verb, "--help")
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout.lower()
    assert "Traceback" not in done.stderr


def test_an_unknown_verb_is_one_clear_line():
    done = run("-m", "undertow", "trian")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "'trian' is not a verb" in done.stderr


@pytest.mark.parametrize("folder", ["dist", "comms", "checkpointing", "parallel", "integrations", "benchmarks"])
def test_every_module_can_be_imported(folder):
    """Plain import, without the optional frameworks: adapters import theirs where they are used or named."""
    base = Path(undertow.__file__).parent
    for path in sorted((base / folder).rglob("*.py")):
        if path.stem == "__main__":
            continue
        name = ".".join(("undertow", *path.relative_to(base).with_suffix("").parts)).removesuffix(".__init__")
        try:
            importlib.import_module(name)
        except ImportError as error:
            # A file named after a framework may need it at the top; anything else is a defect.
            assert error.name and error.name.split(".")[0] in path.stem, f"{name}: {error}"
