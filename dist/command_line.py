"""One way to run a typer application behind a verb: what was mistyped is said with the usage, and the exit code is 2.

Every verb's `main(argv)` is `run_application(app, argv, "undertow VERB")`. Commands return an exit code, or nothing.
typer itself offers either such lines or return values; without its stand-alone mode a misspelt option is a traceback.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import typer

INTERRUPTED = 130  # 128 + SIGINT, as shells count


def application(**options: Any) -> typer.Typer:
    """A typer application in the one look of all verbs: plain help without boxes (-h too), no completion, plain
    tracebacks."""
    names = {"help_option_names": ["--help", "-h"]}
    return typer.Typer(
        add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, context_settings=names, **options
    )


def run_application(app: typer.Typer, argv: Sequence[str], prog_name: str) -> int:
    """The exit code: a command's return value or `typer.Exit`, 2 for wrong usage, 130 for Ctrl-C, 1 for an abort."""
    try:
        return int(app(args=list(argv), prog_name=prog_name, standalone_mode=False) or 0)
    except SystemExit as stop:
        if isinstance(stop.code, str):  # a message, which Python prints
            raise
        return int(stop.code or 0)
    except KeyboardInterrupt:
        return INTERRUPTED
    except typer.Abort:  # end of input at a question, and Ctrl-C with typer up to 0.15
        typer.echo("stopped", err=True)
        return 1
    except Exception as error:
        show = getattr(error, "show", None)  # click's usage errors; typer keeps a copy of click from 0.26 on
        if show is None or not hasattr(error, "format_message"):
            raise
        show()
        return int(getattr(error, "exit_code", 2))
