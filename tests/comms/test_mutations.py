"""Random damage to valid schedules: whatever `check` accepts computes the right answer in every interleaving."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import fields, replace

import torch

from undertow.comms import local
from undertow.comms.actions import Compute, Recv, Send, Slice, Value, Wait
from undertow.comms.check import find_problems
from undertow.comms.p2p import P2P
from undertow.comms.schedule import Lane, Program, Schedule


def _with_lanes(schedule: Schedule, rank: int, lanes: list[list]) -> Schedule:
    program = schedule.programs[rank]
    changed = Program(rank, tuple(Lane(lane.name, tuple(found)) for lane, found in zip(program.lanes, lanes)))
    return replace(schedule, programs=(*schedule.programs[:rank], changed, *schedule.programs[rank + 1 :]))


def _slice(part: Slice, rng: random.Random, names: list[str]) -> Slice:
    shift, grow = rng.choice([(0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)])
    name = rng.choice(names) if not (shift or grow) else part.value
    return Slice(name, part.start + shift, part.stop + shift + grow)


def _action(action, rng: random.Random, schedule: Schedule, rank: int):
    """The action with one field changed."""
    names = list(schedule.by_rank[rank])
    editable = [
        f.name for f in fields(action) if f.init and f.name in ("reads", "writes", "to", "source", "tag", "op", "kind")
    ]
    key = rng.choice(editable)
    old = getattr(action, key)
    if key in ("reads", "writes"):
        new = list(old)
        kind = rng.randrange(4)
        if kind == 0 or not new:
            new.append(Slice(rng.choice(names), 0, rng.randint(1, 4)))
        elif kind == 1:
            new.pop(rng.randrange(len(new)))
        elif kind == 2:
            rng.shuffle(new)
        else:
            at = rng.randrange(len(new))
            new[at] = _slice(new[at], rng, names)
        new = tuple(new)
    elif key in ("to", "source"):
        new = rng.randrange(schedule.world)
    elif key == "kind":
        new = rng.choice(["compute", "reduce", "merge"])
    elif key == "op":
        new = rng.choice(["copy", "add"])
    else:
        new = old + "x"
    return replace(action, **{key: new})


def mutate(schedule: Schedule, rng: random.Random) -> Schedule:
    """One random change of a program, or of a value's slot."""
    rank = rng.randrange(schedule.world)
    lanes = [list(lane.actions) for lane in schedule.programs[rank].lanes]
    lane = rng.choice([lane for lane in lanes if lane])
    at = rng.randrange(len(lane))
    kind = rng.choice(["drop", "repeat", "swap", "move", "edit", "edit", "wait", "slot", "role"])
    if kind == "drop":
        lane.pop(at)
    elif kind == "repeat":
        lane.insert(rng.randrange(len(lane) + 1), lane[at])
    elif kind == "swap":
        other = rng.randrange(len(lane))
        lane[at], lane[other] = lane[other], lane[at]
    elif kind == "move":
        rng.choice(lanes).append(lane.pop(at))
    elif kind == "edit":
        lane[at] = _action(lane[at], rng, schedule, rank)
    elif kind == "wait":
        lane.insert(at, Wait((schedule.values[rng.randrange(len(schedule.values))].all(),)))
    else:
        which = rng.randrange(len(schedule.values))
        value = schedule.values[which]
        slots = ["", *sorted({v.slot for v in schedule.values if v.slot})]
        change: dict = {"slot": rng.choice(slots)} if kind == "slot" else {"role": rng.choice(["scratch", "output"])}
        values: tuple[Value, ...] = (*schedule.values[:which], replace(value, **change), *schedule.values[which + 1 :])
        return replace(schedule, values=values)
    return _with_lanes(schedule, rank, lanes)


def test_check_accepts_only_what_computes_the_right_answer(case_name, make_case, seed):
    rng = random.Random(seed)
    verdicts: Counter[str] = Counter()
    case = make_case(case_name, 4)
    for trial in range(120):
        changed = case.schedule
        for _ in range(rng.choice([1, 1, 1, 2])):
            changed = mutate(changed, rng)
        problems = find_problems(changed)
        verdicts[problems[0].kind if problems else "accepted"] += 1
        if not problems:
            for interleaving in (None, *rng.sample(range(10**6), 3)):
                assert case.matches(local.run(changed, case.inputs, case.ops, seed=interleaving)), (trial, str(changed))
    assert verdicts["accepted"] >= 3, verdicts  # a check that refuses everything would pass the rest
    assert len(verdicts) >= 6, verdicts


def _execute(rank, world, runs):
    with P2P(timeout_s=240) as executor:
        return [
            {name: tensor.numpy() for name, tensor in executor.run(schedule, inputs[rank], ops).items()}
            for schedule, inputs, ops in runs
        ]


def test_what_check_accepts_runs_right_on_gloo_too(make_case, ranks, seed):
    rng = random.Random(seed)
    runs, cases = [], []
    for name in ("all_to_all", "reduce_scatter_ring_subchunks", "gemm_direct", "attention"):
        case = make_case(name, 3)
        accepted: list[Schedule] = []
        while len(accepted) < 6:
            changed = mutate(mutate(case.schedule, rng), rng)
            if changed != case.schedule and not find_problems(changed, rendezvous=True):
                accepted.append(changed)
        runs += [(changed, case.inputs, case.ops) for changed in accepted]
        cases += [case] * len(accepted)
    results = ranks(3, _execute, runs)
    for at, case in enumerate(cases):
        outputs = [{name: torch.from_numpy(array) for name, array in results[rank][at].items()} for rank in range(3)]
        assert case.matches(outputs), str(runs[at][0])


def test_mutations_reach_every_kind_of_action(make_case, seed):
    rng = random.Random(seed)
    touched: set[type] = set()
    for name in ("reduce_scatter_ring", "attention"):
        schedule = make_case(name, 4).schedule
        before = {action for _, _, _, action in schedule.actions()}
        for _ in range(200):
            touched |= {type(action) for _, _, _, action in mutate(schedule, rng).actions() if action not in before}
    assert touched == {Compute, Send, Recv, Wait}
