"""The results as data, for `--json`: the headline numbers by key, the paper's beside them, every row and constant.

Speedups are ratios to sequential. `traffic_geomean` and `traffic_max` are signed changes of DRAM bytes, as the paper
words them: -0.22 is 22 % less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from .hardware import Hardware, origins
from .paper import CLAIMS, Row

FORMAT = 1


def paper_document(rows: Sequence[Row], hw: Hardware) -> dict[str, Any]:
    """The evaluation of the paper: a key per claim on the top level, then what belongs to all of them."""
    ours = {claim.key: claim.of(rows) for claim in CLAIMS}
    return {
        "format": FORMAT,
        **ours,
        "paper": {claim.key: claim.paper for claim in CLAIMS},
        "deviation": {claim.key: claim.deviation(ours[claim.key]) for claim in CLAIMS},
        "fitted_on_tp8": [claim.key for claim in CLAIMS if claim.fitted],
        **_common(rows, hw),
    }


def model_document(rows: Sequence[Row], hw: Hardware, layers: int) -> dict[str, Any]:
    """The answer for one's own model."""
    return {"format": FORMAT, "layers": layers, **_common(rows, hw)}


def _common(rows: Sequence[Row], hw: Hardware) -> dict[str, Any]:
    about = {name: {"origin": origin, "why": why} for name, _, origin, why in origins()}
    return {
        "constants": {name: {"value": value, **about[name]} for name, value in asdict(hw).items()},
        "rows": [_row(row) for row in rows],
    }


def _row(row: Row) -> dict[str, Any]:
    return {
        **asdict(row.sublayer),
        "traffic_change": row.traffic_change(),
        "configs": {
            config.value: {
                "seconds": run.seconds,
                "speedup": row.speedup(config),
                "gemm_s": run.gemm_s,
                "reduce_scatter_s": run.reduced_s,
                "all_gather_s": run.all_gather_s,
                "traffic_bytes": run.traffic_bytes,
            }
            for config, run in row.runs.items()
        },
    }
