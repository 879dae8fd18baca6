"""Read a `Schedule`'s text form back: `parse(str(schedule)) == schedule`, field by field.

One statement per line, so that a schedule can be compared with `diff`, kept beside a benchmark's result, edited by hand
and given to `undertow simulate`. A line that begins with '#' is a comment. docs/schedules.md states the grammar. An
error names the line and what was expected there; `parse` checks the syntax only, `check` the meaning.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ..dist.errors import UserError
from .actions import OPERATIONS, ROLES, Action, Compute, Param, Recv, Send, Slice, Value, Wait
from .schedule import Goal, Lane, Program, Schedule
from .terms import Applied, Atom, Content, Origin, Segment, join, op_text, segment

_TOKEN = re.compile(
    r'\s*(?:(?P<string>"(?:\\.|[^"\\])*")|(?P<number>-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)'
    r"|(?P<name>[A-Za-z_][A-Za-z0-9_./]*)|(?P<sign>=>|->|<-|[\[\](){},:;=+@~#]))"
)
T = TypeVar("T")


class _Line:
    """The tokens of one line, read from left to right."""

    def __init__(self, number: int, text: str) -> None:
        self.number, self.text, self.tokens, self.at = number, text, [], 0
        at = 0
        while text[at:].strip():
            match = _TOKEN.match(text, at)
            if not match:
                raise UserError(f"line {number}: cannot read {text[at:].strip()!r}", remedy="see docs/schedules.md")
            self.tokens.append((match.lastgroup, match[match.lastgroup or 0]))
            at = match.end()

    def peek(self) -> str:
        return self.tokens[self.at][1] if self.at < len(self.tokens) else ""

    def fail(self, expected: str) -> UserError:
        found = repr(self.peek()) if self.peek() else "the end of the line"
        return UserError(f"line {self.number}: {found} in {self.text.strip()!r}", expected=expected)

    def skip(self, sign: str) -> bool:
        """Step over `sign` if it comes next."""
        if self.peek() != sign:
            return False
        self.at += 1
        return True

    def need(self, sign: str) -> None:
        if not self.skip(sign):
            raise self.fail(f"'{sign}'")

    def take(self, kind: str, what: str) -> str:
        if self.at >= len(self.tokens) or self.tokens[self.at][0] != kind:
            raise self.fail(what)
        self.at += 1
        return self.tokens[self.at - 1][1]

    def name(self, what: str = "a name") -> str:
        return self.take("name", what)

    def integer(self, what: str = "a whole number") -> int:
        text = self.peek()
        if not re.fullmatch(r"-?\d+", text):
            raise self.fail(what)
        self.at += 1
        return int(text)

    def several(self, item: Callable[[], T], separator: str) -> tuple[T, ...]:
        found = [item()]
        while self.skip(separator):
            found.append(item())
        return tuple(found)

    def literal(self) -> Param:
        if self.at < len(self.tokens) and (
            self.tokens[self.at][0] in ("string", "number") or self.peek() in ("true", "false")
        ):
            self.at += 1
            return json.loads(self.tokens[self.at - 1][1])
        raise self.fail('a number, true, false or a "string"')

    def rows(self) -> tuple[int, int]:
        self.need("[")
        start = self.integer("the first row")
        self.need(":")
        stop = self.integer("the row after the last")
        self.need("]")
        return start, stop

    def slice(self) -> Slice:
        return Slice(self.name("a value"), *self.rows())

    def slices(self) -> tuple[Slice, ...]:
        """Zero or more slices."""
        return self.several(self.slice, ",") if self.at < len(self.tokens) and self.tokens[self.at][0] == "name" else ()

    def bracketed(self) -> tuple[Slice, ...]:
        self.need("(")
        found = self.slices()
        self.need(")")
        return found

    def params(self) -> tuple[tuple[str, Param], ...]:
        if not self.skip("{"):
            return ()
        found = self.several(self.param, ",")
        self.need("}")
        return found

    def param(self) -> tuple[str, Param]:
        key = self.name("a parameter's name")
        self.need("=")
        return key, self.literal()

    def content(self) -> Content:
        return join((piece,) for piece in self.several(self.segment, ";"))

    def segment(self) -> Segment:
        head = self.at
        label = ""
        if self.at < len(self.tokens) and self.tokens[self.at][0] == "name":
            label = op_text(self.name(), sorted(self.params()))
            if not self.skip(":"):
                label, self.at = "", head
        atoms, rows = zip(*self.several(self.atom, "+"))
        if len(set(rows)) != 1:
            raise UserError(
                f"line {self.number}: a sum of {' and '.join(map(str, rows))} rows", expected="equally many"
            )
        return segment(rows[0], label, atoms)

    def atom(self) -> tuple[Atom, int]:
        name = self.name("a term")
        if self.skip("@"):
            rank = self.integer("a rank")
            start, stop = self.rows()
            return Origin(name, rank, start), stop - start
        label = op_text(name, sorted(self.params()))
        self.need("(")
        args = self.several(self.content, ",")
        self.need(")")
        output = self.integer("the number of a result") if self.skip("#") else 0
        start, stop = self.rows()
        return Applied(label, args, output, start), stop - start

    def end(self) -> None:
        if self.at < len(self.tokens):
            raise self.fail("the end of the line")


def _value(line: _Line) -> Value:
    name, dtype = line.name("a value's name"), line.name("a dtype")
    line.need("[")
    shape = line.several(lambda: line.name() if line.tokens[line.at][0] == "name" else line.integer("a dim"), ",")
    line.need("]")
    role = line.name(" or ".join(ROLES))
    slot = line.name("a slot") if line.skip("in") else ""
    ranks = []
    if line.skip("@"):
        ranks.append(line.integer("a rank"))
        while line.peek():
            ranks.append(line.integer("a rank"))
    return Value(name, dtype, shape, role, slot, tuple(ranks))


def _goal(line: _Line) -> Goal:
    rank, rows = line.integer("a rank"), line.slice()
    line.need("=")
    return Goal(rank, rows, line.content())


def _action(kind: str, line: _Line) -> Action:
    if kind == "wait":
        return Wait(line.bracketed())
    if kind == "send":
        line.need("->")
        to, tag, reads = line.integer("a rank"), line.name("a tag"), line.bracketed()
        return Send(to, tag, reads, line.slices() if line.skip("=>") else ())
    if kind == "recv":
        line.need("<-")
        source, tag = line.integer("a rank"), line.name("a tag")
        line.need("=>")
        return Recv(source, tag, line.slices())
    op, params, reads = line.name("an operation"), line.params(), line.bracketed()
    line.need("=>")
    writes = line.slices()
    flops, engine = (line.integer("flops"), line.name("an engine")) if line.skip("~") else (0, "")
    return Compute(kind, op, reads, writes, params, flops, engine)


def parse(text: str) -> Schedule:
    """The schedule whose `str` is `text`. `UserError` with the line for anything else."""
    head: dict[str, Any] = {}
    meta, values, goals, programs = [], [], [], []
    lanes: list[tuple[str, list[Action]]] = []
    for number, raw in enumerate(text.split("\n"), start=1):
        if not raw.strip() or raw.lstrip().startswith("#"):
            continue
        line = _Line(number, raw)
        verb = line.name("a statement")
        if verb == "schedule":
            head["name"] = line.name("the schedule's name")
        elif verb == "world":
            head["world"] = line.integer("the number of ranks")
        elif verb == "meta":
            meta.append(line.param())
        elif verb == "value":
            values.append(_value(line))
        elif verb == "goal":
            goals.append(_goal(line))
        elif verb == "rank":
            lanes = []
            programs.append((line.integer("a rank"), lanes))
        elif verb == "lane" and programs:
            lanes.append((line.name("a lane's name"), []))
        elif verb in (*OPERATIONS, "send", "recv", "wait") and lanes:
            lanes[-1][1].append(_action(verb, line))
        else:
            raise UserError(
                f"line {number}: {verb!r} cannot stand here",
                expected="schedule, world, meta, value, goal, then rank, lane and a lane's actions",
            )
        line.end()
    if set(head) != {"name", "world"}:
        raise UserError("the text is not a schedule", expected="a line 'schedule NAME' and a line 'world RANKS'")
    return Schedule(
        head["name"],
        head["world"],
        tuple(values),
        tuple(Program(r, tuple(Lane(name, tuple(found)) for name, found in ls)) for r, ls in programs),
        tuple(goals),
        tuple(meta),
    )


def load(path: Path) -> Schedule:
    """Read a schedule's text file."""
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the schedule {path} ({error})", expected="a text file in UTF-8") from error
    except UserError as error:
        raise UserError(f"{path}: {error.problem}", expected=error.expected, remedy=error.remedy) from error
