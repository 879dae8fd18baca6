"""Boundary rows of a graph whose nodes are spread over ranks: who needs which rows of whom, and their exchange.

Each rank owns a contiguous run of nodes and every edge that ends in one of them. The sources of those edges that live
elsewhere are its ghosts. One exchange fills the ghosts; backward sends their gradients home, where they add up. The
plan is computed from the whole graph alone, so no rank needs to ask another.

By MPI the rows are described by an indexed-block datatype and leave from where they lie; under `undertow mpi run` that
type is the interposer's. The plain way packs them and calls all_to_all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...dist.errors import MissingPackage, UserError
from .contract import Place


@dataclass(frozen=True)
class HaloPlan:
    """This rank's part of a graph. `edges` [2, E]: source (own nodes, then ghosts) and target (own), both local.

    `send[r]`: own nodes whose rows rank r needs; `receive[r]`: how many ghosts rank r owns, which come in its order.
    """

    start: int
    stop: int
    edges: np.ndarray
    send: tuple[np.ndarray, ...]
    receive: tuple[int, ...]

    @property
    def ghosts(self) -> int:
        return sum(self.receive)


def bounds(nodes: int, ranks: int) -> list[int]:
    """Where each rank's nodes begin, and the end: the package's contiguous layout."""
    return [nodes * rank // ranks for rank in range(ranks + 1)]


def plan(edges: np.ndarray, nodes: int, rank: int, ranks: int) -> HaloPlan:
    """The part of rank `rank` of a graph of `nodes` nodes and directed `edges` [2, E]."""
    if nodes < ranks:
        raise UserError(f"{nodes} nodes over {ranks} ranks", expected="at least one on each")
    cuts = np.array(bounds(nodes, ranks))
    owner = np.searchsorted(cuts, np.arange(nodes), side="right") - 1

    def needed(by: int, of: int) -> np.ndarray:
        """Nodes of rank `of` that rank `by` needs, ascending."""
        crossing = (owner[edges[1]] == by) & (owner[edges[0]] == of)
        return np.unique(edges[0][crossing]) if by != of else np.empty(0, dtype=edges.dtype)

    start, stop = int(cuts[rank]), int(cuts[rank + 1])
    ghosts = [needed(rank, other) for other in range(ranks)]
    local = np.full(nodes, -1)
    local[start:stop] = np.arange(stop - start)
    every = np.concatenate(ghosts)
    local[every] = stop - start + np.arange(len(every))
    mine = edges[:, owner[edges[1]] == rank]
    send = tuple(needed(other, rank) - start for other in range(ranks))
    return HaloPlan(start, stop, local[mine], send, tuple(len(part) for part in ghosts))


class Gloo:
    """The plain way: pack, all_to_all, unpack."""

    def swap(self, rows: Tensor, sends: list[int], receives: list[int]) -> Tensor:
        out = rows.new_empty(sum(receives), rows.shape[1])
        dist.all_to_all_single(out, rows.contiguous(), receives, sends)
        return out

    def forward(self, x: Tensor, halo: HaloPlan) -> Tensor:
        packed = x[torch.from_numpy(np.concatenate(halo.send))]
        return self.swap(packed, [len(part) for part in halo.send], list(halo.receive))

    def backward(self, ghosts: Tensor, halo: HaloPlan) -> Tensor:
        return self.swap(ghosts, list(halo.receive), [len(part) for part in halo.send])


class Mpi:
    """Rows leave from where they lie, as an indexed-block datatype of one row each."""

    def __init__(self) -> None:
        try:
            from mpi4py import MPI
        except ImportError as error:
            raise MissingPackage("mpi4py", extra="mpi", needed_for="--halo mpi") from error
        self.MPI, self.comm = MPI, MPI.COMM_WORLD
        self._types: dict[tuple[int, int, int], Any] = {}

    def _type(self, halo: HaloPlan, rank: int, width: int) -> Any:
        key = (id(halo), rank, width)
        if key not in self._types:
            row = self.MPI.FLOAT.Create_contiguous(width)
            self._types[key] = row.Create_indexed_block(1, halo.send[rank].tolist()).Commit()
        return self._types[key]

    def forward(self, x: Tensor, halo: HaloPlan) -> Tensor:
        field = x.detach().contiguous().numpy()
        ghosts = np.empty((halo.ghosts, field.shape[1]), dtype=np.float32)
        requests, at = [], 0
        for rank, count in enumerate(halo.receive):
            if count:
                requests.append(self.comm.Irecv(ghosts[at : at + count], rank))
                at += count
        for rank, rows in enumerate(halo.send):
            if len(rows):
                requests.append(self.comm.Isend([field, 1, self._type(halo, rank, field.shape[1])], rank))
        self.MPI.Request.Waitall(requests)
        return torch.from_numpy(ghosts)

    def backward(self, ghosts: Tensor, halo: HaloPlan) -> Tensor:
        field = ghosts.detach().contiguous().numpy()
        home = np.empty((sum(map(len, halo.send)), field.shape[1]), dtype=np.float32)
        requests, at = [], 0
        for rank, rows in enumerate(halo.send):
            if len(rows):
                requests.append(self.comm.Irecv(home[at : at + len(rows)], rank))
                at += len(rows)
        at = 0
        for rank, count in enumerate(halo.receive):
            if count:
                requests.append(self.comm.Isend(field[at : at + count], rank))
                at += count
        self.MPI.Request.Waitall(requests)
        return torch.from_numpy(home)


class Ghosts(torch.autograd.Function):
    """Rows [n, F] of own nodes to rows [g, F] of the ghosts."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, halo: HaloPlan, way: Gloo | Mpi, place: Place) -> Tensor:
        ctx.halo, ctx.way, ctx.place, ctx.rows = halo, way, place, x.shape[0]
        out = way.forward(x, halo)
        place.count("halo", bytes=out.numel() * 4, messages=sum(count > 0 for count in halo.receive), exchanges=1)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        home = ctx.way.backward(gradients[0], ctx.halo)
        ctx.place.count("halo", bytes=home.numel() * 4, messages=sum(map(bool, map(len, ctx.halo.send))), exchanges=1)
        dx = home.new_zeros(ctx.rows, home.shape[1])
        return dx.index_add_(0, torch.from_numpy(np.concatenate(ctx.halo.send)), home), None, None, None
