"""The `.metadata` file: torch's own record of a checkpoint, pickled once per plan and then filled in.

Of thousands of entries only the places of objects differ between two saves, and hardly ever: an object that grows by a
byte moves those behind it. Pickling all of it would hold the interpreter lock, which the training thread needs, for
tens of milliseconds. So it is pickled with four bytes for each start and length, and these are written over.
"""

from __future__ import annotations

import pickle
import re
import struct
from collections.abc import Mapping

from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta

from .manifest import FileRecord, ObjectRecord, TensorRecord, checksums

FIRST = 0x5EED0000  # of the stand-ins, 65536 at most; pickle writes each of them as J and four bytes
STAND_IN = re.compile(rb"J(..\xed\x5e)", re.DOTALL)
MOST = 2**31 - 1  # that such a number can be


class DcpMetadata:
    """Of one plan: DCP's `metadata` without places, and where each of `tensors` lies."""

    def __init__(self, metadata: Metadata, tensors: Mapping[str, TensorRecord], save_id: str, chunk_bytes: int) -> None:
        self.metadata, self._save_id, self._chunk_bytes = metadata, save_id, chunk_bytes
        self._storage = {
            MetadataIndex(key, shard.offsets, position): _StorageInfo(shard.file, shard.start, shard.length)
            for key, record in tensors.items()
            for position, shard in enumerate(record.shards)
        }
        self._objects: dict[str, ObjectRecord] | None = None
        self._names: list[tuple[str, str]] | None = None  # of the objects in the template
        self._template, self._places = bytearray(), list[int]()
        self.made = 0  # how often all of it was pickled

    def file(self, objects: Mapping[str, ObjectRecord]) -> tuple[bytes, FileRecord]:
        """Its bytes and their record, with `objects` where they are."""
        if objects != self._objects:
            self._file, self._objects = self._filled(objects), dict(objects)
        return self._file

    def _filled(self, objects: Mapping[str, ObjectRecord]) -> tuple[bytes, FileRecord]:
        numbers = [number for record in objects.values() for number in (record.start, record.length)]
        names = [(key, record.file) for key, record in objects.items()]
        if names != self._names:
            self._names, self._template, self._places = names, bytearray(), []
            stand_ins = range(FIRST, FIRST + len(numbers))
            pairs = zip(names, stand_ins[::2], stand_ins[1::2])
            data = self._pickle({key: ObjectRecord(file, start, length) for (key, file), start, length in pairs})
            found = [(int.from_bytes(match[1], "little"), match.start(1)) for match in STAND_IN.finditer(data)]
            if sorted(number for number, _ in found) == list(stand_ins):  # each of them once
                self._template, self._places = bytearray(data), [place for _, place in sorted(found)]
        if self._template and max(numbers, default=0) <= MOST:
            for place, number in zip(self._places, numbers):
                struct.pack_into("<i", self._template, place, number)
            data = bytes(self._template)
        else:
            data = self._pickle(objects)
        return data, checksums(data, self._chunk_bytes)

    def _pickle(self, objects: Mapping[str, ObjectRecord]) -> bytes:
        self.made += 1
        places = {MetadataIndex(key): _StorageInfo(r.file, r.start, r.length) for key, r in objects.items()}
        whole = Metadata(
            self.metadata.state_dict_metadata,
            self.metadata.planner_data,
            self._storage | places,
            StorageMeta(save_id=self._save_id),
        )
        return pickle.dumps(whole)
