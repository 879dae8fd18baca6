"""A graph of pairs of ranks on different places, reordered: the neighbours must be the ones that were asked for.

Places come from UNDERTOW_MPI_PLACE. Rank r's heavy neighbour is r + size/2, its light ones r - 1 and r + 1. Prints the
weight that crosses places, before and after.
"""

from __future__ import annotations

import os

import numpy as np
from mpi4py import MPI

comm = MPI.COMM_WORLD
rank, size = comm.rank, comm.size
HEAVY, LIGHT = 50, 1


def asked(r: int) -> dict[int, int]:
    around: dict[int, int] = {}
    for other, weight in ((r + size // 2, HEAVY), (r - 1, LIGHT), (r + 1, LIGHT)):
        around[other % size] = around.get(other % size, 0) + weight
    return around


def crossing(place_of_vertex: list[str]) -> int:
    return sum(w for r in range(size) for o, w in asked(r).items() if place_of_vertex[r] != place_of_vertex[o])


def main() -> None:
    mine = asked(rank)
    others, weights = list(mine), list(mine.values())
    for weighted in (True, False):
        extra = {"sourceweights": weights, "destweights": weights} if weighted else {}
        graph = comm.Create_dist_graph_adjacent(others, others, reorder=True, **extra)
        vertex = graph.rank
        sources, targets, found = graph.Get_dist_neighbors()
        assert list(sources) == list(targets) == list(asked(vertex))
        if weighted:
            assert list(found[0]) == list(found[1]) == list(asked(vertex).values())
        assert sorted(comm.allgather(vertex)) == list(range(size))
        got = np.full(len(sources), -1, "i")
        graph.Neighbor_allgather(np.array([vertex], "i"), got)
        assert got.tolist() == list(sources)
        if weighted:
            place = os.environ.get("UNDERTOW_MPI_PLACE", "")
            before, after = crossing(comm.allgather(place)), crossing(graph.allgather(place))
            if rank == 0:
                print(f"crossing {before} {after}")
        graph.Free()
    if rank == 0:
        print("ok")


if __name__ == "__main__":
    main()
