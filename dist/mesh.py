"""Ranks on named axes: which ranks share a dimension of parallelism, as arithmetic and, on demand, as process groups.

A `MeshShape` is what the user asks for (a degree may be -1: whatever is left); `fit` makes it a `Mesh` of a given world
size. Axes stand in the order of `AXES`, outermost first: neighbours on the last axis are neighbouring ranks, so that
`tensor`, which talks most, stays within a host, and `pipe`, which talks least, crosses hosts. (The order of
torchtitan's ParallelDims; Megatron-LM, Narayanan et al. 2021, section 3.) Everything but `build` is pure.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from .errors import UserError
from .launch_env import Launch

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

AXES = ("pipe", "data", "shard", "context", "expert", "tensor")  # outermost first; `shard` is FSDP's axis
REST = -1


@dataclass(frozen=True)
class MeshShape:
    """Degrees by axis, outermost first, as asked for; at most one is -1. `of` and `parse` put them in AXES' order."""

    degrees: tuple[tuple[str, int], ...]

    def __post_init__(self) -> None:
        names = [name for name, _ in self.degrees]
        for name, degree in self.degrees:
            if name not in AXES:
                close = difflib.get_close_matches(name, AXES, n=1)
                hint = f"write '{close[0]}'" if close else ""
                raise UserError(f"'{name}' is not a mesh axis", expected=f"one of {', '.join(AXES)}", remedy=hint)
            if not isinstance(degree, int) or isinstance(degree, bool) or (degree < 1 and degree != REST):
                raise UserError(f"the degree of '{name}' is {degree!r}", expected="a whole number from 1, or -1")
        if len(set(names)) < len(names):
            raise UserError(f"the mesh '{self}' names an axis twice", expected="each axis once")
        if [degree for _, degree in self.degrees].count(REST) > 1:
            raise UserError(f"the mesh '{self}' has more than one degree -1", expected="one axis that takes the rest")

    @classmethod
    def of(cls, **degrees: int) -> MeshShape:
        """`MeshShape.of(data=-1, tensor=2)`; the order of the arguments does not matter."""
        order = {name: position for position, name in enumerate(AXES)}
        return cls(tuple(sorted(degrees.items(), key=lambda item: order.get(item[0], len(AXES)))))

    @classmethod
    def parse(cls, text: str) -> MeshShape:
        """Read back `str(shape)`: 'data=-1,tensor=2'. '' is the shape of one rank."""
        degrees: dict[str, int] = {}
        for part in filter(None, (part.strip() for part in text.split(","))):
            name, equals, number = (piece.strip() for piece in part.partition("="))
            try:
                degree = int(number)
            except ValueError:
                degree = None
            if not equals or degree is None or name in degrees:
                raise UserError(f"'{part}' in the mesh '{text}'", expected="each axis once, as in data=-1,tensor=2")
            degrees[name] = degree
        return cls.of(**degrees)

    def __str__(self) -> str:
        return ",".join(f"{name}={degree}" for name, degree in self.degrees)

    def equation(self) -> str:
        """'data 2 × context ? × tensor 3'."""
        return " × ".join(f"{name} {'?' if degree == REST else degree}" for name, degree in self.degrees) or "1"

    def fit(self, world_size: int) -> Mesh:
        """The mesh over `world_size` ranks; `UserError` prints the whole equation when the product is another."""
        known = math.prod(degree for _, degree in self.degrees if degree != REST)
        rest = any(degree == REST for _, degree in self.degrees)
        if rest and world_size % known:
            raise UserError(
                f"{self.equation()} = world size {world_size} has no whole solution ({world_size} / {known})",
                expected=f"known degrees whose product divides {world_size}",
                remedy=f"start {known} ranks, or a multiple of them (torchrun --nproc-per-node {known})",
            )
        if not rest and known != world_size:
            raise UserError(
                f"{self.equation()} = {known} ≠ world size {world_size}",
                expected=f"degrees whose product is {world_size}",
                remedy=f"start {known} ranks, or give one axis the degree -1",
            )
        return Mesh(tuple((name, world_size // known if degree == REST else degree) for name, degree in self.degrees))


@dataclass(frozen=True)
class Mesh:
    """Ranks 0 … world_size-1 in row-major order over `axes` (name, size), outermost first. Made by `MeshShape.fit`."""

    axes: tuple[tuple[str, int], ...]

    @property
    def world_size(self) -> int:
        return math.prod(size for _, size in self.axes)

    def __str__(self) -> str:
        return " × ".join(f"{name} {size}" for name, size in self.axes) or "1"

    def size(self, *axes: str) -> int:
        """Number of ranks along `axes` together; an axis that the mesh does not have counts 1."""
        return math.prod(size for name, size in self.axes if name in self._known(axes))

    def coordinates(self, rank: int) -> dict[str, int]:
        """Where `rank` is on each axis."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is not in a mesh of {self.world_size} ranks")
        result: dict[str, int] = {}
        for name, size in reversed(self.axes):
            rank, result[name] = divmod(rank, size)
        return {name: result[name] for name, _ in self.axes}

    def rank(self, **coordinates: int) -> int:
        """The rank at `coordinates`; axes left out are at 0."""
        self._known(tuple(coordinates))
        rank = 0
        for name, size in self.axes:
            position = coordinates.get(name, 0)
            if not 0 <= position < size:
                raise ValueError(f"{name} {position} is not in 0 … {size - 1}")
            rank = rank * size + position
        return rank

    def groups(self, *axes: str) -> list[list[int]]:
        """All groups of ranks that differ only on `axes`; every rank is in one. Ranks ascend within a group."""
        return [self.group_of(rank, *axes) for rank in range(self.world_size) if self._first(rank, axes) == rank]

    def group_of(self, rank: int, *axes: str) -> list[int]:
        """The ranks that share all coordinates with `rank` except those on `axes`."""
        group = [self._first(rank, axes)]
        for name, size, stride in self._strides():
            if name in axes:
                group = [first + position * stride for first in group for position in range(size)]
        return group

    def crosses_hosts(self, axis: str, local_world_size: int) -> bool:
        """Whether some group of `axis` has ranks on two hosts of `local_world_size` ranks each."""
        return any(len({rank // local_world_size for rank in group}) > 1 for group in self.groups(axis))

    def build(self, launch: Launch, device_type: str = "cpu") -> BuiltMesh:
        """Process groups for this mesh, each made at its first use. Needs the default group when the first is made."""
        if launch.world_size != self.world_size:
            raise UserError(
                f"{self} = {self.world_size} ≠ world size {launch.world_size}",
                expected="a mesh fitted to this launch: shape.fit(launch.world_size)",
            )
        return BuiltMesh(self, launch.rank, device_type)

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self.axes)

    def _first(self, rank: int, axes: tuple[str, ...]) -> int:
        """The lowest rank of `rank`'s group along `axes`."""
        self._known(axes)
        place = self.coordinates(rank)
        return rank - sum(place[name] * stride for name, _, stride in self._strides() if name in axes)

    def _strides(self) -> list[tuple[str, int, int]]:
        """(name, size, distance between neighbours), outermost first."""
        strides, stride = [], self.world_size
        for name, size in self.axes:
            stride //= size
            strides.append((name, size, stride))
        return strides

    def _known(self, axes: tuple[str, ...]) -> tuple[str, ...]:
        for axis in axes:
            if axis not in AXES:
                raise ValueError(f"'{axis}' is not one of {', '.join(AXES)}")
        return axes


@dataclass
class BuiltMesh:
    """A mesh with torch's process groups.

    `group` is collective at its first call for an axis: all ranks of the job must ask for new groups in the same order.
    """

    mesh: Mesh
    rank: int
    device_type: str
    _groups: dict[tuple[str, ...], dist.ProcessGroup] = field(default_factory=dict)
    _device_mesh: DeviceMesh | None = None

    def group(self, *axes: str) -> dist.ProcessGroup:
        """The process group of this rank along `axes` together."""
        key = tuple(name for name in self.mesh if name in axes and self.mesh.size(name) > 1)
        if key not in self._groups:
            mine: dist.ProcessGroup | int | None
            if self.mesh.size(*key) == self.mesh.world_size:
                mine = dist.group.WORLD
            elif not key:  # a group of this rank alone concerns no other rank
                mine = dist.new_group([self.rank], use_local_synchronization=True)
            else:
                mine, _ = dist.new_subgroups_by_enumeration(self.mesh.groups(*key))
            assert isinstance(mine, dist.ProcessGroup)  # torch's other answers are for ranks outside the group
            self._groups[key] = mine
        return self._groups[key]

    def device_mesh(self) -> DeviceMesh:
        """The same groups as torch's DeviceMesh (for DTensor, FSDP2), with the mesh's axis names; collective."""
        if self._device_mesh is None:
            from torch.distributed.device_mesh import DeviceMesh

            axes = self.mesh.axes or (("data", 1),)
            ranks = torch.arange(self.mesh.world_size).view([size for _, size in axes])
            groups = [self.group(name) for name, _ in axes]
            self._device_mesh = DeviceMesh.from_group(
                groups if len(groups) > 1 else groups[0],
                self.device_type,
                mesh=ranks if len(groups) > 1 else None,
                mesh_dim_names=tuple(name for name, _ in axes),
            )
        return self._device_mesh
