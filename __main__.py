"""The command line: maps a verb to a module's `main(argv)` and imports only that one.

`undertow VERB …`, `python -m undertow VERB …` and `torchrun … -m undertow VERB …` are the same program.
"""

from __future__ import annotations

import difflib
import errno
import importlib
import os
import sys

VERBS = {
    "train": (".examples.train", "train the byte-level language model, with checkpoints and resume"),
    "demo": (".examples.demo", "train, kill a rank, restart, and show that the runs are bit-identical"),
    "ckpt": (".checkpointing.cli", "list, verify, inspect and prune checkpoints"),
    "deepspeed": (".integrations.deepspeed_cli", "check a DeepSpeed configuration, verify and convert its checkpoints"),
    "probe": (".dist.probe", "measure this machine and write its JSON file"),
    "simulate": (".comms.simulate_cli", "simulate a communication schedule and draw its timeline"),
    "bench": (".benchmarks.cli", "run a benchmark against its rivals"),
    "stream": (".parallel.stream.cli", "plan streamed backpropagation: memory, time and the longest sequence"),
    "workloads": (".examples.workloads.cli", "learning methods on top of the systems: list, train, claim, compare"),
    "plan": (".integrations.plan_cli", "pre-flight: does it fit, step time, schedules, checkpoints, goodput"),
    "report": (".integrations.report", "a run as one HTML page: loss, stall, memory, overlap timeline"),
    "slurm": (".slurm.cli", "sbatch files that save, requeue and resume; the check of a node"),
    "mpi": (".mpi_interpose.cli", "the MPI datatype interposer: run, doctor, measure, explain, build"),
    "env": (".dist.environment", "print everything that a bug report needs"),
}
REFUSED = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}  # by the machine: no defect of ours
WITHOUT_TORCH = "to mend it: pip install torch==2.13.0 (or any from 2.11 on); `undertow env` shows what is there"


def usage() -> str:
    width = max(map(len, VERBS))
    rows = "\n".join(f"  {verb:<{width}}  {text}" for verb, (_, text) in VERBS.items())
    return f"usage: undertow VERB [options]\n\n{rows}\n\n'undertow VERB --help' shows a verb's options.\n"


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        sys.stdout.write(usage())
        return 0
    if argv[0] in ("-V", "--version"):
        from .dist.version import __version__

        sys.stdout.write(f"undertow {__version__}\n")
        return 0
    if argv[0] not in VERBS:
        close = difflib.get_close_matches(argv[0], VERBS, 1)
        remedy = f"; to mend it: undertow {close[0]}" if close else ""
        sys.stderr.write(f"undertow: '{argv[0]}' is not a verb; expected one of {', '.join(VERBS)}{remedy}\n")
        return 2
    from .dist.errors import UndertowError, UserError

    try:
        module = importlib.import_module(VERBS[argv[0]][0], __package__)
        return int(module.main(argv[1:]) or 0)
    except UndertowError as error:
        _record(error)
        sys.stderr.write(f"undertow {argv[0]}: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:  # while torch is imported; later, run_application hears it
        sys.stderr.write(f"undertow {argv[0]}: stopped\n")
        return 130
    except BrokenPipeError:  # `undertow … | head`
        sys.stderr.close()
        return 141
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        sys.stderr.write(f"undertow {argv[0]}: PyTorch is not installed in {sys.prefix}; {WITHOUT_TORCH}\n")
        return UserError.exit_code
    except OSError as error:
        if error.errno not in REFUSED:
            raise
        refused = UserError(str(error), expected="a place that can be written, with room")
        _record(refused)
        sys.stderr.write(f"undertow {argv[0]}: {refused}\n")
        return refused.exit_code
    except Exception as error:
        _record(error)
        raise


def _record(error: Exception) -> None:
    """Under torchrun: leave the error where its agent looks for the first one, to name it in its summary. Of what a
    user can mend that is the message; torch's own form adds a traceback, and would show that instead."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    from .dist.errors import UserError

    if isinstance(error, UserError):
        import json
        import time

        message = {"message": str(error), "extraInfo": {"timestamp": str(int(time.time()))}}
        with open(path, "w") as file:
            json.dump({"message": message}, file)
        return
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    get_error_handler().record_exception(error)


if __name__ == "__main__":
    sys.exit(main())
