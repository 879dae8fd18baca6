"""What the timing program measured: cells with all their samples, and medians with 95 % intervals of order statistics.

A ratio is formed in each round, between arms that stand beside each other in time, and the median is of these ratios:
drift slower than a round falls on both and cancels. The interval is the pair of sorted samples that encloses the
median with at least 95 % (Binomial(n, 1/2)); it assumes nothing of the distribution.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from statistics import mean, median, stdev

from .errors import InterposeError

SLOWER, SLACK_NS = 0.95, 2000.0  # a cell breaks the promise when it is slower by more than both


@dataclass(frozen=True)
class Interval:
    """A median and the ends of its 95 % interval."""

    low: float
    median: float
    high: float


@lru_cache
def rank(n: int) -> int:
    """The largest l so that the sorted samples l and n + 1 - l enclose the median with 95 %; 0 for n < 6."""
    tail, found = 0.0, 0
    for below in range(n // 2 + 1):
        tail += math.comb(n, below) / 2**n
        if 1 - 2 * tail < 0.95:
            break
        found = below + 1
    return found


def interval(samples: Sequence[float]) -> Interval:
    """Median and interval; with fewer than 6 samples the interval is the whole range."""
    ordered, n = sorted(samples), len(samples)
    at = max(1, rank(n))
    return Interval(ordered[at - 1], median(ordered), ordered[n - at])


def mean_low(samples: Sequence[float]) -> float:
    """The lower end of the 95 % interval of the mean (Student's); the least sample where there are fewer than 6."""
    n = len(samples)
    if n < 6:
        return min(samples)
    z, free = 1.96, n - 1
    t = z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)  # to 1 % from 5 on
    return mean(samples) - t * stdev(samples) / math.sqrt(n)


@dataclass(frozen=True)
class Cell:
    """One datatype in one use.

    `use`: pack, unpack, message, or call-… (the cost of passing through); `cls`, `block`, `step`, `size` (bytes): what
    the model sees; `held`: kept from fitting; `wrong`: bytes that differ from the library's; `arms`: ns per call;
    `link`: where the two ranks were to each other (socket, local or remote); `leaf`: bytes of a basic element, 1 where
    they are mixed, 0 in samples that do not say it; `taken`: the share of auto's calls that the preload took, of both
    sides of a message, -1 in samples that do not say it.
    """

    use: str
    cls: str
    name: str
    block: int
    step: int
    size: int
    held: bool
    wrong: int
    inner: int
    arms: dict[str, tuple[float, ...]] = field(default_factory=dict)
    link: str = "local"
    leaf: int = 0
    taken: float = -1

    @property
    def title(self) -> str:
        return f"{self.use} {self.name} {self.size}"

    def median_ns(self, arm: str) -> float:
        return median(self.arms[arm])

    def library_ns(self) -> float:
        """The less of the two medians of the library, so that noise never makes a gain."""
        return min(self.median_ns("library"), self.median_ns("again"))

    def ratio(self, arm: str, over: str = "library") -> Interval:
        """Time of `over` / time of `arm`, round by round: above 1 the arm is faster."""
        return interval([plain / ours for plain, ours in zip(self.arms[over], self.arms[arm], strict=True)])

    def clear_gain(self, arm: str) -> float:
        """How many times as fast as the library the arm is at least, at 95 %.

        By the median of the rounds or by their geometric mean, whose interval is the narrower one where a library works
        at two speeds; the median must show what the mean does.
        """
        gains = []
        for over in ("library", "again"):
            found = self.ratio(arm, over)
            logs = [math.log(plain / ours) for plain, ours in zip(self.arms[over], self.arms[arm], strict=True)]
            gains.append(max(found.low, min(found.median, math.exp(mean_low(logs)))))
        return min(gains)

    def extra_ns(self, arm: str = "auto") -> Interval:
        """Time of the arm less the library's, round by round."""
        return interval([ours - plain for plain, ours in zip(self.arms["library"], self.arms[arm], strict=True)])

    def half(self, which: int) -> Cell:
        """The cell with every second round only: what one half fits, the other can judge."""
        return replace(self, arms={arm: ns[which::2] for arm, ns in self.arms.items()})

    def breaks_promise(self, arm: str = "auto") -> bool:
        """The whole interval of library / arm lies below 0.95, and the loss exceeds 2 us."""
        slower = self.ratio(arm).high < SLOWER and self.ratio(arm, "again").high < SLOWER
        return slower and self.median_ns(arm) - self.library_ns() > SLACK_NS


def text(cells: Iterable[Cell]) -> str:
    """The output that `parse` reads."""
    lines, link = [], "local"
    for c in cells:
        if c.link != link:
            link = c.link
            lines.append(f"link {link}")
        numbers = (c.block, c.step, c.size, int(c.held), c.wrong, c.inner, c.leaf, f"{c.taken:.4g}")
        lines.append(" ".join(map(str, ("cell", c.use, c.cls, c.name, *numbers))))
        lines += [" ".join(["arm", arm, *(f"{ns:.1f}" for ns in samples)]) for arm, samples in c.arms.items()]
    return "\n".join([*lines, "complete", ""])


def parse(lines: Iterable[str]) -> list[Cell]:
    """The cells of the program's output; InterposeError when the program did not end properly."""
    cells: list[Cell] = []
    complete, link = False, "local"
    for line in lines:
        word, _, rest = line.strip().partition(" ")
        if word == "cell":
            use, cls, name, *numbers = rest.split()
            numbers += ["0", "-1"][len(numbers) - 6 :]  # which older programs do not say
            block, step, size, held, wrong, inner, leaf = map(int, numbers[:7])
            known = Cell(use, cls, name, block, step, size, bool(held), wrong, inner, link=link, leaf=leaf)
            cells.append(replace(known, taken=float(numbers[7])))
        elif word == "arm" and cells:
            name, *samples = rest.split()
            cells[-1].arms[name] = tuple(map(float, samples))
        elif word == "link":
            link = {"host": "local"}.get(rest, rest)
        complete = complete or line.strip() == "complete"
    if not complete:
        raise InterposeError("the timing program stopped before its end: its output lacks the line 'complete'")
    return cells
