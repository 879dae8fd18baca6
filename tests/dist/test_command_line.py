"""What users mistype at a verb is answered in a line with exit code 2, never by a traceback, and codes come through."""

import importlib

import pytest
import typer

from undertow.__main__ import VERBS
from undertow.__main__ import main as undertow
from undertow.dist.command_line import INTERRUPTED, application, run_application

COMMANDS = [*VERBS, "simulate t3", "stream plan", "ckpt list", "workloads train", "mpi doctor"]


@pytest.mark.parametrize("verb", COMMANDS, ids=lambda verb: f"undertow-{verb}")  # 'mpi' alone is pytest-mpi's word
def test_a_misspelt_option_is_said_with_the_usage(verb, capsys):
    assert undertow([*verb.split(), "--no-such-option"]) == 2
    captured = capsys.readouterr()
    said = captured.out + captured.err
    assert "No such option: --no-such-option" in said
    assert f"Usage: undertow {verb.split()[0]}" in said and "Traceback" not in said


@pytest.mark.parametrize("argv", [["train", "--steps", "x"], ["train", "extra"], ["train", "--out"], ["workloads"]])
def test_wrong_values_and_extra_words_too(argv, capsys):
    assert undertow(argv) == 2
    said = "".join(capsys.readouterr())
    assert "Usage: undertow" in said or "Error: Option '--out' requires an argument." in said


def test_all_verbs_have_one_look(capsys):
    for verb in VERBS:
        assert undertow([verb, "-h"]) == 0
        said = capsys.readouterr().out
        assert said.startswith(f"Usage: undertow {verb}") and "╭" not in said


def test_a_misspelt_verb_names_the_nearest(capsys):
    assert undertow(["chpt"]) == 2
    assert capsys.readouterr().err.endswith("to mend it: undertow ckpt\n")


def _app(command):
    app = application()
    app.command()(command)
    return app


def _raise(error):
    raise error


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (lambda: None, 0),
        (lambda: 7, 7),
        (lambda: _raise(typer.Exit(3)), 3),
        (lambda: _raise(SystemExit(4)), 4),
        (lambda: _raise(SystemExit()), 0),
        (lambda: _raise(KeyboardInterrupt()), INTERRUPTED),
        (lambda: _raise(typer.Abort()), 1),
        (lambda: _raise(typer.BadParameter("no")), 2),
    ],
)
def test_codes(command, code):
    assert run_application(_app(command), [], "undertow test") == code


def test_defects_keep_their_traceback_and_messages_are_left_to_python():
    with pytest.raises(ZeroDivisionError):
        run_application(_app(lambda: 1 / 0), [], "undertow test")
    with pytest.raises(SystemExit, match="words"):
        run_application(_app(lambda: _raise(SystemExit("words"))), [], "undertow test")


def test_every_verb_is_a_module_with_main():
    assert all(callable(importlib.import_module(f"undertow{module}").main) for module, _ in VERBS.values())
