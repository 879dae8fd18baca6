"""What a second save of an unchanged state must not do again. Counted, not timed: it holds on any machine."""

from __future__ import annotations

import pickle
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex

sys.path.insert(0, str(Path(__file__).parent))

from ckpt_job import Job, same

from undertow.checkpointing import live, open_checkpoint, plan, sample, save
from undertow.checkpointing.dcp_metadata import MOST, DcpMetadata
from undertow.checkpointing.folder import read_manifest
from undertow.checkpointing.manifest import ObjectRecord, checksums
from undertow.checkpointing.sample import Sampler
from undertow.checkpointing.staging import Words, has_words
from undertow.checkpointing.state import rng_state


class Growing:
    """An object whose pickle has another length at every save, so that the places of those behind it move."""

    def __init__(self) -> None:
        self.text = ""

    def state_dict(self) -> dict[str, Any]:
        return {"text": self.text}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.text = state["text"]


def test_saves_of_one_layout_plan_render_and_pickle_it_once(tmp_path, monkeypatch):
    """`made` counts the pickles of all of `.metadata`; every save's own is read back by torch's names all the same."""
    counts = {"plan": 0, "render": 0}

    def counted(name: str, real: Any) -> Any:
        def call(*args: Any, **named: Any) -> Any:
            counts[name] += 1
            return real(*args, **named)

        return call

    monkeypatch.setattr(live, "make_plan", counted("plan", live.make_plan))
    monkeypatch.setattr(plan, "render", counted("render", plan.render))
    job, thing = Job(layers=3), Growing()
    with job.checkpointer(tmp_path, a_thing=thing, keep=None) as ckpt:
        job.advance(0)
        for step in range(1, 6):
            thing.text = "x" * 100 * step
            ckpt.save(step)
            job.advance(step)
            ckpt.wait()
        dcp = ckpt._tiers._committers["disk"]._dcp
        assert dcp is not None and dcp.made == 1
    assert counts == {"plan": 1, "render": 1}
    lengths = set()
    for step in range(1, 6):
        path = tmp_path / f"step-{step:09d}"
        stored = pickle.loads((path / ".metadata").read_bytes())
        found = read_manifest(path)
        assert found.files[".metadata"] == checksums((path / ".metadata").read_bytes(), found.chunk_bytes)
        for key, record in found.objects.items():
            place = stored.storage_data[MetadataIndex(key)]
            assert place == _StorageInfo(record.file, record.start, record.length)
        lengths.add(found.objects["a_thing"].length)
        assert open_checkpoint(tmp_path, step=step)["a_thing"] == {"text": "x" * 100 * step}
    assert len(lengths) == 5  # or nothing would have been filled in


def test_metadata_that_is_filled_in_equals_metadata_that_is_pickled(tmp_path, seed):
    job = Job(layers=2)
    with job.checkpointer(tmp_path) as ckpt:
        job.advance(0)
        ckpt.save(1)
        ckpt.wait()
        made = ckpt._live.plan
    assert made.metadata is not None
    parts = made.metadata, made.tensors, "id", made.image.chunk_bytes
    once, names = DcpMetadata(*parts), ["a", "b.c", "d"]
    for largest in (10, 300, 70_000, MOST, MOST + 1, 2**40, 5):
        objects = {
            name: ObjectRecord("__0_1.distcp", random.randrange(largest), random.randrange(largest)) for name in names
        }
        objects["a"] = ObjectRecord("__0_1.distcp", 0, largest)
        data, record = once.file(objects)
        assert pickle.loads(data) == pickle.loads(DcpMetadata(*parts)._pickle(objects))
        assert record == checksums(data, made.image.chunk_bytes)
        assert once.file(dict(objects))[0] is data
    before = once.made
    for others in ({**objects, "new": ObjectRecord("__1_1.distcp", 3, 4)}, {}):
        data, _ = once.file(others)
        assert pickle.loads(data) == pickle.loads(DcpMetadata(*parts)._pickle(others))
    assert once.made == before + 2
    first, _ = DcpMetadata(*parts).file({})  # a state without objects
    assert pickle.loads(first) == pickle.loads(data)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8])
def test_samples_by_address_are_those_of_cat(dtype, seed):
    """The quick way is there on the CPU, and a bit anywhere in a sampled place shows, whatever a tensor's place."""
    whole = torch.randint(0, 100, (40_000,)).to(dtype)
    tensors = [whole[begin : begin + size] for begin, size in ((0, 4000), (4096, 999), (8192, 3001), (30_000, 20))]
    tensors += [torch.randint(0, 100, (size,)).to(dtype) for size in (513, 4096, 12_345)]
    sampler = Sampler(tensors)
    for tensor in tensors:
        count = 512 // tensor.element_size()
        for place in {0, min(count, len(tensor)) - 1, len(tensor) // 2}:
            sampler.before()
            assert not any(map(bool, sampler.changed()))
            kept = tensor[place].clone()
            tensor.data[place] += 1
            assert any(map(bool, sampler.changed()))
            tensor.data[place] = kept


def test_samples_are_gathered_by_address(monkeypatch):
    """On the CPU of every supported torch; where it fails, `torch.cat` gathers the same."""
    tensors = [torch.arange(4096.0), torch.arange(999.0)]
    quick = Sampler(tensors)
    monkeypatch.setattr(sample, "row_of_words", lambda *what: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # it is what was asked
        Sampler(tensors)

    def refused(*what: Any) -> Any:
        raise RuntimeError("not on this device")

    monkeypatch.setattr(sample, "row_of_words", refused)
    plain = Sampler(tensors)
    for sampler in (quick, plain):
        sampler.before()
    assert torch.equal(quick._groups[0][1].view(-1), plain._groups[0][1].view(-1))


def test_small_tensors_are_moved_bit_for_bit():
    bits = torch.tensor([0x7FC00001, 1, -1, 0x3F800000], dtype=torch.int32)
    sources = [value.view(torch.float32).clone() for value in bits]
    sources += [
        torch.arange(7.0),
        torch.arange(6.0, dtype=torch.float64).view(2, 3),
        torch.arange(4, dtype=torch.int16),
    ]
    targets = [torch.zeros_like(source) for source in sources]
    words = Words(targets, sources)
    assert words
    for _ in range(2):
        words.copy()
        for target, source in zip(targets, sources):
            assert torch.equal(target.view(-1).view(torch.uint8), source.view(-1).view(torch.uint8))
        sources[4].add_(1)  # the next save finds what is there then


def test_tensors_that_are_no_whole_words_are_copied_otherwise():
    row = torch.arange(64, dtype=torch.uint8)
    assert has_words(row[4:12], 64) and not has_words(row[4:12], 4)
    odd = [row[1:5], row[:6], row[:0], torch.ones(4, 4).T[:2], torch.ones(4, dtype=torch.complex64).conj()]
    assert not any(has_words(tensor, 1024) for tensor in odd)
    assert not Words([], [])


def test_random_generators_are_pickled_when_they_have_moved(tmp_path, monkeypatch):
    """A held-still generator costs no pickle; one draw from any of them is in the next save."""
    pickled: list[str] = []
    real = save._pickle
    monkeypatch.setattr(save, "_pickle", lambda value: pickled.append(type(value).__name__) or real(value))
    job = Job(layers=1)
    draws = [
        lambda: None,
        random.random,
        np.random.rand,
        lambda: torch.rand(1),
        lambda: random.gauss(0, 1),
        lambda: None,
    ]
    with job.checkpointer(tmp_path, keep=None) as ckpt:
        for step, draw in enumerate(draws):
            draw()
            pickled.clear()
            ckpt.save(step)
            ckpt.wait()
            assert pickled.count("dict") == (step in (0, 1, 2, 3, 4))
            want = rng_state()
            assert same(flat(open_checkpoint(tmp_path, step=step)["rng.rank-00000"]), flat(want))


def flat(state: dict[str, Any]) -> dict[str, Any]:
    return {f"{name}.{index}": part for name, value in state.items() for index, part in enumerate(parts_of(value))}


def parts_of(value: Any) -> tuple:
    return value if isinstance(value, tuple) else (value,)
