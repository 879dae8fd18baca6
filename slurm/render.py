"""A `Request` and a template's text → the sbatch file: pure, and the file needs nothing of this package's folder.

A template is text with {{name}} for a value and {{include NAME}} for a shared part (signals, network, node check), so
that the four differ only in how they start a step. A name that has no value is a defect and raises.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from .request import Request

FOLDER = Path(__file__).parent
INCLUDE = re.compile(r"^\{\{include (\w+)\}\}\n", re.M)
VALUE = re.compile(r"\{\{(\w+)\}\}")


def render(request: Request) -> str:
    """The whole file."""
    values = _values(request)
    text = INCLUDE.sub(lambda found: _text(found[1]), _text(request.template))
    return VALUE.sub(lambda found: values[found[1]], text)


def explain(request: Request) -> list[str]:
    """What was chosen, one line each, for stderr."""
    r = request
    per = f"{r.cpus_per_task} CPU{'s' if r.cpus_per_task > 1 else ''} per rank"
    lines = [f"template {r.template}: {r.nodes} node(s) × {r.tasks_per_node} rank(s) = {r.ntasks} ranks, {per}"]
    if r.template == "array":
        return [f"template array: {len(r.cases)} tasks of {per.replace('rank', 'task')}", f"results in {r.run_dir}"]
    lines.append(f"time limit {r.minutes} min; USR1 {r.signal_before_s} s before it: save, requeue, resume")
    budget = f"{r.max_restarts} restarts within a start, {r.max_requeues} requeues"
    lines.append(f"budget: {budget} (MAX_RESTARTS, MAX_REQUEUES in the environment change them)")
    if r.min_nodes:
        lines.append(f"elastic: goes on with {r.min_nodes} to {r.nodes} nodes")
    lines.append(f"network interface: {r.interface or 'left to NCCL and undertow (--interface NAME fixes it)'}")
    each = "reports of the preload" if r.template == "mpi" and not r.mpi else "logs per rank"
    lines.append(f"run in {r.run_dir}, {each} in {_log_dir(r)}")
    if r.template == "mpi":
        lines.append(f"ranks start by {f'srun --mpi={r.mpi}' if r.mpi else 'mpirun (--mpi pmix or pmi2: by srun)'}")
    lines.append(f"each rank runs: {' '.join(_command(r))}")
    return lines


def _text(name: str) -> str:
    return (FOLDER / f"{name}.sbatch").read_text()


def _command(r: Request) -> tuple[str, ...]:
    return r.command or ("-m", "undertow", "train", "--out", "$RUN_DIR", "--resume")


def _log_dir(r: Request) -> str:
    return r.log_dir or f"{r.run_dir}-logs"


def _values(r: Request) -> dict[str, str]:
    torchrun = r.template == "torchrun"
    interface = ""
    if r.interface:
        interface = f"export NCCL_SOCKET_IFNAME=${{NCCL_SOCKET_IFNAME:-{r.interface}}}"
        interface += f" GLOO_SOCKET_IFNAME=${{GLOO_SOCKET_IFNAME:-{r.interface}}}"
    launcher, note = (
        "${MPIRUN:-mpirun} -n {} ${MPIRUN_OPTIONS:-}".replace("{}", str(r.ntasks)),
        "mpirun starts the ranks",
    )
    if r.mpi:
        launcher = (
            f"srun --mpi={r.mpi} --ntasks={r.ntasks} --ntasks-per-node={r.tasks_per_node} --kill-on-bad-exit=1 "
            '--unbuffered \\\n         --output="$LOG_DIR/$name-rank-%t.log"'
        )
        note = f"srun starts the ranks, which meet through its plugin {r.mpi}"
    return {
        "template": r.template,
        "launcher": launcher,
        "launcher_note": note,
        "job_name": r.job_name,
        "time": str(r.minutes),
        "run_dir_sh": _in_shell(r.run_dir),
        "log_dir_sh": _in_shell(_log_dir(r)),
        "directives": "\n".join(f"#SBATCH --{line}" for line in _directives(r)),
        "python": shlex.quote(r.python),
        "setup": "\n".join(r.setup) or "# --setup 'source …/bin/activate' puts lines here",
        "interface": interface
        or "# NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME: set them when the wrong network is chosen",
        "threads": str(r.cpus_per_task),
        "cpus_per_task": str(r.cpus_of_a_task),
        "nodes": str(r.nodes),
        "nnodes": f"{r.min_nodes}:{r.nodes}" if r.min_nodes else str(r.nodes),
        "tasks_per_node": str(r.tasks_per_node),
        "ntasks": str(r.ntasks),
        "gpus_per_node": str(r.gpus_per_node),
        "min_disk": r.min_disk,
        "max_restarts": str(r.max_restarts),
        "torchrun_restarts": str(r.max_restarts if torchrun else 0),
        "max_requeues": str(r.max_requeues),
        "command": " ".join('"$RUN_DIR"' if word == "$RUN_DIR" else shlex.quote(word) for word in _command(r)),
        "cases": "\n".join(f"    {shlex.quote(case)}" for case in r.cases),
    }


def _in_shell(path: str) -> str:
    """%x and %j of an #SBATCH line, as the shell knows them."""
    return path.replace("%x", "$SLURM_JOB_NAME").replace("%j", "$SLURM_JOB_ID")


def _directives(r: Request) -> list[str]:
    if r.template == "array":
        lines = ["ntasks=1", f"array=0-{len(r.cases) - 1}", "requeue"]
    else:
        each = 1 if r.template == "torchrun" else r.tasks_per_node
        lines = [f"nodes={r.nodes}", f"ntasks-per-node={each}", "requeue", f"signal=B:USR1@{r.signal_before_s}"]
        if r.min_nodes:
            lines.append("no-kill")  # a lost node ends its step, not the job
    lines.append(f"cpus-per-task={r.cpus_of_a_task}")
    if r.gpus_per_node:
        lines.append(f"gpus-per-node={r.gpus_per_node}" if r.template != "array" else f"gpus={r.gpus_per_node}")
    lines += [f"{name}={value}" for name, value in (("partition", r.partition), ("account", r.account)) if value]
    return lines + list(r.directives)
