"""Fits the calibrated constants, one by one, on the TP-8 rows alone; TP 16 and TP 32 are never looked at.

Each constant has one published number to answer to, in an order in which later constants do not move earlier numbers:
reduce_efficiency (the reduce-scatter gains 7 % from NMC at TP 8), gemm_efficiency (ideal overlap 1.35), interference
(T3 1.20), mca_share (T3-MCA 1.30). The last three are published for TP 8 and 16 together; we ask them of our TP-8 rows,
because the paper's values per row are a figure we cannot read numbers from. The results, rounded to two digits, are the
defaults in `hardware.py`; `undertow simulate t3 --calibrate` repeats the fit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ...dist.errors import UndertowError
from .configs import Config
from .hardware import Hardware
from .paper import evaluate, geomean
from .workloads import paper_rows

TP = 8


@dataclass(frozen=True)
class Fit:
    """One calibrated constant: the value found between `low` and `high`, and what it was asked to give and gives."""

    constant: str
    value: float
    wanted: float
    given: float


@dataclass(frozen=True)
class _Knob:
    constant: str
    low: float
    high: float
    wanted: float
    given: Callable[[Hardware], float]


def _nmc_gain(hw: Hardware) -> float:
    return geomean(row.nmc_gain() for row in evaluate(paper_rows((TP,)), hw, (Config.SEQUENTIAL, Config.IDEAL_NMC)))


def _speedup(config: Config) -> Callable[[Hardware], float]:
    return lambda hw: geomean(
        row.speedup(config) for row in evaluate(paper_rows((TP,)), hw, (Config.SEQUENTIAL, config))
    )


# The bounds of gemm_efficiency keep to the branch on which faster products make communication weigh more.
KNOBS = (
    _Knob("reduce_efficiency", 0.1, 1.0, 1.07, _nmc_gain),
    _Knob("gemm_efficiency", 0.4, 0.8, 1.35, _speedup(Config.IDEAL_OVERLAP)),
    _Knob("interference", 1.0, 16.0, 1.20, _speedup(Config.T3)),
    _Knob("mca_share", 0.05, 0.45, 1.30, _speedup(Config.T3_MCA)),
)


def calibrate(hw: Hardware | None = None, *, digits: int = 2) -> tuple[Hardware, list[Fit]]:
    """Fit every calibrated constant by bisection, starting from `hw`; each is rounded before the next is fitted."""
    hw, fits = hw or Hardware(), []
    for knob in KNOBS:
        value = float(f"{_bisect(knob, hw):.{digits}g}")
        hw = replace(hw, **{knob.constant: value})
        fits.append(Fit(knob.constant, value, knob.wanted, knob.given(hw)))
    return hw, fits


def _bisect(knob: _Knob, hw: Hardware) -> float:
    def excess(value: float) -> float:
        return knob.given(replace(hw, **{knob.constant: value})) - knob.wanted

    low, high = knob.low, knob.high
    falling = excess(low) > 0
    if falling == (excess(high) > 0):
        raise UndertowError(
            f"{knob.constant} between {low:g} and {high:g} never gives {knob.wanted:g} on this hardware"
        )
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        if (excess(middle) > 0) == falling:
            low = middle
        else:
            high = middle
    return (low + high) / 2
