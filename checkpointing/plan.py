"""Which bytes of which tensor this rank writes where: DCP's planners decide who writes what, `layout` decides where.

A plan depends only on names, shapes and placements, so it is made once and reused until one of them changes. Replicated
tensors are written by one rank each, balanced by size. A tensor that has several names (tied weights) is written once,
and every name is given that place. Ranks exchange their local plans through the `Coordinator`.
"""

from __future__ import annotations

import dataclasses
import time
from collections import ChainMap
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.distributed.checkpoint._dedup_save_plans import dedup_save_plans
from torch.distributed.checkpoint.default_planner import (
    create_default_global_save_plan,
    create_default_local_save_plan,
)
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan as DcpPlan
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType

from ..dist.errors import UserError
from ..dist.units import format_bytes
from .coordinate import Coordinator
from .frames import frame
from .layout import CHUNK_BYTES, Image, place
from .manifest import ShardRecord, TensorRecord, render
from .state import Leaf, local_tensor

WORDS = ("tied", "tied/all", "local", "global", "placed")  # that ranks say about a plan
SMALL_BYTES = 256 * 1024  # a lazy tensor below this is cheaper to copy at once than to track


@dataclass(frozen=True)
class SavePlan:
    """One rank's part of a checkpoint: the shard file's image, and the keys behind its tensors and objects.

    `eager_host` of the image's eager tensors lie in host memory and come first; the rest are on the device.
    `metadata` (DCP's, of the whole checkpoint) and `tensors` (where each of its tensors lies, as records and as the
    manifest's JSON) are there on rank 0 only.
    """

    rank: int
    world: int
    image: Image
    eager_host: int
    eager: tuple[MetadataIndex, ...]
    lazy: tuple[MetadataIndex, ...]
    objects: tuple[MetadataIndex, ...]
    metadata: Metadata | None = None
    tensors: dict[str, TensorRecord] = field(default_factory=dict)
    rendered: bytes = b""

    @property
    def shard_name(self) -> str:
        return shard_name(self.rank)

    @property
    def objects_name(self) -> str:
        return f"__{self.rank}_1.distcp"

    @property
    def host_bytes(self) -> int:
        """Where the part of the image that is staged in host memory ends."""
        return self.image.eager[self.eager_host - 1].end if self.eager_host else 0

    def __str__(self) -> str:
        head = (
            f"SavePlan rank {self.rank}/{self.world}: {format_bytes(self.image.size)} in {self.image.chunks} chunks of "
            f"{format_bytes(self.image.chunk_bytes)}; {len(self.eager)} tensors copied at once "
            f"({format_bytes(self.image.eager_bytes)}), {len(self.lazy)} lazily, {len(self.objects)} objects"
        )
        rows = [
            f"  {placed.payload:>14d}  {placed.frame.nbytes:>14d}  lazy  {placed.key}" for placed in self.image.lazy
        ]
        return "\n".join([head, "          offset           bytes        tensor", *rows])


def shard_name(rank: int) -> str:
    """The file of that rank's tensors, as DCP names it."""
    return f"__{rank}_0.distcp"


def signature(leaves: Sequence[Leaf]) -> tuple:
    """What a plan depends on; equal signatures share a plan."""
    return (tuple(sorted(aliases(leaves).items())), *_shapes(leaves))


def aliases(leaves: Sequence[Leaf]) -> dict[str, str]:
    """Further names of a tensor → the first name it has. Only of parameters and optimizer state: whether they share
    memory changes no more often than the plan does, while users' objects may share today and not at the next save."""
    first: dict[tuple, str] = {}
    found = {}
    for leaf in leaves:
        if leaf.lazy is None or not isinstance(leaf.value, torch.Tensor):
            continue
        local = local_tensor(leaf.value)
        layout = str(getattr(leaf.value, "placements", ""))
        place = (local.data_ptr(), local.dtype, local.shape, local.stride(), leaf.value.shape, layout)
        known = first.setdefault(place, leaf.key) if local.numel() else leaf.key
        if known != leaf.key:
            found[leaf.key] = known
    return found


def _shapes(leaves: Sequence[Leaf]) -> tuple:
    return tuple(
        (leaf.path, tuple(leaf.value.shape), leaf.value.dtype, leaf.value.device.type, leaf.lazy, is_lazy(leaf))
        if isinstance(leaf.value, torch.Tensor)
        else (leaf.path,)
        for leaf in leaves
    )


def is_lazy(leaf: Leaf) -> bool:
    """Whether a tensor's bytes may leave late: the optimizer alone writes it, and it is large and dense."""
    if leaf.lazy is None:
        return False
    local = local_tensor(leaf.value)
    return local.is_contiguous() and local.numel() * local.element_size() >= SMALL_BYTES


def make_plan(
    leaves: Sequence[Leaf], coordinator: Coordinator, name: str, *, timeout_s: float, chunk_bytes: int = CHUNK_BYTES
) -> SavePlan:
    """This rank's plan. All ranks call it with the same `name`. Where one is late or dead every other raises
    `PeerLost`, and so does the late one when it comes: nobody has a plan that another lacks."""
    talk = Talk(coordinator, name, timeout_s)
    return coordinator.together(name, partial(_make_plan, leaves, talk, chunk_bytes), timeout_s=timeout_s)


def forget_words(name: str, coordinator: Coordinator) -> None:
    """Delete what this rank has said about the plan `name`, once all ranks have a later one."""
    for word in WORDS:
        coordinator.forget(f"{name}/{word}")


@dataclass(frozen=True)
class Talk:
    """What ranks tell each other while they make the plan `name`; waiting ends with a verdict against it."""

    coordinator: Coordinator
    name: str
    timeout_s: float

    def say(self, part: str, value: Any) -> None:
        self.coordinator.say(f"{self.name}/{part}", value)

    def first(self, part: str) -> Any:
        """Rank 0's word."""
        deadline_s = time.monotonic() + self.timeout_s
        return self.coordinator.hear(f"{self.name}/{part}", 0, deadline_s=deadline_s, unless=f"{self.name}/verdict")

    def all(self, part: str) -> list[Any]:
        name, unless = f"{self.name}/{part}", f"{self.name}/verdict"
        return self.coordinator.hear_all(name, timeout_s=self.timeout_s, unless=unless)


def _make_plan(leaves: Sequence[Leaf], talk: Talk, chunk_bytes: int) -> SavePlan:
    coordinator = talk.coordinator
    flat: dict[str, Any] = {}
    for leaf in leaves:
        if leaf.key in flat:
            raise UserError(
                f"two values of the state have the name '{leaf.key}'", remedy="rename one of the checkpointed objects"
            )
        flat[leaf.key] = leaf.value
    tied = _agreed_aliases(aliases(leaves), talk)
    once = {key: value for key, value in flat.items() if key not in tied}
    local = create_default_local_save_plan(once, coordinator.rank == 0)
    local = dataclasses.replace(local, planner_data={leaf.key: leaf.path for leaf in leaves})
    talk.say("local", local)
    metadata = None
    if coordinator.rank == 0:
        try:
            plans, metadata = _agree(talk.all("local"))
        except UserError as error:  # the others wait for an answer
            talk.say("global", str(error))
            raise
        metadata.state_dict_metadata.update({key: metadata.state_dict_metadata[one] for key, one in tied.items()})
        talk.say("global", plans)
    else:
        plans = talk.first("global")
        if isinstance(plans, str):
            raise UserError(plans)
    plan = _lay_out(plans[coordinator.rank], leaves, coordinator, metadata, chunk_bytes)
    placed = zip((*plan.eager, *plan.lazy), (*plan.image.eager, *plan.image.lazy))
    word = [(index, plan.shard_name, at.start, at.frame.size, at.payload) for index, at in placed]
    talk.say("placed", word)
    if metadata is None:
        return plan
    tensors = _tensor_records(metadata, talk.all("placed"), tied)
    return dataclasses.replace(plan, tensors=tensors, rendered=render(tensors, metadata.planner_data))


def _agreed_aliases(mine: dict[str, str], talk: Talk) -> dict[str, str]:
    """Those names that every rank finds to be a tensor's second: one that ties nothing keeps all apart."""
    talk.say("tied", mine)
    if talk.coordinator.rank == 0:
        words = talk.all("tied")
        common = {key: one for key, one in mine.items() if all(word.get(key) == one for word in words)}
        talk.say("tied/all", common)
    return talk.first("tied/all")


def _tensor_records(metadata: Metadata, words: list[list[tuple]], tied: dict[str, str]) -> dict[str, TensorRecord]:
    """The manifest's tensors, from where every rank has placed its part; `tied` names share their first one's place."""
    where = {index: place for word in words for index, *place in word}
    records = {}
    for key, stored in metadata.state_dict_metadata.items():
        if isinstance(stored, TensorStorageMetadata):
            shards = tuple(
                ShardRecord(tuple(c.offsets), tuple(c.sizes), *where[MetadataIndex(tied.get(key, key), c.offsets)])
                for c in stored.chunks
            )
            dtype = str(stored.properties.dtype).removeprefix("torch.")
            records[key] = TensorRecord(dtype, tuple(stored.size), shards)
    return records


def _agree(local_plans: list[DcpPlan]) -> tuple[list[DcpPlan], Metadata]:
    _refuse_other_shapes(local_plans)
    plans, metadata = create_default_global_save_plan(dedup_save_plans(local_plans))
    paths = dict(ChainMap(*[plan.planner_data for plan in local_plans]))
    return plans, dataclasses.replace(metadata, planner_data=paths)


def _refuse_other_shapes(local_plans: list[DcpPlan]) -> None:
    """A name means one tensor: where ranks hold other shapes under it, all but one rank's bytes would be dropped."""
    first: dict[str, tuple[int, torch.Size]] = {}
    for rank, plan in enumerate(local_plans):
        for item in plan.items:
            if item.tensor_data is not None:
                there, size = first.setdefault(item.index.fqn, (rank, item.tensor_data.size))
                if size != item.tensor_data.size:
                    raise UserError(
                        f"'{item.index.fqn}' has shape {tuple(size)} on rank {there} and "
                        f"{tuple(item.tensor_data.size)} on rank {rank}",
                        expected="the same tensor on every rank, or DTensors that are parts of one",
                        remedy="pass what differs by rank in per_rank",
                    )


def _lay_out(
    plan: DcpPlan, leaves: Sequence[Leaf], coordinator: Coordinator, metadata: Metadata | None, chunk_bytes: int
) -> SavePlan:
    by_key = {leaf.key: leaf for leaf in leaves}
    host, device, lazy, objects = [], [], [], []
    for item in plan.items:
        leaf = by_key[item.index.fqn]
        if item.type == WriteItemType.BYTE_IO:
            objects.append(item.index)
            continue
        entry = (leaf.lazy, item.index, _frame_of(item))
        if is_lazy(leaf):
            lazy.append(entry)
        elif leaf.value.device.type == "cpu":
            host.append(entry)
        else:
            device.append(entry)
    lazy.sort(key=lambda entry: entry[0])  # stable: a parameter stays before its optimizer state
    eager = [*host, *device]
    image = place(
        [(index.fqn, framed) for _, index, framed in eager],
        [(index.fqn, framed) for _, index, framed in lazy],
        chunk_bytes=chunk_bytes,
    )
    return SavePlan(
        coordinator.rank,
        coordinator.world,
        image,
        len(host),
        tuple(index for _, index, _ in eager),
        tuple(index for _, index, _ in lazy),
        tuple(objects),
        metadata,
    )


def _frame_of(item: WriteItem):
    assert item.tensor_data is not None
    return frame(tuple(item.tensor_data.chunk.sizes), item.tensor_data.properties.dtype)
