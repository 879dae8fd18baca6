"""What a run of a benchmark found: `Row`s in a `Report`, kept as JSON that reads back, shown as Markdown.

The JSON keeps every sample, so that another statistic can be computed later without the machine. The Markdown is made
from the same rows and is what people read; losses and arms that could not run stand in it beside the rest.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from undertow.benchmarks.choice import summary
from undertow.benchmarks.intervals import Interval, promise
from undertow.dist.errors import UserError
from undertow.dist.units import format_bytes, format_rate, format_seconds

FORMAT = 1
COLUMNS = (
    "case",
    "arm",
    "size",
    "time",
    "bandwidth",
    "of hardware",
    "wrong",
    "predicted",
    "of it",
    "ratio",
    "never slower",
)


@dataclass(frozen=True)
class Row:
    """One arm in one case. `role` is 'plain', 'ours', 'again' (the A/A row), 'hardware' or 'rival'.

    `wrong` None means that the arm did not run; then, and when wrong > 0, `seconds` and `ratio` are None and `note`
    says why. `seconds` is per run; `predicted_s` was fixed before timing; `ratio` is plain/arm. `said`: see
    `case.Arm`.
    """

    case: str
    arm: str
    role: str
    nbytes: int | None = None
    group: str = ""
    x: float | None = None
    wrong: int | None = None
    seconds: Interval | None = None
    ratio: Interval | None = None
    predicted_s: float | None = None
    hardware_bytes_per_s: float | None = None
    inner: int = 1
    note: str = ""
    extras: dict[str, float] = field(default_factory=dict)
    samples_s: tuple[float, ...] = ()
    said: str = ""

    @property
    def bad(self) -> bool:
        """The answer was wrong, or the arm raised though it could run."""
        return bool(self.wrong) or self.note.startswith("failed")

    @property
    def bytes_per_s(self) -> float | None:
        return self.nbytes / self.seconds.median if self.nbytes and self.seconds else None

    @property
    def of_hardware(self) -> float | None:
        rate = self.bytes_per_s
        return rate / self.hardware_bytes_per_s if rate and self.hardware_bytes_per_s else None

    def cells(self) -> tuple[str, ...]:
        """The row's texts, in the order of COLUMNS."""
        name = f"**{self.arm}**" if self.role == "ours" else self.arm
        size = "" if self.nbytes is None else format_bytes(self.nbytes)
        if self.seconds is None:
            return (self.case, name, size, "not timed", "", "", _or_blank(self.wrong), "", "", "", "")
        return (
            self.case,
            name,
            size,
            format_seconds(self.seconds.median),
            format_rate(self.bytes_per_s) if self.bytes_per_s else "",
            f"{self.of_hardware:.0%}" if self.of_hardware else "",
            _or_blank(self.wrong),
            format_seconds(self.predicted_s) if self.predicted_s else "",
            f"{self.seconds.median / self.predicted_s:.2f}" if self.predicted_s else "",
            _ratio(self.ratio) if self.role != "plain" else "1 (plain)",
            promise(self.ratio) if self.ratio and self.role == "ours" else "",
        )


@dataclass(frozen=True)
class Report:
    """All rows of one run, with what is needed to repeat it. `choices`: see `case.Benchmark`."""

    benchmark: str
    claim: str
    command: str
    seed: int
    rounds: int
    facts: dict[str, str]
    x_label: str = ""
    rows: tuple[Row, ...] = ()
    choices: tuple[str, ...] = ()

    def compared(self) -> list[Row]:
        """The rows that ran; those with a wrong answer are among them."""
        return [row for row in self.rows if row.wrong is not None]

    def not_compared(self) -> list[str]:
        """'arm (cases): reason' for the arms that could not run."""
        where: dict[tuple[str, str], list[str]] = {}
        for row in self.rows:
            if row.wrong is None:
                where.setdefault((row.arm, row.note), []).append(row.case)
        everywhere = len({row.case for row in self.rows})
        return [
            f"{arm} ({'all cases' if len(cases) == everywhere else '; '.join(cases)}): {note}"
            for (arm, note), cases in where.items()
        ]

    @property
    def failed(self) -> bool:
        """An answer was wrong, or an arm that could run raised."""
        return any(row.bad for row in self.rows)

    def dump(self, path: Path) -> None:
        text = json.dumps({"format": FORMAT, **asdict(self)}, indent=1)
        scratch = path.with_name(path.name + ".tmp")
        scratch.write_text(text + "\n")
        scratch.replace(path)

    @classmethod
    def load(cls, path: Path) -> Report:
        """Read what `dump` wrote; `UserError` for anything else."""
        try:
            data = json.loads(path.read_text())
            if data.pop("format") != FORMAT:
                raise KeyError("format")
            rows, choices = tuple(map(_row, data.pop("rows"))), tuple(data.pop("choices", ()))
            return cls(rows=rows, choices=choices, **data)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"cannot read the benchmark result {path} ({type(error).__name__}: {error})",
                expected=f"a JSON file of format {FORMAT} written by `undertow bench`",
            ) from error

    def markdown(self, plot: str = "") -> str:
        """The report as a page; `plot` is the picture's path relative to it."""
        facts = "\n".join(f"- {name}: {value}" for name, value in self.facts.items())
        again = [row.ratio for row in self.rows if row.role == "again" and row.ratio]
        noise = max((max(1 - r.low, r.high - 1) for r in again), default=0.0)
        lines = [
            f"# {self.benchmark}: {self.claim}",
            "",
            facts,
            f"- command: `{self.command}`",
            f"- seed {self.seed}, {self.rounds} rounds",
            "",
            *([f"![{self.benchmark}]({plot})", ""] if plot else []),
            *markdown_table(COLUMNS, (row.cells() for row in self.compared())),
            "",
            *(f"- not compared: {line}" for line in self.not_compared()),
            "",
            *_extras_table(self.rows),
            *_sayings(self.rows),
            *summary(self.rows, self.choices),
            "Time is the median over the rounds; in each round every arm runs once, in a random order. *of it* is the "
            "time over the predicted one. Ratio is "
            "plain / arm, formed within each round: median [95 % interval from order statistics]; above 1 is faster "
            "than plain. The row (A/A) is the plain arm a second time: how far its interval reaches from 1 is the "
            f"noise (here at most {noise:.1%}). *Never slower* is yes when the interval's lower end is at least 0.97, "
            "no when its upper end is below, open between. Arms were checked before timing; wrong arms are not timed.",
            "",
        ]
        return "\n".join(lines)


def markdown_table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    columns = tuple(columns)
    return [line(columns), "|" + "---|" * len(columns), *map(line, rows)]


def _extras_table(rows: tuple[Row, ...]) -> list[str]:
    names = sorted({name for row in rows for name in row.extras})
    if not names:
        return []
    body = [(r.case, r.arm, *(_extra(name, r.extras.get(name)) for name in names)) for r in rows if r.extras]
    return [*markdown_table(("case", "arm", *names), body), ""]


def _sayings(rows: tuple[Row, ...]) -> list[str]:
    said = [f"- {row.case}, {row.arm}: {row.said}" for row in rows if row.said]
    return [*said, ""] if said else []


def _extra(name: str, value: float | None) -> str:
    if value is None:
        return ""
    if name.endswith("_s"):
        return format_seconds(value)
    return format_bytes(value) if name.endswith("bytes") else f"{value:.4g}"


def _ratio(ratio: Interval | None) -> str:
    return f"{ratio.median:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]" if ratio else ""


def _or_blank(wrong: int | None) -> str:
    return "" if wrong is None else str(wrong)


def _row(data: dict[str, Any]) -> Row:
    for name in ("seconds", "ratio"):
        data[name] = None if data[name] is None else Interval(**data[name])
    return Row(**{**data, "samples_s": tuple(data["samples_s"])})
