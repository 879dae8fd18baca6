"""Frames: what torch itself wrote around a payload makes an archive that torch reads, for every type."""

from __future__ import annotations

import io

import pytest
import torch

from undertow.checkpointing.frames import frame

DTYPES = [
    value
    for value in vars(torch).values()
    if isinstance(value, torch.dtype) and not str(value).startswith(("torch.q", "torch.bits"))
]
SUB_BYTE = ("int1", "int2", "int3", "int4", "int5", "int6", "int7")
DTYPES = sorted(
    {str(d): d for d in DTYPES if not str(d).removeprefix("torch.").removeprefix("u").startswith(SUB_BYTE)}.values(),
    key=str,
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5), (7, 0, 2), (64, 33)], ids=str)
def test_torch_reads_prefix_payload_suffix(seed, dtype, shape):
    framed = frame(shape, dtype)
    count = framed.nbytes // dtype.itemsize
    payload = torch.randint(0, 2 if dtype is torch.bool else 256, (framed.nbytes,), dtype=torch.uint8)
    expected = payload.view(dtype).view(shape) if count else torch.empty(shape, dtype=dtype)
    data = framed.prefix + payload.numpy().tobytes() + framed.suffix
    assert len(data) == framed.size
    assert len(framed.prefix) % 64 == 0 or not count
    loaded = torch.load(io.BytesIO(data), weights_only=True)
    assert (loaded.dtype, loaded.shape, loaded.is_contiguous()) == (dtype, torch.Size(shape), True)
    assert loaded.reshape(-1).view(torch.uint8).tolist() == expected.reshape(-1).view(torch.uint8).tolist()


def test_sharing_one_frame_for_equal_shapes():
    assert frame((5, 6), torch.float32) is frame((5, 6), torch.float32)


def test_private_names_of_torch_that_we_stand_on():
    """One place that fails clearly when a torch release moves something we use and torch does not promise."""
    from torch.distributed.checkpoint._dedup_save_plans import dedup_save_plans
    from torch.distributed.checkpoint._nested_dict import flatten_state_dict
    from torch.distributed.checkpoint._traverse import set_element
    from torch.distributed.checkpoint.default_planner import (
        create_default_global_save_plan,
        create_default_local_load_plan,
        create_default_local_save_plan,
    )
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    assert all(
        map(
            callable,
            (
                dedup_save_plans,
                flatten_state_dict,
                set_element,
                create_default_global_save_plan,
                create_default_local_load_plan,
                create_default_local_save_plan,
                torch.serialization.skip_data,
                torch._foreach_copy_,
            ),
        )
    )
    info = _StorageInfo("file", 1, 2)
    assert (info.relative_path, info.offset, info.length) == ("file", 1, 2)
    from torch._subclasses.fake_tensor import FakeTensorMode

    buffer = io.BytesIO()
    torch.save(torch.arange(1000, dtype=torch.int32), buffer)
    with FakeTensorMode():
        storage = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True).untyped_storage()
    offset = storage._checkpoint_offset
    assert buffer.getvalue()[offset : offset + 8] == torch.arange(2, dtype=torch.int32).numpy().tobytes()
