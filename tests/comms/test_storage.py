"""Memory of a rank: slots are shared bytes, and what the caller gives is used or refused by name."""

from __future__ import annotations

import pytest
import torch

from undertow.comms import local
from undertow.comms.actions import Slice
from undertow.comms.builders.all_gather import ring_all_gather
from undertow.comms.builders.ring_attention import ring_attention
from undertow.comms.cost import buffer_bytes
from undertow.comms.schedule_text import parse
from undertow.comms.storage import Storage, layout_of
from undertow.dist.errors import UserError

SIZES = {"batch": 2, "q_heads": 4, "kv_heads": 2, "head_dim": 8}


def _inputs(rows: int = 4) -> dict[str, torch.Tensor]:
    return {"q": torch.zeros(rows, 2, 4, 8), "kv": torch.zeros(rows, 2, 2, 2, 8)}


def test_values_of_one_slot_share_their_bytes_and_no_others():
    schedule = ring_attention(4, 4, **SIZES)
    storage = Storage(layout_of(schedule, 0), _inputs())
    spans = {}
    for name, value in schedule.by_rank[0].items():
        start = storage.tensors[name].data_ptr()
        spans[name] = (value.slot or name, start, start + value.nbytes)
    for one, (slot, start, stop) in spans.items():
        for other, (slot_2, start_2, stop_2) in spans.items():
            if one != other and stop > start and stop_2 > start_2:
                assert (start < stop_2 and start_2 < stop) == (slot == slot_2), (one, other)


def test_allocated_bytes_are_what_the_cost_model_says():
    schedule = ring_attention(4, 4, **SIZES)
    storage = Storage(layout_of(schedule, 0), _inputs())
    own = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in (storage.tensors[n] for n in schedule.by_rank[0] if n not in ("q", "kv"))
    }
    tokens = sum(value.rows for value in schedule.by_rank[0].values() if value.dtype == "token")  # one byte each
    assert sum(own.values()) == buffer_bytes(schedule, 0) + tokens


def test_given_outputs_are_filled_also_when_they_live_in_a_slot():
    schedule = ring_attention(4, 4, **SIZES)
    given = {"out": torch.zeros(4, 2, 4, 8), "lse": torch.zeros(4, 2, 4)}
    storage = Storage(layout_of(schedule, 0), _inputs(), outputs=given)
    storage.rows(Slice("o.to.0", 1, 2)).fill_(3.0)  # the running result is the output's memory
    assert storage.outputs["out"] is given["out"] and given["out"][1].eq(3).all() and given["out"][0].eq(0).all()


def test_an_output_smaller_than_its_slot_is_refused():
    text = str(ring_attention(2, 4)).replace("value o.to.0 float32[4, 1, 1, 1]", "value o.to.0 float32[9, 1, 1, 1]")
    inputs = {"q": torch.zeros(4, 1, 1, 1), "kv": torch.zeros(4, 2, 1, 1, 1)}
    with pytest.raises(UserError, match="has 16 bytes, but its slot running.o needs 36"):
        Storage(layout_of(parse(text), 0), inputs, outputs={"out": torch.zeros(4, 1, 1, 1)})


def test_tensors_that_nobody_asked_for_or_on_another_device_are_refused():
    schedule = ring_all_gather(2, 4)
    for outputs in ({"ouput": torch.zeros(8)}, {"x": torch.zeros(4)}):
        with pytest.raises(UserError, match="ouput|given the inputs|name of an output"):
            Storage(layout_of(schedule, 0), {"x": torch.zeros(4)} if "ouput" in outputs else {}, outputs=outputs)
    with pytest.raises(UserError, match="x of rank 0 is on meta; expected a tensor on cpu"):
        Storage(layout_of(schedule, 0), {"x": torch.zeros(4, device="meta")})


def test_non_contiguous_tensors():
    schedule = ring_all_gather(2, 4, [3])
    x = [torch.randn(3, 4).t() for _ in range(2)]
    assert torch.equal(local.run(schedule, [{"x": t} for t in x])[0]["out"], torch.cat(x))
    with pytest.raises(UserError, match="output out of rank 0 is not contiguous"):
        Storage(layout_of(schedule, 0), {"x": x[0]}, outputs={"out": torch.zeros(3, 8).t()})


@pytest.mark.parametrize(
    "dtype", ["float64", "float32", "bfloat16", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"]
)
def test_every_dtype_travels(dtype):
    schedule = ring_all_gather(3, 2, [5], dtype)
    x = [torch.randint(0, 2, (2, 5)).to(getattr(torch, dtype)) for _ in range(3)]
    for seed in (None, 1):
        out = local.run(schedule, [{"x": t} for t in x], seed=seed)
        assert all(torch.equal(o["out"], torch.cat(x)) for o in out)
