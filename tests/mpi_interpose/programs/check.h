/* What the C programs share: a place among the ranks, and a check that ends the job and names its line. */
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHECK(condition)                                                    \
  do {                                                                      \
    if (!(condition)) {                                                     \
      fprintf(stderr, "rank %d line %d: %s\n", rank, __LINE__, #condition); \
      MPI_Abort(MPI_COMM_WORLD, 1);                                         \
    }                                                                       \
  } while (0)

static int rank, size, peer; /* peer: the other one of a pair */

static void begin(int* argc, char*** argv) {
  MPI_Init(argc, argv);
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  peer = rank ^ 1;
}

static int end(void) { /* prints "ok" when every rank has come so far */
  MPI_Barrier(MPI_COMM_WORLD);
  if (rank == 0) printf("ok\n");
  return MPI_Finalize();
}
