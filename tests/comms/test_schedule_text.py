"""The text form parses back exactly, for any schedule that can be built, and its errors name the line."""

from __future__ import annotations

import pickle
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from undertow.comms.actions import ITEM_BYTES, OPERATIONS, ROLES, Compute, Recv, Send, Slice, Value, Wait
from undertow.comms.builders.ring_attention import ring_attention
from undertow.comms.schedule import Goal, Lane, Program, Schedule
from undertow.comms.schedule_text import load, parse
from undertow.comms.terms import Applied, Origin, join, op_text, segment
from undertow.dist.errors import UserError

names = st.builds(
    str.__add__,
    st.sampled_from(string.ascii_letters + "_"),
    st.text(string.ascii_letters + string.digits + "_.", max_size=6),
)
small = st.integers(0, 9)
literals = st.one_of(
    st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=8)
)
params = st.dictionaries(names, literals, max_size=2).map(lambda found: tuple(found.items()))
slices = st.builds(lambda name, a, n: Slice(name, a, a + n), names, small, st.integers(1, 9))
many = st.lists(slices, max_size=3).map(tuple)
some = st.lists(slices, min_size=1, max_size=3).map(tuple)
costs = st.one_of(st.just((0, "")), st.tuples(st.integers(1, 2**60), st.just("gemm/bfloat16")))
values = st.builds(
    Value,
    names,
    st.sampled_from(sorted(ITEM_BYTES)),
    st.tuples(small, st.one_of(small, names), names),
    st.sampled_from(ROLES),
    st.one_of(st.just(""), names),
    st.lists(small, max_size=3).map(tuple),
)
computes = st.builds(
    lambda kind, op, reads, writes, keys, cost: Compute(kind, op, reads, writes, keys, *cost),
    st.sampled_from(OPERATIONS),
    names,
    many,
    many,
    params,
    costs,
)
actions = st.one_of(
    computes, st.builds(Send, small, names, many, many), st.builds(Recv, small, names, many), st.builds(Wait, many)
)
labels = st.builds(lambda op, keys: op_text(op, sorted(keys)), names, params)
contents = st.recursive(
    st.builds(
        lambda name, rank, start, rows: (segment(rows, "", [Origin(name, rank, start)]),),
        names,
        small,
        small,
        st.integers(1, 4),
    ),
    lambda inner: st.builds(
        lambda combine, rows, calls: (
            segment(rows, combine, [Applied(op, tuple(args), out, start) for op, args, out, start in calls]),
        ),
        labels,
        st.integers(1, 4),
        st.lists(st.tuples(labels, st.lists(inner, min_size=1, max_size=2), small, small), min_size=1, max_size=3),
    ),
    max_leaves=6,
)
goals = st.builds(Goal, small, slices, st.lists(contents, min_size=1, max_size=3).map(join))
lanes = st.builds(Lane, names, st.lists(actions, max_size=4).map(tuple))
programs = st.builds(Program, small, st.lists(lanes, max_size=3).map(tuple))
schedules = st.builds(
    Schedule,
    names,
    small,
    st.lists(values, max_size=4).map(tuple),
    st.lists(programs, max_size=3).map(tuple),
    st.lists(goals, max_size=2).map(tuple),
    params,
)


@pytest.mark.slow
@settings(max_examples=120, deadline=None)
@given(schedules)
def test_text_parses_back_exactly(schedule):
    again = parse(str(schedule))
    assert again == schedule
    assert str(again) == str(schedule) and again.digest == schedule.digest


def test_schedules_travel_between_processes():
    schedule = ring_attention(3, 4)
    assert schedule.by_rank and pickle.loads(pickle.dumps(schedule)) == schedule


def test_comments_and_blank_lines_are_ignored():
    text = str(ring_attention(2, 4))
    assert parse("# a comment\n\n" + text.replace("\nrank", "\n   # another\nrank")) == parse(text)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("value x float32[2] input extra", "line 3: 'extra'"),
        ("value x float33[2] input", "unknown dtype 'float33'"),
        ("value x float32[N] input", "a number of rows first"),
        ("value x float32[2] borrowed", "the role 'borrowed'"),
        ("meta a = nothing", "line 3: 'nothing'"),
        ("goal 0 x[0:2] = y@1[0:2] + z@1[0:3]", "a sum of 2 and 3 rows"),
        ("goal 0 x[0:2] = f(y@1[0:2]", "the end of the line"),
        ("  send -> 1 t (x[0:2])", "'send' cannot stand here"),
        ("rank 0\nlane a\n  recv <- one t => x[0:2]", "line 5: 'one'"),
        ("rank 0\nlane a\n  compute f(x[0:2]) => y[0:2] ~ 12", "an engine"),
        ("rank 0\nlane a\n  wait (x[0:2]", "expected '\\)'"),
        ("rank 0\nlane a\n  wait (x[0;2])", "expected ':'"),
        ("rank 0\nlane a\n  compute f{a=$}(x[0:2]) => y[0:2]", r"cannot read '\$"),
        ("lane a", "'lane' cannot stand here"),
        ("world two", "line 3: 'two'"),
    ],
)
def test_errors_name_the_line_and_what_was_expected(line, words, tmp_path):
    text = f"schedule broken\nworld 2\n{line}\n"
    with pytest.raises(UserError, match=words):
        parse(text)
    (tmp_path / "broken.txt").write_text(text)
    with pytest.raises(UserError, match="broken.txt"):
        load(tmp_path / "broken.txt")


def test_text_that_is_no_schedule_is_refused(tmp_path):
    with pytest.raises(UserError, match="not a schedule"):
        parse("")
    with pytest.raises(UserError, match="cannot read the schedule"):
        load(tmp_path / "absent.txt")


@pytest.mark.parametrize(
    "make",
    [
        lambda: Value("a b", "float32", (1,)),
        lambda: Value("a", "float32", ()),
        lambda: Value("a", "float32", (1, -2)),
        lambda: Lane("1", ()),
        lambda: Send(1, "two words", ()),
        lambda: Compute("think", "f", (), ()),
        lambda: Compute("compute", "f", (), (), (("a", float("nan")),)),
        lambda: Compute("compute", "f", (), (), (), 5, ""),
        lambda: Schedule("s", 1, (), (), (), (("a", float("inf")),)),
    ],
)
def test_what_could_not_be_written_down_cannot_be_made(make):
    with pytest.raises(UserError):
        make()
