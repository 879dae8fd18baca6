"""A matrix's columns sent as a derived datatype; the preload packs them.

undertow mpi run -- mpirun -n 2 python -m undertow.examples.plain_mpi
"""

import numpy as np
from mpi4py import MPI

comm = MPI.COMM_WORLD
matrix = np.arange(512 * 512, dtype=np.float32).reshape(512, 512) + comm.rank
columns = MPI.FLOAT.Create_vector(512, 4, 512).Commit()  # the first four columns: 512 blocks of 16 bytes
got = np.zeros((512, 512), np.float32)
comm.Sendrecv([matrix, 1, columns], (comm.rank + 1) % comm.size, recvbuf=[got, 1, columns])
expected = matrix - comm.rank + (comm.rank - 1) % comm.size
assert np.array_equal(got[:, :4], expected[:, :4]) and not got[:, 4:].any()
columns.Free()
if comm.rank == 0:
    print(f"{comm.size} ranks exchanged four columns of {matrix.shape}")
