"""Each defect known of TEMPI's source is a rule that we keep, by name; the rules are in programs/messages.py.

All rules run once per MPI, in one pair of ranks with every call forced through our path.
"""

from __future__ import annotations

import pytest
from mpis import PROGRAMS, Install, start

DEFECTS = {
    "strides are sorted, which changes the packed order": "packed_order_is_kept",
    "the extent is used for the size of pair types": "pair_types_leave_padding_alone",
    "a later send can overtake a delayed one": "no_overtaking",
    "a short receive unpacks everything and its status is wrong": "short_receives",
    "a managed Irecv never fills the status": "sends_and_receives",
    "fake requests are unknown to Waitall, Waitany, Waitsome and Test": "every_completion_call",
    "types beyond three dimensions and structs have no packer": "types_without_a_simple_form",
    "the size of the output buffer is never checked": "small_pack_buffer_is_not_overrun",
    "a type freed in flight leaves a dangling packer": "types_freed_in_flight",
    "PROC_NULL and ANY_SOURCE are looked up as ranks": "null_any_and_self",
    "negative strides and MPI_BOTTOM fail an assertion": "negative_strides_and_bottom",
    "the true lower bound is ignored": "true_lower_bounds",
    "a staged receive expects MPI_PACKED": "packed_at_one_end",
    "there are no locks": "threads",
}


@pytest.fixture(scope="module")
def kept(pympi: Install) -> set[str]:
    out = start(pympi, 2, [str(pympi.python), str(PROGRAMS / "messages.py")], "force")
    return {line.split()[-1] for line in out.splitlines() if "kept " in line}


@pytest.mark.parametrize("rule", DEFECTS.values(), ids=DEFECTS)
def test_a_defect_that_we_do_not_share(kept: set[str], rule: str) -> None:
    assert rule in kept
