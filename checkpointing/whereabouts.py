"""Where many tensors lie, in what shape, and how often they were written, by one look into the memory in which torch
keeps that.

Asking 900 tensors for address, dims and sizes takes the training thread half a millisecond at every save, nearly all of
it to wait for memory that a step has pushed out of the cache, one object after the other. One gather reads the same
numbers at once: of each Python object which tensor it is, of each tensor its storage, offset, sizes and strides, of
each storage its address. That the first are as before proves that the next ones are still there. Where in an object a
number lies is found by looking for known ones in tensors made for that (`offsets`), and what is read is compared with
what torch says before it is trusted; where anything is not as expected, each tensor is asked instead, as it is with
UNDERTOW_CHECKPOINT_OFFSETS=0.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import torch

from .addresses import row_of_words

SWITCH = "UNDERTOW_CHECKPOINT_OFFSETS"
WORD, INLINE = 8, 5  # bytes; sizes and strides that a tensor keeps in itself, torch's own number
IMPL, STORAGE, COUNTER = 20, 6, 3  # words of torch's tensor and storage objects that are looked at
PROBES = (
    ((1013, 17), (1031, 3), 4099),
    ((11, 13, 19), (1709, 83, 2), 77),
    ((523,), (7,), 311),
)  # sizes, strides, offset


class Offsets(NamedTuple):
    """In words: the tensor in a Python object; storage, offset, number of dims (after which come sizes and then
    strides) and version counter in a tensor; the address in a storage. In halves of words: the count in the counter."""

    tensor: int
    storage: int
    begin: int
    dims: int
    data: int
    counter: int
    count: int


class Whereabouts:
    """Of `tensors`, which have at most `INLINE` dims, as they are now, and of `wrappers`, whose attribute `slot` is the
    tensor of the same place in `parts`."""

    def __init__(self, tensors: Sequence[torch.Tensor], wrappers: Sequence[object], slot: int, at: Offsets) -> None:
        self._held = (*tensors, *wrappers)  # these objects stay where they are
        impls = [tensor._cdata for tensor in tensors]
        storages = [tensor.untyped_storage() for tensor in tensors]
        heads = [*(id(t) + WORD * at.tensor for t in tensors), *(id(w) + WORD * slot for w in wrappers)]
        words = [
            impl + WORD * word
            for impl, tensor in zip(impls, tensors)
            for word in (
                at.storage,
                at.begin,
                *range(at.dims, at.dims + 1 + tensor.dim()),
                *range(at.dims + 1 + INLINE, at.dims + 1 + INLINE + tensor.dim()),
            )
        ]
        self._looks = [Look(heads), Look(words), Look([storage._cdata + WORD * at.data for storage in storages])]
        facts = [
            fact
            for tensor, storage in zip(tensors, storages)
            for fact in (storage._cdata, tensor.storage_offset(), tensor.dim(), *tensor.shape, *tensor.stride())
        ]
        self._said = [impls, facts, [storage.data_ptr() for storage in storages]]

    @classmethod
    def of(
        cls, tensors: Sequence[torch.Tensor], wrappers: Sequence[object], parts: Sequence[torch.Tensor]
    ) -> Whereabouts | None:
        """None where that cannot be told from memory alone."""
        at = offsets()
        if at is None or not tensors:
            return None
        slot = 0
        if wrappers:
            kind = type(wrappers[0])
            words = _words(id(wrappers[0]), kind.__basicsize__ // WORD)
            if id(parts[0]) not in words or any(type(each) is not kind for each in wrappers):
                return None
            slot = words.index(id(parts[0]))
        try:
            found = cls(tensors, wrappers, slot, at)
        except RuntimeError:  # a tensor without a storage
            return None
        said = [*found._said[0], *map(id, parts)], *found._said[1:]
        read = [look.known.tolist() for look in found._looks]
        return found if all(one == other for one, other in zip(said, read)) else None

    def unchanged(self) -> bool:
        """Whether all of it is as before."""
        return all(look.same() for look in self._looks)


class Versions:
    """How often each of `tensors` has been written, by torch's own count."""

    def __init__(self, tensors: Sequence[torch.Tensor], at: Offsets) -> None:
        self._held = tensors  # these objects stay where they are
        impls = [tensor._cdata for tensor in tensors]
        heads = Look([id(tensor) + WORD * at.tensor for tensor in tensors])
        counters = Look([impl + WORD * at.counter for impl in impls])
        if heads.known.tolist() != impls or not counters.known.all():  # inference tensors have none
            raise RuntimeError("no counters")
        self._same = heads, counters
        self._counts = Look([begin + WORD // 2 * at.count for begin in counters.known.tolist()], torch.int32)
        if self._counts.known.tolist() != [tensor._version for tensor in tensors]:
            raise RuntimeError("no counts")

    @classmethod
    def of(cls, tensors: Sequence[torch.Tensor]) -> Versions | None:
        """None where that cannot be told from memory alone."""
        at = offsets()
        try:
            return cls(tensors, at) if at is not None and tensors else None
        except RuntimeError:
            return None

    def now(self) -> list[int]:
        """The counts; each is asked for its own where one has become another."""
        if all(look.same() for look in self._same):
            return self._counts.now().tolist()
        return [tensor._version for tensor in self._held]


class Look:
    """What stood at these addresses, and whether it still does."""

    def __init__(self, addresses: Sequence[int], dtype: torch.dtype = torch.int64) -> None:
        begins = np.array(addresses, dtype=np.int64)
        self._row, places = row_of_words(begins, dtype.itemsize, dtype, torch.device("cpu"))
        self._places = torch.from_numpy(places)
        self.known = self._row.index_select(0, self._places)
        self._found = torch.empty_like(self.known)

    def now(self) -> torch.Tensor:
        return torch.index_select(self._row, 0, self._places, out=self._found)

    def same(self) -> bool:
        return torch.equal(self.now(), self.known)


def offsets() -> Offsets | None:
    """Found in this torch; None where it keeps these numbers otherwise, or the environment forbids to use them."""
    return None if _switched_off() else _found()


def why_not() -> str:
    """Why there are no `offsets`, or why tensors are asked although there are."""
    if _switched_off():
        return f"{SWITCH}={os.environ[SWITCH]}"
    if _found() is None:
        return f"torch {torch.__version__} keeps these numbers elsewhere than it did"
    return "what was read of them is not what torch says"


def _switched_off() -> bool:
    return os.environ.get(SWITCH, "").strip().lower() in ("0", "false", "no", "off")


@cache
def _found() -> Offsets | None:
    memory = bytearray(2**20 + 64)
    base = torch.frombuffer(memory, dtype=torch.uint8)
    found = set()
    for sizes, strides, begin in PROBES:
        probe = base.as_strided(sizes, strides, begin)
        storage = probe.untyped_storage()
        impl = _words(probe._cdata, IMPL)
        counter = _counter(probe)
        if counter is None:
            return None
        try:
            first = impl.index(sizes[0])
            where = Offsets(
                _words(id(probe), type(probe).__basicsize__ // WORD).index(probe._cdata),
                impl.index(storage._cdata),
                impl.index(begin),
                first - 1,
                _words(storage._cdata, STORAGE).index(storage.data_ptr()),
                *counter,
            )
        except ValueError:
            return None
        count = len(sizes)
        as_kept = (count, *sizes), strides
        if (tuple(impl[first - 1 : first + count]), tuple(impl[first + INLINE : first + INLINE + count])) != as_kept:
            return None
        found.add(where)
    return found.pop() if len(found) == 1 else None


def _counter(probe: torch.Tensor) -> tuple[int, int] | None:
    """Where the version counter is: what a detached tensor shares and `.data` does not."""
    mine, detached, other = (_words(each._cdata, IMPL) for each in (probe, probe.detach(), probe.data))
    places = [place for place, word in enumerate(mine) if word == detached[place] != other[place]]
    if len(places) != 1 or not mine[places[0]]:
        return None
    found = None
    for _ in range(3):
        for _ in range(70):
            probe.add_(1)
        halves = np.array(_words(mine[places[0]], COUNTER)).view(np.int32).tolist()
        if halves.count(probe._version) != 1 or found not in (None, halves.index(probe._version)):
            return None
        found = halves.index(probe._version)
    assert found is not None
    return places[0], found


def _words(address: int, count: int) -> list[int]:
    return list((ctypes.c_int64 * count).from_address(address))
