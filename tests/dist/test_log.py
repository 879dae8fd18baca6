"""Logging: which rank says what, and that nothing is said twice."""

from __future__ import annotations

import logging

import pytest

from undertow.dist import log
from undertow.dist.launch_env import Launch


@pytest.fixture
def fresh(monkeypatch):
    """A process in which nothing was logged yet, and whose application (pytest) did not configure logging."""
    root = logging.getLogger(log.ROOT)
    handlers, level = root.handlers[:], root.level
    root.handlers[:] = []
    monkeypatch.setattr(log, "_said", set())
    monkeypatch.setattr(log, "_application_configured", lambda: any(map(not_pytests, logging.getLogger().handlers)))
    for name in ("RANK", "WORLD_SIZE", "UNDERTOW_LOG"):
        monkeypatch.delenv(name, raising=False)
    yield monkeypatch
    root.handlers[:] = handlers
    root.setLevel(level)


def not_pytests(handler: logging.Handler) -> bool:
    return not type(handler).__module__.startswith("_pytest")


def launch(rank: int, world: int) -> Launch:
    return Launch("torchrun", rank, world, rank, world)


def test_rank_0_informs_and_others_only_warn(fresh, capsys):
    for rank in (0, 1):
        log.set_launch(launch(rank, 2))
        logger = log.get_logger("undertow.dist.x")
        logger.debug("hidden")
        logger.info("step %d", 3)
        logger.warning("slow")
    assert capsys.readouterr().err.splitlines() == [
        "undertow: step 3",
        "undertow warning [rank 0]: slow",
        "undertow warning [rank 1]: slow",
    ]


def test_a_single_process_needs_no_rank(fresh, capsys):
    log.get_logger("elsewhere").warning("x")
    assert capsys.readouterr().err == "undertow warning: x\n"


def test_the_launcher_decides_when_nobody_said(fresh, capsys):
    fresh.setenv("RANK", "3")
    fresh.setenv("WORLD_SIZE", "4")
    log.get_logger("undertow.a").info("hidden")
    log.get_logger("undertow.a").error("seen")
    assert capsys.readouterr().err == "undertow error [rank 3]: seen\n"


def test_debug_lets_every_rank_speak(fresh, capsys):
    fresh.setenv("UNDERTOW_LOG", "debug")
    log.set_launch(launch(1, 2))
    log.get_logger("undertow.a").debug("d")
    log.get_logger("undertow.a").info("i")
    assert capsys.readouterr().err.splitlines() == ["undertow debug [rank 1]: d", "undertow [rank 1]: i"]


def test_an_unknown_level_is_named_and_info_is_used(fresh, capsys):
    fresh.setenv("UNDERTOW_LOG", "loud")
    log.get_logger("undertow.a").info("still here")
    err = capsys.readouterr().err
    assert "UNDERTOW_LOG is 'loud'; expected one of debug, info" in err and "still here" in err


def test_broken_launcher_variables_do_not_swallow_a_message(fresh, capsys):
    fresh.setenv("RANK", "x")
    log.get_logger("undertow.a").warning("w")
    assert "w" in capsys.readouterr().err


def test_once(fresh, capsys):
    logger = log.get_logger("undertow.a")
    for name in ("a", "a", "b"):
        log.warn_once(logger, "slow path for %s", name)
    assert capsys.readouterr().err.splitlines() == [
        "undertow warning: slow path for a",
        "undertow warning: slow path for b",
    ]


def test_an_application_that_configured_logging_gets_each_record_once(fresh, capsys):
    records = []

    class Theirs(logging.Handler):
        def emit(self, record):
            records.append(record.getMessage())

    log.get_logger("undertow.a")
    theirs = Theirs()
    logging.getLogger().addHandler(theirs)
    log.get_logger("undertow.a").warning("once")
    logging.getLogger().removeHandler(theirs)
    assert records == ["once"]
    assert capsys.readouterr().err == ""


def test_two_calls_install_one_handler(fresh):
    log.get_logger("undertow.a")
    log.get_logger("undertow.b")
    assert len(logging.getLogger(log.ROOT).handlers) == 1
