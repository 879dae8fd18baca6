"""Replay the gate on recorded rounds, and judge its choices by rounds that it has not seen.

    python -m undertow.benchmarks.overlap_choice benchmarks/results/overlap_*.json

The gate (`parallel.overlap_gate`) has two parts, and each is judged on cells from which nothing of it was fitted:

- *measured*: it gets a cell's first rounds as its measured calls, and no model of the machine;
- *modelled, then measured*: as a user of `undertow probe` has it, with rates fitted on all other cells of the file;
- *model alone*: what those rates predict to be fastest, without a measured call.

The later rounds say which arm was best and what the choice costs: right within 3 %, or where the 95 % interval of the
ratio does not exclude that. Rounds are interleaved, so both halves saw the same machine. What the automatic arm costs
beside the arm it chose is not part of this: that is in the benchmark's own report. A last table says how far measured
times are from the model alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

from undertow.benchmarks.choice import RIGHT
from undertow.benchmarks.intervals import LEAST_SAMPLES, ratio_interval
from undertow.dist.errors import UserError
from undertow.parallel.overlap_arms import CUDA_ARMS, ROW_ARMS, SEQUENTIAL, Arm
from undertow.parallel.overlap_gate import ROUNDS, WIN, Gate, Rates
from undertow.parallel.overlap_queueing import Queueing

SHARE, REGRET = 0.95, 0.02  # wanted: cells in which the choice is right at least, mean regret at most
NEAR = 0.15  # of a prediction
HELD = 2.0  # times as long as without overlap, where only the host can have held pieces up
SEEN = ROUNDS + 1  # rounds that the gate gets; it leaves the first out, as a warm-up
MEASURED, BOTH, MODEL = "measured", "modelled, then measured", "model alone"


@dataclass(frozen=True)
class Replayed:
    """One cell: what the gate chose, the best arm of the unseen rounds, what the choice costs beside it."""

    case: str
    chosen: str
    best: str
    regret: float
    right: bool


@dataclass(frozen=True)
class Known:
    """What a benchmark tells of a cell's product and collective; `set_link`: the link was set to that time, as a user
    who emulates one sets it, and is not to be predicted."""

    ranks: float
    flops: float
    nbytes: float
    product_s: float
    link_s: float
    set_link: bool
    queueing: Queueing | None


def known(
    ranks: int, flops: float, nbytes: float, product_s: float, link_s: float, *, set_link: bool = False,
    queueing: Queueing | None = None,
) -> dict[str, float]:  # fmt: skip
    """The facts of an automatic arm from which the other cells' model is fitted: of one rank's product, the bytes that
    it sends, the times of the product and of the collective alone, and what pieces cost the host."""
    link = {"set_link_s" if set_link else "link_s": link_s} if link_s else {}
    host = {"host_call_s": queueing.call_s, "host_piece_s": queueing.piece_s} if queueing else {}
    return {
        "ranks": float(ranks),
        "Gflop": flops / 1e9,
        "sent_MB": nbytes / 1e6,
        "product_s": product_s,
        **link,
        **host,
    }


def told(extras: Mapping[str, float]) -> Known | None:
    """`known`, read back; None from results without it, or where no link was measured."""
    link_s = extras.get("set_link_s", extras.get("link_s"))
    if link_s is None or "product_s" not in extras:
        return None
    return Known(
        extras["ranks"], extras["Gflop"] * 1e9, extras["sent_MB"] * 1e6, extras["product_s"], link_s,
        "set_link_s" in extras,
        Queueing(extras["host_call_s"], extras["host_piece_s"]) if "host_piece_s" in extras else None,
    )  # fmt: skip


def queued(cell: Known, samples_s: Mapping[str, Sequence[float]]) -> Queueing | None:
    """What pieces cost the host in a cell where nothing else can have set their pace: many pieces took `HELD` times as
    long as the product and its collective one after the other. None elsewhere."""
    few, many = (samples_s.get(arm.name) for arm in (ROW_ARMS[0], ROW_ARMS[-1]))
    if cell.set_link or not few or not many or median(many) < HELD * (cell.product_s + cell.link_s):
        return None
    return Queueing.of(median(few), median(many), int(cell.ranks))


def predictor(cell: Known, others: Sequence[Known], queueing: Sequence[Queueing] = ()) -> Callable[[Arm], float]:
    """The gate's model for `cell`, with the middle of the rates of the other cells and, where they do not say what
    pieces cost the host, of `queueing`. A message's latency is 0: it cannot be told from whole collectives."""
    flops = median(other.flops / other.product_s for other in others)
    links = [cell] if cell.set_link else others
    hosts = [other.queueing for other in others if other.queueing] or queueing
    host = Queueing(*(median(each) for each in zip(*((q.call_s, q.piece_s) for q in hosts)))) if hosts else Queueing()
    rates = Rates(flops, median(each.nbytes / each.link_s for each in links), 0.0, queueing=host)
    return lambda arm: rates.seconds(arm, int(cell.ranks), cell.flops, cell.nbytes)


def replay(
    case: str,
    samples_s: Mapping[str, Sequence[float]],
    predict: Callable[[Arm], float] | None = None,
    *,
    measured: bool = True,
) -> Replayed | None:
    """`samples_s`: seconds of each arm, round by round; None where too few arms or rounds were timed.

    `predict`: the gate's model. `measured` False: what that alone would choose.
    """
    arms = [arm for arm in CUDA_ARMS if len(samples_s.get(arm.name, ())) >= SEEN + LEAST_SAMPLES]
    if len(arms) < 2 or arms[0] != SEQUENTIAL:
        return None
    if measured:
        gate, calls = Gate(arms, lambda mine: [mine]), [0] * len(arms)
        while gate.chosen() is None:
            at = gate.choose(case, predict)
            if gate.measuring(case):
                gate.took(case, at, samples_s[arms[at].name][calls[at]])
                calls[at] += 1
        chosen = (gate.chosen() or SEQUENTIAL).name
    else:
        assert predict is not None
        found = min(arms, key=predict)
        chosen = (found if predict(SEQUENTIAL) >= WIN * predict(found) else SEQUENTIAL).name
    unseen = {arm.name: samples_s[arm.name][SEEN:] for arm in arms}
    best = min(unseen, key=lambda name: median(unseen[name]))
    ratio = ratio_interval(unseen[chosen], unseen[best])
    return Replayed(case, chosen, best, ratio.median - 1, ratio.low - 1 <= RIGHT)


def read(report: Mapping) -> tuple[dict[str, dict[str, Sequence[float]]], dict[str, Callable[[Arm], float]]]:
    """Of `report`, a benchmark's JSON, by case: each arm's samples, and the model that is fitted on the others."""
    samples, facts = dict[str, dict[str, Sequence[float]]](), dict[str, Known]()
    for row in report["rows"]:
        if row["seconds"]:
            samples.setdefault(row["case"], {})[row["arm"]] = row["samples_s"]
        if (found := told(row.get("extras", {}))) is not None:
            facts[row["case"]] = found
    models = dict[str, Callable[[Arm], float]]()
    for case, cell in facts.items():
        if others := {name: other for name, other in facts.items() if name != case}:
            hosts = (queued(other, samples.get(name, {})) for name, other in others.items())
            models[case] = predictor(cell, list(others.values()), list(filter(None, hosts)))
    return samples, models


def replay_all(report: Mapping) -> dict[str, list[Replayed]]:
    """By part of the gate, the cells of `report`."""
    samples, models = read(report)
    parts: dict[str, list[Replayed | None]] = {MEASURED: [replay(case, each) for case, each in samples.items()]}
    for case, predict in models.items():
        parts.setdefault(BOTH, []).append(replay(case, samples.get(case, {}), predict))
        parts.setdefault(MODEL, []).append(replay(case, samples.get(case, {}), predict, measured=False))
    return {part: [cell for cell in cells if cell is not None] for part, cells in parts.items()}


def gaps(report: Mapping) -> dict[str, list[float]]:
    """By way, measured over predicted time in each cell of `report` that has a model."""
    samples, models = read(report)
    return {
        arm.name: [median(samples[case][arm.name]) / models[case](arm) for case in timed]
        for arm in CUDA_ARMS
        if (timed := [case for case in models if samples.get(case, {}).get(arm.name)])
    }


def gap_table(found: Mapping[str, Sequence[float]]) -> str:
    """A line for each way: the middle of these ratios, the least and the most, and how many are within `NEAR` of 1."""
    lines = ["| way | measured / the model alone, median | least | most | within 15 % |", "|---|---:|---:|---:|---:|"]
    lines += [
        f"| {name} | {median(each):.2f} | {min(each):.2f} | {max(each):.2f} "
        f"| {sum(abs(ratio - 1) <= NEAR for ratio in each)} of {len(each)} |"
        for name, each in found.items()
    ]
    return "\n".join([*lines, ""]) if found else ""


def markdown(name: str, parts: Mapping[str, Sequence[Replayed]]) -> str:
    """For each part of the gate the share of right choices, the mean regret, and by arm in how many cells it was chosen
    and was best."""
    if not any(parts.values()):
        return f"{name}: no cell has {SEEN + LEAST_SAMPLES} rounds of two arms, the sequential one among them\n"
    lines = [f"{name} (wanted: right in {SHARE:.0%}, mean regret {REGRET:.0%})", ""]
    lines += [
        "| part of the gate | right | mean regret | |",
        "|---|---:|---:|---|",
        *(_verdict(part, cells) for part, cells in parts.items() if cells),
        "",
    ]
    chosen = {part: Counter(cell.chosen for cell in cells) for part, cells in parts.items() if cells}
    best = Counter(cell.best for cell in parts[MEASURED])
    lines += [
        f"| arm | {' | '.join(f'chosen, {part}' for part in chosen)} | best |",
        "|---|" + "---:|" * (len(chosen) + 1),
    ]
    lines += [
        f"| {arm.name} | {' | '.join(f'{count[arm.name] / count.total():.0%}' for count in chosen.values())} "
        f"| {best[arm.name] / best.total():.0%} |"
        for arm in CUDA_ARMS
        if best[arm.name] or any(count[arm.name] for count in chosen.values())
    ]
    wrong = [
        f"- {part}: {c.case}: chose {c.chosen}, {c.best} was best ({c.regret:+.1%})"
        for part, cells in parts.items()
        for c in cells
        if not c.right
    ]
    return "\n".join([*lines, *([""] if wrong else []), *wrong, ""])


def _verdict(part: str, cells: Sequence[Replayed]) -> str:
    right, regret = mean(cell.right for cell in cells), mean(cell.regret for cell in cells)
    verdict = "reached" if right >= SHARE and regret <= REGRET else "missed"
    return f"| {part} | {sum(cell.right for cell in cells)} of {len(cells)} | {regret:.1%} | {verdict} |"


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("results", nargs="+", type=Path, help="JSON files of `undertow bench overlap…`")
    for path in parser.parse_args(argv).results:
        try:
            document = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: {error}", expected="a file that `undertow bench overlap…` wrote") from error
        print(markdown(path.stem, replay_all(document)))
        if table := gap_table(gaps(document)):
            print(table)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        sys.exit(f"overlap_choice: {error}")
