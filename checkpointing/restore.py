"""From a verified checkpoint back into the live state, in place, on any number of ranks and any layout.

DCP's load planner works out which boxes of which shards this rank needs; a `Reader` maps them. Nothing is written into
the state before names and shapes have been compared, so a checkpoint of another model changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.default_planner import create_default_local_load_plan
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.tensor import DTensor

from ..dist.progress import Progress
from .fit import Exchange, alone, compare, is_rank_word, settle
from .manifest import BadCheckpoint, Manifest, ShardRecord
from .reader import Reader, dtype_of
from .spread import own_part
from .state import AppState, Leaf, set_rng_state


def dcp_metadata(manifest: Manifest) -> Metadata:
    """The manifest's tensors and objects as DCP metadata, made without unpickling anything."""
    entries: dict[str, Any] = {key: BytesStorageMetadata() for key in manifest.objects}
    for key, record in manifest.tensors.items():
        chunks = [ChunkStorageMetadata(torch.Size(s.offsets), torch.Size(s.sizes)) for s in record.shards]
        properties = TensorProperties(dtype=dtype_of(record.dtype))
        entries[key] = TensorStorageMetadata(properties, torch.Size(record.shape), chunks)
    return Metadata(entries)


def load(state: AppState, path: Path, manifest: Manifest, allowed: Sequence[type], exchange: Exchange = alone) -> None:
    """Put the verified checkpoint at `path` into `state`. `UserError`, with nothing changed, when it does not fit."""
    load_from(state, Reader(path, manifest), allowed, exchange=exchange)


class Source(Protocol):
    """Where `load_from` reads: a `Reader`, or a foreign checkpoint under our names."""

    path: Path
    manifest: Manifest

    def shard(self, key: str, shard: ShardRecord) -> torch.Tensor: ...

    def object(self, key: str, allowed: Sequence[type] = ()) -> Any: ...


def load_from(
    state: AppState,
    reader: Source,
    allowed: Sequence[type],
    untouched: Collection[str] = (),
    exchange: Exchange = alone,
    before: Callable[[Mapping[str, torch.Tensor]], None] = lambda targets: None,
) -> None:
    """The same from any source; the objects named in `untouched` stay as they are. With several ranks, `exchange`
    brings every rank's word, and what one of them refuses, all refuse. `before` is told what will be filled; when it
    raises, nothing has been."""
    manifest = reader.manifest
    state = state.without(untouched) if untouched else state
    mine, values = compare(state, state.leaves(), manifest), {}
    try:
        values = read_objects(state, reader, allowed)
    except BadCheckpoint as error:
        mine.refused = str(error)
    settle(exchange(mine), reader.path)
    materialise_optimizers(state, manifest)
    leaves = state.leaves()
    targets = targets_of(state, leaves, manifest)
    before(targets)
    load_tensors(targets, reader, show=state.rank == 0)
    apply_objects(state, leaves, targets, manifest, values)


def materialise_optimizers(state: AppState, manifest: Manifest) -> None:
    """Give optimizers that have not stepped yet the state tensors that the checkpoint will fill."""
    names = state.parameter_names()
    stored_keys: dict[tuple[str | int, ...], list[str]] = {}
    for path in manifest.paths.values():
        stored_keys.setdefault(tuple(path[:-1]), []).append(str(path[-1]))
    for label, optimizer in state.optimizers.items():
        optimizer = own_part(optimizer)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                prefix = f"{label}.state.{names[id(parameter)]}."
                stored = stored_keys.get((label, "state", names[id(parameter)]), [])
                for key in [key for key in optimizer.state[parameter] if key not in stored]:
                    del optimizer.state[parameter][key]  # the checkpoint is from before it appeared
                missing = [key for key in stored if key not in optimizer.state[parameter]]
                on_device = group.get("capturable") or group.get("fused")  # where these keep their step counter
                for key in missing:
                    optimizer.state[parameter][key] = _blank(manifest, prefix + key, parameter, bool(on_device))
                if not optimizer.state[parameter]:
                    del optimizer.state[parameter]


def _blank(manifest: Manifest, key: str, parameter: torch.Tensor, scalar_on_device: bool) -> Any:
    record = manifest.tensors.get(key)
    if record is None:
        return None  # a Python value: `apply` puts it in
    dtype = dtype_of(record.dtype)
    if record.shape == tuple(parameter.shape):
        return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
    device = "cpu" if record.shape == () and not scalar_on_device else parameter.device
    return torch.zeros(record.shape, dtype=dtype, device=device)


def targets_of(state: AppState, leaves: Sequence[Leaf], manifest: Manifest) -> dict[str, torch.Tensor]:
    """Where each stored tensor goes: the live tensor, or a fresh one for an object whose inside has changed."""
    live = {leaf.key: leaf.value for leaf in leaves if isinstance(leaf.value, torch.Tensor)}
    targets = {}
    for key, record in manifest.tensors.items():
        value = live.get(key)
        if value is not None and tuple(value.shape) == record.shape:
            targets[key] = value
        elif manifest.paths[key][0] in state.others:
            targets[key] = torch.empty(record.shape, dtype=dtype_of(record.dtype))
    return targets


@torch.no_grad()
def load_tensors(targets: Mapping[str, torch.Tensor], reader: Source, *, show: bool) -> None:
    """Fill the targets in place from the checkpoint, resharding as needed; `show`: with a bar if it takes long."""
    items = items_of(targets, reader.manifest)
    with Progress(len(items), f"load {reader.path.name}", show, unit="part", patient=True) as bar:
        for item, shard in items:
            source = reader.shard(item.storage_index.fqn, shard)
            for dim, (offset, length) in enumerate(zip(item.storage_offsets, item.lengths)):
                source = source.narrow(dim, offset, length)
            _target(targets[item.dest_index.fqn], item).copy_(source)
            bar.update()


def items_of(targets: Mapping[str, torch.Tensor], manifest: Manifest) -> list[tuple[ReadItem, ShardRecord]]:
    """What of which stored box goes where into `targets`."""
    shards = {
        MetadataIndex(key, shard.offsets): shard for key, record in manifest.tensors.items() for shard in record.shards
    }
    items = create_default_local_load_plan(dict(targets), dcp_metadata(manifest)).items
    return [(item, shards[_bare(item.storage_index)]) for item in items]


def _bare(index: MetadataIndex) -> MetadataIndex:
    return MetadataIndex(index.fqn, index.offset)


def _target(value: torch.Tensor, item: ReadItem) -> torch.Tensor:
    local = value.to_local() if isinstance(value, DTensor) else value
    for dim, (offset, length) in enumerate(zip(item.dest_offsets, item.lengths)):
        local = local.narrow(dim, offset, length)
    return local


def read_objects(state: AppState, reader: Source, allowed: Sequence[type]) -> dict[str, Any]:
    """The non-tensor values that this rank needs, before anything is changed: one of them may be refused."""
    manifest = reader.manifest
    return {key: reader.object(key, allowed) for key in own_objects(state, manifest)}


def own_objects(state: AppState, manifest: Manifest) -> list[str]:
    """The stored objects that this rank reads."""
    return [key for key in manifest.objects if _mine(manifest.paths[key], state.rank)]


def apply_objects(
    state: AppState,
    leaves: Sequence[Leaf],
    targets: Mapping[str, torch.Tensor],
    manifest: Manifest,
    values: Mapping[str, Any],
) -> None:
    """Give the non-tensor values back: param_groups, schedulers, loaders, RNG."""
    names = state.parameter_names()
    for label, optimizer in state.optimizers.items():
        own = own_part(optimizer).state
        for index, group in enumerate(optimizer.param_groups):
            for key in [key for key in group if key != "params"]:
                stored = f"{label}.param_groups.{index}.{key}"
                if stored in values:
                    group[key] = values[stored]
            for parameter in group["params"]:
                for key in own.get(parameter, {}):
                    stored = f"{label}.state.{names[id(parameter)]}.{key}"
                    if stored in values:
                        own[parameter][key] = values[stored]
    for label, module in state.modules.items():
        extra = {
            str(leaf.path[-1]): values[leaf.key] for leaf in leaves if leaf.path[0] == label and leaf.key in values
        }
        if extra:
            module.load_state_dict({**module.state_dict(), **extra})
    for label, thing in state.others.items():
        thing.load_state_dict(_rebuild(label, manifest, {**targets, **values}))
    rank = f"rank-{state.rank:05d}"
    for label, thing in state.per_rank.items():
        if f"{label}.{rank}" in values:
            thing.load_state_dict(values[f"{label}.{rank}"])
    if state.rng and f"rng.{rank}" in values:
        set_rng_state(values[f"rng.{rank}"])


def _mine(path: Sequence[str | int], rank: int) -> bool:
    return not is_rank_word(path) or path[1] == f"rank-{rank:05d}"


def _rebuild(label: str, manifest: Manifest, values: Mapping[str, Any]) -> Any:
    """The nested state of object `label` from its flat leaves."""
    if label in values:
        return values[label]
    tree: dict[str, Any] = {}
    for key, path in manifest.paths.items():
        if path[0] == label:
            set_element(tree, tuple(path), values[key])
    return tree[label]
