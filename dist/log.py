"""Logging that knows its rank: information comes from rank 0 only, a warning from any rank and says which.

`get_logger(__name__)` gives an ordinary `logging` logger below 'undertow'. Its one handler writes to whatever
`sys.stderr` is at that moment (so a progress bar stays whole), and keeps silent when the application configured
logging itself: the records then reach the application's handlers instead of appearing twice.
UNDERTOW_LOG=debug|info|warning|error sets the level; at debug every rank speaks.
"""

from __future__ import annotations

import logging
import os
import sys
import threading

from .errors import UndertowError
from .launch_env import Launch, detect

ROOT = "undertow"
_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
_lock = threading.Lock()
_said: set[tuple[str, str]] = set()


def get_logger(name: str) -> logging.Logger:
    """The logger of a module; `name` is its `__name__`."""
    root = logging.getLogger(ROOT)
    with _lock:
        if not any(isinstance(handler, RankHandler) for handler in root.handlers):
            asked = os.environ.get("UNDERTOW_LOG", "info").strip().lower() or "info"
            root.addHandler(RankHandler())
            root.setLevel(_LEVELS.get(asked, logging.INFO))
            if asked not in _LEVELS:
                root.warning("UNDERTOW_LOG is '%s'; expected one of %s; info is used", asked, ", ".join(_LEVELS))
    return logging.getLogger(name if name == ROOT or name.startswith(ROOT + ".") else f"{ROOT}.{name}")


def warn_once(logger: logging.Logger, message: str, *args: object) -> None:
    """Warn, unless this process already said the same through the same logger."""
    key = (logger.name, message % args if args else message)
    with _lock:
        if key in _said:
            return
        _said.add(key)
    logger.warning(message, *args, stacklevel=2)


def set_launch(launch: Launch) -> None:
    """Tell the handler which rank this is; without it the launcher's variables decide at the first message."""
    get_logger(ROOT)
    for handler in logging.getLogger(ROOT).handlers:
        if isinstance(handler, RankHandler):
            handler.launch = launch


class RankHandler(logging.Handler):
    """Prints to the present `sys.stderr`; drops information of ranks other than 0 unless the level is debug."""

    launch: Launch | None = None

    def emit(self, record: logging.LogRecord) -> None:
        if _application_configured():
            return
        if self.launch is None:
            try:
                self.launch = detect()
            except UndertowError:  # reported by whoever needs the launch; a message must still come out
                self.launch = Launch("plain", 0, 1, 0, 1)
        launch, quiet = self.launch, logging.getLogger(ROOT).level > logging.DEBUG
        if quiet and launch.rank != 0 and record.levelno < logging.WARNING:
            return
        level = "" if record.levelno == logging.INFO else f" {record.levelname.lower()}"
        rank = f" [rank {launch.rank}]" if launch.world_size > 1 and (level or launch.rank) else ""
        try:
            sys.stderr.write(f"undertow{level}{rank}: {self.format(record)}\n")
            sys.stderr.flush()
        except (OSError, ValueError):  # stderr is closed
            self.handleError(record)


def _application_configured() -> bool:
    return bool(logging.getLogger().handlers)
