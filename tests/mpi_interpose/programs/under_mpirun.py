"""Tests of an MPI program as its author writes them: run by `mpirun -n 2 python -m pytest --with-mpi` (pytest-mpi)."""

import numpy as np
import pytest

MPI = pytest.importorskip("mpi4py.MPI")
COMM = MPI.COMM_WORLD


def column(rows: int) -> "MPI.Datatype":
    return MPI.DOUBLE.Create_vector(rows, 1, 8).Commit()


@pytest.mark.mpi(min_size=2)
def test_a_column_travels_round_the_ring() -> None:
    rank, size = COMM.rank, COMM.size
    sent, kept = np.arange(64.0).reshape(8, 8) + 100 * rank, np.zeros((8, 8))
    kind = column(8)
    COMM.Sendrecv([sent, 1, kind], (rank + 1) % size, 3, [kept, 1, kind], (rank - 1) % size, 3)
    kind.Free()
    want = np.zeros((8, 8))
    want[:, 0] = np.arange(0.0, 64.0, 8.0) + 100 * ((rank - 1) % size)
    assert np.array_equal(kept, want)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("root", [0, 1])
def test_a_column_reaches_all(root: int) -> None:
    data, kind = np.full((8, 8), float(COMM.rank)), column(8)
    COMM.Bcast([data, 1, kind], root)
    kind.Free()
    assert np.all(data[:, 0] == root) and np.all(data[:, 1:] == COMM.rank)


@pytest.mark.mpi(min_size=2)
def test_packing_agrees_with_numpy() -> None:
    data, kind = np.arange(64.0).reshape(8, 8), column(8)
    out = np.zeros(8)
    kind.Pack(data, out, 0, COMM)
    kind.Free()
    assert np.array_equal(out, data[:, 0])
