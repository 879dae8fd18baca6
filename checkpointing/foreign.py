"""Stock DCP's folders (`dcp.save`, `dcp.async_save`) as a source for `Checkpointer.restore_from`.

DCP stores a nested dictionary of the user's making, so the parts are looked for by what they hold: a module where all
of its names stand under one prefix, an optimizer where its parameters do, by name or by number. DCP keeps no checksums
of its own and no commit; what there is to verify is verified: its pickle goes through the restricted unpickler, every
tensor's boxes must fill it, every archive must lie in its file, and every archive is a zip whose CRC-32s are computed
again before anything of the state is touched. A checkpoint that DCP left half written has no `.metadata` at all.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from ..dist.errors import UserError
from ..dist.progress import Progress
from .coordinate import Coordinator
from .manifest import COMMIT, METADATA, BadCheckpoint, Manifest, ObjectRecord, ShardRecord, TensorRecord, check_boxes
from .state import AppState, plain_name
from .stored import DcpCheckpoint

Names = Mapping[str, str | None]  # label → prefix in the foreign checkpoint; None: leave that object as it is


class ForeignReader:
    """What `restore.Reader` is for our own files: `manifest` names this state's values, `theirs` where each comes from.
    Values that only need another form (`given`) are there already."""

    def __init__(self, path: Path, state: AppState, names: Names, allowed: Sequence[type] = ()) -> None:
        if (path / COMMIT).exists() or not (path / METADATA).is_file():
            raise UserError(
                f"{path} is not a folder that dcp.save wrote",
                expected=f"{METADATA} and .distcp files",
                remedy="for a checkpoint of undertow: Checkpointer(its folder, …).restore()",
            )
        self.path, self.checkpoint = path, DcpCheckpoint(path, allowed)
        self.theirs: dict[str, str] = {}
        self.given: dict[str, Any] = {}
        self.paths: dict[str, tuple[str | int, ...]] = {}
        self._by_plain = {plain_name(key): key for key in self.checkpoint}
        for label in (*state.modules, *state.optimizers, *state.others):
            if label in names and names[label] is None:
                continue
            wanted = names.get(label)
            if label in state.modules:
                self._module(label, state, wanted)
            elif label in state.optimizers:
                self._optimizer(label, state, wanted)
            else:
                self._object(label, wanted)
        self.manifest = self._manifest()

    def _choose(self, label: str, wanted: str | None, fitting: Sequence[str], what: str) -> str:
        if wanted is not None:
            fitting = [prefix for prefix in fitting if prefix == wanted]
        if len(fitting) != 1:
            tops = sorted({key.split(".")[0] for key in self.checkpoint})
            found = f"under {', '.join(map(repr, fitting))}" if fitting else f"nowhere among {', '.join(tops[:8])}"
            raise UserError(
                f"{self.path}: {what} of '{label}' stand {found}" + (f" (asked for {wanted!r})" if wanted else ""),
                expected="exactly one place",
                remedy=f"names={{'{label}': 'the prefix of its keys'}}, or None to leave it as it is",
            )
        return fitting[0]

    def _take(self, path: tuple[str | int, ...], theirs: str) -> None:
        key = ".".join(map(str, path))
        self.theirs[key], self.paths[key] = theirs, path

    def _give(self, path: tuple[str | int, ...], value: Any) -> None:
        key = ".".join(map(str, path))
        self.given[key], self.paths[key] = value, path

    def _module(self, label: str, state: AppState, wanted: str | None) -> None:
        names = [plain_name(name) for name in state.modules[label].state_dict()]
        first = names[0] if names else ""
        ends = [key for key in self._by_plain if key == first or key.endswith(f".{first}")]
        prefixes = [key[: len(key) - len(first)] for key in ends]
        fitting = [p.rstrip(".") for p in prefixes if all(p + name in self._by_plain for name in names)]
        prefix = _dotted(self._choose(label, wanted, fitting, "all names"))
        for name in names:
            self._take((label, name), self._by_plain[prefix + name])

    def _optimizer(self, label: str, state: AppState, wanted: str | None) -> None:
        known = state.parameter_names()
        groups = [[known[id(p)] for p in group["params"]] for group in state.optimizers[label].param_groups]
        every = [name for group in groups for name in group]
        options = [key for key in self._by_plain if key.startswith("param_groups.") or ".param_groups." in key]
        prefixes = sorted({key[: key.rindex("param_groups.")] for key in options})
        numbers = {p: self._numbering(p, groups) for p in prefixes}
        fitting = [p.rstrip(".") for p in prefixes if numbers[p] is not None]
        prefix = _dotted(self._choose(label, wanted, fitting, "the parameters"))
        called = numbers[prefix]
        assert called is not None
        for name in every:
            start = f"{prefix}state.{called[name]}."
            for key in [key for key in self._by_plain if key.startswith(start) and "." not in key[len(start) :]]:
                self._take((label, "state", name, key[len(start) :]), self._by_plain[key])
        for index, group in enumerate(groups):
            self._give((label, "param_groups", index, "params"), group)
            for start in (f"{prefix}param_groups.{index}.", f"{prefix}param_groups.{group[0]}."):
                for key in [key for key in options if key.startswith(start)]:
                    option = key[len(start) :]
                    if option != "params" and "." not in option:
                        self._take((label, "param_groups", index, option), self._by_plain[key])

    def _numbering(self, prefix: str, groups: list[list[str]]) -> dict[str, str] | None:
        """How the checkpoint calls each parameter: by name, or by its number; None where it holds other ones."""
        lists = [self._by_plain.get(f"{prefix}param_groups.{index}.params") for index in range(len(groups))]
        if all(lists) and f"{prefix}param_groups.{len(groups)}.params" not in self._by_plain:
            stored = [self.checkpoint[key] for key in lists if key is not None]
            if [[plain_name(str(name)) for name in group] for group in stored] == groups:
                return {name: name for group in groups for name in group}
            if [len(group) for group in stored] == [len(group) for group in groups] and all(
                type(number) is int for group in stored for number in group
            ):
                return {name: str(number) for ours, group in zip(groups, stored) for name, number in zip(ours, group)}
            return None
        flat = all(  # flatten_optimizer_state_dict: options under every parameter's own name
            any(key.startswith(f"{prefix}param_groups.{name}.") for key in self._by_plain)
            for group in groups
            for name in group
        )
        return {name: name for group in groups for name in group} if flat else None

    def _object(self, label: str, wanted: str | None) -> None:
        inside = [key for key in self._by_plain if f".{label}." in f".{key}."]
        starts = {f".{key}."[: f".{key}.".index(f".{label}.") + len(label) + 1].strip(".") for key in inside}
        if wanted is not None:
            starts = {wanted} if any(f"{key}.".startswith(f"{wanted}.") for key in self._by_plain) else set()
        prefix = self._choose(label, wanted, sorted(starts), "the values")
        depth = prefix.count(".") + 1
        for key, theirs in self._by_plain.items():
            if f"{key}.".startswith(f"{prefix}."):
                path = self._path(theirs)
                self._take((label, *path[depth:]), theirs)

    def _path(self, key: str) -> tuple[str | int, ...]:
        planned: Any = self.checkpoint.metadata.planner_data or {}
        return tuple(planned.get(key, key.split(".")))

    def _manifest(self) -> Manifest:
        """Their records under our names, checked as a manifest is."""
        tensors: dict[str, TensorRecord] = {}
        objects = {key: ObjectRecord("", 0, 0) for key in self.given}
        for ours, theirs in self.theirs.items():
            stored = self.checkpoint.metadata.state_dict_metadata[theirs]
            if not isinstance(stored, TensorStorageMetadata):
                objects[ours] = ObjectRecord(*self._place(MetadataIndex(theirs)))
                continue
            shards = []
            for chunk in stored.chunks:
                file, start, length = self._place(MetadataIndex(theirs, chunk.offsets))
                shards.append(ShardRecord(tuple(chunk.offsets), tuple(chunk.sizes), file, start, length, start))
            dtype = str(stored.properties.dtype).removeprefix("torch.")
            tensors[ours] = TensorRecord(dtype, tuple(stored.size), tuple(shards))
            check_boxes(theirs, tensors[ours], self.path / METADATA)
        return Manifest(0, 1, 1, {}, tensors, objects, self.paths)

    def _place(self, index: MetadataIndex) -> tuple[str, int, int]:
        try:
            place = self.checkpoint.metadata.storage_data[index]
            size = (self.path / place.relative_path).stat().st_size
        except (KeyError, OSError) as error:
            raise BadCheckpoint(f"{self.path}: '{index.fqn}' is not there ({error})") from error
        if min(place.offset, place.length) < 0 or place.offset + place.length > size:
            raise BadCheckpoint(f"{self.path}: '{index.fqn}' reaches beyond {place.relative_path} of {size} bytes")
        return place.relative_path, place.offset, place.length

    # -- what `restore.load_from` asks for ----------------------------------------------------------------------------

    def shard(self, key: str, shard: ShardRecord) -> torch.Tensor:
        value = self.checkpoint._load(MetadataIndex(self.theirs[key], torch.Size(shard.offsets)))
        wanted = (self.manifest.tensors[key].dtype, shard.sizes)
        if not isinstance(value, torch.Tensor) or (str(value.dtype)[6:], tuple(value.shape)) != wanted:
            raise BadCheckpoint(
                f"{self.path}: '{self.theirs[key]}' is not the {wanted[0]} {wanted[1]} that it is said to be"
            )
        return value

    def object(self, key: str, allowed: Sequence[type] = ()) -> Any:
        return self.given[key] if key in self.given else self.checkpoint[self.theirs[key]]

    def verify(self, *, part: int = 0, parts: int = 1) -> None:
        """Compute the CRC-32s of every `parts`-th archive again and read it; `BadCheckpoint` names one that is bad."""
        shards = [(key, shard) for key, record in self.manifest.tensors.items() for shard in record.shards]
        places = [(key, None, self.manifest.objects[key]) for key in self.manifest.objects if key not in self.given]
        mine = [*((key, shard, shard) for key, shard in shards), *places][part::parts]
        with Progress(len(mine), f"verify {self.path.name}", part == 0, unit="archive", patient=True) as bar:
            for key, shard, place in mine:
                self._sum_again(self.theirs[key], place.file, place.start, place.length)
                if shard is not None:
                    self.shard(key, shard)
                bar.update()

    def _sum_again(self, key: str, file: str, start: int, length: int) -> None:
        with open(self.path / file, "rb") as handle:
            handle.seek(start)
            data = handle.read(length)
        try:
            bad = zipfile.ZipFile(io.BytesIO(data)).testzip()
        except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError) as error:
            raise BadCheckpoint(f"{self.path}: '{key}' is no whole torch.save archive ({error})") from error
        if bad is not None:
            raise BadCheckpoint(f"{self.path}: '{key}' is damaged: its {bad} has not the CRC-32 it was written with")


def open_on_all(
    path: Path,
    state: AppState,
    names: Names,
    coordinator: Coordinator,
    allowed: Sequence[type] = (),
    *,
    verify: bool,
    timeout_s: float,
) -> ForeignReader:
    """The reader, once every rank has found its part whole; the first rank's problem is everybody's. Collective."""
    problem: Exception | None = None
    reader = None
    try:
        reader = ForeignReader(path, state, names, allowed)
        if verify:
            reader.verify(part=coordinator.rank, parts=coordinator.world)
    except Exception as error:  # whatever it is, the other ranks wait for a word
        problem = error
    coordinator.round += 1
    word = f"restore/{coordinator.round}/foreign"
    coordinator.say(word, problem and {"unfit": isinstance(problem, UserError), "reason": str(problem)})
    others = [said for said in coordinator.hear_all(word, timeout_s=timeout_s) if said]
    if problem is not None:
        raise problem
    if others:
        raise (UserError if others[0]["unfit"] else BadCheckpoint)(others[0]["reason"])
    assert reader is not None
    return reader


def _dotted(prefix: str) -> str:
    return f"{prefix}." if prefix else ""
