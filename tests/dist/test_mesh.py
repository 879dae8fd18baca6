"""The mesh: arithmetic that is checked for all small shapes, and groups that really reduce along their axis."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from undertow.dist.errors import UserError
from undertow.dist.launch_env import Launch
from undertow.dist.mesh import AXES, Mesh, MeshShape

shapes = st.dictionaries(st.sampled_from(AXES), st.integers(1, 3), max_size=4).map(lambda d: MeshShape.of(**d))


@settings(deadline=None, max_examples=40)
@given(shapes)
def test_a_shape_reads_back_and_stands_in_the_stated_order(shape):
    assert MeshShape.parse(str(shape)) == shape
    names = [name for name, _ in shape.degrees]
    assert names == sorted(names, key=AXES.index)


@settings(deadline=None, max_examples=40)
@given(shapes, st.integers(1, 3))
def test_the_rest_is_inferred(shape, rest):
    asked = MeshShape.of(**{**dict(shape.degrees), "expert": -1})
    known = math.prod(degree for name, degree in shape.degrees if name != "expert")
    mesh = asked.fit(known * rest)
    assert mesh.size("expert") == rest and mesh.world_size == known * rest


@settings(deadline=None, max_examples=40)
@given(shapes)
def test_coordinates_and_groups_agree(shape):
    mesh = shape.fit(math.prod(degree for _, degree in shape.degrees))
    world = range(mesh.world_size)
    assert [mesh.rank(**mesh.coordinates(rank)) for rank in world] == list(world)
    for count in range(len(mesh.axes) + 1):
        for axes in itertools.combinations(mesh, count):
            groups = mesh.groups(*axes)
            assert sorted(rank for group in groups for rank in group) == list(world)
            assert {len(group) for group in groups} == {mesh.size(*axes)}
            for group in groups:
                assert group == sorted(group)
                for rank in group:
                    same = [name for name in mesh if name not in axes]
                    assert all(mesh.coordinates(rank)[n] == mesh.coordinates(group[0])[n] for n in same)
                    assert mesh.group_of(rank, *axes) == group


def test_neighbours_on_the_last_axis_are_neighbouring_ranks():
    mesh = MeshShape.of(tensor=2, data=2, pipe=2).fit(8)
    assert mesh.groups("tensor") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert mesh.groups("data") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert mesh.groups("pipe", "data") == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert mesh.groups("context") == [[rank] for rank in range(8)]  # an axis that is not there
    assert mesh.coordinates(5) == {"pipe": 1, "data": 0, "tensor": 1}
    assert [mesh.crosses_hosts(axis, 4) for axis in ("tensor", "data", "pipe")] == [False, False, True]


def test_the_error_prints_the_whole_equation():
    with pytest.raises(UserError, match="data 2 × context 2 × tensor 3 = 12 ≠ world size 8; expected degrees whose"):
        MeshShape.of(tensor=3, data=2, context=2).fit(8)
    with pytest.raises(UserError, match=r"data \? × tensor 3 = world size 8 has no whole solution .8 / 3"):
        MeshShape.of(tensor=3, data=-1).fit(8)


@pytest.mark.parametrize(
    ("degrees", "words"),
    [
        ({"tensr": 2}, "'tensr' is not a mesh axis.*write 'tensor'"),
        ({"data": 0}, "degree of 'data' is 0"),
        ({"data": -2}, "degree of 'data' is -2"),
        ({"data": True}, "degree of 'data' is True"),
        ({"data": 2.0}, "degree of 'data' is 2.0"),
        ({"data": -1, "tensor": -1}, "more than one degree -1"),
    ],
)
def test_bad_degrees(degrees, words):
    with pytest.raises(UserError, match=words):
        MeshShape.of(**degrees)


@pytest.mark.parametrize("text", ["data", "data=", "data=x", "=2", "data=2,data=2", "data:2"])
def test_bad_text(text):
    with pytest.raises(UserError):
        MeshShape.parse(text)


def test_a_mesh_of_another_world_cannot_be_built():
    with pytest.raises(UserError, match="data 2 × tensor 2 = 4 ≠ world size 3"):
        MeshShape.of(data=2, tensor=2).fit(4).build(Launch("torchrun", 0, 3, 0, 3))


def reduce_along_axes(rank: int, world: int, mesh: Mesh) -> dict:
    built = mesh.build(Launch("torchrun", rank, world, rank, world))
    sums = {}
    for axes in ((), ("data",), ("tensor",), ("data", "tensor"), ("context",)):
        value = torch.tensor(10.0**rank)
        dist.all_reduce(value, group=built.group(*axes))
        sums[axes] = value.item()
        assert built.group(*axes) is built.group(*reversed(axes))
    device_mesh = built.device_mesh()
    assert device_mesh.mesh_dim_names == ("data", "tensor")
    assert device_mesh.get_coordinate() == tuple(mesh.coordinates(rank).values())
    assert device_mesh.get_group("tensor") is built.group("tensor")
    return sums


@pytest.mark.parametrize("degrees", [{"data": 2, "tensor": 2}, {"data": 1, "tensor": 3}, {"data": 1, "tensor": 1}])
def test_groups_reduce_along_their_axes(ranks, degrees):
    world = math.prod(degrees.values())
    mesh = MeshShape.of(**degrees).fit(world)
    for rank, sums in enumerate(ranks(world, reduce_along_axes, mesh)):
        for axes, total in sums.items():
            assert total == sum(10.0**other for other in mesh.group_of(rank, *axes))
