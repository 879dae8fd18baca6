"""Every command that README.md or a guide shows is run by a test or by CI; one that nobody claims fails here.
What needs a GPU is run by .ci/gpu, on a machine that has one.

Collected are lines of shell blocks, indented lines, and code spans of two words or more that begin with a program. Each
is claimed by its longest beginning in CLAIMS, launchers told apart but not their options. A claim by a test names its
file, in which the words of the command must stand; options are looked up in the help of the verb.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from undertow.__main__ import main
from undertow.benchmarks.discover import listed

pytestmark = pytest.mark.slow  # on the checkout only: the wheel's run has no README.md beside it
ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAM = re.compile(r"(undertow|torchrun|python|make|mpirun|pip|srun|sbatch|scancel|bash|\.ci/run)( |$)")
VARIABLE = re.compile(r"[A-Z_]+=(\$\([^)]*\)|\S+) ")

CI = "ci"  # .ci/run does the same: set-up, make system, make test (with the wheel), make check
READER = "reader"  # a place for the reader's own: nothing to run
HERE = "here"  # in this file

CLAIMS = {
    "make": CI,
    "make demo": HERE,
    "make clean": READER,
    "pip install": CI,
    "undertow --help": HERE,
    "undertow env": "tests/dist/test_environment.py",
    "undertow probe": "tests/dist/test_probe.py",
    "undertow train": "tests/examples/test_train.py",
    "torchrun undertow train": "tests/integrations/test_torchrun.py",
    "undertow ckpt": "tests/checkpointing/test_cli.py",
    "undertow deepspeed": "tests/integrations/test_deepspeed_plugin.py",
    "undertow plan": "tests/integrations/test_plan.py",
    "undertow report": "tests/integrations/test_report.py",
    "undertow slurm render": "tests/slurm/test_cluster.py",
    "undertow slurm check": "tests/integrations/test_torchrun.py",  # the page's own command
    "sbatch": "tests/slurm/conftest.py",
    "scancel": "tests/slurm/test_cluster.py",
    "srun": "tests/slurm/test_cluster.py",
    "undertow simulate": "tests/comms/test_simulate_cli.py",
    "undertow simulate t3": "tests/comms/t3_paper/test_cli.py",
    "undertow bench": "tests/benchmarks/test_commands.py",  # each in its smallest form
    "torchrun undertow bench": "tests/benchmarks/test_commands.py",
    "python -m undertow.examples.plain_checkpoint": "tests/examples/test_plain.py",
    "python -m undertow.examples.plain_stream": "tests/examples/test_plain.py",
    "python -m undertow.benchmarks.halo3d": "tests/benchmarks/test_commands.py",
    "python -m undertow.benchmarks.halo3d_load": "tests/benchmarks/test_commands.py",
    "python -m undertow.benchmarks.checkpoint_steps": "tests/benchmarks/test_checkpoint_programs.py",
    "python -m undertow.benchmarks.checkpoint_every": "tests/benchmarks/test_checkpoint_programs.py",
    "python -m undertow.benchmarks.kill_resume": "tests/benchmarks/test_commands.py",
    "python -m undertow.benchmarks.partner_kills": "tests/checkpointing/test_partner_machines.py",
    "python -m undertow.benchmarks.overlap_timeline": "tests/benchmarks/test_commands.py",
    "python -m undertow.benchmarks.overlap_choice": "tests/benchmarks/test_overlap_choice.py",
    "python -m undertow.benchmarks.overlap_goals": "tests/benchmarks/test_overlap_goals.py",
    "python -m undertow.benchmarks.overlap_host": ".ci/gpu",
    "python -m undertow.benchmarks.overlap_traffic": ".ci/gpu",
    "python -m undertow.benchmarks.mpi_gpu_paths": ".ci/gpu",
    "python -m undertow.benchmarks.mpi_gpu_pages": "tests/benchmarks/test_mpi_gpu_models.py",
    "python -m undertow.benchmarks.mpi_gpu_record": "tests/benchmarks/test_mpi_gpu_models.py",
    "python benchmarks/attention_blocks": "tests/benchmarks/test_attention_programs.py",
    "python benchmarks/attention_modelled": "tests/benchmarks/test_attention_programs.py",
    "python benchmarks/attention_choice": "tests/benchmarks/test_attention_programs.py",
    "undertow workloads": "tests/examples/workloads/test_cli.py",
    "torchrun undertow workloads": "tests/examples/workloads/test_equivalence.py",
    "undertow stream plan": "tests/parallel/test_stream_cli.py",
    "undertow mpi run": "tests/mpi_interpose/test_cli.py",
    "undertow mpi doctor": "tests/mpi_interpose/test_cli.py",
    "undertow mpi explain": "tests/mpi_interpose/test_cli.py",
    "undertow mpi measure": "tests/mpi_interpose/test_policy.py",
    "undertow mpi build": "tests/mpi_interpose/test_cli.py",
    "mpirun -n 4 undertow mpi doctor": "tests/mpi_interpose/test_gpu.py",
    "mpirun -n 4 ./app": READER,
    "python -m undertow.mpi_interpose.gpu_kernels": "tests/mpi_interpose/test_gpu.py",
    "torchrun program.py": "tests/comms/test_docs.py",
    "torchrun --nproc-per-node 4 ring.py": "tests/parallel/test_token_ring_docs.py",
    "torchrun undertow.examples.context_parallel_hf": HERE,
    "torchrun undertow.examples.context_parallel_trainer": "tests/integrations/test_huggingface_docs.py",
    "python -m pytest -p undertow.integrations.pytest_plugin": "tests/integrations/test_torchrun.py",
    "mpirun -n 2 python -m pytest --with-mpi": HERE,
    "python -m undertow.examples.trl_recipes": "tests/integrations/test_trl_recipes.py",
}


def collect(text: str) -> list[str]:
    """The commands of a page, one line each, without comments."""
    found: list[str] = []

    def block(match: re.Match[str]) -> str:
        if match.group(1) in ("", "sh", "bash"):
            found.extend(match.group(2).replace("\\\n", " ").splitlines())
        return ""

    rest = re.sub(r"```(\w*)\n(.*?)```", block, text, flags=re.S)
    found += [line for line in rest.splitlines() if line.startswith("    ")]
    found += re.findall(r"\$\((undertow [^)]*)\)", text)
    found += [span for span in re.findall(r"`([^`]+)`", re.sub(r"\s+", " ", rest)) if " " in span]
    lines = [" ".join(line.split("  #")[0].split(" # ")[0].split()) for line in found]
    return [line for line in dict.fromkeys(lines) if PROGRAM.match(VARIABLE.sub("", line))]


def spoken(command: str) -> str:
    """Without variables; torchrun and what it starts, without torchrun's options."""
    command = VARIABLE.sub("", command)
    if command.startswith("torchrun"):
        program = re.search(r"(?:-m )?((?:undertow|program)\b.*)", command)
        return f"torchrun {program.group(1)}" if program else command
    return command


def claim(command: str) -> str | None:
    said = spoken(command)
    fitting = [words for words in CLAIMS if said == words or said.startswith((f"{words} ", f"{words}."))]
    return CLAIMS[max(fitting, key=len)] if fitting else None


COMMANDS = {(page.name, command) for page in PAGES if page.exists() for command in collect(page.read_text())}


def test_every_command_is_claimed():
    assert len(COMMANDS) > 60, "the collector finds too few"
    unclaimed = sorted(f"{page}: {command}" for page, command in COMMANDS if claim(command) is None)
    assert not unclaimed, "nobody runs these; claim them in tests/test_doc_commands.py:\n" + "\n".join(unclaimed)


def test_no_claim_is_empty():
    spoken_all = {spoken(command) for _, command in COMMANDS}
    idle = [words for words in CLAIMS if not any(said.startswith(words) for said in spoken_all)]
    assert not idle, f"no page shows these any more: {idle}"


def test_documented_benchmarks_exist():
    """tests/benchmarks/test_commands.py runs all that exist."""
    shown = {name for _, command in COMMANDS for name in re.findall(r"undertow bench (\w+)", command)} - {"NAME"}
    assert len(shown) > 8 and shown <= set(listed()), shown - set(listed())


@pytest.mark.parametrize("words", [words for words, by in CLAIMS.items() if by.startswith(("tests/", ".ci/gpu"))])
def test_the_claimed_test_says_these_words(words):
    """Or it names every page that shows the command, and runs the page's blocks."""
    text = (ROOT / CLAIMS[words]).read_text()
    names = set(re.findall(r"[a-z_0-9]{2,}", words)) - {"undertow", "torchrun", "python", "py"}
    pages = {page for page, command in COMMANDS if spoken(command).startswith(words)}
    missing = [name for name in names if name not in text]
    assert not missing or all(page in text for page in pages), f"{CLAIMS[words]} never says {missing}, nor {pages}"


def _options() -> list[tuple[str, tuple[str, ...]]]:
    """(a verb with its command, the long options that pages give it)."""
    asked: dict[str, set[str]] = {}
    for _, command in COMMANDS:
        match = re.search(
            r"undertow (simulate t3|(?:ckpt|deepspeed|slurm|mpi|workloads|stream) [a-z]+|[a-z]+)", command
        )
        if match and "undertow." not in command:
            mine = command.split(" -- ")[0].split(match.group(0))[1]
            asked.setdefault(match.group(1), set()).update(re.findall(r" (--[a-z][a-zA-Z-]*)", mine))
    return sorted((verb, tuple(sorted(options))) for verb, options in asked.items() if options - {"--help"})


@pytest.mark.parametrize(("verb", "options"), _options(), ids=lambda value: value if isinstance(value, str) else "")
def test_the_options_exist(verb, options, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    words = verb.split()
    try:
        main([*words, "--help"])
    except SystemExit as stop:
        assert not stop.code
    said = capsys.readouterr().out
    missing = [option for option in options if option != "--help" and option not in said]
    assert not missing, f"undertow {verb} has no {missing}:\n{said}"


def run(command: str, folder: Path, timeout_s: float = 600) -> str:
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    env |= {"OMP_NUM_THREADS": "1", "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    done = subprocess.run(
        shlex.split(command), cwd=folder, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=timeout_s,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout + done.stderr


def test_help_lists_every_verb(capsys):
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"\n  {verb} " in said for verb in ("train", "ckpt", "mpi", "slurm", "plan", "report", "env"))


def test_the_demo_in_small(tmp_path):
    """`make demo` is set-up and `undertow demo`: a run, one with a kill inside a checkpoint, its restart, compared."""
    said = run("undertow demo --recipe tiny --ranks 1", tmp_path, 800)
    assert "killed rank 0" in said and said.count("bit-identical") == 3


def test_one_sequence_on_two_ranks(tmp_path):
    command = next(c for _, c in COMMANDS if spoken(c).startswith("torchrun undertow.examples.context_parallel_hf"))
    assert run(f"{command.replace('torchrun', 'torchrun --standalone', 1)}", tmp_path)


def test_pytest_under_mpi(tmp_path):
    if not (Path(sys.executable).parent / "mpirun").exists():
        pytest.skip("needs an MPI beside this Python: pip install 'undertow[mpi]'")
    (tmp_path / "test_it.py").write_text(
        "import pytest\nfrom mpi4py import MPI\n\n\n@pytest.mark.mpi(min_size=2)\ndef test_it():\n"
        "    assert MPI.COMM_WORLD.allreduce(1) == 2\n"
    )
    assert "1 passed" in run("mpirun -n 2 python -m pytest --with-mpi -p no:cacheprovider test_it.py", tmp_path)
